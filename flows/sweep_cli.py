"""`rlhf sweep`: the variants of one configuration, with what they share made once, and a comparison at the end.

Shows what will happen before anything does: the variants, and every distinct stage with the variants that need it. Runs here, as
`rlhf run` does, on the configured Prefect server or a temporary one; for a worker there is the deployment `rlhf-sweep/sweep`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from flows.evaluation import Set
from flows.selection import plan_run
from flows.show import err, out, table
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.plan import StagePlan
from rlhf_core.store import Store
from rlhf_core.sweep import SharedStage, Variant, read_list, shared_stages, variants_of


def sweep(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="pipeline YAML: what the variants have in common")],
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="FIELD=A,B", help="values of a field; repeatable: all combinations"),
    ] = None,
    listed: Annotated[
        Path | None,
        typer.Option("--list", metavar="FILE", help="YAML list of variants, each {field: value, …}; times the grid"),
    ] = None,
    sets: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show variants and stages, and stop")] = False,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="let Python functions named in ppo.rewards run as part of the job")
    ] = False,
) -> None:
    """Run variants of a pipeline, build what they share once, and compare them on one page.

    A variant that fails does not stop the others; the command then ends with code 1, and the same command tries it again
    and reuses the rest.
    """
    if allow_code:
        os.environ["RLHF_ALLOW_CODE"] = "1"
    loaded = load_config(config, sets or ())
    loaded = loaded.model_copy(update={"store": Store(loaded.store).url})
    entries = read_list(listed) if listed else []
    variants = variants_of(loaded, grid or (), entries)
    store = Store(loaded.store)
    plans = {each.number: plan_run(each.config, store) for each in variants}
    show_sweep(variants, plans, shared_stages(plans))
    if not dry_run:
        _run(loaded, tuple(grid or ()), tuple(entries))


def show_sweep(
    variants: Sequence[Variant], plans: Mapping[int, Sequence[StagePlan]], stages: Sequence[SharedStage]
) -> None:
    """The variants, and each distinct stage with those that need it."""
    rows = table("", "variant", "to build")
    for each in variants:
        todo = ", ".join(planned.stage for planned in plans[each.number] if planned.action != "reuse")
        rows.add_row(str(each.number), escape(each.label), todo or "[green]nothing[/]")
    out.print(rows)
    out.print()
    rows = table("stage", "action", "artifact", "variants", "why")
    for one in stages:
        planned = one.planned
        colour = "green" if planned.action == "reuse" else "yellow"
        shared = "all" if len(one.variants) == len(variants) else ", ".join(map(str, one.variants))
        action = f"[{colour}]{planned.action}[/]"
        rows.add_row(planned.stage, action, planned.ref.id, f"{len(one.variants)}: {shared}", escape(planned.why))
    out.print(rows)
    due = sum(one.planned.action != "reuse" for one in stages)
    alone = sum(planned.action != "reuse" for plan in plans.values() for planned in plan)
    out.print(f"\n{due} stages to build for {len(variants)} variants; {alone} if they shared none", soft_wrap=True)


def _run(config: PipelineConfig, grid: tuple[str, ...], entries: tuple[dict[str, Any], ...]) -> None:
    from flows.cli import ended_by_signals, quiet_prefect
    from flows.session import prefect_session

    os.environ["RLHF_TERMINAL"] = "1"
    with ended_by_signals(), prefect_session() as api:
        from flows.sweep import sweep as sweep_flow

        quiet_prefect()
        err.print(f"[dim]Prefect: {api.removesuffix('/api')}[/]")
        place = sweep_flow(config, grid, entries)
    out.print(f"report  {place}", soft_wrap=True, highlight=False)
