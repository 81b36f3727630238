"""How far a stage is as a whole, when it will be done, and what it has cost: from its progress events alone.

A stage that trains is 5 % before, 90 % while and 5 % after training; evaluations in the midst of it do not move it back.
One that trains nothing shows its phase. Process-hours and cost are those of this run of the task, without its waits for
other runs.
"""

import time
from typing import Any

from rlhf_core.resources import Resources
from rlhf_core.specs import StageName
from tasks.headline import duration

BEFORE, AFTER = 0.05, 0.05


class Pace:
    """Remembers when training began and at which step."""

    def __init__(self, stage: StageName, resources: Resources) -> None:
        """`resources`: the stage's, for the number of processes and their price."""
        self._trains = stage not in ("data", "evaluate")
        nodes = resources.cluster.nodes or (1 if resources.launcher == "local" else None)
        self._processes = resources.processes * nodes if nodes else None  # a hostfile's machines are counted elsewhere
        self._price = resources.price_per_process_hour
        self._began: float | None = None
        self._first: tuple[float, int] | None = None  # of training: when, at which step
        self._train = (0, 0)
        self._now = 0.0
        self.share = 0.0

    def add(self, event: dict[str, Any], now: float | None = None) -> None:
        """Take an event; `now` in seconds of a monotonic clock."""
        self._now = time.monotonic() if now is None else now
        step, total, phase = int(event.get("step") or 0), int(event.get("total") or 0), event.get("phase")
        if phase == "waiting for another run":
            return
        self._began = self._now if self._began is None else self._began
        part = min(1.0, step / total) if total else 0.0
        if not self._trains:
            self.share = part
        elif phase == "train":
            if self._first is None or step < self._train[0]:  # begun, or begun anew from a checkpoint
                self._first = self._now, step
            self._train = step, total
            self.share = BEFORE + (1 - BEFORE - AFTER) * part
        elif self._first is None:
            self.share = max(self.share, BEFORE * part)
        elif self._train[0] >= self._train[1]:
            self.share = max(self.share, 1 - AFTER + AFTER * part)

    @property
    def seconds_left(self) -> float | None:
        """Of training, at the pace of this attempt; None before its first step."""
        if self._first is None or self._train[0] <= self._first[1]:
            return None
        pace = (self._now - self._first[0]) / (self._train[0] - self._first[1])
        return pace * (self._train[1] - self._train[0])

    def describe(self, ended: bool = False) -> str:
        """Time left, process-hours, cost, e.g. "1 min 05 s left  0.21 process-hours  cost 0.63"."""
        parts: list[str] = []
        if not ended and self.seconds_left:
            parts.append(f"{duration(self.seconds_left)} left")
        if self._began is not None and self._processes is not None:
            hours = self._processes * (self._now - self._began) / 3600
            parts.append(f"{hours:.3g} process-hours")
            if self._price is not None:
                parts.append(f"cost {hours * self._price:.2f}")
        return "  ".join(parts)
