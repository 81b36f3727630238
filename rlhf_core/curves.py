"""What the curves of the report show: the known metrics, the lines in a stage's rows, and numbers as text.

A known metric has a title, a unit and a line on how to read it (`KNOWN`); an unknown one is shown plainly under its own
name, so a new metric needs no change here. `x_low` with `x_high` become the interval of `x`, `x_std` the band of `x` or
`x_mean`; training and evaluation rows of one name share a drawing. Pure, numpy only; `rlhf_core.plots` draws.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Row = Mapping[str, Any]
ROW_FIELDS = ("kind", "step", "seconds", "epoch")


@dataclass(frozen=True)
class Known:
    """How a metric is shown.

    Attributes:
        title: for people.
        unit: label of the y axis.
        note: how to read it, one line.
        guide: a value worth a dashed line, e.g. chance.
        view: the part of the y axis that is shown at most.
        log: whether the y axis is logarithmic.
        aside: housekeeping, folded away.
    """

    title: str
    unit: str = ""
    note: str = ""
    guide: float | None = None
    view: tuple[float, float] = (-math.inf, math.inf)
    log: bool = False
    aside: bool = False


@dataclass(frozen=True)
class Series:
    """One line: `step`, `value`, `low`, `high` are `[points]`; low and high are None without a band."""

    kind: str
    step: np.ndarray
    value: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    band: str = ""


_KL_NOTE = "Distance from the SFT model. Steady growth is normal; a jump means the actor ran away."
KNOWN: dict[str, Known] = {
    "loss": Known("Loss", "nats per token"),
    "reward/loss": Known("Pairwise loss", "nats per pair", "−log σ(chosen − rejected); 0.69 is guessing.", math.log(2)),
    "dpo/loss": Known("Preference loss", "nats per pair", "0.69 is the SFT model itself.", math.log(2)),
    "dpo/margin": Known("Implicit reward margin", "reward, chosen − rejected", "β times the change in log-odds.", 0.0),
    "chosen_reward": Known(
        "Implicit reward, chosen", "β · log-ratio", "Falls with the rejected one's where both lose probability.", 0.0
    ),
    "rejected_reward": Known("Implicit reward, rejected", "β · log-ratio", "", 0.0),
    "drift": Known(
        "Drift from the SFT model", "nats per answer", "On the pairs' answers; no KL of its own samples.", 0.0
    ),
    "chosen_logprob": Known("Log-probability, chosen", "nats per answer", aside=True),
    "rejected_logprob": Known("Log-probability, rejected", "nats per answer", aside=True),
    "perplexity": Known("Perplexity", "exp(nats per token)", log=True),
    "accuracy": Known("Accuracy", "share of pairs", "Pairs whose chosen answer scores higher; 0.5 is guessing.", 0.5),
    "margin": Known("Score margin", "score, chosen − rejected", "How far apart the two answers of a pair are.", 0.0),
    "score_mean": Known("Score, mean of both answers", "score", "Its level has no meaning, only differences do."),
    "score": Known("Reward model's score", "score", "Of the rollout's answers; what PPO raises."),
    "return_mean": Known("Return", "score − KL penalty"),
    "kl_sequence": Known("KL to the SFT model, per answer", "nats per answer", _KL_NOTE, 0.0),
    "kl_token": Known("KL to the SFT model, per token", "nats per token", "The same, free of answer length.", 0.0),
    "kl_coef": Known("KL coefficient", "reward per nat"),
    "approx_kl": Known("KL of old and new actor", "nats per token", "Size of an update; beyond about 0.1 too large."),
    "clip_fraction": Known("Clipped ratios", "share of tokens", "Beyond about 0.3 the updates are too large."),
    "explained_variance": Known(
        "Explained variance of the critic", "share of variance", "1 is perfect, 0 no use.", 0.0, (-1, 1.05)
    ),
    "entropy": Known("Entropy of the actor", "nats per token", "Near 0 the actor has stopped exploring."),
    "response_length": Known("Answer length", "tokens"),
    "eos_rate": Known("Finished answers", "share of answers", "With an end-of-sequence token.", None, (-0.02, 1.02)),
    "critic_loss": Known("Value loss", "squared error / 2"),
    "actor_loss": Known("Policy loss", "clipped surrogate", "Near 0 by construction; no measure of progress."),
    "ptx_loss": Known("Loss on pretraining text", "nats per token", "The mixture's other half."),
    "kl_loss": Known("KL estimate in the loss", "nats per token", aside=True),
    "ratio_first": Known(
        "First update, largest |ratio − 1|", "", "Must be 0 up to rounding: sampler and trainer agree."
    ),
    "ratio_mean": Known("Probability ratio, new / old", "ratio", "", 1.0, aside=True),
    "ratio_deviation": Known("Largest |ratio − 1|", "ratio", aside=True),
    "entropy_update": Known("Entropy during the updates", "nats per token", aside=True),
    "lr": Known("Learning rate", "per optimizer step"),
    "grad_norm": Known("Gradient norm", "before clipping"),
    "tokens": Known("Tokens", "tokens per step", aside=True),
    "rollout_tokens": Known("Answer tokens", "tokens per rollout", aside=True),
    "prompt_tokens": Known("Prompt tokens", "tokens per rollout", aside=True),
    "pairs": Known("Held-out pairs", "pairs", aside=True),
    "updates": Known("Updates", "optimizer steps per rollout", aside=True),
    "seconds_rollout": Known("Time to sample and score", "seconds per rollout", aside=True),
    "seconds_update": Known("Time to update", "seconds per rollout", aside=True),
}


def known(stage: str, name: str) -> Known | None:
    """How `name` of a stage is shown, None if it is not a known metric; `actor_lr` is the actor's `lr`."""
    key, side = _key(stage, name)
    if not key:
        return None
    return replace(KNOWN[key], title=f"{KNOWN[key].title}, {side}") if side else KNOWN[key]


def metric_names(stage: str, rows: Sequence[Row]) -> list[str]:
    """Names with at least one finite number, known ones first in `KNOWN`'s order; a band is no name of its own."""
    found = {k for row in rows for k, v in row.items() if k not in ROW_FIELDS and is_number(v)}
    order = list(KNOWN)

    def place(name: str) -> tuple[int, str]:
        key, _ = _key(stage, name)
        return (order.index(key) if key else len(order)), name

    return sorted((name for name in found if not _is_band(name, found)), key=place)


def series_of(rows: Sequence[Row], name: str) -> list[Series]:
    """The lines of one metric, training first; rows without a finite number are left out."""
    lines: list[Series] = []
    for kind in sorted({str(r.get("kind", "train")) for r in rows}, key=lambda k: (k != "train", k)):
        own = [r for r in rows if str(r.get("kind", "train")) == kind and is_number(r.get(name))]
        if not own:
            continue
        own.sort(key=lambda r: r.get("step", 0))
        step = np.array([r.get("step", i) for i, r in enumerate(own)], dtype=float)
        value = np.array([r[name] for r in own], dtype=float)
        lines.append(Series(kind, step, value, *_band(own, name, value)))
    return lines


def moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` points, as long as its input `[points]`; at the ends, over those that there are."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    first, last = np.maximum(i - window // 2, 0), np.minimum(i + window // 2 + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def is_rough(values: np.ndarray) -> bool:
    """Whether a line `[points]` is noise around a trend, which a moving mean shows better, or a plain course.

    By second differences against first ones: 1.7 times as large in white noise, near 0 in a schedule.
    """
    first = np.diff(values)
    return len(values) >= 20 and bool(np.median(np.abs(np.diff(first))) > 0.5 * np.median(np.abs(first)) > 0)


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, a true minus, and an exponent only far from 1; "–" for none."""
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or value == 0:
        return f"−{-value:,}" if value < 0 else f"{value:,.0f}"
    size = abs(value)
    if size >= 10**6 or size < 10**-3:
        text = re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{size:.1e}")
    elif size >= 1000:
        text = f"{size:,.0f}"
    else:
        text = f"{size:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    return f"−{text}" if value < 0 else text


def decimals(values: Iterable[float]) -> int:
    """Places after the point that show numbers of one row alike: three significant digits of the largest, 3 at most."""
    largest = max((abs(v) for v in values), default=0.0)
    return min(3, max(0, 2 - math.floor(math.log10(largest)))) if largest > 0 else 0


def fixed(value: float, places: int, signed: bool = False) -> str:
    """A number with `places` digits after the point and a true minus; a plus too if `signed`."""
    text = f"{abs(value):,.{max(0, places)}f}"
    if not any(digit in text for digit in "123456789"):
        return text
    return f"−{text}" if value < 0 else f"+{text}" if signed else text


def shorten(text: str, length: int) -> str:
    """`text`, cut with an ellipsis where it is longer than `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def is_number(value: Any) -> bool:
    """Whether `value` can be drawn: an int or float, finite, no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _key(stage: str, name: str) -> tuple[str, str]:
    """The entry of `KNOWN` for a metric and "actor" or "critic" if it is one side's; ("", "") if there is none."""
    for candidate in (f"{stage}/{name}", name):
        if candidate in KNOWN:
            return candidate, ""
    for side in ("actor", "critic"):
        rest = re.sub(rf"^{side}[_/.]|[_/.]{side}$", "", name)
        if rest != name and rest in KNOWN:
            return rest, side
    return "", ""


def _is_band(name: str, names: set[str]) -> bool:
    """Whether `name` is an end or the spread of another metric."""
    for ending in ("_low", "_high", "_std"):
        base = name.removesuffix(ending)
        if base != name and (base in names or f"{base}_mean" in names):
            return True
    return False


def _band(rows: Sequence[Row], name: str, value: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """Lower and upper ends `[points]` and what they mean, or None, None, ""."""

    def column(key: str) -> np.ndarray | None:
        return np.array([r[key] for r in rows], dtype=float) if all(is_number(r.get(key)) for r in rows) else None

    for stem in dict.fromkeys((name, name.removesuffix("_mean"))):
        low, high, std = column(f"{stem}_low"), column(f"{stem}_high"), column(f"{stem}_std")
        if low is not None and high is not None:
            return low, high, "95 % interval"
        if std is not None:
            return value - std, value + std, "± 1 std"
    return None, None, ""
