"""Answers of a pretrained model to the prompts of a data set, for preference pairs that the model itself makes."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_core.models import base_model
from rlhf_core.rollout.engines import generate
from rlhf_core.rollout.sampling import Sampling
from rlhf_core.specs import ModelSpec


def sample_texts(
    spec: ModelSpec,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    samples: int,
    seed: int,
    batch_size: int,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[list[int]]]:
    """Several answers of a pretrained model to each prompt: `[prompt][sample]` token ids, EOS where it was emitted.

    The model is the one SFT starts from: its revision, and a vocabulary of at least the tokenizer's size, of which only
    the tokenizer's tokens are sampled. It runs on the accelerator if there is one; only one batch is kept as tensors.
    """
    model: Any = base_model(spec, tokenizer, seed).eval()
    model.to(_device())
    sampling = Sampling(max_new_tokens, temperature, vocabulary=len(tokenizer))
    answers: list[list[list[int]]] = [[[]] * samples for _ in prompts]
    order = sorted(range(len(prompts) * samples), key=lambda i: len(prompts[i // samples]))
    for start in range(0, len(order), batch_size):
        names = order[start : start + batch_size]
        asked = [prompts[i // samples] for i in names]
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        rollout = generate(model, asked, names, sampling, seed=seed, eos=eos, pad=pad, batch_size=batch_size)
        for i, answer in zip(names, rollout.responses(), strict=True):
            answers[i // samples][i % samples] = answer
        if on_batch:
            on_batch(start + len(names))
    return answers


def _device() -> torch.device:
    """The accelerator, unless there is none or the environment says that DeepSpeed, and so all else, runs on the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None or os.environ.get("DS_ACCELERATOR") == "cpu" else found
