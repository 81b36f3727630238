"""The smallest change of a configuration that makes a stage fit its devices.

Every combination of a few moves is weighed by what it costs a run: smaller micro-batches cost little, dividing more among ranks
costs traffic, computing activations again a quarter of the time, offload more, and LoRA changes what is learned, so it comes last.
The cheapest combination that fits is the answer; it is given as the `--set` words that make it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rlhf_core.config import PipelineConfig
from rlhf_core.planner.estimate import Shapes, StageEstimate, estimate
from rlhf_core.planner.hardware import Hardware
from rlhf_core.specs import LoRASpec, StageName

HALVING, STAGE_UP, PARAMETERS_PARTED, AGAIN, OFFLOAD, ADAPTERS = 1, 2, 4, 4, 12, 40
ADAPTED: dict[StageName, tuple[str, ...]] = {
    "sft": ("lora",), "reward": ("lora",), "dpo": ("lora",), "ppo": ("actor_lora", "critic_lora")
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What to set.

    Attributes:
        sets: words for `--set`, e.g. `resources.stages.ppo.zero_stage=2`.
        estimate: of the stage with them.
        identity: whether the result is another one (adapters instead of all weights).
    """

    sets: tuple[str, ...]
    estimate: StageEstimate
    identity: bool


def smallest_change(
    config: PipelineConfig, stage: StageName, hardware: Hardware, shapes: Shapes, rows: int | None = None
) -> Change | None:
    """The cheapest change with which a stage fits; one without words if it fits as it is, None if nothing helps.

    Args:
        config, stage, hardware, shapes, rows: as for `estimate`.
    """
    for _, fields, ranks in sorted(_combinations(config, stage, hardware), key=lambda one: one[0]):
        changed = _changed(config, stage, fields, ranks)
        found = estimate(changed, stage, hardware, shapes, rows)
        if found.fits:
            words = [f"resources.stages.{stage}.{field}={_word(value)}" for field, value in fields.items()]
            words += [f"{stage}.{field}.rank={rank}" for field, rank in ranks.items()]
            return Change(tuple(words), found, bool(ranks))
    return None


def _combinations(
    config: PipelineConfig, stage: StageName, hardware: Hardware
) -> Iterator[tuple[int, dict[str, Any], dict[str, int]]]:
    """(cost, resources that change, ranks of new adapters) of every combination."""
    now = config.resources.of(stage)
    spec = getattr(config, stage)
    bare = [field for field in ADAPTED[stage] if getattr(spec, field) is None and _may_adapt(config, stage, field)]
    lora: list[dict[str, int]] = [{}, dict.fromkeys(bare, 8)] if bare else [{}]
    zeros = [z for z in range(now.zero_stage, 4) if z == now.zero_stage or hardware.world > 1 or z == 1]
    halvings = range(_halvings(now.micro_batch) + 1)
    generation = range(_halvings(now.rollout_micro_batch) + 1) if stage == "ppo" else range(1)
    again = (False,) if now.gradient_checkpointing else (False, True)
    offload = (False,) if hardware.cpu or now.offload_optimizer != "none" else (False, True)
    for zero, small, less, gc, away, adapters in itertools.product(zeros, halvings, generation, again, offload, lora):
        if away and not zero:
            continue
        fields: dict[str, Any] = {}
        if zero != now.zero_stage:
            fields["zero_stage"] = zero
        if small:
            fields["micro_batch"] = max(1, now.micro_batch >> small)
        if less:
            fields["rollout_micro_batch"] = max(1, now.rollout_micro_batch >> less)
        if gc:
            fields["gradient_checkpointing"] = True
        if away:
            fields["offload_optimizer"] = "cpu"
        raised = zero - now.zero_stage
        cost = HALVING * (small + less) + STAGE_UP * raised + PARAMETERS_PARTED * (raised > 0 and zero == 3)
        yield cost + AGAIN * gc + OFFLOAD * away + ADAPTERS * bool(adapters), fields, adapters


def _may_adapt(config: PipelineConfig, stage: StageName, field: str) -> bool:
    if field == "critic_lora":
        return config.ppo.estimator == "gae"
    return not (stage == "reward" and config.reward.train_layers)


def _halvings(count: int) -> int:
    return count.bit_length() - 1


def _changed(
    config: PipelineConfig, stage: StageName, fields: dict[str, Any], adapters: dict[str, int]
) -> PipelineConfig:
    table = config.resources
    stages = {**table.stages, stage: {**table.stages.get(stage, {}), **fields}}
    spec = getattr(config, stage).model_copy(update={name: LoRASpec(rank=rank) for name, rank in adapters.items()})
    return config.model_copy(update={"resources": table.model_copy(update={"stages": stages}), stage: spec})


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
