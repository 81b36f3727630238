"""Put what a Prefect server needs of us onto it: the work pool, the deployments of `deployments/prefect.yaml`, the automations.

Deploying again is always right and brings the server up to date; the pool's limit and which schedules run are the server's
own, and stay as somebody has set them there. Prefect's command deletes all schedules of a deployment when it writes those of
the file, so they are looked up before and put back after.
"""

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import DeploymentSchedule, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.workers.process import ProcessWorker

from flows import automations
from rlhf_core.errors import ConfigError, RlhfError
from rlhf_core.specs import STAGES

ROOT = Path(__file__).parents[1]
FILE = ROOT / "deployments" / "prefect.yaml"
POOL = "rlhf"
DEPLOYMENTS = ("rlhf/pipeline", *(f"rlhf-{stage}/{stage}" for stage in STAGES), "rlhf-sweep/sweep")


class DeployError(RlhfError):
    """Prefect did not take the deployments."""


def deploy(config: str, workdir: Path, limit: int | None = None) -> dict[str, str]:
    """Pool, deployments and automations, on the server of the environment.

    Args:
        config: path or store URL of the configuration that runs take if they are given no other.
        workdir: where runs begin, on the workers' machines.
        limit: runs that may train at once; None: as it is, 1 for a new pool.

    Returns:
        For each automation what was done.

    Raises:
        ConfigError: this is not an installation with `deployments/`.
        DeployError: Prefect's own command failed.
    """
    if not FILE.is_file():
        raise ConfigError(f"{FILE}: no such file; deploy from an installation of the repository (pip install -e .)")
    with get_client(sync_client=True) as client:
        _make_pool(client, limit)
        before = {name: _schedules(client, name) for name in DEPLOYMENTS}
        _write_deployments(config, workdir)
        for name, schedules in before.items():
            _put_back(client, name, schedules)
    return automations.install(automations.automations())


def _make_pool(client: SyncPrefectClient, limit: int | None) -> None:
    try:
        client.read_work_pool(POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        template["variables"]["properties"]["stream_output"]["default"] = False
        client.create_work_pool(
            WorkPoolCreate(
                name=POOL,
                type=ProcessWorker.type,
                description="jobs of RLHF; its limit is how many runs train at once",
                base_job_template=template,
                concurrency_limit=limit or 1,
            )
        )
    else:
        if limit:
            client.update_work_pool(POOL, WorkPoolUpdate(concurrency_limit=limit))


def _write_deployments(config: str, workdir: Path) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--prefect-file", str(FILE), "--all"]
    place = {"RLHF_CONFIG": config, "RLHF_WORKDIR": str(workdir)}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **place}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = "\n".join(f"  | {line}" for line in (done.stdout + done.stderr).splitlines()[-12:])
        raise DeployError(f"`prefect deploy` ended with code {done.returncode}\n{said}")


def _schedules(client: SyncPrefectClient, name: str) -> list[DeploymentSchedule]:
    try:
        return client.read_deployment_schedules(client.read_deployment_by_name(name).id)
    except ObjectNotFound:
        return []


def _put_back(client: SyncPrefectClient, name: str, before: list[DeploymentSchedule]) -> None:
    """Wake the file's schedules that were awake, and make those again that are not the file's."""
    deployment = client.read_deployment_by_name(name).id
    now = {schedule.slug: schedule for schedule in client.read_deployment_schedules(deployment) if schedule.slug}
    for old in before:
        if old.slug in now:
            if old.active != now[old.slug].active:
                client.update_deployment_schedule(deployment, now[old.slug].id, active=old.active)
        elif not any(old.id == kept.id for kept in client.read_deployment_schedules(deployment)):
            again = DeploymentScheduleCreate(
                schedule=old.schedule, active=old.active, parameters=old.parameters, slug=old.slug
            )
            client.create_deployment_schedules(deployment, [again])


def go_on(alive: set[str], interrupted: set[str], since: datetime) -> list[str]:
    """Schedule the runs of a local stack again that have lost their process, before a worker is started; returns their names.

    The automations do not do it here: Prefect's server puts off what it hears of a run that it has not heard of since its start.

    Args:
        alive: ids of the runs whose processes live.
        interrupted: ids of the runs that `rlhf down` has ended.
        since: when the server was started, at the earliest; runs whose silence it has noticed since then go on as well.
    """
    again: list[str] = []
    with get_client(sync_client=True) as client:
        states = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CRASHED])
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=states))):
            if run.deployment_id is None or run.state is None or str(run.id) in alive:
                continue
            if run.state.is_crashed() and str(run.id) not in interrupted and run.state.timestamp < since:
                continue  # that has been looked at
            awaiting = State(type=StateType.SCHEDULED, name="AwaitingRetry", message="Its process is gone.")
            if client.set_flow_run_state(run.id, awaiting).status.value == "ACCEPT":
                again.append(run.name)
    return again
