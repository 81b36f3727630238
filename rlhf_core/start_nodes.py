"""Launcher `nodes`: nodes that somebody else starts, as Kubernetes does, another batch system, or a person.

Nothing is started or ended here; people are told what to start on each machine. A node that comes finds the attempt in the store,
and one that leaves is noticed by its silence, as everywhere. Until the first one has come they are waited for as long as the job
may last, and then the others for `resources.cluster.start_seconds`. Examples are in `deployments/clusters`.
"""

import shlex
import time
from collections.abc import Sequence

from rlhf_core.errors import StoreError
from rlhf_core.job import JobSpec
from rlhf_core.members import Seat
from rlhf_core.starting import Trouble
from rlhf_core.store import Store

LOOK_SECONDS = 2.0


class NodesStarter:
    """Waits for a job's nodes; see `starting.Starter`."""

    def __init__(self, store: Store, job: JobSpec, seats: Sequence[Seat]) -> None:
        self.store, self.job = store, job
        numbers = "0" if len(seats) == 1 else f"0 to {len(seats) - 1}"
        start = f"{shlex.join(command(store, job))} --node N"
        self._wanted = f"start on each machine, with N from {numbers}: {start}; none has come yet"
        self._come = False
        self._looked = 0.0

    def start(self) -> None:
        """Nothing: nodes come by themselves."""

    def look(self) -> list[Trouble]:
        """Nothing: what becomes of nodes only they tell."""
        return []

    def waits(self) -> str | None:
        """What to start on each machine, until the first node has told anything."""
        if not self._come and time.monotonic() - self._looked > LOOK_SECONDS:
            try:
                self._come = bool(self.store.list(f"{self.job.folder}/nodes"))
            except StoreError:
                pass  # the next look tells
            self._looked = time.monotonic()
        return None if self._come else self._wanted

    def stop(self) -> None:
        """Nothing: nodes end when they are told to, and when they are told nothing any more."""


def command(store: Store, job: JobSpec) -> list[str]:
    """What makes a machine a node of this pipeline's jobs, but for its number."""
    return ["rlhf", "node", job.output.name, "--store", store.url]
