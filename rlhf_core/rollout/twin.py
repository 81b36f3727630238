"""A model's twin for the time of a rollout: the same modules over whole weights, its adapters merged into them.

At ZeRO-3 every pass gathers every weight again, one pass a token; a twin has gathered them once, and its passes are no
collectives, so a rank whose answers have ended need not wait on the others. An adapted layer becomes a plain one whose weight
is W + alpha/rank B A. The model itself is only read: its parts, adapters and hooks are what they were, however the rollout
ends, and what the twin has of its own is freed with it. What is whole already and not adapted the two share.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_core.lora import gathered, layers, merged, whole
from rlhf_core.partitioned import is_partitioned, shape_of

HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@torch.no_grad()
def twin(model: Any, merge: bool) -> Any:
    """The twin of a causal language model; collective where the model is partitioned.

    Args:
        model: whole or in parts, with or without adapters.
        merge: whether adapters become part of the weights; else they are applied, as in the model.
    """
    adapted = {id(layer) for _, layer in layers(model)} if merge else set()
    return _Copies(adapted).module(model)


def can_merge(model: Any) -> bool:
    """Whether the model has adapters, and all of them are on weights of plain numbers (not quantised ones)."""
    adapted = [layer for _, layer in layers(model)]
    return bool(adapted) and all(layer.base_layer.weight.is_floating_point() for layer in adapted)


def twin_bytes(model: Any, merge: bool) -> int:
    """Bytes of the weights that a twin has of its own.

    On a CPU one that was in parts costs as much again, as whole weights are then brought into the kernels' layout.
    """
    if is_partitioned(model):
        copies = 2 if next(model.parameters()).device.type == "cpu" else 1
        return copies * sum(_bytes(p) for p in model.parameters())
    return sum(_bytes(layer.base_layer.weight) for _, layer in layers(model)) if merge else 0


def _bytes(weight: Tensor) -> int:
    return shape_of(weight).numel() * weight.element_size()


class _Copies:
    """Modules and weights of one twin, each once, as they are shared in the model (tied weights)."""

    def __init__(self, adapted: set[int]) -> None:
        self._adapted = adapted
        self._modules: dict[int, Any] = {}
        self._weights: dict[int, Any] = {}

    def module(self, one: Any) -> Any:
        """A module's twin."""
        if id(one) not in self._modules:
            made = self._merged(one) if id(one) in self._adapted else self._plain(one)
            self._modules[id(one)] = made
        return self._modules[id(one)]

    def _plain(self, one: Any) -> Any:
        made = copy.copy(one)
        own = vars(made)
        own["_parameters"] = {name: self._weight(weight) for name, weight in one._parameters.items()}
        own["_buffers"] = dict(one._buffers)
        own["_modules"] = {name: None if m is None else self.module(m) for name, m in one._modules.items()}
        for hooks in HOOKS:
            kept = {key: hook for key, hook in own[hooks].items() if not _is_deepspeed(hook)}
            own[hooks] = type(own[hooks])(kept)
        return made

    def _merged(self, layer: Any) -> Any:
        """The plain layer that does what an adapted one does."""
        weight = merged("", layer)
        with gathered(weight.parts):
            value = weight.make(*weight.parts)
        self._weights[id(layer.base_layer.weight)] = nn.Parameter(value, requires_grad=False)
        return self._plain(layer.base_layer)

    def _weight(self, weight: Any) -> Any:
        if id(weight) not in self._weights:
            divided = hasattr(weight, "ds_id")
            self._weights[id(weight)] = nn.Parameter(whole(weight), requires_grad=False) if divided else weight
        return self._weights[id(weight)]


def _is_deepspeed(hook: Any) -> bool:
    """A hook that gathers and releases weights, or looks after the engine."""
    return str(getattr(hook, "__module__", "")).startswith("deepspeed")
