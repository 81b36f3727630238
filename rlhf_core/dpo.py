"""Direct preference optimisation (Rafailov et al. 2023): the policy learns from the reward share's pairs, without reward model.

The reference is the SFT model the policy starts from, so its log-probabilities of the rows that will be used are computed by the
policy itself before the first step and kept, two numbers a row: one model is in memory, not two. The loss of a step is one mean
over its pairs on all ranks. Prompts are padded on the left and answers on the right, so the head runs on answers only.
Evaluation is on held-out pairs: how often the implicit reward prefers the chosen answer.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_core.batches import Row, epoch_order, longest, pair_length, pair_tokens, right_padded, sources_of
from rlhf_core.checkpoints import Position
from rlhf_core.context import JobContext
from rlhf_core.distributed import sum_over_ranks
from rlhf_core.engine import check_finite, grad_norm, set_lr, zero_init
from rlhf_core.export import save_causal_lm
from rlhf_core.models import check_positions, load_causal_lm
from rlhf_core.rollout import left_pad
from rlhf_core.scoring import response_scores
from rlhf_core.specs import DPOSpec
from rlhf_core.trainer import Trainer, accuracy_metrics

REFERENCE_ROWS = 1024  # rows dealt at once while the reference's numbers are computed


class DPOTrainer(Trainer[DPOSpec]):
    """Owns the loop of one DPO stage on this rank.

    Attributes:
        train_reference, test_reference: log p_ref of chosen and rejected, `[rows, 2]`; NaN for rows never used.
        referenced: rows of train and test that the reference has scored.
    """

    shown = ("loss", "accuracy")

    def __init__(self, context: JobContext) -> None:
        super().__init__(context, DPOSpec.model_validate(context.job.spec), "reward")
        parts = zero_init(self.resources, self.spec.precision)
        folder = str(context.input("sft", "model"))
        model = load_causal_lm(folder, self.spec.dropout, zero_init=parts, quantize=self.quantize)
        for rows in (self.train_rows, self.test_rows):
            answer = max(longest(rows, "chosen_ids"), longest(rows, "rejected_ids"))
            check_positions(model.config, longest(rows, "prompt_ids"), answer)
        self.start_engine(model)
        self.train_reference, self.test_reference = (
            np.full((len(rows), 2), np.nan) for rows in (self.train_rows, self.test_rows)
        )
        self.referenced = [0, 0]

    def prepare(self) -> None:
        """Score the rows that will be used with the reference, which the policy still is before its first step."""
        for place, (rows, used, found) in enumerate(self._references()):
            while (first := self.referenced[place]) < len(used):
                numbers = used[first : first + REFERENCE_ROWS]
                found[numbers] = self.score_pairs(rows, "reference", self._logprobs, numbers, first, len(used))
                self.referenced[place] = first + len(numbers)
                self.checkpoints.at(Position(step=0, update=sum(self.referenced)))

    def _references(self) -> list[tuple[Any, np.ndarray, np.ndarray]]:
        """For train and test: the rows, the numbers of those that will be used, and where the numbers go."""
        used = min(len(self.train_rows), self.steps * self.spec.batch_size)
        train = epoch_order(len(self.train_rows), self.context.seed, 0)[:used]
        return [
            (self.train_rows, train, self.train_reference),
            (self.test_rows, np.arange(len(self.test_rows)), self.test_reference),
        ]

    def record(self) -> dict[str, Any]:
        """Counters, for a checkpoint."""
        return {**super().record(), "referenced": self.referenced}

    def shared(self) -> dict[str, Tensor]:
        """The reference's numbers."""
        return {"train": torch.from_numpy(self.train_reference), "test": torch.from_numpy(self.test_reference)}

    def resume(
        self, position: Position, record: dict[str, Any], shared: dict[str, Tensor], own: Sequence[dict[str, Tensor]]
    ) -> None:
        """Take up what `record` and `shared` said."""
        super().resume(position, record, shared, own)
        self.referenced = record["referenced"]
        self.train_reference, self.test_reference = shared["train"].numpy(), shared["test"].numpy()

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step over the global batch of pairs."""
        self.engine.train()
        spec, n = self.spec, self.spec.batch_size
        indices, rows = self.batch(step)
        reference = torch.tensor(self.train_reference[indices], dtype=torch.float32, device=self.ranks.device)
        lr = set_lr(self.engine, step, spec.optim, self.steps)
        sums = np.zeros(6)
        for part in self.deal_pairs([pair_length(row) for row in rows]):
            logprobs = torch.stack(self._logprobs([rows[i] for i in part]), 1)
            ratios = logprobs - reference[part]
            loss = dpo_loss(ratios[:, 0], ratios[:, 1], spec.beta, spec.loss, spec.label_smoothing).sum()
            check_finite("dpo loss", loss)
            self.engine.backward(loss * (self.ranks.world / n))
            right = (ratios[:, 0] > ratios[:, 1]).sum()
            sums += torch.stack([loss.detach(), right, *ratios.detach().sum(0), *logprobs.detach().sum(0)]).tolist()
        self.engine.step()
        loss_sum, right, chosen, rejected, *logprobs = (value / n for value in sum_over_ranks(sums.tolist()))
        tokens = pair_tokens(rows)
        self.tokens += tokens
        return {
            "loss": loss_sum,
            "accuracy": right,
            **self._rewards(chosen, rejected),
            "chosen_logprob": logprobs[0],
            "rejected_logprob": logprobs[1],
            "lr": lr,
            "grad_norm": grad_norm(self.engine),
            "tokens": tokens,
        }

    def _rewards(self, chosen: float, rejected: float) -> dict[str, float]:
        """Implicit rewards from mean log-ratios, and how far below the reference the policy puts the data's answers."""
        beta = self.spec.beta
        return {
            "margin": beta * (chosen - rejected),
            "chosen_reward": beta * chosen,
            "rejected_reward": beta * rejected,
            "drift": -(chosen + rejected) / 2,
        }

    def _logprobs(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of chosen and rejected, `[pairs]` each: sums over the tokens, for ipo means."""
        device, pad = self.ranks.device, self.tokenizer.pad_token_id
        prompts, prompt_mask = left_pad([r["prompt_ids"] for r in rows] * 2, pad, device)
        answers = [r["chosen_ids"] for r in rows] + [r["rejected_ids"] for r in rows]
        ids, mask = right_padded(answers, pad, device)
        scores = response_scores(self.engine, prompts, prompt_mask, ids, mask)
        totals = scores.logprobs.where(mask.bool(), 0.0).sum(1)
        if self.spec.loss == "ipo":
            totals = totals / mask.sum(1)
        chosen, rejected = totals.chunk(2)
        return chosen, rejected

    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy with interval, loss and implicit rewards on the held-out pairs."""
        ratios = torch.tensor(self.score_pairs(self.test_rows, "evaluate", self._logprobs) - self.test_reference)
        loss = dpo_loss(ratios[:, 0], ratios[:, 1], self.spec.beta, self.spec.loss, self.spec.label_smoothing)
        metrics = {
            **accuracy_metrics((ratios[:, 0] > ratios[:, 1]).numpy(), sources_of(self.test_rows)),
            "loss": loss.mean().item(),
            **self._rewards(*ratios.mean(0).tolist()),
            "pairs": float(len(ratios)),
        }
        self.context.log("eval", step, metrics)
        return metrics

    def save(self) -> dict[str, Any]:
        """Write the model and the tokenizer to the output folder."""
        save_causal_lm(self.engine, self.tokenizer, self.context.out / "model")
        if self.spec.lora:
            self.save_adapter(self.spec.lora, self.sft_model)
        return {}


def dpo_loss(
    chosen: Tensor, rejected: Tensor, beta: float, kind: Literal["sigmoid", "ipo"], label_smoothing: float = 0.0
) -> Tensor:
    """Loss per pair, `[pairs]`.

    With h = chosen - rejected: sigmoid -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h), eq. 7 of arXiv 2305.18290,
    with the smoothing s of cDPO (Mitchell 2023); ipo (h - 1 / (2 beta))^2, eq. 17 of arXiv 2310.12036.

    Args:
        chosen, rejected: `[pairs]`, log p(answer) - log p_ref(answer): sums over the tokens, for ipo means.
        beta: the price of leaving the reference.
        kind: which loss.
        label_smoothing: share of labels believed wrong, below 0.5; ipo has none.
    """
    h = chosen - rejected
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square()
    return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)


def run(context: JobContext) -> dict[str, Any]:
    """The DPO stage."""
    return DPOTrainer(context).run()
