"""The report: one self-contained HTML page that says whether PPO or DPO helped, at what price, and how training went.

Pure functions from plain data to files; no torch, no network, no clock. The page opens with a verdict that follows
from the intervals by fixed rules (`verdict`, `warnings`), then tables, sample answers side by side (the first prompts
in order, not chosen), every curve, and the lineage. Plots are PNGs, inside the page as data URIs and beside it in
plots/. The shape of `evaluation` is what `rlhf_core.evaluate` writes to evaluation.json; what is missing is left out.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlhf_core.comparison import MODELS, aligned_of
from rlhf_core.curves import decimals, fixed, is_number, known, metric_names, number, series_of
from rlhf_core.plots import draw_bars, draw_curve, label
from rlhf_core.report_style import html_page

Interval = Mapping[str, Any]  # {"value", "low", "high", "n"}
STAGE_TITLES = {
    "data": "Data",
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "ppo": "PPO",
    "dpo": "Direct preference optimisation",
}
# key in evaluation["models"][model] -> heading, unit, scale; in the order of the table
TABLE = {
    "reward": ("Reward model's score", "normalised", 1),
    "gold": ("Gold", "0 to 1", 1),
    "kl_sequence": ("KL to SFT", "nats per answer", 1),
    "kl_token": ("KL to SFT", "nats per token", 1),
    "length": ("Answer length", "tokens", 1),
    "eos_rate": ("Finished answers", "% with end of sequence", 100),
    "perplexity": ("Perplexity", "held-out SFT answers", 1),
}
TILES = (
    ("length", "Answer length, tokens", 1, ""),
    ("eos_rate", "Finished answers", 100, " %"),
    ("perplexity", "Perplexity", 1, ""),
)
HEADLINES = {
    "data": ("rows_kept", "vocabulary"),
    "sft": ("steps", "eval_loss", "eval_perplexity", "tokens_per_second"),
    "reward": ("steps", "eval_accuracy", "eval_loss", "tokens_per_second"),
    "evaluate": ("gold_gain", "reward_gain", "win_rate", "kl_sequence"),
    "ppo": ("steps", "score_first", "score_last", "kl_sequence_last", "tokens_per_second"),
    "dpo": ("steps", "eval_accuracy", "eval_loss", "tokens_per_second"),
}
TAX_LIMIT = 10  # perplexity of PPO or DPO over SFT
LENGTH_LIMIT = 1.5  # answer length of PPO or DPO over SFT
EOS_LIMIT = 0.9  # share of answers that end


def write_report(
    out: Path,
    *,
    title: str,
    stages: Mapping[str, Sequence[Mapping[str, Any]]],
    evaluation: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    lineage: Sequence[Mapping[str, Any]],
) -> None:
    """Write out/report.html and out/plots/*.png.

    Args:
        out: folder, made if needed.
        title: of the page.
        stages: stage -> rows of its metrics.jsonl: {"kind": "train" | "eval", "step", "seconds", name: number...}.
        evaluation: {"prompts", "models": {model: {metric: interval, "gold_parts": {part: interval}}}, "gains": {...},
            "win_rate": {...}}, an interval being {"value", "low", "high", "n"}.
        samples: {"prompt", "answers": {model: {"text", "reward", "gold", "tokens", "eos"}}}.
        lineage: {"stage", "id", "created", "seconds", "metrics"}, in the order of the pipeline.
    """
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    sections = [
        ("result", "Result", _result(plots, evaluation)),
        ("samples", "Sample answers", _samples(samples)),
        *((stage, STAGE_TITLES.get(stage, stage), _curves(plots, stage, rows)) for stage, rows in stages.items()),
        ("lineage", "Lineage", _lineage(lineage)),
    ]
    page = html_page(title, sections)
    (out / "report.html").write_text(page, encoding="utf-8")


def verdict(evaluation: Mapping[str, Any]) -> tuple[str, str]:
    """A sentence on PPO or DPO against SFT, and its tone: "better", "worse", "even" or "" without a comparison.

    It goes by gold if there is one, else by the reward model, and calls a difference only if its interval excludes 0.
    """
    gains, models = evaluation.get("gains", {}), evaluation.get("models", {})
    aligned = aligned_of(models)
    if not aligned:
        return "There is no PPO or DPO model to compare with SFT.", ""
    name = "gold" if gains.get("gold") else "reward"
    gain = gains.get(name)
    if not gain:
        return (
            f"Nothing here tells whether {label(aligned)}'s answers are better than SFT's: there is neither gold "
            "(evaluate.gold) nor a reward model.",
            "",
        )
    tone = "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "even"
    said = {"better": "better than", "worse": "worse than", "even": "not clearly different from"}[tone]
    by = "gold, which no stage has trained on" if name == "gold" else "the reward model (there is no gold to check it)"
    before, after = (models[m][name]["value"] for m in ("sft", aligned))
    places = decimals((before, after))
    text = (
        f"{label(aligned)}'s answers are {said} SFT's by {by}: {fixed(before, places)} → {fixed(after, places)}, "
        f"a gain of {fixed(gain['value'], places, signed=True)} ({_range(gain, places, signed=True)})"
    )
    win = evaluation.get("win_rate", {}).get(name)
    won = f"; they win {fixed(100 * win['value'], 0)} % of {win['n']} prompts" if win else ""
    return f"{text}{won}.", tone


def warnings(evaluation: Mapping[str, Any]) -> list[str]:
    """What spoils a good score: an exploited reward model, answers that run on or grow, forgetting."""
    gains, models = evaluation.get("gains", {}), evaluation.get("models", {})
    aligned = aligned_of(models) or "ppo"
    sft, after, name = models.get("sft", {}), models.get(aligned, {}), label(aligned)
    restrain = "dpo.beta" if aligned == "dpo" else "ppo.kl_coef"
    found: list[str] = []
    reward, gold = gains.get("reward"), gains.get("gold")
    if reward and gold and reward["low"] > 0 >= gold["low"]:
        found.append(
            "The reward model's score rose and gold did not: the actor exploits the reward model. Raise ppo.kl_coef, "
            "take fewer steps, or train the reward model on more pairs."
        )
    if not sft or not after:
        return found
    if after["eos_rate"]["value"] < EOS_LIMIT and after["eos_rate"]["value"] < sft["eos_rate"]["value"]:
        share = number(100 * (1 - after["eos_rate"]["value"]), 2)
        remedy = " or the EOS penalty" if aligned == "ppo" else ""
        found.append(f"{share} % of {name}'s answers run into the length limit. Raise max_response_tokens{remedy}.")
    growth = after["length"]["value"] / max(sft["length"]["value"], 1e-9)
    if growth > LENGTH_LIMIT:
        doubt = "does the reward model prefer length" if aligned == "ppo" else "are the chosen answers the longer ones"
        found.append(f"{name}'s answers are {number(growth)} times as long as SFT's: {doubt}?")
    if "perplexity" in after and "perplexity" in sft:
        tax = after["perplexity"]["value"] / sft["perplexity"]["value"]
        if tax > TAX_LIMIT:
            found.append(
                f"Held-out SFT answers surprise {name} {number(tax)} times as much as SFT (perplexity): right if they "
                f"were poor examples; forgetting if they were good ones, then raise {restrain}."
            )
    return found


def _result(plots: Path, evaluation: Mapping[str, Any]) -> str:
    models = {m: evaluation["models"][m] for m in MODELS if m in evaluation.get("models", {})}
    if not models:
        return ""
    text, tone = verdict(evaluation)
    notes = "".join(f'<p class="warning">{escape(w)}</p>' for w in warnings(evaluation))
    return (
        f'<p class="verdict {tone}">{escape(text)}</p>{notes}{_tiles(evaluation)}'
        f'<div class="bars">{_bars(plots, models)}</div>{_table(evaluation, models)}{_method(evaluation)}'
    )


def _tiles(evaluation: Mapping[str, Any]) -> str:
    gains, wins = evaluation.get("gains", {}), evaluation.get("win_rate", {})
    models = evaluation.get("models", {})
    sft, after = models.get("sft", {}), models.get(aligned_of(models), {})
    tiles: list[tuple[str, str, str]] = []
    for name in ("gold", "reward"):
        if gain := gains.get(name):
            places = decimals((gain["value"],))
            shown = fixed(gain["value"], places, signed=True)
            tiles.append((f"{name.capitalize()} gain", shown, _range(gain, places, signed=True)))
        if win := wins.get(name):
            tiles.append((f"Wins by {name}", f"{fixed(100 * win['value'], 1)} %", f"{_range(win, 1, scale=100)} %"))
    if "kl_sequence" in after:
        tiles.append(("KL to SFT", number(after["kl_sequence"]["value"]), "nats per answer"))
    for key, heading, scale, unit in TILES:
        if key in sft and key in after:
            places = 1 if scale == 100 else decimals((sft[key]["value"], after[key]["value"]))
            old, new = (fixed(scale * m[key]["value"], places) for m in (sft, after))
            tiles.append((heading, f"{new}{unit}", f"SFT {old}{unit}"))
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _bars(plots: Path, models: Mapping[str, Mapping[str, Any]]) -> str:
    html = ""
    scored = {m: [v["reward"]] for m, v in models.items() if v.get("reward")}
    if scored:
        draw_bars(plots / "reward.png", "Reward model's score", ["score"], scored)
        html += image(plots / "reward.png", "Mean score of the reward model for each model, with 95 % intervals")
    parts = {m: v.get("gold_parts", {}) for m, v in models.items() if v.get("gold")}
    if parts:
        names = list(dict.fromkeys(name for values in parts.values() for name in values))
        values = {m: [models[m]["gold"], *(parts[m][name] for name in names)] for m in parts}
        title = "Gold and its parts" if names else "Gold"
        draw_bars(plots / "gold.png", title, ["gold", *names], values)
        html += image(plots / "gold.png", "Mean gold and each of its parts for each model, with 95 % intervals")
    return html


def _table(evaluation: Mapping[str, Any], models: Mapping[str, Mapping[str, Any]]) -> str:
    gains = evaluation.get("gains", {})
    names = list(dict.fromkeys(part for values in models.values() for part in values.get("gold_parts", {})))
    rows = ""
    for key, (heading, unit, scale) in TABLE.items():
        if not any(values.get(key) for values in models.values()):
            continue
        cells = {m: values.get(key) for m, values in models.items()}
        rows += _table_row(heading, unit, cells, gains.get(key), scale)
        for name in names if key == "gold" else ():
            cells = {m: values.get("gold_parts", {}).get(name) for m, values in models.items()}
            rows += _table_row(name, "", cells, gains.get(f"gold_{name}"), 1, "part")
    heads = "".join(f'<th scope="col">{label(m)}</th>' for m in models)
    heads += f'<th scope="col">{label(aligned_of(models) or "PPO")} − SFT</th>'
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    return f'<div class="wide"><table class="numbers">{head}<tbody>{rows}</tbody></table></div>'


def _table_row(
    heading: str, unit: str, cells: Mapping[str, Interval | None], gain: Interval | None, scale: float, kind: str = ""
) -> str:
    """One metric; the base model, often far off, does not decide how many digits the row has."""
    places = decimals(cell["value"] for model, cell in cells.items() if cell and model != "base")
    places = 1 if scale == 100 else places
    shown = [estimate(cell, places, scale) for cell in cells.values()]
    shown.append(estimate(gain, places, scale, signed=True) if gain else "")
    head = f'<th scope="row">{escape(heading)}<small>{escape(unit)}</small></th>'
    return f'<tr class="{kind}">{head}{"".join(f"<td>{text}</td>" for text in shown)}</tr>'


def _method(evaluation: Mapping[str, Any]) -> str:
    names = [name for name in ("temperature", "max_response_tokens", "seed") if name in evaluation]
    settings = ", ".join(f"{name.replace('_', ' ')} {evaluation[name]}" for name in names)
    count = evaluation.get("prompts", "?")
    return (
        f'<p class="fine">One answer to each of {count} held-out prompts ({escape(settings)}), '
        "sampled with the same noise for all models. Small numbers are 95 % intervals over prompts: Student's t for "
        "means and paired differences, Wilson's for shares (a tie is half a win), the delta method for token means.</p>"
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    html = '<p class="fine">The first of the prompts that were evaluated, in the order of the held-out set; not chosen.</p>'
    for sample in samples:
        cards = "".join(_answer(model, sample["answers"][model]) for model in MODELS if model in sample["answers"])
        prompt = escape(re.sub(r"\n\s*\n", "\n", sample["prompt"].strip()))
        html += f'<article><pre class="prompt">{prompt}</pre><div class="answers">{cards}</div></article>'
    return html


def _answer(model: str, answer: Mapping[str, Any]) -> str:
    facts = [f"{name} <b>{fixed(answer[name], 2)}</b>" for name in ("reward", "gold") if is_number(answer.get(name))]
    if is_number(answer.get("tokens")):
        facts.append(f"{answer['tokens']} tokens")
    text = escape(answer["text"].strip()) or "<em>(empty)</em>"
    if not answer.get("eos", True):
        text += '<em title="no end-of-sequence token within the limit"> … cut at the limit</em>'
    head = f"<h3>{label(model)}<span>{' · '.join(facts)}</span></h3>"
    return f'<div class="{escape(model)}">{head}<pre>{text}</pre></div>'


def _curves(plots: Path, stage: str, rows: Sequence[Mapping[str, Any]]) -> str:
    main, aside, folded = "", "", []
    for name in metric_names(stage, rows):
        path = plots / f"{stage}-{slug(name)}.png"
        lines = series_of(rows, name)
        draw_curve(path, stage, name, lines)
        shown = known(stage, name)
        note = f"{escape(shown.note)} " if shown else ""
        last = f"{shown.title if shown else name}, {stage}: last value {number(lines[-1].value[-1])}"
        figure = f"<figure>{image(path, last)}<figcaption>{note}<code>{escape(name)}</code></figcaption></figure>"
        if shown and not shown.aside:
            main += figure
        else:
            aside += figure
            folded.append(escape(name))
    html = f'<div class="curves">{main}</div>' if main else ""
    if aside:
        fold = "details" if main else "details open"
        html += f'<{fold}><summary>More: {", ".join(folded)}</summary><div class="curves">{aside}</div></details>'
    return html


def _lineage(lineage: Sequence[Mapping[str, Any]]) -> str:
    if not lineage:
        return ""
    rows = ""
    for entry in lineage:
        metrics = entry.get("metrics", {})
        names = [n for n in HEADLINES.get(entry["stage"], ()) if is_number(metrics.get(n))]
        names = names or [n for n, v in metrics.items() if is_number(v)][:4]
        facts = ", ".join(f"{escape(n.replace('_', ' '))} <b>{number(metrics[n])}</b>" for n in names)
        cells = (
            escape(entry["stage"]), f"<code>{escape(entry['id'])}</code>", _when(entry.get("created")),
            duration(entry.get("seconds")), facts or "–",
        )  # fmt: skip
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("Stage", "Artifact", "Created", "Took", "Metrics"))
    return f'<div class="wide"><table class="lineage"><thead><tr>{heads}</tr></thead>{rows}</table></div>'


def estimate(cell: Interval | None, places: int, scale: float = 1, signed: bool = False) -> str:
    """A number with its interval in small print."""
    if not cell:
        return "–"
    return f"{fixed(scale * cell['value'], places, signed)}<small>{_range(cell, places, signed, scale)}</small>"


def _range(cell: Interval, places: int, signed: bool = False, scale: float = 1) -> str:
    return f"{fixed(scale * cell['low'], places, signed)} to {fixed(scale * cell['high'], places, signed)}"


def _when(created: Any) -> str:
    """2026-11-22T17:13:14+00:00 as 2026-11-22 17:13 UTC; anything else as it is."""
    text = re.sub(r"^(\S{10})T(\d\d:\d\d):\d\d\+00:00$", r"\1 \2 UTC", str(created or "–"))
    return escape(text)


def duration(seconds: Any) -> str:
    """A time for people; "–" for none."""
    if not is_number(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min {int(seconds) % 60:02d} s"


def image(path: Path, alt: str) -> str:
    """An image in the page; in a row of images the share of the width follows from its own."""
    png = path.read_bytes()
    width = int.from_bytes(png[16:20], "big")
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" style="flex:{width} 1 {width // 3}px">'


def slug(name: str) -> str:
    """A metric's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "metric"
