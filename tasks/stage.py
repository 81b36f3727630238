"""Run one stage: reuse its artifact, or run the job that makes it and publish the result.

`build_stage` is the whole logic, without Prefect; `run_stage` is the Prefect task around it, and `run_planned` calls
that task with the stage's retries. A retry calls the same function again: finished -> reuse; finished but unpublished
-> publish; cut off -> a job that goes on from its last checkpoint. While another run, here or elsewhere, holds the
artifact's lease, this one waits for it. A job that was preempted is started again at once, as long as it gets further, and
one that ran out of memory once, with half the micro-batch (`next_attempt`). Forcing a stage first retires its artifact,
once for each run, so that the retry of a forced run reuses what that run has finished. The task is called in the main
thread, never submitted, so that cancellation and termination reach the launcher.
"""

import json
import platform
import subprocess
import sys
import uuid
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, StateType
from prefect.runtime import flow_run, task_run
from prefect.states import Completed

from rlhf_core import branch, checkpoints, local_parts, reward_code
from rlhf_core.artifacts import MANIFEST, ArtifactRef, Manifest, publish, read_manifest, retired_before, verify
from rlhf_core.config import PipelineConfig
from rlhf_core.credentials import scrub
from rlhf_core.errors import IntegrityError, JobFailed, StoreError, is_transient
from rlhf_core.failures import RULES
from rlhf_core.fired import GateFired
from rlhf_core.job import JobResult, JobSpec
from rlhf_core.launch import end_leftovers, run_job
from rlhf_core.lease import Busy, Lease, free_number, take
from rlhf_core.next_attempt import adapt
from rlhf_core.plan import StagePlan
from rlhf_core.sealed import unseal
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from tasks.commits import commit_text, other_commits
from tasks.events import emit
from tasks.gates import Watch, pass_gates
from tasks.headline import headline
from tasks.progress import Logger, Progress, say
from tasks.waiting import Waiting

if TYPE_CHECKING:
    from prefect.client.schemas.objects import TaskRun
    from prefect.tasks import Task

OnEvent = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Stage:
    """A stage's published artifact and how this call came by it."""

    manifest: Manifest
    how: Literal["reused", "published", "built", "resumed"]


def build_stage(
    store: Store,
    config: PipelineConfig,
    planned: StagePlan,
    force: str | None = None,
    on_event: OnEvent = lambda _: None,
    provenance: Mapping[str, Any] | None = None,
    tell: Callable[[str], None] = say,
    watch: Watch | None = None,
) -> Stage:
    """Reuse, publish, build or resume one stage; waits while another run builds it.

    Args:
        store: where artifacts live.
        config: the pipeline; supplies the base model and the stage's resources.
        planned: the stage's id, spec and inputs.
        force: build even if published: the id of the run that asks for it, once for each id.
        on_event: called with every progress event of the job, or of the other run that is waited for.
        provenance: recorded in the manifest besides what is known here, e.g. the flow run.
        tell: called with a line when another run is waited for, and when a job is started again.
        watch: the gates that look at the job while it runs.

    Raises:
        GateFired: one of them has ended the job.
        JobFailed: the job ended without its result; reason "busy": another run held the artifact for longer than
            resources.timeout_hours; reason "preempted in vain": it was twice in a row, without getting further.
        IntegrityError: what is stored differs from what is recorded of it.
        ConfigError: the checkpoint that a branch begins from is gone.
        StoreError: the store could not be reached.
    """
    waiting = Waiting(store, planned, config.resources.of(planned.stage).timeout_hours * 3600, on_event, tell)
    while True:
        if not _is_due(store, planned, force) and (manifest := find(store, planned.ref)):
            return Stage(manifest, "reused")
        try:
            return _build(store, config, planned, force, on_event, provenance, tell, watch)
        except Busy as busy:
            waiting.wait_for(busy)
        except JobFailed as error:
            if error.reason == "preempted":
                waiting.go_on(error)
            elif error.failure and error.failure.kind == "out of memory":
                waiting.go_on_with_less(error)
            elif error.reason != "superseded":  # who took over is waited for
                raise
            tell(f"{planned.stage}: {str(error).splitlines()[0]}; going on")


def _is_due(store: Store, planned: StagePlan, force: str | None) -> bool:
    """Whether the stage is to be built whatever there is of it."""
    return force is not None and not is_retired(store, planned.ref, force)


def _build(
    store: Store,
    config: PipelineConfig,
    planned: StagePlan,
    force: str | None,
    on_event: OnEvent,
    provenance: Mapping[str, Any] | None,
    tell: Callable[[str], None],
    watch: Watch | None,
) -> Stage:
    """Run one job of the stage, if it still needs one, and publish its result. Busy: another run holds the lease."""
    number = free_number(store, planned.ref)
    due = _is_due(store, planned, force)
    if not due:
        # The last holder may have finished by now; should anybody else come between, the number is taken.
        if manifest := find(store, planned.ref):
            return Stage(manifest, "reused")
        if manifest := publish_finished(store, planned, provenance, number):
            return Stage(manifest, "published")
    since = number if due else retired_before(store, planned.ref)
    job, changes = adapt(store, job_of(store, config, planned, since))
    for change in changes:
        tell(f"{planned.stage}: {change}")
    with take(store, job, number) as lease:
        end_leftovers(lease.job)
        if force:
            retire(store, planned.ref, force, number)
        reward_code.upload(store, lease.job)
        branch.plant(store, lease.job, tell)
        with watch.over(store, lease) if watch else nullcontext():
            result = run_job(store, lease, on_event=on_event)
        manifest = _publish(store, lease, _manifest(store, planned, lease.job, result, provenance))
        checkpoints.clear(store, planned.ref)
        local_parts.forget(store, planned.ref)
    return Stage(manifest, "resumed" if result.provenance.get("resumed") else "built")


def _publish(store: Store, lease: Lease, manifest: Manifest) -> Manifest:
    """Publish what the holder of the lease has made; returns the manifest that stands.

    That may be the one of a run which was taken for dead, but not of one whose artifact was retired since: this goes again.
    JobFailed: the lease was lost.
    """
    while True:
        standing = publish(store, manifest, lease.insist)
        if standing is manifest or standing.attempt >= lease.job.since:
            return standing
        _unpublish(store, manifest.ref)


def job_of(store: Store, config: PipelineConfig, planned: StagePlan, since: int = 1) -> JobSpec:
    """The launch request of a planned stage; what attempts before `since` have saved does not count."""
    job = JobSpec(
        stage=planned.stage,
        store=store.url,
        output=planned.ref,
        attempt=1,  # the lease gives it its number
        since=since,
        job_id="",
        spec=planned.spec,
        identity=planned.identity,
        inputs=planned.inputs,
        model=config.model,
        resources=config.resources.of(planned.stage),
        code=reward_code.pack(planned.spec, planned.identity) if planned.stage == "ppo" else (),
        commit=commit_text(git_state()),
    )
    return job.model_copy(update={"job_id": f"{job.family}{uuid.uuid4().hex[:12]}"})


def find(store: Store, ref: ArtifactRef) -> Manifest | None:
    """The manifest of a published artifact, its files seen to be there; None if it is not published.

    One that a run, taken for dead, has published after another has forced the artifact does not count.
    """
    manifest = read_manifest(store, ref)
    if manifest is None or manifest.attempt < retired_before(store, ref):
        return None
    try:
        verify(store, manifest, checksums=False)
    except IntegrityError as error:
        raise IntegrityError(f"{error}; build it anew: --force {ref.stage}") from None
    return manifest


def publish_finished(
    store: Store, planned: StagePlan, provenance: Mapping[str, Any] | None, before: int
) -> Manifest | None:
    """Publish what the newest finished attempt before `before` left, if all of it is there; None if none has finished.

    Their checkpoints go. `before` is the number of the next attempt: one that has begun meanwhile keeps what it has.
    """
    since = retired_before(store, planned.ref)
    results = [k for k in store.list(f"{planned.ref.id}/attempts") if k.endswith("/result.json")]
    for key in sorted((k for k in results if since <= int(k.split("/")[-2]) < before), reverse=True):
        try:
            result = unseal(JobResult, store.read(key), f"{store.url}/{key}")
            request = key.replace("/result.json", "/job.json")
            job = unseal(JobSpec, store.read(request), f"{store.url}/{request}")
            manifest = publish(store, _manifest(store, planned, job, result, provenance))
        except (IntegrityError, KeyError):
            continue  # torn: build
        if manifest.attempt < since:
            return None  # only who holds the lease may retire that one
        checkpoints.clear(store, planned.ref, before)
        local_parts.forget(store, planned.ref)
        return manifest
    return None


def is_retired(store: Store, ref: ArtifactRef, run: str) -> bool:
    """Whether `retire` has done its work for `run`."""
    try:
        store.read(_retired_by(ref, run))
    except KeyError:
        return False
    return True


def retire(store: Store, ref: ArtifactRef, run: str, attempt: int) -> None:
    """Make an artifact unpublished, so that `attempt` builds it from its beginning; nothing if `run` has done so before.

    Only who holds the artifact's lease may. The manifest is kept under `superseded/`. Results of earlier attempts go, and all
    checkpoints; what a job that lives on elsewhere should add to them does not count. The marker comes last: an interrupted
    call is repeated, a completed one is not.
    """
    stored = store.list(ref.id)
    if _retired_by(ref, run) in stored:
        return
    if f"{ref.id}/{MANIFEST}" in stored:
        _unpublish(store, ref)
    markers = checkpoints.marker_keys(store, ref)
    for key in [*markers, *sorted(stored.keys() - markers)]:  # markers before the parts that they need
        if key.endswith("/result.json") or key.startswith(f"{ref.id}/checkpoints/"):
            store.delete(key)
    store.write(_retired_by(ref, run), json.dumps({"attempt": attempt}).encode())


def _unpublish(store: Store, ref: ArtifactRef) -> None:
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    store.write(f"{ref.id}/superseded/manifest-{now}.json", store.read(f"{ref.id}/{MANIFEST}"), create=True)
    store.delete(f"{ref.id}/{MANIFEST}")


def _retired_by(ref: ArtifactRef, run: str) -> str:
    return f"{ref.id}/superseded/by-{run}.json"


def _manifest(
    store: Store, planned: StagePlan, job: JobSpec, result: JobResult, extra: Mapping[str, Any] | None
) -> Manifest:
    changed: dict[str, Any] = {"left_out": list(job.left_out)} if job.left_out else {}
    if job.halved:
        sizes = {name: getattr(job.resources, name) for name in ("micro_batch", "rollout_micro_batch")}
        changed["halved"] = sizes  # what the memory sufficed for
    if commits := other_commits(store, job, result.provenance.get("resumed") or []):
        changed["commits"] = commits
    return Manifest(
        ref=planned.ref,
        spec=planned.identity,
        inputs=planned.inputs,
        folder=result.folder,
        files=result.files,
        metrics={**result.metrics, "seconds": round(result.seconds, 3)},
        provenance={
            **control_provenance(),
            "job_id": result.job_id,
            "job": result.provenance,
            **changed,
            **(extra or {}),
        },
    )


def control_provenance() -> dict[str, Any]:
    """Commit, command and host of the control plane; never who ran it."""
    return {**git_state(), "argv": [Path(sys.argv[0]).name, *map(scrub, sys.argv[1:])], "host": platform.node()}


def git_state() -> dict[str, Any]:
    """The commit of this code and whether the tree differs from it; both None outside a repository."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def worth_retrying(task: "Task[..., Any]", run: "TaskRun", state: State[Any]) -> bool:
    """Whether a failed stage may succeed when tried again: a job that died, a store out of reach, a disk that was full."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, JobFailed):
        kind = error.failure.kind if error.failure else None  # what less memory does for has been tried
        worth = RULES[kind].retry and kind != "out of memory" if kind else is_transient(error.code)
    else:
        worth = isinstance(error, StoreError | OSError)
    if worth:
        say(f"{run.name}: {str(error).splitlines()[0]}; starting it again in {task.retry_delay_seconds:g} s")
    return worth


@task(
    task_run_name="{planned.stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=worth_retrying,
    log_prints=False,
)
def run_stage(
    config: PipelineConfig, planned: StagePlan, inputs: dict[str, ArtifactRef], force: bool = False
) -> ArtifactRef | State[ArtifactRef]:
    """One stage as a Prefect task; its state is named Cached if the artifact was there already, Held if a gate asks a person.

    `inputs` are the results of the tasks before it: they draw the edges of Prefect's graph and are the planned ones.
    """
    assert inputs == planned.inputs, f"{planned.stage}: given {inputs}, planned {planned.inputs}"
    log = get_run_logger()
    store = Store(config.store)
    origin = {"flow_run_id": flow_run.id, "flow_run_name": flow_run.name}

    def tell(line: str) -> None:
        log.info(line)
        say(line)

    emit("started", planned, log, attempt=task_run.run_count)
    try:
        with Progress(store, planned, config.resources.of(planned.stage), log) as progress:
            watch, run = Watch(config, store, planned, log, progress), flow_run.id if force else None
            stage = build_stage(store, config, planned, run, watch.on_event, origin, tell, watch)
            progress.finished(stage.how, stage.manifest)
    except BaseException as error:
        held = error if isinstance(error, GateFired) and error.asks else None
        preempted = held or (isinstance(error, JobFailed) and (error.reason or "").startswith("preempted"))
        emit("preempted" if preempted else "failed", planned, log, error=str(error)[:500], attempt=task_run.run_count)
        if held:  # neither done nor failed: the flow asks, and calls this task again
            return State(type=StateType.CANCELLED, name="Held", message=held.fired.sentence, data=held)  # pyright: ignore
        raise
    _emit_end(planned, stage, log)
    summary = f"{stage.how} {store.url}/{planned.ref.id}"
    numbers = headline(planned.stage, stage.manifest.metrics)
    log.info("%s  %s", summary, numbers)
    say(f"{planned.stage}: {stage.how}  {numbers}")
    if stage.how == "reused":
        return Completed(name="Cached", data=planned.ref, message=summary)
    return planned.ref


def _emit_end(planned: StagePlan, stage: Stage, log: Logger) -> None:
    manifest = stage.manifest
    resumed = (manifest.provenance.get("job") or {}).get("resumed")
    facts = {"how": stage.how, "attempt": manifest.attempt, "metrics": manifest.metrics}
    if stage.how == "resumed":
        emit("resumed", planned, log, **facts, resumed=resumed)
    emit("reused" if stage.how == "reused" else "completed", planned, log, **facts, resumed=resumed)


def run_planned(
    config: PipelineConfig,
    plan: Mapping[StageName, StagePlan],
    force: Collection[StageName],
    stage: StageName,
    **inputs: ArtifactRef,
) -> ArtifactRef:
    """Run one stage of a plan as a task, with the retries of the stage's resources, and pass its gates; returns its artifact."""
    resources = config.resources.of(stage)
    retrying = run_stage.with_options(retries=resources.retries, retry_delay_seconds=resources.retry_delay_seconds)

    def run() -> ArtifactRef:
        result = retrying(config, plan[stage], inputs, stage in force)
        if not isinstance(result, State):
            return result
        if isinstance(held := result.data, GateFired):
            raise held
        return result.result()

    return pass_gates(config, plan[stage], run)
