"""`rlhf logs CONFIG STAGE`: what the ranks of an attempt said, by time, with what it failed of on top."""

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.markup import escape

from flows.evaluation import Set
from flows.show import err, out
from flows.targets import stage_name
from rlhf_core.config import load_config
from rlhf_core.ends import Failure
from rlhf_core.errors import ConfigError
from rlhf_core.members import newest_attempt
from rlhf_core.plan import stage_refs
from rlhf_core.ranklog import merged
from rlhf_core.sealed import unseal
from rlhf_core.store import Store


def logs(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="pipeline YAML")],
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="whose")],
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="which; default: the newest")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="only this rank's lines")] = None,
    sets: Set = None,
) -> None:
    """Show the log of a stage's newest attempt: all ranks by time, and first why it failed, if it did."""
    loaded = load_config(config, sets or ())
    store = Store(loaded.store)
    ref = stage_refs(loaded)[stage_name(stage)]
    folder = f"{ref.id}/attempts/{attempt:04d}" if attempt else newest_attempt(store, ref.id)
    if folder is None or not store.list(folder):
        raise ConfigError(f"{ref.id}: there is no attempt{f' {attempt}' if attempt else ''} in {store.url}")
    if failure := _failure(store, folder):
        where = "" if failure.rank is None else f" (rank {failure.rank}{f' on {failure.host}' if failure.host else ''})"
        err.print(f"[bold red]{failure.kind}:[/] {escape(failure.detail)}{where}", soft_wrap=True)
        if failure.trace:
            err.print(escape(failure.trace.rstrip()), soft_wrap=True, style="red")
    shown = 0
    for line in merged(store, folder):
        if rank is None or line.rank == rank:
            when = datetime.fromtimestamp(line.time, UTC).strftime("%H:%M:%S.%f")[:-3]
            out.print(f"[dim]{when}[/] [cyan]{line.rank}[/] {escape(line.text)}", soft_wrap=True, highlight=False)
            shown += 1
    if not shown:
        err.print(f"{store.url}/{folder}: nothing from its ranks{' yet' if not failure else ''}; log.txt has the rest")


def _failure(store: Store, folder: str) -> Failure | None:
    try:
        return unseal(Failure, store.read(f"{folder}/failure.json"), folder)
    except KeyError:
        return None
