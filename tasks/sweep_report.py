"""The end of a sweep: its comparison, as a page in the store and as a markdown artifact in Prefect's UI.

A view of the manifests and logs, which stay the record: so it is made anew each time, also of a sweep of which all is reused or
some has failed, and put below `sweeps/` in the store, where no artifact is. A stage that has not finished is drawn as far as its
newest checkpoint tells.
"""

import base64
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

from rlhf_core.artifacts import Manifest, read_manifest, retired_before
from rlhf_core.config import PipelineConfig
from rlhf_core.plan import StagePlan
from rlhf_core.store import Store
from rlhf_core.sweep import SharedStage, Variant, sweep_id
from tasks.headline import headline
from tasks.report import done
from tasks.stage_report import MOST_BYTES, Row, read_stored

if TYPE_CHECKING:
    from rlhf_core.sweep_report import StageResult, VariantResult

TRAINED = ("sft", "reward", "ppo", "dpo")


def report_sweep(
    config: PipelineConfig,
    variants: Sequence[Variant],
    plans: Mapping[int, Sequence[StagePlan]],
    stages: Sequence[SharedStage],
    failed: Mapping[int, str],
) -> str:
    """Write the comparison of a sweep whose variants have ended; returns where its page is.

    Args:
        config: what the variants have in common.
        variants: all of them.
        plans: theirs, by number, from before the sweep.
        stages: each distinct stage once.
        failed: why those that failed did, by number.
    """
    from rlhf_core.sweep_plots import Line  # draws with matplotlib: not at start-up
    from rlhf_core.sweep_report import markdown, write_sweep_report

    store = Store(config.store)
    manifests = {one.planned.ref.id: read_manifest(store, one.planned.ref) for one in stages}
    lines: dict[str, list[Line]] = {}
    for one in stages:
        ref = one.planned.ref
        if ref.stage in TRAINED and len(one.variants) < len(variants):
            rows = _rows(store, one.planned, manifests[ref.id])
            lines.setdefault(ref.stage, []).append(Line(tuple(one.variants), rows))
    results = [_result(store, each, plans[each.number], stages, manifests, failed) for each in variants]
    rows = [_stage_row(one, manifests[one.planned.ref.id]) for one in stages]
    title = f"{config.name}: {len(variants)} variants compared"
    folder = sweep_id(config.name, [{planned.stage: planned.ref for planned in plan} for plan in plans.values()])
    place = str(store.local_path(f"{folder}/report.html") or f"{store.url}/{folder}/report.html")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        write_sweep_report(out, title=title, results=results, stages=rows, curves=lines)
        record = {"title": title, "variants": [asdict(r) for r in results], "stages": [asdict(row) for row in rows]}
        (out / "sweep.json").write_text(json.dumps(record, indent=1))
        for file in sorted(path for path in out.rglob("*") if path.is_file()):
            store.upload(file, f"{folder}/{file.relative_to(out).as_posix()}")
        text = markdown(title, results, rows, place)
        for name in ("plane-gold", "plane-score", "plane-reward"):
            text = _with_image(text, out / "plots" / f"{name}.png")
    try:
        create_markdown_artifact(text, key="rlhf-sweep", description=title)
    except Exception as error:  # the page is there
        get_run_logger().warning("the report cannot be shown in the UI: %s: %s", type(error).__name__, error)
    return place


def _rows(store: Store, planned: StagePlan, manifest: Manifest | None) -> Sequence[Row]:
    return read_stored(store, planned.ref, manifest, retired_before(store, planned.ref)).rows


def _result(
    store: Store,
    variant: Variant,
    plan: Sequence[StagePlan],
    stages: Sequence[SharedStage],
    manifests: Mapping[str, Manifest | None],
    failed: Mapping[int, str],
) -> "VariantResult":
    from rlhf_core.sweep_report import VariantResult, numbers_of

    own = {planned.stage: manifests[planned.ref.id] for planned in plan}
    aligned, evaluate = own.get("ppo") or own.get("dpo"), own["evaluate"]
    numbers, sft = numbers_of(aligned.metrics if aligned else {}, _evaluation(store, evaluate))
    alone = [manifests[one.planned.ref.id] for one in stages if one.variants == [variant.number]]
    seconds = sum(float(manifest.metrics.get("seconds") or 0) for manifest in alone if manifest)
    why = failed.get(variant.number, "")
    return VariantResult(variant.number, variant.label, why, numbers, sft, seconds or None)


def _evaluation(store: Store, manifest: Manifest | None) -> dict[str, Any]:
    """An evaluation.json; empty if there is none."""
    if manifest is None or not manifest.files_of("evaluation.json"):
        return {}
    return json.loads(store.read(manifest.key("evaluation.json")))


def _stage_row(one: SharedStage, manifest: Manifest | None) -> "StageResult":
    from rlhf_core.sweep_report import StageResult

    planned = one.planned
    if manifest is None:
        return StageResult(planned.stage, planned.ref.id, "not there", tuple(one.variants))
    seconds, numbers = manifest.metrics.get("seconds"), headline(planned.stage, manifest.metrics)
    return StageResult(planned.stage, planned.ref.id, done(planned, manifest), tuple(one.variants), seconds, numbers)


def _with_image(text: str, path: Path) -> str:
    """The text with a drawing below it, if there is one and room for it."""
    if not path.exists():
        return text
    image = f"\n![{path.stem}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})\n"
    return text + image if len(text) + len(image) < MOST_BYTES else text
