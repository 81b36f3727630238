"""The output of a running job: progress events to the caller, other lines to the log, both to the store.

The job writes to a local file that is followed here; nothing the control plane does can block a rank that prints. The log in
the store is at most a minute behind while the job runs and whole when it has ended, also after a failure. A full local disk costs
the log its end and not the run its life: the job fails of it by itself, if it does, and may be started again.
"""

import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rlhf_core.errors import StoreError
from rlhf_core.job import PROGRESS, JobSpec, parse_progress
from rlhf_core.store import Store

UPLOAD_SECONDS = 60.0  # the log in the store is at most this much behind


class JobLog:
    """The job's output: events to the caller, other lines to log.txt, both to the attempt's folder in the store."""

    def __init__(
        self, store: Store, job: JobSpec, on_event: Callable[[dict[str, Any]], None], on_line: Callable[[str], None]
    ) -> None:
        self.store = store
        self.job = job
        self.on_event = on_event
        self.on_line = on_line
        self.folder = Path(tempfile.mkdtemp(prefix="rlhf-job-"))
        self.raw = self.folder / "output"
        self.raw.touch()
        self.tail: deque[str] = deque(maxlen=400)
        self._source = self.raw.open("rb")
        self._text = (self.folder / "log.txt").open("w")
        self._events = (self.folder / "metrics.jsonl").open("w")
        self._lines: deque[bytes] = deque()
        self._rest = b""
        self._written: dict[TextIO, int] = {self._text: 0, self._events: 0}  # characters
        self._cut: OSError | None = None  # why some of the log is missing
        self._uploaded = (time.monotonic(), 0)  # when, how much of the log

    def read(self) -> int:
        """Take what was written since the last call; returns the number of progress events in it."""
        events = 0
        while self._fill():
            events += self._take(self._lines.popleft())
        when, size = self._uploaded
        if time.monotonic() - when > UPLOAD_SECONDS and self._written[self._text] > size:
            self._upload()
        return events

    def _fill(self) -> bool:
        """Split more of the output into lines, if none is waiting; False if there is no whole line."""
        while not self._lines and (data := self._source.read(1 << 18)):
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines.extend(lines)
            if b"\r" in self._rest and PROGRESS.encode() not in self._rest:  # a progress bar that rewrites its line
                self._rest = self._rest[self._rest.rindex(b"\r") :]
        return bool(self._lines)

    def wait(self, seconds: float) -> None:
        """Read for some seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.read()
            time.sleep(0.05)

    def _take(self, line: bytes) -> int:
        text, event = split_progress(line.decode(errors="replace"))
        text = text.rstrip("\r").rpartition("\r")[2]
        if event is not None:
            seconds = round(time.time(), 3)
            self._write(self._events, json.dumps({"time": seconds, **event}) + "\n")
            self.on_event(event)
        if text or event is None:
            self.tail.append(text)
            self._write(self._text, text + "\n")
            self.on_line(text)
        return int(event is not None)

    def note(self, message: str) -> None:
        """A line of ours in the log, with the time."""
        self._write(self._text, f"# {datetime.now(UTC).isoformat(timespec='seconds')} {message}\n")

    def _write(self, file: TextIO, text: str) -> None:
        self._written[file] += len(text)
        try:
            file.write(text)
        except OSError as error:
            self._cut = self._cut or error

    def close(self) -> str:
        """Upload what is there; returns where the log is now: in the store, or on this machine if the store fails."""
        if self._rest:
            self._take(self._rest + b"\n")
            self._rest = b""
        error = self._upload()
        for file in (self._source, self._text, self._events):
            with suppress(OSError):  # it would write what is left, and has said why it cannot
                file.close()
        if error:
            return f"{self.folder}/log.txt (not stored: {error})"
        shutil.rmtree(self.folder, ignore_errors=True)
        missing = f" (not all of it: {self._cut})" if self._cut else ""
        return f"{self.store.url}/{self.job.folder}/log.txt{missing}"

    def _upload(self) -> StoreError | None:
        for file in self._written:
            try:
                file.flush()
            except OSError as error:
                self._cut = self._cut or error
        self._uploaded = (time.monotonic(), self._written[self._text])
        try:
            self.store.upload(self.folder / "log.txt", f"{self.job.folder}/log.txt")
            if self._written[self._events]:
                self.store.upload(self.folder / "metrics.jsonl", f"{self.job.folder}/metrics.jsonl")
        except StoreError as error:
            return error
        return None


def split_progress(line: str) -> tuple[str, dict[str, Any] | None]:
    """A line without its progress event, and the event.

    Ranks share one output and a line is not always one write, so an event may stand behind or before another's text.
    """
    start = line.find(PROGRESS)
    if start < 0:
        return line, None
    try:
        end = json.JSONDecoder().raw_decode(line, start + len(PROGRESS))[1]
    except ValueError:
        return line, None
    return line[:start] + line[end:], parse_progress(line[start:end])
