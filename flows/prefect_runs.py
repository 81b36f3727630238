"""The flow runs of a Prefect server, for who looks at the store as well: what is active, and what ended last.

Asked in the background and never waited for longer than `SECONDS`, also while Prefect is being imported: a server that is down or
slow costs the view its lower part and nothing else. Nothing is asked where no server is configured.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

SECONDS = 4.0
MOST = 8
RECENT = timedelta(hours=24)  # for how long a run that has ended is still shown


@dataclass(frozen=True)
class Run:
    """A flow run: its name, the name of its state, when it began (ISO, or "" if it has not) and its page in the UI."""

    name: str
    state: str
    began: str
    url: str


@dataclass(frozen=True)
class Runs:
    """What a server said: its runs, newest first; or why it did not."""

    server: str
    runs: tuple[Run, ...] = ()
    trouble: str = ""


class Asking:
    """A question to the configured server, which can be asked again; whoever asked goes on meanwhile."""

    def __init__(self) -> None:
        self._answer: Runs | None = None
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Ask, unless the last question is still under way."""
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._ask, daemon=True, name="Prefect")
            self._thread.start()

    def answer(self, wait: float = 0.0) -> Runs | None:
        """The last answer, after at most so many seconds of waiting for a newer one; None: no server, or no answer."""
        if self._thread:
            self._thread.join(wait)
        return self._answer

    def _ask(self) -> None:
        server = ""
        try:
            from flows.session import configured_server

            if server := configured_server() or "":
                self._answer = Runs(server, _runs())
        except Exception as error:  # whatever it is, the store's part of the view goes on
            words = " ".join(str(error).split()) or type(error).__name__
            self._answer = Runs(server, trouble=f"does not answer: {words}"[:200])


def _runs() -> tuple[Run, ...]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterEndTime, FlowRunFilterState
    from prefect.client.schemas.filters import FlowRunFilterStateType as StateTypes
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort

    active = [StateType.RUNNING, StateType.PENDING, StateType.PAUSED, StateType.CANCELLING]
    goes = FlowRunFilter(state=FlowRunFilterState(type=StateTypes(any_=active)))
    ended = FlowRunFilterEndTime.model_validate({"after_": datetime.now(UTC) - RECENT})
    went = FlowRunFilter(end_time=ended)
    with get_client(sync_client=True, httpx_settings={"timeout": SECONDS}) as client:
        found: list[Any] = []
        for flow_runs in (goes, went):
            found += client.read_flow_runs(
                flow_run_filter=flow_runs, sort=FlowRunSort.START_TIME_DESC, limit=MOST - len(found)
            )
            if len(found) == MOST:
                break
    return tuple(_run(run) for run in found)


def _run(run: Any) -> Run:
    from prefect.utilities.urls import url_for

    began = run.start_time.astimezone(UTC).isoformat(timespec="seconds") if run.start_time else ""
    url = url_for("flow-run", obj_id=run.id) or ""
    return Run(run.name, run.state_name or "?", began, url)


def as_json(answer: Runs | None) -> dict[str, Any] | None:
    """An answer as plain data."""
    if answer is None:
        return None
    runs: Sequence[dict[str, str]] = [vars(run) for run in answer.runs]
    return {"server": answer.server, "trouble": answer.trouble, "runs": runs}
