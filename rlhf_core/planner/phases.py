"""The phases of a step: what generation, scoring and training add to memory, compute and take.

Operations are one rank's. What travels among ranks: ZeRO up to 2 sums gradients and gathers weights once an optimizer step, ZeRO-3
gathers the weights in every pass, forward and backward, and in a rollout at every token (Rajbhandari et al. 2020, section 7).
What offload takes, an optimizer step on the host and the way there, is not in any time here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_core.planner.hardware import Hardware
from rlhf_core.planner.memory import (
    Batch,
    Model,
    Rollout,
    activations,
    generation,
    gradients,
    head,
    live,
    passing,
    scoring,
)
from rlhf_core.planner.work import Decode, compute_seconds, decode_seconds, forward, trained
from rlhf_core.resources import Resources
from rlhf_core.specs import PPOSpec


@dataclass(frozen=True)
class Phase:
    """One phase of a step, on one rank.

    Attributes:
        name: generation, scoring or training.
        memory: bytes by part, beside what the models keep.
        operations: additions and multiplications.
        seconds: of the whole phase.
    """

    name: str
    memory: dict[str, float]
    operations: float
    seconds: float

    @property
    def added(self) -> float:
        """Bytes of all parts."""
        return sum(self.memory.values())


def micro(unit: Batch, units: int, resources: Resources) -> tuple[Batch, int]:
    """The largest micro-batch of `units` rows or pairs of a rank, and how many there are of it."""
    most = min(resources.micro_batch, units)
    if resources.micro_tokens:
        most = max(1, min(most, resources.micro_tokens // (unit.rows * unit.tokens)))
    return Batch(most * unit.rows, unit.tokens, unit.headed), -(-units // most)


def training_phases(
    unit: Batch, batch: int, resources: Resources, models: Sequence[Model], hardware: Hardware
) -> tuple[Phase, ...]:
    """Of a stage on fixed rows: scoring by the frozen models, if there are any, and training of the other.

    Args:
        unit: a row, or a pair as two rows.
        batch: units an optimizer step, over all ranks.
        resources: of the stage.
        models: that it holds.
        hardware: where.
    """
    units = max(1, batch // hardware.world)
    part, count = micro(unit, units, resources)
    own = [(m, part, count) for m in models if m.trained]
    frozen = [(m, part, count) for m in models if not m.trained]
    phases = [training(own, 1, hardware)]
    return tuple([scored(frozen, hardware), *phases] if frozen else phases)


def ppo_phases(
    spec: PPOSpec, resources: Resources, models: Sequence[Model], limits: tuple[int, int], hardware: Hardware
) -> tuple[Phase, ...]:
    """Of one rollout and the updates on it; `limits`: tokens of prompt and answer."""
    prompt, answer = limits
    world, by_role = hardware.world, {m.role: m for m in models}
    rows = max(1, spec.rollout_batch_size * spec.answers // world)
    actor = by_role["actor"]

    def unit(model: Model) -> Batch:
        return Batch(1, prompt + answer, 0 if model.value else answer)

    reading = [by_role.get("reference", actor), *(m for m in models if m.value)]
    if "critic" in by_role and "reward" not in by_role and spec.uses_reward_model:
        reading.append(by_role["critic"])  # once as critic, once without its adapters
    passes = [(m, *micro(unit(m), rows, resources)) for m in reading]
    updates = [(m, *micro(unit(m), max(1, rows // spec.minibatches), resources)) for m in models if m.trained]
    steps = spec.ppo_epochs * spec.minibatches
    if spec.ptx:
        answers = spec.rollout_batch_size * spec.answers
        texts = max(1, (spec.ptx.batch_size or answers // spec.minibatches) // world)
        updates.append((actor, *micro(Batch(1, prompt + answer, answer), texts, resources)))
    return (
        rolled_out(actor, rows, spec.answers, limits, resources, hardware),
        scored(passes, hardware),
        training(updates, steps, hardware),
    )


def rolled_out(
    actor: Model, rows: int, answers: int, limits: tuple[int, int], resources: Resources, hardware: Hardware
) -> Phase:
    """Generation of `rows` answers of one rank, `answers` to each prompt."""
    prompt, answer = limits
    together = min(rows, resources.rollout_micro_batch)
    memory = generation(actor, Rollout(together, prompt, answer, hardware.cpu))
    others = (hardware.world - 1) / hardware.world
    gathered = actor.size * actor.parameters * others if actor.zero == 3 else 0.0
    run = Decode(together, prompt, answer, actor.size, gathered=gathered)
    precision = actor.precision
    prefill = rows / answers * forward(actor.shape, prompt, 1)
    operations = prefill + rows * answer * forward(actor.shape, 1, 1)
    steps = rows / together * decode_seconds(actor.shape, run, hardware, precision)
    return Phase("generation", memory, operations, compute_seconds(prefill, hardware, precision, gathered) + steps)


def scored(passes: Sequence[tuple[Model, Batch, int]], hardware: Hardware) -> Phase:
    """Forward passes of models over micro-batches: (model, micro-batch, how many)."""
    operations = seconds = 0.0
    for model, batch, count in passes:
        work = count * batch.rows * forward(model.shape, batch.tokens, batch.headed)
        operations += work
        seconds += compute_seconds(work, hardware, model.precision, count * _gathers(model, hardware))
    parts = [{"activations": scoring(m, batch, hardware.cpu), "gathered": live(m)} for m, batch, _ in passes]
    return Phase("scoring", _largest(parts), operations, seconds)


def training(updates: Sequence[tuple[Model, Batch, int]], steps: int, hardware: Hardware) -> Phase:
    """`steps` optimizer steps, each over micro-batches of models: (model, micro-batch, how many a step)."""
    world, on_host = hardware.world, not hardware.cpu
    operations = seconds = 0.0
    for model, batch, count in updates:
        again, frozen = model.resources.gradient_checkpointing, 0 < model.adapters
        work = count * batch.rows * trained(model.shape, batch.tokens, batch.headed, again, frozen)
        operations += steps * work
        others = (world - 1) / world
        sent = 2 * model.size * model.trained * others
        if model.zero == 3:
            sent = count * (2 * _gathers(model, hardware) + model.size * model.trained * others)
        seconds += steps * compute_seconds(work, hardware, model.precision, sent)
    unique = {m.role: m for m, _, _ in updates}
    summed = sum(gradients(m, world, on_host) for m in unique.values())
    parts = [
        {
            "activations": activations(m, batch),
            "logits": head(m, batch, True, hardware.cpu),
            "in passing": passing(m, on_host),
        }
        for m, batch, _ in updates
    ]
    return Phase("training", {"gradients": summed, **_largest(parts)}, operations, seconds)


def _largest(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of several pieces of work, one at a time, the memory of that which takes most."""
    return max(parts, key=lambda memory: sum(memory.values()))


def _gathers(model: Model, hardware: Hardware) -> float:
    """Bytes that reach a rank for one pass of a model."""
    return model.size * model.parameters * (hardware.world - 1) / hardware.world if model.zero == 3 else 0.0
