"""One stage of the pipeline as a flow of its own: `data`, `sft`, `reward`, `ppo`, `dpo`, `evaluate`.

The same task as in `flows.rlhf`, on inputs that are published already; nothing but the one stage is built. For a
cluster where stages have deployments (and so work pools) of their own, and for `rlhf run --stage`.
"""

from functools import partial

from prefect import Flow, flow

from flows.parameters import ConfigForm, chosen, run_name
from flows.selection import plan_to_run
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.config import PipelineConfig
from rlhf_core.plan import StagePlan
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from tasks.gates import with_changes
from tasks.report import PipelineReport
from tasks.stage import run_planned


def single(stage: StageName) -> Flow[..., dict[StageName, ArtifactRef]]:
    """The flow that runs one stage."""

    @flow(name=f"rlhf-{stage}", flow_run_name=run_name, persist_result=False)
    def run(
        config: ConfigForm = None,
        force: bool = False,
        config_file: str | None = None,
        overrides: tuple[str, ...] = (),
    ) -> dict[StageName, ArtifactRef]:
        """Run this stage alone; its inputs must be published.

        Args:
            config: the pipeline; in the UI a form.
            force: build the stage anew although it is published.
            config_file: in place of config: path or store URL of its YAML.
            overrides: of the file's fields, e.g. ppo.kl_coef=0.2.
        """
        return with_changes(chosen(config, config_file, overrides), partial(_run_stage, stage, force))

    return run


def _run_stage(stage: StageName, force: bool, config: PipelineConfig) -> dict[StageName, ArtifactRef]:
    forced = (stage,) if force else ()
    [planned] = plan_to_run(config, Store(config.store), forced, only=stage)
    plan: dict[StageName, StagePlan] = {stage: planned}
    with PipelineReport(config, plan) as report:
        ref = report.watch(partial(run_planned, config, plan, forced))(stage, **planned.inputs)
    return {stage: ref}


data = single("data")
sft = single("sft")
reward = single("reward")
ppo = single("ppo")
dpo = single("dpo")
evaluate = single("evaluate")
