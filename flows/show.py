"""What the command line prints: the plan, the results of a run, and artifacts. rich tables and trees, no Prefect."""

import sys
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from rlhf_core.artifacts import ArtifactRef, Manifest, read_manifest
from rlhf_core.config import PipelineConfig
from rlhf_core.doctor import Check
from rlhf_core.doctor_hosts import HostFinding
from rlhf_core.errors import ConfigError
from rlhf_core.hosts import batch_of, is_unnamed, seats
from rlhf_core.plan import StagePlan
from rlhf_core.resources import Resources
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from tasks.headline import duration, headline, number, size, speed

MARKS = {True: "[green]ok[/]", False: "[red]no[/]", None: "[yellow]?[/]"}
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


def show_plan(plan: Iterable[StagePlan], config: PipelineConfig | None = None) -> None:
    """One row a stage: what will happen, why, and the artifact it gives; with `config` also on which nodes, if on several."""
    rows = table("stage", "action", "artifact", "why")
    stages = list(plan)
    for planned in stages:
        colour = "green" if planned.action == "reuse" else "yellow"
        action = f"[{colour}]{planned.action}[/]"
        rows.add_row(planned.stage, action, planned.ref.id, escape(planned.why))
    out.print(rows)
    if config:
        show_gates(config, [planned.stage for planned in stages])
        show_nodes(config, [planned.stage for planned in stages if planned.action != "reuse"])


def show_gates(config: PipelineConfig, stages: Iterable[StageName]) -> None:
    """One line for each gate of some stages."""
    for gate in (gate for stage in stages for gate in config.gates if gate.stage == stage):
        when = "while it runs" if gate.during else "at its end"
        out.print(f"gate    {gate.stage}, {when}: {gate.condition}: {gate.action.replace('_', ' ')}", markup=False)


def show_nodes(config: PipelineConfig, stages: Iterable[StageName]) -> None:
    """One line for each set of nodes that stages run on; nothing for stages on this machine alone."""
    found: dict[str, list[str]] = {}
    for stage in stages:
        resources = config.resources.of(stage)
        if resources.launcher != "local":
            found.setdefault(nodes_text(resources, batch_of(stage, getattr(config, stage).model_dump())), []).append(
                stage
            )
    for text, names in found.items():
        out.print(f"nodes   {', '.join(names)}: {text}", soft_wrap=True, markup=False)
    if found and config.store.partition("://")[0] not in ("s3", "memory"):
        out.print(f"store   {config.store}: all nodes must see it, on a file system that they share", soft_wrap=True)


def nodes_text(resources: Resources, batch: int | None) -> str:
    """The nodes of a stage, e.g. `2 x 8 processes over ssh: node1, node2`; what is wrong with them, where that shows already."""
    how = {"hostfile": "over ssh", "slurm": "by Slurm", "nodes": "started elsewhere by `rlhf node`"}[resources.launcher]
    try:
        places = seats(resources, batch)
    except ConfigError as error:
        return str(error)
    names = "" if is_unnamed(places[0]) else f": {', '.join(seat.host for seat in places)}"
    return f"{len(places)} x {resources.processes} processes {how}{names}"


def show_checks(found: Iterable[Check]) -> None:
    """One row a check of this machine."""
    rows = table("", "check", "detail")
    for check in found:
        remedy = f"\n[yellow]{escape(check.remedy)}[/]" if check.remedy else ""
        rows.add_row(MARKS[check.ok], check.name, escape(check.detail) + remedy)
    out.print(rows)


def show_hosts(found: Iterable[HostFinding]) -> None:
    """One row a host: whether it can take part, and what it has."""
    rows = table(
        "", "host", "answered", "Python", "torch", "deepspeed", "computes on", "cores", "memory free", "disk free"
    )
    for finding in found:
        facts, mark = finding.facts, MARKS[not finding.refusals]
        if facts is None:
            rows.add_row(mark, finding.host, "no")
            continue
        rows.add_row(
            mark,
            finding.host,
            duration(finding.seconds),
            facts.python,
            facts.versions.get("torch", "-"),
            facts.versions.get("deepspeed", "-"),
            "cpu" if facts.accelerator == "cpu" else f"{facts.devices} GPUs",
            str(facts.cores),
            size(facts.memory_free),
            size(facts.disk_free),
        )
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
