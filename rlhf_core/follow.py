"""The log of an attempt as it comes to the store: what is new since the last look, and how the attempt stands.

One look is one listing of the artifact's attempts, one ranged read for each log that has grown, and one of the heartbeat. Lines of
all ranks that come with one look are given by time; a rank whose log is stored later than another's comes after it. A stage without
ranks (data) has one log, whose lines have no time. Not here: `ranklog.merged`, which reads whole logs through the disk.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime

from rlhf_core.artifacts import MANIFEST
from rlhf_core.ends import Failure
from rlhf_core.errors import IntegrityError
from rlhf_core.job import JobSpec
from rlhf_core.joblog import JOB_LOG
from rlhf_core.lease import TTL_SECONDS
from rlhf_core.ranklog import LOG, Line, unstamped
from rlhf_core.sealed import unseal
from rlhf_core.sight import Pulse
from rlhf_core.store import Store

BETWEEN_SECONDS = 30.0  # beyond the delay of a retry, in which another attempt may begin


@dataclass
class _Log:
    """How far a log has been read."""

    offset: int = 0
    rest: bytes = b""  # of a line whose end is not there yet
    last: float = 0.0  # time of the last line


@dataclass
class Attempt:
    """One attempt that is followed.

    Attributes:
        store: where it is.
        folder: in the store.
        pulse: its last heartbeat; None: it has given none yet.
        failure: why it has failed, once that is stored.
    """

    store: Store
    folder: str
    pulse: Pulse | None = None
    failure: Failure | None = None
    _logs: dict[str, _Log] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)

    @property
    def number(self) -> int:
        """Which attempt it is."""
        return int(self.folder.rpartition("/")[2])

    @property
    def over(self) -> bool:
        """Whether it has ended, or its holder is gone or has been silent for too long."""
        return self.failure is not None or (self.pulse.over if self.pulse else False) or self.silent

    @property
    def silent(self) -> bool:
        """Whether its holder has shown no sign of life for longer than the lease allows."""
        return self.age() > TTL_SECONDS

    @property
    def stopped(self) -> bool:
        """Whether its run was ended by somebody, and has said so."""
        beat = self.pulse.beat if self.pulse else None
        return beat is not None and beat.ended is not None

    @property
    def ended(self) -> str:
        """How it ended, for people, where it has left no failure."""
        beat = self.pulse.beat if self.pulse else None
        if beat and beat.ended:
            return "by Ctrl-C" if beat.ended == "KeyboardInterrupt" else f"by {beat.ended}"
        return "without a word: its process is gone" if beat and beat.gone else "without a word: no sign of life"

    def age(self) -> float:
        """Seconds since its last sign of life."""
        now = time.monotonic()
        return self.pulse.age(now, datetime.now(UTC)) if self.pulse else now - self._since

    def look(self, listed: Mapping[str, int]) -> None:
        """Read the heartbeat and, once it is there, the failure; `listed`: the keys below the artifact's attempts."""
        if f"{self.folder}/failure.json" in listed and self.failure is None:
            with suppress(KeyError, IntegrityError):
                key = f"{self.folder}/failure.json"
                self.failure = unseal(Failure, self.store.read(key), key)
        if self.pulse is None or not self.pulse.over:
            with suppress(KeyError):
                data = self.store.read(f"{self.folder}/heartbeat.json")
                if self.pulse is None or self.pulse.data != data:
                    self.pulse = Pulse(data, time.monotonic(), changed=self.pulse is not None)

    def patience(self) -> float:
        """Seconds after its end in which the run that made it may begin another attempt."""
        delay = 0.0
        with suppress(KeyError, IntegrityError):
            key = f"{self.folder}/job.json"
            delay = unseal(JobSpec, self.store.read(key), key).resources.retry_delay_seconds
        return delay + BETWEEN_SECONDS

    def new_lines(self, listed: Mapping[str, int]) -> list[Line]:
        """The lines that have come since the last call, by time."""
        names = {key.removeprefix(f"{self.folder}/"): key for key in listed if key.startswith(f"{self.folder}/")}
        logs = {int(match[1]): key for name, key in names.items() if (match := LOG.fullmatch(name))}
        found = [line for rank, key in sorted(logs.items()) for line in self._read(key, listed[key], rank)]
        if not logs and JOB_LOG in names and (self.folder.startswith("data/") or self.over):
            return self._read(names[JOB_LOG], listed[names[JOB_LOG]], None)
        return sorted(found, key=lambda line: line.time)

    def _read(self, key: str, size: int, rank: int | None) -> list[Line]:
        log = self._logs.setdefault(key, _Log())
        if size <= log.offset:
            return []
        try:
            data = self.store.read(key, log.offset, size)
        except KeyError:  # removed since it was listed
            return []
        log.offset += len(data)
        *lines, log.rest = (log.rest + data).split(b"\n")
        found = []
        for raw in lines:
            text = raw.decode(errors="replace")
            line = Line(0.0, None, text) if rank is None else unstamped(text, rank, log.last)
            log.last = line.time
            found.append(line)
        return found


def is_published(store: Store, id: str) -> bool:
    """Whether the artifact of this id has a manifest."""
    try:
        store.read(f"{id}/{MANIFEST}", 0, 1)
    except KeyError:
        return False
    return True
