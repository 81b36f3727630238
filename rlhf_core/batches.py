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
    """A split of the data artifact (`<share>/<split>`), memory-mapped.

    Raises:
        DataError: the share is 0, or the split holds no row.
    """
    share = f"data.shares.{path.parent.name}"
    if not path.exists():
        raise DataError(f"{share}: is 0, so there is no data for it; give it a share")
    data: Any = load_from_disk(str(path)) if any(path.glob("*.arrow")) else ()  # datasets cannot open what has no file
    if not len(data):
        remedy = (
            "no row of it is held out; raise data.shares.test"
            if path.name == "test"
            else "every row of it was dropped or held out; relax the limits of data, lower data.shares.test"
        )
        raise DataError(f"{share}: {remedy} or give more data")
    assert isinstance(data, Dataset)
    return data


def row_lengths(rows: Dataset, *columns: str) -> np.ndarray:
    """Tokens of each row, its lists in `columns` together, without reading the lists: `[rows]`.

    Args:
        rows: a whole split as `open_rows` gives it, not a selection.
        columns: names of columns of lists.
    """
    assert rows._indices is None, "a selection's table holds the rows that were not selected too"
    return sum(
        (compute.list_value_length(rows.data.column(column)).to_numpy() for column in columns),  # pyright: ignore
        start=np.zeros(len(rows), dtype=np.int64),
    )


def longest(rows: Dataset, *columns: str) -> int:
    """Tokens of the longest row, its lists in `columns` together."""
    return int(row_lengths(rows, *columns).max())


def some_rows(rows: int, most: int, seed: int) -> np.ndarray:
    """Numbers of up to `most` of `rows` rows, in order: all, or a seeded sample, in which every source has its share."""
    return np.sort(epoch_order(rows, seed, 0)[:most])


def sources_of(rows: Dataset) -> list[str]:
    """The source of each row, "" where it has none."""
    if "source" not in rows.column_names:
        return [""] * len(rows)
    return [str(source or "") for source in rows.data.column("source").to_pylist()]


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


def deal(
    lengths: Sequence[int], rank: int, world: int, micro_batch: int, tokens: int | None = None, padded: bool = True
) -> list[list[int]]:
    """This rank's micro-batches, as indices into `lengths`: longest first, dealt in turn; as many on every rank.

    Args:
        lengths: tokens of each row.
        rank, world: which of how many ranks.
        micro_batch: most rows of a micro-batch.
        tokens: most tokens of one that has several rows.
        padded: whether padding is among them.
    """
    order = longest_first(lengths)
    widths = [lengths[i] for i in order[::world]]  # no rank's rows are longer
    return cut(order[rank::world], widths, micro_batch, tokens, padded)


def cut(
    rows: Sequence[int], widths: Sequence[int], micro_batch: int, tokens: int | None, padded: bool = True
) -> list[list[int]]:
    """Micro-batches of `rows`, of which there may be one less than `widths`: no row is longer than the width in its place."""
    parts: list[list[int]] = []
    first = 0
    for end in range(1, len(widths) + 1):
        rest = end == len(widths)
        with_next = widths[first] * (end + 1 - first) if padded else sum(widths[first : end + 1])
        wider = tokens is not None and with_next > tokens
        if rest or wider or end - first == micro_batch:
            parts.append(list(rows[first:end]))
            first = end
    return parts


def deal_packed(lengths: Sequence[int], rank: int, world: int, micro_batch: int, tokens: int) -> list[list[list[int]]]:
    """This rank's micro-batches of up to `micro_batch` packed rows, each a list of indices into `lengths`."""
    order = longest_first(lengths)
    packed = [pack(lengths, order[r::world], tokens) for r in range(world)]
    count = max(len(rows) for rows in packed)
    return [packed[rank][i : i + micro_batch] for i in range(0, count, micro_batch)]


def pack(lengths: Sequence[int], order: Sequence[int], tokens: int) -> list[list[int]]:
    """Join rows to rows of up to `tokens` tokens: each to the first that has room (first fit), in the order given.

    The first with room is found in a tree of the rows' room, in time that grows as n log n.

    DataError if one row alone is longer.
    """
    size = 1 << max(len(order) - 1, 0).bit_length()
    room = [tokens] * (2 * size)  # a tree: leaf `size + i` is the room of packed row i, a node the most below it
    packed: list[list[int]] = []
    for index in order:
        length = lengths[index]
        if length > tokens:
            raise DataError(
                f"resources.pack_tokens {tokens} is less than a row of {length} tokens; raise it, or lower "
                "data.max_prompt_tokens or data.max_response_tokens"
            )
        node = 1
        while node < size:
            node = 2 * node + (room[2 * node] < length)
        if node - size == len(packed):
            packed.append([])
        packed[node - size].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return packed


def longest_first(lengths: Sequence[int]) -> list[int]:
    """Numbers of the rows, longest first."""
    return sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))


def pair_lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each pair's prompt and longer answer, `[pairs]`, without reading the pairs."""
    answers = np.maximum(row_lengths(rows, "chosen_ids"), row_lengths(rows, "rejected_ids"))
    return row_lengths(rows, "prompt_ids") + answers


def pair_length(row: Row) -> int:
    """Tokens of a pair's prompt and longer answer."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def pair_tokens(rows: Sequence[Row]) -> int:
    """Tokens of all pairs: each prompt with each of its two answers."""
    return sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)


def right_padded(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids to `[batch, tokens]` ids and mask, padded on the right."""
    return right_pad(rows, pad, device), right_pad([[1] * len(row) for row in rows], 0, device)


def right_pad(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Lists to `[batch, tokens]`, padded on the right."""
    width = max(1, max(len(row) for row in rows))
    out = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out.to(device)
