"""Continuous batching: rows that have ended leave at once, prompts that wait take their places, and only live rows are computed.

Prompts enter longest first, in groups of similar length so that little padding is computed, with the head at their last
position only; the answers to one prompt share its pass. Every pass is either of a group that enters or one step of all rows, and
the order of passes depends on nothing but lengths, so that the same call gives the same bits. With `lock_step` every rank
makes as many passes as the busiest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_core.distributed import any_rank
from rlhf_core.rollout.answers import Answers, Rollout, left_pad
from rlhf_core.rollout.cache import SlotCache
from rlhf_core.rollout.cpu import fast_steps
from rlhf_core.rollout.request import Request
from rlhf_core.rollout.sampling import uniform
from rlhf_core.rollout.step import last_logits

EFFICIENT_TOKENS = 512  # a pass of so many is as cheap a token as a larger one
PADDING = 1.1  # tokens computed for each real one, up to which prompts enter together


@dataclass(frozen=True)
class Waiting:
    """A prompt and the numbers of its answers, so few that they need not wait long for that many slots."""

    prompt: tuple[int, ...]
    answers: tuple[int, ...]


def queue_of(prompts: Sequence[Sequence[int]], slots: int) -> list[Waiting]:
    """Prompts in the order in which they enter: longest first; equal ones together, up to a quarter of the slots."""
    together = -(-slots // 4)
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        asked.setdefault(tuple(prompt), []).append(number)
    queue = [
        Waiting(prompt, tuple(numbers[i : i + together]))
        for prompt, numbers in asked.items()
        for i in range(0, len(numbers), together)
    ]
    return sorted(queue, key=lambda entry: (-len(entry.prompt), entry.answers))


def group_of(queue: Sequence[Waiting], free: int) -> int:
    """How many entries of the queue enter together into `free` slots; 0 if the first does not fit."""
    count = real = 0
    longest = len(queue[0].prompt)
    for entry in queue:
        free -= len(entry.answers)
        real += len(entry.prompt)
        computed = longest * (count + 1)
        if free < 0 or (count and computed > EFFICIENT_TOKENS and computed > PADDING * real):
            break
        count += 1
    return count


class Slots:
    """One rollout under way on this rank."""

    def __init__(self, model: Any, asked: Request, dtype: torch.dtype | None = None) -> None:
        """`dtype`: of keys and values; default the model's."""
        self.model, self.names, self.seed, self.pad = model, asked.names, asked.seed, asked.pad
        self.device = next(model.parameters()).device
        count = len(asked.prompts)
        self.queue = queue_of(asked.prompts, asked.batch_size)
        self.answers = Answers(count, asked.sampling, asked.eos, asked.pad, self.device)
        self.running = np.zeros(0, dtype=np.int64)  # number of the answer of each row
        self.tokens = torch.zeros(0, dtype=torch.long, device=self.device)  # the last of each row
        longest = len(self.queue[0].prompt) + asked.sampling.max_new_tokens
        layers = model.config.get_text_config().num_hidden_layers
        self.slots = SlotCache(min(asked.batch_size, count), longest, layers, self.device, dtype)

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self.queue) or self.slots.rows > 0

    def work(self) -> None:
        """One forward pass: of prompts that enter, if enough slots are free for it to pay, else of all rows."""
        free = self.slots.slots - self.slots.rows
        if self.queue and (free >= max(1, self.slots.slots // 8)) and (count := group_of(self.queue, free)):
            self._enter(count)
        else:
            self._step()

    def idle(self) -> None:
        """One forward pass that means nothing, as others make one."""
        one = torch.full((1, 1), self.pad, dtype=torch.long, device=self.device)
        last_logits(self.model, one, torch.ones_like(one), None)

    def _enter(self, count: int) -> None:
        group, self.queue = self.queue[:count], self.queue[count:]
        ids, mask = left_pad([entry.prompt for entry in group], self.pad, self.device)
        prompts = DynamicCache()
        logits = last_logits(self.model, ids, mask, prompts)
        source = [row for row, entry in enumerate(group) for _ in entry.answers]
        lengths = [len(group[row].prompt) for row in source]
        numbers = np.array([number for entry in group for number in entry.answers], dtype=np.int64)
        if len(source) > len(group):
            logits = logits[torch.tensor(source, device=self.device)]
        self.slots.enter(prompts, lengths, source)
        self.running = np.concatenate([self.running, numbers])
        first = self.slots.rows - len(source)
        self._draw(first, logits)

    def _step(self) -> None:
        mask = self.slots.step_mask()
        logits = last_logits(self.model, self.tokens.unsqueeze(1), mask, self.slots.cache)
        self.slots.advance(len(self.queue[0].prompt) if self.queue else 0)
        self.tokens = self.tokens[:0]
        self._draw(0, logits)

    def _draw(self, first: int, logits: Tensor) -> None:
        """Give the rows from `first` on their next token; those that end with it leave."""
        numbers = self.running[first:]
        noise = uniform(self.seed, self.names[numbers], self.answers.lengths[numbers])
        drawn, over = self.answers.draw(numbers, logits, noise)
        self.tokens = torch.cat([self.tokens, drawn])
        ended = np.flatnonzero(over) + first
        if len(ended):
            order = self.slots.leave(ended.tolist())
            self.running = self.running[order]
            self.tokens = self.tokens[torch.tensor(order, dtype=torch.long, device=self.device)]


def generate_slots(model: Any, asked: Request) -> Rollout:
    """`asked.batch_size` rows run at most."""
    with fast_steps(model) as dtype:
        rollout, done = Slots(model, asked, dtype), 0
        while any_rank(rollout.busy) if asked.lock_step else rollout.busy:
            if asked.on_token:
                asked.on_token()
            rollout.work() if rollout.busy else rollout.idle()
            if asked.on_batch and rollout.answers.done > done:
                asked.on_batch(done := rollout.answers.done)
    return rollout.answers.rollout(*left_pad(asked.prompts, asked.pad, rollout.device))
