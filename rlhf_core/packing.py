"""Packing: several sequences in one row that do not see each other, so that no computation is spent on padding.

Positions restart with each sequence. From that transformers makes the mask of most families itself, sliding windows included;
OPT is given the mask. It is exact: the logits of a sequence are those it has alone, which the tests check family by family.
BLOOM's ALiBi takes no such mask; it and families not tried are refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_core.batches import right_pad
from rlhf_core.errors import ConfigError

# Families whose own mask code reads sequences off the positions, when it is given no mask.
BY_POSITIONS = frozenset(
    {"gpt_neox", "gptj", "gpt_neo", "gpt2", "codegen", "llama", "qwen2", "qwen3", "mistral", "gemma3_text"}
)
BY_MASK = frozenset({"opt"})


def require_packing(config: Any, tokens: int) -> None:
    """ConfigError if the family of a model's configuration cannot be packed to rows of `tokens`."""
    family = config.model_type
    if family not in BY_POSITIONS | BY_MASK:
        raise ConfigError(
            f"resources.pack_tokens {tokens}: sequences of the family {family} cannot be packed without seeing each "
            f"other; leave it out (families that can: {', '.join(sorted(BY_POSITIONS | BY_MASK))})"
        )
    if family == "gpt_neo" and tokens > config.max_position_embeddings:
        raise ConfigError(
            f"resources.pack_tokens {tokens}: gpt_neo's rows end at its {config.max_position_embeddings} positions; "
            "lower it to that"
        )


def packed_inputs(
    model: Any, rows: Sequence[Sequence[Sequence[int]]], pad: int, device: torch.device
) -> dict[str, Any]:
    """Arguments of a forward pass for rows of joined sequences, padded on the right.

    Padding at a row's end has position 0 each, so every pad is a sequence of its own and no row of attention is empty.

    Args:
        model: the transformers model that will be called.
        rows: the sequences of each row, as ids.
        pad: id to pad with.
        device: of the tensors.
    """
    ids = right_pad([[token for ids in row for token in ids] for row in rows], pad, device)
    positions = right_pad([[i for ids in row for i in range(len(ids))] for row in rows], 0, device)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": None}
    if model.config.model_type in BY_MASK:
        inputs["attention_mask"] = block_mask(positions, next(model.parameters()).dtype)
    return inputs


def block_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask `[batch, 1, tokens, tokens]`: a token sees itself and what stands before it in its own sequence.

    Args:
        positions: `[batch, tokens]`, each sequence counted from 0.
        dtype: the model's.
    """
    sequence = (positions == 0).cumsum(1)
    column = torch.arange(positions.shape[1], device=positions.device)
    seen = (sequence[:, :, None] == sequence[:, None, :]) & (column[:, None] >= column[None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
