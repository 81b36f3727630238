"""A pipeline on given hardware: for each stage its models' bytes, each phase's bytes, operations and seconds, and whether it fits.

Rows are taken at their longest (`data.max_prompt_tokens`, `max_response_tokens`), so memory is that of the worst batch, and time
an upper bound where rows are shorter. A rank's peak is what all models keep, and the phase that adds most. Not planned: the data
and evaluation stages, start-up, saving and checkpoints, and weights in four bits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf_core.config import PipelineConfig
from rlhf_core.errors import ConfigError
from rlhf_core.hosts import BATCHES, batch_of
from rlhf_core.planner.hardware import Hardware
from rlhf_core.planner.memory import Batch, Model, states
from rlhf_core.planner.phases import Phase, ppo_phases, training_phases
from rlhf_core.planner.shapes import Shape
from rlhf_core.resources import ModelRole, Resources
from rlhf_core.specs import LoRASpec, Precision, StageName

PLANNED: tuple[StageName, ...] = ("sft", "reward", "ppo", "dpo")


@dataclass(frozen=True)
class Shapes:
    """The base model, and the reward model where it starts from another."""

    base: Shape
    reward: Shape


@dataclass(frozen=True)
class StageEstimate:
    """What one stage needs of every rank.

    Attributes:
        stage: which.
        hardware: on what.
        models: bytes by model and part.
        phases: of one step (PPO: one rollout), with what each adds.
        steps: of the stage; None where the number of rows is not known.
    """

    stage: StageName
    hardware: Hardware
    models: Mapping[str, Mapping[str, float]]
    phases: tuple[Phase, ...]
    steps: int | None

    @property
    def kept(self) -> float:
        """Bytes that all models keep."""
        return sum(sum(parts.values()) for parts in self.models.values())

    @property
    def peak(self) -> float:
        """Most bytes of one rank at any moment of a step."""
        return self.kept + max(phase.added for phase in self.phases)

    @property
    def fits(self) -> bool:
        """Whether a device has that much for a rank."""
        return self.peak <= self.hardware.usable

    @property
    def step_seconds(self) -> float:
        """Seconds of one step."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def seconds(self) -> float | None:
        """Seconds of all steps."""
        return None if self.steps is None else self.steps * self.step_seconds

    def cost(self, price: float) -> float | None:
        """Of all steps, at `price` for a device and hour, whether it works or waits."""
        return None if self.seconds is None else self.seconds / 3600 * self.hardware.world * price


def estimate(
    config: PipelineConfig, stage: StageName, hardware: Hardware, shapes: Shapes, rows: int | None = None
) -> StageEstimate:
    """What one stage needs.

    Args:
        config: the pipeline; `resources.processes` and its nodes do not count, the hardware's do.
        stage: sft, reward, ppo or dpo.
        hardware: one rank a device.
        shapes: of the models.
        rows: training rows of the stage, for the number of its steps where nothing else sets it.

    Raises:
        ConfigError: the batch does not divide among the ranks, or weights are to be in four bits.
    """
    size, world = batch_of(stage, getattr(config, stage).model_dump()), hardware.world
    if size is not None and size % world:
        raise ConfigError(f"{BATCHES[stage]}: {size} does not divide among {world} devices; make it a multiple")
    models = stage_models(config, stage, shapes)
    tokens = config.data.max_prompt_tokens, config.data.max_response_tokens
    if stage == "ppo":
        resources = config.resources.of(stage)
        phases = ppo_phases(config.ppo, resources, models, _limits(config), hardware)
    else:
        phases = training_phases(*_fixed_rows(config, stage, tokens), models, hardware)
    kept = {m.role: states(m, world, not hardware.cpu) for m in models}
    return StageEstimate(stage, hardware, kept, phases, _steps(config, stage, rows))


def _limits(config: PipelineConfig) -> tuple[int, int]:
    return config.data.max_prompt_tokens, config.ppo.max_response_tokens or config.data.max_response_tokens


def stage_models(config: PipelineConfig, stage: StageName, shapes: Shapes) -> list[Model]:
    """The models that a stage holds; a view of another (a reference under LoRA) is none of its own."""
    resources, spec = config.resources.of(stage), getattr(config, stage)
    if stage == "ppo":
        return _ppo_models(config, resources, shapes)
    whole = shapes.reward if stage == "reward" else shapes.base
    model = _model("model", whole, stage == "reward", resources, spec.precision, getattr(spec, "lora", None))
    layers = config.reward.train_layers if stage == "reward" else None
    if layers:
        model = replace(model, trained=min(layers, whole.layers) * whole.block + whole.width)
    if stage != "dpo" or (config.dpo.lora and not config.dpo.lora.also_train):
        return [model]
    return [model, _frozen("reference", whole, False, resources, spec.precision)]


def _ppo_models(config: PipelineConfig, resources: Resources, shapes: Shapes) -> list[Model]:
    spec, precision = config.ppo, config.ppo.precision

    def own(role: ModelRole) -> Resources:
        return resources.of_model(role)

    actor = _model("actor", shapes.base, False, own("actor"), precision, spec.actor_lora, spec.ema is not None)
    found = [actor]
    if not spec.actor_lora or spec.actor_lora.also_train:
        found.append(_frozen("reference", shapes.base, False, own("reference"), precision))
    valued = shapes.reward if spec.uses_reward_model else shapes.base
    critic = spec.estimator == "gae"
    if critic:
        found.append(_model("critic", valued, True, own("critic"), precision, spec.critic_lora))
    shared = critic and spec.critic_lora and not spec.critic_lora.also_train
    if spec.uses_reward_model and not shared:
        found.append(_frozen("reward", shapes.reward, True, own("reward"), precision))
    return found


def _model(
    role: str,
    shape: Shape,
    value: bool,
    resources: Resources,
    precision: Precision,
    lora: LoRASpec | None,
    ema: bool = False,
) -> Model:
    whole = shape.value_parameters if value else shape.parameters
    if lora is None:
        return Model(role, shape, value, whole, 0, resources, precision, ema)
    if lora.quantize:
        raise ConfigError(f"{role}: lora.quantize {lora.quantize} is not planned; plan without it, and expect less")
    adapters = shape.adapters(lora.rank, lora.targets)
    trained = adapters + shape.width * value + (shape.embeddings if "embeddings" in lora.also_train else 0)
    return Model(role, shape, value, trained, adapters, resources, precision, ema)


def _frozen(role: str, shape: Shape, value: bool, resources: Resources, precision: Precision) -> Model:
    return Model(role, shape, value, 0, 0, resources, precision)


def _fixed_rows(config: PipelineConfig, stage: StageName, tokens: tuple[int, int]) -> tuple[Batch, int, Resources]:
    """A stage on fixed rows: one row as the models read it, rows an optimizer step, and the resources."""
    resources, (prompt, answer) = config.resources.of(stage), tokens
    length, headed = prompt + answer, 0 if stage == "reward" else answer
    if stage == "sft":
        headed = answer if config.sft.loss_on == "response" else length - 1
        if resources.pack_tokens:
            together = max(1, resources.pack_tokens // length)
            return Batch(1, together * length, together * headed), config.sft.batch_size // together, resources
        return Batch(1, length, headed), config.sft.batch_size, resources
    return Batch(2, length, headed), getattr(config, stage).batch_size, resources


def _steps(config: PipelineConfig, stage: StageName, rows: int | None) -> int | None:
    if stage == "ppo":
        return config.ppo.steps
    spec = getattr(config, stage)
    if rows is None:
        return spec.max_steps
    steps = math.floor(rows * spec.epochs) // spec.batch_size
    return min(steps, spec.max_steps) if spec.max_steps else steps
