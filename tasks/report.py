"""The pipeline report: one Prefect markdown artifact of a run, updated in place as its stages begin and end.

Prefect's UI shows neither why a task was cached nor where its result lives, so this does: a graph of what was made of what,
and a row for each stage: waiting, running, reused, built or resumed from where, fingerprint, time, speed, headline numbers
and place. It is a view of the manifests, which stay the record. A thread sends it, so that a server that is away delays no
stage; what could not be sent is tried again with what has changed since.
"""

import contextvars
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self
from uuid import UUID

from prefect import get_run_logger

from rlhf_core.artifacts import ArtifactRef, Manifest, read_manifest, retired_before
from rlhf_core.config import PipelineConfig
from rlhf_core.fired import GateFired, read_fired
from rlhf_core.lineage_graph import Node, Tone, lineage_markdown
from rlhf_core.plan import StagePlan
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from tasks.headline import duration, headline, speed
from tasks.progress import END_SECONDS, put_markdown
from tasks.stage_report import gates_text

DONE = {"reuse": "reused", "build": "built", "resume": "resumed"}
COLUMNS = ("stage", "", "fingerprint", "time", "tokens/s")
INTERVAL = re.compile(r" \[[^]]*\]")
AGAIN_SECONDS = 5.0  # between tries to reach a server

Run = Callable[..., ArtifactRef]


class PipelineReport:
    """The report of the current flow run; a context manager. An error in it is logged once and fails nothing."""

    def __init__(self, config: PipelineConfig, plan: Mapping[StageName, StagePlan]) -> None:
        """`plan`: the stages that the run will go through, in order."""
        self._config, self._plan = config, plan
        self._store = Store(config.store)
        self._states: dict[StageName, str] = dict.fromkeys(plan, "waiting")
        self._manifests: dict[StageName, Manifest] = {}
        self._gates: dict[StageName, list[str]] = {}
        self._log = get_run_logger()
        self._known: UUID | None = None
        self._warned = False
        self._changed, self._stop = threading.Event(), threading.Event()
        context = contextvars.copy_context()  # tells Prefect which run the artifact belongs to
        self._thread = threading.Thread(target=context.run, args=(self._send_until_stopped,), daemon=True)

    def __enter__(self) -> Self:
        self._changed.set()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stage, state in self._states.items():
            if error is not None and state == "running":
                self._states[stage] = f"failed: {_first_line(error)}" if isinstance(error, Exception) else "ended"
                self._changed.set()
        self._stop.set()
        failed = isinstance(error, Exception)  # else it is ended from outside, and has little time
        self._thread.join(timeout=END_SECONDS if error is None else 5 if failed else 1)

    def watch(self, run: Run) -> Run:
        """`run`, which runs a stage by its name, with what happens told here."""

        def watched(stage: StageName, **inputs: ArtifactRef) -> ArtifactRef:
            self._tell(stage, "running")
            try:
                ref = run(stage, **inputs)
            except GateFired:
                self._note_gates(stage)
                self._note(stage, self._plan[stage].ref)  # which may be finished all the same
                raise
            self._note_gates(stage)
            self._note(stage, ref)
            return ref

        return watched

    def text(self) -> str:
        """The report as it stands, as markdown."""
        gates = [line for lines in list(self._gates.values()) for line in lines]
        return report_text(self._config, self._plan, dict(self._states), dict(self._manifests), gates)

    def _note(self, stage: StageName, ref: ArtifactRef) -> None:
        try:
            manifest = read_manifest(self._store, ref)
        except Exception as error:
            self._warn(error)
            return
        if manifest:
            self._manifests[stage] = manifest
            self._tell(stage, done(self._plan[stage], manifest))

    def _note_gates(self, stage: StageName) -> None:
        """Which of the configuration's gates have fired on a stage; one that fired in several attempts counts as in the last."""
        own = {gate.digest for gate in self._config.gates if gate.stage == stage}
        ref = self._plan[stage].ref
        try:
            found = read_fired(self._store, ref, retired_before(self._store, ref)) if own else []
        except Exception as error:
            self._warn(error)
            return
        self._gates[stage] = list({one.gate.digest: one.line for one in found if one.gate.digest in own}.values())

    def _tell(self, stage: StageName, state: str) -> None:
        self._states[stage] = state
        self._changed.set()

    def _send_until_stopped(self) -> None:
        stopped: float | None = None
        while not self._stop.is_set() or self._changed.is_set():
            if not self._changed.wait(0.25):
                continue
            self._changed.clear()
            try:
                described = f"{self._config.name}: all stages"
                self._known = put_markdown(self._known, "rlhf-report", self.text(), described)
            except Exception as error:
                self._warn(error)
                self._changed.set()
                if self._stop.wait(AGAIN_SECONDS):
                    stopped = stopped or time.monotonic()
                    if time.monotonic() - stopped > END_SECONDS:
                        return
                    time.sleep(1)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            self._log.warning("the report could not be written: %s: %s", type(error).__name__, error)


def report_text(
    config: PipelineConfig,
    plan: Mapping[StageName, StagePlan],
    states: Mapping[StageName, str],
    manifests: Mapping[StageName, Manifest],
    gates: Sequence[str] = (),
) -> str:
    """The report as markdown.

    Args:
        config: the pipeline.
        plan: its stages.
        states: of each stage what a person is told.
        manifests: of the stages that are done.
        gates: a line for each that has fired.
    """
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    rows = "".join(f"\n{_row(plan[s], states[s], manifests.get(s))}" for s in plan)
    nodes = [_node(plan[s], states[s], manifests.get(s)) for s in plan]
    # Not in the table: the UI cuts what a row has no room for.
    places = "".join(f"{_place(config.store, plan[s], manifests.get(s))}\n" for s in plan)
    fired = f"{gates_text(gates)}\n" if gates else ""
    lineage = f"## Lineage\n\n{lineage_markdown(nodes)}\n## Numbers and places\n\n{places}"
    return f"# {config.name}\n\n{head}{rows}\n\n{fired}{lineage}"


def _place(store: str, planned: StagePlan, manifest: Manifest | None) -> str:
    numbers = headline(planned.stage, manifest.metrics) if manifest else ""
    return f"- **{planned.stage}** {numbers}  \n  `{store.rstrip('/')}/{planned.ref.id}`"


def _row(planned: StagePlan, state: str, manifest: Manifest | None) -> str:
    metrics = manifest.metrics if manifest else {}
    cells = (
        planned.stage,
        state.replace("|", "/"),
        f"`{planned.ref.fingerprint[:12]}`",
        duration(metrics.get("seconds")) if manifest else "",
        speed(metrics),
    )
    return f"| {' | '.join(cells)} |"


def _node(planned: StagePlan, state: str, manifest: Manifest | None) -> Node:
    tones: dict[str, Tone] = {"waiting": "waiting", "running": "running", "reused": "reused", "ended": "failed"}
    tone: Tone = "failed" if state.startswith("failed") else tones.get(state, "made")
    numbers = headline(planned.stage, manifest.metrics) if manifest else ""
    first = INTERVAL.sub("", numbers).split(", ")[0]
    short = state.replace("resumed from ", "from ")  # whole in a box: "from rollout 61, update 2"
    return Node(planned.stage, (short, planned.ref.fingerprint[:12], first), tuple(planned.inputs), tone)


def done(planned: StagePlan, manifest: Manifest) -> str:
    """How the run came by an artifact: "reused", "built", "resumed from step 40", the last also after a retry within the run."""
    resumed = (manifest.provenance.get("job") or {}).get("resumed")
    if planned.action == "reuse" or not resumed:
        return DONE[planned.action]
    return f"resumed from {resumed[-1]['from']}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
