"""Waiting for another run that builds the same artifact, and going on after a failure without a retry: as long as it makes sense.

A run that comes second shows how far the first one is, on the terminal and as the stage's progress in Prefect, for at most
resources.timeout_hours. A job that was preempted is started again without end, but only while it gets further: two preemptions in
a row without a new checkpoint are a failure, which Prefect counts and delays as any other. A job that ran out of memory is started
again once, if there is a smaller micro-batch that has not been tried.
"""

import time
from collections.abc import Callable
from typing import Any

from rlhf_core import checkpoints
from rlhf_core.artifacts import retired_before
from rlhf_core.errors import JobFailed
from rlhf_core.lease import Busy
from rlhf_core.next_attempt import tried, worth_halving
from rlhf_core.plan import StagePlan
from rlhf_core.store import Store

VAIN = 2  # preemptions in a row without progress


class Waiting:
    """How long one call of `build_stage` has waited for other runs, and how often its job was preempted."""

    def __init__(
        self,
        store: Store,
        planned: StagePlan,
        seconds: float,
        on_event: Callable[[dict[str, Any]], None],
        tell: Callable[[str], None],
    ) -> None:
        """`seconds`: the longest wait for other runs; `on_event` is shown their progress, `tell` a line for each of them."""
        self._store, self._planned, self._on_event, self._tell = store, planned, on_event, tell
        self._until = time.monotonic() + seconds
        self._told: int | None = None  # the attempt that was told of last
        self._order: tuple[int, ...] = ()  # of the newest checkpoint after the last preemption
        self._in_vain = 0
        self._halved = False

    def wait_for(self, busy: Busy) -> None:
        """Show how far the other run is; the lease has watched it for a while already, so there is no delay here.

        Raises:
            Busy: it has taken too long.
        """
        if time.monotonic() > self._until:
            raise busy
        if self._told != busy.attempt:
            self._tell(
                f"{self._planned.stage}: waiting for another run that builds it ({busy.who}); "
                "Ctrl-C ends this waiting and leaves the other alone"
            )
            self._told = busy.attempt
        step, total = (busy.holder.step, busy.holder.total) if busy.holder else (None, None)
        phase = "waiting for another run"
        self._on_event({"step": step or 0, "total": total or 0, "unit": "step", "phase": phase, "metrics": {}})

    def go_on(self, error: JobFailed) -> None:
        """Count a preemption.

        Raises:
            JobFailed: it is the second in a row without progress.
        """
        ref = self._planned.ref
        found = checkpoints.newest(self._store, ref, since=retired_before(self._store, ref))
        before, self._order = self._order, found.position.order if found else ()
        self._in_vain = 0 if self._order > before else self._in_vain + 1
        if self._in_vain == VAIN:
            raise JobFailed(
                f"{error}\nPreempted {VAIN} times without getting further: let it save more often "
                "(resources.checkpoint.every_minutes), or give it longer to save (grace_seconds).",
                code=1,  # not 75, which would have whoever started this run start it again, for ever
                reason="preempted in vain",
            ) from error

    def go_on_with_less(self, error: JobFailed) -> None:
        """After a job that ran out of memory: the next one has less, if that is worth trying.

        Raises:
            JobFailed: it is not, or has been tried.
        """
        ref = self._planned.ref
        since = retired_before(self._store, ref)
        if not self._halved and worth_halving(self._store, ref, since):
            self._halved = True
            return
        if advice := tried(self._store, ref, since):
            error.args = (f"{error}\n{advice}",)
        raise error
