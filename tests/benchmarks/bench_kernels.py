"""Our kernels for CPUs beside torch's, on OPT-125m's layers: milliseconds, and how far each is from fp64.

    python tests/benchmarks/bench_kernels.py [--threads 2] [--repeats 5] [--out FILE]

`rows`: causal attention of eight rows of so many tokens, as the models that score read them, and with its backward pass; torch's
kernel takes the rows one by one. `token`: one token of 16 rows over 192 that a cache holds. `few rows`: a linear layer of 16 rows,
beside torch's choice and oneDNN with weights in its own layout. `product`: fp32 linear layers of 2,048 tokens and their
backward pass, as torch chooses (MKL) and by oneDNN, where `cpu_products` finds that faster. Each call meets other tensors than the
one before, more in all than caches hold, as in a model. Kernels take turns; medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlhf_core.cpu_kernels import can_pack, few_rows, library, packed, rows_attention, token_attention
from rlhf_core.cpu_products import use_fast_products, usual_products

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, SIZE, HIDDEN, VOCABULARY = 12, 64, 768, 50_264
AT_ONCE = 256 << 20  # bytes of the tensors that a kernel meets in one turn
Kernel = Callable[[Any], Tensor]
Case = tuple[str, list[Any], dict[str, Kernel], Callable[[Any], Tensor]]


def many(make: Callable[[], Any], size: int) -> list[Any]:
    """So many inputs of `size` bytes that caches do not hold them."""
    return [make() for _ in range(min(100, max(1, AT_ONCE // size)))]


def torch_rows(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention by torch's kernel, row by row."""
    rows = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    made = [functional.scaled_dot_product_attention(*row, is_causal=True).transpose(1, 2) for row in rows]
    return torch.cat(made, 1)


def backwards(attend: Kernel) -> Kernel:
    """All three gradients, side by side."""

    @torch.enable_grad()
    def call(x: list[Tensor]) -> Tensor:
        inputs = [t.detach().requires_grad_() for t in x]
        return torch.cat(torch.autograd.grad(attend(inputs).sum(), inputs))

    return call


def rows(kind: torch.dtype, tokens: int) -> Iterator[Case]:
    lengths = [tokens] * 8

    def make() -> list[Tensor]:
        shape = (1, sum(lengths), HEADS, SIZE)
        return [torch.randn(shape).to(kind).transpose(1, 2) for _ in range(3)]

    systems: dict[str, Kernel] = {
        "ours": lambda x: rows_attention(*x, lengths, None),
        "torch": lambda x: torch_rows(*x, lengths),
    }
    inputs = many(make, 8 * 3 * tokens * HEADS * SIZE * kind.itemsize)
    plain = systems["torch"]
    yield f"rows of {tokens}", inputs, systems, lambda x: plain([t.double() for t in x])
    through = {name: backwards(attend) for name, attend in systems.items()}
    yield f"rows of {tokens}, both ways", inputs, through, lambda x: backwards(plain)([t.double() for t in x])


def token(kind: torch.dtype, columns: int) -> Iterator[Case]:
    def make() -> list[Tensor]:
        cache = [torch.randn(16, HEADS, columns + 64, SIZE).to(kind)[:, :, 32 : 32 + columns] for _ in range(2)]
        return [torch.randn(16, HEADS, 1, SIZE).to(kind), *cache]

    systems: dict[str, Kernel] = {
        "ours": lambda x: token_attention(*x, None, None).transpose(1, 2),
        "torch": lambda x: functional.scaled_dot_product_attention(*x),
    }
    inputs = many(make, 2 * 16 * HEADS * columns * SIZE * kind.itemsize)
    yield f"token over {columns}", inputs, systems, lambda x: systems["torch"]([t.double() for t in x])


def linear(kind: torch.dtype, inside: int, outside: int) -> Iterator[Case]:
    x = torch.randn(16, inside).to(kind)
    able = can_pack(torch.empty(outside, inside, dtype=kind))

    def make() -> list[Tensor]:
        weight = torch.randn(outside, inside).to(kind)
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        return [weight, ordered, *([packed(weight)] if able else [])]

    systems: dict[str, Kernel] = {
        "torch": lambda w: functional.linear(x, w[0]),
        "oneDNN": lambda w: torch.ops.mkldnn._linear_pointwise(x, w[1], None, "none", [], ""),
    }
    if able:
        systems["ours"] = lambda w: few_rows(x, w[2], None, outside)
    inputs = many(make, inside * outside * kind.itemsize)
    yield f"few rows {inside} x {outside}", inputs, systems, lambda w: x.double() @ w[0].double().t()


def product(inside: int, outside: int) -> Iterator[Case]:
    def make() -> tuple[Tensor, Tensor]:
        return torch.randn(2048, inside), torch.randn(outside, inside)

    def all_three(x: tuple[Tensor, Tensor]) -> Tensor:
        tokens, weight = x
        out = tokens @ weight.t()
        _ = out @ weight
        return out.t() @ tokens

    def usual(x: tuple[Tensor, Tensor]) -> Tensor:
        with usual_products():
            return all_three(x)

    systems = {"ours": all_three, "torch": usual} if use_fast_products() else {"torch": usual}
    yield (
        f"product {inside} x {outside}",
        [make() for _ in range(3)],
        systems,
        lambda x: all_three(tuple(t.double() for t in x)),
    )


def cases() -> Iterator[tuple[str, Case]]:
    """All of them, with the name of their type."""
    for name, kind in KINDS.items():
        for tokens in (64, 256, 1024):
            yield from ((name, case) for case in rows(kind, tokens))
        yield from ((name, case) for case in token(kind, 192))
        for inside, outside in ((HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, VOCABULARY)):
            yield from ((name, case) for case in linear(kind, inside, outside))
    yield from (("fp32", case) for case in product(HIDDEN, 4 * HIDDEN))


@torch.no_grad()
def measured(case: Case, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of a call, and the largest error relative to the result's spread."""
    _, inputs, systems, exactly = case
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    exact = exactly(inputs[0])
    errors = {s: float((call(inputs[0]).double() - exact).abs().max() / exact.std()) for s, call in systems.items()}
    for turn in range(repeats + 1):
        for system, call in systems.items():
            began = time.perf_counter()
            for each in inputs:
                call(each)
            if turn:
                seconds[system].append((time.perf_counter() - began) / len(inputs))
    return {s: {"ms": 1e3 * statistics.median(seconds[s]), "error": errors[s]} for s in systems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    if library() is None:
        raise SystemExit("there are no kernels for this machine to be measured")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = []
    for kind, case in cases():
        systems = measured(case, args.repeats)
        found.append({"case": case[0], "type": kind, "threads": args.threads, "systems": systems})
        said = [f"{s} {row['ms']:7.3f} ms (error {row['error']:.0e})" for s, row in systems.items()]
        print(f"{case[0]:24} {kind}  " + "  ".join(said), flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
