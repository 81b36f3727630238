"""Drawing the report's PNGs: one curve for each metric, and grouped bars that compare the models.

Raw values are thin, their moving mean bold; evaluation has markers and interval whiskers. Colours are Okabe and Ito's,
told apart without colour vision. Files are opaque and light, for pasting anywhere; the page inverts them in the dark.
Margins are fixed, which is faster than a layout engine and never clips. Matplotlib without pyplot: no global state.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from PIL import Image

from rlhf_core.curves import Known, Series, decimals, fixed, is_rough, known, moving_mean, number, shorten

BLUE, ORANGE, GREEN, GREY, PINK = "#0072B2", "#D55E00", "#009E73", "#8A8F98", "#CC79A7"
INK, SOFT, LINE = "#1F2328", "#57606A", "#C4C9D0"
MODEL_COLORS = {"base": GREY, "sft": BLUE, "ppo": ORANGE, "ppo_ema": PINK, "dpo": ORANGE}
MODEL_LABELS = {"base": "Base", "sft": "SFT", "ppo": "PPO", "ppo_ema": "PPO, EMA", "dpo": "DPO"}
LEGEND: dict[str, Any] = {"frameon": False, "handlelength": 1.3, "columnspacing": 1.2, "handletextpad": 0.5}
MOST_POINTS = 1500  # of a raw line; more are averaged in groups
FEW_POINTS = 20  # up to here a line has markers
DPI = 180


def draw_curve(path: Path, stage: str, name: str, lines: Sequence[Series]) -> None:
    """Write the PNG of one metric of one stage; `lines` is not empty."""
    shown = known(stage, name) or Known(name)
    figure = Figure(figsize=(4.2, 2.6), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.165, 0.205, 0.81, 0.64))
    style(axes)
    for line in lines:
        (_draw_train if line.kind == "train" else _draw_eval)(axes, line)
    if shown.log and min(line.value.min() for line in lines) > 0:
        log_scale(axes)
    else:
        frame(axes, shown)
    axes.set_ylabel(shown.unit, fontsize=8.5)
    axes.set_xlabel("rollout" if stage == "ppo" else "step", fontsize=8.5, loc="left")
    figure.text(0.02, 0.94, shorten(shown.title, 36), fontsize=10, fontweight="bold", color=INK, va="center")
    figure.text(0.98, 0.94, _change(lines[-1]), fontsize=8.5, color=SOFT, va="center", ha="right")
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="lower right",
        bbox_to_anchor=(0.99, -0.01),
        ncols=4,
        fontsize=8,
        **LEGEND,
    )
    save(figure, path)


def draw_bars(path: Path, title: str, groups: Sequence[str], models: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write grouped bars with interval whiskers.

    Args:
        path: the PNG.
        title: for people.
        groups: labels on the x axis.
        models: model name -> one {"value", "low", "high"} for each group.
    """
    width = max(3.2, 1.1 + (0.5 + 0.42 * len(models)) * len(groups))
    figure = Figure(figsize=(width, 3.3), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.62 / width, 0.11, 1 - 0.77 / width, 0.68))
    style(axes)
    thick = 0.84 / max(1, len(models))
    digits = min(2, decimals([v["value"] for values in models.values() for v in values]))
    for i, (model, values) in enumerate(models.items()):
        x = np.arange(len(groups)) + (i - (len(models) - 1) / 2) * thick
        _draw_bar_row(axes, model, x, thick * 0.94, values, digits)
    axes.margins(y=0.16)
    axes.axhline(0, color=INK, linewidth=0.8, zorder=3)
    axes.set_xticks(range(len(groups)), [shorten(group, 14) for group in groups])
    axes.tick_params(axis="x", length=0, labelsize=9, labelcolor=INK)
    axes.set_xlim(-0.55, len(groups) - 0.45)
    figure.text(0.14 / width, 0.945, title, fontsize=10.5, fontweight="bold", color=INK, va="center")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.03 / width, 0.92), ncols=3, fontsize=8.5,
        **LEGEND,
    )  # fmt: skip
    save(figure, path)


def _draw_bar_row(
    axes: Axes, model: str, x: np.ndarray, thick: float, values: Sequence[Mapping[str, Any]], digits: int
) -> None:
    y = np.array([v["value"] for v in values], dtype=float)
    ends = np.array([[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]], dtype=float)
    axes.bar(x, y, thick, color=MODEL_COLORS.get(model, GREEN), label=label(model), zorder=2)
    axes.errorbar(x, y, np.maximum(ends, 0), fmt="none", ecolor=INK, elinewidth=1, capsize=2, zorder=4)
    for place, v in zip(x, values, strict=True):
        up = v["value"] >= 0
        end, gap, side = (v["high"], 3, "bottom") if up else (v["low"], -3, "top")
        axes.annotate(
            fixed(v["value"], digits), (place, end), (0, gap), textcoords="offset points", ha="center", va=side,
            fontsize=7.5, color=INK,
        )  # fmt: skip


def label(model: str) -> str:
    """A model's name for people."""
    return MODEL_LABELS.get(model, model)


def _draw_train(axes: Axes, line: Series) -> None:
    step, value = thinned(line.step), thinned(line.value)
    if line.low is not None and line.high is not None:
        low, high = thinned(line.low), thinned(line.high)
        axes.fill_between(step, low, high, color=BLUE, alpha=0.15, linewidth=0, label=line.band, zorder=2)
    if not is_rough(value):
        marker = "o" if len(step) <= FEW_POINTS else ""
        axes.plot(step, value, color=BLUE, linewidth=1.8, marker=marker, markersize=3, label="train", zorder=3)
        return
    window = smoothing(len(step))
    points = window * math.ceil(len(line.step) / MOST_POINTS)
    axes.plot(step, value, color=BLUE, linewidth=0.7, alpha=0.5, label="train", zorder=2)
    mean = moving_mean(value, window)
    axes.plot(step, mean, color=BLUE, linewidth=2.0, label=f"mean of {points}", zorder=3)


def _change(line: Series) -> str:
    """First and last value, smoothed where the line is."""
    value = thinned(line.value)
    if line.kind == "train" and is_rough(value):
        value = moving_mean(value, smoothing(len(value)))
    return number(value[-1]) if len(value) == 1 else f"{number(value[0])} → {number(value[-1])}"


def smoothing(points: int) -> int:
    """Width of the moving mean, odd: a twentieth of the line."""
    return max(3, points // 20) | 1


def _draw_eval(axes: Axes, line: Series) -> None:
    axes.plot(
        line.step, line.value, color=ORANGE, linewidth=1.4, marker="o", markersize=4.5, markeredgecolor="white",
        markeredgewidth=0.6, label=line.kind, zorder=5,
    )  # fmt: skip
    if line.low is not None and line.high is not None:
        ends = np.maximum(np.stack([line.value - line.low, line.high - line.value]), 0)
        axes.errorbar(line.step, line.value, ends, fmt="none", ecolor=ORANGE, elinewidth=1.1, capsize=2.5, zorder=4)


def thinned(values: np.ndarray) -> np.ndarray:
    """At most `MOST_POINTS` of a line's points, means of groups where there are more."""
    group = math.ceil(len(values) / MOST_POINTS)
    if group == 1:
        return values
    return np.array([values[i : i + group].mean() for i in range(0, len(values), group)])


def frame(axes: Axes, shown: Known) -> None:
    """The guide line where it is near the data, and the part of the y axis worth seeing."""
    low, high = axes.get_ylim()
    middle = (low + high) / 2
    if high - low < 0.02 * abs(middle):  # constant, or rounding: not to be magnified
        low, high = middle - 0.1 * abs(middle), middle + 0.1 * abs(middle)
        axes.set_ylim(low, high)
    room = 0.5 * (high - low)
    if shown.guide is not None and low - room <= shown.guide <= high + room:
        axes.axhline(shown.guide, color=INK, linewidth=0.9, linestyle=(0, (4, 4)), alpha=0.5, zorder=1)
        low, high = axes.get_ylim()
    low, high = max(low, shown.view[0]), min(high, shown.view[1])
    if low < high:
        axes.set_ylim(low, high)


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def style(axes: Axes) -> None:
    """The look of all axes: light grid, no frame above and at the right, small grey labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.grid(axis="y", color="#E6E8EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, labelcolor=SOFT, length=3, color=LINE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(SOFT)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_powerlimits((-3, 5))
    axes.yaxis.set_major_formatter(formatter)
    axes.yaxis.get_offset_text().set(fontsize=8, color=SOFT)


def save(figure: Figure, path: Path) -> None:
    """Write the drawing with 64 colours: a third of the size, no visible difference."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, compress_level=6)
