"""Rollouts: sampled answers with their log-probabilities, in the actor's own process on the actor's own weights.

A plain decode loop over a key-value cache. Noise is one uniform number per (seed, sample id, position), so an answer does
not depend on its rank, its batch or the time. The distribution sampled from is the one whose log-probabilities are returned:
softmax(logits / temperature), and with top-k or top-p renormalised over the kept tokens, which are returned too (packed
bits), so that training can evaluate the same distribution. Generation ends when every row has emitted EOS.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from rlhf_core.distributed import any_rank
from rlhf_core.models import _accepts, base_model
from rlhf_core.specs import ModelSpec


@dataclass(frozen=True)
class Sampling:
    """How to sample. `top_k` 0 and `top_p` 1 are off.

    Attributes:
        vocabulary: number of the tokenizer's tokens; rows of the embedding beyond it are padding and never sampled.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    vocabulary: int | None = None

    @property
    def filters(self) -> bool:
        """Whether some tokens are excluded."""
        return self.top_k > 0 or self.top_p < 1.0


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


def noise_seed(seed: int, stage: str) -> int:
    """A seed of the sampling noise for a stage of its own: stages with one seed do not share their noise."""
    return int.from_bytes(hashlib.sha256(f"{stage}:{seed}".encode()).digest()[:8], "little")


def uniform(seed: int, sample_ids: np.ndarray, position: int) -> np.ndarray:
    """One number in [0, 1) per sample: a SplitMix64 hash of (seed, sample id, position).

    Args:
        seed: of the stage.
        sample_ids: `[batch]` integers that name the answers of a run uniquely.
        position: of the token in its answer, from 0.
    """
    with np.errstate(over="ignore"):
        x = np.full(sample_ids.shape, seed & (2**64 - 1), dtype=np.uint64)
        for part in (sample_ids.astype(np.uint64), np.uint64(position)):
            x = (x ^ part) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keep_tokens(logits: Tensor, sampling: Sampling) -> Tensor:
    """Which tokens top-k and top-p keep, `[batch, vocabulary]` bool; the likeliest always stays."""
    keep = torch.ones_like(logits, dtype=torch.bool)
    if 0 < sampling.top_k < logits.shape[-1]:
        keep &= logits >= logits.topk(sampling.top_k, dim=-1).values[..., -1:]
    if sampling.top_p < 1.0:
        ordered, index = logits.masked_fill(~keep, -torch.inf).sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        inside = probability.cumsum(-1) - probability < sampling.top_p
        keep &= torch.zeros_like(keep).scatter(-1, index, inside)
    return keep


def pack_bits(mask: Tensor) -> Tensor:
    """`[..., n]` bool to `[..., ceil(n / 8)]` uint8."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_bits`: `[..., n]` bool."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) & weights) != 0).flatten(-2)[..., :n]


@dataclass(frozen=True)
class Sampled:
    """One position's sample: `token`, `logprob`, `entropy` `[batch]`, and `keep` `[batch, vocabulary]` or None."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor
    keep: Tensor | None


def sample_token(logits: Tensor, sampling: Sampling, noise: np.ndarray) -> Sampled:
    """Sample by inverting the cumulative distribution at `noise` `[batch]`; `logits` is `[batch, vocabulary]`."""
    logits = logits[..., : sampling.vocabulary].float() / sampling.temperature
    keep = keep_tokens(logits, sampling) if sampling.filters else None
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    logprobs = logits.log_softmax(-1)
    probability = logprobs.exp()
    cumulative = probability.double().cumsum(-1)
    point = torch.from_numpy(noise).to(cumulative.device).unsqueeze(-1) * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[-1] - 1)
    entropy = -(probability * logprobs.masked_fill(probability == 0, 0.0)).sum(-1)
    return Sampled(token.squeeze(-1), logprobs.gather(-1, token).squeeze(-1), entropy, keep)


def left_pad(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of ids to `[batch, tokens]` ids and mask, padding on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = 1
    return ids.to(device), mask.to(device)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    eos: int,
    pad: int,
    batch_size: int = 64,
    lock_step: bool = False,
    on_batch: Callable[[int], None] | None = None,
    on_token: Callable[[], None] | None = None,
) -> Rollout:
    """Sample one answer to each prompt.

    Args:
        model: a transformers causal language model, in eval mode.
        prompts: token ids, one list a prompt.
        sample_ids: the answers' names for the noise, unique in a run.
        sampling: temperature, top-k, top-p and the longest answer.
        seed: of the noise.
        eos: ends an answer.
        pad: fills rows; its positions are masked.
        batch_size: rows decoded together, grouped by prompt length.
        lock_step: ranks decode the same number of positions (ZeRO-3, where every forward pass is collective).
        on_batch: called with the number of rows done after each batch.
        on_token: called before each forward pass; what it raises gives the rollout up.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    parts: list[Rollout] = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        names = np.array([sample_ids[i] for i in rows], dtype=np.int64)
        asked = [prompts[i] for i in rows]
        parts.append(_generate_batch(model, asked, names, sampling, seed, eos, pad, lock_step, on_token))
        if on_batch:
            on_batch(start + len(rows))
    back = torch.tensor(np.argsort(order))
    return _select(join(parts, pad), back)


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    names: np.ndarray,
    sampling: Sampling,
    seed: int,
    eos: int,
    pad: int,
    lock_step: bool,
    on_token: Callable[[], None] | None,
) -> Rollout:
    device = next(model.parameters()).device
    ids, mask = left_pad(prompts, pad, device)
    with_positions = _accepts(type(model), "position_ids")
    head_last = {"logits_to_keep": 1} if _accepts(type(model), "logits_to_keep") else {}
    cache = DynamicCache(config=model.config)
    step_ids, seen = ids, mask
    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]] = []
    for position in range(sampling.max_new_tokens):
        if on_token:
            on_token()
        inputs: dict[str, Any] = {"input_ids": step_ids, "attention_mask": seen, **head_last}
        if with_positions:
            inputs["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)[:, -step_ids.shape[1] :]
        logits = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
        drawn = sample_token(logits, sampling, uniform(seed, names, position))
        token = torch.where(alive, drawn.token, pad)
        packed = None if drawn.keep is None else pack_bits(drawn.keep)
        columns.append((token, alive, drawn.logprob.where(alive, 0.0), drawn.entropy.where(alive, 0.0), packed))
        step_ids, seen = token.unsqueeze(1), torch.cat([seen, alive.long().unsqueeze(1)], 1)
        alive = alive & (token != eos)
        more = bool(alive.any())
        if not (any_rank(more) if lock_step else more):
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


def _select(rollout: Rollout, rows: Tensor) -> Rollout:
    return replace(
        rollout,
        **{
            f.name: value[rows.to(value.device)]
            for f in fields(Rollout)
            if (value := getattr(rollout, f.name)) is not None
        },
    )


def sample_texts(
    spec: ModelSpec,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    samples: int,
    seed: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """Several answers of a pretrained model to each prompt: `[prompt][sample]` token ids, EOS where it was emitted.

    The model is the one SFT starts from: its revision, and a vocabulary of at least the tokenizer's size, of which only
    the tokenizer's tokens are sampled. It runs on the accelerator if there is one; only one batch is kept as tensors.
    """
    model: Any = base_model(spec, tokenizer, seed).eval()
    model.to(_device())
    sampling = Sampling(max_new_tokens, temperature, vocabulary=len(tokenizer))
    answers: list[list[list[int]]] = [[[]] * samples for _ in prompts]
    order = sorted(range(len(prompts) * samples), key=lambda i: len(prompts[i // samples]))
    for start in range(0, len(order), batch_size):
        names = order[start : start + batch_size]
        asked = [prompts[i // samples] for i in names]
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        rollout = generate(model, asked, names, sampling, seed=seed, eos=eos, pad=pad, batch_size=batch_size)
        for i, answer in zip(names, rollout.responses(), strict=True):
            answers[i // samples][i % samples] = answer
        if on_batch:
            on_batch(start + len(names))
    return answers


def _device() -> torch.device:
    """The accelerator, unless there is none or the environment says that DeepSpeed, and so all else, runs on the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or os.environ.get("DS_ACCELERATOR") == "cpu" else found
