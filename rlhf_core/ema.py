"""EMA: the exponential moving average of a model's trained weights, kept in fp32 beside the engine.

Every rank averages what it holds: whole weights, or at ZeRO-3 its own part. The average becomes a model by being put in
place of the weights for as long as an export lasts. With LoRA only the adapters are averaged, as only they move.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class EMA:
    """ema = decay * ema + (1 - decay) * weights, at every `update`.

    Attributes:
        average: one fp32 tensor a trained parameter, in the model's order: whole, or this rank's part at ZeRO-3.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self._weights = [_held(p) for p in self._parameters]
        self.average = [w.detach().float().clone() for w in self._weights]

    def restart(self) -> None:
        """Make the average the weights as they are now."""
        for average, weight in zip(self.average, self._weights, strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        for average, weight in zip(self.average, self._weights, strict=True):
            average.lerp_(weight.float(), 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averaged weights for as long as this lasts, then its own again, bit for bit."""
        own = [w.detach().clone() for w in self._weights]
        self._divide()
        try:
            with torch.no_grad():
                for weight, average in zip(self._weights, self.average, strict=True):
                    weight.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for weight, kept in zip(self._weights, own, strict=True):
                    weight.copy_(kept)
            self._divide()

    def _divide(self) -> None:
        """At ZeRO-3, drop whole copies of small weights that DeepSpeed keeps: they do not follow their parts."""
        for parameter in self._parameters:
            if hasattr(parameter, "ds_tensor"):
                parameter.partition()  # pyright: ignore[reportAttributeAccessIssue]


def _held(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter: its part at ZeRO-3, else all of it."""
    part = getattr(parameter, "ds_tensor", None)
    return parameter.data if part is None else part
