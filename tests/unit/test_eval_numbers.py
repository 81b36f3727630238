"""What `rlhf eval` says of given scores, checked by hand: calibration, length bias, over-optimisation."""

import math
from itertools import pairwise

import numpy as np
import pytest

from rlhf_core import stats
from rlhf_core.eval.pairs import Pair, calibration, describe_pairs, length_bias
from rlhf_core.eval.peak import Point, over_optimisation


def pair(margin: float, chosen: int = 5, rejected: int = 5, source: str = "a") -> Pair:
    return Pair(source, margin, 0.0, chosen, rejected)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_accuracy_is_told_for_each_source_and_a_tie_is_half_right():
    found = describe_pairs([pair(1.0), pair(-1.0), pair(2.0, source="b"), pair(0.0, source="b")])
    assert found["accuracy"]["value"] == pytest.approx(2.5 / 4)
    assert found["sources"]["a"]["accuracy"]["value"] == 0.5 and found["sources"]["b"]["accuracy"]["value"] == 0.75
    assert found["sources"]["b"]["pairs"] == 2
    assert found["loss"]["value"] == pytest.approx(np.mean([np.log1p(np.exp(-m)) for m in (1, -1, 2, 0)]))


def test_calibration_bins_hold_every_pair_once_with_predicted_and_observed_accuracy():
    margin = np.array([math.log(3)] * 8)  # sigmoid = 0.75
    found = calibration(np.where(np.arange(8) < 6, margin, -margin))
    (only,) = found["bins"]
    assert (
        only["confidence"] == pytest.approx(0.75) and only["accuracy"]["value"] == 0.75 and only["accuracy"]["n"] == 8
    )
    assert only["from"] <= 0.75 <= only["to"]
    assert found["ece"] == pytest.approx(0, abs=1e-12)
    assert found["brier"]["value"] == pytest.approx((6 * 0.25**2 + 2 * 0.75**2) / 8)


def test_a_model_that_is_too_sure_has_a_calibration_error_of_the_gap():
    found = calibration(np.array([math.log(19)] * 5 + [-math.log(19)] * 5))  # 0.95 sure, half right
    assert found["ece"] == pytest.approx(0.45)


def test_scores_that_follow_the_labels_probabilities_are_calibrated():
    rng = np.random.default_rng(0)
    margin = rng.normal(0, 2, 20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-np.abs(margin)))
    found = calibration(np.where(right, np.abs(margin), -np.abs(margin)))
    assert found["ece"] < 0.02
    assert sum(b["accuracy"]["n"] for b in found["bins"]) == 20_000
    inside = [b["accuracy"]["low"] <= b["confidence"] <= b["accuracy"]["high"] for b in found["bins"]]
    assert sum(inside) >= 8


def test_huge_margins_do_not_overflow():
    with np.errstate(over="raise"):
        found = calibration(np.array([1e4, -1e4]))
    assert found["brier"]["value"] == pytest.approx(0.5)


def test_a_model_that_only_counts_tokens_is_found_out():
    lengths = [(9, 3), (8, 2), (3, 9), (2, 8)]
    by_length = [Pair("a", float(c), float(r), c, r) for c, r in lengths]
    found = length_bias(by_length)
    assert found["longer_wins"]["value"] == 1.0 and found["longer_chosen"]["value"] == 0.5
    assert found["accuracy_chosen_longer"]["value"] == 1.0 and found["accuracy_chosen_shorter"]["value"] == 0.0
    assert found["correlation"]["value"] == pytest.approx(1.0)


def test_pairs_of_equal_length_say_nothing_of_longer_answers():
    found = length_bias([pair(1.0), pair(-1.0)])
    assert "longer_wins" not in found and "accuracy_chosen_longer" not in found
    assert found["correlation"]["value"] == 0.0


def test_score_by_length_has_every_answer_in_one_bin():
    rng = np.random.default_rng(1)
    pairs = [Pair("a", 0.0, 1.0, int(a), int(b)) for a, b in rng.integers(1, 50, (100, 2))]
    bins = length_bias(pairs)["bins"]
    assert sum(b["score"]["n"] for b in bins) == 200
    assert all(one["to"] <= other["from"] for one, other in pairwise(bins))


def test_the_interval_of_a_correlation_is_fishers():
    rng = np.random.default_rng(2)
    x = rng.normal(size=100)
    y = x + rng.normal(size=100)
    found = stats.correlation(x, y)
    assert found.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    z = math.atanh(found.value)
    assert found.low == pytest.approx(math.tanh(z - 1.96 / math.sqrt(97)), abs=1e-4)
    assert stats.correlation(x, y, independent=50).low < found.low
    assert stats.correlation([1.0, 2.0], [1.0, 1.0]).value == 0.0


# --- the frontier ----------------------------------------------------------------------------------------------------


def points(*means: tuple[float, float, float | None]) -> list[Point]:
    """Points with these means of KL, reward and gold over 40 prompts with little noise."""
    noise = np.random.default_rng(3).normal(0, 0.01, 40)
    return [
        Point("sft" if i == 0 else f"step {10 * i}", noise + kl, noise[::-1] + r, None if g is None else noise + g)
        for i, (kl, r, g) in enumerate(means)
    ]


def test_gold_that_falls_while_the_reward_rises_is_over_optimisation():
    found = over_optimisation(points((0, 0, 0.4), (2, 1, 0.7), (9, 2, 0.5)))
    assert found["verdict"] == "over-optimised" and found["peak"] == "step 10"
    assert found["gold_after_peak"]["high"] < 0 < found["reward_after_peak"]["low"]
    assert "Gold peaks at step 10 (0.700, KL 2.0 nats an answer)" in found["sentence"]
    assert "Stop at step 10" in found["sentence"]


def test_gold_that_is_highest_at_the_end_is_no_over_optimisation():
    found = over_optimisation(points((0, 0, 0.4), (2, 1, 0.5), (9, 2, 0.7)))
    assert found["verdict"] == "not seen" and "highest at step 20" in found["sentence"]


def test_a_fall_within_the_noise_is_no_over_optimisation():
    noisy = np.random.default_rng(4).normal(0, 1, (3, 40))
    found = over_optimisation([Point(str(i), row, row, row + (0.05 if i == 1 else 0)) for i, row in enumerate(noisy)])
    assert found["verdict"] == "not seen" and (
        "not clearly lower" in found["sentence"] or "highest" in found["sentence"]
    )


def test_gold_and_reward_that_fall_together_do_not_accuse_the_reward_model():
    found = over_optimisation(points((0, 0, 0.4), (2, 1, 0.7), (9, 0.5, 0.5)))
    assert found["verdict"] == "gold fell" and "the reward does not rise" in found["sentence"]


def test_without_gold_there_is_no_verdict():
    assert over_optimisation(points((0, 0, None), (2, 1, None)))["verdict"] == "no gold"
