"""The least time that a phase can take: its operations at the machine's peak, or its bytes at the bandwidth, whichever is more.

Only what is needed counts: no padding, the head at answer positions alone, attention to earlier tokens alone, nothing twice. Bytes
are those of weights and keys at each decode step, and of the optimizer. So a share of 1 is out of reach, and needless work
lowers it. Operations of a matrix: 2 a number and token (Kaplan et al. 2020); the backward pass has twice those.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from opt_125m import Shape

BYTES = {"fp32": 4, "bf16": 2}
OPTIMIZER = {"fp32": 28, "bf16": 30}  # bytes a parameter: AdamW reads four fp32 numbers, writes three and the weight


@dataclass(frozen=True)
class Limits:
    """Of the machine: operations and bytes a second."""

    operations: float
    bandwidth: float

    def seconds(self, operations: float, moved: float) -> float:
        """At least."""
        return max(operations / self.operations, moved / self.bandwidth)


def matrices(shape: Shape) -> int:
    """Numbers in the matrices of all blocks."""
    return 12 * shape.layers * shape.hidden**2


def head(shape: Shape) -> int:
    """Numbers in the head."""
    return shape.hidden * shape.vocabulary


def forward(shape: Shape, tokens: int, headed: int, before: int = 0) -> float:
    """Operations of `tokens` tokens after `before` others, the head at `headed` of them."""
    seen = tokens * before + tokens * (tokens + 1) / 2
    return 2 * tokens * matrices(shape) + 4 * shape.layers * shape.hidden * seen + 2 * headed * head(shape)


Rows = Sequence[tuple[int, int]]  # tokens of prompt and answer


def generation(rows: Rows, precision: str, limits: Limits, shape: Shape) -> float:
    """Seconds of a rollout that runs all rows at once."""
    kind = BYTES[precision]
    weights = kind * (matrices(shape) + head(shape))
    total = limits.seconds(sum(forward(shape, prompt, 1) for prompt, _ in rows), weights)
    for step in range(1, max(answer for _, answer in rows)):
        live = [prompt + step for prompt, answer in rows if answer > step]
        keys = 2 * kind * shape.layers * shape.hidden * sum(live)
        total += limits.seconds(sum(forward(shape, 1, 1, context) for context in live), weights + keys)
    return total


def scoring(rows: Rows, limits: Limits, shape: Shape) -> float:
    """Seconds of reference, critic and reward model."""
    return sum(3 * forward(shape, p + a, 0) + 2 * a * head(shape) for p, a in rows) / limits.operations


def training(rows: Rows, precision: str, limits: Limits, shape: Shape) -> float:
    """Seconds of one optimizer step of actor and critic."""
    operations = 3 * sum(2 * forward(shape, p + a, 0) + 2 * a * head(shape) for p, a in rows)
    parameters = 2 * (matrices(shape) + head(shape))
    return operations / limits.operations + OPTIMIZER[precision] * parameters / limits.bandwidth


def fitting(rows: Rows, precision: str, limits: Limits, headed: bool, shape: Shape) -> float:
    """Seconds of one optimizer step of one model: a language model's on its answers, or a reward model's."""
    operations = 3 * sum(forward(shape, p + a, a if headed else 0) for p, a in rows)
    return operations / limits.operations + OPTIMIZER[precision] * (matrices(shape) + head(shape)) / limits.bandwidth
