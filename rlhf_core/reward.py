"""Reward model: -log sigmoid(r(chosen) - r(rejected)), scores taken at the last token of each response.

The trunk starts from the SFT model, or from another model of any family with a tokenizer of its own; the head from
N(0, 1/sqrt(width+1)). Evaluation reports accuracy on held-out pairs with its 95 % Wilson interval, over all and by source.
Afterwards mean and deviation of the scores on training pairs are stored in the model's configuration; PPO and evaluation use
(score - mean) / std, so that a KL coefficient means the same for every reward model.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from rlhf_core.batches import Row, longest, pair_length, pair_tokens, right_padded, some_rows, sources_of
from rlhf_core.context import JobContext
from rlhf_core.data.tokenizer import configured, load
from rlhf_core.distributed import gather, sum_over_ranks
from rlhf_core.engine import check_finite, grad_norm, set_lr, zero_init
from rlhf_core.errors import DataError
from rlhf_core.export import save_value_model
from rlhf_core.lora import blocks_of
from rlhf_core.models import ValueModel, base_model, load_causal_lm, positions_of
from rlhf_core.partitioned import shape_of
from rlhf_core.retokenize import Retokenizer
from rlhf_core.scoring import end_scores
from rlhf_core.specs import ModelSpec, RewardSpec, TokenizerSpec
from rlhf_core.trainer import Trainer, accuracy_metrics

MOMENT_PAIRS = 512
ANSWERS = ("chosen_ids", "rejected_ids")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class RewardTrainer(Trainer[RewardSpec]):
    """Owns the loop of one reward stage on this rank.

    Attributes:
        reads: the tokenizer of the reward model, saved beside it.
        retokenizer: from the data's tokenizer to it; None where they are the same.
    """

    shown = ("loss", "accuracy")

    def __init__(self, context: JobContext) -> None:
        spec = RewardSpec.model_validate(context.job.spec)
        super().__init__(context, spec, "reward")
        share = spec.flip_labels or 0.0
        self.flipped = np.random.default_rng((context.seed, 1)).random(len(self.train_rows)) < share
        self.reads = reward_tokenizer(spec, self.tokenizer)
        retokenizer = Retokenizer(self.tokenizer, self.reads) if self.reads is not self.tokenizer else None
        self.retokenizer = None if retokenizer is None or retokenizer.same else retokenizer
        parts = zero_init(self.resources, spec.precision)
        if spec.model:
            language_model = base_model(
                spec.model, self.reads, context.seed, spec.dropout, zero_init=parts, quantize=self.quantize
            )
        else:
            folder = str(context.input("sft", "model"))
            language_model = load_causal_lm(folder, spec.dropout, zero_init=parts, quantize=self.quantize)
        self._check_positions(positions_of(language_model.config))
        model = ValueModel.from_causal_lm(language_model, context.seed)
        if spec.train_layers:
            freeze_below(model, spec.train_layers)
        self.start_engine(model)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step over the global batch of pairs."""
        self.engine.train()
        spec = self.spec
        indices, rows = self.batch(step)
        for row, index in zip(rows, indices, strict=True):
            if self.flipped[index]:
                row["chosen_ids"], row["rejected_ids"] = row["rejected_ids"], row["chosen_ids"]
        lr = set_lr(self.engine, step, spec.optim, self.steps)
        sums = np.zeros(4)
        for part in self.deal_pairs([pair_length(row) for row in rows]):
            chosen, rejected = self._scores([rows[i] for i in part])
            loss = pair_loss(chosen, rejected, spec.center_coef).sum()
            check_finite("reward loss", loss)
            self.engine.backward(loss * (self.ranks.world / spec.batch_size))
            right = (chosen > rejected).sum().item()
            sums += [loss.item(), right, (chosen - rejected).sum().item(), (chosen + rejected).sum().item() / 2]
        self.engine.step()
        loss_sum, right, margin, score = sum_over_ranks(sums.tolist())
        tokens = pair_tokens(rows)
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

    def _scores(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Scores of chosen and rejected, `[pairs]` each, in one forward pass."""
        texts = [self._text(r, "chosen_ids") for r in rows] + [self._text(r, "rejected_ids") for r in rows]
        ids_and_mask = right_padded(texts, self.reads.pad_token_id, self.ranks.device)
        chosen, rejected = end_scores(self.engine, *ids_and_mask).chunk(2)
        return chosen, rejected

    def _text(self, row: Row, answer: str) -> list[int]:
        """Ids of prompt and answer as the reward model reads them."""
        if self.retokenizer:
            return self.retokenizer.convert(row["prompt_ids"], row[answer])
        return row["prompt_ids"] + row[answer]

    def _check_positions(self, limit: int | None) -> None:
        """DataError if a row is longer, in the reward model's tokens, than its positions."""
        if limit is None:
            return
        most = max(self._longest(rows, answer) for rows in (self.train_rows, self.test_rows) for answer in ANSWERS)
        if most > limit:
            raise DataError(
                f"reward.model: a prompt and its answer have {most} of its tokens, more than its {limit} positions; "
                "lower data.max_prompt_tokens or data.max_response_tokens, or choose a model with more positions"
            )

    def _longest(self, rows: Dataset, answer: str) -> int:
        if self.retokenizer is None:
            return longest(rows, "prompt_ids", answer)
        mine = rows.select_columns(["prompt_ids", answer]).select(range(self.ranks.rank, len(rows), self.ranks.world))
        lengths = []
        for done, row in enumerate(mine):
            lengths.append(len(self._text(dict(row), answer)))
            if done % 1000 == 0:
                self.context.progress(done, len(mine), "tokenise", unit="row")
        return max(gather(max(lengths, default=0)))

    def evaluate(self, step: int) -> dict[str, float]:
        """Accuracy with interval, loss and margin on the held-out pairs."""
        scores = self.score_pairs(self.test_rows, "evaluate", self._scores)
        margin = scores[:, 0] - scores[:, 1]
        metrics = {
            **accuracy_metrics(margin > 0, sources_of(self.test_rows)),
            "loss": float(np.logaddexp(0, -margin).mean()),
            "margin": float(margin.mean()),
            "pairs": float(len(margin)),
        }
        self.context.log("eval", step, metrics)
        return metrics

    def moments(self) -> tuple[float, float]:
        """Mean and deviation of the scores of up to 512 training pairs of all sources, both answers."""
        numbers = some_rows(len(self.train_rows), MOMENT_PAIRS, self.context.seed)
        scores = self.score_pairs(self.train_rows, "moments", self._scores, numbers)
        return float(scores.mean()), float(max(scores.std(), 1e-6))

    def save(self) -> dict[str, Any]:
        """Write the model, with the moments in its configuration, to the output folder."""
        model = self.engine.module
        mean, std = self.moments()
        model.config.score_mean, model.config.score_std = mean, std
        save_value_model(self.engine, self.reads, self.context.out / "model")
        if self.spec.lora:
            start = self.spec.model
            self.save_adapter(self.spec.lora, (start.path or f"new {start.family}") if start else self.sft_model)
        return {"score_mean": mean, "score_std": std}


def reward_tokenizer(spec: RewardSpec, data_tokenizer: Any) -> Any:
    """The tokenizer of the reward model: the one named, else the one beside `reward.model`, else a copy of the data's.

    EOS, pad and chat template are as `reward.tokenizer` says, whichever it is.
    """
    choice = spec.tokenizer or TokenizerSpec()
    if choice.path:
        return configured(load(choice.path, None, "reward.tokenizer.path"), choice, "reward.tokenizer")
    if spec.model and _brings_tokenizer(spec.model):
        assert spec.model.path
        found = load(spec.model.path, spec.model.revision, "reward.model.path")
        return configured(found, choice, "reward.tokenizer")
    if choice == TokenizerSpec():
        return data_tokenizer
    return configured(copy.deepcopy(data_tokenizer), choice, "reward.tokenizer")


def _brings_tokenizer(model: ModelSpec) -> bool:
    """Whether a tokenizer lies beside the model; what is not a folder on this disk (a hub name, a .gguf file) has one."""
    if model.path is None:
        return False
    folder = Path(model.path).expanduser()
    return not folder.is_dir() or any((folder / name).is_file() for name in TOKENIZER_FILES)


def pair_loss(chosen: Tensor, rejected: Tensor, center_coef: float) -> Tensor:
    """Bradley-Terry loss per pair, `[pairs]`, with the centring term of Eisenstein et al. 2023 (arXiv 2312.09244)."""
    loss = -torch.nn.functional.logsigmoid(chosen - rejected)
    return loss + center_coef * (chosen + rejected).square() if center_coef else loss


def freeze_below(model: ValueModel, layers: int) -> None:
    """Leave only the last `layers` blocks, the final norm and the head trainable."""
    blocks: Any = model.get_submodule(blocks_of(model))
    trained = {id(p) for block in list(blocks)[-layers:] for p in block.parameters()} | {id(model.score.weight)}
    inside = {id(p) for p in blocks.parameters()}
    embeddings = {id(p) for m in model.trunk.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    for parameter in model.parameters():
        final_norm = id(parameter) not in inside and id(parameter) not in embeddings and len(shape_of(parameter)) == 1
        parameter.requires_grad_(id(parameter) in trained or final_norm)


def run(context: JobContext) -> dict[str, Any]:
    """The reward stage."""
    return RewardTrainer(context).run()
