"""Drawings of a sweep: one metric of all variants in one drawing, and the plane of KL and reward.

A variant has one look everywhere (`look`): six of Okabe and Ito's colours, then the same ones dashed, dotted and dash-dotted. Lines
are named by the numbers of their variants; the page says what a number stands for. As in `plots`, raw values are thin and their
moving mean bold, margins are fixed, and there is no pyplot.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_core.curves import Known, Row, Series, is_number, is_rough, known, moving_mean, series_of, shorten
from rlhf_core.plots import (
    BLUE,
    DPI,
    FEW_POINTS,
    GREEN,
    INK,
    LEGEND,
    ORANGE,
    PINK,
    SOFT,
    frame,
    log_scale,
    save,
    smoothing,
    style,
    thinned,
)

COLORS = (BLUE, ORANGE, GREEN, PINK, "#E69F00", "#56B4E9")
DASHES = ("", "4 2", "1 1.6", "6 1.6 1 1.6")  # of lines 2 wide, as in SVG
WIDTH = 5.0  # inches, of a drawing


@dataclass(frozen=True)
class Line:
    """What one artifact has logged.

    Attributes:
        variants: numbers of the variants that share it.
        rows: of its metrics.jsonl.
    """

    variants: tuple[int, ...]
    rows: Sequence[Row]

    @property
    def name(self) -> str:
        """For legends: 3, or 1, 4."""
        return ", ".join(map(str, self.variants))


def look(number: int) -> tuple[str, str]:
    """Colour and dashes of a variant, the latter as SVG writes them; the 25th looks as the first."""
    return COLORS[(number - 1) % len(COLORS)], DASHES[(number - 1) // len(COLORS) % len(DASHES)]


def draw_overlay(path: Path, stage: str, name: str, lines: Sequence[Line]) -> None:
    """Write the PNG of one metric of one stage, a line for each artifact; those that have not logged it are left out."""
    shown = known(stage, name) or Known(name)
    found = [(line, series) for line in lines if (series := series_of(line.rows, name))]
    figure, axes = _canvas(shown.title, [line for line, _ in found])
    for line, series in found:
        for each in series:
            _draw(axes, line, each, named=each is series[0])
    if shown.log and min(float(each.value.min()) for _, series in found for each in series) > 0:
        log_scale(axes)
    else:
        frame(axes, shown)
    axes.set_ylabel(shown.unit, fontsize=8.5)
    axes.set_xlabel("rollout" if stage == "ppo" else "step", fontsize=8.5, loc="left")
    _finish(figure, axes, path)


def draw_path(path: Path, lines: Sequence[Line]) -> None:
    """Write the PNG of how far each variant went from SFT, in nats per answer, and what score that brought.

    A dot for each logged rollout, a line through their moving mean, and its end marked with the variant's number.
    """
    figure, axes = _canvas("Score over KL, rollout by rollout", lines)
    for line in lines:
        points = plane_of(line.rows)
        color, _ = look(line.variants[0])
        axes.plot(*points.T, ".", color=color, markersize=3, alpha=0.35, markeredgewidth=0, zorder=2)
        width = smoothing(len(points))
        kl, score = (moving_mean(column, width) if len(points) > FEW_POINTS else column for column in points.T)
        axes.plot(kl, score, color=color, label=line.name, zorder=3, **_stroke(line))
        _mark_end(axes, line, kl[-1], score[-1])
    axes.set_ylabel("score of the rollouts", fontsize=8.5)
    _finish_plane(figure, axes, path)


def draw_ends(path: Path, metric: str, unit: str, ends: Mapping[int, tuple[Any, Any]], sft: Any = None) -> None:
    """Write the PNG of where the variants ended, on held-out prompts, with 95 % intervals.

    Args:
        path: the PNG.
        metric: what the y axis has.
        unit: its unit.
        ends: variant -> KL to SFT and the metric, each {"value", "low", "high"}.
        sft: the metric of the SFT model, if all variants have the same; drawn at KL 0.
    """
    lines = [Line((number,), ()) for number in ends]
    figure, axes = _canvas(f"{metric} over KL, on held-out prompts", lines)
    for line, (kl, value) in zip(lines, ends.values(), strict=True):
        color, _ = look(line.variants[0])
        across, up = (
            [[max(0.0, v["value"] - v["low"])], [max(0.0, v["high"] - v["value"])]] for v in (kl, value)
        )  # as errorbar has them
        axes.errorbar(
            kl["value"], value["value"], up, across, fmt="none", ecolor=color, elinewidth=1, capsize=2, alpha=0.6
        )
        axes.plot([], [], color=color, label=line.name, **_stroke(line))
        _mark_end(axes, line, kl["value"], value["value"])
    if sft:
        axes.plot(0, sft["value"], marker="s", color=SOFT, markersize=6, zorder=4)
        axes.annotate("SFT", (0, sft["value"]), (6, -10), textcoords="offset points", fontsize=8, color=SOFT)
    axes.set_ylabel(unit, fontsize=8.5)
    _finish_plane(figure, axes, path)


def plane_of(rows: Sequence[Row]) -> np.ndarray:
    """KL per answer and score of each logged rollout, `[points, 2]`; rows that lack one of them are left out."""
    pairs = [
        (row["kl_sequence"], row["score"])
        for row in rows
        if row.get("kind") == "train" and is_number(row.get("kl_sequence")) and is_number(row.get("score"))
    ]
    return np.array(pairs, dtype=float).reshape(-1, 2)


def _canvas(title: str, lines: Sequence[Line]) -> tuple[Figure, Axes]:
    """Axes with room below for as many rows of the legend as the lines need."""
    names = [line.name for line in lines]
    below = 0.42 + 0.19 * math.ceil(len(names) / _columns(names))
    height = 2.55 + below
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.145, below / height, 0.825, 1 - (below + 0.42) / height))
    style(axes)
    figure.text(0.02, 1 - 0.19 / height, shorten(title, 48), fontsize=10, fontweight="bold", color=INK, va="center")
    return figure, axes


def _columns(names: Sequence[str]) -> int:
    """Of the legend: as many as have room."""
    longest = max(map(len, names), default=1)
    return max(1, min(len(names), int((WIDTH - 0.3) / (0.42 + 0.075 * longest))))


def _draw(axes: Axes, line: Line, series: Series, named: bool) -> None:
    """Training as a line, evaluations between as markers."""
    color, _ = look(line.variants[0])
    label = line.name if named else None
    step, value = thinned(series.step), thinned(series.value)
    if series.kind != "train":
        axes.plot(
            step, value, color=color, marker="o", markersize=4, markeredgecolor="white", markeredgewidth=0.5,
            label=label, zorder=5, **{**_stroke(line), "linewidth": 1.0},
        )  # fmt: skip
    elif is_rough(value):
        axes.plot(step, value, color=color, linewidth=0.6, alpha=0.25, zorder=2)
        mean = moving_mean(value, smoothing(len(step)))
        axes.plot(step, mean, color=color, label=label, zorder=3, **_stroke(line))
    else:
        marker = "o" if len(step) == 1 else ""
        axes.plot(step, value, color=color, marker=marker, markersize=3, label=label, zorder=3, **_stroke(line))


def _stroke(line: Line) -> dict[str, Any]:
    _, dashes = look(line.variants[0])
    pattern = tuple(float(length) for length in dashes.split())
    return {"linewidth": 1.8, "linestyle": (0, pattern) if pattern else "-"}


def _mark_end(axes: Axes, line: Line, x: float, y: float) -> None:
    color, _ = look(line.variants[0])
    axes.plot(x, y, "o", color=color, markersize=7, markeredgecolor="white", markeredgewidth=1, zorder=5)
    axes.annotate(
        line.name, (x, y), (6, 4), textcoords="offset points", fontsize=8.5, fontweight="bold", color=INK, zorder=6
    )


def _finish_plane(figure: Figure, axes: Axes, path: Path) -> None:
    axes.margins(0.09)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -0.03 * (high - low)), max(high, 1e-6))
    axes.axvline(0, color=INK, linewidth=0.9, linestyle=(0, (4, 4)), alpha=0.5, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("KL to the SFT model, nats per answer", fontsize=8.5, loc="left")
    _finish(figure, axes, path)


def _finish(figure: Figure, axes: Axes, path: Path) -> None:
    found = list(zip(*axes.get_legend_handles_labels(), strict=True))
    columns = _columns([name for _, name in found])
    # The legend is filled column by column, and read row by row.
    handles, labels = zip(*(each for i in range(columns) for each in found[i::columns]), strict=True)
    figure.legend(
        handles, labels, loc="lower right", bbox_to_anchor=(0.99, -0.01), ncols=columns, fontsize=8,
        **{**LEGEND, "handlelength": 2.0},
    )  # fmt: skip
    save(figure, path)
