"""What makes decoding fast on a CPU, for the time of a rollout: weights in the kernels' own layout, attention over fp32 keys.

A linear layer of a few rows costs what reading its weights costs, and oneDNN first brings them into its own order, at every call;
done once for a rollout, a step of 16 rows takes 0.6 (bf16) and 0.5 (fp32) of the time, and a copy of the weights in memory.
Attention of one new token over bf16 keys takes 3.7 times as long as over fp32 ones in torch's kernel, so a bf16 model's cache
is kept in fp32, of which more digits are the only other effect. (One thread, Zen 4, OPT-125m's layers: `bench_rollout.py`.)
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

ROWS = 16  # that the layout is chosen for
WIDE = "rlhf_wide"


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
        wide = _takes_wide_keys(model)
        if wide:
            config: Any = model.config
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = WIDE
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
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous() if type(layer) is Conv1D else weight, ROWS)
    if "forward" in vars(layer):
        undo.callback(setattr, layer, "forward", layer.forward)
    else:
        undo.callback(delattr, layer, "forward")
    bias = None if layer.bias is None else layer.bias.detach()
    layer.forward = partial(_linear, packed, bias)


def _linear(packed: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _takes_wide_keys(model: Any) -> bool:
    """bf16, with attention by torch's kernel through the interface in which another can be named."""
    module = sys.modules[type(model).__module__]
    return (
        next(model.parameters()).dtype == torch.bfloat16
        and model.config._attn_implementation == "sdpa"
        and hasattr(module, "ALL_ATTENTION_FUNCTIONS")
    )


def _wide_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    """torch's attention in the keys' type; the result in the query's."""
    attention: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    result, weights = attention(module, query.to(key.dtype), key, value, attention_mask, **more)
    return result.to(query.dtype), weights


AttentionInterface.register(WIDE, _wide_attention)
AttentionMaskInterface.register(WIDE, sdpa_mask)
