"""DeepSpeed engines: their configuration, the optimizer, and the learning-rate schedule.

Every trainer owns its accumulation: it computes the token count of the whole optimizer step over all ranks first, scales each
micro-batch's loss sum by `world / count`, and calls `backward` per micro-batch and `step` once
(`managed_gradient_accumulation: false`). Then micro-batch size, accumulation and process count change nothing but rounding.
Gradients are checked where they are final, inside the optimizer's step: nothing is updated with a number that is not finite.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder  # pyright: ignore
from torch import Tensor, nn

from rlhf_core.distributed import any_rank
from rlhf_core.errors import ConfigError, NonFiniteError
from rlhf_core.partitioned import release_freed, shape_of
from rlhf_core.resources import Resources
from rlhf_core.specs import LoRASpec, OptimSpec, Precision

NOT_FINITE = "a gradient is not finite; nothing was updated. Lower the learning rate or use fp32/bf16"
BUCKET = 50_000_000  # elements sent at once; DeepSpeed's default would hold 2 GB for it
NO_DECAY = ("bias", "norm", "ln_", "embed", "wte", "wpe")


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that refuses gradients which are not finite, on all ranks together, before it changes a weight.

    Attributes:
        max_norm: clip the gradients to this norm first (at ZeRO-0 in fp32, where DeepSpeed would not tell the norm).
        norm: of the last step's gradients before clipping, where `max_norm` is set.
    """

    max_norm: float | None = None
    norm: float | None = None

    def step(self, closure: Any = None) -> Any:
        """One update. NonFiniteError: some rank's gradient holds NaN or infinity."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        bad = any(not (bool(torch.isfinite(g.sum())) or bool(torch.isfinite(g).all())) for g in grads)
        if any_rank(bad):
            raise NonFiniteError(NOT_FINITE)
        if self.max_norm is not None:
            self.norm = float(
                torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], self.max_norm)
            )
        return super().step(closure)


def grad_norm(engine: Any) -> float:
    """Norm of the gradients of the engine's last step, before clipping; 0 if fp16 skipped the step."""
    if getattr(engine.optimizer, "overflow", False):
        return 0.0
    norm = getattr(engine.optimizer, "norm", None)
    return float(norm if norm is not None else engine.get_global_grad_norm() or 0.0)


def lr_factor(step: int, spec: OptimSpec, total: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`, relative to `spec.lr`."""
    if step < spec.warmup_steps:
        return (step + 1) / spec.warmup_steps
    progress = min(1.0, (step - spec.warmup_steps) / max(1, total - spec.warmup_steps))
    if spec.schedule == "constant":
        return 1.0
    shape = 1 - progress if spec.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return spec.min_lr_ratio + (1 - spec.min_lr_ratio) * shape


def set_lr(engine: Any, step: int, spec: OptimSpec, total: int) -> float:
    """Set the learning rate of every group for optimizer step `step`, relative to its own; returns the optimizer's."""
    factor = lr_factor(step, spec, total)
    for group in engine.optimizer.param_groups:
        group["lr"] = group.get("base_lr", spec.lr) * factor
    return spec.lr * factor


def engine_config(resources: Resources, precision: Precision, max_grad_norm: float | None) -> dict[str, Any]:
    """DeepSpeed's configuration. `max_grad_norm` None: a model that is not trained; it is whole unless ZeRO-3.

    Raises:
        ConfigError: the accelerator cannot compute in the precision, or the machine cannot offload to nvme.
    """
    trained = max_grad_norm is not None
    accelerator: Any = get_accelerator()
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise ConfigError(
            f"precision 'fp16': {accelerator.device_name()} does not compute in fp16 here; use bf16 or fp32, or a GPU"
        )
    stage = resources.zero_stage if trained or resources.zero_stage == 3 else 0
    if trained and precision != "fp32":
        # At ZeRO-0 DeepSpeed 0.19.8 makes the state of a 16-bit optimizer by a step with gradients of zero, which counts in
        # Adam's bias correction and decays weights, and does not scale fp16 losses. ZeRO-1 does neither.
        stage = max(stage, 1)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # ours refuses bad gradients, and needs no compiler
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": accelerator.device_name() != "cpu",
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 30_000_000,
            "stage3_prefetch_bucket_size": 30_000_000,
            **_offload(resources, stage, trained),
        },
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 16, "loss_scale_window": 100},  # DSC's window
    }
    if trained:
        config["gradient_clipping"] = max_grad_norm
    return config


def _offload(resources: Resources, stage: int, trained: bool) -> dict[str, Any]:
    """The part of the configuration that says what lies in the machine's memory or on its disk."""
    wanted = {
        "offload_optimizer": resources.offload_optimizer if trained and stage else "none",
        "offload_param": resources.offload_parameters if stage == 3 else "none",
    }
    accelerator: Any = get_accelerator()
    pinned = accelerator.device_name() != "cpu"
    config: dict[str, Any] = {
        name: {"device": place, "pin_memory": pinned, "nvme_path": resources.nvme_path}
        for name, place in wanted.items()
        if place != "none"
    }
    if "nvme" in wanted.values() and not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            "offload to nvme: DeepSpeed's async_io needs libaio and its headers (apt install libaio-dev), which are "
            "missing here; install them or offload to cpu"
        )
    return config


def zero_init(resources: Resources, precision: Precision) -> dict[str, Any] | None:
    """Configuration of `deepspeed.zero.Init`, to build a model in parts; None unless ZeRO-3."""
    return engine_config(resources, precision, None) if resources.zero_stage == 3 else None


def train_engine(
    model: nn.Module, optim: OptimSpec, resources: Resources, precision: Precision, lora: LoRASpec | None = None
) -> Any:
    """A DeepSpeed engine that trains `model` with AdamW.

    Its `step` raises NonFiniteError where DeepSpeed would skip an update silently; only in fp16, where the loss scale is
    being searched for, a skipped update is told and counted (`skipped_steps`).

    Args:
        model: whole, or in parts (ZeRO-3); what does not require a gradient is not trained.
        optim: AdamW; weight decay on matrices only.
        resources: memory layout.
        precision: of weights and activations.
        lora: of the model's adapters, whose learning rate may differ.

    Raises:
        ConfigError: nothing to train, or the machine cannot do what is asked.
    """
    if resources.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # pyright: ignore
    groups = parameter_groups(model, optim, lora)
    optimizer = GuardedAdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    config = engine_config(resources, precision, optim.max_grad_norm)
    if resources.zero_stage == 0 and precision == "fp32":
        optimizer.max_norm = optim.max_grad_norm
        config["gradient_clipping"] = 0.0  # left out, DeepSpeed would clip to 1
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)  # pyright: ignore
    engine.step = _checked_step(engine, precision)
    release_freed()
    return engine


def parameter_groups(model: nn.Module, optim: OptimSpec, lora: LoRASpec | None = None) -> list[dict[str, Any]]:
    """The optimizer's groups: matrices decay, biases, norms and embeddings do not; adapters have their own `base_lr`."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("nothing to train: every parameter is frozen")
    lora_lr = lora.lr if lora is not None and lora.lr is not None else optim.lr
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in named:
        plain = len(shape_of(p)) < 2 or any(part in name.lower() for part in NO_DECAY)
        groups.setdefault((".lora_" in name, plain), []).append(p)
    found: list[dict[str, Any]] = []
    for adapter, plain in sorted(groups):
        lr = lora_lr if adapter else optim.lr
        decay = 0.0 if plain else optim.weight_decay
        found.append({"params": groups[adapter, plain], "weight_decay": decay, "lr": lr, "base_lr": lr})
    return found


def _checked_step(engine: Any, precision: Precision) -> Callable[..., Any]:
    """The engine's step, with an eye on updates that DeepSpeed skips because a gradient is not finite."""
    plain = engine.step

    def step(*args: Any, **options: Any) -> Any:
        try:
            result = plain(*args, **options)
        except Exception as error:
            if "minimum" in str(error) and "scale" in str(error):
                raise NonFiniteError(
                    f"fp16: the loss scale is at its minimum and gradients overflow: {error}"
                ) from error
            raise
        if getattr(engine.optimizer, "overflow", False):
            if precision != "fp16":
                raise NonFiniteError(NOT_FINITE)
            if engine.global_rank == 0:
                print(f"fp16: gradients overflowed; update skipped ({engine.skipped_steps} so far)", file=sys.stderr)
        return result

    return step


def skipped_steps(engine: Any) -> int:
    """Updates skipped so far because fp16 gradients overflowed; always 0 in fp32 and bf16."""
    return int(engine.skipped_steps)


def frozen_engine(model: nn.Module, resources: Resources, precision: Precision) -> Any:
    """A DeepSpeed engine for a model that only scores (reference, reward); partitioned at ZeRO-3, else whole."""
    model.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=engine_config(resources, precision, None))  # pyright: ignore
    engine.eval()
    return engine


def check_finite(name: str, *values: Tensor) -> None:
    """NonFiniteError if a loss is NaN or infinite on this or another rank; call before the backward pass."""
    if any_rank(any(not bool(torch.isfinite(v).all()) for v in values)):
        raise NonFiniteError(f"{name} is not finite; nothing was updated. Lower the learning rate or check the data")
