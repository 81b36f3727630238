"""The report of one running stage as markdown: curves, sample answers, checkpoints, and where the whole log lies.

It is made of what the control plane can read: the job's progress events, and the newest checkpoint or the published
artifact in the store, whose metrics.jsonl reaches back beyond earlier attempts. Between two checkpoints the curves go on
with the few numbers that the events carry. Plots are PNGs inside the text, opaque and so readable on a dark page too;
what would make the text larger than `MOST_BYTES` is left out and named. No Prefect here; `tasks.progress` sends it.
"""

import atexit
import base64
import json
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rlhf_core import checkpoints
from rlhf_core.artifacts import ArtifactRef, Manifest
from rlhf_core.checkpoints import Checkpoint
from rlhf_core.errors import IntegrityError
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from tasks.headline import headline, number, size

MOST_BYTES = 100_000  # of the text: it is a row of the server's database
MOST_CHECKPOINTS = 10
MOST_ANSWERS = 4
ANSWERS_TAIL = 1 << 16  # bytes of answers.jsonl that are read
MOST_EVENTS = 2000  # rows that are kept of the job's events

# A thread that draws when the interpreter ends is cut off inside C++, which aborts the process. So its end waits for the drawing
# at hand, and keeps the lock, so that none begins after it.
_drawing = threading.Lock()
atexit.register(_drawing.acquire, timeout=30)

Row = Mapping[str, Any]
# What a person looks at first; the others follow in the order of the report's pages while there is room.
FIRST = (
    "loss", "score", "accuracy", "kl_sequence", "response_length", "eos_rate", "perplexity",
    "entropy", "actor_loss", "critic_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """What the store knows of a stage.

    Attributes:
        rows: of its metrics.jsonl.
        answers: the last rows of its answers.jsonl: {"step", "prompt", "answer", "score"}.
        checkpoints: whole ones, most progress first.
    """

    rows: Sequence[Row] = ()
    answers: Sequence[Row] = ()
    checkpoints: Sequence[Checkpoint] = ()


class EventRows:
    """The numbers of a job's training events, as rows of a metrics.jsonl; the oldest go when there are too many."""

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}

    def add(self, event: Row) -> None:
        """Take an event; what repeats a step replaces it, and steps that are trained again after a resume go."""
        step = int(event.get("step", 0))
        if event.get("phase") != "train" or not event.get("metrics"):
            return
        self.rows = {k: row for k, row in self.rows.items() if k < step} if step in self.rows else self.rows
        self.rows[step] = {"kind": "train", "step": step, **event["metrics"]}
        if len(self.rows) > MOST_EVENTS:
            del self.rows[min(self.rows)]

    def after(self, rows: Sequence[Row]) -> list[Row]:
        """`rows`, continued by what the events told since their last training step."""
        last = max((int(row.get("step", 0)) for row in rows if row.get("kind") == "train"), default=-1)
        own = dict(self.rows)  # another thread adds to them
        return [*rows, *(own[step] for step in sorted(own) if step > last)]


def read_stored(store: Store, ref: ArtifactRef, manifest: Manifest | None, since: int = 1) -> Stored:
    """What the published artifact, or else the newest checkpoint of attempts from `since` on, tells of a stage."""
    found: list[Checkpoint] = []
    for key in checkpoints.marker_keys(store, ref, since)[:MOST_CHECKPOINTS]:
        try:
            found.append(checkpoints.read_marker(store, ref, key))
        except IntegrityError:
            continue  # replaced by a later one meanwhile, or damaged: the job passes it over too
    if manifest:
        names = {entry.path for entry in manifest.files}
        keys = {name: manifest.key(name) for name in ("metrics.jsonl", "answers.jsonl") if name in names}
    else:
        parts = found[0].parts if found else ()
        keys = {part.name.removeprefix("files/"): found[0].part_key(part) for part in parts}
    return Stored(
        rows=_rows(store, keys.get("metrics.jsonl")),
        answers=_rows(store, keys.get("answers.jsonl"), ANSWERS_TAIL),
        checkpoints=found,
    )


def _rows(store: Store, key: str | None, tail: int | None = None) -> list[Row]:
    """Rows of a stored file of JSON lines, or of its last `tail` bytes; none if it is gone by now."""
    if key is None:
        return []
    try:
        data = store.read(key)
    except KeyError:
        return []
    lines = data.splitlines() if tail is None or len(data) <= tail else data[-tail:].splitlines()[1:]
    return [json.loads(line) for line in lines if line.strip()]


def stage_text(
    stage: StageName, where: str, state: str, rows: Sequence[Row], stored: Stored, log: str, gates: Sequence[str] = ()
) -> str:
    """The report as markdown, at most `MOST_BYTES` long.

    Args:
        stage: its name.
        where: the artifact's URL.
        state: a line on how far it is.
        rows: of all metrics.
        stored: answers and checkpoints.
        log: URL of the whole log.
        gates: a line for each gate that has fired.
    """
    head = f"# {stage}\n\n{state}\n\nArtifact `{where}`  \nWhole log `{log}`\n"
    parts = [gates_text(gates), _answers(stored.answers), _checkpoints(stored.checkpoints)]
    rest = "".join(f"\n{part}" for part in parts if part)
    return f"{head}{_curves(stage, rows, MOST_BYTES - len((head + rest).encode()))}{rest}"


def finished_state(stage: StageName, how: str, manifest: Manifest) -> str:
    """The line of a stage that has ended well."""
    return f"**{how}**  {headline(stage, manifest.metrics)}"


def _curves(stage: StageName, rows: Sequence[Row], room: int) -> str:
    from rlhf_core.curves import known, metric_names, series_of  # numpy; and matplotlib below: not at start-up

    names = [n for n in metric_names(stage, rows) if not ((k := known(stage, n)) and k.aside)]
    names = [n for n in names if any(len(line.step) > 1 for line in series_of(rows, n))]
    if not names:
        return ""
    with _drawing:
        from rlhf_core.plots import draw_curve

    names.sort(key=lambda n: FIRST.index(n) if n in FIRST else len(FIRST))
    text, left_out = "\n## Curves\n\n", []
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(names):
            path = Path(folder) / f"{i}.png"
            if not left_out:  # what comes after the first that has no room is less worth than it
                with _drawing:
                    draw_curve(path, stage, name, series_of(rows, name))
                image = f"![{name}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})\n"
                if len(text) + len(image) + 2000 < room:
                    text += image
                    continue
            left_out.append(name)
    if left_out:
        text += f"\nNot drawn here: {', '.join(left_out)[:1500]}.\n"
    return text


def gates_text(gates: Sequence[str]) -> str:
    """The part of a report that lists the gates that have fired; "" without any."""
    return "## Gates that fired\n\n" + "".join(f"- {_plain(gate)}\n" for gate in gates) if gates else ""


def _answers(answers: Sequence[Row]) -> str:
    """The answers of the last rollout that logged any."""
    if not answers:
        return ""
    step = answers[-1].get("step")
    rows = [row for row in answers if row.get("step") == step][:MOST_ANSWERS]
    lines = [f"| {_plain(r['prompt'])} | {_plain(r['answer'])} | {number(r.get('score'))} |" for r in rows]
    head = f"## Answers of rollout {step}\n\n| prompt | answer | score |\n|---|---|---|\n"
    return head + "\n".join(lines) + "\n"


def _checkpoints(found: Sequence[Checkpoint]) -> str:
    if not found:
        return ""
    lines = [
        f"| {c.position}{', kept' if c.kept else ''} | {c.attempt} | {c.created} | {size(sum(p.size for p in c.parts))} |"
        for c in found
    ]
    return "## Checkpoints\n\n| at | attempt | made | size |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"


def _plain(text: str, most: int = 300) -> str:
    """Text of a model or a prompt in a cell: nothing in it is markup, no line ends the row."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    shown = " ".join(shown.split())
    shown = shown if len(shown) <= most else shown[: most - 1] + "…"
    return "".join(f"&#{ord(c)};" if c in "|`*_[]\\~#!$" else escape(c) for c in shown)
