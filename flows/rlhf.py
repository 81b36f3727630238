"""The pipeline as a Prefect flow: data -> sft -> reward -> ppo -> evaluate, or data -> sft -> dpo -> evaluate.

Each stage is one `deepspeed` job whose result is an immutable artifact in the store. A stage that has finished is reused,
one that was cut off goes on from its last checkpoint: so running the flow again, or *Retry* in the UI, is always right. The plan
checks all that can be checked (configuration, model and data in place, store in reach) before anything trains.
"""

from functools import partial

from prefect import flow

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


@flow(name="rlhf", flow_run_name=run_name, persist_result=False)
def rlhf(
    config: ConfigForm = None,
    force: tuple[StageName, ...] = (),
    config_file: str | None = None,
    overrides: tuple[str, ...] = (),
) -> dict[StageName, ArtifactRef]:
    """Run the whole pipeline.

    Args:
        config: the pipeline; in the UI a form.
        force: stages to build anew although they are published.
        config_file: in place of config: path or store URL of its YAML.
        overrides: of the file's fields, e.g. ppo.kl_coef=0.2.

    Returns:
        The artifact of each stage.
    """
    return with_changes(chosen(config, config_file, overrides), partial(_run, force))


def _run(force: tuple[StageName, ...], config: PipelineConfig) -> dict[StageName, ArtifactRef]:
    plan: dict[StageName, StagePlan] = {
        planned.stage: planned for planned in plan_to_run(config, Store(config.store), force)
    }
    preferences: dict[StageName, ArtifactRef]  # what learns from them: a reward model and PPO, or DPO at once
    with PipelineReport(config, plan) as report:
        stage = report.watch(partial(run_planned, config, plan, force))
        data = stage("data")
        sft = stage("sft", data=data)
        if config.method == "dpo":
            preferences = {"dpo": stage("dpo", data=data, sft=sft)}
        elif config.ppo.uses_reward_model:
            reward = stage("reward", data=data, sft=sft)
            ppo = stage("ppo", data=data, sft=sft, reward=reward)
            preferences = {"reward": reward, "ppo": ppo}
        else:  # functions or endpoints score the answers
            preferences = {"ppo": stage("ppo", data=data, sft=sft)}
        evaluate = stage("evaluate", data=data, sft=sft, **preferences)
    return {"data": data, "sft": sft, **preferences, "evaluate": evaluate}
