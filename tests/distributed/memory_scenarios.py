"""Loading, training and exporting on every rank of a small process group, with the memory it takes; started by `ranks.run`."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import tiny
import torch
from deepspeed.accelerator import get_accelerator
from scenarios import main

from rlhf_core import lora
from rlhf_core.distributed import gather, start
from rlhf_core.engine import frozen_engine, grad_norm, set_lr, skipped_steps, train_engine, zero_init
from rlhf_core.errors import NonFiniteError
from rlhf_core.export import save_adapter, save_causal_lm, save_value_model
from rlhf_core.models import ValueModel, base_model, forward_inputs, load_causal_lm
from rlhf_core.partitioned import is_partitioned
from rlhf_core.resources import Resources
from rlhf_core.specs import LoRASpec, ModelSpec, OptimSpec

OPTIM = OptimSpec(lr=1e-3, weight_decay=0.1, schedule="constant")
ROWS = [[5, 9, 2, 7, 30, 11, 4, 3], [8, 6, 3, 22, 2, 9, 17, 12]]


class Peak:
    """Highest anonymous memory of this process since `reset`, bytes over what it was then; sampled all the time.

    Pages of mapped files are left out: how many of them stay in memory is the kernel's choice and differs from run to run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # else a look that began before a reset could bring back what was reset
        self.reset()
        threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        with self._lock:
            self.base = self.highest = self._read()

    def rise(self) -> int:
        return self._look() - self.base

    def _look(self) -> int:
        with self._lock:
            self.highest = max(self.highest, self._read())
            return self.highest

    def _watch(self) -> None:
        while True:
            self._look()
            time.sleep(0.002)

    def _read(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def train(engine: Any, steps: int) -> list[float]:
    """Losses of `steps` updates; each rank has its own row, so that all ranks must work together."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows = torch.tensor(ROWS)[rank::world]
    losses = []
    for step in range(steps):
        set_lr(engine, step, OPTIM, steps)
        logits = engine(**forward_inputs(engine.module, rows, torch.ones_like(rows)), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), rows[:, 1:].flatten())
        engine.backward(loss)
        engine.step()
        losses.append(sum(gather(loss.item())) / world)
    assert grad_norm(engine) > 0
    return losses


def large(folder: str, small: str, target: str, parts: bool, shard_bytes: int) -> list[dict[str, Any]]:
    """Load, train two steps, export a model that is large enough to be seen; what each rank needed."""
    start(0)
    resources = Resources(zero_stage=3 if parts else 0)
    load_causal_lm(small, zero_init=zero_init(resources, "fp32"))  # imports what loading needs: not counted
    peak, found = Peak(), {}
    model = load_causal_lm(folder, zero_init=zero_init(resources, "fp32"))
    found["load"] = peak.rise()
    engine = train_engine(model, OPTIM, resources, "fp32")
    found["losses"] = train(engine, 2)
    peak.reset()
    save_causal_lm(engine, tiny.tokenizer(), target, shard_bytes=shard_bytes)
    found["export"] = peak.rise()
    return gather(found)


def losses(folder: str, cases: list[dict[str, Any]]) -> list[list[float]]:
    """Losses of three steps for each of several resources, one engine after another in one process group."""
    start(0)
    found = []
    for case in cases:
        precision = case.pop("precision", "fp32")
        resources = Resources(**case)
        model = load_causal_lm(folder, zero_init=zero_init(resources, precision))
        found.append(train(train_engine(model, OPTIM, resources, precision), 3))
    return found


def overflow(folder: str, stages: list[int]) -> list[dict[str, Any]]:
    """fp16 on the CPU, which DeepSpeed allows only on GPUs because it is slow: losses, and what an overflow does."""
    kind: Any = type(get_accelerator())
    kind.is_fp16_supported = lambda self: True
    kind.supported_dtypes = lambda self: [torch.float, torch.bfloat16, torch.float16]
    start(0)
    found = []
    for stage in stages:
        resources = Resources(zero_stage=stage)
        model = load_causal_lm(folder, zero_init=zero_init(resources, "fp16"))
        engine = train_engine(model, OPTIM, resources, "fp16")
        result: dict[str, Any] = {"before": train(engine, 3)}
        rows = torch.tensor(ROWS)
        for _ in range(2):
            logits = engine(**forward_inputs(engine.module, rows, torch.ones_like(rows)), use_cache=False).logits
            engine.backward(logits.float().square().mean() * (1e8 if os.environ["RANK"] == "0" else 1.0))
            engine.step()
            result["norm"] = grad_norm(engine)
        result["skipped"] = skipped_steps(engine)
        result["after"] = train(engine, 2)
        found.append(result)
    return found


def export(root: str, precision: str) -> None:
    """Read every model in `root` in parts and write it again, as it is and as a value model."""
    start(0)
    resources = Resources(zero_stage=3)
    config = zero_init(resources, precision)
    for folder in sorted(Path(root).iterdir()):
        model = load_causal_lm(str(folder / "whole"), dropout=0.0, zero_init=config)
        assert is_partitioned(model)
        engine = frozen_engine(model, resources, precision)
        save_causal_lm(engine, tiny.tokenizer(), folder / "parts", shard_bytes=40_000)
        value = ValueModel.load(folder / "value", zero_init=config)
        assert is_partitioned(value)
        save_value_model(frozen_engine(value, resources, precision), tiny.tokenizer(), folder / "value-parts")


def grown(folder: str, target: str) -> None:
    """Read a model whose vocabulary is smaller than the tokenizer's, in parts and whole, and write both; and value models."""
    start(0)
    tokenizer, spec = tiny.tokenizer(), ModelSpec(path=folder)
    resources = Resources(zero_stage=3)
    for name, config in (("whole", None), ("parts", zero_init(resources, "fp32"))):
        model = base_model(spec, tokenizer, seed=0, zero_init=config)
        save_causal_lm(model, tokenizer, Path(target) / name)
        save_value_model(ValueModel.from_causal_lm(model, 3), tokenizer, Path(target) / f"value-{name}")


def adapters(folder: str, target: str, zero_stage: int) -> list[float]:
    """Train adapters, then export merged weights and the adapters alone; losses."""
    start(0)
    resources, spec = Resources(zero_stage=zero_stage), LoRASpec(rank=4, alpha=8, lr=5e-3)
    model = load_causal_lm(folder, zero_init=zero_init(resources, "fp32"))
    torch.manual_seed(1)
    lora.add_lora(model, spec, "sft.lora")
    engine = train_engine(model, OPTIM, resources, "fp32", spec)
    found = train(engine, 3)
    save_causal_lm(engine, tiny.tokenizer(), Path(target) / "merged")
    save_adapter(engine, Path(target) / "adapter", spec, folder)
    return found


def poisoned(folder: str, cases: list[dict[str, Any]]) -> list[str]:
    """What a gradient that is not finite on one rank leads to, for each of several resources."""
    start(0)
    found = []
    for case in cases:
        precision = case.pop("precision", "fp32")
        resources = Resources(**case)
        engine = train_engine(
            load_causal_lm(folder, zero_init=zero_init(resources, precision)), OPTIM, resources, precision
        )
        rows = torch.tensor(ROWS)
        logits = engine(**forward_inputs(engine.module, rows, torch.ones_like(rows)), use_cache=False).logits
        factor = float("inf") if os.environ["RANK"] == "0" else 1.0
        engine.backward(logits.float().square().mean() * factor)
        try:
            engine.step()
            found.append("updated")
        except NonFiniteError:
            found.append("refused")
    return found


if __name__ == "__main__":
    main(globals())
