"""Which rows make which optimizer step, and how a step's rows are dealt to ranks and micro-batches.

The order is a function of (seed, epoch) alone. A step's rows are sorted by length and dealt in turn, so ranks get equal
numbers of rows and similar lengths; every rank runs the same number of forward passes (ZeRO-3 needs that).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from pyarrow import compute
from torch import Tensor

from rlhf_core.errors import DataError

Row = dict[str, Any]


def open_rows(path: Path) -> Dataset:
    """A split of the data artifact, memory-mapped. DataError if the data stage left none."""
    if not path.exists():
        raise DataError(f"data.shares.{path.parent.name}: is 0, so there is no data for it; give it a share")
    data = load_from_disk(str(path))
    assert isinstance(data, Dataset)
    return data


def longest(rows: Dataset, column: str) -> int:
    """Tokens of the longest list in a column, without reading the lists."""
    lengths = compute.list_value_length(rows.data.column(column))  # pyright: ignore[reportAttributeAccessIssue]
    return int(compute.max(lengths).as_py())  # pyright: ignore[reportAttributeAccessIssue]


def total_steps(rows: int, batch_size: int, epochs: float, max_steps: int | None, stage: str) -> int:
    """Optimizer steps of `epochs` passes, the last incomplete batch left out. DataError if there is not one batch."""
    steps = int(rows * epochs) // batch_size
    if steps < 1:
        raise DataError(
            f"{stage}.batch_size {batch_size} needs more rows: the data has {rows} for {epochs} epochs; "
            "lower batch_size, raise epochs or give more data"
        )
    return min(steps, max_steps) if max_steps else steps


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, a permutation of `[rows]`."""
    return np.random.default_rng((seed, epoch)).permutation(rows)


def step_rows(rows: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Row numbers `[batch_size]` of one step; epochs follow each other without a gap."""
    first = step * batch_size
    wanted = np.arange(first, first + batch_size)
    epochs = wanted // rows
    orders = {int(e): epoch_order(rows, seed, int(e)) for e in np.unique(epochs)}
    return np.array([orders[int(e)][i] for e, i in zip(epochs, wanted % rows, strict=True)])


def deal(lengths: Sequence[int], rank: int, world: int, micro_batch: int) -> list[list[int]]:
    """This rank's micro-batches, as indices into `lengths`: longest first, dealt in turn."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    mine = order[rank::world]
    return [mine[i : i + micro_batch] for i in range(0, len(mine), micro_batch)]


def right_pad(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Lists to `[batch, tokens]`, padded on the right."""
    width = max(1, max(len(row) for row in rows))
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out.to(device)
