"""DeepSpeed engines: their configuration, the optimizer, the learning-rate schedule, and saving from any ZeRO stage.

Every trainer owns its accumulation: it computes the token count of the whole optimizer step over all ranks first, scales each
micro-batch's loss sum by `world / count`, and calls `backward` per micro-batch and `step` once
(`managed_gradient_accumulation: false`). Then micro-batch size, accumulation and process count change nothing but rounding.
Gradients are checked where they are final, inside the optimizer's step: nothing is updated with a number that is not finite.
"""

import math
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from rlhf_core.distributed import any_rank
from rlhf_core.errors import ConfigError, NonFiniteError
from rlhf_core.resources import Resources
from rlhf_core.specs import OptimSpec, Precision

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
            raise NonFiniteError(
                "a gradient is not finite; nothing was updated. Lower the learning rate or use fp32/bf16"
            )
        if self.max_norm is not None:
            self.norm = float(
                torch.nn.utils.clip_grad_norm_([p for g in self.param_groups for p in g["params"]], self.max_norm)
            )
        return super().step(closure)


def grad_norm(engine: Any) -> float:
    """Norm of the gradients of the engine's last step, before clipping."""
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
    """Set the learning rate for optimizer step `step` and return it."""
    lr = spec.lr * lr_factor(step, spec, total)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def engine_config(resources: Resources, precision: Precision, max_grad_norm: float | None) -> dict[str, Any]:
    """DeepSpeed's configuration. `max_grad_norm` None: a model that is not trained."""
    stage = resources.zero_stage
    if max_grad_norm is None and stage != 3:
        stage = 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 30_000_000,
            "stage3_prefetch_bucket_size": 30_000_000,
        },
        "bf16": {"enabled": precision == "bf16"},
    }
    if max_grad_norm is not None:
        config["gradient_clipping"] = max_grad_norm
    return config


def train_engine(model: nn.Module, spec: OptimSpec, resources: Resources, precision: Precision) -> Any:
    """A DeepSpeed engine that trains `model` with AdamW."""
    if resources.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # pyright: ignore
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("nothing to train: every parameter is frozen")
    plain = [p for name, p in named if p.dim() < 2 or any(part in name.lower() for part in NO_DECAY)]
    chosen = {id(p) for p in plain}
    groups = [
        {"params": [p for _, p in named if id(p) not in chosen], "weight_decay": spec.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = GuardedAdamW([g for g in groups if g["params"]], lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=True)
    config = engine_config(resources, precision, spec.max_grad_norm)
    if resources.zero_stage == 0 and precision == "fp32":
        optimizer.max_norm = spec.max_grad_norm
        config["gradient_clipping"] = 0.0  # left out, DeepSpeed would clip to 1
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)  # pyright: ignore
    return engine


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


def full_state(engine: Any) -> dict[str, Tensor]:
    """All weights of the engine's model on the CPU of rank 0 (gathered at ZeRO-3); empty on other ranks."""
    model = engine.module
    main = engine.global_rank == 0
    if engine.zero_optimization_stage() < 3:
        return {k: v.detach().cpu() for k, v in model.state_dict().items()} if main else {}
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # tied weights once, as transformers saves them
        with deepspeed.zero.GatheredParameters([parameter]):
            if main:
                state[name] = parameter.detach().cpu().clone()
    if main:
        state.update({k: v.detach().cpu() for k, v in model.named_buffers() if k in model.state_dict()})
    return state
