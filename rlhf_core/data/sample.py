"""Sampled pairs: preferences for data that has none. A pretrained model answers each prompt several times, a gold
reward judges the answers, and the best and the worst are the pair.

A prompt whose answers all have the same gold says nothing and is left out. Answers are kept as they were sampled: one
that did not end has no EOS. This alone of the data stage imports torch.
"""

from collections.abc import Sequence
from typing import Any

from rlhf_core import gold
from rlhf_core.context import JobContext
from rlhf_core.data.encode import Encoder
from rlhf_core.data.rows import Row
from rlhf_core.errors import ConfigError
from rlhf_core.specs import DataSpec, ModelSpec, SampledPairs


def check_sampling(spec: DataSpec, model: ModelSpec | None) -> None:
    """ConfigError if pairs are to be sampled and there is no model to sample from or no gold reward to judge."""
    if spec.sampled_pairs is None:
        return
    if model is None or model.path is None:
        raise ConfigError("data.sampled_pairs samples from the pretrained model, but model.path is not set; set it")
    if spec.tokenizer.train_vocab_size is not None:
        raise ConfigError(
            "data.sampled_pairs samples from the pretrained model, whose tokens a tokenizer trained on the data "
            "(data.tokenizer.train_vocab_size) does not have; remove one of the two"
        )
    gold.gold_reward(spec.sampled_pairs.gold)


def sample_pairs(
    context: JobContext, spec: DataSpec, tokenizer: Any, encoder: Encoder, rows: Sequence[Row]
) -> tuple[list[Row | None], dict[str, float]]:
    """Pairs for rows of the reward share that have only a prompt.

    Returns:
        Each row with its pair, or None where all answers have the same gold; and the mean gold of all answers, of the
        chosen and of the rejected ones.
    """
    from rlhf_core.rollout import noise_seed, sample_texts

    plan, model = spec.sampled_pairs, context.job.model
    assert plan is not None and model is not None
    total = len(rows) * plan.per_prompt
    context.progress(0, total, "sample", unit="answers")
    answers = sample_texts(
        model,
        tokenizer,
        [row["prompt_ids"] for row in rows],
        max_new_tokens=spec.max_response_tokens,
        temperature=plan.temperature,
        samples=plan.per_prompt,
        seed=noise_seed(context.seed, "data"),
        batch_size=context.job.resources.rollout_micro_batch,
        on_batch=lambda done: context.progress(done, total, "sample", unit="answers"),
    )
    pairs = [_pair(row, ids, plan, encoder) for row, ids in zip(rows, answers, strict=True)]
    return [row for row, _ in pairs], _gold_means([golds for _, golds in pairs])


def _pair(
    row: Row, answers: Sequence[list[int]], plan: SampledPairs, encoder: Encoder
) -> tuple[Row | None, list[float]]:
    """The row with the best and the worst answer, and the gold of all answers."""
    texts = [encoder.decode(ids) for ids in answers]
    golds = [judged["gold"] for judged in gold.score(plan.gold, [row["prompt"]] * len(texts), texts)]
    best, worst = golds.index(max(golds)), golds.index(min(golds))
    if golds[best] == golds[worst]:
        return None, golds
    ids = {"chosen_ids": answers[best], "rejected_ids": answers[worst]}
    return row | ids | {"chosen": texts[best], "rejected": texts[worst]}, golds


def _gold_means(golds: Sequence[Sequence[float]]) -> dict[str, float]:
    """Mean gold of all answers, and of the best and the worst of the prompts where they differ."""
    differing = [g for g in golds if max(g) > min(g)]
    columns = {
        "gold_mean": [value for g in golds for value in g],
        "gold_chosen": [max(g) for g in differing],
        "gold_rejected": [min(g) for g in differing],
    }
    return {name: round(sum(values) / max(len(values), 1), 4) for name, values in columns.items()}
