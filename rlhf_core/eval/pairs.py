"""What a reward model's scores of held-out pairs say: accuracy, calibration, length bias. Pure numbers, no torch.

A pair is right when the chosen answer scores higher; equal scores are half right. Calibration asks whether sigmoid(margin),
the probability that the Bradley-Terry loss was trained on, comes true: pairs are put into bins by confidence, sigmoid(|margin|)
in [0.5, 1], and compared with the share that is right. Length bias asks whether the longer answer wins because it is longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_core import stats

BINS = 10  # of confidence, equally wide
LENGTH_BINS = 6  # of answers, equally many


@dataclass(frozen=True)
class Pair:
    """A held-out pair and its scores, as the model gives them (not normalised).

    Attributes:
        source: where the pair is from.
        chosen, rejected: scores.
        chosen_tokens, rejected_tokens: lengths of the answers.
    """

    source: str
    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int


def describe_pairs(pairs: Sequence[Pair]) -> dict[str, Any]:
    """All numbers of a reward model; intervals are {"value", "low", "high", "n"}."""
    margin = np.array([p.chosen - p.rejected for p in pairs])
    scores = np.array([s for p in pairs for s in (p.chosen, p.rejected)])
    sources = sorted({p.source for p in pairs})
    return {
        "pairs": len(pairs),
        "accuracy": accuracy(pairs).as_dict(),
        "loss": stats.mean(np.logaddexp(0, -margin)).as_dict(),
        "margin": stats.mean(margin).as_dict(),
        "score": {"mean": float(scores.mean()), "std": float(scores.std())},
        "sources": {name: _source([p for p in pairs if p.source == name]) for name in sources},
        "calibration": calibration(margin),
        "length": length_bias(pairs),
    }


def accuracy(pairs: Sequence[Pair]) -> stats.Interval:
    """Share of pairs whose chosen answer scores higher, with Wilson's interval; a tie is half right."""
    return stats.win_rate([p.chosen for p in pairs], [p.rejected for p in pairs])


def _source(pairs: Sequence[Pair]) -> dict[str, Any]:
    margin = [p.chosen - p.rejected for p in pairs]
    return {"accuracy": accuracy(pairs).as_dict(), "margin": stats.mean(margin).as_dict(), "pairs": len(pairs)}


def calibration(margin: np.ndarray) -> dict[str, Any]:
    """Predicted against observed accuracy.

    `ece` is the expected calibration error, the mean over pairs of |accuracy - confidence| of their bin (Guo et al. 2017,
    arXiv 1706.04599); with few pairs it is above 0 even for a perfect model. `brier` is the mean of (sigmoid(margin) - 1)^2
    (Brier 1950), 0.25 for guessing.

    Args:
        margin: `[pairs]`, score of the chosen minus score of the rejected answer.
    """
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(margin), 500)))
    right = (margin > 0) + 0.5 * (margin == 0)
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    bins: list[dict[str, Any]] = []
    for i in range(BINS):
        inside = place == i
        if n := int(inside.sum()):
            edges = {"from": 0.5 + 0.5 * i / BINS, "to": 0.5 + 0.5 * (i + 1) / BINS}
            observed = stats.proportion(float(right[inside].sum()), n).as_dict()
            bins.append({**edges, "confidence": float(confidence[inside].mean()), "accuracy": observed})
    gap = sum(b["accuracy"]["n"] * abs(b["accuracy"]["value"] - b["confidence"]) for b in bins) / len(margin)
    predicted = np.where(margin >= 0, confidence, 1 - confidence)
    return {"ece": gap, "brier": stats.mean((predicted - 1) ** 2).as_dict(), "bins": bins}


def length_bias(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Whether longer answers score higher, and whether that is right.

    `longer_wins` is the model's share, `longer_chosen` the labels' own, both over pairs of different lengths; `correlation`
    is of score and length over all answers, with the interval of as many pairs, since two answers share a prompt.
    """
    unequal = [p for p in pairs if p.chosen_tokens != p.rejected_tokens]
    longer = [p for p in unequal if p.chosen_tokens > p.rejected_tokens]
    shorter = [p for p in unequal if p.chosen_tokens < p.rejected_tokens]
    scores = np.array([s for p in pairs for s in (p.chosen, p.rejected)])
    tokens = np.array([float(n) for p in pairs for n in (p.chosen_tokens, p.rejected_tokens)])
    found: dict[str, Any] = {"correlation": stats.correlation(scores, tokens, independent=len(pairs)).as_dict()}
    if unequal:
        by_score = [
            (p.chosen, p.rejected) if p.chosen_tokens > p.rejected_tokens else (p.rejected, p.chosen) for p in unequal
        ]
        found["longer_wins"] = stats.win_rate([a for a, _ in by_score], [b for _, b in by_score]).as_dict()
        found["longer_chosen"] = stats.proportion(len(longer), len(unequal)).as_dict()
    for name, part in (("accuracy_chosen_longer", longer), ("accuracy_chosen_shorter", shorter)):
        if part:
            found[name] = accuracy(part).as_dict()
    order = np.argsort(tokens, kind="stable")
    parts = [part for part in np.array_split(order, min(LENGTH_BINS, len(order))) if len(part)]
    found["bins"] = [
        {"from": int(tokens[part].min()), "to": int(tokens[part].max()), "score": stats.mean(scores[part]).as_dict()}
        for part in parts
    ]
    return found
