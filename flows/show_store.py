"""What the command line prints of a store's state: damage, what may go, aliases; and a bar while many bytes are read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from flows.show import err, out, table
from rlhf_core.aliases import read_alias
from rlhf_core.errors import IntegrityError
from rlhf_core.gc import Removal
from rlhf_core.store import Store
from rlhf_core.verification import Verified
from tasks.headline import duration, size

KINDS = {
    "artifact": "artifact",
    "unfinished": "unfinished artifact",
    "checkpoints": "checkpoints",
    "files": "files",
    "parts": "parts of checkpoints",
    "writes": "cut-off writes",
}


@contextmanager
def bytes_bar(text: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A progress bar of bytes on a terminal: yields what is told the total, and what is told how many more are done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda total: bar.update(task, total=total), lambda more: bar.advance(task, more)


def show_damaged(damaged: Mapping[str, IntegrityError]) -> None:
    """Artifacts whose manifest cannot be read, and why."""
    rows = table("artifact", "what is wrong")
    for id, error in damaged.items():
        rows.add_row(f"[red]{escape(id)}[/]", escape(str(error).splitlines()[0].partition("manifest.json: ")[2]))
    out.print(rows)


def show_verified(found: Verified, seconds: float) -> None:
    """What is damaged, one row an object, and how much was looked at."""
    if found.damages:
        rows = table("artifact", "file", "what is wrong")
        for damage in found.damages:
            rows.add_row(escape(damage.artifact), escape(damage.file), f"[red]{escape(damage.what)}[/]")
        out.print(rows)
    what = f"{len(found.damages)} damaged" if found.damages else "nothing is damaged"
    out.print(
        f"{what}: {found.artifacts} artifacts, {found.records:,} records, {found.files:,} files, {size(found.bytes)} "
        f"in {duration(seconds)}",
        soft_wrap=True,
    )


def show_removals(removals: Iterable[Removal]) -> None:
    """One row for each thing that may go."""
    rows = table("artifact", "what", "objects", "size", "why")
    for removal in removals:
        count = sum(len(step) for step in removal.steps)
        rows.add_row(removal.artifact, KINDS[removal.kind], f"{count:,}", size(removal.bytes), escape(removal.why))
    out.print(rows)


def show_aliases(store: Store, keys: Iterable[str], newest: bool) -> None:
    """Aliases and what they stand for, or one with all it stood for; a damaged record hides no other."""
    rows = table("alias", "artifact", "since", "note")
    for back, key in enumerate(keys):
        name = f"@{key.split('/')[1]}" + ("" if newest or not back else f"~{back}")
        try:
            alias = read_alias(store, key)
            rows.add_row(name, alias.ref.id, alias.created, escape(alias.note))
        except IntegrityError as error:
            rows.add_row(name, f"[red]{escape(str(error).removeprefix(f'{store.url}/'))}[/]", "", "")
    out.print(rows)
