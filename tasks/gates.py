"""What happens when a gate fires: a warning, an orderly end, a step back, or a question to a person.

`Watch` looks at what a running job logs, in the thread that follows the job: it compares numbers and never waits. What has to end
the job is an exception, after which the job saves as for any other end; what follows (removing what was saved too late, the
record) comes when it has ended and its lease is still held. `pass_gates` is around the task of a stage: it asks the person, runs
the stage again after "go on", and looks at the finished stage's numbers before the next one begins. Nobody is waited for for ever:
after gate.wait_hours, or where no server could bring an answer, a question is a stop.
"""

import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar

from prefect import get_run_logger
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.settings import get_current_settings
from prefect.utilities.urls import url_for
from pydantic import Field

from rlhf_core import checkpoints
from rlhf_core.artifacts import ArtifactRef, Manifest, read_manifest, retired_before
from rlhf_core.checkpoints import read_marker
from rlhf_core.comparison import aligned_of
from rlhf_core.config import PipelineConfig, changed
from rlhf_core.errors import ConfigError, IntegrityError, StoreError
from rlhf_core.fired import (
    HARDEST,
    ChangeAsked,
    Fired,
    GateFired,
    LiveGates,
    after_first,
    fired_at_end,
    over_optimised,
    read_fired,
    samples_of,
    write_fired,
)
from rlhf_core.gates import Gate
from rlhf_core.lease import Lease
from rlhf_core.plan import StagePlan
from rlhf_core.store import Store
from tasks.events import emit_gate
from tasks.progress import Logger, Progress, say

POLL_SECONDS = 5  # between two looks whether somebody has answered
GOES_ON = "the same configuration goes on from there; with a changed or removed gate it gets further"


T = TypeVar("T")


class Decision(RunInput):
    """The form by which a person answers."""

    decision: Literal["go on", "stop", "change"] = Field(
        default="stop",
        description="go on: this gate is let be for this artifact; stop: the run fails, what is saved stays; "
        "change: the pipeline goes on with another configuration",
    )
    change: str = Field(
        default="",
        description="what changes, as after --set: ppo.kl_coef=0.1 ppo.steps=40. Stages that it does not touch are reused",
    )


class Watch:
    """The live gates of one stage while its job runs."""

    def __init__(
        self,
        config: PipelineConfig,
        store: Store,
        planned: StagePlan,
        log: Logger,
        progress: Progress,
    ) -> None:
        """`log`: of the run; `progress` is told of all events, and of what fires."""
        own = [gate for gate in config.gates if gate.stage == planned.stage and gate.during]
        waived, _ = _answers(config, store, planned.ref, own)
        self._live = LiveGates(gate for gate in own if gate.digest not in waived)
        self._planned, self._log, self._progress = planned, log, progress
        self._kept = 0  # how many of those that have fired are recorded

    def on_event(self, event: dict[str, Any]) -> None:
        """Take an event of the job. GateFired: the job is to end."""
        self._progress.on_event(event)
        new = self._live.add(event.get("logged") or ())
        for fired in new:
            self._progress.gate(fired.line)
            announce(fired, self._planned, self._log)
        if hard := [fired for fired in new if fired.gate.action != "warn"]:
            raise GateFired(min(hard, key=lambda fired: HARDEST.index(fired.gate.action)), "the job is ended")

    @contextmanager
    def over(self, store: Store, lease: Lease) -> Iterator[None]:
        """Around a job: what becomes of its checkpoints after a gate, and the record of what has fired."""
        try:
            yield
        except GateFired as error:
            more = _roll_back(store, lease, error.fired) if error.fired.gate.action == "roll_back" else None
            raise GateFired(error.fired, more or _stopped(store, lease), lease.job.attempt) from None
        else:
            for sentence in self._live.unseen():
                self._log.warning("%s: %s", self._planned.stage, sentence)
        finally:
            with suppress(StoreError):  # the log and the event have it too
                for fired in self._live.fired[self._kept :]:
                    write_fired(store, lease.job.output, lease.job.attempt, fired)
                    self._kept += 1


def _stopped(store: Store, lease: Lease) -> str:
    """Where a job that was ended has got to."""
    with suppress(StoreError, IntegrityError):
        found = checkpoints.newest(store, lease.job.output, since=lease.job.since)
        return f"Stopped, saved at {found}; {GOES_ON}." if found else "Stopped; nothing was saved, so it begins anew."
    return f"Stopped; {GOES_ON}."


def _roll_back(store: Store, lease: Lease, fired: Fired) -> str:
    """Remove what has been saved since the first step that breached a gate, if there is something from before it."""
    ref, first = lease.job.output, fired.first or 0
    if lease.check():
        return "Another run has taken over the artifact, so nothing was rolled back."
    try:
        good, bad = after_first(store, ref, first, lease.job.since)
        if not good:
            return (
                f"Stopped, and not rolled back: no checkpoint from before step {first} is left. Let it save more often "
                "(resources.checkpoint.every_steps), or keep more (keep, milestone_steps)."
            )
        checkpoints.delete(store, ref, bad)
        newest = read_marker(store, ref, good[0])
    except (StoreError, IntegrityError) as error:
        return f"Stopped, and not rolled back: {error}. What was saved from step {first} on is still there."
    return (
        f"Rolled back to {newest}: {len(bad)} later checkpoints are removed. The same configuration goes on from there, and "
        "comes to the same place unless the gate is changed; `rlhf branch` goes on from there with other settings."
    )


def pass_gates(config: PipelineConfig, planned: StagePlan, run: Callable[[], ArtifactRef]) -> ArtifactRef:
    """Run a stage, again after a person has said "go on", and pass the gates at its end.

    Args:
        config: of the pipeline.
        planned: the stage.
        run: its task.

    Raises:
        GateFired: the pipeline is not to go on; ChangeAsked: not with this configuration.
    """
    own = [gate for gate in config.gates if gate.stage == planned.stage]
    if not own:
        return run()
    store = Store(config.store)
    _, asked = _answers(config, store, planned.ref, own)
    if asked:  # of a run that has ended since
        raise asked
    ref = _run_until_done(config, store, planned, run)
    _pass_end(config, store, planned, own)
    return ref


def with_changes(config: PipelineConfig, run: Callable[[PipelineConfig], T]) -> T:
    """What `run` returns for a configuration, with what a person changes in it at gates."""
    while True:
        try:
            return run(config)
        except ChangeAsked as asked:
            said = f"{asked.fired.gate.stage}: a person has answered: change {' '.join(asked.overrides)}"
            get_run_logger().info(said)
            say(said)
            config = changed(config, asked.overrides)


def _run_until_done(
    config: PipelineConfig, store: Store, planned: StagePlan, run: Callable[[], ArtifactRef]
) -> ArtifactRef:
    while True:
        try:
            return run()
        except GateFired as error:
            if not error.asks:
                raise
            _ask(config, store, planned, error)


def _pass_end(config: PipelineConfig, store: Store, planned: StagePlan, gates: Sequence[Gate]) -> None:
    """Look at a finished stage's numbers. GateFired: the next stage is not to begin."""
    manifest = read_manifest(store, planned.ref)
    if manifest is None:
        return
    log, (waived, _) = get_run_logger(), _answers(config, store, planned.ref, gates)
    hard = [fired for fired in _overtaken(store, manifest, gates) if fired.gate.digest not in waived]
    for gate in (gate for gate in gates if not gate.during):
        fired, trouble = judge(store, manifest, gate)
        if trouble:
            log.warning("%s: %s", planned.stage, trouble)
        if fired is None or gate.digest in waived:
            continue
        announce(fired, planned, log)
        with suppress(StoreError):
            write_fired(store, planned.ref, manifest.attempt, fired)
        hard += [fired] if gate.action != "warn" else []
    for fired in sorted(hard, key=lambda fired: HARDEST.index(fired.gate.action)):
        error = GateFired(
            fired,
            f"The {planned.stage} stage is finished and stays; the next one does not begin until the gate is changed or removed.",
            manifest.attempt,
        )
        if not error.asks:
            raise error
        _ask(config, store, planned, error)


def _overtaken(store: Store, manifest: Manifest, gates: Sequence[Gate]) -> list[Fired]:
    """What should have ended the job that made an artifact, but came so late that the job had finished before it was told."""
    live = {gate.digest: gate for gate in gates if gate.during and gate.action != "warn"}
    known = read_fired(store, manifest.ref, manifest.attempt) if live else []
    standing = [fired for fired in known if fired.gate.digest in live and fired.answer != "go on"]
    return [fired.model_copy(update={"gate": live[fired.gate.digest]}) for fired in standing]


def judge(store: Store, manifest: Manifest, gate: Gate) -> tuple[Fired | None, str | None]:
    """What a gate says of a finished stage, or why it cannot be judged."""
    if gate.rule:
        return over_optimised(gate, samples_of(store, manifest), aligned_of(manifest.inputs) or "")
    if gate.metric and gate.metric not in manifest.metrics:
        return None, f"the gate on {gate.metric} has not been judged: the stage has no such metric"
    return fired_at_end(gate, manifest.metrics), None


def _ask(config: PipelineConfig, store: Store, planned: StagePlan, error: GateFired) -> None:
    """Wait for a person. GateFired: the answer is to stop, or there is none; ChangeAsked: to change the configuration."""
    fired, hours = error.fired, error.fired.gate.wait_hours
    if get_current_settings().api.url is None:
        raise GateFired(
            fired,
            f"{error.more}\nIt should wait for a person, but without a Prefect server nobody could answer, so it has stopped. "
            "Use `rlhf run`, or set PREFECT_API_URL.",
            error.attempt,
        )
    place = url_for("flow-run", obj_id=flow_run.id) or "Prefect's UI"
    get_run_logger().warning("%s; waiting up to %g h for a person: %s, button Resume", fired.sentence, hours, place)
    try:
        answer = _answer(config, error)
        decision, told = answer.decision, "A person has answered: stop."
    except FlowPauseTimeout:
        answer, decision, told = None, None, f"Nobody has answered for {hours:g} h, so it has stopped."
    overrides = tuple(shlex.split(answer.change)) if answer and decision == "change" else ()
    answered = fired.model_copy(update={"answer": decision, "change": overrides})
    write_fired(store, planned.ref, error.attempt, answered)
    if decision == "change":
        raise ChangeAsked(answered, overrides)
    if decision != "go on":
        raise GateFired(fired, f"{error.more}\n{told}", error.attempt)
    said = f"{planned.stage}: a person has answered: go on"
    get_run_logger().info(said)
    say(said)


def _answer(config: PipelineConfig, error: GateFired) -> Decision:
    """What the form came back with, once it can be done. FlowPauseTimeout: nobody has sent one in time."""
    text = question = f"**{error.fired.sentence}**\n\n{error.more}"
    for number in itertools.count():
        answer = pause_flow_run(
            wait_for_input=Decision.with_initial_data(description=text),
            timeout=max(1, round(error.fired.gate.wait_hours * 3600)),
            poll_interval=POLL_SECONDS,
            key=f"{error.fired.gate.digest}-{flow_run.run_count}-{number}",  # a key counts once in a run's life
        )
        if answer.decision != "change":
            return answer
        try:
            if changed(config, shlex.split(answer.change)).model_dump() != config.model_dump():
                return answer
            wrong = "it changes nothing; write for example ppo.kl_coef=0.1"
        except (ConfigError, ValueError) as error_in_form:
            wrong = str(error_in_form)
        text = f"{question}\n\nNot taken: change {answer.change!r}: {wrong}"
        get_run_logger().warning("not taken: change %r: %s", answer.change, wrong)
    raise AssertionError("unreachable")


def announce(fired: Fired, planned: StagePlan, log: Logger) -> None:
    """Tell the run's log, which the terminal shows too, and Prefect's events that a gate has fired."""
    log.warning(fired.line)
    emit_gate(planned, log, fired.payload)


def _answers(
    config: PipelineConfig, store: Store, ref: ArtifactRef, gates: Sequence[Gate]
) -> tuple[set[str], ChangeAsked | None]:
    """What persons have said of an artifact's gates: digests of those to let be, and a change that is still to be made."""
    asking = {gate.digest for gate in gates if gate.action == "wait"}
    known = read_fired(store, ref, retired_before(store, ref)) if asking else []
    waived: set[str] = set()
    asked: ChangeAsked | None = None
    for fired in {one.gate.digest: one for one in known if one.gate.digest in asking}.values():
        made = fired.answer == "change" and changed(config, fired.change).model_dump() == config.model_dump()
        if made or fired.answer == "go on":
            waived.add(fired.gate.digest)
        elif fired.answer == "change":
            asked = ChangeAsked(fired, fired.change)
    return waived, asked
