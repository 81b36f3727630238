"""Operations and seconds of a forward pass, of training and of generation.

A multiplication and an addition count as two operations. A matrix of m numbers costs 2 m a token (Kaplan et al. 2020, arXiv
2001.08361, section 2.1); attention of a token over c others costs 4 c hidden a layer; training costs three forward passes, four
where activations are computed again (Narayanan et al. 2021, arXiv 2104.04473, appendix), one less where the weights are frozen.
A decode step is bound by reading weights and keys once, by operations, or by launching its kernels, whichever takes longest.
"""

from dataclasses import dataclass

from rlhf_core.planner.hardware import LAUNCH, READING, TRAINING, Hardware
from rlhf_core.planner.shapes import Shape

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def forward(shape: Shape, tokens: int, headed: int) -> float:
    """Operations of one sequence of `tokens` tokens, the head at `headed` positions.

    Attention is counted over all tokens, not over half of them: kernels with a padding mask compute both halves.
    """
    matrices = sum(linear.inside * linear.outside for linear in shape.linears)
    attention = 4 * tokens * shape.heads * shape.head_size
    head = 2 * shape.vocabulary * shape.width * headed
    return tokens * shape.layers * (2 * matrices + attention) + head


def trained(shape: Shape, tokens: int, headed: int, again: bool, frozen: bool = False) -> float:
    """Operations of one sequence's forward and backward pass.

    Args:
        shape: of the model.
        tokens, headed: as for `forward`.
        again: whether the backward pass computes activations a second time (gradient checkpointing).
        frozen: whether only adapters learn, so that the weights need no gradients.
    """
    return (2 + (not frozen) + again) * forward(shape, tokens, headed)


@dataclass(frozen=True)
class Decode:
    """How a rollout runs on one rank.

    Attributes:
        rows: that run at once.
        prompt, answer: tokens of each.
        size: bytes of one weight, and of one number in the key-value cache.
        ways: ranks that share the weights, and their rows, by tensor parallelism.
        gathered: bytes that reach this rank from others at each step (ZeRO-3, layer by layer).
    """

    rows: int
    prompt: int
    answer: int
    size: int
    ways: int = 1
    gathered: float = 0.0


def cache_numbers(shape: Shape) -> int:
    """Numbers in keys and values of one token."""
    return 2 * shape.layers * shape.kv_heads * shape.head_size


def decode_seconds(shape: Shape, run: Decode, hardware: Hardware, precision: str) -> float:
    """Seconds of all `answer` steps of `rows` rows; the prompts' pass is not in it."""
    context = run.prompt + run.answer / 2
    read = run.size * (shape.parameters / run.ways + run.rows * context * cache_numbers(shape))
    reading = read / (READING * 1e9 * hardware.bandwidth)
    computing = run.rows * forward(shape, 1, 1) / (TRAINING * hardware.peak(precision))
    launching = 0.0 if hardware.cpu else LAUNCH * shape.layers
    return run.answer * (max(reading, computing, launching) + run.gathered / hardware.between)


def compute_seconds(operations: float, hardware: Hardware, precision: str, sent: float = 0.0) -> float:
    """Seconds of operations during which `sent` bytes travel; a GPU does both at once, a CPU one after the other."""
    computing, sending = operations / (TRAINING * hardware.peak(precision)), sent / hardware.between
    return computing + sending if hardware.cpu else max(computing, sending)
