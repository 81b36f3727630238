"""Gates: conditions on the numbers of a stage at which a person is warned or asked, or the run stops.

A gate looks at one metric: within a stage at every row that the job logs, or at its end at the numbers of its manifest, before
the next stage begins. It says whether a run goes on and nothing of what a stage computes; so gates are in no fingerprint, and
never change what an artifact is. Here: what may be configured. When one fires is `fired`, what happens then `tasks.gates`.
"""

import difflib
import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.spec_base import Frozen, Positive, StageName

Action = Literal["warn", "stop", "roll_back", "wait"]

_PAIRS = "loss accuracy margin lr grad_norm tokens"
_REWARDS = "chosen_reward rejected_reward drift"
_EVAL_PAIRS = "eval_loss* eval_accuracy* eval_margin eval_pairs"
# What each stage logs while it runs, rows of kind "eval" under eval_NAME; * stands for names of sources and the like.
LIVE: Mapping[str, str] = {
    "sft": "loss lr grad_norm tokens eval_loss* eval_perplexity",
    "reward": f"{_PAIRS} score_mean {_EVAL_PAIRS}",
    "dpo": f"{_PAIRS} {_REWARDS} chosen_logprob rejected_logprob {_EVAL_PAIRS} "
    + " ".join(f"eval_{name}" for name in _REWARDS.split()),
    "ppo": "score score_* kl_sequence kl_token kl_coef kl_loss kl_stopped approx_kl entropy entropy_update eos_rate return_mean "
    "response_length response_length_std rollout_tokens prompt_tokens actor_loss critic_loss ptx_loss explained_variance "
    "clip_fraction ratio_first ratio_mean ratio_deviation lr_actor lr_critic actor_grad_norm critic_grad_norm updates "
    "seconds_rollout seconds_update answers_cut",
}
_TRAINED = "steps parameters parameters_trained tokens tokens_per_second loss_last checkpoint* seconds"
# The numbers of each stage's manifest.
FINAL: Mapping[str, str] = {
    "data": "rows_read rows_kept rows_repeated vocabulary seconds",
    "sft": f"{_TRAINED} eval_loss* eval_perplexity",
    "reward": f"{_TRAINED} score_mean score_std {_EVAL_PAIRS}",
    "dpo": f"{_TRAINED} {_EVAL_PAIRS} " + " ".join(f"eval_{name}" for name in _REWARDS.split()),
    "ppo": "steps parameters_trained tokens tokens_per_second score_first score_last kl_sequence_last eos_rate_last "
    "checkpoint* seconds",
    "evaluate": "gold_* reward_* win_rate* length_* eos_rate_* perplexity_* kl_sequence* kl_token* prompts tokens "
    "tokens_per_second seconds",
}


class Gate(Frozen):
    """One condition and what follows when it holds."""

    stage: StageName
    metric: str | None = Field(
        default=None,
        description="of the rows that the stage logs (eval_NAME: of its evaluations), or with during: false of its manifest",
    )
    below: float | None = Field(default=None, description="fires when the metric is below this")
    above: float | None = Field(default=None, description="fires when the metric is above this")
    non_finite: bool = Field(default=False, description="fires when the metric, or any without one, is NaN or infinite")
    rule: Literal["over_optimised"] | None = Field(
        default=None, description="evaluate: gold has fallen from SFT to PPO while the reward model's score has risen"
    )
    during: bool = Field(default=False, description="while the stage runs; false: at its end, before the next begins")
    for_steps: Positive = Field(default=1, description="during: so many reported values in a row")
    after_step: Annotated[int, Field(ge=0)] = Field(default=0, description="during: steps up to this one do not count")
    action: Action = Field(
        description="warn; stop (what is saved stays); roll_back (stop, and what was saved since the first such step goes); "
        "wait (stop, and ask a person)"
    )
    wait_hours: Annotated[float, Field(gt=0)] = Field(
        default=24, description="wait: for an answer so long, then it is a stop"
    )

    @model_validator(mode="before")
    @classmethod
    def _without_stage(cls, raw: Any) -> Any:
        """`reward.eval_accuracy` of stage reward is its eval_accuracy."""
        if isinstance(raw, dict) and isinstance(metric := raw.get("metric"), str):
            return {**raw, "metric": metric.removeprefix(f"{raw.get('stage')}.")}
        return raw

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        conditions = {
            "below": self.below,
            "above": self.above,
            "non_finite": self.non_finite or None,
            "rule": self.rule,
        }
        given = [name for name, value in conditions.items() if value is not None]
        if len(given) != 1:
            told = f"given: {' and '.join(given)}" if given else "none is given"
            raise ValueError(f"needs one of below, above, non_finite and rule; {told}; make two gates of two bounds")
        if self.rule and (self.metric or self.during or self.stage != "evaluate"):
            raise ValueError(
                f"rule {self.rule!r} compares gold and reward of the evaluate stage at its end: "
                "set stage: evaluate, and leave out metric and during"
            )
        if not (self.metric or self.rule or self.non_finite):
            raise ValueError(f"{given[0]} needs a metric, e.g. metric: {self._names()[0]}")
        if self.metric and not any(fnmatch.fnmatchcase(self.metric, name) for name in self._names()):
            raise ValueError(self._unknown())
        if not self.during:
            self._only_during()
        return self

    def _names(self) -> list[str]:
        names = (LIVE if self.during else FINAL).get(self.stage, "").split()
        if not names:
            raise ValueError(f"the {self.stage} stage logs no metrics while it runs; set during: false")
        return names

    def _unknown(self) -> str:
        assert self.metric
        names, other = self._names(), (FINAL if self.during else LIVE).get(self.stage, "").split()
        where = "logs while it runs" if self.during else "has at its end"
        near = difflib.get_close_matches(self.metric, names, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
        if any(fnmatch.fnmatchcase(self.metric, name) for name in other):
            hint = f"with during: {str(not self.during).lower()} there is one; {hint}"
        return f"metric {self.metric!r} is none that the {self.stage} stage {where}; {hint}"

    def _only_during(self) -> None:
        if self.action == "roll_back":
            raise ValueError(
                "roll_back is for during: true; at a stage's end its artifact stands, and stop keeps the next away"
            )
        for name, nothing in (("for_steps", 1), ("after_step", 0)):
            if (value := getattr(self, name)) != nothing:
                raise ValueError(f"{name} {value} is for during: true; at a stage's end there is one value")

    @property
    def condition(self) -> str:
        """What it waits for, e.g. "kl_sequence above 10 for 3 steps"."""
        if self.rule:
            return "over-optimised: gold falls while the reward rises"
        if self.non_finite:
            text = f"{self.metric or 'a metric'} not finite"
        else:
            text = f"{self.metric} {'below' if self.below is not None else 'above'} {self.bound:g}"
        text += f" for {self.for_steps} steps" if self.for_steps > 1 else ""
        return text + (f" after step {self.after_step}" if self.after_step else "")

    @property
    def bound(self) -> float | None:
        """The number that it is compared with."""
        return self.below if self.below is not None else self.above

    @property
    def digest(self) -> str:
        """Names its condition: an answer that was given for it holds as long as this is the same."""
        condition = self.model_dump(include={"stage", "metric", "below", "above", "non_finite", "rule", "during"})
        return hashlib.sha256(json.dumps(condition, sort_keys=True).encode()).hexdigest()[:12]

    def breached_by(self, values: Mapping[str, Any]) -> tuple[str, Any] | None:
        """Name and value of the metric that breaches it; None if none does. NaN is neither below nor above anything."""
        if self.non_finite:
            names = [self.metric] if self.metric else sorted(values)
            return next(((n, values[n]) for n in names if n in values and is_non_finite(values[n])), None)
        value = values.get(self.metric or "")
        if not isinstance(value, int | float):
            return None
        bad = value < self.below if self.below is not None else self.above is not None and value > self.above
        return (self.metric or "", value) if bad else None


def check_gates(gates: Sequence[Gate], stages: Sequence[StageName], gold: bool) -> None:
    """ValueError if a gate does not fit the pipeline, or waits for the same as another.

    Args:
        gates: of the pipeline.
        stages: that it has.
        gold: whether its evaluation has a gold reward.
    """
    known: dict[str, int] = {}
    for i, gate in enumerate(gates):
        if (first := known.setdefault(gate.digest, i)) != i:
            raise ValueError(f"gates.{i}: {gate.stage}, {gate.condition}: is the condition of gates.{first}; keep one")
        if gate.stage not in stages:
            raise ValueError(
                f"gates.{i}.stage: {gate.stage!r} is no stage of this pipeline; its stages are {', '.join(stages)}"
            )
        if gate.stage == "evaluate" and (gate.rule or (gate.metric or "").startswith("gold")) and not gold:
            raise ValueError(f"gates.{i}: {gate.condition}: the evaluate stage measures no gold; set evaluate.gold")


def is_non_finite(value: Any) -> bool:
    """Whether a metric is NaN or infinite; records of nodes have null for it."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))
