"""The scores of a rollout: reference log-probabilities, critic's values, and the weighted sum of the reward sources.

Everything runs in micro-batches of this rank's rows. Critic and reward model may read other tokens than the actor: then an
answer is tokenised anew once for each rollout, scored at its last token, and valued through an alignment by text that never
shows the critic the token it values; what exceeds that model's positions loses its beginning, and is counted. Functions and
endpoints see texts without special tokens, all of this rank's rollout at once.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlhf_core import ppo_math as pm
from rlhf_core.batches import cut, longest_first, right_pad, right_padded
from rlhf_core.distributed import gather
from rlhf_core.experience import Experience, concatenate
from rlhf_core.models import positions_of
from rlhf_core.ppo_args import PPOArgs
from rlhf_core.reward_sources import Judge, judge_of
from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine
from rlhf_core.rollout import Rollout, pad_to
from rlhf_core.scoring import aligned_values, close_up, end_scores, response_scores, response_values


class AnswerScorer:
    """Scores rollouts with the models of one engine.

    Attributes:
        parts: sum of each reward source's scores over this rank's rows of the last rollout, before weighting.
    """

    def __init__(self, engine: DeepSpeedRLHFEngine, args: PPOArgs, tell: Callable[[], None] = lambda: None) -> None:
        """`tell` is called after every micro-batch, as a sign of life."""
        self.engine = engine
        self._tell = tell
        self.spec, self.resources = args.spec, args.resources
        self.tokenizer: Any = engine.tokenizer
        self.vocabulary = len(engine.tokenizer)
        self.parts: dict[str, float] = {}
        self._other_ids: dict[int, tuple[list[int], list[int]]] = {}
        self._judges: dict[str, tuple[float, Judge]] = {}
        self._model_weight = 1.0
        for i, source in enumerate(self.spec.rewards or ()):
            if source.kind == "model":
                self._model_weight = source.weight
            else:
                judge = judge_of(source, f"ppo.rewards[{i}]")
                self._judges[f"score_{i}_{source.kind}"] = (source.weight, judge)

    def unscored(self, rollout: Rollout, names: list[int]) -> Experience:
        """A rollout as experience whose reference log-probabilities, values and scores are 0 for now."""
        eos = self.tokenizer.eos_token_id
        ended = ((rollout.response_ids == eos) & rollout.response_mask.bool()).any(1)
        blank = torch.zeros_like(rollout.logprobs)
        return Experience(
            sample_ids=torch.tensor(names, device=blank.device),
            prompt_ids=rollout.prompt_ids,
            prompt_mask=rollout.prompt_mask,
            response_ids=rollout.response_ids,
            response_mask=rollout.response_mask,
            logprobs=rollout.logprobs,
            entropy=rollout.entropy,
            ref_logprobs=blank,
            values=blank,
            scores=torch.zeros(len(names), device=blank.device),
            ended=ended,
            support=rollout.support,
        )

    @torch.no_grad()
    def score(self, whole: Experience) -> Experience:
        """Experience with reference log-probabilities, values and reward scores, by micro-batches."""
        lengths = (whole.prompt_mask.sum(1) + whole.response_mask.sum(1)).tolist()
        self.parts, self._other_ids = {}, {}
        if self.engine.retokenizer is not None:
            self._note("answers_cut", 0.0)
        parts = [self._score_part(whole.rows(torch.tensor(i))) for i in self._deal(lengths)]
        merged = concatenate(parts, self.tokenizer.pad_token_id)
        merged = merged.rows(torch.argsort(merged.sample_ids))
        return replace(merged, scores=merged.scores + self._outside_scores(merged)) if self._judges else merged

    def _deal(self, lengths: list[int]) -> list[list[int]]:
        """Micro-batches of this rank's rows, longest first; as many on every rank, as a pass may be collective."""
        order = longest_first(lengths)
        tokens = self.resources.micro_tokens
        widths = [lengths[i] for i in order]
        if tokens is not None:
            widths = [max(in_place) for in_place in zip(*gather(widths), strict=True)]
        return cut(order, widths, self.resources.micro_batch, tokens, self.engine.padded)

    def _score_part(self, rows: Experience) -> Experience:
        sequence = (rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.response_mask)
        temperature, support = self.spec.temperature, rows.support
        reference = response_scores(
            self.engine.ref, *sequence, temperature, support, vocabulary=self.vocabulary
        ).logprobs
        values = self.values(rows) if self.engine.critic is not None else rows.values
        self._tell()
        return replace(
            rows,
            ref_logprobs=pm.select(reference, rows.response_mask),
            values=pm.select(values, rows.response_mask),
            scores=self._model_scores(rows),
        )

    def values(self, rows: Experience) -> Tensor:
        """The critic's values `[batch, response]`, in its own tokens if they are not the actor's."""
        critic = self.engine.critic
        if self.engine.retokenizer is None:
            return response_values(critic, rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.response_mask)
        ids, mask, index = self._in_other_tokens(rows)
        return aligned_values(critic, ids, mask, index)

    def _in_other_tokens(self, rows: Experience) -> tuple[Tensor, Tensor, Tensor]:
        """Answers as critic and reward model read them: ids and mask `[batch, tokens]`, alignment `[batch, response]`."""
        retokenizer = self.engine.retokenizer
        assert retokenizer is not None
        for row, name in enumerate(rows.sample_ids.tolist()):
            if name not in self._other_ids:
                prompt = rows.prompt_ids[row][rows.prompt_mask[row].bool()].tolist()
                answer = rows.response_ids[row][rows.response_mask[row].bool()].tolist()
                ids, index = retokenizer.convert(prompt, answer), retokenizer.align(prompt, answer)
                self._other_ids[name] = self._within_positions(ids, index)
        both = [self._other_ids[name] for name in rows.sample_ids.tolist()]
        device, pad = rows.prompt_ids.device, self.engine.reward_tokenizer.pad_token_id
        ids, mask = right_padded([ids for ids, _ in both], pad, device)
        index = pad_to(right_pad([index for _, index in both], 0, device), rows.response_ids.shape[1], 0)
        return ids, mask, index

    def _within_positions(self, ids: list[int], index: list[int]) -> tuple[list[int], list[int]]:
        """The end of an answer that is too long for critic and reward model in their tokens, and its alignment."""
        limit = positions_of(self.engine.value_config)
        cut = 0 if limit is None else max(0, len(ids) - limit)
        if cut:
            self._note("answers_cut", 1.0)
        return ids[cut:], [max(0, i - cut) for i in index]

    def _model_scores(self, rows: Experience) -> Tensor:
        """The reward model's weighted scores `[batch]`, 0 without one."""
        if self.engine.reward is None:
            return torch.zeros(len(rows), device=rows.logprobs.device)
        if self.engine.retokenizer is None:
            ids, mask, _ = close_up(rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.response_mask)
        else:
            ids, mask, _ = self._in_other_tokens(rows)
        scores = end_scores(self.engine.reward, ids, mask)
        self._note("score_model", float(scores.sum()))
        limit = self.spec.score_clip
        if self.spec.rewards is not None and limit is not None:
            scores = scores.clamp(-limit, limit)
        return self._model_weight * scores

    def _outside_scores(self, rows: Experience) -> Tensor:
        """Weighted sum of functions and endpoints, `[batch]`."""
        total = torch.zeros_like(rows.scores)
        prompts = self._texts(rows.prompt_ids, rows.prompt_mask)
        answers = self._texts(rows.response_ids, rows.response_mask)
        for name, (weight, judge) in self._judges.items():
            values = torch.tensor(judge(prompts, answers), dtype=total.dtype, device=total.device)
            self._note(name, float(values.sum()))
            self._tell()
            total = total + weight * values
        return total

    def _note(self, name: str, value: float) -> None:
        self.parts[name] = self.parts.get(name, 0.0) + value

    def _texts(self, ids: Tensor, mask: Tensor) -> list[str]:
        rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)
