"""`rlhf resume RUN`: have a run go on that failed, crashed, was cancelled or suspended, and say what it will reuse.

What *Retry* in the UI does, through the same call: the run is scheduled again, under its id and with its parameters, and a worker
takes it up. With `--from` stages are to be built anew, which the parameters of a run cannot say afterwards: so that is a new run
of the same deployment. A run without a deployment (`rlhf run`) has no worker, and runs here, in this process.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer
from rich.markup import escape

from flows.selection import forced_stages, plan_run
from flows.show import err, out, show_plan
from flows.targets import stage_name
from rlhf_core.config import PipelineConfig, parse_config
from rlhf_core.errors import ConfigError, RlhfError
from rlhf_core.plan import StagePlan
from rlhf_core.specs import STAGES, StageName
from rlhf_core.store import Store

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

ENDED = ("FAILED", "CRASHED", "CANCELLED", "COMPLETED")


@dataclass(frozen=True)
class Asked:
    """What a flow run was asked for.

    Attributes:
        only: the stage, if its flow is that of a single one.
        workdir: where a worker starts it; None: nobody has said.
    """

    config: PipelineConfig
    force: tuple[StageName, ...]
    only: StageName | None
    workdir: Path | None = None


def resume(
    run: Annotated[str, typer.Argument(metavar="RUN", help="name or id of a flow run; of several, the newest")],
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="build this stage and all after it anew, as a new run")
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(
            "--answer", metavar="TEXT", help="to a gate's question: 'go on', stop, or overrides to go on with"
        ),
    ] = None,
) -> None:
    """Have a run go on: finished stages are reused, the one that was cut off goes on from its last checkpoint.

    A run that a gate has paused needs [bold]--answer[/]: go on, stop, or a change as after --set, e.g. ppo.kl_coef=0.1.
    """
    from flows.session import configured_server

    if configured_server() is None:
        raise ConfigError(
            "no Prefect server is configured, so no runs are known: set PREFECT_API_URL, or go to the folder of `rlhf up`; "
            "`rlhf run CONFIG` goes on without"
        )
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = find_run(client, run)
        state = found.state.type.value if found.state else "none"
        shown = found.state.name if found.state else "in no state"
        out.print(f"run     {escape(found.name)}  {found.id}  {shown}, {found.run_count} starts", highlight=False)
        if state == "PAUSED" and not first:
            _go_on(client, found, answer)
            return
        if answer is not None:
            raise ConfigError(f"--answer {answer!r}: {found.name} ({found.id}) is {shown} and asks nothing")
        if state not in ENDED:
            raise ConfigError(f"{found.name} ({found.id}) is {shown}: it has not ended; cancel it first, or wait")
        asked = _show(client, found, first)
        if found.deployment_id is None:
            _run_here(asked)
        elif first:
            _run_anew(client, found, asked)
        else:
            _schedule_again(client, found.id)


def _go_on(client: "SyncPrefectClient", run: "FlowRun", answer: str | None) -> None:
    """What the UI's *Resume* does, with the answer to a gate's question if it asks one."""
    assert run.state
    keys = run.state.state_details.run_input_keyset
    given: dict[str, Any] | None = None
    if keys:
        question = str(client.read_flow_run_input(run.id, keys["description"])) if "description" in keys else ""
        if answer is None:
            raise ConfigError(
                f"{run.name} ({run.id}) waits for an answer:\n{question}\n"
                "give one: --answer 'go on', --answer stop, or what is to change: --answer 'ppo.kl_coef=0.1'"
            )
        known = answer in ("go on", "stop")
        given = {"decision": answer} if known else {"decision": "change", "change": answer}
    elif answer is not None:
        raise ConfigError(f"--answer {answer!r}: {run.name} ({run.id}) was suspended by a person and asks nothing")
    else:
        _show(client, run, None)
    result = client.resume_flow_run(run.id, given)
    if result.status.value != "ACCEPT":
        raise RlhfError(f"the Prefect server did not take it: {result.status.value} {result.details}")
    out.print("answered: it goes on" if keys else "going on: a worker takes it up within seconds")


def find_run(client: "SyncPrefectClient", text: str) -> "FlowRun":
    """The flow run of that id, or the newest of that name. ConfigError: there is none."""
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_flow_run(UUID(text))
    except ValueError:
        pass  # a name
    except ObjectNotFound:
        raise ConfigError(f"{text}: the Prefect server knows no run of this id") from None
    named = FlowRunFilter(name=FlowRunFilterName(any_=[text]))
    found = client.read_flow_runs(flow_run_filter=named, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=2)
    if not found:
        newest = client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=5)
        known = ", ".join(dict.fromkeys(each.name for each in newest)) or "it has none"
        raise ConfigError(f"{text}: the Prefect server knows no run of this name; its newest: {known}")
    if len(found) > 1:
        err.print(f"several runs are called {text}: this is the newest; give an id for another")
    return found[0]


def asked_of(flow: str, parameters: Mapping[str, Any], workdir: Path | None = None) -> Asked:
    """What a run's parameters say.

    Raises:
        ConfigError: the flow is none of ours, or its configuration is wrong.
    """
    from flows.parameters import chosen

    if flow == "rlhf-sweep":
        raise ConfigError(
            "a sweep goes on by the same `rlhf sweep` again, or by Retry in the UI: what is there is reused"
        )
    only = flow.removeprefix("rlhf-") if flow.startswith("rlhf-") else None
    if flow != "rlhf" and only not in STAGES:
        raise ConfigError(f"flow {flow!r} is none of this pipeline's: rlhf, or rlhf-STAGE")
    stage = stage_name(only) if only else None
    raw = parameters.get("config")
    config = parse_config(raw, "the run's configuration") if raw is not None else None
    config = chosen(config, parameters.get("config_file"), parameters.get("overrides") or ())
    force = parameters.get("force") or ()
    forced: list[StageName] = [stage_name(name) for name in force] if not stage else [stage] if force else []
    return Asked(config, tuple(forced), stage, workdir)


def _show(client: "SyncPrefectClient", run: "FlowRun", first: str | None) -> Asked:
    """Show the plan of the run as it will go on; with `first` the stages from there are forced."""
    workdir = None
    if run.deployment_id:
        variables = client.read_deployment(run.deployment_id).job_variables or {}
        workdir = Path(variables["working_dir"]) if variables.get("working_dir") else None
    if workdir and workdir.is_dir():
        os.chdir(workdir)  # relative paths in its configuration start there
    asked = asked_of(client.read_flow(run.flow_id).name, run.parameters, workdir)
    forced = _forced(asked, first) if first else ()
    # What the run itself was to force it has forced by now, or will: that is known only where its id is.
    if not first and asked.force:
        out.print(f"forced  {', '.join(asked.force)}: once for this run", highlight=False)
    try:
        show_plan(_plan(asked, forced), asked.config)
    except RlhfError as error:
        err.print(f"what it will reuse cannot be said from here: {escape(str(error))}", soft_wrap=True)
    return Asked(asked.config, forced if first else asked.force, asked.only, asked.workdir)


def _forced(asked: Asked, first: str) -> tuple[StageName, ...]:
    stage = stage_name(first)
    if asked.only and stage != asked.only:
        raise ConfigError(f"--from {first}: the run is of the stage {asked.only} alone")
    return (stage,) if asked.only else forced_stages(asked.config, (), stage)


def _plan(asked: Asked, forced: tuple[StageName, ...]) -> list[StagePlan]:
    return plan_run(asked.config, Store(asked.config.store), forced, asked.only)


def _schedule_again(client: "SyncPrefectClient", run: UUID) -> None:
    """The call of the UI's *Retry*."""
    from prefect.client.schemas.objects import State, StateType

    answer = client.set_flow_run_state(run, State(type=StateType.SCHEDULED, name="AwaitingRetry"))
    if answer.status.value != "ACCEPT":
        raise RlhfError(f"the Prefect server did not take it: {answer.status.value} {answer.details}")
    out.print("scheduled again, under the same id: a worker takes it up within seconds")


def _run_anew(client: "SyncPrefectClient", run: "FlowRun", asked: Asked) -> None:
    """A run of the same deployment that forces stages."""
    assert run.deployment_id
    force: Any = bool(asked.force) if asked.only else list(asked.force)
    parameters = {**run.parameters, "force": force}
    created = client.create_flow_run_from_deployment(
        run.deployment_id, parameters=parameters, tags=[*run.tags, f"resumes:{run.id}"]
    )
    out.print(f"new run {created.id}: a worker takes it up within seconds", highlight=False)


def _run_here(asked: Asked) -> None:
    """The same, in this process: it was started by `rlhf run`, and no worker knows it."""
    from flows.cli import run_flow

    out.print("started by `rlhf run`, so it goes on here, as a new run")
    run_flow(asked.config, asked.force, asked.only)
    out.print("done; its report is the newest `rlhf-report` of the server", highlight=False)
