"""Forward passes over finished answers: log-probabilities of response tokens, values, and end scores.

Rows are laid out as in the rollout: prompts padded on the left, responses on the right, so responses share their columns and
the language-model head runs on those only. The logarithm of the softmax is taken as `gather - logsumexp` in fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.batches import right_pad, right_padded
from rlhf_core.models import _accepts, forward_inputs
from rlhf_core.rollout import unpack_bits


@dataclass(frozen=True)
class TokenScores:
    """`logprobs` and `entropy`, `[batch, response]`; meaningless where the response is masked."""

    logprobs: Tensor
    entropy: Tensor


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[targets] for `[..., vocabulary]` logits and `[...]` targets, fp32."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def label_nats(
    engine: Any, texts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """-log p of the labelled tokens of some texts under a causal language model.

    Args:
        engine: a DeepSpeed engine or a transformers model.
        texts: token ids.
        labels: 1 on the tokens of each text that count; a first token never does, as nothing foretells it.
        pad: fills rows.
        device: where the model computes.

    Returns:
        The nats `[labelled tokens]`, fp32, text by text, and the text of each.
    """
    input_ids, mask = right_padded(texts, pad, device)
    counted = right_pad(labels, 0, device)[:, 1:].bool()
    logits = engine(**forward_inputs(unwrap(engine), input_ids, mask), use_cache=False).logits
    return -target_logprobs(logits[:, :-1][counted], input_ids[:, 1:][counted]), counted.nonzero()[:, 0]


def response_scores(
    engine: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    temperature: float = 1.0,
    support: Tensor | None = None,
    entropy: bool = False,
    vocabulary: int | None = None,
) -> TokenScores:
    """Log-probabilities of the response tokens under a causal language model, as sampled with `temperature`.

    Args:
        engine: a DeepSpeed engine or a transformers model.
        prompt_ids, prompt_mask: `[batch, prompt]`.
        response_ids, response_mask: `[batch, response]`.
        temperature: divides the logits, as in the rollout.
        support: packed bits of the tokens that top-k/top-p kept in the rollout, `[batch, response, bytes]`.
        entropy: whether to compute entropies (else zeros).
        vocabulary: number of the tokenizer's tokens, as in `Sampling`; default: all of the model's.
    """
    model = unwrap(engine)
    ids = torch.cat([prompt_ids, response_ids], 1)
    mask = torch.cat([prompt_mask, response_mask], 1)
    width = response_ids.shape[1]
    keep = {"logits_to_keep": width + 1} if _accepts(type(model), "logits_to_keep") else {}
    logits = engine(**forward_inputs(model, ids, mask), **keep, use_cache=False).logits
    logits = logits[:, -width - 1 : -1, :vocabulary].float() / temperature
    if support is not None:
        # Padding kept no token at all; it keeps every one here, since a row of -inf has NaN gradients.
        kept = unpack_bits(support, logits.shape[-1]) | ~response_mask.bool().unsqueeze(-1)
        logits = logits.masked_fill(~kept, -torch.inf)
    normalizer = logits.logsumexp(-1)
    chosen = logits.gather(-1, response_ids.unsqueeze(-1)).squeeze(-1)
    if not entropy:
        return TokenScores(chosen - normalizer, torch.zeros_like(normalizer))
    probability = (logits - normalizer.unsqueeze(-1)).exp()
    mean_logit = (probability * logits.masked_fill(probability == 0, 0.0)).sum(-1)
    return TokenScores(chosen - normalizer, normalizer - mean_logit)


def response_values(
    engine: Any, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> Tensor:
    """Values of the states in which each response token is chosen, `[batch, response]`."""
    values = engine(torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1))
    width = response_ids.shape[1]
    return values[:, -width - 1 : -1]


def aligned_values(engine: Any, input_ids: Tensor, mask: Tensor, index: Tensor) -> Tensor:
    """Values of a critic that reads other tokens than the actor's, `[batch, response]`.

    Args:
        engine: the critic.
        input_ids, mask: `[batch, tokens]`, the answers in the critic's tokens, right-padded.
        index: `[batch, response]`, for each response token of the actor the last critic token before it.
    """
    return engine(input_ids, mask).gather(1, index)


def end_scores(engine: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Score at the last real token of each row, `[batch]`; `mask` may be padded on both sides."""
    values = engine(input_ids, mask)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.long() * columns).argmax(1)
    return values.gather(1, last.unsqueeze(1)).squeeze(1)


def unwrap(engine: Any) -> nn.Module:
    """The model inside a DeepSpeed engine, or the model itself."""
    return getattr(engine, "module", engine)
