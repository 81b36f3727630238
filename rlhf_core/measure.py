"""What is measured of language models on held-out text: answers, KL, reward scores, perplexity. Forward passes only.

Shared by the evaluate stage, which deals batches to ranks, and by `rlhf eval`, which runs in one process. Rows are cut
into batches by length, so a batch is computed alike whoever computes it. Noise is named by the prompt's number: models
answer with the same noise, which pairs them. Tokens that the tokenizer does not have are never sampled. The reward
model may read another tokenizer's tokens than the answers are made of; they are then converted at the boundary.

Where a model is divided among ranks (ZeRO-3), every forward pass is collective: batches then come in equal numbers on all
ranks, some of them empty, and an empty batch runs the first row and drops what comes out (`deal_batches`, `passes`).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_core.batches import right_padded
from rlhf_core.comparison import TokenLoss
from rlhf_core.models import ValueModel, check_positions, load_tokenizer, positions_of
from rlhf_core.retokenize import Retokenizer
from rlhf_core.rollout import Rollout, Sampling, generate
from rlhf_core.scoring import end_scores, label_nats, response_scores

OnBatch = Callable[[int, int], None]  # batches done, batches in all


def _ignore(_: int, __: int) -> None: ...


def by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Row numbers in batches of at most `size`: in order of length, cut evenly."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    size = math.ceil(len(order) / math.ceil(len(order) / size)) if order else size
    return [order[i : i + size] for i in range(0, len(order), size)]


def deal_batches(batches: Sequence[list[int]], rank: int, world: int, lock_step: bool = False) -> list[list[int]]:
    """This rank's batches; with `lock_step` as many on every rank, some perhaps empty."""
    mine = list(batches[rank::world])
    if lock_step:
        mine += [[] for _ in range(len(batches[::world]) - len(mine))]
    return mine


def sample(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int,
    on_batch: OnBatch = _ignore,
    lock_step: bool = False,
) -> list[Rollout]:
    """One answer to each prompt, a rollout a batch; the noise is named by the prompt's number.

    The rollout of an empty batch has one row that means nothing.

    Args:
        model: a causal language model in eval mode.
        tokenizer: of the prompts; its vocabulary is all that is sampled from.
        prompts: token ids of all prompts.
        batches: numbers of the prompts to answer here, as `by_length` gives them.
        sampling: temperature, filters, longest answer.
        seed: of the noise.
        on_batch: told after each batch.
        lock_step: ranks decode the same number of positions, see `rollout.generate`.
    """
    check_positions(model.config, max(len(p) for p in prompts), sampling.max_new_tokens)
    rollouts: list[Rollout] = []
    for done, batch in enumerate(batches):
        rows = batch or [0]
        rollout = generate(
            model,
            [prompts[i] for i in rows],
            rows,
            sampling,
            seed=seed,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            batch_size=len(rows),
            lock_step=lock_step,
        )
        rollouts.append(rollout)
        on_batch(done + 1, len(batches))
    return rollouts


def token_losses(
    model: Any,
    pad: int,
    rows: Sequence[dict[str, Any]],
    batches: Sequence[Sequence[int]],
    on_batch: OnBatch = _ignore,
) -> dict[int, TokenLoss]:
    """Summed -log p of the labelled tokens of each row that has some, by row number.

    Args:
        model: a causal language model in eval mode.
        pad: fills rows.
        rows: with `input_ids` and `loss_mask`.
        batches: numbers of the rows to measure here.
        on_batch: told after each batch.
    """
    device = next(model.parameters()).device
    found: dict[int, TokenLoss] = {}
    for done, batch in enumerate(batches):
        read = [rows[i] for i in batch or [0]]
        texts, labels = [row["input_ids"] for row in read], [row["loss_mask"] for row in read]
        nats, place = label_nats(model, texts, labels, pad, device)
        counts = place.bincount(minlength=len(read)).tolist()
        sums = [own.double().sum().item() for own in nats.split(counts)]
        found.update({i: TokenLoss(s, n) for i, s, n in zip(batch, sums, counts, strict=False) if n})
        on_batch(done + 1, len(batches))
    return found


def divergence(
    reference: Any,
    rollouts: Sequence[Rollout],
    sampling: Sampling,
    micro_batch: int,
    on_batch: OnBatch = _ignore,
    passes: int | None = None,
) -> list[list[float]]:
    """log p(answer | its model) - log p(answer | reference) of each answer, nats, a list a rollout.

    Args:
        reference: a causal language model in eval mode.
        rollouts: with the log-probabilities under the model that sampled them.
        sampling: as they were sampled, without top-k and top-p.
        micro_batch: answers a forward pass.
        on_batch: told after each rollout.
        passes: forward passes a rollout; default: as many as it needs.
    """
    found: list[list[float]] = []
    for done, rollout in enumerate(rollouts):
        own: list[float] = []
        for part in micro_batches(rollout, micro_batch, passes):
            sequence = (part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)
            scores = response_scores(
                reference, *sequence, sampling.temperature, support=part.support, vocabulary=sampling.vocabulary
            )
            difference = torch.where(part.response_mask.bool(), part.logprobs - scores.logprobs, 0.0)
            own += difference.double().sum(1).tolist()
        found.append(own[: len(rollout.response_ids)])
        on_batch(done + 1, len(rollouts))
    return found


def micro_batches(rollout: Rollout, size: int, passes: int | None = None) -> list[Rollout]:
    """The rollout in rows of `size`, for forward passes over whole answers; filled up to `passes` with its first row."""
    names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "logprobs", "entropy", "support")
    columns = {name: getattr(rollout, name) for name in names if getattr(rollout, name) is not None}
    count = len(rollout.response_ids)
    spans = [slice(i, i + size) for i in range(0, count, size)]
    spans += [slice(0, 1)] * ((passes or 0) - len(spans))
    return [Rollout(**{k: v[rows] for k, v in columns.items()}) for rows in spans]


class RewardScorer:
    """A reward model that scores answers made of another model's tokens.

    Attributes:
        mean, std: of the score on training pairs; scores are normalised by them.
    """

    def __init__(self, folder: Path, tokenizer: Any, device: torch.device, micro_batch: int, model: Any = None) -> None:
        """Load the model.

        Args:
            folder: of the reward artifact's model, with the tokenizer that it reads.
            tokenizer: of the answers.
            device: where it runs.
            micro_batch: answers a forward pass.
            model: the folder's, where it is loaded already and in its place.
        """
        self.model = (ValueModel.load(folder).to(device).eval() if model is None else model).normalize(True)
        self.mean, self.std = self.model.shift, self.model.scale
        self.own = load_tokenizer(folder)
        self.convert = Retokenizer(tokenizer, self.own)
        self.device, self.micro_batch = device, micro_batch

    def scores(self, rollout: Rollout, passes: int | None = None) -> list[float]:
        """Score of each answer at its last token, in `passes` forward passes if given."""
        found: list[float] = []
        for part in micro_batches(rollout, self.micro_batch, passes):
            if self.convert.same:
                ids = torch.cat([part.prompt_ids, part.response_ids], 1)
                mask = torch.cat([part.prompt_mask, part.response_mask], 1)
                found += end_scores(self.model, ids, mask).tolist()
            else:
                prompts = [row[m.bool()].tolist() for row, m in zip(part.prompt_ids, part.prompt_mask, strict=True)]
                found += self.score_rows(list(zip(prompts, part.responses(), strict=True)))
        return found[: len(rollout.response_ids)]

    def score_rows(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """Score of each (prompt, response), token ids without padding, in one forward pass.

        In other tokens than the answers were made of, a text may exceed the model's positions: it then loses its beginning.
        """
        if self.convert.same:
            texts = [[*prompt, *response] for prompt, response in rows]
        else:
            limit = positions_of(self.model.config) or 0
            texts = [self.convert.convert(prompt, response)[-limit:] for prompt, response in rows]
        check_positions(self.model.config, max(len(text) for text in texts), 0)
        return end_scores(self.model, *right_padded(texts, self.own.pad_token_id, self.device)).tolist()
