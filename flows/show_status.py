"""What `rlhf status` prints: one line for each artifact, with as many columns as the terminal has room for.

What has no column goes to a second line below, with its name, so that nothing is cut; so do the reason of a failure and numbers
that are long. Lines are laid out here and not by a rich table, which would fold cells one letter wide on a narrow terminal.
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from flows.prefect_runs import Runs
from rlhf_core.sight import Sight, State
from tasks.headline import duration, headline, latest, speed

COLOURS: Mapping[State, str] = {
    "running": "bold green",
    "waiting": "cyan",
    "resumable": "yellow",
    "failed": "bold red",
    "stopped": "yellow",
    "stale lease": "bold red",
    "published": "green",
    "damaged": "bold red",
    "not begun": "dim",
}
COLUMNS = ("artifact", "state", "progress", "ETA", "tokens/s", "numbers", "seen", "checkpoint", "attempt", "host")
RIGHT = ("ETA", "tokens/s", "seen", "attempt")
LEAVES = (
    "numbers",
    "host",
    "checkpoint",
    "attempt",
    "tokens/s",
    "seen",
    "ETA",
    "progress",
)  # in this order, where room is short
BELOW = {
    "ETA": "ends in {}",
    "tokens/s": "{} tokens/s",
    "seen": "seen {} ago",
    "attempt": "attempt {}",
    "host": "on {}",
}
NUMBERS = 44  # characters; longer ones stand below
GAP = 2
BAR = 10
FIRST_HOSTS = 3


def status_lines(sights: Sequence[Sight], width: int) -> list[Text]:
    """The table for a terminal of this width: its head, then one or two lines for each artifact."""
    rows = [_cells(sight) for sight in sights]
    shown = _columns(rows, width)
    widths = {name: max(cell_len(name), *(cell_len(row[name]) for row in rows)) for name in shown}
    lines = [Text(_line({name: name for name in shown}, widths), style="bold")]
    for sight, row in zip(sights, rows, strict=True):
        line = Text(_line(row, widths))
        start = widths["artifact"] + GAP
        line.stylize(COLOURS[sight.state], start, start + len(sight.state))
        lines.append(line)
        if below := _below(sight, row, shown):
            lines += _indented(below, width, "red" if sight.state in ("failed", "damaged") else "dim")
    return lines


def run_lines(answer: Runs | None, width: int) -> list[Text]:
    """What the Prefect server says, below the table; nothing if there is none."""
    if answer is None:
        return []
    head = f"Prefect  {answer.server or 'the configured server'}"
    if answer.trouble:
        return [Text(), *_indented(f"{head} {answer.trouble}", width, "yellow", "")]
    lines = [Text(), Text(head + ("" if answer.runs else "  nothing active, nothing ended lately"), style="bold")]
    for run in answer.runs:
        lines.append(Text(f"  {run.name}  {run.state}" + (f"  since {run.began}" if run.began else "")))
        lines += _indented(run.url, width, "dim", "    ") if run.url else []
    return lines


def plain_line(sight: Sight) -> str:
    """One artifact as one line, for a log."""
    row = _cells(sight)
    return "  ".join(filter(None, (row["artifact"], row["state"], row["progress"], _below(sight, row, COLUMNS[:3]))))


def as_json(sight: Sight) -> dict[str, Any]:
    """One artifact as plain data; times in seconds."""
    event = dict(sight.event)
    return {
        "artifact": sight.id,
        "stage": sight.id.partition("/")[0],
        "state": sight.state,
        "note": sight.note,
        "attempt": sight.attempt,
        "hosts": sight.hosts,
        "phase": event.get("phase"),
        "step": event.get("step"),
        "total": event.get("total"),
        "unit": event.get("unit"),
        "metrics": event.get("metrics") or {},
        "eta": None if sight.eta is None else round(sight.eta, 1),
        "age": None if sight.age is None else round(sight.age, 1),
        "checkpoint": sight.checkpoint.model_dump() if sight.checkpoint else None,
        "touched": sight.touched.isoformat() if sight.touched else None,
    }


def _cells(sight: Sight) -> dict[str, str]:
    metrics = sight.event.get("metrics") or {}
    stage: Any = sight.id.partition("/")[0]
    alive = sight.state in ("running", "stale lease")
    numbers = headline(stage, metrics) if sight.state == "published" else latest(_without_speed(metrics))
    return {
        "artifact": sight.id,
        "state": sight.state,
        "progress": _progress(sight),
        "ETA": "" if sight.eta is None else _brief(sight.eta),
        "tokens/s": speed(metrics) if alive or sight.state == "published" else "",
        "numbers": numbers,
        "seen": "" if sight.age is None or not alive else _brief(sight.age),
        "checkpoint": str(sight.checkpoint or "") if alive else "",
        "attempt": str(sight.attempt or ""),
        "host": _hosts(sight.hosts),
    }


def _without_speed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "tokens_per_second"}


def _progress(sight: Sight) -> str:
    event = sight.event
    if sight.state in ("resumable", "waiting"):
        return sight.note if sight.state == "waiting" else f"from {sight.checkpoint}"
    if sight.state == "published" or (sight.state != "running" and not event):
        return ""
    if "step" not in event:
        return "starting"
    if (event.get("total") or 0) <= 1:  # phases that have no steps
        return str(event.get("phase") or "")
    far = f"{event['step']}/{event['total']} {event.get('phase') or ''}".rstrip()
    if sight.state != "running":
        return far
    full = min(BAR, BAR * event["step"] // event["total"])
    return f"{'█' * full}{'░' * (BAR - full)} {far}"


def _hosts(hosts: Sequence[str]) -> str:
    more = len(hosts) - FIRST_HOSTS
    return ", ".join(hosts[:FIRST_HOSTS]) + (f" and {more} more" if more > 0 else "")


def _brief(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else duration(seconds)


def _columns(rows: Iterable[Mapping[str, str]], width: int) -> list[str]:
    """The columns that there is room for; one that is empty in all rows is left out anyway."""
    rows = list(rows)
    needed = {name: max((cell_len(row[name]) for row in rows), default=0) for name in COLUMNS}
    shown = [name for name in COLUMNS if needed[name] or name in ("artifact", "state")]
    if needed["numbers"] > NUMBERS and "numbers" in shown:
        shown.remove("numbers")
    for name in LEAVES:
        if sum(max(needed[one], cell_len(one)) + GAP for one in shown) - GAP <= width:
            break
        if name in shown:
            shown.remove(name)
    return shown


def _below(sight: Sight, row: Mapping[str, str], shown: Sequence[str]) -> str:
    """What stands below an artifact's line: why it is so, and what has no column."""
    absent = [name for name in COLUMNS if name not in shown and row[name]]
    if sight.state == "published":  # where it was made is of no interest any more
        absent = [name for name in absent if name == "numbers"]
    words = [BELOW.get(name, "{}").format(row[name]) for name in absent if name != "checkpoint"]
    words += [f"saved {row['checkpoint']}"] if "checkpoint" in absent else []
    note = "" if row["progress"] == sight.note else sight.note
    return "  ".join(filter(None, (note, *words)))


def _line(row: Mapping[str, str], widths: Mapping[str, int]) -> str:
    cells = []
    for name, wide in widths.items():
        space = " " * (wide - cell_len(row[name]))
        cells.append(space + row[name] if name in RIGHT else row[name] + space)
    return (" " * GAP).join(cells).rstrip()


def _indented(text: str, width: int, style: str, indent: str = "  ") -> list[Text]:
    """A text as lines of at most the width, broken between words."""
    lines = textwrap.wrap(text, max(width - len(indent), 20), break_on_hyphens=False)
    return [Text(indent + line, style=style) for line in lines]


def clock() -> str:
    """The time of day, UTC."""
    return datetime.now(UTC).strftime("%H:%M:%S")
