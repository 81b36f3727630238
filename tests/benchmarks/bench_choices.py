"""What was measured before two choices on CPUs: int8 weights for models that only score, and the kernel of AdamW.

    python tests/benchmarks/bench_choices.py [--threads 1] [--layers 12] [--repeats 3] [--cpu-adam] [--out FILE]

`scoring`: one pass of 16 x 256 tokens through the trunk of OPT-125m's shape, in fp32, bf16, and with torch's dynamic
quantisation (int8 weights, activations quantised at each call); and how far its hidden states are from fp32's, relative to
their spread. `adamw`: one step over as many parameters, and how far the weights are from the plain loop's after all steps.
`--cpu-adam` adds DeepSpeed's, which is compiled at the first use. Systems take turns; medians of CPU seconds.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from opt_125m import Shape, config
from torch import Tensor, nn
from transformers import AutoModel

ROWS, TOKENS = 16, 256


def trunk(layers: int) -> Any:
    """OPT-125m's shape with weights from a seed."""
    torch.manual_seed(0)
    return AutoModel.from_config(config(Shape(layers))).eval()


def in_turn(systems: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of all systems in turn, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(repeats + 1):
        for name, system in systems.items():
            began = time.process_time()
            system()
            if turn:
                seconds[name].append(time.process_time() - began)
    return seconds


@torch.no_grad()
def scoring(layers: int, repeats: int) -> dict[str, Any]:
    """A frozen model in three kinds of numbers."""
    plain = trunk(layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torchao is to replace this
        from torch.ao.quantization import quantize_dynamic

        int8 = quantize_dynamic(copy.deepcopy(plain), {nn.Linear}, dtype=torch.qint8)
    models = {"fp32": plain, "bf16": copy.deepcopy(plain).bfloat16(), "int8": int8}
    ids = torch.randint(3, 50_000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    hidden: dict[str, Tensor] = {}

    def passing(name: str) -> None:
        hidden[name] = models[name](input_ids=ids, use_cache=False).last_hidden_state

    seconds = in_turn({name: lambda name=name: passing(name) for name in models}, repeats)
    exact = hidden["fp32"]
    return {
        name: {
            "cpu": statistics.median(seconds[name]),
            "error": float((hidden[name].float() - exact).square().mean().sqrt() / exact.std()),
            "raw": seconds[name],
        }
        for name in models
    }


def adamw(layers: int, repeats: int, cpu_adam: bool) -> dict[str, Any]:
    """One optimizer step over the trunk's parameters, by each kernel."""
    shapes = [p.shape for p in trunk(layers).parameters()]
    kinds: dict[str, Callable[..., Any]] = {
        "loop": lambda p, **o: torch.optim.AdamW(p, foreach=False, fused=False, **o),
        "foreach": lambda p, **o: torch.optim.AdamW(p, foreach=True, **o),
        "fused": lambda p, **o: torch.optim.AdamW(p, fused=True, **o),
    }
    if cpu_adam:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        kinds["deepspeed"] = lambda p, **o: DeepSpeedCPUAdam(p, adamw_mode=True, **o)
    steps, weights = {}, {}
    for name, make in kinds.items():
        generator = torch.Generator().manual_seed(0)
        weights[name] = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
        for weight in weights[name]:
            weight.grad = 1e-3 * torch.randn(weight.shape, generator=generator)
        steps[name] = make(weights[name], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).step
    seconds = in_turn(steps, repeats)
    return {
        name: {
            "cpu": statistics.median(seconds[name]),
            "error": max(
                float((w - exact).detach().abs().max()) for w, exact in zip(own, weights["loop"], strict=True)
            ),
            "raw": seconds[name],
        }
        for name, own in weights.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="fewer: quicker")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-adam", action="store_true", help="DeepSpeed's too; needs a compiler")
    parser.add_argument("--out", type=Path, help="JSON with all repeats")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for case, figures in (
        ("scoring", lambda: scoring(args.layers, args.repeats)),
        ("adamw", lambda: adamw(args.layers, args.repeats, args.cpu_adam)),
    ):
        found[case] = figures()
        for name, row in found[case].items():
            print(f"{case:8} {name:10} {row['cpu']:7.3f} CPU seconds  error {row['error']:.1e}", flush=True)
    if args.out:
        args.out.write_text(
            json.dumps({"threads": args.threads, "layers": args.layers, "cases": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
