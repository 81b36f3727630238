"""The frame of the trainers that learn from fixed rows: SFT, reward model and DPO.

`Trainer` opens the rows, counts the steps, adapts the model, and owns the loop: step, log, evaluate now and then, save. A stage
says what a step and an evaluation are. Below it stands what the two stages on pairs share: scoring all pairs on all ranks, and
accuracy with its interval, over all and by source.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from rlhf_core.batches import Row, deal, open_rows, pair_lengths, step_rows, total_steps
from rlhf_core.checkpointing import Checkpointer, Resumable
from rlhf_core.checkpoints import Position
from rlhf_core.context import JobContext
from rlhf_core.distributed import gather, start
from rlhf_core.engine import train_engine
from rlhf_core.export import save_adapter
from rlhf_core.lora import add_lora, trained
from rlhf_core.models import load_tokenizer
from rlhf_core.partitioned import shape_of
from rlhf_core.ragged import needs_padding
from rlhf_core.specs import DPOSpec, LoRASpec, RewardSpec, SFTSpec
from rlhf_core.stats import wilson_interval

S = TypeVar("S", SFTSpec, RewardSpec, DPOSpec)


class Trainer(Resumable, Generic[S]):
    """Owns the loop of one stage on this rank.

    Attributes:
        shown: metrics of a step that stand beside the progress.
        evaluate_first: whether the start is evaluated too.
        tokenizer: of the data.
        steps: optimizer steps of the stage.
        tokens, seconds: trained on and spent in training so far, before a resume too.
        metrics: of the last step.
    """

    shown: tuple[str, ...] = ("loss",)
    evaluate_first = False
    engine: Any

    def __init__(self, context: JobContext, spec: S, share: str) -> None:
        """Join the other ranks and open the rows of `share`."""
        self.context = context
        self.spec = spec
        self.resources = context.job.resources
        self.ranks = start(context.seed)
        self.tokenizer = load_tokenizer(context.input("data", "tokenizer"))
        self.train_rows = open_rows(context.input("data", f"{share}/train"))
        self.test_rows = open_rows(context.input("data", f"{share}/test"))
        stage = context.job.stage
        self.steps = total_steps(len(self.train_rows), spec.batch_size, spec.epochs, spec.max_steps, stage)
        self.tokens, self.seconds = 0.0, 0.0
        self.metrics: dict[str, float] = {}

    @property
    def quantize(self) -> str | None:
        """In what the base weights are kept, for the loaders."""
        return self.spec.lora.quantize if self.spec.lora else None

    def start_engine(self, model: nn.Module) -> None:
        """Add the adapters that the spec asks for, and the optimizer."""
        self.parameters = sum(shape_of(p).numel() for p in model.parameters())
        if self.spec.lora:
            add_lora(model, self.spec.lora, f"{self.context.job.stage}.lora", self.context.seed)
        self.trained = trained(model)
        self.engine = train_engine(model, self.spec.optim, self.resources, self.spec.precision, lora=self.spec.lora)

    def run(self) -> dict[str, Any]:
        """Resume if there is a checkpoint, train, evaluate, save; returns the stage's metrics."""
        with Checkpointer(self.context, self.ranks, {"model": (self.engine, None)}, self) as self.checkpoints:
            self.train()
        evaluation = self.evaluate(self.steps)
        saved = self.save()
        self.checkpoints.finish()
        return {
            "steps": self.steps,
            "parameters": self.parameters,
            "parameters_trained": self.trained,
            "tokens": int(self.tokens),
            "tokens_per_second": self.tokens / self.seconds,
            "loss_last": self.metrics["loss"],
            **self.checkpoints.metrics(),
            **saved,
            **{f"eval_{name}": value for name, value in evaluation.items()},
        }

    def train(self) -> None:
        """Resume, and take all steps that are left."""
        position = self.checkpoints.restore()
        self.prepare()
        if position is None and self.evaluate_first:
            self.evaluate(0)
        first = position.step if position else 0
        began = time.monotonic() - self.seconds
        for step in range(first, self.steps):
            metrics = self.metrics = self.step(step)
            self.context.log("train", step + 1, metrics)
            shown = {name: metrics[name] for name in self.shown}
            shown["tokens_per_second"] = self.tokens / (time.monotonic() - began)
            self.context.progress(step + 1, self.steps, "train", shown)
            if self.spec.eval_every and (step + 1) % self.spec.eval_every == 0 and step + 1 < self.steps:
                self.evaluate(step + 1)
            self.seconds = time.monotonic() - began
            self.checkpoints.at(Position(step=step + 1), last=step + 1 == self.steps)
        self.checkpoints.close(Position(step=self.steps))

    def prepare(self) -> None:
        """What comes before the first step, on a resumed stage too."""

    def record(self) -> dict[str, Any]:
        """Counters, for a checkpoint."""
        return {"tokens": self.tokens, "seconds": self.seconds, "metrics": self.metrics}

    def resume(
        self, position: Position, record: dict[str, Any], shared: dict[str, Tensor], own: Sequence[dict[str, Tensor]]
    ) -> None:
        """Take up what `record`, `shared` and `own` said."""
        self.tokens, self.seconds, self.metrics = record["tokens"], record["seconds"], record["metrics"]

    @abstractmethod
    def step(self, step: int) -> dict[str, float]:
        """One optimizer step over the global batch; its metrics."""

    @abstractmethod
    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics on the held-out rows, logged."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """Write the model to the output folder; what it has to say beside the other metrics."""

    def batch(self, step: int) -> tuple[np.ndarray, list[Row]]:
        """Row numbers `[batch_size]` and rows of one step."""
        indices = step_rows(len(self.train_rows), self.spec.batch_size, step, self.context.seed)
        return indices, self.train_rows.select(indices).to_list()

    def save_adapter(self, lora: LoRASpec, base: str) -> None:
        """Write the adapters beside the model."""
        save_adapter(self.engine, self.context.out / "adapter", lora, base)

    @property
    def sft_model(self) -> str:
        """Name of the SFT stage's model, the base of an adapter."""
        return f"{self.context.job.inputs['sft'].id}/model"

    @property
    def padded(self) -> bool:
        """Whether a pass computes padding along with its rows."""
        return needs_padding(self.engine.module)

    def deal_pairs(self, lengths: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of pairs of these lengths, as indices into `lengths`."""
        tokens = self.resources.micro_tokens
        both = [2 * length for length in lengths]  # a pair is two rows
        return deal(both, self.ranks.rank, self.ranks.world, self.resources.micro_batch, tokens, self.padded)

    @torch.no_grad()
    def score_pairs(
        self,
        rows: Dataset,
        phase: str,
        score: Callable[[list[Row]], tuple[Tensor, Tensor]],
        numbers: np.ndarray | None = None,
        before: int = 0,
        total: int | None = None,
    ) -> np.ndarray:
        """What `score` gives to chosen and rejected of the rows, on every rank, in order: `[pairs, 2]`.

        Each rank reads its own rows, a micro-batch at a time.

        Args:
            rows: a whole split.
            phase: for the progress.
            score: of a micro-batch, `[pairs]` each.
            numbers: of the rows to score; default: all.
            before, total: where these rows stand among more, for the progress.
        """
        self.engine.eval()
        numbers = np.arange(len(rows)) if numbers is None else numbers
        mine: dict[int, tuple[float, float]] = {}
        parts = self.deal_pairs(pair_lengths(rows)[numbers].tolist())
        for done, part in enumerate(parts):
            read = rows.select(numbers[part or [0]]).to_list()  # an empty part runs too, for ZeRO-3's sake
            chosen, rejected = score(read)
            mine.update(zip(part, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=False))
            seen = before + len(numbers) * (done + 1) // len(parts)
            self.context.progress(seen, total or len(numbers), phase, unit="pair")
        merged = {i: pair for ranks in gather(mine) for i, pair in ranks.items()}
        return np.array([merged[i] for i in range(len(numbers))])


def accuracy_metrics(right: np.ndarray, sources: Sequence[str]) -> dict[str, float]:
    """Accuracy with its 95 % Wilson interval, and by source where there are several.

    Args:
        right: `[pairs]`, whether each pair is told right.
        sources: of the pairs.
    """
    low, high = wilson_interval(int(right.sum()), len(right))
    metrics = {"accuracy": float(right.mean()), "accuracy_low": low, "accuracy_high": high}
    return metrics | by_source("accuracy", right.astype(float), np.ones(len(right)), sources)


def by_source(name: str, values: np.ndarray, weights: np.ndarray, sources: Sequence[str]) -> dict[str, float]:
    """`{name}_{source}`: the mean of `values` by `weights` over each source's rows; nothing with a single source."""
    each = np.array(sources)
    if len(found := sorted(set(sources) - {""})) < 2:
        return {}
    return {f"{name}_{s}": float((values * weights)[each == s].sum() / weights[each == s].sum()) for s in found}
