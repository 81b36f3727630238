"""The comparison that a sweep ends with: one self-contained page, and its table as markdown.

Pure functions from plain data to files, as `report`, whose look and numbers it shares. The table has a row for each variant, the
failed ones too; then the planes of KL and reward, the curves of every stage that is not alike in all variants, and which stages
were shared. Drawings name variants by number and look; `look` gives both here and there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from rlhf_core.comparison import aligned_of
from rlhf_core.curves import decimals, known, metric_names, number, shorten
from rlhf_core.report import STAGE_TITLES, Interval, duration, estimate, image, slug
from rlhf_core.report_style import html_page
from rlhf_core.sweep_plots import Line, draw_ends, draw_overlay, draw_path, look, plane_of

# of each stage, what is drawn; other metrics are on the pages of the variants themselves
DRAWN = (
    "loss", "accuracy", "margin", "score", "kl_sequence", "response_length", "entropy", "eos_rate", "actor_loss",
    "critic_loss", "kl_coef", "drift", "lr",
)  # fmt: skip
# key of a number -> heading, unit, scale; in the order of the table
COLUMNS = {
    "score_last": ("Score", "last rollout", 1),
    "reward": ("Score", "held-out", 1),
    "gold": ("Gold", "0 to 1", 1),
    "gold_gain": ("Gold gain", "over SFT", 1),
    "kl_sequence": ("KL", "nats per answer", 1),
    "length": ("Length", "tokens", 1),
    "eos_rate": ("Finished", "% of answers", 100),
    "perplexity": ("Perplexity", "of SFT answers", 1),
}
OWN_CSS = """
header,main{max-width:1280px}
.numbers th,.numbers td{padding:7px;font-size:13px}.numbers small{font-size:11px}
.numbers .what code{display:block;white-space:nowrap;font-size:12px}
.pages{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:10px}
svg.key{vertical-align:middle;margin-right:8px}
.failed{color:var(--bad);white-space:normal;min-width:220px}
.legend{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,260px),1fr));gap:2px 18px;padding:0;margin:0 0 12px;
list-style:none}
@media(prefers-color-scheme:dark){svg.key{filter:invert(.92) hue-rotate(180deg)}}
"""


@dataclass(frozen=True)
class VariantResult:
    """What became of a variant.

    Attributes:
        failed: why it has no result; "" if it has.
        numbers: of `COLUMNS`, each {"value", and "low", "high" where known}.
        sft: the same of its SFT model, from the evaluation.
        seconds: of those of its stages that no other variant has.
    """

    number: int
    label: str
    failed: str = ""
    numbers: Mapping[str, Interval] = field(default_factory=dict)
    sft: Mapping[str, Interval] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class StageResult:
    """One artifact of a sweep.

    Attributes:
        how: reused, built, resumed from …, failed, not built.
        variants: numbers of those that share it.
    """

    stage: str
    id: str
    how: str
    variants: tuple[int, ...]
    seconds: float | None = None
    headline: str = ""


def write_sweep_report(
    out: Path,
    *,
    title: str,
    results: Sequence[VariantResult],
    stages: Sequence[StageResult],
    curves: Mapping[str, Sequence[Line]],
) -> None:
    """Write out/report.html and out/plots/*.png.

    Args:
        out: folder, made if needed.
        title: of the page.
        results: of all variants.
        stages: each artifact once, in the order of the pipeline.
        curves: stage -> what each of its artifacts has logged; of stages that are not the same in all variants.
    """
    plots = out / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    names = {result.number: result.label for result in results}
    sections = [
        ("variants", "Variants", _result_table(results)),
        ("plane", "KL and reward", _planes(plots, results, curves)),
        *(
            (stage, STAGE_TITLES.get(stage, stage), _curves(plots, stage, lines, names))
            for stage, lines in curves.items()
        ),
        ("stages", "Stages", _stage_table(stages, len(results))),
    ]
    page = html_page(title, sections, OWN_CSS)
    (out / "report.html").write_text(page, encoding="utf-8")


def numbers_of(
    metrics: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> tuple[dict[str, Interval], dict[str, Interval]]:
    """A variant's numbers and those of its SFT model.

    Args:
        metrics: of the manifest of PPO or DPO; empty if there is none.
        evaluation: its evaluation.json; empty if there is none.
    """
    models = evaluation.get("models", {})
    aligned = models.get(aligned_of(models), {})
    found: dict[str, Interval] = {key: aligned[key] for key in COLUMNS if aligned.get(key)}
    if "score_last" in metrics:
        found["score_last"] = {"value": metrics["score_last"]}
    if gain := evaluation.get("gains", {}).get("gold"):
        found["gold_gain"] = gain
    if "kl_sequence_last" in metrics and "kl_sequence" not in found:
        found["kl_sequence"] = {"value": metrics["kl_sequence_last"]}
    return found, {key: models["sft"][key] for key in COLUMNS if models.get("sft", {}).get(key)}


def markdown(title: str, results: Sequence[VariantResult], stages: Sequence[StageResult], place: str) -> str:
    """The tables as markdown, for Prefect's UI; `place` is where the page is."""
    columns = _columns(results)
    heads = ["", "variant", *(_markdown_head(key) for key in columns), "time"]
    lines = [
        [
            str(r.number), f"`{_plain(r.label)}`" + (f" **failed**: {_plain(r.failed)}" if r.failed else ""),
            *(number(r.numbers[key]["value"] * COLUMNS[key][2]) if key in r.numbers else "" for key in columns),
            duration(r.seconds) if r.seconds else "",
        ]
        for r in results
    ]  # fmt: skip
    text = f"# {title}\n\n{_markdown_table(heads, lines)}\nPage with curves and the KL–reward plane: `{place}`\n"
    rows = [[s.stage, s.how, f"`{s.id}`", _of(s.variants, len(results))] for s in stages]
    return f"{text}\n## Stages\n\n{_markdown_table(['stage', '', 'artifact', 'variants'], rows)}"


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_head(key: str) -> str:
    heading, unit, _ = COLUMNS[key]
    return f"{heading}, {unit}"


def _plain(text: str) -> str:
    """Text of an error in a cell: one line, without what would end the cell."""
    return " ".join(text.split()).replace("|", "/")[:200]


def _of(variants: Sequence[int], all_of_them: int) -> str:
    return "all" if len(variants) == all_of_them else ", ".join(map(str, variants))


def _columns(results: Sequence[VariantResult]) -> list[str]:
    return [key for key in COLUMNS if any(key in result.numbers for result in results)]


def _key(number: int) -> str:
    """The line of a variant as drawings have it."""
    color, dashes = look(number)
    scaled = " ".join(str(2.2 * float(length)) for length in dashes.split())
    return (
        f'<svg class="key" width="30" height="8" aria-hidden="true"><line x1="0" y1="4" x2="30" y2="4" stroke="{color}" '
        f'stroke-width="3" stroke-dasharray="{scaled}"/></svg>'
    )


def _result_table(results: Sequence[VariantResult]) -> str:
    columns = _columns(results)
    places = {
        key: 1 if COLUMNS[key][2] == 100 else decimals(r.numbers[key]["value"] for r in results if key in r.numbers)
        for key in columns
    }
    rows = ""
    for result in results:
        name = f'<td class="what">{_key(result.number)}{_lines(result.label)}</td>'
        cells = "".join(f"<td>{_cell(result.numbers.get(key), places[key], COLUMNS[key][2])}</td>" for key in columns)
        if result.failed and not result.numbers:
            cells = f'<td class="failed" colspan="{max(1, len(columns))}">failed: {escape(_plain(result.failed))}</td>'
        elif result.failed:
            name = name.replace("</td>", f'<small class="failed">failed: {escape(_plain(result.failed))}</small></td>')
        took = duration(result.seconds) if result.seconds else "–"
        rows += f'<tr><th scope="row">{result.number}</th>{name}{cells}<td>{took}</td></tr>'
    heads = "".join(
        f'<th scope="col">{escape(COLUMNS[key][0])}<small>{escape(COLUMNS[key][1])}</small></th>' for key in columns
    )
    head = f'<tr><td></td><th scope="col">Variant</th>{heads}<th scope="col">Time<small>own stages</small></th></tr>'
    table = f'<div class="wide"><table class="numbers"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    judged = any("low" in r.numbers[key] for r in results for key in r.numbers)
    note = (
        "Small numbers are 95 % intervals over the held-out prompts, on which each variant's last model was evaluated. "
    )
    return table + (
        f'<p class="fine">{note}With several variants one of them looks best by chance.</p>' if judged else ""
    )


def _lines(label: str) -> str:
    """Each override in a line of its own."""
    return "".join(f"<code>{escape(shorten(text, 48))}</code>" for text in label.split("  "))


def _cell(cell: Interval | None, places: int, scale: float) -> str:
    if cell is None:
        return "–"
    return estimate(cell, places, scale) if "low" in cell else number(cell["value"] * scale)


def _planes(plots: Path, results: Sequence[VariantResult], curves: Mapping[str, Sequence[Line]]) -> str:
    figures = []
    paths = [line for line in curves.get("ppo", ()) if len(plane_of(line.rows))]
    if paths:
        draw_path(plots / "plane-score.png", paths)
        figures.append((plots / "plane-score.png", "Up and to the left is better: more score for less KL."))
    for key, name, unit in (("reward", "Score", "reward model's score"), ("gold", "Gold", "gold, 0 to 1")):
        ends = {r.number: (r.numbers["kl_sequence"], r.numbers[key]) for r in results if _has_end(r, key)}
        if ends:
            sft = [r.sft.get(key) for r in results if _has_end(r, key)]
            same = sft[0] if all(value == sft[0] for value in sft) else None
            draw_ends(plots / f"plane-{key}.png", name, unit, ends, same)
            note = "Where each variant ended, with 95 % intervals over prompts."
            if key == "gold":
                note += " A higher score without higher gold is an exploited reward model."
            figures.append((plots / f"plane-{key}.png", note))
    html = "".join(f"<figure>{image(p, note)}<figcaption>{note}</figcaption></figure>" for p, note in figures)
    names = {r.number: r.label for r in results}
    return f'{_legend(names, {n: n for n in names})}<div class="pages">{html}</div>' if html else ""


def _has_end(result: VariantResult, key: str) -> bool:
    return all("low" in result.numbers.get(name, ()) for name in ("kl_sequence", key))


def _legend(names: Mapping[int, str], drawn_as: Mapping[int, int]) -> str:
    """The lines of the drawings below; variants that share an artifact share one."""
    items = "".join(
        f"<li>{_key(drawn_as[n])}<b>{n}</b> <code>{escape(label)}</code></li>"
        for n, label in names.items()
        if n in drawn_as
    )
    return f'<ul class="legend">{items}</ul>'


def _curves(plots: Path, stage: str, lines: Sequence[Line], names: Mapping[int, str]) -> str:
    every = {name: None for line in lines for name in metric_names(stage, line.rows)}
    wanted = [name for name in every if _is_drawn(name)]
    if not wanted:
        return ""
    html = ""
    for name in sorted(wanted, key=lambda n: DRAWN.index(_stem(n))):
        path = plots / f"{stage}-{slug(name)}.png"
        draw_overlay(path, stage, name, lines)
        shown = known(stage, name)
        note = f"{escape(shown.note)} " if shown and shown.note else ""
        title = f"{shown.title if shown else name}, {stage}: all variants"
        html += f"<figure>{image(path, title)}<figcaption>{note}<code>{escape(name)}</code></figcaption></figure>"
    legend = _legend(names, {n: line.variants[0] for line in lines for n in line.variants})
    return f'{legend}<div class="pages">{html}</div>'


def _is_drawn(name: str) -> bool:
    return _stem(name) in DRAWN


def _stem(name: str) -> str:
    """The metric itself: lr of lr_actor."""
    for side in ("_actor", "_critic"):
        name = name.removesuffix(side)
    return name


def _stage_table(stages: Sequence[StageResult], variants: int) -> str:
    rows = ""
    for stage in stages:
        cells = (
            escape(stage.stage), f"<code>{escape(stage.id)}</code>", escape(stage.how), _of(stage.variants, variants),
            duration(stage.seconds) if stage.seconds else "–", escape(stage.headline) or "–",
        )  # fmt: skip
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("Stage", "Artifact", "", "Variants", "Took", "Metrics"))
    saved = sum(len(stage.variants) for stage in stages) - len(stages)
    note = f'<p class="fine">{len(stages)} stages in place of {len(stages) + saved}: what variants share was made once.</p>'
    return f'<div class="wide"><table class="lineage"><thead><tr>{heads}</tr></thead>{rows}</table></div>{note}'
