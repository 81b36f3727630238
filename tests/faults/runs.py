"""One control-plane process of a chain: what it tells, which processes its job has, and waiting for a moment in it.

A moment is "so many progress events of that phase" or "so many checkpoints before that phase", and some milliseconds more; or some
seconds after the job was started, when it imports and joins. Processes are found by RLHF_JOB_ID and by what they run.
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import ROOT

from rlhf_core import checkpoints, guard
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.launch import TRAIN
from rlhf_core.store import Store

MODULES = {"launcher": "deepspeed.launcher.launch", "guard": "rlhf_core.guard"}
SAVED = ("rollout", "score", "update", "saved")
HURRY_SECONDS = 240


@dataclass(frozen=True)
class Moment:
    """When to strike.

    Attributes:
        after: "start" of the job; "rollout", "score" or "update": a checkpoint of PPO with that to come; "saved": any
            checkpoint; else the beginning of the phase of a progress event.
        count: so many of them since the last blow.
        delay: seconds more.
    """

    after: str
    count: int = 1
    delay: float = 0.0


def until(condition: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < end:
        time.sleep(0.03)
    return answer


class Run:
    """One process that builds a stage.

    Attributes:
        events: what it has told so far.
    """

    def __init__(
        self, argv: list[str], environment: dict[str, str], log: Path, store: Store, ref: ArtifactRef, family: str
    ) -> None:
        self.store, self.ref, self.family, self.log = store, ref, family, log
        self.events: list[dict[str, Any]] = []
        self.old_jobs: set[str] = set()  # of processes that lived before, or were ended here
        self.old_jobs = self.jobs()
        self._known = set(checkpoints.marker_keys(store, ref))
        self._saved: set[str] = set()
        self._from = 0  # first event of the job that runs now
        self._after = 0  # first event after the last blow
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith("{"):
                self.events.append(json.loads(line))

    # --- moments -------------------------------------------------------------------------------------------------------

    def reaches(self, moment: Moment) -> bool:
        """Wait for a moment; False: the process ended before."""
        end = time.monotonic() + HURRY_SECONDS
        while not self._is_at(moment):
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, f"{moment} was not reached: {self.tail()}"
            time.sleep(0.03)
        time.sleep(moment.delay)
        return self.process.poll() is None

    def _is_at(self, moment: Moment) -> bool:
        if moment.after == "start":
            return bool(self.jobs())
        if moment.after in SAVED:
            self._saved |= set(checkpoints.marker_keys(self.store, self.ref)) - self._known
            return sum(moment.after == "saved" or f"-{moment.after}-" in key for key in self._saved) >= moment.count
        found = [e for e in self.events[self._after :] if str(e.get("phase", "")).startswith(moment.after)]
        return len(found) >= moment.count

    def struck(self) -> None:
        """Count for the next moment from now on."""
        self._after = len(self.events)
        self._known |= set(checkpoints.marker_keys(self.store, self.ref))
        self._saved = set()

    def next_job(self) -> None:
        """What is told and found from now on belongs to the job that comes next."""
        self.old_jobs |= self.jobs()
        self._from = self._after = len(self.events)

    @property
    def reached(self) -> int:
        """Steps that the job which runs now has told."""
        steps = [e["step"] for e in self.events[self._from :] if e.get("phase") == "train"]
        return max(steps, default=0)

    @property
    def how(self) -> str | None:
        """How the stage came to be; None if it is not finished, or not told."""
        return next((e["how"] for e in reversed(self.events) if "how" in e), None)

    # --- processes -----------------------------------------------------------------------------------------------------

    def jobs(self) -> set[str]:
        """Ids of the jobs that run now, but the old ones."""
        guards = [p for p in guard.processes_of(self.family) if guard.python_module(p) == MODULES["guard"]]
        return {guard.variable(p, "RLHF_JOB_ID") or "" for p in guards} - self.old_jobs - {""}

    def job(self) -> str:
        """The job's id; "" if none runs."""
        return next(iter(self.jobs()), "")

    def find(self, what: str, seconds: float = 15) -> int | None:
        """The process that is "rank N", "launcher" or "guard"; waits for it while the job starts."""
        until(lambda: self._find(what) or self.process.poll() is not None, seconds)
        return self._find(what)

    def _find(self, what: str) -> int | None:
        job = self.job()
        members = guard.processes_of(job) if job else set()
        kind, _, number = what.partition(" ")
        if kind != "rank":
            return next((p for p in members if guard.python_module(p) == MODULES[what]), None)
        ranks = {p for p in members if guard.python_module(p) == TRAIN and guard.variable(p, "RANK") in (number, None)}
        return next((p for p in ranks if guard.parent(p) not in ranks), None)

    def wait(self, seconds: float = HURRY_SECONDS) -> int:
        """Its exit code."""
        code = self.process.wait(seconds)
        self._reader.join(5)
        return code

    def end(self) -> None:
        """Leave nothing of it behind, however the test went."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        guard.end(lambda: guard.processes_of(self.family), 3)

    def tail(self) -> str:
        return f"{self.events[-2:]} … {self.log.read_text(errors='replace')[-4000:]}"


def kill(pid: int, signo: int = signal.SIGKILL) -> bool:
    """Signal a process; False if it is gone."""
    try:
        os.kill(pid, signo)
    except ProcessLookupError:
        return False
    return True
