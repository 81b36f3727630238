"""A PPO iteration beside TRL's PPOTrainer on the same weights: wall and CPU seconds by phase, peak memory.

    python tests/benchmarks/bench_ppo.py [--case fixed varied] [--precision bfloat16 float32] [--repeats 3] [--out FILE]

Actor, reference, critic and reward model of OPT-125m's shape (random weights, 50,264 tokens), 16 sequences, one PPO epoch in one
minibatch, no gradient checkpointing, one process. `fixed`: 128 + 128 tokens. `varied`: prompts of 32 to 256 tokens
(log-uniform) and weights that make EOS so likely that answers end at random, after about 55 of 128 tokens. Each system runs in a
process of its own, in turn with the others, two iterations a turn of which the second counts; figures are medians over the
turns. CPU seconds are those of all threads, the steadier measure on a machine that others use too. What each system says of its
first rollout is printed, so that the work is seen to be alike.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
VOCABULARY, PAD, EOS, ROWS, NEW = 50_264, 1, 2, 16, 128
SYSTEMS = ("ours", "trl")
PHASES = ("generate", "score", "train")
EOS_NATS = math.log(VOCABULARY / 55) - 0.9  # its logit varies, which makes it likelier than its mean says


def tokenizer() -> Any:
    """One word a token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(3, VOCABULARY)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def save_models(folder: Path, case: str, layers: int) -> None:
    """Actor and reward model in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, OPTConfig

    from rlhf_core.export import save_causal_lm, save_value_model
    from rlhf_core.models import ValueModel

    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=768, ffn_dim=3072, num_hidden_layers=layers, num_attention_heads=12,
        max_position_embeddings=1024, word_embed_proj_dim=768, dropout=0.0, attention_dropout=0.0,
        pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # what comes before the head has a part along one direction, and EOS its row there
        along = torch.full((768,), 768**-0.5)
        model.model.decoder.final_layer_norm.bias += 5 * along
        nats = EOS_NATS if case == "varied" else -60.0
        model.lm_head.weight[EOS] = nats / 5 * along
        model.lm_head.weight[PAD] = -12 * along
    save_causal_lm(model, tokenizer(), folder / "actor")
    save_value_model(ValueModel.from_causal_lm(model, 0), tokenizer(), folder / "reward")


def prompts(case: str, iterations: int) -> list[list[int]]:
    """Prompts of all iterations."""
    import numpy as np

    random = np.random.default_rng(0)
    count = ROWS * iterations
    lengths = np.full(count, 128) if case == "fixed" else np.exp(random.uniform(np.log(32), np.log(256.9), count))
    return [random.integers(3, VOCABULARY, int(n)).tolist() for n in lengths]


class Clock:
    """Wall and CPU seconds of phases."""

    def __init__(self) -> None:
        self.rows: list[dict[str, list[float]]] = []
        self._row: dict[str, list[float]] = {}
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def start(self) -> None:
        self._last = self._now()

    def phase(self, name: str) -> None:
        """What has passed since the last call belongs to this phase."""
        now = self._now()
        row = self._row.setdefault(name, [0.0, 0.0])
        self._row[name] = [row[i] + now[i] - self._last[i] for i in (0, 1)]
        self._last = now

    def end(self) -> None:
        self.rows.append(self._row)
        self._row = {}


def run_ours(folder: Path, case: str, precision: str, iterations: int) -> dict[str, Any]:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    from rlhf_core.models import load_tokenizer
    from rlhf_core.ppo_args import PPOArgs
    from rlhf_core.ppo_trainer import DeepSpeedPPOTrainer
    from rlhf_core.resources import Resources
    from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine
    from rlhf_core.specs import PPOSpec

    spec = PPOSpec(
        rollout_batch_size=ROWS, ppo_epochs=1, minibatches=1, max_response_tokens=NEW, kl_coef=0.05,
        precision="bf16" if precision == "bfloat16" else "fp32",
    )  # fmt: skip
    resources = Resources(micro_batch=ROWS, micro_tokens=1024)
    words = load_tokenizer(str(folder / "actor"))
    engine = DeepSpeedRLHFEngine(
        str(folder / "actor"), str(folder / "reward"), words, iterations, PPOArgs(spec, resources)
    )
    trainer, clock, asked = DeepSpeedPPOTrainer(engine), Clock(), prompts(case, iterations)
    facts = []
    for i in range(iterations):
        clock.start()
        answers = trainer.sample({"prompt": asked[i * ROWS : (i + 1) * ROWS]})
        clock.phase("generate")
        experience = trainer.score(answers)
        trainer.measure(experience)
        clock.phase("score")
        trainer.train_rlhf(experience)
        clock.phase("train")
        clock.end()
        facts.append({"useful": int(experience.response_mask.sum()), "score": trainer.metrics["score"],
                      "entropy": trainer.metrics["entropy"]})  # fmt: skip
    return {"iterations": clock.rows, "facts": facts}


def run_trl(folder: Path, case: str, precision: str, iterations: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, ppo_trainer

    words = tokenizer()
    words.padding_side = "left"
    dtype, out = getattr(torch, precision), folder / "trl"
    args = PPOConfig(
        output_dir=str(out), per_device_train_batch_size=4, gradient_accumulation_steps=4, num_mini_batches=1,
        num_ppo_epochs=1, total_episodes=ROWS * iterations, response_length=NEW, stop_token="eos", learning_rate=1e-6,
        kl_coef=0.05, temperature=1.0, num_sample_generations=0, local_rollout_forward_batch_size=ROWS, report_to=[],
        bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True, seed=1, gradient_checkpointing=False,
    )  # fmt: skip
    actor, reference = (AutoModelForCausalLM.from_pretrained(folder / "actor", dtype=dtype) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=dtype) for _ in range(2)
    )
    data = Dataset.from_dict({"input_ids": prompts(case, iterations)})
    clock, facts = Clock(), []
    generate = ppo_trainer.batch_generation

    def timed_generation(*arguments: Any, **options: Any) -> Any:
        clock.start()
        made = generate(*arguments, **options)
        clock.phase("generate")
        return made

    ppo_trainer.batch_generation = timed_generation
    trainer = ppo_trainer.PPOTrainer(
        args=args, processing_class=words, model=actor, ref_model=reference, value_model=value, reward_model=reward,
        train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    step, log = trainer.callback_handler.on_step_end, trainer.log
    forward = ppo_trainer.forward
    state = {"training": False}

    def first_forward(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and not state["training"]:
            state["training"] = True
            clock.phase("score")
        return forward(*arguments, **options)

    def noted(metrics: dict[str, float], *rest: Any) -> None:
        facts.append({"score": metrics.get("objective/scores"), "entropy": metrics.get("policy/entropy_avg"),
                      "eos": metrics.get("val/num_eos_tokens")})  # fmt: skip
        log(metrics, *rest)

    def ended(*arguments: Any, **options: Any) -> Any:
        clock.phase("train")
        clock.end()
        state["training"] = False
        return step(*arguments, **options)

    ppo_trainer.forward, trainer.log, trainer.callback_handler.on_step_end = first_forward, noted, ended
    trainer.train()
    return {"iterations": clock.rows, "facts": facts}


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def child(args: argparse.Namespace) -> None:
    """One turn of one system, in a process of its own; one line of JSON."""
    import torch

    torch.set_num_threads(args.threads)
    found = {"ours": run_ours, "trl": run_trl}[args.child](args.folder, args.case[0], args.precision[0], 2)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps(found), flush=True)


def turn(system: str, folder: Path, case: str, precision: str, threads: int) -> dict[str, Any]:
    command = [
        sys.executable, __file__, "--child", system, "--folder", str(folder), "--case", case, "--precision", precision,
        "--threads", str(threads),
    ]  # fmt: skip
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0",
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    rows = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not rows:
        raise SystemExit(f"{system} {case} {precision} failed:\n{done.stderr[-3000:]}")
    return json.loads(rows[-1].removeprefix("RESULT "))


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns of their second iterations."""
    last = [t["iterations"][-1] for t in turns]
    row: dict[str, Any] = {
        name: {kind: statistics.median(one[name][i] for one in last) for i, kind in enumerate(("wall", "cpu"))}
        for name in PHASES
    }
    row["whole"] = {
        kind: statistics.median(sum(one[p][i] for p in PHASES) for one in last)
        for i, kind in enumerate(("wall", "cpu"))
    }
    row["peak"] = statistics.median(t["peak"] for t in turns)
    row["facts"] = turns[0]["facts"][0]
    return row


def show(case: str, precision: str, rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        phases = "  ".join(f"{p} {row[p]['cpu']:6.1f}" for p in PHASES)
        ratio = rows["trl"]["whole"]["cpu"] / row["whole"]["cpu"] if "trl" in rows else float("nan")
        print(
            f"{case:7} {precision:9} {name:5} CPU s: {phases}  whole {row['whole']['cpu']:6.1f}  "
            f"wall {row['whole']['wall']:6.1f}  peak {row['peak'] / 1e9:5.1f} GB  x{ratio:.2f}  first: {row['facts']}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=("fixed", "varied"), default=["fixed", "varied"])
    parser.add_argument("--precision", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12, help="fewer: quicker")
    parser.add_argument("--out", type=Path, help="JSON with all turns")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in args.case:
            save_models(folder := Path(temporary, case), case, args.layers)
            for precision in args.precision:
                turns: dict[str, list[dict[str, Any]]] = {name: [] for name in args.systems}
                for _ in range(args.repeats):
                    for name, made in turns.items():
                        made.append(turn(name, folder, case, precision, args.threads))
                rows = {name: summary(made) for name, made in turns.items()}
                show(case, precision, rows)
                found.append({"case": case, "precision": precision, "systems": rows, "turns": turns})
    if args.out:
        args.out.write_text(
            json.dumps({"threads": args.threads, "layers": args.layers, "runs": found}, indent=1) + "\n"
        )
    return None


if __name__ == "__main__":
    main()
