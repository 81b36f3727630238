"""Means, paired differences, proportions, win rates and ratios, each with its 95 % interval.

All are closed forms, so the same data give the same interval on any machine; nothing is resampled. Means and paired
differences use Student's t, proportions Wilson's score interval (Wilson 1927), ratios of sums (a token mean over
sequences of different lengths) the delta method over sequences, since tokens of one answer are not independent,
correlations Fisher's z. The unit of observation is always the prompt. Left out: corrections for looking at many metrics
at once; read a single gain near 0 with that in mind.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Numbers = Sequence[float] | np.ndarray
Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval.

    Attributes:
        value: the estimate.
        low: lower end; equal to `value` where one observation says nothing about spread.
        high: upper end.
        n: observations behind it (prompts, pairs or held-out rows).
    """

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON: {"value", "low", "high", "n"}."""
        return asdict(self)


def t95(df: int) -> float:
    """Two-sided 95 % quantile of Student's t with `df` >= 1 degrees of freedom.

    Exact for 1 and 2; otherwise the Cornish-Fisher expansion (Abramowitz and Stegun 26.7.5), within 0.1 % of the truth.
    """
    if df < 1:
        raise ValueError(f"df must be at least 1, not {df}")
    if df == 1:
        return math.tan(0.475 * math.pi)
    if df == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))


def mean(values: Numbers) -> Interval:
    """Mean of independent values `[n]`: mean +- t95(n - 1) * s / sqrt(n)."""
    array = _checked(values)
    center = float(array.mean())
    if array.size == 1:
        return Interval(center, center, center, 1)
    half = t95(array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(center, center - half, center + half, array.size)


def paired_difference(after: Numbers, before: Numbers) -> Interval:
    """Mean of `after - before` over the same prompts, both `[n]`.

    What the two share (an easy or a hard prompt) cancels, so this is narrower than the difference of two means.
    """
    a, b = _checked(after), _checked(before)
    if a.size != b.size:
        raise ValueError(f"paired values must be as many on both sides, not {a.size} and {b.size}")
    return mean(a - b)


def proportion(successes: float, n: int) -> Interval:
    """Share of `successes` in `n` trials with its Wilson interval."""
    return Interval(successes / max(n, 1), *wilson_interval(successes, n), n)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share: stays in [0, 1] and has width even at 0 or n successes."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"needs 0 <= successes <= n and n >= 1, not {successes} of {n}")
    p = successes / n
    scale = 1 + Z95**2 / n
    center = (p + Z95**2 / (2 * n)) / scale
    half = Z95 / scale * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def win_rate(after: Numbers, before: Numbers) -> Interval:
    """Share of prompts on which `after` beats `before`, both `[n]`; a tie is half a win.

    Half wins enter Wilson's interval as they are; ties vary less than coin tosses, so it is a little too wide.
    """
    a, b = _checked(after), _checked(before)
    if a.size != b.size:
        raise ValueError(f"paired values must be as many on both sides, not {a.size} and {b.size}")
    return proportion(float(np.sum(a > b) + 0.5 * np.sum(a == b)), a.size)


def ratio(numerators: Numbers, denominators: Numbers) -> Interval:
    """sum(numerators) / sum(denominators), both `[n]`, e.g. summed loss and token count of each sequence.

    The delta method: the residuals `numerator - ratio * denominator` of the n sequences have the variance of the ratio
    times the mean denominator (Cochran 1977, Sampling Techniques, 6.4).
    """
    top, bottom = _checked(numerators), _checked(denominators)
    if top.size != bottom.size or bottom.sum() <= 0:
        raise ValueError("a ratio needs as many denominators as numerators, with a positive sum")
    value = float(top.sum() / bottom.sum())
    if top.size == 1:
        return Interval(value, value, value, 1)
    spread = float((top - value * bottom).std(ddof=1))
    half = t95(top.size - 1) * spread / math.sqrt(top.size) / float(bottom.mean())
    return Interval(value, value - half, value + half, top.size)


def correlation(x: Numbers, y: Numbers, independent: int | None = None) -> Interval:
    """Pearson's correlation of x and y, both `[n]`, with the interval of Fisher's z (Fisher 1915).

    Args:
        x, y: the values; where one of them is constant the correlation is 0 and the interval [-1, 1].
        independent: how many of the n are independent of each other; default all.
    """
    a, b = _checked(x), _checked(y)
    if a.size != b.size:
        raise ValueError(f"a correlation needs as many x as y, not {a.size} and {b.size}")
    count = independent or a.size
    if a.size < 2 or a.std() == 0 or b.std() == 0:
        return Interval(0.0, -1.0, 1.0, count)
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
    if count <= 3 or abs(r) == 1:
        return Interval(r, -1.0 if count <= 3 else r, 1.0 if count <= 3 else r, count)
    z, half = math.atanh(r), Z95 / math.sqrt(count - 3)
    return Interval(r, math.tanh(z - half), math.tanh(z + half), count)


def exp(interval: Interval) -> Interval:
    """The interval of exp(x), e.g. perplexity from the mean loss in nats."""
    value, low, high = (math.exp(min(x, 700.0)) for x in (interval.value, interval.low, interval.high))
    return Interval(value, low, high, interval.n)


def _checked(values: Numbers) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"needs a non-empty list of numbers, not shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite")
    return array
