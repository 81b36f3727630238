"""Speed of rollouts: our engines beside transformers' `generate` and DeepSpeed's rollout, on the same weights, prompts, sampling.

    python tests/benchmarks/bench_rollout.py [--precision bfloat16] [--repeats 3] [--threads 2] [--layers 12] [--lora RANK]

A model of OPT-125m's shape with random weights. `fixed`: 16 prompts of 128 tokens, 128 new ones each. `varied`: 32 prompts as
long as hh-rlhf's, and EOS so likely that answers have 53 of 128 tokens on average, as people's do. `deepspeed` is its
HybridEngineRollout as it samples (its continuous batching is greedy, and fails with transformers 5.23). Engines take turns;
medians of wall and CPU seconds, and useful tokens (through EOS) a CPU second; `--out` keeps all repeats. With `--lora` it is
adapters on all linear layers that are compared: applied, and merged (anew in each rollout, which is counted).
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from opt_125m import EOS, MEAN_ANSWER, NEW, OPT_125M, PAD, Shape, config, prompts
from transformers import AutoModelForCausalLM

from rlhf_core.lora import add_lora, layers
from rlhf_core.rollout import EngineName, Sampling, generate, left_pad
from rlhf_core.rollout.twin import twin
from rlhf_core.specs import LoRASpec

Prompts = Sequence[Sequence[int]]


def model_of(layers: int, precision: str) -> Any:
    """The shape, with weights from a seed."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(Shape(layers))).to(getattr(torch, precision)).eval()


def work(case: str) -> tuple[Prompts, float]:
    """Prompts, and what is added to the logit of EOS."""
    varied = case == "varied"
    more = math.log(OPT_125M.vocabulary / MEAN_ANSWER) if varied else -1e4
    return prompts(varied, 2 if varied else 1), more


def add_adapters(model: Any, rank: int) -> None:
    """Adapters that do something, on every linear layer of the blocks."""
    add_lora(model, LoRASpec(rank=rank, alpha=2.0 * rank), "--lora")
    for _, layer in layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.01)
    model.eval()


def ours(model: Any, prompts: Prompts, engine: EngineName, merge: bool = False) -> int:
    """Useful tokens that one of our engines samples, on the model or on a twin with its adapters merged."""
    model = twin(model, merge=True) if merge else model
    options = {"seed": 0, "eos": EOS, "pad": PAD, "batch_size": 16}
    made = generate(model, prompts, range(len(prompts)), Sampling(NEW), engine=engine, **options)
    return int(made.response_mask.sum())


@torch.no_grad()
def theirs(model: Any, prompts: Prompts) -> int:
    """Useful tokens that transformers samples, in batches of as many rows."""
    count = 0
    for start in range(0, len(prompts), 16):
        ids, mask = left_pad(prompts[start : start + 16], PAD, torch.device("cpu"))
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[:, ids.shape[1] :]
        ended = (made == EOS).cumsum(1) - (made == EOS).long()
        count += int((ended == 0).sum())
    return count


def deepspeeds(model: Any, prompts: Prompts) -> int:
    """Useful tokens that DeepSpeed's rollout engine samples, in batches of as many rows."""
    from deepspeed.runtime.rollout.base import RolloutRequest, SamplingConfig
    from deepspeed.runtime.rollout.hybrid_engine_rollout import HybridEngineRollout

    marks = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    engine, count = HybridEngineRollout(SimpleNamespace(module=model), marks), 0
    for start in range(0, len(prompts), 16):
        request = RolloutRequest(*left_pad(prompts[start : start + 16], PAD, torch.device("cpu")))
        made = engine.generate(request, SamplingConfig(NEW))
        count += int(made.attention_mask[:, request.prompt_ids.shape[1] :].sum())
    return count


def systems_of(model: Any, prompts: Prompts, lora: bool) -> dict[str, Callable[[], int]]:
    """What is compared; the last is what ratios are to."""
    if lora:
        return {
            "merged": lambda: ours(model, prompts, "slots", merge=True),
            "applied": lambda: ours(model, prompts, "slots"),
        }
    return {
        "slots": lambda: ours(model, prompts, "slots"),
        "plain": lambda: ours(model, prompts, "plain"),
        "generate": lambda: ours(model, prompts, "generate"),
        "deepspeed": lambda: deepspeeds(model, prompts),
        "transformers": lambda: theirs(model, prompts),
    }


def measure(systems: dict[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, Any]]:
    """All systems in turn, `repeats` times."""
    raw: dict[str, list[tuple[float, float, int]]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = system()
            raw[name].append((time.perf_counter() - wall, time.process_time() - cpu, tokens))
    return {
        name: {
            "wall": statistics.median(r[0] for r in rows),
            "cpu": statistics.median(r[1] for r in rows),
            "tokens_per_cpu_second": statistics.median(r[2] / r[1] for r in rows),
            "raw": rows,
        }
        for name, rows in raw.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--case", choices=("fixed", "varied"), nargs="+", default=["fixed", "varied"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12, help="fewer: quicker")
    parser.add_argument("--lora", type=int, help="rank of adapters, to compare merged with applied")
    parser.add_argument("--out", type=Path, help="JSON with all repeats")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for precision in args.precision:
        model = model_of(args.layers, precision)
        if args.lora:
            add_adapters(model, args.lora)
        for case in args.case:
            asked, more = work(case)
            hook = model.get_output_embeddings().register_forward_hook(lambda _m, _i, out, more=more: _add(out, more))
            systems = systems_of(model, asked, bool(args.lora))
            figures = measure(systems, args.repeats)
            hook.remove()
            found.append({"precision": precision, "case": case, "systems": figures})
            for name, row in figures.items():
                base = figures[list(figures)[-1]]["tokens_per_cpu_second"]
                ratio = row["tokens_per_cpu_second"] / base
                print(
                    f"{precision:9} {case:7} {name:13} wall {row['wall']:6.2f} s  cpu {row['cpu']:6.2f} s  "
                    f"{row['tokens_per_cpu_second']:6.1f} tokens a CPU second  x{ratio:.2f}",
                    flush=True,
                )
    if args.out:
        args.out.write_text(
            json.dumps({"threads": args.threads, "layers": args.layers, "runs": found}, indent=1) + "\n"
        )


def _add(logits: torch.Tensor, more: float) -> torch.Tensor:
    logits[..., EOS] += more
    return logits


if __name__ == "__main__":
    main()
