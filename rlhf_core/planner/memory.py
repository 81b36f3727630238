"""Bytes of one rank: what each model keeps, and what each phase adds for a while.

Weights, gradients and optimizer follow DeepSpeed's division (ZeRO, Rajbhandari et al. 2020, arXiv 1910.02054, section 3) as the
engines here are configured: AdamW with fp32 states; without ZeRO and in fp32 no second copy of the weights, else an fp32 master
of the rank's part. Activations are what autograd keeps of one block, counted family by family and held by a test against what
it does keep. Logits are never tokens times vocabulary: the head works in blocks of 64 MiB (`head_scores`).
"""

from dataclasses import dataclass

from rlhf_core.planner.shapes import Shape
from rlhf_core.planner.work import BYTES, cache_numbers
from rlhf_core.resources import Resources
from rlhf_core.spec_base import Precision

BLOCK_BYTES, CACHED_BYTES = 64 << 20, 8 << 20  # of logits at once, and of them in fp32 on CPUs, as in `head_scores`
BUCKET = 50_000_000  # numbers that ZeRO sends at once, as in `engine`
LIVE = 30_000_000  # numbers that ZeRO-3 keeps gathered, as in `engine`
ENGINE = (
    28e6  # bytes that one DeepSpeed engine takes whatever its model: measured here, on CPUs, with one and with four
)
SLACK = 64  # columns of the key-value cache beyond the longest row, as in `rollout.cache`
EAGER = ("bloom", "gptj", "gpt_neo", "codegen")  # attention probabilities are kept: no fused kernel
UPCAST = ("gptj", "gpt_neo", "codegen")  # queries and keys in fp32
PARALLEL = ("gptj", "codegen")  # one norm for attention and feed-forward part
NORMED = ("qwen3", "gemma3_text")  # queries and keys have norms of their own
ACTIVATION = {"opt": 1, "bloom": 2, "gpt_neox": 2}  # inner-wide tensors kept; gated 4, GPT-2's composed GELU 5


@dataclass(frozen=True)
class Model:
    """One of a stage's models.

    Attributes:
        role: actor, reference, critic, reward; `model` in stages that have one.
        shape: its sizes.
        value: whether it is a trunk with one number a position.
        trained: parameters that learn, 0 for one that only scores.
        adapters: parameters of LoRA adapters, beside the weights.
        resources: memory layout.
        precision: of weights and activations.
        averaged: whether a moving average is kept (EMA).
    """

    role: str
    shape: Shape
    value: bool
    trained: int
    adapters: int
    resources: Resources
    precision: Precision
    averaged: bool = False

    @property
    def parameters(self) -> int:
        """All numbers in it."""
        return (self.shape.value_parameters if self.value else self.shape.parameters) + self.adapters

    @property
    def zero(self) -> int:
        """DeepSpeed's stage as the engines set it: 0 or 3 for what only scores, at least 1 for 16-bit training."""
        stage = self.resources.zero_stage
        if not self.trained:
            return 3 if stage == 3 else 0
        return max(stage, 1) if self.precision != "fp32" else stage

    @property
    def size(self) -> int:
        """Bytes of a weight."""
        return BYTES[self.precision]

    def optimizer_away(self, on_host: bool) -> bool:
        """Whether the optimizer's state lies elsewhere than on the device."""
        return on_host and self.zero > 0 and self.resources.offload_optimizer != "none"


def states(model: Model, world: int, on_host: bool = True) -> dict[str, float]:
    """Bytes that a model keeps on one rank's device between steps, by part.

    Args:
        model: one model.
        world: ranks among which ZeRO divides.
        on_host: whether what is offloaded is somewhere else than on the device; false on a CPU.
    """
    part = world if model.zero == 3 else 1
    away = on_host and model.zero == 3 and model.resources.offload_parameters != "none"
    found = {"weights": 0.0 if away else model.size * model.parameters / part, "engine": ENGINE}
    if model.averaged:
        found["average"] = 4 * model.trained / part
    own = model.trained / (world if model.zero else 1)
    if model.trained and not model.optimizer_away(on_host):
        found["optimizer"] = own * (12 if model.zero else 8)
    if model.trained and model.zero == 3:  # allocated once, and kept
        found["buckets"] = bucket(model, on_host) + (0.0 if model.optimizer_away(on_host) else model.size * own)
    return found


def gradients(model: Model, world: int, on_host: bool = True) -> float:
    """Bytes of the gradients that the micro-batches of an optimizer step add up in, where they come and go with it.

    They have the weights' type; with ZeRO only the rank's part is kept from one micro-batch to the next. ZeRO-3 has a place for
    its part all the time, which is among `states`.
    """
    if model.optimizer_away(on_host) or model.zero == 3:
        return 0.0
    return model.trained * model.size / (world if model.zero else 1)


def bucket(model: Model, on_host: bool = True) -> float:
    """Bytes of the gradients on their way among ranks. A GPU has them whole, and two where it overlaps (ZeRO-1 and 2)."""
    if not model.trained or not model.zero:
        return 0.0
    if on_host:
        return BUCKET * model.size * (1 if model.zero == 3 else 2)
    return min(BUCKET, model.trained) * model.size


def passing(model: Model, on_host: bool = True) -> float:
    """Bytes that come and go in a pass: the bucket of ZeRO-1 and 2, the weights that ZeRO-3 keeps gathered."""
    return live(model) if model.zero == 3 else bucket(model, on_host)


def live(model: Model) -> float:
    """Bytes of the weights that are gathered at a time; 0 where they are whole."""
    return min(LIVE, model.parameters) * model.size if model.zero == 3 else 0.0


def saved_per_token(shape: Shape, row: int, size: int) -> float:
    """Bytes that autograd keeps of one block for one token of rows of `row` tokens, without gradient checkpointing.

    Inputs of norms and linear layers, queries, keys, values and the result of attention, and the feed-forward part. Keys and values
    of grouped heads are counted as many as there are heads, as a kernel with a mask is given them.
    """
    h, attended = shape.hidden, shape.heads * shape.head_size
    norms = 1 if shape.family in PARALLEL else 2
    kept = size * (norms * h + 4 * attended)  # what norms give to linear layers; queries, keys, values, result
    kept += size * shape.inner * (4 if shape.gated else ACTIVATION.get(shape.family, 5))
    gemma = shape.family == "gemma3_text"
    if shape.rms:  # works in fp32, and keeps its input and what it is before the scale
        kept += (2 * norms if gemma else norms) * (4 + (4 if gemma else size)) * h
    else:
        kept += size * norms * h
    if shape.family in NORMED:
        kept += 2 * (4 + (4 if gemma else size)) * attended
    if shape.family == "gpt_neox":  # rotated queries and keys beside the fused ones
        kept += 2 * size * attended
    if shape.family in EAGER:  # softmax in fp32, and what it is rounded to
        kept += shape.heads * row * (4 if size == 4 else 4 + size)
    if shape.family in UPCAST:
        kept += 2 * (4 - size) * attended
    return kept


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows of so many tokens, and at how many of each the head is wanted (0: a value model)."""

    rows: int
    tokens: int
    headed: int


def activations(model: Model, batch: Batch) -> float:
    """Bytes that a training pass holds at its widest: between forward and backward pass."""
    shape, count = model.shape, batch.rows * batch.tokens
    block = count * saved_per_token(shape, batch.tokens, model.size)
    ends = 4 * count * shape.hidden * model.size  # embeddings, the last norm and what it gives
    if model.resources.gradient_checkpointing:
        return shape.layers * count * shape.hidden * model.size + block + ends
    return shape.layers * block + ends


def head(model: Model, batch: Batch, training: bool, cpu: bool) -> float:
    """Bytes of the head at work: a block's logits, what is computed of a part of them in fp32, and the head's gradient."""
    wanted, vocabulary = batch.rows * batch.headed, model.shape.vocabulary
    if not wanted:
        return 0.0
    rows = min(wanted, max(1, BLOCK_BYTES // (model.size * vocabulary)))
    part = 4 * vocabulary * min(rows, max(1, (CACHED_BYTES if cpu else BLOCK_BYTES) // (4 * vocabulary)))
    block = model.size * rows * vocabulary
    if not training:
        return block + 2 * part
    exact = 4 if wanted > rows else model.size  # sums of several blocks are made in fp32
    return block + 4 * part + (vocabulary * model.shape.width * exact if model.trained > model.adapters else 0)


def scoring(model: Model, batch: Batch, cpu: bool) -> float:
    """Bytes of a pass that keeps nothing: the widest moment of one block, and the head's."""
    shape, count = model.shape, batch.rows * batch.tokens
    widest = max(shape.inner * (3 if shape.gated else 2), 6 * shape.hidden)
    attention = shape.heads * batch.tokens * 4 * 2 if shape.family in EAGER else 0
    passing_through = count * ((2 * shape.hidden + widest) * model.size + attention)
    return max(passing_through, count * 2 * shape.hidden * model.size + head(model, batch, False, cpu))


@dataclass(frozen=True)
class Rollout:
    """Rows that run at once on one rank, of so many tokens at most; `cpu`: with packed weights."""

    rows: int
    prompt: int
    answer: int
    cpu: bool


def generation(model: Model, run: Rollout) -> dict[str, float]:
    """Bytes that a rollout adds on one rank: cache, logits of a step, and what makes it fast on a CPU."""
    longest = run.prompt + run.answer
    columns = longest + max(SLACK, longest // 4)
    shape = model.shape
    entering = min(run.rows, max(1, 512 // run.prompt)) * run.prompt * cache_numbers(shape) * model.size
    found: dict[str, float] = {
        "KV cache": run.rows * columns * cache_numbers(shape) * model.size + entering,
        "logits": 5 * 4 * run.rows * shape.vocabulary,
    }
    if run.cpu and model.zero != 3:
        matrices = sum(x.inside * x.outside for x in shape.linears)
        found["packed weights"] = model.size * (shape.layers * matrices + shape.vocabulary * shape.width)
    if model.zero == 3:
        found["gathered"] = live(model)
    return found
