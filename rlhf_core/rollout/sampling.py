"""Drawing one token: the distribution that is sampled from, the noise that decides, and the bits of what a filter kept.

Noise is one uniform number per (seed, sample id, position), so an answer does not depend on its rank, its batch or the time. A
token is drawn by inverting the cumulative distribution at that number. This is done in two levels, sums of blocks of the
vocabulary and then one block, so that nothing as wide as the vocabulary is summed up one by one. The distribution sampled
from is the one whose log-probabilities are returned: softmax(logits / temperature), renormalised over what top-k or top-p keep.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_core.cpu_kernels import TOGETHER, can_weigh, weigh


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
class Sampled:
    """One position's sample: `token`, `logprob`, `entropy` `[batch]`, and `keep` `[batch, vocabulary]` or None."""

    token: Tensor
    logprob: Tensor
    entropy: Tensor
    keep: Tensor | None


def noise_seed(seed: int, stage: str) -> int:
    """A seed of the sampling noise for a stage of its own: stages with one seed do not share their noise."""
    return int.from_bytes(hashlib.sha256(f"{stage}:{seed}".encode()).digest()[:8], "little")


def uniform(seed: int, sample_ids: np.ndarray, position: int | np.ndarray) -> np.ndarray:
    """One number in [0, 1) per sample: a SplitMix64 hash of (seed, sample id, position).

    Args:
        seed: of the stage.
        sample_ids: `[batch]` integers that name the answers of a run uniquely.
        position: of the token in its answer, from 0; one for all, or `[batch]`.
    """
    with np.errstate(over="ignore"):
        x = np.full(sample_ids.shape, seed & (2**64 - 1), dtype=np.uint64)
        for part in (sample_ids.astype(np.uint64), np.asarray(position).astype(np.uint64)):
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


def sample_token(logits: Tensor, sampling: Sampling, noise: np.ndarray) -> Sampled:
    """Sample by inverting the cumulative distribution at `noise` `[batch]`; `logits` is `[batch, vocabulary]`."""
    logits, keep = logits[..., : sampling.vocabulary], None
    if can_weigh(logits) and not sampling.filters:
        over = sampling.temperature
        weight, sums, largest, products = weigh(logits, over)
    else:
        logits, over = logits.float(), 1.0
        if sampling.temperature != 1.0:
            logits = logits / sampling.temperature
        if sampling.filters:
            keep = keep_tokens(logits, sampling)
            logits = logits.masked_fill(~keep, -torch.inf)
        weight, sums, largest, products = _weigh(logits)
    total = sums.sum(-1)
    block, share = _invert(sums, torch.from_numpy(noise).to(weight.device))
    rows = torch.arange(len(weight), device=weight.device)
    inside, _ = _invert(weight.view(*sums.shape, TOGETHER)[rows, block].double(), share)
    token = (block * TOGETHER + inside).clamp(max=logits.shape[-1] - 1)  # of NaN too, which the log-probability tells
    chosen = logits.gather(-1, token.unsqueeze(-1)).squeeze(-1).float() / over
    normalizer = total.log()
    return Sampled(token, (chosen - largest - normalizer).float(), (normalizer - products / total).float(), keep)


def _weigh(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`cpu_kernels.weigh` in torch's operations, of fp32 logits at temperature 1."""
    rows, size = logits.shape
    largest = logits.amax(-1)
    below = logits - largest.unsqueeze(-1)
    weight = below.new_zeros(rows, -(-size // TOGETHER) * TOGETHER)
    torch.exp(below, out=weight[:, :size])
    sums = weight.view(rows, -1, TOGETHER).sum(-1).double()
    below.masked_fill_(below == -torch.inf, 0.0)  # its weight is 0, and 0 * -inf would not be
    return weight, sums, largest, below.mul_(weight[:, :size]).sum(-1)


def _invert(weights: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the cumulative `weights` `[batch, n]`, fp64, the share `point` `[batch]` of their sum lies.

    Returns:
        The first index whose cumulative weight is above, so never one without weight; and the share of that weight.
    """
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    wanted = torch.minimum(point * total, torch.nextafter(total, torch.zeros_like(total))).unsqueeze(-1)
    index = torch.searchsorted(cumulative, wanted, right=True).clamp(max=weights.shape[-1] - 1)  # NaN is above all
    own = weights.gather(-1, index)
    share = (wanted - (cumulative.gather(-1, index) - own)) / own
    return index.squeeze(-1), share.clamp(0.0, 1.0).squeeze(-1)


def pack_bits(mask: Tensor) -> Tensor:
    """`[..., n]` bool to `[..., ceil(n / 8)]` uint8."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of `pack_bits`: `[..., n]` bool."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) & weights) != 0).flatten(-2)[..., :n]
