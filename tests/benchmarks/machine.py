"""What this machine can do at best: operations a second of large products, bytes a second read from memory.

    python tests/benchmarks/machine.py [--threads 2]

Benchmarks measure it in turn with the systems they compare, as on a shared machine it changes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from turns import job_of_child, say, turn

SIZE, SECONDS = 2048, 1.0
Ranks = list[dict[str, Any]]  # what each rank of a turn said


def limits(threads: int) -> dict[str, float]:
    """`fp32` and `bf16`: operations a second of square products; `bytes`: read a second. By `threads` threads."""
    torch.set_num_threads(threads)
    return {"fp32": _products(torch.float32), "bf16": _products(torch.bfloat16), "bytes": _reading()}


def _products(dtype: torch.dtype) -> float:
    """By torch's own choice of library, or oneDNN if that is faster."""
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    out = torch.empty(SIZE, SIZE, dtype=dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(b, SIZE)
    least = min(
        _seconds(lambda: torch.mm(a, b, out=out)),
        _seconds(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")),
    )
    return 2 * SIZE**3 / least


def _reading() -> float:
    numbers = torch.ones(1 << 28, dtype=torch.float32)
    return 4 * len(numbers) / _seconds(lambda: numbers.sum())


def _seconds(call: Any) -> float:
    """Median seconds of a call, over about a second."""
    call()
    taken, began = [], time.perf_counter()
    while time.perf_counter() - began < SECONDS or len(taken) < 5:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measured(threads: int) -> dict[str, float]:
    """The same, in a process of its own."""
    return turn(__file__, {}, 1, threads)[0]


def rounds(
    systems: Sequence[str], repeats: int, threads: int, one_turn: Callable[[str], Ranks]
) -> tuple[dict[str, float], dict[str, list[Ranks]]]:
    """`repeats` rounds of a measurement of the machine and a turn of each system: medians of the first, all turns."""
    machine, turns = [], {name: [] for name in systems}
    for _ in range(repeats):
        machine.append(measured(threads))
        for name, made in turns.items():
            made.append(one_turn(name))
    return {key: statistics.median(each[key] for each in machine) for key in machine[0]}, turns


def main() -> None:
    if job := job_of_child():
        return say(limits(job["threads"]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    return print(json.dumps(measured(parser.parse_args().threads), indent=1))


if __name__ == "__main__":
    main()
