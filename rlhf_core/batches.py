"""Which rows make which optimizer step, and how a step's rows are dealt to ranks and micro-batches.

The order is a function of (seed, epoch) alone. A step's rows are sorted by length and dealt in turn, so ranks get equal
numbers of rows and similar lengths. Every rank has the same number of micro-batches, some perhaps empty, since ZeRO-3 needs as
many forward passes of each. With packing, a rank's rows are first joined to rows of up to so many tokens.
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


def longest(rows: Dataset, *columns: str) -> int:
    """Tokens of the longest row, its lists in `columns` together, without reading the lists; 0 without rows."""
    lengths: Any = 0
    for column in columns:
        lengths = compute.add(lengths, compute.list_value_length(rows.data.column(column)))  # pyright: ignore
    return int(compute.max(lengths).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]


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
    """This rank's micro-batches, as indices into `lengths`: longest first, dealt in turn; as many on every rank."""
    order = _longest_first(lengths)
    mine = order[rank::world]
    return [mine[i : i + micro_batch] for i in range(0, len(order[::world]), micro_batch)]


def deal_packed(lengths: Sequence[int], rank: int, world: int, micro_batch: int, tokens: int) -> list[list[list[int]]]:
    """This rank's micro-batches of up to `micro_batch` packed rows, each a list of indices into `lengths`."""
    order = _longest_first(lengths)
    packed = [pack(lengths, order[r::world], tokens) for r in range(world)]
    count = max(len(rows) for rows in packed)
    return [packed[rank][i : i + micro_batch] for i in range(0, count, micro_batch)]


def pack(lengths: Sequence[int], order: Sequence[int], tokens: int) -> list[list[int]]:
    """Join rows to rows of up to `tokens` tokens: each to the first that has room (first fit), in the order given.

    DataError if one row alone is longer.
    """
    packed: list[list[int]] = []
    room: list[int] = []
    for index in order:
        if lengths[index] > tokens:
            raise DataError(
                f"resources.pack_tokens {tokens} is less than a row of {lengths[index]} tokens; raise it, or lower "
                "data.max_prompt_tokens or data.max_response_tokens"
            )
        place = next((i for i, free in enumerate(room) if lengths[index] <= free), None)
        if place is None:
            packed.append([])
            room.append(tokens)
            place = len(packed) - 1
        packed[place].append(index)
        room[place] -= lengths[index]
    return packed


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def right_pad(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Lists to `[batch, tokens]`, padded on the right."""
    width = max(1, max(len(row) for row in rows))
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out.to(device)
