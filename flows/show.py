"""What the command line prints: the plan, the results of a run, and artifacts. rich tables and trees, no Prefect."""

import sys
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from rlhf_core.artifacts import ArtifactRef, Manifest, read_manifest
from rlhf_core.plan import StagePlan
from rlhf_core.store import Store
from tasks.headline import duration, headline, number, size, speed

PIPE_WIDTH = 160  # columns where the output is no terminal
out = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False)


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the one style of this program."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        right = column in ("time", "tokens/s", "size")
        made.add_column(column, overflow="fold", no_wrap=column == "artifact", justify="right" if right else "left")
    return made


def show_plan(plan: Iterable[StagePlan]) -> None:
    """One row a stage: what will happen, why, and the artifact it gives."""
    rows = table("stage", "action", "artifact", "why")
    for planned in plan:
        colour = "green" if planned.action == "reuse" else "yellow"
        action = f"[{colour}]{planned.action}[/]"
        rows.add_row(planned.stage, action, planned.ref.id, escape(planned.why))
    out.print(rows)


def show_results(store: Store, plan: Iterable[StagePlan]) -> None:
    """One row a stage: how it went and where its artifact is; then the path of the report."""
    rows = table("stage", "", "time", "tokens/s", "headline", "artifact")
    report = None
    for planned in plan:
        manifest = read_manifest(store, planned.ref)
        if manifest is None:
            continue
        how = {"reuse": "[green]reused[/]", "resume": "[yellow]resumed[/]"}.get(planned.action, "[yellow]built[/]")
        seconds = duration(manifest.metrics.get("seconds"))
        rows.add_row(
            planned.stage,
            how,
            seconds,
            speed(manifest.metrics),
            headline(planned.stage, manifest.metrics),
            planned.ref.id,
        )
        if any(entry.path == "report.html" for entry in manifest.files):
            key = manifest.key("report.html")
            report = store.local_path(key) or f"{store.url}/{key}"
    out.print(rows)
    out.print(f"store   {store.url}", soft_wrap=True)
    if report:
        out.print(f"report  {report}", soft_wrap=True)


def show_list(manifests: Iterable[Manifest]) -> None:
    """Artifacts as a table, oldest first."""
    rows = table("artifact", "created", "size", "time", "headline")
    for manifest in manifests:
        rows.add_row(
            manifest.ref.id,
            manifest.created,
            size(sum(entry.size for entry in manifest.files)),
            duration(manifest.metrics.get("seconds")),
            headline(manifest.ref.stage, manifest.metrics),
        )
    out.print(rows)


def show_manifest(store: Store, manifest: Manifest) -> None:
    """One artifact: where, inputs, metrics, files, and the spec that defines it."""
    out.print(f"[bold]{manifest.ref.id}[/]  {manifest.created}", soft_wrap=True)
    out.print(f"place        {store.url}/{manifest.place}", soft_wrap=True)
    out.print(f"fingerprint  {manifest.ref.fingerprint}")
    for name, ref in manifest.inputs.items():
        out.print(f"input        {name}: {ref.id}", soft_wrap=True)
    metrics = table("metric", "value")
    for key, value in manifest.metrics.items():
        metrics.add_row(key, escape(number(value)))
    files = table("size", "file")
    for entry in manifest.files:
        files.add_row(size(entry.size), entry.path)
    out.print(metrics, files)
    out.print("[bold]spec[/]")
    out.print_json(data=manifest.spec)
    out.print("[bold]provenance[/]")
    out.print_json(data=manifest.provenance)


def show_lineage(ref: ArtifactRef, known: Mapping[str, Manifest]) -> None:
    """The tree of what an artifact was made of, back to the data; what appears again is opened only once."""
    out.print(_lineage(ref, known, set()))


def _lineage(ref: ArtifactRef, known: Mapping[str, Manifest], opened: set[str]) -> Tree:
    manifest = known.get(ref.id)
    summary = headline(ref.stage, manifest.metrics) if manifest else "not published"
    tree = Tree(f"{ref.id}  [dim]{escape(summary)}[/]")
    if manifest and ref.id not in opened:
        opened.add(ref.id)
        tree.children += [_lineage(child, known, opened) for child in manifest.inputs.values()]
    return tree
