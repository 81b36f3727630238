"""The flow runs of a Prefect server, for who looks at the store as well: what is active, and what ended last.

A process of its own asks, which imports Prefect (a second or more) and answers each line on its stdin with one on its stdout. So
whoever wants to know may go on, or end, at any time: a server that is down or slow costs the view its lower part and nothing else.
Nothing is asked where no server is configured.
"""

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any, Self

COMMAND = (sys.executable, "-m", "flows.prefect_runs")
SECONDS = 4.0  # for the server to answer, and for who asks once to wait
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
    """What a server said: its runs, newest first; or why it did not. Without a server all is empty."""

    server: str = ""
    runs: tuple[Run, ...] = ()
    trouble: str = ""


class Asking:
    """A question to the configured server, which can be asked again; a context manager, after which nothing of it is left."""

    def __init__(self) -> None:
        self._answer: Runs | None = None
        self._answered = threading.Event()
        self._asked = False
        # In a session of its own: Ctrl-C is for who asks, and at the end of that its stdin ends too.
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._thread = threading.Thread(target=self._listen, daemon=True, name="runs of Prefect")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe
            pipe.close()

    def ask(self) -> None:
        """Ask, unless the last question is still open."""
        if self._asked and not self._answered.is_set():
            return
        self._asked = True
        self._answered.clear()
        assert self._process.stdin
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        except OSError:  # it has ended: there will be no answer
            self._answered.set()

    def answer(self, wait: float = 0.0) -> Runs | None:
        """The last answer, after at most so many seconds of waiting for a newer one; None: no server, or no answer yet."""
        self._answered.wait(wait)
        return self._answer

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            said = json.loads(line)
            runs = Runs(said["server"], tuple(Run(**run) for run in said["runs"]), said["trouble"])
            self._answer = runs if runs != Runs() else None
            self._answered.set()
        self._answered.set()


def as_json(answer: Runs | None) -> dict[str, Any] | None:
    """An answer as plain data."""
    return asdict(answer) if answer else None


# --- the process that asks -------------------------------------------------------------------------------------------


def main() -> None:
    """Answer every line with one, until there are no more."""
    for _ in sys.stdin:
        print(json.dumps(asdict(_ask())), flush=True)


def _ask() -> Runs:
    server = ""
    try:
        from flows.session import configured_server

        server = configured_server() or ""
        return Runs(server, _runs()) if server else Runs()
    except Exception as error:  # whatever it is, it is for people to read
        words = " ".join(str(error).split()) or type(error).__name__
        return Runs(server, trouble=f"does not answer: {words}"[:200])


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


if __name__ == "__main__":
    main()
