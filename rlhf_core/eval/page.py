"""One HTML page with two models' answers side by side: numbers on top, then the first prompts in their order.

In the report's style, self-contained, everything escaped. All answers are in answers.jsonl beside it.
"""

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from rlhf_core.curves import decimals, fixed
from rlhf_core.report_style import CSS

ROWS = 50  # on the page
NUMBERS = {"reward": "Reward model's score", "gold": "Gold", "length": "Tokens", "eos_rate": "Finished answers"}


def write_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page of a `compare` result."""
    a, b = (escape(name) for name in result["models"])
    title = f"{a} and {b}"
    shown = result["rows"][:ROWS]
    cards = "".join(_card(row, result["models"]) for row in shown)
    note = f"The first {len(shown)} of {result['prompts']} prompts, in their order; not chosen. {_how(result)}"
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head><body><header><h1>Side by side</h1></header><main>"
        f'{_table(result, a, b)}<h2>Answers</h2><p class="fine">{escape(note)}</p>{cards}</main></body></html>\n',
        encoding="utf-8",
    )


def _how(result: Mapping[str, Any]) -> str:
    if result.get("greedy"):
        return "Greedy decoding."
    return f"Sampled with the same noise, temperature {result['temperature']:g}, seed {result['seed']}."


def _table(result: Mapping[str, Any], a: str, b: str) -> str:
    rows = ""
    for key, heading in NUMBERS.items():
        cells = [numbers.get(key) for numbers in result["numbers"]]
        if not all(cells):
            continue
        gain = result["gains"].get(key)
        places = decimals(cell["value"] for cell in cells)
        shown = [*(_cell(cell, places) for cell in cells), _cell(gain, places, signed=True) if gain else ""]
        win = result["win_rate"].get(key)
        shown.append(f"{fixed(100 * win['value'], 0)} %<small>{_ends(win, 0, scale=100)} %</small>" if win else "")
        rows += f'<tr><th scope="row">{heading}</th>{"".join(f"<td>{text}</td>" for text in shown)}</tr>'
    heads = "".join(f'<th scope="col">{h}</th>' for h in (a, b, "second − first", "second wins"))
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    return f'<div class="wide"><table class="numbers">{head}<tbody>{rows}</tbody></table></div>'


def _cell(value: Mapping[str, Any], places: int, signed: bool = False) -> str:
    return f"{fixed(value['value'], places, signed)}<small>{_ends(value, places, signed)}</small>"


def _ends(value: Mapping[str, Any], places: int, signed: bool = False, scale: float = 1) -> str:
    return f"{fixed(scale * value['low'], places, signed)} to {fixed(scale * value['high'], places, signed)}"


def _card(row: Mapping[str, Any], names: list[str]) -> str:
    prompt = escape(re.sub(r"\n\s*\n", "\n", row["prompt"].strip()))
    answers = "".join(_answer(c, n, x) for c, n, x in zip(("sft", "ppo"), names, row["answers"], strict=True))
    return f'<article><pre class="prompt">{prompt}</pre><div class="answers">{answers}</div></article>'


def _answer(css: str, name: str, answer: Mapping[str, Any]) -> str:
    facts = [f"{key} <b>{fixed(answer[key], 2)}</b>" for key in ("reward", "gold") if key in answer]
    facts.append(f"{answer['tokens']} tokens")
    text = escape(answer["text"].strip()) or "<em>(empty)</em>"
    cut = "" if answer["eos"] else "<em> … cut at the limit</em>"
    return f'<div class="{css}"><h3>{escape(name)}<span>{" · ".join(facts)}</span></h3><pre>{text}{cut}</pre></div>'
