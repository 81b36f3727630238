"""`generate`: one answer to each prompt, by the engine that resources name."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch

from rlhf_core.cpu_products import usual_products
from rlhf_core.rollout.answers import Rollout
from rlhf_core.rollout.native import generate_native
from rlhf_core.rollout.on_vllm import generate_vllm
from rlhf_core.rollout.plain import generate_plain
from rlhf_core.rollout.request import Request
from rlhf_core.rollout.sampling import Sampling
from rlhf_core.rollout.slots import generate_slots

EngineName = Literal["slots", "plain", "generate", "vllm"]
ENGINES: dict[EngineName, Callable[[Any, Request], Rollout]] = {
    "slots": generate_slots,
    "plain": generate_plain,
    "generate": generate_native,
    "vllm": generate_vllm,
}


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    sampling: Sampling,
    *,
    seed: int,
    eos: int,
    pad: int,
    batch_size: int = 64,
    lock_step: bool = False,
    on_batch: Callable[[int], None] | None = None,
    on_token: Callable[[], None] | None = None,
    engine: EngineName = "slots",
) -> Rollout:
    """Sample one answer to each prompt.

    Args:
        model: a transformers causal language model, in eval mode.
        prompts: token ids, one list a prompt.
        sample_ids: the answers' names for the noise, unique in a run.
        sampling: temperature, top-k, top-p and the longest answer.
        seed: of the noise.
        eos: ends an answer.
        pad: fills rows; its positions are masked.
        batch_size: rows decoded together.
        lock_step: ranks make the same number of forward passes (ZeRO-3, where every one is collective).
        on_batch: called with the number of answers done when some have ended.
        on_token: called before each forward pass; what it raises gives the rollout up.
        engine: changes nothing but rounding; except vllm, whose noise is another.
    """
    names = np.asarray(sample_ids, dtype=np.int64)
    asked = Request(prompts, names, sampling, seed, eos, pad, batch_size, lock_step, on_batch, on_token)
    with usual_products() if next(model.parameters()).device.type == "cpu" else nullcontext():
        return ENGINES[engine](model, asked)
