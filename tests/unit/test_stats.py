"""Intervals: known values, coverage under simulation, and the refusal of data that has no interval."""

import math

import numpy as np
import pytest

from rlhf_core import stats


@pytest.mark.parametrize(
    ("df", "table"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423), (199, 1.9720)]
)
def test_t95_agrees_with_the_printed_table(df: int, table: float) -> None:
    assert stats.t95(df) == pytest.approx(table, rel=1.2e-3)


def test_mean_interval_is_t_times_standard_error() -> None:
    interval = stats.mean([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764 * math.sqrt(2.5 / 5)
    assert interval.value == 3.0 and interval.n == 5
    assert interval.high - 3.0 == pytest.approx(half, rel=1e-3)
    assert 3.0 - interval.low == pytest.approx(half, rel=1e-3)


def test_one_observation_gives_a_point_without_width() -> None:
    assert stats.mean([2.5]) == stats.Interval(2.5, 2.5, 2.5, 1)
    assert stats.ratio([3.0], [2.0]) == stats.Interval(1.5, 1.5, 1.5, 1)


def test_pairing_removes_what_both_sides_share() -> None:
    rng = np.random.default_rng(0)
    prompts, noise = rng.normal(0, 10, 100), rng.normal(0, 0.1, 100)
    paired = stats.paired_difference(prompts + 1 + noise, prompts)
    assert paired.value == pytest.approx(1, abs=0.05)
    assert paired.high - paired.low < 0.1
    assert stats.mean(prompts).high - stats.mean(prompts).low > 2


def test_wilson_agrees_with_the_published_example() -> None:
    # Newcombe (1998), table I, method 3: 81 of 263 and 0 of 20.
    some, none = stats.proportion(81, 263), stats.proportion(0, 20)
    assert (some.low, some.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert (none.low, none.high) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_a_tie_is_half_a_win() -> None:
    interval = stats.win_rate([2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0])
    assert interval.value == 0.5 and interval.n == 4
    assert stats.win_rate([1.0, 1.0], [1.0, 1.0]).value == 0.5


def test_ratio_is_the_token_mean_and_not_the_mean_of_means() -> None:
    losses, tokens = [10.0, 1.0], [10.0, 4.0]
    assert stats.ratio(losses, tokens).value == pytest.approx(11 / 14)


def test_ratio_with_equal_denominators_is_the_mean() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    by_ratio, by_mean = stats.ratio(values, [1.0] * 4), stats.mean(values)
    assert (by_ratio.low, by_ratio.high) == pytest.approx((by_mean.low, by_mean.high))


def test_exp_keeps_the_order_of_the_ends() -> None:
    interval = stats.exp(stats.Interval(0.0, -1.0, 1.0, 7))
    assert interval == stats.Interval(1.0, math.exp(-1), math.e, 7)


@pytest.mark.parametrize("n", [5, 40, 200])
def test_intervals_cover_the_truth_95_times_in_100(n: int) -> None:
    rng = np.random.default_rng(n)
    rounds = 2000
    normal = [stats.mean(rng.normal(3, 2, n)) for _ in range(rounds)]
    coins = [stats.proportion(float(rng.binomial(n, 0.3)), n) for _ in range(rounds)]
    assert np.mean([i.low <= 3 <= i.high for i in normal]) == pytest.approx(0.95, abs=0.02)
    assert np.mean([i.low <= 0.3 <= i.high for i in coins]) == pytest.approx(0.95, abs=0.04)


def test_ratio_interval_covers_the_truth_when_lengths_vary() -> None:
    rng = np.random.default_rng(1)
    hits = []
    for _ in range(1000):
        lengths = rng.integers(5, 40, 200)
        losses = np.array([rng.exponential(2.0, k).sum() for k in lengths])
        interval = stats.ratio(losses, lengths.astype(float))
        hits.append(interval.low <= 2.0 <= interval.high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_no_interval_of_nothing_or_of_numbers_that_are_not_finite(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"finite|non-empty"):
        stats.mean(values)


def test_unpaired_data_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        stats.paired_difference([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="3 and 2"):
        stats.win_rate([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="successes"):
        stats.proportion(3, 2)
