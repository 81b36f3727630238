"""What state an unpublished artifact is in, concluded from what its newest attempt has left in the store.

Pure functions on records that `status` has read. A holder lives if its heartbeat was seen to change not long ago, on the clock
here; before that has been seen, if the time it says is not long ago, which is wrong only where two machines' clocks differ by more
than the lease's limit. A process of this machine that is gone is known to be gone at once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

from pydantic import ValidationError

from rlhf_core.checkpoints import NAME, Phase, Position
from rlhf_core.ends import Failure
from rlhf_core.failures import RULES
from rlhf_core.inventory import as_time
from rlhf_core.layout import is_marker
from rlhf_core.lease import TTL_SECONDS, Heartbeat

State = Literal[
    "running", "waiting", "resumable", "failed", "stopped", "stale lease", "published", "damaged", "not begun"
]
STOPPED = {"KeyboardInterrupt": "by Ctrl-C", "done": "after its result was made; run it again to publish that"}


@dataclass(frozen=True)
class Sight:
    """One artifact as it was seen.

    Attributes:
        id: of the artifact.
        state: of it; resumable: nothing runs, and the next attempt goes on from `checkpoint`.
        note: why it is so, in one line; empty where the state says it all.
        attempt: the newest one; of a published artifact the one that made it.
        hosts: where that ran or runs.
        event: how far it is: time, step, total, unit, phase, and metrics; of a published artifact the metrics alone.
        eta: seconds until the phase ends at its present speed.
        age: seconds since the last sign of life of a job that has not ended.
        checkpoint: the one with the most progress.
        touched: when something last happened, by the clock of who wrote it.
    """

    id: str
    state: State
    note: str = ""
    attempt: int | None = None
    hosts: tuple[str, ...] = ()
    event: Mapping[str, Any] = field(default_factory=dict)
    eta: float | None = None
    age: float | None = None
    checkpoint: Position | None = None
    touched: datetime | None = None


@dataclass
class Pulse:
    """A heartbeat as it was last read; since when it has been so, in seconds on the monotonic clock here."""

    data: bytes
    since: float
    changed: bool = False  # seen to change, and not only found so

    @property
    def beat(self) -> Heartbeat | None:
        """What it says; None: not readable, but that it changes still tells that its holder lives."""
        try:
            return Heartbeat.model_validate_json(self.data)
        except ValidationError:
            return None

    @property
    def over(self) -> bool:
        """Whether its holder has ended, or is known to be gone."""
        beat = self.beat
        return beat is not None and (beat.ended is not None or beat.gone)

    def age(self, monotonic: float, now: datetime) -> float:
        """Seconds since it changed: on the clock here once it was seen to change, else by what it says."""
        here = monotonic - self.since
        said = as_time(self.beat.time) if self.beat else None
        return here if self.changed or said is None else max(here, (now - said).total_seconds())


def best_checkpoint(paths: Iterable[str]) -> Position | None:
    """The checkpoint with the most progress, told by the names of an artifact's markers."""
    names = [NAME.fullmatch(path.rpartition("/")[2]) for path in paths if is_marker(path)]
    found = [Position(step=int(m[1]), phase=_phase(m[2]), update=int(m[3])) for m in names if m]
    return max(found, key=lambda position: position.order, default=None)


def _phase(text: str) -> Phase:
    return text  # pyright: ignore[reportReturnType]  (NAME lets nothing else through)


def judge(
    pulse: Pulse | None, failure: Failure | None, checkpoint: Position | None, age: float, ttl: float = TTL_SECONDS
) -> tuple[State, str]:
    """State and note of an artifact that is not published, though there was an attempt at it.

    Args:
        pulse: of the newest attempt; None: it has given none (yet).
        failure: of that attempt.
        checkpoint: to go on from.
        age: of the pulse, or of the attempt's request, in seconds.
        ttl: after which a silent holder counts as dead.
    """
    beat = pulse.beat if pulse else None
    ended = beat.ended if beat else None
    if failure is None and ended is None and not (beat and beat.gone):
        if age < ttl:
            return "running", ""
        who = f" from {beat.host}, pid {beat.pid}" if beat else ""
        return "stale lease", f"no sign of life{who}; " + _next(checkpoint)
    if failure is not None:
        note = failure_line(failure)
        if not RULES[failure.kind].retry or checkpoint is None:
            return "failed", note
        return "resumable", note
    how = f"its process on {beat.host} (pid {beat.pid}) is gone" if beat and ended is None else _stopped(ended)
    return ("resumable" if checkpoint else "stopped"), how


def failure_line(failure: Failure) -> str:
    """Why an attempt failed, in one line."""
    where = [f"rank {failure.rank}"] if failure.rank is not None else []
    where += [f"on {failure.host}"] if failure.host else []
    return f"{failure.kind}: {' '.join(failure.detail.split())}" + (f" ({' '.join(where)})" if where else "")


def _stopped(ended: str | None) -> str:
    return f"ended {STOPPED.get(ended or '', f'by {ended}')}"


def _next(checkpoint: Position | None) -> str:
    return f"the next run goes on from {checkpoint}" if checkpoint else "the next run begins anew"
