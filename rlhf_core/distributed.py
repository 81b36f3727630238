"""Process group, devices and the few collectives the trainers need.

`start` initialises torch.distributed through DeepSpeed (gloo on CPU, the accelerator's backend on GPU) with a time-out that
also holds for the groups DeepSpeed makes later, seeds every generator, and returns this rank's place. On CPU DeepSpeed's
shared-memory extension is switched off: compiling it on first use takes minutes and a killed build hangs the next run.
"""

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from rlhf_core.cpu_products import use_fast_products

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(minutes=15)


@dataclass(frozen=True)
class Ranks:
    """This process among the job's processes."""

    rank: int
    world: int
    device: torch.device


def start(seed: int) -> Ranks:
    """Join the job's process group and seed python, numpy and torch alike on all ranks."""
    import deepspeed
    import torch.distributed.distributed_c10d as c10d
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        use_fast_products()
    if "RANK" not in os.environ:  # a script that was started without a launcher: one process
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    if not dist.is_initialized():
        c10d.default_pg_timeout = COLLECTIVE_TIMEOUT
        deepspeed.init_distributed(
            dist_backend="gloo" if on_cpu else accelerator.communication_backend_name(),
            timeout=COLLECTIVE_TIMEOUT,
            verbose=False,
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if not on_cpu:
        accelerator.set_device(local)
    seed_all(seed)
    return Ranks(dist.get_rank(), dist.get_world_size(), torch.device(accelerator.device_name(local)))


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sum of `values` over all ranks, in double precision."""
    if world_size() == 1:
        return values
    device = "cpu" if dist.get_backend() == "gloo" else torch.accelerator.current_accelerator()
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on some rank."""
    return sum_over_ranks([float(flag)])[0] > 0


def gather(value: T) -> list[T]:
    """Every rank's `value`, in order of rank, on every rank."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out
