"""Experience: what one rollout yields for the updates that follow it.

A frozen bundle of tensors, one row per answer. `gather_experience` brings the rows of all ranks to all ranks in the order of
their sample ids, so that minibatches, whitening and metrics are those of the global batch, whatever the number of processes.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from rlhf_core.distributed import gather
from rlhf_core.rollout import pad_to


@dataclass(frozen=True)
class Experience:
    """Answers with all that was measured of them.

    Attributes:
        sample_ids: `[batch]`, names of the answers, unique in a run.
        prompt_ids, prompt_mask: `[batch, prompt]`, left-padded.
        response_ids, response_mask: `[batch, response]`, right-padded, mask through EOS.
        logprobs: `[batch, response]`, of the policy that sampled (the "old" log-probabilities).
        entropy: `[batch, response]`, of the sampling distribution.
        ref_logprobs: `[batch, response]`, of the reference.
        values: `[batch, response]`, of the critic before the updates.
        scores: `[batch]`, of the reward model, normalised if the spec says so, before clipping and penalties.
        ended: `[batch]` bool, EOS was emitted.
        support: `[batch, response, bytes]` uint8, tokens kept by top-k/top-p, or None.
    """

    sample_ids: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    ended: Tensor
    support: Tensor | None = None

    def __len__(self) -> int:
        return self.sample_ids.shape[0]

    def rows(self, index: Tensor) -> "Experience":
        """Some rows, with the columns that only they do not need cut off."""
        chosen = {name: v[index] for name, v in self.tensors().items()}
        prompt = int(chosen["prompt_mask"].sum(1).max())
        response = max(1, int(chosen["response_mask"].sum(1).max()))
        for name, value in chosen.items():
            if name.startswith("prompt"):
                chosen[name] = value[:, value.shape[1] - prompt :]
            elif value.dim() > 1:
                chosen[name] = value[:, :response]
        return replace(self, **chosen)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; None is left out."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def to(self, device: torch.device | str) -> "Experience":
        """The same on another device."""
        return replace(self, **{name: v.to(device) for name, v in self.tensors().items()})


def concatenate(parts: list[Experience], pad: int) -> Experience:
    """Rows of several experiences in one, padded to the widest."""
    if len(parts) == 1:
        return parts[0]
    prompt = max(p.prompt_ids.shape[1] for p in parts)
    response = max(p.response_ids.shape[1] for p in parts)
    merged: dict[str, Tensor | None] = {}
    for f in fields(Experience):
        values = [getattr(p, f.name) for p in parts]
        if values[0] is None:
            merged[f.name] = None
            continue
        if values[0].dim() > 1:
            left = f.name.startswith("prompt")
            fill = pad if f.name.endswith("_ids") else 0
            values = [pad_to(v, prompt if left else response, fill, left) for v in values]
        merged[f.name] = torch.cat(values)
    return Experience(**merged)  # pyright: ignore[reportArgumentType]


def deal_experience(parts: list[Experience], pad: int, answers: int, rank: int, world: int) -> Experience:
    """This rank's rows of what other ranks had, the answers to one prompt side by side as they were."""
    merged = concatenate(parts, pad)
    merged = merged.rows(torch.argsort(merged.sample_ids))
    return merged.rows(torch.arange(len(merged)).view(-1, answers)[rank::world].reshape(-1))


def gather_experience(local: Experience, pad: int) -> Experience:
    """All ranks' rows on every rank, in order of sample id."""
    device = local.sample_ids.device
    merged = concatenate([part.to(device) for part in gather(local.to("cpu"))], pad)
    return merged.rows(torch.argsort(merged.sample_ids))
