"""The commands `rlhf artifacts …`: look at what a store holds, check it, promote and copy artifacts, remove what is not needed."""

import re
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flows.evaluation import StoreOption
from flows.show import err, out, show_lineage, show_list, show_manifest
from flows.show_store import bytes_bar, show_aliases, show_damaged, show_removals, show_verified
from flows.targets import find_artifact, stage_name, store_of
from rlhf_core import aliases
from rlhf_core.artifacts import Manifest, survey
from rlhf_core.errors import ConfigError, ExitCode, StoreError
from rlhf_core.gc import Policy, collect, orphans, plan, unfinished_writes
from rlhf_core.inventory import look
from rlhf_core.layout import artifacts_of
from rlhf_core.store import Store
from rlhf_core.tensorboard import write_events
from rlhf_core.transfer import closure, copy
from rlhf_core.verification import verify_store
from tasks.headline import duration, size

UNITS = {"h": "hours", "d": "days", "w": "weeks"}
ConfigOption = Annotated[Path | None, typer.Option("--config", metavar="CONFIG", help="take the store from this file")]
Id = Annotated[str, typer.Argument(metavar="ID", help="the beginning of an id, name or fingerprint, or @ALIAS")]
Ids = Annotated[list[str], typer.Argument(metavar="ID…", help="beginnings of ids, or @ALIAS")]

artifacts = typer.Typer(no_args_is_help=True, help="Look at what the store holds, check it, promote, copy, clean up.")


@artifacts.command("list")
def artifacts_list(
    stage: Annotated[str | None, typer.Argument(metavar="STAGE", help="only this stage's")] = None,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """List published artifacts, oldest first, and those whose manifest is damaged."""
    place = store_of(store, config)
    found, damaged = survey(place, stage_name(stage) if stage else None)
    if not found and not damaged:
        err.print(f"no artifacts in {place.url}")
        return
    if found:
        show_list(found)
    if damaged:
        show_damaged(damaged)


@artifacts.command("show")
def artifacts_show(id: Id, store: StoreOption = None, config: ConfigOption = None) -> None:
    """Show one artifact: metrics, files, the spec that defines it, provenance."""
    place = store_of(store, config)
    show_manifest(place, find_artifact(place, id))


@artifacts.command("lineage")
def artifacts_lineage(id: Id, store: StoreOption = None, config: ConfigOption = None) -> None:
    """Show the tree of what an artifact was made of."""
    place = store_of(store, config)
    known = {manifest.ref.id: manifest for manifest in survey(place)[0]}
    show_lineage(find_artifact(place, id).ref, known)


@artifacts.command("tensorboard")
def artifacts_tensorboard(
    id: Annotated[str | None, typer.Argument(metavar="ID", help="only this artifact; may be a prefix")] = None,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="where the event files go")] = Path(
        "tensorboard"
    ),
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Write the metrics of artifacts as event files: then `tensorboard --logdir DIR`."""
    place = store_of(store, config)
    written = write_events(place, [find_artifact(place, id)] if id else survey(place)[0], folder)
    out.print(f"{len(written)} artifacts in {folder}", soft_wrap=True)


@artifacts.command("verify")
def artifacts_verify(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID…", help="only these; beginnings of ids")] = None,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Read and hash again everything published, and the checkpoints of what is unfinished. Exit code 3: damage."""
    place = store_of(store, config)
    began = time.monotonic()
    wanted = _folders(place, ids) if ids else None
    with bytes_bar("verifying") as (begin, advance):
        found = verify_store(place, wanted, begin, advance)
    show_verified(found, time.monotonic() - began)
    if found.damages:
        raise typer.Exit(ExitCode.DATA)


def _folders(place: Store, ids: Iterable[str]) -> set[str]:
    """Ids of artifacts, published or not, that begin so; ConfigError for what none begins with."""
    known = artifacts_of(place.list(""))
    found: set[str] = set()
    for id in ids:
        begin = aliases.resolve_alias(place, id).id if id.startswith("@") else id.removeprefix(f"{place.url}/")
        some = {
            known_id for known_id in known if known_id.startswith(begin) or known_id.partition("/")[2].startswith(begin)
        }
        if not some:
            raise ConfigError(f"no artifact begins with {id!r} in {place.url}; see `rlhf artifacts list`")
        found |= some
    return found


@artifacts.command("gc")
def artifacts_gc(
    delete: Annotated[bool, typer.Option("--delete", help="remove it; without, only show what would go")] = False,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", min=1, metavar="N", help="keep the newest N of each stage and name")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="published ones at least so old: 12h, 30d, 8w")
    ] = None,
    unfinished_days: Annotated[
        float,
        typer.Option(
            "--unfinished-days", min=0, help="unfinished ones untouched for so long; 0: of any age, also unknown"
        ),
    ] = 7,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Show, or remove, what nobody needs; without --delete nothing is removed.

    What may go: artifacts that nothing kept was made of and that --keep-last or --older-than
    gives up (with both, an artifact goes if both say so), old unfinished artifacts, and
    leftovers, also of writes that were cut off a day ago or more.

    Kept are: what aliases stand for; all other published artifacts, unless an option says
    otherwise; what a job is building; what is unfinished and young; and whatever these were
    made of.
    """
    place = store_of(store, config)
    policy = Policy(keep_last, _age(older_than) if older_than else None, timedelta(days=unfinished_days))
    view = look(place)
    for trouble in view.unreadable:
        err.print(f"[yellow]cannot be read, so no artifact is removed:[/] {escape(trouble)}", soft_wrap=True)
    removals = [*orphans(place, view, policy), *plan(view, policy)]
    try:
        removals += unfinished_writes(place, view)
    except StoreError as error:  # on S3 that is a permission of its own
        err.print(f"[yellow]cut-off writes cannot be looked up:[/] {escape(str(error))}", soft_wrap=True)
    if not removals:
        out.print(f"nothing to remove in {place.url}", soft_wrap=True)
        return
    show_removals(removals)
    total = size(sum(removal.bytes for removal in removals))
    if not delete:
        out.print(f"{total} would be freed; nothing was removed: add --delete", soft_wrap=True)
        return
    freed = collect(place, policy, removals, on_spared=lambda r: err.print(f"{r.artifact}: in use by now, kept"))
    out.print(f"{size(freed)} freed")


def _age(text: str) -> timedelta:
    match = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if not match:
        raise ConfigError(f"--older-than {text!r}: write a number and h, d or w, e.g. 30d")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


@artifacts.command("promote")
def artifacts_promote(
    name: Annotated[str, typer.Argument(metavar="NAME", help="e.g. production; used as @production")],
    id: Id,
    note: Annotated[str, typer.Option("--note", metavar="TEXT", help="why, for people")] = "",
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="hash its files again, or look at sizes only")
    ] = True,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Make @NAME stand for an artifact. What it stood for before stays known as @NAME~1, @NAME~2, …"""
    place = store_of(store, config)
    made = aliases.promote(place, name, find_artifact(place, id), note, verify)
    out.print(f"@{made.name} is now {made.ref.id} ({made.number}. promotion)", soft_wrap=True)


@artifacts.command("aliases")
def artifacts_aliases(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="one alias, with all it stood for")] = None,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Show what aliases stand for, or all that one stood for, newest first."""
    place = store_of(store, config)
    keys = aliases.keys_of(place, name.removeprefix("@") if name else None)
    if not keys:
        err.print(f"no alias{f' {name}' if name else ''} in {place.url}", soft_wrap=True)
        return
    if name is None:
        keys = list({key.split("/")[1]: key for key in keys}.values())
    show_aliases(place, reversed(keys) if name else keys, newest=name is None)


@artifacts.command("copy")
def artifacts_copy(
    ids: Ids,
    to: Annotated[str, typer.Option("--to", metavar="URL", help="the store to copy to")],
    inputs: Annotated[bool, typer.Option("--inputs/--no-inputs", help="also what they were made of")] = True,
    store: StoreOption = None,
    config: ConfigOption = None,
) -> None:
    """Copy published artifacts to another store, verified. A copy that was cut off goes on when started again."""
    place, target = store_of(store, config), Store(to)
    began = time.monotonic()
    wanted: list[Manifest] = closure(place, [find_artifact(place, id) for id in ids], inputs)
    done = []
    with bytes_bar("copying") as (begin, advance):
        begin(sum(entry.size for manifest in wanted for entry in manifest.files))
        for manifest in wanted:
            done.append(copy(place, target, manifest, advance))
    for copied in done:
        sent = f"{copied.sent} files sent, {copied.present} there"
        out.print(f"{copied.manifest.ref.id}  {sent}", soft_wrap=True)
    out.print(
        f"{len(done)} artifacts in {target.url}, {size(sum(c.bytes for c in done))} sent in "
        f"{duration(time.monotonic() - began)}",
        soft_wrap=True,
    )
