"""Forward passes over finished answers: log-probabilities of response tokens, values, and end scores.

Rows come as in the rollout, prompts padded on the left and responses on the right, and are closed up before a model reads
them, so that a batch is as wide as its longest row. The language-model head runs on the tokens that are asked for only, in
blocks (`head_scores`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.batches import right_pad, right_padded
from rlhf_core.head_scores import Wanted, can_score, scores_of, scoring_head
from rlhf_core.models import forward_inputs
from rlhf_core.partitioned import shape_of
from rlhf_core.ragged import side_by_side, spread
from rlhf_core.rollout import unpack_bits


@dataclass(frozen=True)
class TokenScores:
    """`logprobs` and `entropy`, `[batch, response]`; 0 where the response is masked."""

    logprobs: Tensor
    entropy: Tensor


def sequence_scores(
    engine: Any,
    inputs: Mapping[str, Tensor],
    counted: Tensor,
    temperature: float = 1.0,
    keep: Tensor | None = None,
    entropy: bool = False,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of some tokens of a batch, and entropies of their distributions, `[counted]` each, fp32.

    Args:
        engine: a DeepSpeed engine or a transformers causal language model.
        inputs: of its forward pass, with "input_ids" `[batch, tokens]`; padding is left out where the model can do that.
        counted: `[batch, tokens]` bool, the tokens asked for; never a first one, which nothing foretells.
        temperature: divides the logits.
        keep: `[counted, vocabulary]` bool, tokens of the distribution; default: all.
        entropy: whether to compute entropies (else zeros).
        vocabulary: number of the tokenizer's tokens; default: all of the model's.
    """
    model: Any = unwrap(engine)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and (joined := side_by_side(model, inputs["input_ids"], mask)):
        inputs, counted = joined, counted[mask.bool()].unsqueeze(0)
    places = torch.zeros_like(counted)
    places[:, :-1] = counted[:, 1:]
    size = vocabulary or shape_of(model.get_output_embeddings().weight)[0]
    wanted = Wanted(places, inputs["input_ids"][counted], size, temperature, keep, entropy)
    if can_score(model):
        with scoring_head(model, wanted):
            scores = engine(**inputs, use_cache=False).logits
    else:
        scores = scores_of(engine(**inputs, use_cache=False).logits[places], wanted)
    return scores[:, 0], scores[:, 1]


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
    counted = right_pad(labels, 0, device).bool()
    counted[:, 0] = False
    logprobs, _ = sequence_scores(engine, forward_inputs(unwrap(engine), input_ids, mask), counted)
    return -logprobs, counted.nonzero()[:, 0]


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
    model: Any = unwrap(engine)
    real = response_mask.bool()
    ids, mask, answers = close_up(prompt_ids, prompt_mask, response_ids, response_mask)
    size = vocabulary or shape_of(model.get_output_embeddings().weight)[0]
    keep = None if support is None else unpack_bits(support[real], size)
    logprobs, entropies = sequence_scores(
        engine, forward_inputs(model, ids, mask), answers, temperature, keep, entropy, size
    )
    return TokenScores(spread(logprobs, real), spread(entropies, real))


def response_values(
    engine: Any, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> Tensor:
    """Values of the states in which each response token is chosen, `[batch, response]`; 0 where there is none."""
    ids, mask, answers = close_up(prompt_ids, prompt_mask, response_ids, response_mask)
    return spread(engine(ids, mask)[:, :-1][answers[:, 1:]], response_mask.bool())


def close_up(
    prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, response_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and responses side by side without the padding between rows' ends: ids, mask, and which are responses.

    Args:
        prompt_ids, prompt_mask: `[batch, prompt]`, each row with a token at least.
        response_ids, response_mask: `[batch, response]`.

    Returns:
        `[batch, tokens]` each, padded on the right to the longest row; the third bool.
    """
    ids, mask = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1)
    answers = torch.cat([torch.zeros_like(prompt_mask), response_mask], 1).bool()
    order = torch.argsort(mask, dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return ids.gather(1, order), mask.gather(1, order), answers.gather(1, order)


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
