"""What a rollout yields: answers with their log-probabilities, as tensors; and the padding of rows that they share."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


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
