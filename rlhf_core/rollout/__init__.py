"""Rollouts: sampled answers with their log-probabilities, in the actor's own process on the actor's own weights.

`generate` gives one answer to each prompt by one of three engines that agree but for rounding: `slots` (continuous batching over
a cache allocated once; the default), `plain` (whole batches over a growing cache; what `slots` is checked against) and `generate`
(transformers' own loop with our sampling in it). A fourth, `vllm` (GPU only, not tested), has noise of its own.
"""

from rlhf_core.rollout.answers import Rollout, left_pad, pad_to
from rlhf_core.rollout.engines import EngineName, generate
from rlhf_core.rollout.sampling import (
    Sampling,
    keep_tokens,
    noise_seed,
    pack_bits,
    sample_token,
    uniform,
    unpack_bits,
)
from rlhf_core.rollout.texts import sample_texts

__all__ = [
    "EngineName",
    "Rollout",
    "Sampling",
    "generate",
    "keep_tokens",
    "left_pad",
    "noise_seed",
    "pack_bits",
    "pad_to",
    "sample_texts",
    "sample_token",
    "uniform",
    "unpack_bits",
]
