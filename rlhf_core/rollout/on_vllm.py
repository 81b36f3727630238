"""Rollouts by vLLM in the actor's process, on GPUs. NOT TESTED: written against vLLM's documentation, where no GPU was.

vLLM is started once with empty weights and gets the actor's before every rollout, adapters merged, one at a time and gathered
where they are divided. Its noise is its own: a generator for each answer, seeded by (seed, answer), so answers differ from those
of the other engines, and are those of another run as far as vLLM's kernels do not depend on the batch. Log-probabilities and
entropies are the actor's own, by one forward pass over the answers, as vLLM's differ by more than rounding. Top-k and top-p are
refused, as vLLM does not tell which tokens they kept.
"""

import copy
import importlib.util
import tempfile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from rlhf_core import lora
from rlhf_core.errors import ConfigError
from rlhf_core.partitioned import saved_name
from rlhf_core.rollout.answers import Rollout, left_pad
from rlhf_core.rollout.request import Request
from rlhf_core.rollout.sampling import Sampling, uniform

MEMORY_SHARE = 0.3  # of the GPU's memory, for weights and cache; the rest is the training's
_started: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def check_vllm(sampling: Sampling) -> None:
    """ConfigError where vLLM cannot make such rollouts."""
    field, instead = "resources.rollout_engine 'vllm'", "or set slots"
    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        raise ConfigError(f"{field}: needs a GPU, and this job computes on the CPU; {instead}")
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(f"{field}: the package vllm is missing here; pip install vllm, {instead}")
    if sampling.filters:
        raise ConfigError(f"{field}: does not go with ppo.top_k and ppo.top_p; leave them out, {instead}")


def generate_vllm(model: Any, asked: Request) -> Rollout:
    """All prompts at once; `on_token` is called before, and before each batch of the pass that scores the answers."""
    check_vllm(asked.sampling)
    if asked.on_token:
        asked.on_token()
    if model not in _started:
        _started[model] = _start(model)
    engine = _started[model]
    _bring_weights(engine, model)
    prompts = [{"prompt_token_ids": list(prompt)} for prompt in asked.prompts]
    found = engine.generate(prompts, _sampling(model, asked), use_tqdm=False)
    answers = [_through_eos(one.outputs[0].token_ids, asked) for one in found]
    return _scored(model, asked, answers)


def _start(model: Any) -> Any:
    """An engine of this process alone, without weights and without a tokenizer."""
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            gpu_memory_utilization=MEMORY_SHARE,
            enable_prefix_caching=False,  # what is cached would be of older weights
            distributed_executor_backend="external_launcher",  # in the process that DeepSpeed's launcher started
        )


@torch.no_grad()
def _bring_weights(engine: Any, model: Any) -> None:
    """Give vLLM the actor's weights as they are now; collective at ZeRO-3."""
    name = saved_name(model)
    for weight in lora.weights(model):
        with lora.gathered(weight.parts):
            pair = (name(weight.name), weight.make(*weight.parts).detach())
            engine.apply_model(lambda inside, pair=pair: len(inside.load_weights([pair]) or ()))


def _sampling(model: Any, asked: Request) -> list[Any]:
    """How to sample each answer."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    seeds = (uniform(asked.seed, asked.names, 0) * 2**53).astype("int64").tolist()
    size = asked.sampling.vocabulary
    padded = size is not None and size < model.config.get_text_config().vocab_size
    allowed = list(range(size)) if padded and size else None
    return [
        SamplingParams(
            temperature=asked.sampling.temperature,
            max_tokens=asked.sampling.max_new_tokens,
            stop_token_ids=[asked.eos],
            allowed_token_ids=allowed,
            detokenize=False,
            seed=seed,
        )
        for seed in seeds
    ]


def _through_eos(tokens: Any, asked: Request) -> list[int]:
    """An answer with the EOS that ended it; one that is shorter than the limit was ended by it."""
    answer = list(tokens)
    if asked.eos not in answer and len(answer) < asked.sampling.max_new_tokens:
        answer.append(asked.eos)
    return answer


def _scored(model: Any, asked: Request, answers: list[list[int]]) -> Rollout:
    """The rollout of these answers, with the actor's own log-probabilities."""
    from rlhf_core.scoring import response_scores  # which reads rollouts

    device = next(model.parameters()).device
    prompt_ids, prompt_mask = left_pad(asked.prompts, asked.pad, device)
    width = max(map(len, answers))
    rows = [answer + [asked.pad] * (width - len(answer)) for answer in answers]
    ids = torch.tensor(rows, dtype=torch.long, device=device)
    mask = torch.tensor([[i < len(answer) for i in range(width)] for answer in answers], device=device).long()
    parts: list[Tensor] = []
    for start in range(0, len(answers), asked.batch_size):
        if asked.on_token:
            asked.on_token()
        own = slice(start, start + asked.batch_size)
        scores = response_scores(
            model, prompt_ids[own], prompt_mask[own], ids[own], mask[own], asked.sampling.temperature,
            entropy=True, vocabulary=asked.sampling.vocabulary,
        )  # fmt: skip
        parts.append(torch.stack([scores.logprobs, scores.entropy]))
        if asked.on_batch:
            asked.on_batch(min(start + asked.batch_size, len(answers)))
    logprobs, entropy = torch.cat(parts, 1)
    return Rollout(prompt_ids, prompt_mask, ids, mask, logprobs, entropy)
