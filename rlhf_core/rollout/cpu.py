"""What makes decoding fast on a CPU, for the time of a rollout: weights in the kernels' own layout, attention to single tokens.

A linear layer of a few rows costs what reading its weights costs. They are laid out as our kernel reads them (`cpu_kernels`), or,
where there is none, as oneDNN's does; either way this is a copy of the weights in memory. Longer prompts go through oneDNN.
Attention of one new token takes our kernel a third of the time of torch's (`bench_kernels.py`). Where it cannot be had a bf16
model's cache is kept in fp32, of which more digits are the only other effect: torch's takes 3.7 times as long over bf16 keys.
Models that do not take their attention from transformers' interface, and weights that are divided among ranks, stay as they are.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from rlhf_core.cpu_kernels import FEW, can_attend, can_pack, few_rows, packed, takes_heads, token_attention

ROWS = 16  # that the layout is chosen for
TOKEN = "rlhf_token"


@contextmanager
def fast_steps(model: nn.Module) -> Iterator[torch.dtype | None]:
    """For the time of a `with` block; gives the type that keys and values are to be kept in, None: the model's."""
    with ExitStack() as undo:
        if next(model.parameters()).device.type != "cpu":
            yield None
            return
        for layer in model.modules():
            if _can_be_packed(layer):
                _replace_forward(layer, undo)
        replaced = _takes_other_attention(model)
        if replaced:
            config: Any = model.config
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = TOKEN
        wide = replaced and next(model.parameters()).dtype == torch.bfloat16 and not takes_heads(_head_size(model))
        yield torch.float32 if wide else None


def _can_be_packed(layer: nn.Module) -> bool:
    """A linear layer whose whole weight is here. At ZeRO-3 it is not, and layers inside others may be replaced already."""
    if type(layer) not in (nn.Linear, Conv1D):
        return False
    weight: Any = layer.weight
    return weight.numel() > 0 and not hasattr(weight, "ds_id") and _has_kernels(weight.dtype)


@cache
def _has_kernels(dtype: torch.dtype) -> bool:
    """Whether torch was built with oneDNN, and this processor has what oneDNN needs for the type."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _replace_forward(layer: Any, undo: ExitStack) -> None:
    weight = layer.weight.detach()
    weight = weight.t() if type(layer) is Conv1D else weight
    bias = None if layer.bias is None else layer.bias.detach()
    if "forward" in vars(layer):
        undo.callback(setattr, layer, "forward", layer.forward)
    else:
        undo.callback(delattr, layer, "forward")
    if can_pack(weight):
        layer.forward = partial(_few_or_many, packed(weight), weight, bias)
    else:
        layer.forward = partial(_linear, torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS), bias)


def _few_or_many(panels: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if x.numel() <= FEW * x.shape[-1]:
        return few_rows(x, panels, bias, len(weight))
    return _linear(weight, bias, x)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _takes_other_attention(model: Any) -> bool:
    """Attention by torch's kernel, through the interface in which another can be named."""
    module = sys.modules[type(model).__module__]
    return model.config._attn_implementation == "sdpa" and hasattr(module, "ALL_ATTENTION_FUNCTIONS")


def _head_size(model: Any) -> int:
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """Of single tokens by our kernel, else by torch's in the keys' type; the result in the query's."""
    shape = (len(query), 1, 1, key.shape[2])
    shown = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape == shape)
    if query.shape[2] == 1 and shown and key.stride() == value.stride() and can_attend(query, key, value):
        return token_attention(query, key, value, attention_mask, more.get("scaling")), None
    attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    result, weights = attention(module, query.to(key.dtype), key, value, attention_mask, **more)
    return result.to(query.dtype), weights


AttentionInterface.register(TOKEN, _attention)
AttentionMaskInterface.register(TOKEN, sdpa_mask)
