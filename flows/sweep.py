"""A sweep as a Prefect flow: the variants of one configuration, what they share built once, and a comparison at the end.

Stages that several variants need run first, as tasks of this flow; then each variant is a run of the pipeline's own flow below this
one, in which they are `Cached`. So a sweep trains one thing at a time, in this process: started from a deployment it fills the one
slot of the work pool that it has taken, and never waits for another, whatever the pool's limit. A variant that fails does not
stop the others; the flow fails at its end, with the comparison written. Running it again reuses all that is there.
"""

from collections.abc import Sequence
from typing import Any

from prefect import flow, get_run_logger

from flows.parameters import ConfigForm, chosen, run_name
from flows.rlhf import rlhf
from flows.selection import plan_to_run
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.errors import RlhfError
from rlhf_core.plan import StagePlan
from rlhf_core.store import Store
from rlhf_core.sweep import SharedStage, Variant, shared_stages, variants_of
from tasks.progress import say
from tasks.stage import run_planned
from tasks.sweep_report import report_sweep


class SweepFailed(RlhfError):
    """Some variants of a sweep have no result; the comparison of the others is written."""


def sweep_name() -> str:
    """The name of a sweep's run."""
    return f"{run_name()} sweep"


@flow(name="rlhf-sweep", flow_run_name=sweep_name, persist_result=False)
def sweep(
    config: ConfigForm = None,
    grid: tuple[str, ...] = (),
    variants: tuple[dict[str, Any], ...] = (),
    config_file: str | None = None,
    overrides: tuple[str, ...] = (),
) -> str:
    """Run the variants of a pipeline and compare them.

    Args:
        config: what the variants have in common; in the UI a form.
        grid: a field and its values each, e.g. ppo.kl_coef=0.02,0.05,0.1; all combinations are tried.
        variants: in place of a grid or beside it, a list of variants: values by dotted field.
        config_file: in place of config: path or store URL of its YAML.
        overrides: of the file's fields, for all variants.

    Returns:
        Where the comparison is.

    Raises:
        SweepFailed: at the end, if a variant failed.
    """
    config = chosen(config, config_file, overrides)
    every = variants_of(config, grid, variants)
    plans = plan_variants(every)
    stages = shared_stages(plans)
    failed: dict[int, str] = {}
    _build_shared(every, stages, failed)
    for variant in every:
        if variant.number not in failed:
            _run(variant, len(every), failed)
    place = report_sweep(config, every, plans, stages, failed)
    get_run_logger().info("comparison: %s", place)
    if failed:
        names = "; ".join(f"{n} ({every[n - 1].label}): {why}" for n, why in failed.items())
        raise SweepFailed(f"{len(failed)} of {len(every)} variants failed: {names}; the same command tries them again")
    return place


def plan_variants(variants: Sequence[Variant]) -> dict[int, list[StagePlan]]:
    """The plan of each variant, by number; ConfigError if one of them cannot run, before anything does."""
    return {each.number: plan_to_run(each.config, Store(each.config.store)) for each in variants}


def _build_shared(variants: Sequence[Variant], stages: Sequence[SharedStage], failed: dict[int, str]) -> None:
    """Build what several variants need, in the order of the pipeline; those of a stage that fails have failed."""
    done: dict[str, ArtifactRef] = {}
    for one in stages:
        planned, waiting = one.planned, [n for n in one.variants if n not in failed]
        if len(one.variants) == 1 or not waiting:
            continue
        config = variants[waiting[0] - 1].config
        inputs = {name: done[ref.id] for name, ref in planned.inputs.items()}
        try:
            done[planned.ref.id] = run_planned(config, {planned.stage: planned}, (), planned.stage, **inputs)
        except Exception as error:  # whatever it was, other variants may do without this stage
            failed.update(dict.fromkeys(waiting, _why(error, planned.stage)))


def _run(variant: Variant, count: int, failed: dict[int, str]) -> None:
    """Run one variant; a failure is noted."""
    name = f"{variant.config.name} {variant.number}: {variant.label}"
    say(f"variant {variant.number} of {count}: {variant.label}")
    try:
        rlhf.with_options(flow_run_name=lambda: name)(variant.config)
    except Exception as error:  # whatever it was, the others run
        get_run_logger().error("variant %d (%s) failed: %s", variant.number, variant.label, error)
        failed[variant.number] = _why(error)


def _why(error: Exception, stage: str = "") -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text if text.startswith(f"{stage}:") or not stage else f"{stage}: {text}"
