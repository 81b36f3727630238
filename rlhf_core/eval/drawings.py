"""The PNGs of `rlhf eval`: reliability of a reward model, its score by length, and the frontier of a PPO run.

In the report's style (`plots`): light, opaque, 95 % intervals as whiskers. Pure functions from the modes' results.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_core.plots import BLUE, DPI, GREEN, INK, ORANGE, SOFT, save, style

Interval = Mapping[str, Any]


def draw_reliability(path: Path, calibration: Mapping[str, Any]) -> None:
    """Observed accuracy against confidence, a point a bin; on the diagonal the model knows what it knows."""
    figure, axes = _figure("Reliability: as sure as it is right?", (4.4, 3.4))
    bins = calibration["bins"]
    axes.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.9, linestyle=(0, (4, 4)), alpha=0.5, zorder=1)
    axes.plot([], [], " ", label=f"ECE {calibration['ece']:.3f}, Brier {calibration['brier']['value']:.3f}")
    _points(axes, [b["confidence"] for b in bins], [b["accuracy"] for b in bins], BLUE)
    for b in bins:
        axes.annotate(
            f"{b['accuracy']['n']:,}", (b["confidence"], b["accuracy"]["low"]), (0, -4), textcoords="offset points",
            ha="center", va="top", fontsize=6.5, color=SOFT, annotation_clip=False,
        )  # fmt: skip
    low = min([0.45, *(b["accuracy"]["low"] - 0.06 for b in bins)])
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(max(-0.06, low), 1.03)
    axes.set_xlabel("confidence, sigmoid(|margin|); below the points: pairs", fontsize=8.5, loc="left")
    axes.set_ylabel("share of pairs that are right", fontsize=8.5)
    axes.legend(loc="upper left", frameon=False, fontsize=8, handlelength=0)
    save(figure, path)


def draw_length(path: Path, length: Mapping[str, Any]) -> None:
    """Mean score against the answer's length, a point for each sixth of the answers."""
    figure, axes = _figure("Score by length of the answer", (4.4, 3.0))
    bins = length["bins"]
    _points(axes, [(b["from"] + b["to"]) / 2 for b in bins], [b["score"] for b in bins], BLUE)
    axes.set_xlabel("tokens", fontsize=8.5, loc="left")
    axes.set_ylabel("score", fontsize=8.5)
    axes.margins(x=0.08, y=0.12)
    r = length["correlation"]
    figure.text(
        0.98,
        0.03,
        f"correlation {r['value']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]",
        fontsize=8,
        color=SOFT,
        ha="right",
    )
    save(figure, path)


def draw_frontier(path: Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Reward and gold against KL, one panel each over a common axis; the line follows training."""
    names = [name for name in ("reward", "gold") if all(name in p for p in points)]
    height = 0.6 + 2.1 * len(names)
    figure = Figure(figsize=(5.2, height), dpi=DPI, facecolor="white")
    kl = [p["kl_sequence"]["value"] for p in points]
    for i, name in enumerate(names):
        bottom = (0.6 + 2.1 * (len(names) - 1 - i)) / height
        axes = figure.add_axes((0.13, bottom, 0.84, 1.7 / height))
        style(axes)
        color = ORANGE if name == "reward" else GREEN
        axes.plot(kl, [p[name]["value"] for p in points], color=color, linewidth=1.4, zorder=2)
        _points(axes, kl, [p[name] for p in points], color)
        for x, p in zip(kl, points, strict=True):
            axes.annotate(
                p["name"].removeprefix("step "), (x, p[name]["value"]), (4, 4), textcoords="offset points", fontsize=7,
                color=SOFT,
            )  # fmt: skip
        axes.set_ylabel("reward model's score" if name == "reward" else "gold", fontsize=8.5)
        axes.margins(x=0.06, y=0.15)
    if names:
        figure.axes[-1].set_xlabel("KL to SFT, nats an answer; numbers are rollouts", fontsize=8.5, loc="left")
    figure.text(
        0.02, 1 - 0.17 / height, "What PPO paid and what it got", fontsize=10, fontweight="bold", color=INK, va="center"
    )
    save(figure, path)


def _figure(title: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.15, 0.17, 0.82, 0.7))
    style(axes)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    figure.text(0.02, 0.95, title, fontsize=10, fontweight="bold", color=INK, va="center")
    return figure, axes


def _points(axes: Axes, x: Sequence[float], intervals: Sequence[Interval], color: str) -> None:
    y = np.array([v["value"] for v in intervals], dtype=float)
    ends = np.array([[v["value"] - v["low"] for v in intervals], [v["high"] - v["value"] for v in intervals]])
    axes.errorbar(
        x, y, np.maximum(ends, 0), fmt="o", markersize=4.5, color=color, ecolor=color, elinewidth=1, capsize=2.5,
        markeredgecolor="white", markeredgewidth=0.6, zorder=4,
    )  # fmt: skip
