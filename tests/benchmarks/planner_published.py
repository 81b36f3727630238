"""The planner beside the published figures of DeepSpeed-Chat, cell by cell: `python tests/benchmarks/planner_published.py`.

The figures are those of its announcement of April 2023: time of step 3 by device and model, achieved TFLOPs by phase, largest
model of one GPU. The recipe is the one published with them: 264,292 samples of 256 + 256 tokens, one epoch, one update a rollout,
critic and reward model OPT-350M, at most 1024 pairs at once over all GPUs, else as many as fit; LoRA of rank 128 on one GPU and
from 13B on, gradient checkpointing, ZeRO-2 for 1.3B and ZeRO-3 above on several GPUs. Its hybrid engine generates with whole
weights, divided by tensor parallelism where they are large, and keeps all logits; this product does neither, so both are added.
"""

import statistics
from dataclasses import dataclass, replace

from rlhf_core.planner.hardware import KNOWN, Hardware
from rlhf_core.planner.known import KNOWN as MODELS
from rlhf_core.planner.memory import Batch, Model, activations, gradients, states
from rlhf_core.planner.shapes import Shape, shape_of
from rlhf_core.planner.work import Decode, cache_numbers, compute_seconds, decode_seconds, forward, trained
from rlhf_core.resources import Resources

SAMPLES, PROMPT, ANSWER, PAIRS, RANK = 264_292, 256, 256, 1024, 128
TOKENS = PROMPT + ANSWER
HOUR, DAY = 3600.0, 86400.0
SIZES = ("1.3b", "6.7b", "13b", "30b", "66b", "175b")
# Time of step 3: device, how many, and one time for each size from the smallest.
TIMES: list[tuple[str, int, tuple[float, ...]]] = [
    ("v100-32g", 1, (1.8 * DAY,)),
    ("a6000", 1, (1.1 * DAY, 5.6 * DAY)),
    ("a100-40g", 1, (15.4 * HOUR, 3.4 * DAY)),
    ("a100-80g", 1, (11.7 * HOUR, 1.7 * DAY, 4.9 * DAY)),
    ("a100-40g", 8, (2 * HOUR, 5.7 * HOUR, 10.8 * HOUR, 1.85 * DAY)),
    ("a100-80g", 8, (1.4 * HOUR, 4.1 * HOUR, 9 * HOUR, 18 * HOUR, 2.1 * DAY)),
    ("a100-80g", 64, (31 * 60, 51 * 60, 1.25 * HOUR, 4 * HOUR, 7.5 * HOUR, 20 * HOUR)),
]
# TFLOPs a GPU of A100-80G: size, GPUs, generation (one forward pass of all tokens), training (four), both (five).
RATES: list[tuple[str, int, tuple[float, float, float]]] = [
    ("1.3b", 8, (23.8, 62.9, 43.4)),
    ("6.7b", 8, (32.9, 100.7, 71.2)),
    ("13b", 8, (33.0, 97.3, 67.1)),
    ("30b", 32, (48.2, 103.6, 82.0)),
    ("66b", 16, (29.3, 110.4, 67.8)),
    ("175b", 64, (25.4, 74.4, 52.8)),
]
LARGEST = {"v100-32g": "2.7b", "a6000": "6.7b", "a100-40g": "6.7b", "a100-80g": "13b"}  # of one GPU


@dataclass(frozen=True)
class Cell:
    """One figure: what was published and what the planner says."""

    name: str
    published: float
    planned: float

    @property
    def error(self) -> float:
        return self.planned / self.published - 1


@dataclass(frozen=True)
class Step:
    """Seconds of one rollout and its update on each GPU, of `batch` sequences each."""

    batch: int
    generation: float
    scoring: float
    training: float


def shape(size: str) -> Shape:
    return shape_of(MODELS[f"facebook/opt-{size}"])


def hardware(device: str, count: int) -> Hardware:
    return replace(KNOWN[device], devices=min(8, count), nodes=max(1, count // 8))


def models(size: str, count: int) -> list[Model]:
    """Actor, reference, critic and reward model as the recipe lays them out."""
    actor, critic = shape(size), shape("350m")
    zero = 0 if count == 1 else 2 if size == "1.3b" else 3
    layout = Resources(zero_stage=zero, gradient_checkpointing=True)
    lora = count == 1 or size not in ("1.3b", "6.7b")
    added = actor.adapters(RANK, None) if lora else 0
    return [
        Model("actor", actor, False, added or actor.parameters, added, layout, "fp16"),
        Model("reference", actor, False, 0, 0, layout, "fp16"),
        Model("critic", critic, True, critic.value_parameters, 0, layout, "fp16"),
        Model("reward", critic, True, 0, 0, layout, "fp16"),
    ]


def ways(size: str, devices: Hardware) -> int:
    """GPUs of a node that share the actor's weights in generation: until they take a third of the memory (13B: 2, 66B: 8)."""
    count = 1
    while count < devices.devices and 2 * shape(size).parameters / count > devices.memory / 3:
        count *= 2
    return count


def largest_batch(size: str, devices: Hardware) -> int:
    """Sequences of one GPU: the largest power of two that fits, at most 1024 over all; 0 if not one does."""
    found = models(size, devices.world)
    actor = found[0]
    kept = sum(sum(states(m, devices.world).values()) + gradients(m, devices.world) for m in found)
    whole = 2 * actor.shape.parameters / ways(size, devices) if actor.zero == 3 else 0.0
    one = activations(actor, Batch(1, TOKENS, TOKENS))
    one += TOKENS * actor.shape.vocabulary * (2 + 4 + 4) + TOKENS * cache_numbers(actor.shape) * 2
    room, batch = (devices.usable - kept - whole) / one, 0
    while (batch * 2 or 1) <= min(room, PAIRS // devices.world):
        batch = batch * 2 or 1
    return batch


def step(size: str, devices: Hardware) -> Step:
    """One rollout and update, by the planner's own functions."""
    batch = max(1, largest_batch(size, devices))
    found = {m.role: m for m in models(size, devices.world)}
    actor, critic = found["actor"], found["critic"]
    run = Decode(batch, PROMPT, ANSWER, 2, ways=ways(size, devices))
    prefill = batch * forward(actor.shape, PROMPT, 1)
    generation = compute_seconds(prefill, devices, "fp16") + decode_seconds(actor.shape, run, devices, "fp16")
    scores = batch * (forward(actor.shape, TOKENS, TOKENS) + 2 * forward(critic.shape, TOKENS, 0))
    others = (devices.world - 1) / devices.world
    training = 0.0
    for model, headed in ((actor, TOKENS), (critic, 0)):
        work = batch * trained(model.shape, TOKENS, headed, again=True, frozen=model.adapters > 0)
        passes = 2 * model.parameters if model.zero == 3 else model.trained
        training += compute_seconds(work, devices, "fp16", 2 * (passes + model.trained) * others)
    return Step(batch, generation, compute_seconds(scores, devices, "fp16"), training)


def times() -> list[Cell]:
    """Hours of step 3."""
    found = []
    for device, count, published in TIMES:
        devices = hardware(device, count)
        for size, seconds in zip(SIZES, published, strict=False):
            one = step(size, devices)
            planned = (one.generation + one.scoring + one.training) * SAMPLES / (one.batch * count)
            found.append(Cell(f"{count:>2} x {device:<8} {size:>5}, hours", seconds / HOUR, planned / HOUR))
    return found


def rates() -> list[Cell]:
    """TFLOPs a GPU, by the accounting of the published ones."""
    found = []
    for size, count, (generating, training, both) in RATES:
        one = step(size, hardware("a100-80g", count))
        work = one.batch * forward(shape(size), TOKENS, TOKENS) / 1e12
        for name, published, planned in (
            ("generation", generating, work / one.generation),
            ("training", training, 4 * work / one.training),
            ("effective", both, 5 * work / (one.generation + one.training)),
        ):
            found.append(Cell(f"{count:>2} x a100-80g {size:>5}, {name} TFLOPs", published, planned))
    return found


def largest() -> list[tuple[str, str, str]]:
    """Device, published and planned largest model of one GPU."""
    sizes = ("1.3b", "2.7b", "6.7b", "13b", "30b")
    return [(d, size, [s for s in sizes if largest_batch(s, hardware(d, 1))][-1]) for d, size in LARGEST.items()]


def median_error(cells: list[Cell]) -> float:
    return statistics.median(abs(cell.error) for cell in cells)


def main() -> None:
    for title, cells in (("time of step 3", times()), ("achieved rates", rates())):
        print(title)
        for cell in cells:
            print(f"  {cell.name:<42} published {cell.published:8.1f}  planned {cell.planned:8.1f}  {cell.error:+.0%}")
        print(f"  median error {median_error(cells):.1%} of {len(cells)} cells")
    print("largest model of one GPU")
    for device, published, planned in largest():
        print(f"  {device:<10} published {published:>5}  planned {planned:>5}")


if __name__ == "__main__":
    main()
