"""Which stages a run covers and which it builds anew, and all that can be checked before anything trains.

No Prefect here, so that `rlhf plan` is fast. The command line and the flows take their plan from here, so that what was
announced is what happens. `plan_run` looks at the configuration and its inputs, `plan_to_run` also at this machine,
and only for stages that will be built: a plan for a cluster can be read on a laptop.
"""

from collections.abc import Collection

from flows.checks import check_functions, check_machine
from rlhf_core.artifacts import read_manifest
from rlhf_core.config import PipelineConfig
from rlhf_core.errors import ConfigError
from rlhf_core.gold import gold_reward
from rlhf_core.plan import StagePlan, make_plan, plan_stage, stage_refs
from rlhf_core.sources import check_positions
from rlhf_core.specs import StageName
from rlhf_core.store import Store


def forced_stages(
    config: PipelineConfig, force: Collection[StageName], first: StageName | None
) -> tuple[StageName, ...]:
    """The stages of `--force` and, for `--from`, that stage and all after it; in pipeline order.

    Raises:
        ConfigError: the pipeline has no such stage.
    """
    stages = config.stages
    for stage in force:
        require_stage(config, stage)
    if first:
        require_stage(config, first)
    after = stages[stages.index(first) :] if first else ()
    return tuple(stage for stage in stages if stage in force or stage in after)


def require_stage(config: PipelineConfig, stage: StageName) -> None:
    """ConfigError if the configured pipeline has no such stage."""
    if stage in config.stages:
        return
    why = f"method is {config.method}"
    if stage == "reward" and config.method == "ppo":
        why = "ppo.rewards names no source of kind model"
    raise ConfigError(
        f"stage {stage!r} is not part of this pipeline ({why}); its stages are {', '.join(config.stages)}"
    )


def plan_single(config: PipelineConfig, stage: StageName, store: Store, force: bool = False) -> StagePlan:
    """The plan of one stage; ConfigError, with the command that makes it, for the first input that is not published."""
    require_stage(config, stage)
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
        ConfigError: a model, a file, a package or an input is missing, or a Python function would run unasked.
        StoreError: the store could not be reached.
    """
    for judged in (config.data.sampled_pairs, config.evaluate):
        if judged and judged.gold:
            gold_reward(judged.gold)  # it may need a package, and evaluation comes last
    check_positions(config.model, config.data.max_prompt_tokens, max(config.answer_limits.values()))
    if config.method == "ppo":
        check_functions(config)
    if only:
        return [plan_single(config, only, store, only in force)]
    return make_plan(config, store, force)


def plan_to_run(
    config: PipelineConfig, store: Store, force: tuple[StageName, ...] = (), only: StageName | None = None
) -> list[StagePlan]:
    """`plan_run`, and what its stages need of this machine; raises the same."""
    planned = plan_run(config, store, force, only)
    check_machine(config, [stage.stage for stage in planned if stage.action != "reuse"])
    return planned
