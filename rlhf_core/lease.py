"""The lease on an unfinished artifact: of all schedulers, on whatever machine, one at a time builds it.

The attempt is the lease: its `job.json` is created create-only under the number after the newest one's, and its holder says
every few seconds, in `heartbeat.json` beside it, that it lives. Who wants the artifact watches the newest attempt: one that has
ended, or whose process is seen to be gone from this machine, or whose heartbeat has not changed for `TTL_SECONDS` on the
watcher's own clock (clocks of two machines are never compared), makes room for the next number. A holder that finds a later
attempt beside its own has been taken for dead and gives up. So two may train for a moment, never for long; and as attempts share
no file and publishing is create-only, that moment costs time, not a result. Not here: what holders do, and waiting for them.
"""

import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_core import guard
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.errors import AlreadyExists, ExitCode, IntegrityError, JobFailed, StoreError
from rlhf_core.job import JobSpec
from rlhf_core.sealed import seal, unseal
from rlhf_core.store import Store

BEAT_SECONDS = float(os.environ.get("RLHF_LEASE_BEAT", "10"))  # between two heartbeats of a holder
TTL_SECONDS = float(os.environ.get("RLHF_LEASE_TTL", "60"))  # a heartbeat that stands still for so long is a dead one's
LOOK_SECONDS = min(1.0, BEAT_SECONDS / 4)  # between two looks at another's heartbeat
ENDING_SECONDS = 5.0  # for a last heartbeat


class Heartbeat(BaseModel):
    """What a holder says of itself; readers of another version ignore what they do not know."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    owner: str  # job id
    host: str
    boot_id: str
    pid_namespace: str = ""
    pid: int
    pid_started: int  # clock ticks after boot; a pid alone may be another's by now
    began: str  # ISO UTC, for people, as is `time`
    beat: int
    time: str
    step: int | None = None
    total: int | None = None
    phase: str | None = None
    ended: str | None = None

    @property
    def gone(self) -> bool:
        """Whether the holder's process was on this machine and is no more."""
        if (self.host, self.boot_id, self.pid_namespace) != _here():
            return False
        return not (guard.alive(self.pid) and guard.started(self.pid) == self.pid_started)


class Busy(JobFailed):
    """Another run holds the artifact.

    Attributes:
        attempt: the holder's.
        holder: its last heartbeat; None if it has given none yet.
    """

    def __init__(self, ref: ArtifactRef, attempt: int, holder: Heartbeat | None) -> None:
        self.attempt = attempt
        self.holder = holder
        super().__init__(
            f"{ref.id}: another run is building this artifact ({self.who}); wait for it or end it",
            code=ExitCode.PREEMPTED,
            reason="busy",
        )

    @property
    def who(self) -> str:
        """The holder, for people: host, pid, attempt, how far, since when."""
        if not self.holder:
            return f"attempt {self.attempt}, which has just begun"
        h = self.holder
        far = f", {h.phase} {h.step}/{h.total}" if h.step is not None else ""
        return f"host {h.host}, pid {h.pid}, attempt {self.attempt}{far}, since {h.began}"


def superseded(job: JobSpec) -> JobFailed:
    """The failure of an attempt that has lost its lease."""
    return JobFailed(
        f"{job.output.id}, attempt {job.attempt}: superseded: another run has taken over, as this one was not seen",
        code=ExitCode.PREEMPTED,
        reason="superseded",
    )


def acquire(store: Store, job: JobSpec) -> "Lease":
    """The lease on the job's artifact; its `job` has the attempt's number.

    Raises:
        Busy: another run holds it, or was faster.
        StoreError: the store could not be reached.
    """
    return take(store, job, free_number(store, job.output))


def free_number(store: Store, ref: ArtifactRef) -> int:
    """The number of the next attempt, once no other run holds the artifact; watches for up to TTL_SECONDS.

    Whoever finds its number taken afterwards knows that another was faster; so what is looked up between this and `take`, say
    whether the artifact has been published, still holds when `take` succeeds.

    Raises:
        Busy: a holder was seen to live.
        StoreError: the store could not be reached, so nothing is known of the holder.
    """
    attempt, last = _numbers(store, ref)
    if not attempt or _is_over(seen := _read(store, ref, attempt)):
        return last + 1
    began = time.monotonic()
    while True:
        time.sleep(LOOK_SECONDS)
        asked = time.monotonic()  # before the look: this process may itself be suspended between the two
        now = _read(store, ref, attempt)
        if _is_over(now):
            return last + 1
        if now != seen:
            raise Busy(ref, attempt, _parse(now))
        if asked - began >= TTL_SECONDS:
            return last + 1
        if time.monotonic() - asked > BEAT_SECONDS:
            began = time.monotonic()  # the store was in trouble, and the holder could not reach it either


def take(store: Store, job: JobSpec, number: int) -> "Lease":
    """Create the attempt with this number, and with it the lease.

    Raises:
        Busy: another run was faster.
        StoreError: the store could not be reached.
    """
    job = job.model_copy(update={"attempt": number})
    key = f"{job.folder}/job.json"
    try:
        store.write(key, seal(job), create=True)
    except AlreadyExists:
        # A write whose answer got lost is tried again by the store's client, which then finds its own object.
        if not _is_ours(store, job, key):
            raise Busy(job.output, number, _parse(_read(store, job.output, number))) from None
    newest, _ = _numbers(store, job.output)
    if newest > number:
        raise Busy(job.output, newest, _parse(_read(store, job.output, newest)))
    return Lease(store, job)


class Lease:
    """One attempt's hold on its artifact: a context manager that gives the heartbeat, and says at its end how it ended.

    While the store cannot be reached the job goes on; if nobody took over meanwhile, so does the lease.

    Attributes:
        job: the launch request with its attempt's number.
    """

    def __init__(self, store: Store, job: JobSpec) -> None:
        self.job = job
        self._store = store
        self._began = _now()
        self._beat = 0
        self._event: dict[str, Any] = {}
        self._ended = ""
        self._told = False
        self._lost = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_stopped, daemon=True, name=f"lease of {job.output.id}")

    @property
    def lost(self) -> bool:
        """Whether another run has taken over, since this one was not seen for too long."""
        return self._lost.is_set()

    def check(self) -> bool:
        """Look now whether another run has taken over; if the store cannot be reached, what is known stands."""
        after = self.job.model_copy(update={"attempt": self.job.attempt + 1})
        with suppress(StoreError, KeyError):
            self._store.read(f"{after.folder}/job.json")
            self._lost.set()
        return self.lost

    def insist(self) -> None:
        """Look as `check` does; JobFailed, reason "superseded", if another run has taken over."""
        if self.check():
            raise superseded(self.job)

    def note(self, event: dict[str, Any]) -> None:
        """Take an event of the job, so that the heartbeat tells how far it is."""
        self._event = event

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = "done" if kind is None else error.reason if isinstance(error, JobFailed) else kind.__name__
        self._stop.set()
        # Not for ever: if the store is down, others will find the process gone, or the heartbeat still.
        self._thread.join(timeout=ENDING_SECONDS)

    def _beat_until_stopped(self) -> None:
        while not self.lost:
            self._try(self._look_and_say)
            if self._stop.wait(BEAT_SECONDS):
                break
        self._stop.wait()
        self._try(lambda: self._say(self._ended))

    def _try(self, act: Callable[[], None]) -> None:
        """Nothing may end this thread: a holder that falls silent is taken for dead. The next beat tries again."""
        try:
            act()
        except StoreError:
            pass  # an outage, which others see as well
        except Exception as error:
            if not self._told:
                self._told = True
                print(f"{self._thread.name}: {type(error).__name__}: {error}; going on", file=sys.stderr, flush=True)

    def _look_and_say(self) -> None:
        # First whether somebody took over: after a suspension or an outage that is likely.
        if not self.check():
            self._say(None)

    def _say(self, ended: str | None) -> None:
        host, boot_id, namespace = _here()
        self._beat += 1
        heartbeat = Heartbeat(
            owner=self.job.job_id,
            host=host,
            boot_id=boot_id,
            pid_namespace=namespace,
            pid=os.getpid(),
            pid_started=guard.started(os.getpid()),
            began=self._began,
            beat=self._beat,
            time=_now(),
            step=self._event.get("step"),
            total=self._event.get("total"),
            phase=self._event.get("phase"),
            ended=ended,
        )
        self._store.write(_key(self.job.output, self.job.attempt), heartbeat.model_dump_json(indent=1).encode())


# --- as the store holds it -------------------------------------------------------------------------------------------


def _key(ref: ArtifactRef, attempt: int) -> str:
    return f"{ref.id}/attempts/{attempt:04d}/heartbeat.json"


def _numbers(store: Store, ref: ArtifactRef) -> tuple[int, int]:
    """The newest attempt, and the highest number that is in use for anything, which may be more; 0 for none."""
    attempts, used = [0], [0]
    for folder in ("attempts", "checkpoints"):
        for key in store.list(f"{ref.id}/{folder}"):
            number, _, name = key.removeprefix(f"{ref.id}/{folder}/").partition("/")
            if number.isdigit():
                used.append(int(number))
                attempts += [int(number)] if folder == "attempts" and name == "job.json" else []
    return max(attempts), max(used)


def _read(store: Store, ref: ArtifactRef, attempt: int) -> bytes | None:
    """The heartbeat as it is; None if there is none (yet, or since the attempt is one of an older version)."""
    try:
        return store.read(_key(ref, attempt))
    except KeyError:
        return None


def _parse(data: bytes | None) -> Heartbeat | None:
    if data is None:
        return None
    try:
        return Heartbeat.model_validate_json(data)
    except ValidationError:
        return None  # damaged: that it changes still tells that its holder lives


def _is_over(data: bytes | None) -> bool:
    heartbeat = _parse(data)
    return heartbeat is not None and (heartbeat.ended is not None or heartbeat.gone)


def _is_ours(store: Store, job: JobSpec, key: str) -> bool:
    try:
        return unseal(JobSpec, store.read(key), key).job_id == job.job_id
    except (KeyError, IntegrityError):
        return False


def _here() -> tuple[str, str, str]:
    """Host, its boot and the space of its pids: containers of one machine may share the first two."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node(), boot_id, os.readlink("/proc/self/ns/pid")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
