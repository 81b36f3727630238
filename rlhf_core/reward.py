"""Reward model: -log sigmoid(r(chosen) - r(rejected)), scores taken at the last token of each response.

The trunk starts from the SFT model, the head from N(0, 1/sqrt(width+1)). Evaluation reports accuracy on held-out pairs with
its 95 % Wilson interval. Afterwards mean and deviation of the scores on training pairs are stored in the model's
configuration; PPO and evaluation use (score - mean) / std, so that a KL coefficient means the same for every reward model.
"""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.batches import Row, deal, open_rows, right_pad, step_rows, total_steps
from rlhf_core.context import JobContext
from rlhf_core.distributed import gather, start, sum_over_ranks
from rlhf_core.engine import check_finite, full_state, grad_norm, set_lr, train_engine
from rlhf_core.models import ValueModel, base_model, load_causal_lm, load_tokenizer, save_value_model
from rlhf_core.scoring import end_scores
from rlhf_core.specs import RewardSpec
from rlhf_core.stats import wilson_interval

MOMENT_PAIRS = 512


class RewardTrainer:
    """Owns the loop of one reward stage on this rank."""

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.spec = RewardSpec.model_validate(context.job.spec)
        self.resources = context.job.resources
        self.ranks = start(context.seed)
        data = context.input("data")
        self.tokenizer = load_tokenizer(data / "tokenizer")
        self.train_rows = open_rows(data / "reward" / "train")
        self.test_rows = open_rows(data / "reward" / "test")
        self.steps = total_steps(
            len(self.train_rows), self.spec.batch_size, self.spec.epochs, self.spec.max_steps, "reward"
        )
        share = self.spec.flip_labels or 0.0
        self.flipped = np.random.default_rng((context.seed, 1)).random(len(self.train_rows)) < share
        if self.spec.model:
            language_model = base_model(self.spec.model, self.tokenizer, context.seed, self.spec.dropout)
        else:
            language_model = load_causal_lm(str(context.input("sft") / "model"), self.spec.dropout)
        model = ValueModel.from_causal_lm(language_model, context.seed)
        if self.spec.train_layers:
            freeze_below(model, self.spec.train_layers)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.engine = train_engine(model, self.spec.optim, self.resources, self.spec.precision)
        self.tokens = 0.0

    def run(self) -> dict[str, Any]:
        """Train, evaluate, store the score's moments, save; returns the stage's metrics."""
        began = time.monotonic()
        metrics: dict[str, float] = {}
        for step in range(self.steps):
            metrics = self.step(step)
            self.context.log("train", step + 1, metrics)
            shown = {"loss": metrics["loss"], "accuracy": metrics["accuracy"]}
            self.context.progress(step + 1, self.steps, "train", shown)
            if self.spec.eval_every and (step + 1) % self.spec.eval_every == 0 and step + 1 < self.steps:
                self.evaluate(step + 1)
        seconds = time.monotonic() - began
        evaluation = self.evaluate(self.steps)
        mean, std = self.moments()
        self.save(mean, std)
        return {
            "steps": self.steps,
            "parameters": self.parameters,
            "tokens": int(self.tokens),
            "tokens_per_second": self.tokens / seconds,
            "loss_last": metrics["loss"],
            "score_mean": mean,
            "score_std": std,
            **{f"eval_{k}": v for k, v in evaluation.items()},
        }

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step over the global batch of pairs."""
        self.engine.train()
        spec = self.spec
        indices = step_rows(len(self.train_rows), spec.batch_size, step, self.context.seed)
        rows: list[Row] = self.train_rows.select(indices).to_list()
        for row, index in zip(rows, indices, strict=True):
            if self.flipped[index]:
                row["chosen_ids"], row["rejected_ids"] = row["rejected_ids"], row["chosen_ids"]
        lr = set_lr(self.engine, step, spec.optim, self.steps)
        sums = np.zeros(4)
        for part in self._deal(rows):
            chosen, rejected = self._scores([rows[i] for i in part])
            loss = pair_loss(chosen, rejected, spec.center_coef).sum()
            check_finite("reward loss", loss)
            self.engine.backward(loss * (self.ranks.world / spec.batch_size))
            right = (chosen > rejected).sum().item()
            sums += [loss.item(), right, (chosen - rejected).sum().item(), (chosen + rejected).sum().item() / 2]
        self.engine.step()
        loss_sum, right, margin, score = sum_over_ranks(sums.tolist())
        tokens = sum(2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows)
        self.tokens += tokens
        n = spec.batch_size
        return {
            "loss": loss_sum / n,
            "accuracy": right / n,
            "margin": margin / n,
            "score_mean": score / n,
            "lr": lr,
            "grad_norm": grad_norm(self.engine),
            "tokens": tokens,
        }

    def _deal(self, rows: list[Row]) -> list[list[int]]:
        lengths = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
        return deal(lengths, self.ranks.rank, self.ranks.world, self.resources.micro_batch)

    def _scores(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected, `[pairs]` each, in one forward pass."""
        texts = [r["prompt_ids"] + r["chosen_ids"] for r in rows] + [r["prompt_ids"] + r["rejected_ids"] for r in rows]
        ids = right_pad(texts, self.tokenizer.pad_token_id, self.ranks.device)
        mask = right_pad([[1] * len(t) for t in texts], 0, self.ranks.device)
        chosen, rejected = end_scores(self.engine, ids, mask).chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def score_pairs(self, rows: list[Row], phase: str) -> np.ndarray:
        """Scores of all `rows` on every rank, in order: `[pairs, 2]` (chosen, rejected)."""
        self.engine.eval()
        padded = rows + rows[: -len(rows) % self.ranks.world]
        mine: dict[int, tuple[float, float]] = {}
        parts = self._deal(padded)
        for done, part in enumerate(parts):
            chosen, rejected = self._scores([padded[i] for i in part])
            mine.update(zip(part, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
            self.context.progress(done + 1, len(parts), phase, unit="batch")
        merged = {i: pair for ranks in gather(mine) for i, pair in ranks.items()}
        return np.array([merged[i] for i in range(len(rows))])

    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy with interval, loss and margin on the held-out pairs."""
        rows: list[Row] = self.test_rows.to_list()
        if not rows:
            return {}
        scores = self.score_pairs(rows, "evaluate")
        margin = scores[:, 0] - scores[:, 1]
        right = int((margin > 0).sum())
        low, high = wilson_interval(right, len(rows))
        metrics = {
            "accuracy": right / len(rows),
            "accuracy_low": low,
            "accuracy_high": high,
            "loss": float(np.logaddexp(0, -margin).mean()),
            "margin": float(margin.mean()),
            "pairs": float(len(rows)),
        }
        self.context.log("eval", step, metrics)
        return metrics

    def moments(self) -> tuple[float, float]:
        """Mean and deviation of the scores of up to 512 training pairs, both answers."""
        count = min(MOMENT_PAIRS, len(self.train_rows))
        scores = self.score_pairs(self.train_rows.select(range(count)).to_list(), "moments")
        return float(scores.mean()), float(max(scores.std(), 1e-6))

    def save(self, mean: float, std: float) -> None:
        """Write the model, with the moments in its configuration, to the output folder."""
        model = self.engine.module
        model.config.score_mean, model.config.score_std = mean, std
        state = full_state(self.engine)
        if self.context.is_main:
            save_value_model(model, state, self.tokenizer, self.context.out / "model")


def pair_loss(chosen: Tensor, rejected: Tensor, center_coef: float) -> Tensor:
    """Bradley-Terry loss per pair, `[pairs]`, with the centring term of Eisenstein et al. 2023 (arXiv 2312.09244)."""
    loss = -torch.nn.functional.logsigmoid(chosen - rejected)
    return loss + center_coef * (chosen + rejected).square() if center_coef else loss


def freeze_below(model: ValueModel, layers: int) -> None:
    """Leave only the last `layers` blocks, the final norm and the head trainable."""
    blocks = next(m for m in model.trunk.modules() if isinstance(m, torch.nn.ModuleList))
    trained = {id(p) for block in list(blocks)[-layers:] for p in block.parameters()} | {id(model.score.weight)}
    inside = {id(p) for p in blocks.parameters()}
    embeddings = {id(p) for m in model.trunk.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    for parameter in model.parameters():
        final_norm = id(parameter) not in inside and id(parameter) not in embeddings and parameter.dim() == 1
        parameter.requires_grad_(id(parameter) in trained or final_norm)


def run(context: JobContext) -> dict[str, Any]:
    """The reward stage."""
    return RewardTrainer(context).run()
