"""The output of a running job: progress events to the caller, other lines to the logs, all to the store.

The launcher writes to one local file and every rank to its own, which are followed here; nothing the control plane does can block
a rank that prints. In the store lie `log.txt`, all lines as they came, with "[3] " before rank 3's if there are several, and
`rank-003.log`, one rank's lines with their times. They are at most a minute behind while the job runs, in a local store a few
seconds, and whole when it has ended, also after a failure. A full local disk costs the logs their end and not the run its life: the
job fails of it by itself, if it does, and may be started again. Only what rank 0 (or a job without ranks) tells is progress of the
job.
"""

import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rlhf_core.errors import StoreError
from rlhf_core.job import PROGRESS, JobSpec, parse_progress
from rlhf_core.ranklog import LOG, Line, ranks_folder, stamped
from rlhf_core.store import Store

JOB_LOG = "log.txt"
UPLOAD_SECONDS = 60.0  # the logs in the store are at most this much behind
LOCAL_SECONDS = 5.0  # the same where storing is a copy on a disk, as long as the logs are short
LOCAL_CHARACTERS = 1 << 24
CHUNK = 1 << 18  # bytes
ROUNDS = 64  # of a chunk from every file in one call: who prints faster than that keeps nobody from looking at limits


def _ignore(*_: object) -> None: ...


class JobLog:
    """The job's output: events to the caller, other lines to the logs, all to the attempt's folder in the store.

    Attributes:
        folder: the job's local folder.
        tail: the last lines of the log.
        ranks: each rank's last progress event and when it came, in seconds since the epoch.
    """

    def __init__(
        self,
        store: Store,
        job: JobSpec,
        on_event: Callable[[dict[str, Any]], None] = _ignore,
        on_line: Callable[[str], None] = _ignore,
        *,
        on_record: Callable[[float, int | None, str], None] = _ignore,
        name: str = JOB_LOG,
    ) -> None:
        """Begin with an empty log.

        Args:
            store: where the logs go.
            job: whose they are.
            on_event: given each progress event of the job.
            on_line: given each line as it is in the log.
            on_record: given time, rank and text of each line, as a `Line` has them.
            name: of the log in the store.
        """
        self.store = store
        self.job = job
        self.on_event = on_event
        self.on_line = on_line
        self.on_record = on_record
        self.folder = Path(tempfile.mkdtemp(prefix="rlhf-job-"))
        self.raw = self.folder / "output"
        self.raw.touch()
        self.tail: deque[str] = deque(maxlen=400)
        self.ranks: dict[int, tuple[float, dict[str, Any]]] = {}
        self._many = job.resources.processes > 1 or job.resources.launcher != "local"
        self._launcher = _Source(self.raw)
        self._ranks: dict[int, _Source] = {}
        self._text = _Stored(self.folder / name)
        # Of several nodes' logs only the one that is the job's own goes with its metrics.
        self._events = _Stored(self.folder / "metrics.jsonl") if name == JOB_LOG else None
        self._own: dict[int, _Stored] = {}
        self._milliseconds = 0
        self._uploaded = time.monotonic()

    def read(self) -> int:
        """Take what was written since the last call; returns the number of progress events of the job in it."""
        events = 0
        self._find_ranks()
        for _ in range(ROUNDS):
            if (found := self._round()) is None:
                break
            events += found
        if time.monotonic() - self._uploaded > self._between:
            self._upload()
        return events

    @property
    def _between(self) -> float:
        """Seconds between two uploads."""
        cheap = self.store.scheme == "file" and sum(file.written for file in self._stored()) < LOCAL_CHARACTERS
        return min(LOCAL_SECONDS, UPLOAD_SECONDS) if cheap else UPLOAD_SECONDS

    def _find_ranks(self) -> None:
        """Follow the logs of ranks that have begun meanwhile; the launcher's comes first, then theirs in order."""
        for file in sorted(ranks_folder(self.folder).glob("rank-*.log")):
            if (match := LOG.fullmatch(file.name)) and (rank := int(match[1])) not in self._ranks:
                self._ranks[rank] = _Source(file)
                self._own[rank] = _Stored(self.folder / file.name)
                self._ranks = dict(sorted(self._ranks.items()))

    def _round(self) -> int | None:
        """Take a chunk of every file; None: there was nothing."""
        sources = [(None, self._launcher), *self._ranks.items()]
        if not any([source.fill() for _, source in sources]):
            return None
        self._tick()
        events = 0
        for rank, source in sources:
            while source.lines:
                events += self._take(rank, source.lines.popleft())
        return events

    def _tick(self) -> None:
        """Go on to the time that the next lines get: a later one than those before, so that by time they are as they came."""
        self._milliseconds = max(self._milliseconds + 1, time.time_ns() // 1_000_000)

    @property
    def _now(self) -> float:
        return self._milliseconds / 1000

    def wait(self, seconds: float) -> None:
        """Read for some seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.read()
            time.sleep(0.05)

    def _take(self, rank: int | None, line: bytes) -> int:
        text, event = split_progress(line.decode(errors="replace"))
        text = text.rstrip("\r").rpartition("\r")[2]
        if text or event is None:
            self._keep(Line(self._now, rank, text))
        if event is None:
            return 0
        self.ranks[rank or 0] = (self._now, event)
        if rank:
            return 0
        if self._events:
            kept = {
                key: value for key, value in event.items() if key != "logged"
            }  # the artifact's metrics.jsonl has it
            self._events.write(json.dumps({"time": round(self._now, 3), **kept}) + "\n")
        self.on_event(event)
        return 1

    def _keep(self, line: Line) -> None:
        shown = line.text if line.rank is None or not self._many else f"[{line.rank}] {line.text}"
        self.tail.append(shown)
        self._text.write(shown + "\n")
        if line.rank is not None:
            self._own[line.rank].write(stamped(line) + "\n")
        self.on_record(*line)
        self.on_line(shown)

    def note(self, message: str) -> None:
        """A line of ours in the log, with the time."""
        self._text.write(f"# {datetime.now(UTC).isoformat(timespec='seconds')} {message}\n")

    def close(self) -> str:
        """Upload what is there; returns where the log is now: in the store, or on this machine if the store fails."""
        self._find_ranks()
        while self._round() is not None:
            pass
        self._tick()
        for rank, source in [(None, self._launcher), *self._ranks.items()]:
            if source.rest:
                self._take(rank, source.rest)
            source.file.close()
        error = self._upload()
        for file in self._stored():
            file.close()
        if error:
            return f"{self._text.path} (not stored: {error})"
        shutil.rmtree(self.folder, ignore_errors=True)
        cut = next((file.cut for file in self._stored() if file.cut), None)
        missing = f" (not all of it: {cut})" if cut else ""
        return f"{self.store.url}/{self.job.folder}/{self._text.path.name}{missing}"

    def _stored(self) -> list["_Stored"]:
        return [self._text, *filter(None, [self._events]), *(self._own[rank] for rank in sorted(self._own))]

    def _upload(self) -> StoreError | None:
        self._uploaded = time.monotonic()
        for file in self._stored():
            if file.stored == file.written or not file.path.is_file():
                continue
            written = file.written
            file.flush()
            try:
                self.store.upload(file.path, f"{self.job.folder}/{file.path.name}")
            except StoreError as error:
                return error
            file.stored = written
        return None


class _Source:
    """A file that grows, and the lines in it that have not been taken yet."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("rb")
        self.lines: deque[bytes] = deque()
        self.rest = b""  # of a line whose end is not there yet

    def fill(self) -> bool:
        """Read a chunk; whether there was one, or lines of an earlier one are left."""
        data = self.file.read(CHUNK)
        if data:
            *lines, self.rest = (self.rest + data).split(b"\n")
            self.lines.extend(lines)
            if b"\r" in self.rest and PROGRESS.encode() not in self.rest:  # a progress bar that rewrites its line
                self.rest = self.rest[self.rest.rindex(b"\r") :]
        return bool(data or self.lines)


class _Stored:
    """A file that is written here and stored from time to time; a full disk costs it its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = self.stored = 0  # characters
        self.cut: OSError | None = None  # why some of it is missing
        self._file: TextIO | None = None
        with self._noting():
            self._file = path.open("w")

    def write(self, text: str) -> None:
        self.written += len(text)
        with self._noting():
            if self._file:
                self._file.write(text)

    def flush(self) -> None:
        with self._noting():
            if self._file:
                self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # it would write what is left, and has said why it cannot
            if self._file:
                self._file.close()

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.cut = self.cut or error


def split_progress(line: str) -> tuple[str, dict[str, Any] | None]:
    """A line without its progress event, and the event.

    Ranks may share one output and a line is not always one write, so an event may stand behind or before another's text.
    """
    start = line.find(PROGRESS)
    if start < 0:
        return line, None
    try:
        end = json.JSONDecoder().raw_decode(line, start + len(PROGRESS))[1]
    except ValueError:
        return line, None
    return line[:start] + line[end:], parse_progress(line[start:end])
