"""A PPO iteration beside TRL's PPOTrainer on the same weights and the same answers: seconds by phase, share of the roofline, peak.

    python tests/benchmarks/bench_ppo.py [--case fixed varied] [--precision bf16 fp32] [--repeats 3] [--out FILE]

Actor, reference, critic and reward model of OPT-125m's shape (random weights, 50,264 tokens), 16 sequences, one PPO epoch in one
minibatch, no gradient checkpointing. `fixed`: 128 + 128 tokens. `varied`: prompts as long as hh-rlhf's, and weights that make EOS
so likely that answers end at random, after 53 of at most 128 tokens on average, as people's do. Each system runs in a process of
its own (`--processes 2`: two ranks of one thread), in turn with the others and with a measurement of the machine, three iterations
a turn of which the last counts (in earlier ones memory is still new); figures are medians over the turns.

Below each stands what both say of the first step. TRL gives a score one state late, after the answer's end, where that is
before the limit (its `padding_mask_p1`), and counts that state in the value loss; `value_loss_trl` is the loss by its rule.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
from machine import rounds  # noqa: E402
from opt_125m import NEW, OPT_125M, ROWS, Shape, prompts, save_models, tokenizer  # noqa: E402
from roofline import Limits, generation, scoring, training  # noqa: E402
from turns import Clock, job_of_child, medians, options, say, turn  # noqa: E402

SYSTEMS = ("ours", "trl")
PHASES = ("generate", "score", "train")
ITERATIONS = 3
MICRO_TOKENS = 2048


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Iterations of our trainer on this rank; leaves the answers of all ranks for the peer."""
    from rlhf_core.ppo_args import PPOArgs
    from rlhf_core.ppo_trainer import DeepSpeedPPOTrainer
    from rlhf_core.resources import Resources
    from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine
    from rlhf_core.specs import OptimSpec, PPOSpec

    folder, rows, micro = Path(job["folder"]), job["rows"], job["micro"]
    spec = PPOSpec(
        rollout_batch_size=rows, ppo_epochs=1, minibatches=1, max_response_tokens=NEW, kl_coef=0.05, missing_eos_penalty=None,
        precision=job["precision"], actor_optim=OptimSpec(lr=1e-6), critic_optim=OptimSpec(lr=1e-6),
    )  # fmt: skip
    resources = Resources(micro_batch=micro or rows, micro_tokens=None if micro else MICRO_TOKENS)
    engine = DeepSpeedRLHFEngine(
        str(folder / "actor"),
        str(folder / "reward"),
        tokenizer(Shape(**job["shape"])),
        ITERATIONS,
        PPOArgs(spec, resources),
    )
    trainer, clock, facts, answers = DeepSpeedPPOTrainer(engine), Clock(), [], []
    asked = prompts(job["case"] == "varied", ITERATIONS, rows, job["prompt"])
    rank, own = trainer.ranks.rank, rows // trainer.ranks.world
    for i in range(ITERATIONS):
        clock.start()
        rollout = trainer.sample({"prompt": asked[i * rows + rank * own :][:own]})
        clock.phase("generate")
        experience = trainer.score(rollout)
        trainer.measure(experience)
        clock.phase("score")
        beside = {"value_loss_trl": value_loss_trl(trainer, experience)} if i == 0 else {}
        clock.start()
        trainer.train_rlhf(experience)
        clock.phase("train")
        clock.end()
        mask = experience.response_mask.bool()
        answers.append([ids[m].tolist() for ids, m in zip(experience.response_ids, mask, strict=True)])
        said = trainer.metrics
        facts.append({
            "tokens": int(mask.sum()), "score": said["score"], "nats": float(-experience.logprobs[mask].sum() / own),
            "actor_loss": said["actor_loss"], "critic_loss": said["critic_loss"], **beside,
        })  # fmt: skip
    return {"iterations": clock.rows, "facts": facts, "answers": answers}


def value_loss_trl(trainer: Any, e: Any) -> float:
    """The value loss before any update as TRL counts it: answers that have ended get their score at a state after the last."""
    import torch

    from rlhf_core import ppo_math as pm
    from rlhf_core.scoring import response_values

    ids = torch.nn.functional.pad(e.response_ids, (0, 1))
    mask = torch.nn.functional.pad(e.response_mask, (0, 1))
    lengths = e.response_mask.sum(1)
    short = lengths < lengths.max()  # the longest fills the width, and has its score at its last token
    mask[short, lengths[short]] = 1
    with torch.no_grad():
        values = response_values(trainer.engine.critic, e.prompt_ids, e.prompt_mask, ids, mask)
    kl = torch.nn.functional.pad(pm.select(e.logprobs - e.ref_logprobs, e.response_mask), (0, 1))
    spec = trainer.spec
    rewards = pm.token_rewards(e.scores, kl, mask, trainer.kl_coef)
    _, returns = pm.gae(rewards, values, mask, spec.gamma, spec.lam)
    return float(0.5 * pm.masked_mean((values - returns) ** 2, mask))


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """Iterations of TRL's trainer on this rank."""
    from trl_peer import ppo

    return ppo({**job, "iterations": ITERATIONS}, json.loads((Path(job["folder"]) / "answers.json").read_text()))


def one_turn(system: str, job: dict[str, Any], processes: int, threads: int) -> list[dict[str, Any]]:
    """All ranks of one system; ours goes first, as the peer takes its answers."""
    ranks = turn(__file__, {**job, "system": system, "processes": processes}, processes, threads)
    if system == "ours":
        answers = [[row for rank in ranks for row in rank["answers"][i]] for i in range(ITERATIONS)]
        (Path(job["folder"]) / "answers.json").write_text(json.dumps(answers))
        for rank in ranks:
            rank["lengths"] = [list(map(len, made)) for made in rank.pop("answers")]
    return ranks


def job_of(folder: Path, case: str, precision: str, shape: Shape = OPT_125M, **other: Any) -> dict[str, Any]:
    """What every turn of a comparison is told; `micro`: rows of a micro-batch, None: as each system has them."""
    basis = {"rows": ROWS, "prompt": 128, "micro": None, **other}
    return {"folder": str(folder), "case": case, "precision": precision, "shape": asdict(shape), **basis}


def compared(
    job: dict[str, Any], systems: Sequence[str] = SYSTEMS, repeats: int = 3, processes: int = 1, threads: int = 2
) -> dict[str, Any]:
    """One case at one precision: medians and roofline of all systems, all turns beside them."""
    limits, turns = rounds(systems, repeats, processes * threads, lambda name: one_turn(name, job, processes, threads))
    asked = prompts(job["case"] == "varied", ITERATIONS, job["rows"], job["prompt"])[-job["rows"] :]
    made = [n for rank in turns["ours"][0] for n in rank["lengths"][-1]]
    rows = [(len(p), a) for p, a in zip(asked, made, strict=True)]
    least_seconds = least(rows, job["precision"], limits, Shape(**job["shape"]))
    return {
        **{key: value for key, value in job.items() if key != "folder"},
        "processes": processes,
        "threads": threads,
        "tokens": sum(made),
        "machine": limits,
        "least": least_seconds,
        "systems": {name: medians(each) for name, each in turns.items()},
        "first": {name: _first(each[0]) for name, each in turns.items()},
        "turns": turns,
    }


def least(rows: list[tuple[int, int]], precision: str, limits: dict[str, float], shape: Shape) -> dict[str, float]:
    """Seconds that each phase takes at least on this machine."""
    at = Limits(limits[precision], limits["bytes"])
    seconds = {
        "generate": generation(rows, precision, at, shape),
        "score": scoring(rows, at, shape),
        "train": training(rows, precision, at, shape),
    }
    return {**seconds, "whole": sum(seconds.values())}


def _first(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """What all ranks say of the first step: tokens in all, means of the rest."""
    facts = [rank["facts"][0] for rank in ranks]
    mean = {name: statistics.mean(each[name] for each in facts) for name in facts[0]}
    return {**mean, "tokens": sum(each["tokens"] for each in facts)}


def show(found: dict[str, Any]) -> None:
    """A line for each system and one for what they say."""
    least, systems = found["least"], found["systems"]
    print(
        f"{found['case']} {found['precision']}: {found['tokens']} useful tokens; machine "
        f"{found['machine'][found['precision']] / 1e9:.0f} GFLOP/s, {found['machine']['bytes'] / 1e9:.0f} GB/s read; "
        f"least {', '.join(f'{k} {v:.1f}' for k, v in least.items())} s"
    )
    for name, row in systems.items():
        phases = "  ".join(
            f"{p} {row[p]['wall']:5.1f} s ({100 * least[p] / row[p]['wall']:2.0f} %)" for p in (*PHASES, "whole")
        )
        ratio = systems["trl"]["whole"]["wall"] / row["whole"]["wall"] if "trl" in systems else float("nan")
        cpu = row["whole"]["cpu"]
        print(f"  {name:5} {phases}  CPU {cpu:5.1f} s  peak {row['peak'] / 1e9:4.1f} GB  x{ratio:.2f}", flush=True)
    for name, first in found["first"].items():
        print(f"  {name:5} first step: " + ", ".join(f"{k} {v:.6g}" for k, v in first.items()), flush=True)


def main() -> None:
    if job := job_of_child():
        return say({"ours": run_ours, "trl": run_trl}[job["system"]](job))
    parser = options(__doc__, SYSTEMS)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in args.case:
            shape = Shape(args.layers)
            save_models(folder := Path(temporary, case), case == "varied", shape)
            for precision in args.precision:
                job = job_of(folder, case, precision, shape)
                found.append(compared(job, args.systems, args.repeats, args.processes, args.threads))
                show(found[-1])
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
