"""Which of a stage's metrics are shown in tables, and how: the headline, the speed, the time.

Shared by the command line, the progress lines and the Prefect report, so that a stage is described the same way
everywhere. What a manifest lacks is left out. Imports neither Prefect nor rich.
"""

from collections.abc import Mapping
from typing import Any

from rlhf_core.specs import StageName

HEADLINES: dict[StageName, tuple[tuple[str, str], ...]] = {
    "data": (("rows_kept", "rows"),),
    "sft": (("eval_loss", "eval loss"), ("eval_perplexity", "perplexity")),
    "reward": (("eval_accuracy", "accuracy"),),
    "ppo": (("score_last", "score"), ("kl_sequence_last", "KL")),
    "dpo": (("eval_accuracy", "accuracy"), ("eval_loss", "eval loss")),
    "evaluate": (
        ("gold_sft", "gold sft"),
        ("gold_ppo", "gold ppo"),
        ("gold_dpo", "gold dpo"),
        ("gold_gain", "gain"),
        ("reward_sft", "reward sft"),
        ("reward_ppo", "reward ppo"),
        ("win_rate", "win rate"),
        ("kl_sequence", "KL"),
    ),
}


def headline(stage: StageName, metrics: Mapping[str, Any]) -> str:
    """The numbers by which a stage is judged, with their 95% interval: "accuracy 0.842 [0.81, 0.87]"."""
    return ", ".join(f"{label} {_with_interval(key, metrics)}" for key, label in HEADLINES[stage] if key in metrics)


def latest(metrics: Mapping[str, Any], most: int = 4) -> str:
    """The first few numbers of a running stage, e.g. "loss 2.31  lr 1e-05"."""
    numbers = [(k, v) for k, v in metrics.items() if isinstance(v, int | float)]
    return "  ".join(f"{key} {number(value)}" for key, value in numbers[:most])


def speed(metrics: Mapping[str, Any]) -> str:
    """Tokens a second, or "" for a stage that trains nothing."""
    value = metrics.get("tokens_per_second")
    return f"{value:,.0f}" if isinstance(value, int | float) else ""


def duration(seconds: float | None) -> str:
    """A time for people: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"


def size(count: int) -> str:
    """Bytes for people: 512 B, 1.4 MB."""
    amount = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def number(value: Any) -> str:
    """A number with four significant digits; whole numbers with thousands separated; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _with_interval(key: str, metrics: Mapping[str, Any]) -> str:
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    interval = "" if low is None or high is None else f" [{number(low)}, {number(high)}]"
    return number(metrics[key]) + interval
