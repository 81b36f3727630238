"""What each rank leaves on its machine, in the folder that RLHF_RANKS names: a log of its own, and its last words.

A rank turns its output to `rank-003.log` before it does anything else, so that nobody has to guess who said what, and on its
way out writes `rank-003.json`, a `RankEnd`. Whoever follows the job stores the log with the time before every line (`joblog`)
and reads the last words when all is over (`ends_of`). Writing them never raises and never waits: a rank that cannot say why
it ends still ends, as a silent one. Without RLHF_RANKS, as in scripts of one's own, nothing of this happens.
"""

import heapq
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ValidationError

from rlhf_core.ends import RankEnd
from rlhf_core.store import Store

RANKS = "RLHF_RANKS"
TRACE_CHARACTERS = 20_000
ERROR_CHARACTERS = 2_000
ROOM, ROOM_BYTES = ".room", 1 << 16  # a file kept for last words, which a full disk would refuse
FATAL_BYTES = 1 << 16  # of a log's end, where a rank that crashed has left its stacks
FATAL = re.compile(r"^Fatal Python error: (.*)$", re.MULTILINE)
FATAL_SIGNALS = {"Segmentation fault": 11, "Aborted": 6, "Bus error": 7, "Illegal instruction": 4}
FATAL_BEFORE = 20  # lines before it, in which C++ says what it was
LOG = re.compile(r"rank-(\d{3,})\.log")

_redirected = False


class Line(NamedTuple):
    """A line of a job's output: when it came (seconds since the epoch), from which rank (None: the launcher), its text."""

    time: float
    rank: int | None
    text: str


def ranks_folder(folder: Path) -> Path:
    """Where in a job's local folder its ranks leave their logs and last words."""
    return folder / "ranks"


def log_name(rank: int) -> str:
    """Name of a rank's log, here and in the store."""
    return f"rank-{rank:03d}.log"


def record_name(rank: int) -> str:
    """Name of a rank's last words."""
    return f"rank-{rank:03d}.json"


# --- in the rank -----------------------------------------------------------------------------------------------------


def redirect() -> None:
    """Turn all that this process writes, from C++ too, to its own log; to be called before anything else."""
    global _redirected
    folder, rank = os.environ.get(RANKS), os.environ.get("RANK")
    if not folder or rank is None:
        return
    try:
        log = os.open(Path(folder, log_name(int(rank))), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        print(f"rank {rank} writes where its launcher does: {error}", file=sys.stderr, flush=True)
        return
    with suppress(OSError):
        Path(folder, record_name(int(rank))).with_suffix(ROOM).write_bytes(b" " * ROOM_BYTES)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(log, number)
        stream.reconfigure(line_buffering=True, write_through=False)  # pyright: ignore[reportAttributeAccessIssue]
    os.close(log)
    _redirected = True


def redirected() -> bool:
    """Whether this process has a log of its own."""
    return _redirected


def last_words(
    code: int, error: str = "", trace: str = "", memory: Literal["", "device", "host"] = "", *, told: bool = False
) -> None:
    """Write down how this rank is about to end; what it has said first stands. Never raises.

    Args:
        code: exit code.
        error: what happened, in one line.
        trace: traceback.
        memory: what it ran out of.
        told: it ends because another rank has ended, or since the job is to.
    """
    folder = os.environ.get(RANKS)
    if not folder:
        return
    with suppress(Exception):  # what it was about to say of itself must not get lost in what came of saying it
        rank = int(os.environ.get("RANK", "0"))
        if (file := Path(folder, record_name(rank))).exists():
            return
        end = RankEnd(
            rank=rank,
            time=time.time(),
            code=code,
            told=told,
            error=" ".join(error.split())[:ERROR_CHARACTERS],
            trace=trace[-TRACE_CHARACTERS:],
            memory=memory,
        )
        part = file.with_suffix(f".{threading.get_ident()}")
        words = end.model_dump_json().encode()
        try:
            part.write_bytes(words)
        except OSError:  # the disk is full: into the room that was kept for this
            file.with_suffix(ROOM).replace(part)
            with part.open("r+b") as kept:
                kept.write(words)
                kept.truncate()
        part.replace(file)


# --- beside the ranks ------------------------------------------------------------------------------------------------


def ends_of(folder: Path, first: int = 0, processes: int = 0) -> tuple[tuple[RankEnd, ...], tuple[int, ...]]:
    """How the ranks that left something in a job's local folder have ended, and which of them did so without a word.

    Args:
        folder: the job's local folder.
        first: first rank that was started on this machine.
        processes: how many were; if any of them has begun, those that have not even a log count as silent too.
    """
    place = ranks_folder(folder)
    ends = {end.rank: end for file in sorted(place.glob("rank-*.json")) if (end := _read_end(file))}
    begun = {int(match[1]): file for file in place.glob("rank-*.log") if (match := LOG.fullmatch(file.name))}
    for rank in begun.keys() - ends.keys():
        if end := _fatal(rank, begun[rank]):
            ends[rank] = end
    started = {*begun, *(range(first, first + processes) if begun else ())}
    return tuple(ends[rank] for rank in sorted(ends)), tuple(sorted(started - ends.keys()))


def _read_end(file: Path) -> RankEnd | None:
    try:
        return RankEnd.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _fatal(rank: int, log: Path) -> RankEnd | None:
    """The end of a rank that crashed in C, from what faulthandler wrote into its log."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - FATAL_BYTES))
        text = file.read().decode(errors="replace")
    found = list(FATAL.finditer(text))
    if not found:
        return None
    before = text[: found[-1].start()].splitlines()[-FATAL_BEFORE:]
    said = next((line for line in reversed(before) if "what():" in line or "terminate called" in line), "")
    return RankEnd(
        rank=rank,
        time=log.stat().st_mtime,
        code=-FATAL_SIGNALS.get(found[-1][1].strip(), 6),
        error=" ".join(f"{found[-1][0]} {said}".split())[:ERROR_CHARACTERS],
        trace="\n".join([*before, text[found[-1].start() :]])[:TRACE_CHARACTERS],
    )


# --- logs with the time before each line -----------------------------------------------------------------------------


def stamped(line: Line) -> str:
    """A line as it is stored: its time (ISO, UTC, milliseconds), a space, its text."""
    when = datetime.fromtimestamp(line.time, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return f"{when} {line.text}"


def merged(store: Store, attempt: str) -> Iterator[Line]:
    """The lines of all ranks of an attempt by time, from their stored logs; lines of one rank stay in their order.

    Args:
        store: where the attempt is.
        attempt: its folder, e.g. "sft/base-0123456789ab/attempts/0001".

    Raises:
        StoreError: the store could not be reached.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-logs-") as folder:
        files: dict[int, Path] = {}
        for key in store.list(attempt):
            if match := LOG.fullmatch(key.removeprefix(f"{attempt}/")):
                files[int(match[1])] = local = Path(folder, log_name(int(match[1])))
                store.download(key, local)
        yield from heapq.merge(*(_lines(files[rank], rank) for rank in sorted(files)), key=lambda line: line.time)


def unstamped(stored: str, rank: int, before: float) -> Line:
    """A line of a rank's stored log, without its end; `before`: the time of the one before it, for a line that has none."""
    stamp, _, text = stored.partition(" ")
    try:
        return Line(datetime.fromisoformat(stamp).timestamp(), rank, text)
    except ValueError:  # the last line of a log that a full disk has cut
        return Line(before, rank, text)


def _lines(file: Path, rank: int) -> Iterator[Line]:
    when = 0.0
    with file.open(errors="replace", newline="\n") as lines:
        for line in lines:
            found = unstamped(line.rstrip("\n"), rank, when)
            when = found.time
            yield found
