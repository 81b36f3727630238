"""The plain decode loop: whole batches over a growing key-value cache, as anyone would write it.

The reference that `slots` is compared with, and an engine to choose where that should not be right for a model.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_core.distributed import any_rank
from rlhf_core.rollout.answers import Rollout, join, left_pad, select
from rlhf_core.rollout.request import Request
from rlhf_core.rollout.sampling import pack_bits, sample_token, uniform
from rlhf_core.rollout.step import last_logits


def generate_plain(model: Any, asked: Request) -> Rollout:
    """Batches of prompts of similar length, each until all its answers have ended."""
    return in_batches(asked, lambda rows: _generate_batch(model, asked, rows))


def in_batches(asked: Request, batch: Callable[[list[int]], Rollout]) -> Rollout:
    """What `batch` makes of rows of similar length, put together in the order of the prompts."""
    order = sorted(range(len(asked.prompts)), key=lambda i: len(asked.prompts[i]))
    parts: list[Rollout] = []
    for start in range(0, len(order), asked.batch_size):
        rows = order[start : start + asked.batch_size]
        parts.append(batch(rows))
        if asked.on_batch:
            asked.on_batch(start + len(rows))
    return select(join(parts, asked.pad), torch.tensor(np.argsort(order)))


def _generate_batch(model: Any, asked: Request, rows: list[int]) -> Rollout:
    names, sampling = asked.names[rows], asked.sampling
    device = next(model.parameters()).device
    ids, mask = left_pad([asked.prompts[i] for i in rows], asked.pad, device)
    cache = DynamicCache(config=model.config)
    step_ids, seen = ids, mask
    alive = torch.ones(len(rows), dtype=torch.bool, device=device)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]] = []
    for position in range(sampling.max_new_tokens):
        if asked.on_token:
            asked.on_token()
        logits = last_logits(model, step_ids, seen, cache)
        drawn = sample_token(logits, sampling, uniform(asked.seed, names, position))
        token = torch.where(alive, drawn.token, asked.pad)
        packed = None if drawn.keep is None else pack_bits(drawn.keep)
        columns.append((token, alive, drawn.logprob.where(alive, 0.0), drawn.entropy.where(alive, 0.0), packed))
        step_ids, seen = token.unsqueeze(1), torch.cat([seen, alive.long().unsqueeze(1)], 1)
        alive = alive & (token != asked.eos)
        more = bool(alive.any())
        if not (any_rank(more) if asked.lock_step else more):
            break
    token, kept, logprob, entropy, packed = zip(*columns, strict=True)
    support = None if packed[0] is None else torch.stack([p for p in packed if p is not None], 1)
    return Rollout(
        ids,
        mask,
        torch.stack(token, 1),
        torch.stack(kept, 1).long(),
        torch.stack(logprob, 1),
        torch.stack(entropy, 1),
        support,
    )
