"""The key-value cache of running rows: allocated once, all rows ending in the same column, rows that leave are filled up.

A row's tokens lie side by side and end in column `end`, where every row's next token goes; so distances between columns are
distances between tokens, as attention with windows and ALiBi needs them, and to a model this is an ordinary left-padded batch
of the columns `low` to `end`. A prompt that enters is laid to end there too. When the columns run out, all rows move back to
the beginning. Running rows are always rows 0 to `rows` - 1: the last ones move to where others have left.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SLACK = 64  # columns beyond the longest row, so that moving back is rare


class SlotCache:
    """Keys and values of up to `slots` rows.

    Attributes:
        cache: what a model takes as `past_key_values` in a step of all rows.
        rows: running ones.
        low, end: columns of the oldest token of any of them, and of the next token of all.
    """

    def __init__(
        self, slots: int, longest: int, layers: int, device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        """`longest`: tokens of the longest row there will be, prompt and answer; `dtype`: default the model's."""
        self.dtype = dtype
        self.slots, self.capacity = slots, longest + max(SLACK, longest // 4)
        self.layers = [_Layer(self) for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))
        self.mask = torch.zeros((slots, self.capacity), dtype=torch.long, device=device)
        self.starts = np.zeros(slots, dtype=np.int64)
        self.rows = self.low = self.end = 0

    def step_mask(self) -> Tensor:
        """Count the next column in for all rows; which columns of each are its tokens, `[rows, columns]`."""
        self.mask[: self.rows, self.end] = 1
        return self.mask[: self.rows, self.low : self.end + 1]

    def advance(self, longest_waiting: int) -> None:
        """A step has filled column `end`. `longest_waiting`: tokens of a prompt that may have to end in the next."""
        self.end += 1
        if self.end == self.capacity:
            self._move(max(self.end - self.low, longest_waiting))

    def enter(self, prompts: Cache, lengths: Sequence[int], source: Sequence[int]) -> None:
        """Let rows enter: a copy of row `source[i]` of a left-padded batch of prompts, of `lengths[i]` tokens, for each."""
        if not self.rows:
            self.low = self.end = max(lengths)
        first, self.rows = self.rows, self.rows + len(source)
        assert self.rows <= self.slots and max(lengths) <= self.end
        index = torch.tensor(source, device=self.mask.device)
        for layer, entering in zip(self.layers, prompts.layers, strict=True):
            keys, values = entering.keys, entering.values  # pyright: ignore
            assert keys is not None and values is not None
            width = keys.shape[2]
            layer.make(keys, values)
            span = slice(self.end - width, self.end)
            layer.keys[first : self.rows, :, span] = keys[index].to(layer.keys.dtype)
            layer.values[first : self.rows, :, span] = values[index].to(layer.values.dtype)
        self.mask[first : self.rows] = 0
        for row, length in enumerate(lengths, start=first):
            self.mask[row, self.end - length : self.end] = 1
            self.starts[row] = self.end - length
        self.low = int(self.starts[: self.rows].min())

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Let rows go. Returns for each row that runs now which one it was."""
        gone = set(rows)
        order = list(range(self.rows))
        holes = sorted(row for row in gone if row < self.rows - len(gone))
        stay = [row for row in range(self.rows - len(gone), self.rows) if row not in gone]
        for hole, row in zip(holes, stay, strict=True):
            order[hole] = row
        if holes:
            span = slice(self.low, self.end)
            for layer in self.layers:
                for states in (layer.keys, layer.values):
                    states[holes, :, span] = states[stay, :, span]
            self.mask[holes] = self.mask[stay]
            self.starts[holes] = self.starts[stay]
        self.rows -= len(gone)
        if self.rows:
            self.low = int(self.starts[: self.rows].min())
        return order[: self.rows]

    def _move(self, end: int) -> None:
        """Lay all rows so that they end before column `end`."""
        by = self.end - end
        old, new = slice(self.low, self.end), slice(self.low - by, end)
        for states in [*(layer.keys for layer in self.layers), *(layer.values for layer in self.layers)]:
            states[: self.rows, :, new] = states[: self.rows, :, old].clone()
        mask = self.mask[: self.rows, old].clone()
        self.mask.zero_()
        self.mask[: self.rows, new] = mask
        self.starts -= by
        self.low, self.end = self.low - by, end


class _Layer(CacheLayerMixin):
    """One layer's keys and values; columns and rows are those of its `SlotCache`."""

    is_sliding = False  # every column is kept; what a window hides the model's own mask hides
    keys: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Tensor  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, slots: SlotCache) -> None:
        super().__init__()
        self._slots = slots

    def make(self, keys: Tensor, values: Tensor) -> None:
        """Allocate, once the shape is known. Zeros: a masked column has weight 0, and 0 times anything must be 0."""
        if self.is_initialized:
            return
        at = self._slots
        for name, states in (("keys", keys), ("values", values)):
            shape = (at.slots, states.shape[1], at.capacity, states.shape[3])
            setattr(self, name, states.new_zeros(shape, dtype=at.dtype or states.dtype))
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As transformers asks for it."""
        self.make(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store one token of every row; all keys and values of the rows."""
        at = self._slots
        self.keys[: at.rows, :, at.end : at.end + 1] = key_states
        self.values[: at.rows, :, at.end : at.end + 1] = value_states
        columns = slice(at.low, at.end + 1)
        return self.keys[: at.rows, :, columns], self.values[: at.rows, :, columns]

    def get_seq_length(self) -> int:
        """Columns before the step's own."""
        return self._slots.end - self._slots.low

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention sees, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit that a model need know of."""
        return -1
