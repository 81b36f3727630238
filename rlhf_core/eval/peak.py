"""Whether PPO has over-optimised its reward model: a fixed rule on paired intervals. Pure numbers, no torch.

A policy that leaves the reference raises the reward model's score long after the truth has begun to fall (Gao, Schulman and
Hilton 2022, arXiv 2210.10760). The rule: the peak is the point of highest mean gold; over-optimisation is called where the
last point has less gold than the peak and more reward, both by paired 95 % intervals that exclude 0. The peak is chosen by
the same numbers that are then compared, so with many snapshots and few prompts a small fall is called too easily.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_core import stats
from rlhf_core.curves import decimals, fixed


@dataclass(frozen=True)
class Point:
    """One snapshot's answers to the same prompts as all others'.

    Attributes:
        name: for people, e.g. "step 10".
        kl: log p(answer | snapshot) - log p(answer | SFT), nats, `[prompts]`.
        reward: scores `[prompts]`, or None.
        gold: `[prompts]`, or None.
    """

    name: str
    kl: Sequence[float]
    reward: Sequence[float] | None = None
    gold: Sequence[float] | None = None


def over_optimisation(points: Sequence[Point]) -> dict[str, Any]:
    """What the frontier says: "verdict" ("over-optimised", "gold fell", "not seen" or "no gold") and a "sentence".

    Args:
        points: in the order of training, SFT first.
    """
    last = points[-1]
    if last.gold is None:
        return {"verdict": "no gold", "sentence": "Without gold nothing tells whether the reward model was exploited."}
    means = [stats.mean(p.gold).value for p in points if p.gold is not None]
    peak = points[means.index(max(means))]
    assert peak.gold is not None
    found: dict[str, Any] = {"peak": peak.name, "last": last.name}
    if peak is last:
        sentence = f"Gold is highest at {last.name}, the last: no over-optimisation seen."
        return {**found, "verdict": "not seen", "sentence": sentence}
    fall = stats.paired_difference(last.gold, peak.gold)
    found["gold_after_peak"] = fall.as_dict()
    where = f"Gold peaks at {peak.name} ({fixed(max(means), 3)}, KL {_mean(peak.kl)} nats an answer)"
    changed = f"from there to {last.name} by {_interval(fall)}"
    if fall.high >= 0:
        sentence = f"{where} and is not clearly lower at {last.name}: no over-optimisation seen."
        return {**found, "verdict": "not seen", "sentence": sentence}
    rise = None
    if last.reward is not None and peak.reward is not None:
        rise = stats.paired_difference(last.reward, peak.reward)
        found["reward_after_peak"] = rise.as_dict()
    if rise is None or rise.low <= 0:
        other = "there is no reward model to blame" if rise is None else f"the reward does not rise: {_interval(rise)}"
        return {**found, "verdict": "gold fell", "sentence": f"{where} and changes {changed}; {other}."}
    sentence = (
        f"{where} and changes {changed}, while the reward model's score still rises by {_interval(rise)}: the actor "
        f"exploits the reward model. Stop at {peak.name}, or raise ppo.kl_coef."
    )
    return {**found, "verdict": "over-optimised", "sentence": sentence}


def _mean(values: Sequence[float]) -> str:
    return fixed(stats.mean(values).value, 1)


def _interval(one: stats.Interval) -> str:
    places = max(2, decimals((one.value,)))
    ends = f"{fixed(one.low, places, signed=True)} to {fixed(one.high, places, signed=True)}"
    return f"{fixed(one.value, places, signed=True)} ({ends})"
