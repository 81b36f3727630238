"""Supervised fine-tuning: token-mean cross-entropy on the responses (or on everything).

The loss of an optimizer step is one mean over all its tokens on all ranks. Evaluation is the token mean over the held-out
rows; perplexity is its exponential.
"""

import math
import time
from typing import Any

import torch
from torch import Tensor

from rlhf_core.batches import Row, deal, longest, open_rows, right_pad, step_rows, total_steps
from rlhf_core.context import JobContext
from rlhf_core.distributed import start, sum_over_ranks
from rlhf_core.engine import check_finite, full_state, grad_norm, set_lr, train_engine
from rlhf_core.models import base_model, check_positions, forward_inputs, load_tokenizer, save_causal_lm
from rlhf_core.scoring import target_logprobs
from rlhf_core.specs import SFTSpec


class SFTTrainer:
    """Owns the loop of one SFT stage on this rank."""

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.spec = SFTSpec.model_validate(context.job.spec)
        self.resources = context.job.resources
        self.ranks = start(context.seed)
        data = context.input("data")
        self.tokenizer = load_tokenizer(data / "tokenizer")
        self.train_rows = open_rows(data / "sft" / "train")
        self.test_rows = open_rows(data / "sft" / "test")
        self.steps = total_steps(
            len(self.train_rows), self.spec.batch_size, self.spec.epochs, self.spec.max_steps, "sft"
        )
        assert context.job.model is not None
        model = base_model(context.job.model, self.tokenizer, context.seed, self.spec.dropout)
        check_positions(model.config, longest(self.train_rows, "input_ids"), 0)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.engine = train_engine(model, self.spec.optim, self.resources, self.spec.precision)
        self.tokens = 0.0

    def run(self) -> dict[str, Any]:
        """Train, evaluate, save; returns the stage's metrics."""
        began = time.monotonic()
        self.evaluate(0)
        metrics: dict[str, float] = {}
        for step in range(self.steps):
            metrics = self.step(step)
            self.context.log("train", step + 1, metrics)
            self.context.progress(step + 1, self.steps, "train", {"loss": metrics["loss"]})
            if self.spec.eval_every and (step + 1) % self.spec.eval_every == 0 and step + 1 < self.steps:
                self.evaluate(step + 1)
        seconds = time.monotonic() - began
        evaluation = self.evaluate(self.steps)
        self.save()
        return {
            "steps": self.steps,
            "parameters": self.parameters,
            "tokens": int(self.tokens),
            "tokens_per_second": self.tokens / seconds,
            "loss_last": metrics["loss"],
            **{f"eval_{k}": v for k, v in evaluation.items()},
        }

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step over the global batch."""
        self.engine.train()
        indices = step_rows(len(self.train_rows), self.spec.batch_size, step, self.context.seed)
        rows: list[Row] = self.train_rows.select(indices).to_list()
        lr = set_lr(self.engine, step, self.spec.optim, self.steps)
        micro_batches = [[rows[i] for i in part] for part in self._deal(rows)]
        counted = sum(sum(self._labelled(row)[1:]) for part in micro_batches for row in part)
        (count,) = sum_over_ranks([float(counted)])
        total = 0.0
        for part in micro_batches:
            loss = self._loss_sum(part)
            check_finite("sft loss", loss)
            self.engine.backward(loss * (self.ranks.world / count))
            total += loss.item()
        self.engine.step()
        seen = sum(len(row["input_ids"]) for part in micro_batches for row in part)
        loss_sum, tokens = sum_over_ranks([total, float(seen)])
        self.tokens += tokens
        return {
            "loss": loss_sum / count,
            "lr": lr,
            "grad_norm": grad_norm(self.engine),
            "tokens": tokens,
        }

    def _deal(self, rows: list[Row]) -> list[list[int]]:
        lengths = [len(row["input_ids"]) for row in rows]
        return deal(lengths, self.ranks.rank, self.ranks.world, self.resources.micro_batch)

    def _labelled(self, row: Row) -> list[int]:
        return row["loss_mask"] if self.spec.loss_on == "response" else [1] * len(row["input_ids"])

    def _loss_sum(self, rows: list[Row]) -> Tensor:
        """Sum of -log p over the labelled tokens of `rows`."""
        device = self.ranks.device
        ids = right_pad([r["input_ids"] for r in rows], self.tokenizer.pad_token_id, device)
        mask = right_pad([[1] * len(r["input_ids"]) for r in rows], 0, device)
        labelled = right_pad([self._labelled(r) for r in rows], 0, device)[:, 1:].bool()
        logits = self.engine(**forward_inputs(self.engine.module, ids, mask), use_cache=False).logits
        return -target_logprobs(logits[:, :-1][labelled], ids[:, 1:][labelled]).sum()

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Loss and perplexity on the held-out rows."""
        self.engine.eval()
        if not len(self.test_rows):
            return {}
        rows: list[Row] = self.test_rows.to_list()
        loss, count = 0.0, 0.0
        # Ranks run the same number of passes; the filler rows at the end are not counted.
        filler = -len(rows) % self.ranks.world
        parts = self._deal(rows + rows[:filler])
        for done, part in enumerate(parts):
            batch = [(rows + rows[:filler])[i] for i in part]
            real = [r for r, i in zip(batch, part, strict=True) if i < len(rows)]
            nll = self._loss_sum(real or batch).item()
            loss += nll if real else 0.0
            count += sum(sum(self._labelled(r)[1:]) for r in real)
            self.context.progress(done + 1, len(parts), "evaluate", unit="batch")
        loss, count = sum_over_ranks([loss, count])
        metrics = {"loss": loss / count, "perplexity": math.exp(min(loss / count, 50.0))}
        self.context.log("eval", step, metrics)
        return metrics

    def save(self) -> None:
        """Write the model and the tokenizer to the output folder."""
        state = full_state(self.engine)
        if self.context.is_main:
            save_causal_lm(self.engine.module, state, self.tokenizer, self.context.out / "model")


def run(context: JobContext) -> dict[str, Any]:
    """The SFT stage."""
    return SFTTrainer(context).run()
