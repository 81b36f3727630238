"""Supervised fine-tuning: token-mean cross-entropy on the responses (or on everything).

The loss of an optimizer step is one mean over all its tokens on all ranks. Evaluation is the token mean over the held-out
rows, over all and by source; perplexity is its exponential. With `resources.pack_tokens` sequences share rows, which changes
nothing but rounding.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.batches import Row, deal, deal_packed, longest, right_pad, row_lengths, sources_of
from rlhf_core.context import JobContext
from rlhf_core.distributed import gather, sum_over_ranks
from rlhf_core.engine import check_finite, grad_norm, set_lr, zero_init
from rlhf_core.export import save_causal_lm
from rlhf_core.models import base_model, check_positions
from rlhf_core.packing import packed_inputs, require_packing
from rlhf_core.scoring import label_nats, sequence_scores
from rlhf_core.specs import SFTSpec
from rlhf_core.trainer import Trainer, by_source

Packed = list[Row]  # the sequences of one row of a batch: one, or several with packing


class SFTTrainer(Trainer[SFTSpec]):
    """Owns the loop of one SFT stage on this rank."""

    evaluate_first = True

    def __init__(self, context: JobContext) -> None:
        super().__init__(context, SFTSpec.model_validate(context.job.spec), "sft")
        spec, start = self.spec, context.job.model
        assert start is not None
        parts = zero_init(self.resources, spec.precision)
        model = base_model(start, self.tokenizer, context.seed, spec.dropout, zero_init=parts, quantize=self.quantize)
        check_positions(model.config, max(longest(r, "input_ids") for r in (self.train_rows, self.test_rows)), 0)
        if self.resources.pack_tokens:
            require_packing(model.config, self.resources.pack_tokens)
        self.start_engine(model)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step over the global batch."""
        self.engine.train()
        _, rows = self.batch(step)
        lr = set_lr(self.engine, step, self.spec.optim, self.steps)
        micro_batches = [
            [[rows[i] for i in line] for line in part] for part in self._deal([len(row["input_ids"]) for row in rows])
        ]
        mine = [row for part in micro_batches for line in part for row in line]
        (count,) = sum_over_ranks([float(sum(sum(self._labelled(row)) for row in mine))])
        total = 0.0
        for part in micro_batches:
            loss = self._nats(part).sum()
            check_finite("sft loss", loss)
            self.engine.backward(loss * (self.ranks.world / count))
            total += loss.item()
        self.engine.step()
        loss_sum, tokens = sum_over_ranks([total, float(sum(len(row["input_ids"]) for row in mine))])
        self.tokens += tokens
        return {
            "loss": loss_sum / count,
            "lr": lr,
            "grad_norm": grad_norm(self.engine),
            "tokens": tokens,
        }

    def _deal(self, lengths: Sequence[int]) -> list[list[list[int]]]:
        """This rank's micro-batches of rows of sequences of these lengths, as indices into `lengths`."""
        place = (self.ranks.rank, self.ranks.world, self.resources.micro_batch)
        if self.resources.pack_tokens:
            return deal_packed(lengths, *place, self.resources.pack_tokens)
        return [[[i] for i in part] for part in deal(lengths, *place, self.resources.micro_tokens, self.padded)]

    def _labelled(self, row: Row) -> list[int]:
        """Per token, 1 where it is learned; never the first, which nothing foretells."""
        learned = row["loss_mask"] if self.spec.loss_on == "response" else [1] * len(row["input_ids"])
        return [0, *learned[1:]]

    def _nats(self, lines: list[Packed]) -> Tensor:
        """-log p of the labelled tokens, `[labelled]`, row by row; an empty micro-batch runs a row without any."""
        device, pad = self.ranks.device, self.tokenizer.pad_token_id
        labels = [[label for row in line for label in self._labelled(row)] for line in lines] or [[0, 0]]
        lines = lines or [[{"input_ids": [pad, pad]}]]
        if not self.resources.pack_tokens:
            return label_nats(self.engine, [line[0]["input_ids"] for line in lines], labels, pad, device)[0]
        inputs = packed_inputs(self.engine.module, [[row["input_ids"] for row in line] for line in lines], pad, device)
        return -sequence_scores(self.engine, inputs, right_pad(labels, 0, device).bool())[0]

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """Loss and perplexity on the held-out rows."""
        self.engine.eval()
        lengths = row_lengths(self.test_rows, "input_ids").tolist()
        mine: dict[int, tuple[float, int]] = {}
        parts = self._deal(lengths)
        for done, part in enumerate(parts):
            inside = [i for line in part for i in line]
            rows = dict(zip(inside, self.test_rows.select(inside).to_list(), strict=True))
            counts = [sum(self._labelled(rows[i])) for i in inside]
            by_row = self._nats([[rows[i] for i in line] for line in part]).split(counts)
            sums = [own.double().sum().item() for own in by_row]
            mine.update(zip(inside, zip(sums, counts, strict=True), strict=True))
            self.context.progress(done + 1, len(parts), "evaluate", unit="batch")
        merged = {i: row for ranks in gather(mine) for i, row in ranks.items()}
        sums, counts = np.array([merged[i] for i in range(len(lengths))]).T
        loss = float(sums.sum() / counts.sum())
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}
        metrics |= by_source("loss", sums / np.maximum(counts, 1), counts, sources_of(self.test_rows))
        self.context.log("eval", step, metrics)
        return metrics

    def save(self) -> dict[str, Any]:
        """Write the model and the tokenizer to the output folder."""
        save_causal_lm(self.engine, self.tokenizer, self.context.out / "model")
        if self.spec.lora:
            start = self.context.job.model
            assert start is not None
            self.save_adapter(self.spec.lora, start.path or f"new {start.family}")
        return {}


def run(context: JobContext) -> dict[str, Any]:
    """The SFT stage."""
    return SFTTrainer(context).run()
