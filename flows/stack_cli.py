"""`rlhf up`, `rlhf down`, `rlhf deploy`, `rlhf automations`: the local stack, and what any Prefect server needs of us."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flows.show import err, out, table
from flows.stack import PARTS, Part, PartName, Stack
from flows.stack_parts import BUCKET, environment, s3_environment, start_s3, start_server, start_worker
from rlhf_core.config import load_config
from rlhf_core.errors import ConfigError

QUICKSTART = Path(__file__).parents[1] / "deployments" / "configs" / "quickstart.yaml"
ConfigOption = Annotated[
    str | None,
    typer.Argument(metavar="[CONFIG]", help="what deployments run by default: a YAML's path or store URL [quickstart]"),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="runs that may train at once; at first 1")]
MISSING = 1


def up(
    config: ConfigOption = None,
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="of Prefect's server; default: one that is free")
    ] = None,
    s3: Annotated[bool, typer.Option("--s3", help="also an S3 server (SeaweedFS) with a bucket")] = False,
    database: Annotated[
        str | None, typer.Option("--database", metavar="URL", help="postgresql+asyncpg://…; default: SQLite in .rlhf")
    ] = None,
    limit: Limit = None,
    status: Annotated[
        bool, typer.Option("--status", help="only say what runs; exit code 1 if a part is not there")
    ] = False,
) -> None:
    """Bring up Prefect here: server, work pool, deployments, worker and automations, all below .rlhf.

    What runs already is left as it is; what has died is started again. `rlhf down` ends it. Runs begin in this folder.
    """
    stack = Stack()
    if status:
        raise typer.Exit(0 if show_stack(stack) else MISSING)
    file, began = _place(config), datetime.now(UTC)
    with stack.alone():
        worker = stack.part("worker")
        if s3 and not stack.part("s3") and worker and stack.lives(worker):
            raise ConfigError("--s3: a worker runs that would not know of it; `rlhf down`, then `rlhf up --s3`")
        if s3 or stack.part("s3"):
            _start(stack, "s3", lambda: start_s3(stack))
        _start(stack, "server", lambda: start_server(stack, port, database), port)
        _become_client(stack)
        from flows.deploy import POOL, deploy, go_on

        deploy(file, Path.cwd(), limit)
        err.print("deployments, work pool and automations: up to date")
        if not (worker and stack.lives(worker)):
            for name in go_on(stack.run_ids(), set(stack.record().get("interrupted") or ()), began):
                err.print(f"run {name}: has lost its process; it goes on")
            stack.write(interrupted=None)
        _start(stack, "worker", lambda: start_worker(stack, POOL))
    show_stack(stack)
    _show_next(stack)


def down() -> None:
    """End what `rlhf up` has started: runs save and end first, then the worker and the servers. All data stay.

    A run that was going on is marked crashed; it goes on by itself some time after the next `rlhf up`.
    """
    stack = Stack()
    if not any(stack.part(name) for name in PARTS) and not stack.processes():
        err.print("nothing to end: no stack was started in this folder")
        return
    with stack.alone():
        stack.end_runs(_tell)
        for name in ("worker", "server", "s3"):
            stack.end_part(name, _tell)


def deploy_command(
    config: ConfigOption = None,
    limit: Limit = None,
    workdir: Annotated[
        Path | None, typer.Option("--workdir", help="where runs begin, on the workers' machines; default: this folder")
    ] = None,
) -> None:
    """Put work pool, deployments and automations onto the Prefect server of PREFECT_API_URL; again after each update."""
    _require_server()
    from flows.deploy import DEPLOYMENTS, POOL, deploy

    done = deploy(_place(config), (workdir or Path.cwd()).absolute(), limit)
    err.print(f"work pool {POOL}: there\n{len(DEPLOYMENTS)} deployments: up to date")
    _show_automations(done)


def automations_command(
    notify: Annotated[
        Path | None,
        typer.Option("--notify", metavar="FILE", help="who is told of what, as in deployments/notifications.yaml"),
    ] = None,
) -> None:
    """Create or update the automations on the Prefect server of PREFECT_API_URL.

    Dead runs are marked and started again; with [bold]--notify[/], webhooks and messages go out when runs fail or gates fire.
    """
    _require_server()
    from flows import automations, notifications

    told = notifications.install(notifications.load_notifications(notify)) if notify else {}
    _show_automations({**automations.install(automations.automations()), **told})


def show_stack(stack: Stack) -> bool:
    """A row for each part; whether all that was started runs, server and worker at least."""
    rows = table("part", "", "pid", "where")
    well = True
    for name in PARTS:
        part = stack.part(name)
        if part is None:
            if name != "s3":
                rows.add_row(name, "[dim]not started[/]", "", "")
                well = False
        elif stack.lives(part):
            rows.add_row(name, "[green]runs[/]", str(part.pid), escape(part.url or str(stack.log(name))))
        else:
            rows.add_row(name, "[red]died[/]", str(part.pid), escape(str(stack.log(name))))
            well = False
    out.print(rows)
    for name in PARTS:
        part = stack.part(name)
        if part and not stack.lives(part):
            err.print(
                f"{name} (pid {part.pid}) has died; its last words, then start it again by `rlhf up`:", soft_wrap=True
            )
            err.print(escape(stack.last_words(name)), soft_wrap=True)
    return well


def _start(stack: Stack, name: PartName, begin: Callable[[], Part], port: int | None = None) -> None:
    """Start a part that does not run; ConfigError if it runs on another port than the one that is asked for."""
    part = stack.part(name)
    if part and stack.lives(part):
        if port and part.url and not part.url.endswith(f":{port}"):
            raise ConfigError(f"--port {port}: the server runs at {part.url} already; `rlhf down` ends it")
        return
    if part:
        err.print(f"{name}: had died (pid {part.pid}); starting it again")
    else:
        err.print(f"{name}: starting")
    try:
        begin()
    except BaseException:
        stack.end_part(name, lambda _: None)
        raise


def _place(config: str | None) -> str:
    """The default configuration as runs will find it: it is read once here, so that a mistake shows now."""
    if config is None:
        return str(QUICKSTART)
    if "://" in config:
        return config
    load_config(config)
    return str(Path(config).absolute())


def _become_client(stack: Stack) -> None:
    """Have this process, and Prefect's command below it, talk to the stack's server."""
    own = environment(stack)
    for name in set(os.environ) - set(own):
        del os.environ[name]
    os.environ.update(own)


def _require_server() -> None:
    from flows.session import configured_server

    if configured_server() is None:
        raise ConfigError("no Prefect server is configured: set PREFECT_API_URL, or start a local one by `rlhf up`")


def _show_automations(done: dict[str, str]) -> None:
    for name, what in done.items():
        out.print(f"automation {name}: {what}", highlight=False)


def _show_next(stack: Stack) -> None:
    server = stack.part("server")
    assert server and server.url
    lines = [
        "",
        f"open     {server.url}/deployments",
        "run      rlhf run CONFIG (recorded there), or Run on a deployment's page",
        "go on    rlhf resume RUN, or Retry on a run's page",
        f"prefect  export PREFECT_HOME={stack.home}",
        "end      rlhf down",
    ]
    if keys := s3_environment(stack):
        lines[1:1] = [
            f"s3       {' '.join(f'{name}={value}' for name, value in keys.items())}",
            f"store    s3://{BUCKET}/…",
        ]
    out.print("\n".join(lines), highlight=False, soft_wrap=True)


def _tell(line: str) -> None:
    err.print(line, highlight=False)
