"""What `rlhf eval` prints: one table a mode, from the result's JSON; intervals are 95 %."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape

from flows.show import out, table
from tasks.headline import number

ANSWERS = 5  # shown side by side
NUMBERS = {"reward": "reward", "gold": "gold", "length": "tokens", "eos_rate": "finished"}


def show_eval(result: Mapping[str, Any]) -> None:
    """Print a result."""
    {"reward": _reward, "language": _language, "compare": _compare, "frontier": _frontier}[result["mode"]](result)


def interval(value: Mapping[str, Any] | None) -> str:
    """An estimate with its interval: "0.842 [0.81, 0.87]"."""
    if not value:
        return "–"
    return f"{number(float(value['value']))} \\[{number(float(value['low']))}, {number(float(value['high']))}]"


def _reward(result: Mapping[str, Any]) -> None:
    rows = table("source", "pairs", "accuracy", "margin", title=escape(result["model"]))
    for name, part in _several(result["sources"]).items():
        rows.add_row(escape(name), number(part["pairs"]), interval(part["accuracy"]), interval(part["margin"]))
    rows.add_row("[bold]all[/]", number(result["pairs"]), interval(result["accuracy"]), interval(result["margin"]))
    out.print(rows)
    bins = table("confidence", "pairs", "predicted", "right", title="\nCalibration")
    for b in result["calibration"]["bins"]:
        edges = f"{b['from']:.2f} to {b['to']:.2f}"
        bins.add_row(edges, number(b["accuracy"]["n"]), f"{b['confidence']:.3f}", interval(b["accuracy"]))
    out.print(bins)
    facts = table(
        "", "", title=f"\nECE {result['calibration']['ece']:.3f}, Brier {interval(result['calibration']['brier'])}"
    )
    length = result["length"]
    names = {
        "correlation": "correlation of score and length",
        "longer_wins": "the longer answer scores higher",
        "longer_chosen": "the longer answer is the chosen one",
        "accuracy_chosen_longer": "accuracy where the chosen is longer",
        "accuracy_chosen_shorter": "accuracy where the chosen is shorter",
    }
    for key, label in names.items():
        if key in length:
            facts.add_row(label, interval(length[key]))
    out.print(facts)


def _several(sources: Mapping[str, Any]) -> Mapping[str, Any]:
    """The sources, if there are more than one: one alone is all."""
    return sources if len(sources) > 1 else {}


def _language(result: Mapping[str, Any]) -> None:
    rows = table("source", "responses", "tokens", "perplexity", "nats a token", title=escape(result["model"]))
    for name, part in [*_several(result["sources"]).items(), ("[bold]all[/]", result)]:
        shown = name if part is result else escape(name)
        counts = number(part["responses"]), number(part["tokens"])
        rows.add_row(shown, *counts, interval(part["perplexity"]), interval(part["loss"]))
    out.print(rows)


def _compare(result: Mapping[str, Any]) -> None:
    a, b = (escape(name) for name in result["models"])
    for row in result["rows"][:ANSWERS]:
        out.print(f"[bold]{escape(row['prompt'].strip())}[/]", soft_wrap=True)
        for mark, answer in zip(("A", "B"), row["answers"], strict=True):
            facts = [f"{key} {number(answer[key])}" for key in ("reward", "gold") if key in answer]
            out.print(f"  {mark}  {escape(answer['text'].strip())}  [dim]{'  '.join(facts)}[/]", soft_wrap=True)
    rows = table("", "A", "B", "B − A", "B wins", title=f"\nA {a}\nB {b}\n{result['prompts']} prompts")
    for key, label in NUMBERS.items():
        cells = [numbers.get(key) for numbers in result["numbers"]]
        if all(cells):
            gain, win = result["gains"].get(key), result["win_rate"].get(key)
            rows.add_row(label, *map(interval, cells), interval(gain), interval(win) if win else "")
    out.print(rows)


def _frontier(result: Mapping[str, Any]) -> None:
    keys = [key for key in ("reward", "gold") if key in result["points"][0]]
    rows = table("", "KL, nats an answer", *keys, "tokens", "finished", title=f"{result['prompts']} prompts")
    for point in result["points"]:
        cells = [interval(point[key]) for key in ("kl_sequence", *keys)]
        rows.add_row(point["name"], *cells, number(point["length"]["value"]), number(point["eos_rate"]["value"]))
    out.print(rows)
    out.print(escape(result["sentence"]), soft_wrap=True)
