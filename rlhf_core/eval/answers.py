"""Answers of several models to the same prompts with the same noise, scored and judged alike.

A `Panel` holds what does not change from model to model: prompts, noise, sampling, reward model, gold. Models on one panel
share a tokenizer. KL is measured where a reference is given, as log p(answer | model) - log p(answer | reference).
"""

from pathlib import Path
from typing import Any

from rlhf_core import gold
from rlhf_core.comparison import Answer
from rlhf_core.errors import NonFiniteError
from rlhf_core.eval.inputs import Prompts, device, sampling_of, tell
from rlhf_core.eval.request import EvalRequest
from rlhf_core.measure import RewardScorer, by_length, divergence, sample
from rlhf_core.rollout import Rollout, noise_seed


class Panel:
    """What every model is measured with."""

    def __init__(self, request: EvalRequest, prompts: Prompts, tokenizer: Any) -> None:
        self.request, self.tokenizer = request, tokenizer
        self.texts, self.ids = prompts.texts, prompts.ids(tokenizer)
        self.batches = by_length([len(ids) for ids in self.ids], request.micro_batch)
        self.sampling = sampling_of(request, tokenizer)
        self.scorer = None
        if request.reward:
            self.scorer = RewardScorer(Path(request.reward), tokenizer, device(), request.micro_batch)

    def answers(self, name: str, model: Any, reference: Any = None) -> list[Answer]:
        """One model's answers in the order of the prompts; `kl` is 0 without a reference."""
        seed, say = noise_seed(self.request.seed, "evaluate"), tell(f"sample {name}")
        rollouts = sample(model, self.tokenizer, self.ids, self.batches, self.sampling, seed, say)
        if reference is None:
            kl = [[0.0] * len(batch) for batch in self.batches]
        else:
            kl = divergence(reference, rollouts, self.sampling, self.request.micro_batch)
        found: dict[int, Answer] = {}
        for batch, rollout, nats in zip(self.batches, rollouts, kl, strict=True):
            found.update(zip(batch, self._judged(batch, rollout, nats), strict=True))
        answers = [found[i] for i in range(len(self.ids))]
        if bad := sum(not abs(a.reward or 0.0) + abs(a.kl) < float("inf") for a in answers):
            raise NonFiniteError(f"rlhf eval: {bad} answers of {name} have a score or KL that is not finite")
        return answers

    def _judged(self, batch: list[int], rollout: Rollout, kl: list[float]) -> list[Answer]:
        tokens, eos = rollout.responses(), self.tokenizer.eos_token_id
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        scores = self.scorer.scores(rollout) if self.scorer else [None] * len(batch)
        prompts = [self.texts[i] for i in batch]
        golds = gold.score(self.request.gold, prompts, texts) if self.request.gold else [{} for _ in batch]
        return [
            Answer(text, len(own), own[-1] == eos, nats, score, judged)
            for text, own, nats, score, judged in zip(texts, tokens, kl, scores, golds, strict=True)
        ]
