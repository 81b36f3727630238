"""What is asked of a rollout engine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_core.rollout.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """One answer to each prompt; the fields are the arguments of `engines.generate`.

    Attributes:
        names: `[prompts]`, of the answers for the noise.
    """

    prompts: Sequence[Sequence[int]]
    names: np.ndarray
    sampling: Sampling
    seed: int
    eos: int
    pad: int
    batch_size: int
    lock_step: bool = False
    on_batch: Callable[[int], None] | None = None
    on_token: Callable[[], None] | None = None
