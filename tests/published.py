"""DeepSpeed-Chat's published performance, cell by cell, and how it works as far as its times depend on it.

Sources: DeepSpeed's article "DeepSpeed Chat" (blogs/deepspeed-chat/README.md, April 2023; figures read by eye) and the
application's README and BenckmarkSetting.md: PPO on 264,292 prompts of 256 tokens, each answered by exactly 256, one epoch, one
update a rollout, the largest global batch that fits, at most 1,024. What its tables do not say is taken from its published
scripts: LoRA of rank 128 on one GPU and from 13B on, ZeRO-2 for 1.3B on several GPUs and ZeRO-3 from 6.7B on, gradient
checkpointing, an OPT-350M critic and reward model. Batches there are powers of two.
"""

import math
from dataclasses import dataclass

from rlhf_core.planning.flops import forward_flops
from rlhf_core.planning.hardware import Hardware, hardware
from rlhf_core.planning.known import KNOWN
from rlhf_core.planning.shapes import Shape
from rlhf_core.planning.speed import Efficiency, pass_seconds, spread_seconds, token_seconds
from rlhf_core.specs import LoRASpec

PROMPT, ANSWER = 256, 256
TOKENS = PROMPT + ANSWER
SEQUENCES = 264_292
LARGEST_BATCH = 1024
HOUR, DAY = 3600, 86_400

# Step 3 (PPO), seconds: hardware, then seconds by size of the actor.
TIMES: dict[str, dict[str, float]] = {
    "v100-32g:1": {"1.3b": 1.8 * DAY},
    "a6000-48g:1": {"1.3b": 1.1 * DAY, "6.7b": 5.6 * DAY},
    "a100-40g:1": {"1.3b": 15.4 * HOUR, "6.7b": 3.4 * DAY},
    "a100-80g:1": {"1.3b": 11.7 * HOUR, "6.7b": 1.7 * DAY, "13b": 4.9 * DAY},
    "a100-40g:8": {"1.3b": 2 * HOUR, "6.7b": 5.7 * HOUR, "13b": 10.8 * HOUR, "30b": 1.85 * DAY},
    "a100-80g:8": {"1.3b": 1.4 * HOUR, "6.7b": 4.1 * HOUR, "13b": 9 * HOUR, "30b": 18 * HOUR, "66b": 2.1 * DAY},
    "a100-80g:64": {
        "1.3b": 31 * 60, "6.7b": 51 * 60, "13b": 1.25 * HOUR, "30b": 4 * HOUR, "66b": 7.5 * HOUR, "175b": 20 * HOUR,
    },
}  # fmt: skip
# Largest actor on one GPU.
LARGEST = {"v100-32g:1": "2.7b", "a6000-48g:1": "6.7b", "a100-40g:1": "6.7b", "a100-80g:1": "13b"}
SIZES = ("1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")
# Figure 6, A100-80G: GPUs, then TFLOP/s a GPU in generation, in training, and over the whole step.
THROUGHPUT = {
    "1.3b": (8, 23.8, 62.9, 43.4),
    "6.7b": (8, 32.9, 100.7, 71.2),
    "13b": (8, 33.0, 97.3, 67.1),
    "30b": (32, 48.2, 103.6, 82.0),
    "66b": (16, 29.3, 110.4, 67.8),
    "175b": (64, 25.4, 74.4, 52.8),
}
# Figure 7, sequences a second by nodes of 8; nothing is fitted to it.
SCALING = {
    ("a100-40g", "13b"): {1: 6.9, 2: 14.2, 4: 23.6, 8: 47.9},
    ("a100-80g", "66b"): {1: 1.45, 2: 3.3, 4: 5.7, 8: 10.0},
}
# A published log of step 3, 16 V100 and 4 sequences each: seconds of generation, scoring and other, training.
LOG = ("v100-32g:16", "1.3b", 4, (2.55, 0.22, 1.03))
# Why a cell is far off, as far as it can be told.
WHY = {
    ("v100-32g:1", "1.3b"): "a V100 reaches less of its peak than the A100s that most cells are of",
    ("a100-40g:1", "6.7b"): "4 sequences fit beside two copies of the weights; the published rate is that of 15",
    ("a100-40g:8", "30b"): "memory at its limit: 8 sequences fit here; the published rate is that of 3",
    ("a100-80g:64", "1.3b"): "7.2 s a step of 16 sequences a GPU are published; launches and products explain 5.4",
    ("a100-80g:64", "30b"): "16 sequences a GPU fit; the published rate is that of 6, the published script has 4",
    ("a100-80g:64", "66b"): "16 sequences a GPU fit; the published rate is that of 6, the published script has 4",
}  # fmt: skip
CRITIC = KNOWN["opt-350m"]
LORA = LoRASpec(rank=128)
USABLE = 0.98  # of the device's memory
CONTEXT = 1e9  # CUDA's
LOGITS = 4  # copies of all positions' logits in fp16: logits and log-probabilities, and the gradients of both
PAIR_BYTES = (
    10  # bytes a pair of positions that eager attention writes and reads: scores, mask, softmax in fp32, dropout
)
SHARDS = (1, 2, 4, 8)
HOP = 30e-6  # seconds of an all-reduce within a node


@dataclass(frozen=True)
class Step:
    """One PPO step as this model of DeepSpeed-Chat sees it.

    Attributes:
        batch: sequences a GPU.
        shards: of tensor-parallel generation.
        generation, scoring, training: seconds.
    """

    batch: int
    shards: int
    generation: float
    scoring: float
    training: float
    gpus: int

    @property
    def seconds(self) -> float:
        return self.generation + self.scoring + self.training

    @property
    def rate(self) -> float:
        """Sequences a second over all GPUs."""
        return self.batch * self.gpus / self.seconds


def step_of(where: str, size: str, own: Efficiency, batch: int | None = None) -> Step | None:
    """The fastest step with the largest batch that fits, or with `batch` sequences a GPU; None: nothing fits."""
    machine, shape = hardware(where), KNOWN[f"opt-{size}"]
    choices = SHARDS if _zero_3(machine, size) else (1,)
    steps = [step for shards in choices if (step := _step(machine, shape, size, shards, own, batch))]
    return max(steps, key=lambda step: step.rate, default=None)


def _zero_3(machine: Hardware, size: str) -> bool:
    return machine.count > 1 and size not in ("1.3b", "2.7b")


def _adapted(machine: Hardware, size: str) -> bool:
    return machine.count == 1 or size in ("13b", "30b", "66b", "175b")


def states(machine: Hardware, shape: Shape, size: str) -> float:
    """Bytes a GPU of weights, gradients and optimizer states of the four models, in fp16 with fp32 masters."""
    count, weights = machine.count, 2.0 * shape.parameters
    held = weights / count if _zero_3(machine, size) else weights
    if _adapted(machine, size):
        actor = held + 16 * shape.adapter_parameters(LORA) / count
    else:
        actor = held + 14 * shape.parameters / count
    critic = CRITIC.value_parameters
    return actor + held + 2 * critic + 14 * critic / count + 2 * critic


def _sequence(shape: Shape) -> float:
    """Bytes a sequence: its cache (kept through training), checkpoints, one block, and logits."""
    block = TOKENS * (34 * shape.hidden + 5 * shape.heads * TOKENS)
    checkpoints = 2 * shape.layers * TOKENS * shape.hidden
    return shape.cache_bytes(TOKENS, 2) + checkpoints + block + LOGITS * 2 * TOKENS * shape.vocab


def _step(machine: Hardware, shape: Shape, size: str, shards: int, own: Efficiency, asked: int | None) -> Step | None:
    device, zero_3 = machine.device, _zero_3(machine, size)
    free = USABLE * device.memory - CONTEXT - states(machine, shape, size) - (0.4e9 if machine.count > 1 else 0)
    gathered = 2 * shape.parameters / shards if zero_3 else 0
    fits = min(free / _sequence(shape), (free - gathered) / (1.1 * shape.cache_bytes(TOKENS, 2)))
    most = min(fits, LARGEST_BATCH / machine.count)
    if most < 1:
        return None
    batch = asked or 2 ** int(math.log2(most))
    gather = spread_seconds(machine, own, 2 * shape.parameters) if zero_3 else 0.0
    grown = token_seconds(device, own, "fp16", shape, batch, PROMPT + ANSWER / 2, shards)
    if shards > 1:
        bits = 2 * (shards - 1) * batch * shape.hidden * 2
        grown += 2 * shape.layers * (HOP + bits / (device.link * own.link))
    prompts = batch * forward_flops(shape, PROMPT, PROMPT, PROMPT)
    generation = prompts / (device.half * own.products) + ANSWER * grown + gather
    forward = _forward(machine, shape, batch, own) + _forward(machine, CRITIC, batch, own)
    learned = shape.adapter_parameters(LORA) if _adapted(machine, size) else shape.parameters
    update = 16 * learned / machine.count / (device.bandwidth * own.stream)
    return Step(batch, shards, generation, 2 * forward + 2 * gather, 4 * forward + 3 * gather + update, machine.count)


def _forward(machine: Hardware, shape: Shape, batch: int, own: Efficiency) -> float:
    """A forward pass of eager attention with the head at all positions; a training step is four of them."""
    moved = batch * TOKENS * shape.layers * (24 * shape.hidden + PAIR_BYTES * shape.heads * TOKENS)
    flops = batch * forward_flops(shape, TOKENS, TOKENS, TOKENS)
    return pass_seconds(machine.device, own, "fp16", flops, moved, shape.layers)


def accounted(shape: Shape) -> float:
    """Operations of the actor's forward pass over a sequence, as its perf.py counts them."""
    h, layers = shape.hidden, shape.layers
    return 24 * TOKENS * layers * h**2 * (1 + TOKENS / (6 * h) + shape.vocab / (16 * layers * h))


def throughput(size: str, own: Efficiency) -> tuple[float, float, float]:
    """TFLOP/s a GPU in generation, training and the whole step, as Figure 6 accounts: 1, 4 and 5 forward passes."""
    step = step_of(f"a100-80g:{THROUGHPUT[size][0]}", size, own)
    assert step
    work = step.batch * accounted(KNOWN[f"opt-{size}"]) / 1e12
    return work / step.generation, 4 * work / (step.scoring + step.training), 5 * work / step.seconds


def largest(where: str, own: Efficiency) -> str:
    """Largest size of which at least one sequence fits on one GPU."""
    return [size for size in SIZES if step_of(where, size, own)][-1]


def cells() -> list[tuple[str, str, float]]:
    """Hardware, size and published sequences a second of every cell of the tables of times."""
    return [(where, size, SEQUENCES / seconds) for where, row in TIMES.items() for size, seconds in row.items()]


def scaling(own: Efficiency) -> list[tuple[str, str, float, float]]:
    """Hardware, size, published and planned sequences a second of Figure 7."""
    found = []
    for (device, size), row in SCALING.items():
        for nodes, rate in row.items():
            step = step_of(f"{device}:{nodes}x8", size, own)
            found.append((f"{device}:{8 * nodes}", size, rate, step.rate if step else 0.0))
    return found


def errors(own: Efficiency) -> list[float]:
    """Planned over published rate, minus 1, of every cell; -1: does not fit."""
    found = []
    for where, size, rate in cells():
        step = step_of(where, size, own)
        found.append(step.rate / rate - 1 if step else -1.0)
    return found
