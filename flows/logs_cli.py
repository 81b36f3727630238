"""`rlhf logs`: what the ranks of an attempt said, by time, with what it failed of on top; or, followed, as it comes."""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flows.evaluation import Set, StoreOption
from flows.follow import follow
from flows.show import err, out
from flows.targets import DEFAULT_STORE, stage_name
from rlhf_core.aliases import resolve_alias
from rlhf_core.config import load_config
from rlhf_core.ends import Failure
from rlhf_core.errors import ConfigError
from rlhf_core.follow import Attempt
from rlhf_core.layout import artifacts_of
from rlhf_core.members import newest_attempt
from rlhf_core.plan import stage_refs
from rlhf_core.ranklog import Line, merged
from rlhf_core.sealed import unseal
from rlhf_core.store import Store

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def logs(
    target: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG|ARTIFACT", help="a pipeline YAML, or the beginning of an artifact's id, or @ALIAS"
        ),
    ],
    stage: Annotated[str | None, typer.Argument(metavar="STAGE", help="with CONFIG: whose")] = None,
    follow_it: Annotated[
        bool,
        typer.Option("--follow", "-f", help="go on as lines come, through later attempts, until published or failed"),
    ] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", min=0, metavar="N", help="only the last N lines there are")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="AGE|TIME", help="only later lines: 90s, 10m, 2h, 1d, or an ISO time"),
    ] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", min=1, help="which; default: the newest")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="only this rank's lines")] = None,
    sets: Set = None,
    store: StoreOption = None,
) -> None:
    """Show the log of a stage's newest attempt: all ranks by time, and first why it failed.

    With --follow the log goes on as it comes to the store, at most a minute behind the job
    (a few seconds in a local store), and through later attempts, which are announced.

    [bold]Exit codes of --follow[/]

      0      the stage is published
      130    Ctrl-C; the job goes on
      75     its run was stopped; start it again
      else   it has failed for good: the code of its failure, 1 where it has none
    """
    place, id = _artifact(target, stage, sets or (), store)
    after = _after(since)

    def wanted(lines: Iterable[Line]) -> Iterator[Line]:
        return (line for line in lines if (rank is None or line.rank == rank) and (not line.time or line.time >= after))

    if follow_it:
        try:
            code = follow(place, id, lambda lines: _show(wanted(lines)), tail, attempt)
        except KeyboardInterrupt:
            err.print("no longer following; what runs goes on")
            code = 130
        raise typer.Exit(code)
    folder = f"{id}/attempts/{attempt:04d}" if attempt else newest_attempt(place, id)
    listed = place.list(folder) if folder else {}
    if folder is None or not listed:
        raise ConfigError(f"{id}: there is no attempt{f' {attempt}' if attempt else ''} in {place.url}")
    failure = _tell_failure(place, folder)
    lines = wanted(_lines(place, folder, listed))
    if not _show(lines if tail is None else deque(lines, tail)):
        err.print(f"{place.url}/{folder}: nothing from its ranks{' yet' if not failure else ''}; log.txt has the rest")


def _lines(store: Store, folder: str, listed: dict[str, int]) -> Iterable[Line]:
    """All lines of an attempt there are."""
    return Attempt(store, folder).new_lines(listed) if folder.startswith("data/") else merged(store, folder)


def _show(lines: Iterable[Line]) -> int:
    """Print lines; returns how many there were."""
    shown = 0
    for shown, line in enumerate(lines, 1):  # noqa: B007
        when = f"[dim]{datetime.fromtimestamp(line.time, UTC).strftime('%H:%M:%S.%f')[:-3]}[/] " if line.time else ""
        who = "" if line.rank is None else f"[cyan]{line.rank}[/] "
        out.print(f"{when}{who}{escape(line.text)}", soft_wrap=True, highlight=False)
    return shown


def _tell_failure(store: Store, folder: str) -> Failure | None:
    """Print why an attempt failed, if it did."""
    with suppress(KeyError):
        failure = unseal(Failure, store.read(f"{folder}/failure.json"), folder)
        where = "" if failure.rank is None else f" (rank {failure.rank}{f' on {failure.host}' if failure.host else ''})"
        err.print(f"[bold red]{failure.kind}:[/] {escape(failure.detail)}{where}", soft_wrap=True)
        if failure.trace:
            err.print(escape(failure.trace.rstrip()), soft_wrap=True, style="red")
        return failure
    return None


def _artifact(target: str, stage: str | None, sets: Iterable[str], url: str | None) -> tuple[Store, str]:
    """The store and the id of the artifact, published or not, that is meant; ConfigError if there is no such one."""
    if target.endswith((".yaml", ".yml")):
        config = load_config(Path(target), sets)
        if stage is None:
            raise ConfigError(f"{target}: say whose log, one of {', '.join(config.stages)}: rlhf logs {target} STAGE")
        refs = stage_refs(config)
        if (name := stage_name(stage)) not in refs:
            raise ConfigError(f"{name} is no stage of this pipeline; its stages are {', '.join(refs)}")
        return Store(url or config.store), refs[name].id
    if stage is not None:
        raise ConfigError(f"{target}: an artifact has one stage; leave out {stage!r}, or name a pipeline YAML")
    place = Store(url or DEFAULT_STORE)
    if target.startswith("@"):
        return place, resolve_alias(place, target).id
    begin = target.removeprefix(f"{place.url}/").rstrip("/")
    known = artifacts_of(place.list(""))
    found = [begin] if begin in known else [id for id in known if begin and (id.startswith(begin) or _short(id, begin))]
    if len(found) != 1:
        what = f"is the beginning of {len(found)} ids: {', '.join(found)}" if found else "begins no artifact's id"
        raise ConfigError(f"{target!r} {what} in {place.url}; see `rlhf status --all --store {place.url}`")
    return place, found[0]


def _short(id: str, begin: str) -> bool:
    """Whether the name or the fingerprint in an id begins so."""
    name = id.partition("/")[2]
    return name.startswith(begin) or name.rpartition("-")[2].startswith(begin)


def _after(since: str | None) -> float:
    """Seconds since the epoch that `--since` means; 0 without it."""
    if since is None:
        return 0.0
    if match := re.fullmatch(r"(\d{1,6})([smhd])", since):
        return (datetime.now(UTC) - timedelta(**{UNITS[match[2]]: int(match[1])})).timestamp()
    try:
        when = datetime.fromisoformat(since)
    except ValueError:
        raise ConfigError(
            f"--since {since!r}: write a number and s, m, h or d, e.g. 10m, or a time, e.g. 2026-01-31T12:00"
        ) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
