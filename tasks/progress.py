"""Show how a stage's job goes: in the terminal, as Prefect artifacts (progress, report), and as sparse lines of the run's log.

`on_event` only remembers what an event says, so the launcher that calls it never waits. One background thread a stage
does the reporting: the progress artifact is updated in place at most every 5 s, the stage's report (`stage_report`) every
minute and at the end, and the log gets a line at most every 15 s. The terminal is used only if the command line asked
for it (RLHF_TERMINAL=1): a live bar where it is a TTY, else a plain line at most every 10 s. A reporting error is logged
once and then ignored; what failed is sent again with the next update. It never ends or delays a stage.
"""

import contextvars
import logging
import os
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from prefect.artifacts import MarkdownArtifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate

from rlhf_core.artifacts import Manifest, retired_before
from rlhf_core.plan import StagePlan
from rlhf_core.resources import Resources
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from tasks.headline import latest
from tasks.pace import Pace
from tasks.stage_report import EventRows, finished_state, read_stored, stage_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

ARTIFACT_SECONDS = 5.0
LOG_SECONDS = 15.0
LINE_SECONDS = 10.0
REPORT_SECONDS = 60.0
END_SECONDS = 30.0  # for the last report of a stage; what a server does not take by then is given up

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]


class Progress:
    """Reports one stage while its job runs; a context manager."""

    def __init__(self, store: Store, planned: StagePlan, resources: Resources, log: Logger) -> None:
        """`log`: the run logger of the task, which Prefect's UI shows."""
        self.stage: StageName = planned.stage
        self._store, self._planned = store, planned
        self._pace = Pace(self.stage, resources)
        self._rows = EventRows()
        self._finished: tuple[str, Manifest] | None = None
        self._gates: list[str] = []
        self._log = log
        self._event: dict[str, Any] | None = None
        self._began = time.monotonic()
        self._stop = threading.Event()
        self._warned = False
        self._artifact: UUID | None = None
        self._report_id: UUID | None = None
        self._due = {"artifact": 0.0, "log": 0.0, "line": 0.0, "report": self._began + REPORT_SECONDS}
        live = has_terminal() and sys.stderr.isatty()
        self._bar = _Terminal(self.stage) if live else None
        self._plain = has_terminal() and not live
        # The thread needs this task's context: it tells Prefect which run an artifact belongs to.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._report_until_stopped,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        failed = kind is not None and issubclass(kind, Exception)  # else it is ended, and has little time
        self._thread.join(timeout=END_SECONDS if kind is None else 5 if failed else 1)
        if self._bar:
            self._bar.close()

    def on_event(self, event: dict[str, Any]) -> None:
        """Take an event of the job: {"step", "total", "unit", "phase", "metrics"}."""
        self._event = event
        self._pace.add(event)
        self._rows.add(event)

    def gate(self, line: str) -> None:
        """Have the report say that a gate has fired, with its next update."""
        self._gates.append(line)
        self._due["report"] = 0.0

    def finished(self, how: str, manifest: Manifest) -> None:
        """Have the last report say how the stage ended."""
        self._finished = how, manifest

    def _report_until_stopped(self) -> None:
        while not self._stop.wait(0.25):
            self._report()
        if self._event is not None:
            self._due.update(artifact=0.0, report=0.0)
            self._report()

    def _report(self) -> None:
        event = self._event
        if event is None:
            return
        try:
            if self._bar:
                self._bar.show(event)
            if self._plain and self._is_due("line", LINE_SECONDS):
                say(f"{self.stage}: {describe_event(event, self._elapsed())}")
            if self._is_due("log", LOG_SECONDS):
                self._log.info(describe_event(event, self._elapsed()))
            if self._is_due("artifact", ARTIFACT_SECONDS):
                self._update_artifact(event)
            if self._is_due("report", REPORT_SECONDS):
                self._update_report(event)
        except Exception as error:
            if not self._warned:
                self._warned = True
                self._log.warning(
                    "progress cannot be reported (the stage goes on): %s: %s", type(error).__name__, error
                )

    def _is_due(self, channel: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._due[channel]:
            return False
        self._due[channel] = now + seconds
        return True

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _update_artifact(self, event: dict[str, Any]) -> None:
        done = self._finished is not None
        percent = 100.0 if done else 100 * self._pace.share
        text = "  ".join(filter(None, [describe_event(event, self._elapsed()), self._pace.describe(ended=done)]))
        if self._artifact is None:
            created = create_progress_artifact(percent, key=f"rlhf-{self.stage}-progress", description=text, _sync=True)  # pyright: ignore
            self._artifact = created if isinstance(created, UUID) else None
        else:
            update_progress_artifact(self._artifact, progress=percent, description=text, _sync=True)  # pyright: ignore

    def _update_report(self, event: dict[str, Any]) -> None:
        store, ref = self._store, self._planned.ref
        how, manifest = self._finished or ("", None)
        stored = read_stored(store, ref, manifest, manifest.attempt if manifest else retired_before(store, ref))
        now = f"{describe_event(event, self._elapsed())}  {self._pace.describe()}"
        state = finished_state(self.stage, how, manifest) if manifest else now
        attempts = f"{store.url}/{ref.id}/attempts"
        log = f"{attempts}/{manifest.attempt:04d}/log.txt" if manifest else f"{attempts}/*/log.txt"
        text = stage_text(
            self.stage, f"{store.url}/{ref.id}", state, self._rows.after(stored.rows), stored, log, tuple(self._gates)
        )
        self._report_id = put_markdown(self._report_id, f"rlhf-{self.stage}-report", text, f"{self.stage}: {ref.id}")


def put_markdown(known: UUID | None, key: str, text: str, description: str) -> UUID:
    """Write a markdown artifact of the current run, in place if it is `known`; returns its id."""
    if known is not None:
        with get_client(sync_client=True) as client:
            client.update_artifact(known, ArtifactUpdate(data=text, description=description))
        return known
    made = MarkdownArtifact(key=key, description=description, markdown=text).create(_sync=True)  # pyright: ignore
    return made.id  # pyright: ignore


def has_terminal() -> bool:
    """Whether the command line started this run and wants to be told here."""
    return os.environ.get("RLHF_TERMINAL") == "1"


def say(line: str) -> None:
    """One line for who sits at the terminal, if anyone does."""
    if has_terminal():
        print(line, file=sys.stderr, flush=True)


def describe_event(event: dict[str, Any], elapsed: float | None = None) -> str:
    """An event as one line, e.g. "train step 20/100  loss 2.31"."""
    where = f"{event.get('phase', '')} {event.get('unit', 'step')} {event.get('step', 0)}/{event.get('total', '?')}"
    parts = [where.strip(), latest(event.get("metrics") or {})]
    if elapsed is not None:
        parts.append(f"({elapsed:.0f} s)")
    return "  ".join(part for part in parts if part)


class _Terminal:
    """The live bar of one stage."""

    def __init__(self, stage: StageName) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._phase = ""
        self._bars: Bar = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[stage]:<8}[/] {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[numbers]}[/]"),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=4,
        )
        self._task = self._bars.add_task("starting", total=None, stage=stage, unit="", numbers="")
        self._bars.start()

    def show(self, event: dict[str, Any]) -> None:
        """Draw an event; a new phase starts the clock anew."""
        phase = str(event.get("phase", ""))
        if phase != self._phase:
            self._phase = phase
            self._bars.reset(self._task, description=phase)
        self._bars.update(
            self._task,
            completed=event.get("step", 0),
            total=event.get("total") or None,
            unit=event.get("unit", "step"),
            numbers=latest(event.get("metrics") or {}),
        )

    def close(self) -> None:
        """Remove the bar."""
        self._bars.stop()
