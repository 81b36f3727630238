"""`rlhf branch RUN --at-step N --set …`: a run that leaves another one's course at a checkpoint, with changed settings.

Of one stage; those before it are reused, those after it are made of the branch. It is a run of the same pipeline with a `branch` in
that stage's spec, in this process as `rlhf run`: the same command reuses or resumes it. Which settings may change, and what becomes
of the checkpoint, is `rlhf_core.branch`.
"""

from typing import Annotated

import typer

from flows.evaluation import Set
from flows.resume_cli import asked_of, find_run
from flows.selection import plan_to_run, require_stage
from flows.show import out, show_plan, show_results
from flows.targets import stage_name
from rlhf_core.branch import branch_of
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.errors import ConfigError
from rlhf_core.specs import StageName
from rlhf_core.store import Store


def branch(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN|CONFIG", help="name or id of a flow run, the newest of a name; or a pipeline YAML"),
    ],
    step: Annotated[int, typer.Option("--at-step", min=1, metavar="N", help="of the checkpoint to go on from")],
    sets: Set = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="STAGE", help="to branch in; default: the run's, or ppo or dpo")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and stop")] = False,
) -> None:
    """Go on from a run's checkpoint with other settings, beside that run: both results stay.

    A finished stage keeps the checkpoints that resources.checkpoint.milestone_steps asks for.
    """
    from flows.cli import ended_by_signals, nothing_to_do, run_flow

    config, only = _asked(run)
    config = config.model_copy(update={"store": Store(config.store).url})
    chosen: StageName = stage_name(stage) if stage else only or ("dpo" if config.method == "dpo" else "ppo")
    require_stage(config, chosen)
    store = Store(config.store)
    made = branch_of(config, chosen, step, sets or (), store)
    planned = plan_to_run(made, store, (), only)
    show_plan(planned, made)
    if dry_run:
        return
    with ended_by_signals():
        if made.gates or not nothing_to_do(store, planned):
            run_flow(made, (), only)
    out.print()
    show_results(store, planned)


def _asked(text: str) -> tuple[PipelineConfig, StageName | None]:
    """The configuration of a run or of a file, and the run's stage if it is of one alone."""
    from flows.session import configured_server

    if text.endswith((".yaml", ".yml")):
        return load_config(text), None
    if configured_server() is None:
        raise ConfigError(
            f"{text}: no Prefect server is configured, so no runs are known: set PREFECT_API_URL, go to the folder of "
            "`rlhf up`, or give the run's configuration, a YAML file"
        )
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = find_run(client, text)
        asked = asked_of(client.read_flow(found.flow_id).name, found.parameters)
    return asked.config, asked.only
