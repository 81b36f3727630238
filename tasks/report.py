"""The pipeline report: one Prefect markdown artifact at the end of a run with a row for each stage.

Prefect's UI shows neither why a task was cached nor where its result lives, so this table does: reused, built or resumed,
fingerprint, time, speed, headline numbers and place. It is a view of the manifests, which stay the record.
"""

from collections.abc import Mapping, Sequence

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact

from rlhf_core.artifacts import ArtifactRef, Manifest, read_manifest, retired_before
from rlhf_core.config import PipelineConfig
from rlhf_core.fired import Fired, read_fired
from rlhf_core.plan import StagePlan
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from tasks.headline import duration, headline, speed
from tasks.stage_report import gates_text

DONE = {"reuse": "reused", "build": "built", "resume": "resumed"}


def report(config: PipelineConfig, plan: Mapping[StageName, StagePlan], refs: Mapping[StageName, ArtifactRef]) -> None:
    """Write the report of the current flow run; an error in it is logged and does not fail the run."""
    try:
        store = Store(config.store)
        manifests: dict[StageName, Manifest | None] = {stage: read_manifest(store, ref) for stage, ref in refs.items()}
        rows = [report_row(store, plan[stage], m) for stage, m in manifests.items() if m is not None]
        text = report_text(config, rows, [one.line for ref in refs.values() for one in fired_of(store, config, ref)])
        create_markdown_artifact(text, key="rlhf-report", description=f"{config.name}: all stages")
    except Exception as error:
        get_run_logger().warning("the report could not be written: %s: %s", type(error).__name__, error)


def fired_of(store: Store, config: PipelineConfig, ref: ArtifactRef) -> list[Fired]:
    """The configuration's gates that have fired on an artifact; a gate that fired in several attempts counts as in the last."""
    own = {gate.digest for gate in config.gates if gate.stage == ref.stage}
    found = read_fired(store, ref, retired_before(store, ref)) if own else []
    return list({one.gate.digest: one for one in found if one.gate.digest in own}.values())


def report_text(config: PipelineConfig, rows: list[str], gates: Sequence[str] = ()) -> str:
    """The report as markdown; `gates`: a line for each that has fired."""
    columns = ("stage", "", "fingerprint", "time", "tokens/s", "headline", "artifact")
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    return f"# {config.name}\n\n{head}\n" + "\n".join(rows) + "\n\n" + gates_text(gates)


def report_row(store: Store, planned: StagePlan, manifest: Manifest) -> str:
    """One stage as a row of the table."""
    metrics = manifest.metrics
    cells = (
        planned.stage,
        done(planned, manifest),
        f"`{planned.ref.fingerprint[:12]}`",
        duration(metrics.get("seconds")),
        speed(metrics),
        headline(planned.stage, metrics),
        f"`{store.url}/{planned.ref.id}`",
    )
    return f"| {' | '.join(cells)} |"


def done(planned: StagePlan, manifest: Manifest) -> str:
    """How the run came by an artifact: "reused", "built", "resumed from step 40", the last also after a retry within the run."""
    resumed = (manifest.provenance.get("job") or {}).get("resumed")
    if planned.action == "reuse" or not resumed:
        return DONE[planned.action]
    return f"resumed from {resumed[-1]['from']}"
