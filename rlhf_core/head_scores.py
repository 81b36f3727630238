"""Log-probabilities and entropies at chosen positions of a language model, without ever holding its logits.

The model runs as it is, but its head is replaced for the time of the call: it sees the chosen positions alone, in blocks, and
gives two numbers each instead of a row as wide as the vocabulary. Only hidden states and normalisers are kept for the backward
pass, which computes a block's logits again. So memory grows with tokens, and not with tokens times vocabulary. The head stays a
call of its own module, so that DeepSpeed gathers its weight around both passes at ZeRO-3.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_BYTES = 64 << 20  # of logits at once, for the products
CACHED_BYTES = 8 << 20  # of fp32 logits at once on CPUs, for all that is done to them: what stays in a core's caches


@dataclass(frozen=True)
class Wanted:
    """What is asked of a forward pass.

    Attributes:
        places: `[batch, tokens]` bool, the positions whose next token counts.
        targets: `[counted]`, those next tokens, row by row.
        vocabulary: number of the first tokens that there are.
        temperature: divides the logits.
        keep: `[counted, vocabulary]` bool, tokens of the distribution; None: all.
        entropy: whether to compute entropies (else zeros).
    """

    places: Tensor
    targets: Tensor
    vocabulary: int
    temperature: float = 1.0
    keep: Tensor | None = None
    entropy: bool = False

    def blocks(self, kind: torch.dtype) -> Iterator[slice]:
        """Blocks of the counted positions, for logits of that type."""
        return _slices(0, len(self.targets), BLOCK_BYTES // (kind.itemsize * self.vocabulary))

    def parts(self, block: slice) -> Iterator[slice]:
        """Parts of a block in which logits become fp32."""
        size = CACHED_BYTES if self.targets.device.type == "cpu" else BLOCK_BYTES
        return _slices(block.start, block.stop, size // (4 * self.vocabulary))


def can_score(model: Any) -> bool:
    """Whether the model's logits are what its head gives: nothing is done to them afterwards."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    return type(head) is nn.Linear and getattr(config, "final_logit_softcapping", None) is None


@contextmanager
def scoring_head(model: Any, wanted: Wanted) -> Iterator[None]:
    """Within a `with` block the model's logits are `[counted, 2]`: log-probability and entropy, fp32."""
    head = model.get_output_embeddings()

    def forward(hidden: Tensor) -> Tensor:
        return _HeadScores.apply(hidden[wanted.places], head.weight, head.bias, head, wanted)  # pyright: ignore

    before = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before


def scores_of(logits: Tensor, wanted: Wanted) -> Tensor:
    """The same from logits `[counted, vocabulary]`, for models whose head cannot be replaced; `[counted, 2]`, fp32."""
    logits = logits[:, : wanted.vocabulary].float() / wanted.temperature
    if wanted.keep is not None:
        logits = logits.masked_fill(~wanted.keep, -torch.inf)
    normalizer = logits.logsumexp(-1)
    chosen = logits.gather(-1, wanted.targets.unsqueeze(-1)).squeeze(-1) - normalizer
    if not wanted.entropy:
        return torch.stack([chosen, torch.zeros_like(chosen)], -1)
    probability = (logits - normalizer.unsqueeze(-1)).exp()
    mean_logit = (probability * logits.masked_fill(probability == 0, 0.0)).sum(-1)
    return torch.stack([chosen, normalizer - mean_logit], -1)


class _HeadScores(torch.autograd.Function):
    """With z the logits over the temperature, p their softmax, H its entropy and t the target:

    d log p_t / dz = 1_t - p, and dH / dz = -p (z - sum p z).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Any, wanted: Wanted) -> Tensor:
        scores = hidden.new_empty((len(hidden), 2), dtype=torch.float32)
        normalizers = hidden.new_empty(len(hidden), dtype=torch.float32)
        for block in wanted.blocks(hidden.dtype):
            raw = _logits(hidden[block], weight, bias, wanted)
            for rows in wanted.parts(block):
                logits = _tempered(raw[_within(block, rows)], wanted, rows)
                normalizers[rows] = logits.logsumexp(-1)
                scores[rows, 0] = logits.gather(-1, wanted.targets[rows].unsqueeze(-1)).squeeze(-1) - normalizers[rows]
                if wanted.entropy:
                    below = logits.sub_(normalizers[rows].unsqueeze(-1))
                    scores[rows, 1] = -_product(below.exp(), below, wanted)
                else:
                    scores[rows, 1] = 0.0
        ctx.save_for_backward(hidden, normalizers, scores)
        ctx.head, ctx.wanted = head, wanted  # of the head, not its weight: at ZeRO-3 that is another tensor by then
        return scores

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        hidden, normalizers, scores = ctx.saved_tensors
        wanted, weight, bias = ctx.wanted, ctx.head.weight, ctx.head.bias
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        size = wanted.vocabulary
        blocks = list(wanted.blocks(hidden.dtype))
        exact = torch.float32 if len(blocks) > 1 else weight.dtype  # sums of blocks are rounded once
        d_hidden = torch.zeros_like(hidden) if of_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if of_weight else None
        d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=weight.device) if of_bias else None
        through_entropy = wanted.entropy and bool(gradient[:, 1].any())
        for block in blocks:
            change = _logits(hidden[block], weight, bias, wanted)  # for now the logits
            for rows in wanted.parts(block):
                part = change[_within(block, rows)]
                below = _tempered(part, wanted, rows).sub_(normalizers[rows].unsqueeze(-1))
                probability = below.exp()
                changed = probability * -gradient[rows, :1]
                if through_entropy:  # z - sum p z = log p + H
                    spread = below.add_(scores[rows, 1:])
                    if wanted.keep is not None:
                        spread = spread.masked_fill(~wanted.keep[rows], 0.0)
                    changed -= gradient[rows, 1:] * probability * spread
                changed.scatter_add_(1, wanted.targets[rows].unsqueeze(-1), gradient[rows, :1])
                part.copy_(changed.div_(wanted.temperature))
            if d_hidden is not None:
                d_hidden[block] = change @ weight[:size]
            if d_weight is not None:
                d_weight[:size] += change.t() @ hidden[block]
            if d_bias is not None:
                d_bias[:size] += change.sum(0, dtype=torch.float32)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        if d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None


def _slices(start: int, end: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(i, min(i + step, end)) for i in range(start, end, step))


def _within(block: slice, rows: slice) -> slice:
    return slice(rows.start - block.start, rows.stop - block.start)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted) -> Tensor:
    """What the head gives, `[rows, vocabulary]`."""
    size = wanted.vocabulary
    return nn.functional.linear(hidden, weight[:size], None if bias is None else bias[:size])


def _tempered(logits: Tensor, wanted: Wanted, rows: slice) -> Tensor:
    """fp32 logits over the temperature, to be overwritten at will; -inf where a token is not kept."""
    logits = logits.float()
    if wanted.temperature != 1.0:
        logits = logits / wanted.temperature
    return logits if wanted.keep is None else logits.masked_fill(~wanted.keep[rows], -torch.inf)


def _product(probability: Tensor, logs: Tensor, wanted: Wanted) -> Tensor:
    """sum p log p of each row; 0 where p is."""
    if wanted.keep is not None:
        logs = logs.masked_fill(probability == 0, 0.0)
    return torch.bmm(probability.unsqueeze(1), logs.unsqueeze(2)).view(-1)
