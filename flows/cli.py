"""The command line `rlhf`: plan, run, sweep, status, logs, artifacts, chat, eval, doctor.

Commands that need no Prefect do not import it, so they answer at once. A mistake of the user's is one message on stderr
and the exit code of its class (2 configuration, 3 data, …), without a traceback. `run` works with the server of
PREFECT_API_URL, or starts a temporary one for as long as it takes.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flows.artifacts_cli import artifacts
from flows.branch_cli import branch
from flows.evaluation import EvalFailed, Set, StoreOption, evaluate
from flows.logs_cli import logs
from flows.node_cli import node
from flows.planner_cli import HardwareOption, JsonOption, ModelOption, PriceOption, RowsOption, show_needs
from flows.resume_cli import resume
from flows.selection import forced_stages, plan_run, plan_to_run
from flows.show import err, out, show_checks, show_hosts, show_plan, show_results
from flows.stack_cli import automations_command, deploy_command, down, up
from flows.status_cli import status
from flows.sweep_cli import sweep
from flows.targets import DEFAULT_STORE, MODEL_FOLDERS, resolve, stage_name
from rlhf_core import __version__
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.errors import ConfigError, ExitCode, RlhfError
from rlhf_core.plan import StagePlan
from rlhf_core.specs import STAGES, StageName
from rlhf_core.store import Store
from tasks.headline import duration

INTERRUPTED = 130
GOES_ON = "the same command reuses the finished stages and goes on with this one from its last checkpoint"


class Terminated(BaseException):
    """SIGTERM: this machine or this run is being taken away."""


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(artifacts, name="artifacts")

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="pipeline YAML, e.g. deployments/configs/quickstart.yaml")
]
Force = Annotated[list[str] | None, typer.Option("--force", metavar="STAGE", help="build this stage anew; repeatable")]
From = Annotated[str | None, typer.Option("--from", metavar="STAGE", help="build this stage and all after it anew")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="let Python functions named in ppo.rewards run as part of the job")
]


def _version(asked: bool) -> None:
    if asked:
        print(f"rlhf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """RLHF as a durable workflow: data, SFT, reward model and PPO (or DPO), evaluation.

    [bold]Examples[/]

      rlhf doctor                          is this machine ready?
      rlhf plan quickstart.yaml            what would run, and why
      rlhf plan opt-1.3b.yaml --hardware a100-80g:8 --price 4    does it fit, how long, how much
      rlhf run quickstart.yaml             run; what is published is reused
      rlhf run quickstart.yaml --set ppo.kl_coef=0.2
      rlhf run quickstart.yaml --set method=dpo
      rlhf sweep quickstart.yaml --grid ppo.kl_coef=0.02,0.1
      rlhf branch quickstart.yaml --at-step 40 --set ppo.kl_coef=0.1
      rlhf status --watch                  what runs, how far it is, what there is
      rlhf logs quickstart.yaml ppo -f     a stage's log, as it comes
      rlhf artifacts list                  what the store holds
      rlhf chat quickstart.yaml --prompt "Once upon a time"
      rlhf eval quickstart.yaml:reward     how good a model is; two targets: side by side
      rlhf up                              Prefect here: UI, schedules, restarts; rlhf down ends it
    """


@app.command()
def plan(
    config: Config,
    sets: Set = None,
    force: Force = None,
    first: From = None,
    allow_code: AllowCode = False,
    hardware: HardwareOption = None,
    model: ModelOption = None,
    price: PriceOption = None,
    rows: RowsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show for each stage whether it will be reused, resumed or built, and why. Starts nothing.

    With --hardware: what each stage needs there instead, in memory, time and money, whether it fits, and the smallest change
    that makes it fit; exit code 1 if one does not fit. Neither data, weights nor devices are needed for that.
    """
    loaded = load_config(config, sets or ())
    if hardware is not None:
        raise typer.Exit(0 if show_needs(loaded, hardware, model, price, rows or (), as_json) else 1)
    if alone := [
        name for name, given in (("--model", model), ("--price", price), ("--rows", rows)) if given is not None
    ]:
        raise ConfigError(f"{alone[0]}: means nothing without --hardware, e.g. --hardware a100-80g:8")
    _allow_code(allow_code)
    show_plan(plan_run(loaded, Store(loaded.store), _forced(loaded, force, first)), loaded)


@app.command()
def run(
    config: Config,
    sets: Set = None,
    force: Force = None,
    first: From = None,
    stage: Annotated[
        str | None, typer.Option("--stage", metavar="STAGE", help=f"run only this: {', '.join(STAGES)}")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and stop")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Run the pipeline: reuse the stages that have finished, build the others, resume one that was cut off.

    SIGTERM ends it with code 75 and Ctrl-C with 130, after the running stage has saved where it is. Set
    PREFECT_API_URL to record the run on a Prefect server; without it a temporary one runs as long as the command.
    """
    began = time.monotonic()
    _allow_code(allow_code)
    loaded = load_config(config, sets or ())
    store = Store(loaded.store)
    loaded = loaded.model_copy(update={"store": store.url})  # a relative path means the same to whoever reads the run
    forced, only = _forced(loaded, force, first), stage_name(stage) if stage else None
    planned = (plan_run if dry_run else plan_to_run)(loaded, store, forced, only)
    show_plan(planned, loaded)
    if dry_run:
        return
    with ended_by_signals():
        if loaded.gates or not nothing_to_do(store, planned):
            run_flow(loaded, forced, only)
    out.print()
    show_results(store, planned)
    out.print(f"took    {duration(time.monotonic() - began)}")


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A flow's run: SIGTERM and Ctrl-C end it, are told in a line, and are exit codes."""
    # While a flow runs, Prefect handles SIGTERM: it records the end and then has the signal handled as before.
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"interrupted; {GOES_ON}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    except Terminated:
        err.print(f"ended by SIGTERM; {GOES_ON}", soft_wrap=True)
        raise typer.Exit(ExitCode.PREEMPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_terminated(*_: object) -> None:
    raise Terminated


def nothing_to_do(store: Store, planned: list[StagePlan]) -> bool:
    """Whether every stage is published, with all files there, and no Prefect server waits for a record of this run."""
    from flows.session import configured_server

    if any(stage.action != "reuse" for stage in planned) or configured_server():
        return False
    from tasks.stage import find

    return all(find(store, stage.ref) for stage in planned)


def run_flow(config: PipelineConfig, force: tuple[StageName, ...], only: StageName | None) -> None:
    """Run the flow on the configured Prefect server or on a temporary one."""
    from flows.session import prefect_session

    os.environ["RLHF_TERMINAL"] = "1"
    with prefect_session() as api:
        import flows.rlhf
        import flows.single

        quiet_prefect()
        err.print(f"[dim]Prefect: {api.removesuffix('/api')}[/]")
        if only:
            getattr(flows.single, only)(config, only in force)
        else:
            flows.rlhf.rlhf(config, force)


def quiet_prefect() -> None:
    """Keep Prefect's own lines off the terminal, where we report; they still go to its server."""

    def of_interest(record: logging.LogRecord) -> bool:
        if record.name.startswith(("prefect.flow_runs", "prefect.task_runs")):
            return record.levelno == logging.WARNING  # errors come to us as exceptions and are printed once
        return record.levelno >= logging.WARNING

    for handler in logging.getLogger().handlers:
        handler.addFilter(of_interest)


@app.command()
def chat(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="a pipeline YAML, an artifact's id, or a model's folder")
    ],
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="STAGE", help="with CONFIG: whose model; default: ppo or dpo, the last one"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="FOLDER", help="another model of the artifact, e.g. actor_ema"),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="answer this and stop; else a conversation")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1)] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0)] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0, max=1)] = None,
    system: Annotated[str | None, typer.Option("--system", help="system prompt, for chat templates")] = None,
    sets: Set = None,
    store: StoreOption = None,
) -> None:
    """Talk to a trained model."""
    if stage and stage_name(stage) not in MODEL_FOLDERS:
        raise ConfigError(f"--stage {stage}: has no model to talk to; choose {' or '.join(MODEL_FOLDERS)}")
    found = resolve(target, stage=stage, sets=sets or (), store=store)
    found = replace(found, folder=model or found.folder)
    options = {
        "--prompt": prompt,
        "--max-new-tokens": max_new_tokens,
        "--temperature": temperature,
        "--top-p": top_p,
        "--system": system,
    }
    command = [sys.executable, "-m", "rlhf_core.chat", "--model", found.model()]
    command += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    raise typer.Exit(subprocess.run(command).returncode)


app.command("eval")(evaluate)
app.command()(node)
app.command()(logs)
app.command()(status)
app.command()(up)
app.command()(down)
app.command()(resume)
app.command()(sweep)
app.command()(branch)
app.command("deploy")(deploy_command)
app.command("automations")(automations_command)


@app.command()
def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="CONFIG|STORE", help="a pipeline YAML whose store, or a store, to try")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="URL", help=f"store to try; default {DEFAULT_STORE}")
    ] = None,
    hosts: Annotated[
        str | None,
        typer.Option("--hosts", metavar="FILE|NAMES", help="look at these over ssh: a hostfile, or node1,node2"),
    ] = None,
    sets: Set = None,
) -> None:
    """Check that this machine can run the pipeline; exit code 1 if something is missing.

    With --hosts: that those machines can, each looked at over ssh as before a job; exit code 2 and one line for each reason why
    not. A CONFIG with launcher hostfile names its hosts itself; both are checked then.
    """
    from rlhf_core.doctor import checks
    from rlhf_core.doctor_hosts import check_hosts, has_hosts, hosts_of

    config = load_config(target, sets or ()) if target and target.endswith((".yaml", ".yml")) else None
    url = store or (config.store if config else target) or DEFAULT_STORE
    bad = False
    if hosts is None:
        found = checks(url)
        show_checks(found)
        bad = any(check.ok is False for check in found)
    if hosts is not None or (config and has_hosts(config)):
        findings = check_hosts(url, hosts_of(config, hosts))
        show_hosts(findings)
        refusals = [text for finding in findings for text in finding.refusals]
        for text in refusals:
            err.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
        if refusals:
            raise typer.Exit(ExitCode.CONFIG)
    raise typer.Exit(1 if bad else 0)


def _forced(config: PipelineConfig, force: list[str] | None, first: str | None) -> tuple[StageName, ...]:
    return forced_stages(config, [stage_name(text) for text in force or ()], stage_name(first) if first else None)


def _allow_code(allowed: bool) -> None:
    """What `--allow-code` means to this process and to the jobs it starts."""
    if allowed:
        os.environ["RLHF_ALLOW_CODE"] = "1"


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="rlhf")
    except EvalFailed as error:
        sys.exit(error.exit_code)
    except RlhfError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(int(error.exit_code))


if __name__ == "__main__":
    main()
