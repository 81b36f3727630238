"""The states of the random generators, and what else decides the last bits of a run: for checkpoints.

Four generators feed training: Python's, NumPy's, torch's and the device's. Their states are JSON, so that nothing is unpickled.
"""

import base64
import platform
import random
from collections.abc import Mapping
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


def generators() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and the device's generators."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    accelerator: Any = get_accelerator()
    found = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
    }
    if accelerator.device_name() != "cpu":
        found["device"] = _text(accelerator.get_rng_state())
    return found


def set_generators(saved: Mapping[str, Any]) -> None:
    """Put the generators into the states that `generators` returned."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(saved["torch"]))
    accelerator: Any = get_accelerator()
    if "device" in saved and accelerator.device_name() != "cpu":
        accelerator.set_rng_state(_tensor(saved["device"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def versions() -> dict[str, str]:
    """What decides the last bits of a result beside code and state: the libraries that compute, and the machine."""
    accelerator: Any = get_accelerator()
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "device": accelerator.device_name(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def differing(saved: Mapping[str, str]) -> str:
    """What was different when a checkpoint was written, e.g. "torch 2.12.0 (now 2.13.0)"; empty if nothing was."""
    now = versions()
    return ", ".join(f"{name} {was} (now {now.get(name)})" for name, was in saved.items() if now.get(name) != was)
