"""transformers' own `generate`, with our sampling put in its place: for models that only their own generation code decodes right.

A logits processor draws each token as the other engines do, by the noise of (seed, answer, position), keeps its log-probability,
and leaves that token alone to choose from; so the answers are those of the other engines but for rounding. The settings that
come with a model (repetition penalty, forced tokens and the like) are out of force meanwhile, as PPO's log-probabilities would
not be those of the model with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf_core.rollout.answers import Answers, Rollout, left_pad
from rlhf_core.rollout.plain import in_batches
from rlhf_core.rollout.request import Request
from rlhf_core.rollout.sampling import uniform


class _Draw(LogitsProcessor):
    """Draws the tokens of one batch's answers."""

    def __init__(self, asked: Request, rows: list[int], device: torch.device) -> None:
        self.names, self.seed, self.on_token = asked.names[rows], asked.seed, asked.on_token
        self.answers = Answers(len(rows), asked.sampling, asked.eos, asked.pad, device)
        self._running = np.arange(len(rows))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` `[rows, vocabulary]` but 0 for the token drawn and -inf for all others."""
        if self.on_token:
            self.on_token()
        only = torch.full_like(scores, -torch.inf)
        only[:, self.answers.eos] = 0.0  # of rows that have ended, which generate pads itself
        if not len(self._running):
            return only
        rows = torch.from_numpy(self._running).to(scores.device)
        noise = uniform(self.seed, self.names[self._running], self.answers.lengths[self._running])
        token, ended = self.answers.draw(self._running, scores[rows], noise)
        only[rows] = torch.full_like(scores[rows], -torch.inf).scatter(1, token.unsqueeze(1), 0.0)
        self._running = self._running[~ended]
        return only


def generate_native(model: Any, asked: Request) -> Rollout:
    """Batches of prompts of similar length, each until all its answers have ended."""
    with _no_settings(model):
        return in_batches(asked, lambda rows: _generate_batch(model, asked, rows))


def _generate_batch(model: Any, asked: Request, rows: list[int]) -> Rollout:
    device = next(model.parameters()).device
    ids, mask = left_pad([asked.prompts[i] for i in rows], asked.pad, device)
    draw = _Draw(asked, rows, device)
    settings = GenerationConfig(
        max_new_tokens=asked.sampling.max_new_tokens, do_sample=False, eos_token_id=asked.eos, pad_token_id=asked.pad
    )
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=LogitsProcessorList([draw]),
        synced_gpus=asked.lock_step,
    )
    return draw.answers.rollout(ids, mask)


@contextmanager
def _no_settings(model: Any) -> Iterator[None]:
    """A model without the settings for generation that it came with: `generate` would take them where ours say nothing."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
