"""Which stages a run covers and which it builds anew, and all that can be checked before anything trains.

No Prefect here, so that `rlhf plan` is fast. The command line and the flows take their plan from here, so that what was
announced is what happens.
"""

from collections.abc import Collection

from rlhf_core.artifacts import read_manifest
from rlhf_core.config import PipelineConfig
from rlhf_core.errors import ConfigError
from rlhf_core.gold import gold_reward
from rlhf_core.plan import StagePlan, make_plan, plan_stage, stage_refs
from rlhf_core.sources import check_positions
from rlhf_core.specs import STAGES, StageName
from rlhf_core.store import Store


def forced_stages(force: Collection[StageName], first: StageName | None) -> tuple[StageName, ...]:
    """The stages of `--force` and, for `--from`, that stage and all after it; in pipeline order."""
    after = STAGES[STAGES.index(first) :] if first else ()
    return tuple(stage for stage in STAGES if stage in force or stage in after)


def plan_single(config: PipelineConfig, stage: StageName, store: Store, force: bool = False) -> StagePlan:
    """The plan of one stage; ConfigError, with the command that makes it, for the first input that is not published."""
    planned = plan_stage(config, stage, stage_refs(config), store, force)
    for name, ref in planned.inputs.items():
        if read_manifest(store, ref) is None:
            raise ConfigError(
                f"{stage}: its input {ref.id} is not published in {store.url}; "
                f"make it with `rlhf run CONFIG --stage {name}`, or all that is missing with `rlhf run CONFIG`"
            )
    return planned


def plan_run(
    config: PipelineConfig, store: Store, force: tuple[StageName, ...] = (), only: StageName | None = None
) -> list[StagePlan]:
    """The plan of a run: of the whole pipeline, or of one stage.

    Raises:
        ConfigError: a model, a file, a package or an input is missing.
        StoreError: the store could not be reached.
    """
    for judged in (config.data.sampled_pairs, config.evaluate):
        if judged and judged.gold:
            gold_reward(judged.gold)  # it may need a package, and evaluation comes last
    answers = max(config.data.max_response_tokens, config.ppo.max_response_tokens or 0)
    check_positions(config.model, config.data.max_prompt_tokens, answers)
    if only:
        return [plan_single(config, only, store, only in force)]
    return make_plan(config, store, force)
