"""What a rollout yields: answers with their log-probabilities, as tensors, and how they grow; and the padding of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from rlhf_core.rollout.sampling import Sampling, pack_bits, sample_token


@dataclass(frozen=True)
class Rollout:
    """Answers to a batch of prompts; rows in the order of the prompts.

    Attributes:
        prompt_ids, prompt_mask: `[batch, prompt]`, left-padded.
        response_ids, response_mask: `[batch, response]`, right-padded; the mask is 1 through EOS.
        logprobs: `[batch, response]` of the sampled tokens; 0 where masked.
        entropy: `[batch, response]` of the distribution sampled from, nats; 0 where masked.
        support: `[batch, response, ceil(vocabulary / 8)]` uint8, bits of the tokens kept by top-k/top-p, or None.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    support: Tensor | None = None

    def responses(self) -> list[list[int]]:
        """Token ids of each answer, EOS included where it was emitted."""
        return [row[mask.bool()].tolist() for row, mask in zip(self.response_ids, self.response_mask, strict=True)]


class Answers:
    """The answers of a rollout as they grow.

    Attributes:
        lengths: `[answers]`, tokens so far.
        done: how many have ended.
    """

    def __init__(self, count: int, sampling: Sampling, eos: int, pad: int, device: torch.device) -> None:
        self.sampling, self.eos, self.done = sampling, eos, 0
        self.lengths = np.zeros(count, dtype=np.int64)
        shape = (count, sampling.max_new_tokens)
        self.ids = torch.full(shape, pad, dtype=torch.long, device=device)
        self.logprobs, self.entropy = torch.zeros(shape, device=device), torch.zeros(shape, device=device)
        self.support: Tensor | None = None

    def draw(self, numbers: np.ndarray, logits: Tensor, noise: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Add a token to each of the answers `numbers`; the tokens, and which have ended with them, `[numbers]` each."""
        drawn = sample_token(logits, self.sampling, noise)
        at = torch.from_numpy(numbers).to(logits.device), torch.from_numpy(self.lengths[numbers]).to(logits.device)
        self.ids[at], self.logprobs[at], self.entropy[at] = drawn.token, drawn.logprob, drawn.entropy
        if drawn.keep is not None:
            packed = pack_bits(drawn.keep)
            if self.support is None:
                self.support = packed.new_zeros((*self.ids.shape, packed.shape[-1]))
            self.support[at] = packed
        self.lengths[numbers] += 1
        ended = (drawn.token == self.eos).cpu().numpy() | (self.lengths[numbers] == self.ids.shape[1])
        self.done += int(ended.sum())
        return drawn.token, ended

    def rollout(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Rollout:
        """All of them, as wide as the longest."""
        width = int(self.lengths.max())
        columns = torch.arange(width, device=self.ids.device)
        mask = columns < torch.from_numpy(self.lengths).to(self.ids.device).unsqueeze(1)
        parts = (self.ids, self.logprobs, self.entropy)
        ids, logprobs, entropy = (part[:, :width].clone() for part in parts)
        support = None if self.support is None else self.support[:, :width].clone()
        return Rollout(prompt_ids, prompt_mask, ids, mask.long(), logprobs, entropy, support)


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids to `[batch, tokens]` ids and mask, padding on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


def pad_to(tensor: Tensor, width: int, value: float, left: bool = False) -> Tensor:
    """Pad dimension 1 to `width`."""
    missing = width - tensor.shape[1]
    sides = (0, 0) * (tensor.dim() - 2) + ((missing, 0) if left else (0, missing))
    return torch.nn.functional.pad(tensor, sides, value=value)


def join(parts: Sequence[Rollout], pad: int) -> Rollout:
    """Rows of several rollouts in one, padded to the longest prompt and response."""
    if len(parts) == 1:
        return parts[0]
    prompt = max(p.prompt_ids.shape[1] for p in parts)
    response = max(p.response_ids.shape[1] for p in parts)

    def cat(name: str) -> Tensor | None:
        if getattr(parts[0], name) is None:
            return None
        left = name.startswith("prompt")
        fill = pad if name.endswith("_ids") else 0
        return torch.cat([pad_to(getattr(p, name), prompt if left else response, fill, left) for p in parts])

    return Rollout(**{f.name: cat(f.name) for f in fields(Rollout)})  # pyright: ignore[reportArgumentType]


def select(rollout: Rollout, rows: Tensor) -> Rollout:
    """Some rows, in that order."""
    found = {f.name: getattr(rollout, f.name) for f in fields(Rollout)}
    return replace(rollout, **{k: v[rows.to(v.device)] for k, v in found.items() if v is not None})
