"""Rows side by side in one row without padding, each attending to itself only: on CPUs padding costs as much as tokens.

Models that take their attention from transformers' interface hand it the lengths of the rows, to which a kernel of ours attends,
or torch's causal one, row by row. All else in a model treats every token alike, so the result is that of padded rows but for
rounding. Other families, windows shorter than a row, and GPUs, whose kernels want padded rows, keep them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf_core.cpu_kernels import can_attend, rows_attention

FAMILIES = frozenset({"opt", "gpt_neox", "gpt2", "llama", "qwen2", "qwen3", "mistral", "gemma3_text"})
LENGTHS = "row_lengths"  # the argument that models pass on to their attention

_padded: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]


def needs_padding(*models: Any) -> bool:
    """Whether any of the models may have to compute padding along with rows."""
    return any(not _joins(m) or getattr(m.config, "sliding_window", None) is not None for m in models)


def side_by_side(model: Any, input_ids: Tensor, mask: Tensor) -> dict[str, Any] | None:
    """Arguments of a forward pass over the real tokens of all rows as one row `[1, tokens]`; None: this model needs padding.

    Args:
        model: the transformers model that will be called.
        input_ids: `[batch, tokens]`, padded left or right.
        mask: `[batch, tokens]`, 1 on real tokens.
    """
    if not _joins(model):
        return None
    lengths: list[int] = mask.sum(1).tolist()
    window = getattr(model.config, "sliding_window", None)
    if not any(lengths) or (window is not None and max(lengths) > window):
        return None
    real = mask.bool()
    return {
        "input_ids": input_ids[real].unsqueeze(0),
        "position_ids": (mask.long().cumsum(1) - 1)[real].unsqueeze(0),
        # Nothing is to read this mask; what does all the same gives NaN, which no training goes on with.
        "attention_mask": torch.full((1, 1, 1, 1), torch.nan, dtype=next(model.parameters()).dtype),
        LENGTHS: lengths,
    }


def _joins(model: Any) -> bool:
    config, device = model.config, next(model.parameters()).device
    return device.type == "cpu" and config.model_type in FAMILIES and config._attn_implementation == "sdpa"


def spread(values: Tensor, real: Tensor) -> Tensor:
    """`[tokens]` values of the real tokens to their places in `[batch, tokens]`; 0 elsewhere."""
    return values.new_zeros(real.shape).masked_scatter(real, values)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention by torch's kernel, or that of rows side by side if their lengths are among the arguments."""
    lengths = more.pop(LENGTHS, None)
    if lengths is None:
        return _padded(module, query, key, value, attention_mask, **more)
    dropout, scale = more.get("dropout", 0.0), more.get("scaling")
    if not dropout and can_attend(query, key, value):
        return rows_attention(query, key, value, lengths, scale), None
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([_one_row(q, k, v, dropout, scale).transpose(1, 2) for q, k, v in rows if q.shape[2]], 1), None


def _one_row(query: Tensor, key: Tensor, value: Tensor, dropout: float, scale: float | None) -> Tensor:
    """Causal attention, `[1, heads, tokens, head size]`; key and value may have fewer heads."""
    return functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=key.shape[1] < query.shape[1]
    )


AttentionInterface.register("sdpa", _attention)
