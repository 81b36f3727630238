"""Small real models and PPO trainers for the tests of this folder.

Weights are random but uneven, so that distributions differ from token to token. Of the two families with a say in how often EOS
comes, gptj has rotary positions and gpt2 learned ones. `rollout_of` makes a rollout of given answers, as if they had been sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor

from rlhf_core.batches import right_pad
from rlhf_core.experience import Experience
from rlhf_core.export import save_causal_lm, save_value_model
from rlhf_core.models import ValueModel, new_causal_lm
from rlhf_core.ppo_trainer import DeepSpeedPPOTrainer
from rlhf_core.resources import Resources
from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine, PPOArgs
from rlhf_core.rollout import left_pad
from rlhf_core.scoring import end_scores, response_scores, response_values
from rlhf_core.specs import ModelSpec, OptimSpec, PPOSpec

PAD, EOS = 0, 1
FAMILY = "gptj"
# Of lengths 1 to 6, some without EOS.
ANSWERS = [[5, 6, 7, EOS], [8, EOS], [9, 10, 11, 12, 13, 14], [15, 16, EOS], [17], [EOS]]
SHORT = PPOSpec(max_response_tokens=8)
FAST = OptimSpec(lr=1e-2, schedule="constant")


@dataclass(frozen=True)
class Folders:
    """Saved models: a language model and a reward model of the same family, with their tokenizer."""

    actor: str
    reward: str
    tokenizer: Any


def language_model(family: str = FAMILY, eos_bias: float = 0.0, tokenizer: Any = None, width: int = 32) -> Any:
    """A causal language model of two layers; gptj and gpt2 never emit pad, and EOS as often as `eos_bias` says."""
    spec = ModelSpec(family=family, hidden_size=width, layers=2, heads=4, positions=64)  # pyright: ignore[reportArgumentType]
    model: Any = new_causal_lm(spec, tokenizer or tiny.tokenizer(), seed=3)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
        head = model.get_output_embeddings()
        if family == "gptj":
            head.bias[PAD] = -60.0
            head.bias[EOS] += eos_bias
        if family == "gpt2":  # no bias on the output, but one before it, along which these two rows point
            along = torch.full((width,), width**-0.5)
            model.transformer.ln_f.bias += 5 * along
            head.weight[PAD] = -5 * along
            head.weight[EOS] += eos_bias / 5 * along
    return model


def save(folder: Path, model: Any, tokenizer: Any = None, **config: Any) -> Folders:
    """Save a language model, and a reward model with its trunk; `config` is set in both configurations."""
    tokenizer = tokenizer or tiny.tokenizer()
    for name, value in config.items():
        setattr(model.config, name, value)
    save_causal_lm(model, tokenizer, folder / "actor")
    save_value_model(ValueModel.from_causal_lm(model, seed=1), tokenizer, folder / "reward")
    return Folders(str(folder / "actor"), str(folder / "reward"), tokenizer)


def ppo(
    folders: Folders, spec: PPOSpec | None = None, iterations: int = 2, seed: int = 0, **resources: Any
) -> Any:  # a DeepSpeedPPOTrainer; its engine has all four models here
    """A trainer on engines of its own."""
    args = PPOArgs(spec or PPOSpec(max_response_tokens=8), Resources(**resources), seed)
    engine = DeepSpeedRLHFEngine(folders.actor, folders.reward, folders.tokenizer, iterations, args)
    return DeepSpeedPPOTrainer(engine)


def prompts(rows: int, seed: int = 0) -> dict[str, list[list[int]]]:
    """Prompts of 2 to 6 tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (rows,), generator=draw).tolist()
    return {"prompt": [torch.randint(2, 32, (n,), generator=draw).tolist() for n in lengths]}


def rollout_of(trainer: Any, asked: Sequence[list[int]], answers: Sequence[list[int]]) -> Experience:
    """The experience of given answers, with the actor's own log-probabilities as the old ones."""
    engine, pad = trainer.engine, trainer.tokenizer.pad_token_id
    prompt_ids, prompt_mask = left_pad(asked, pad, torch.device("cpu"))
    response_ids = right_pad(answers, pad, prompt_ids.device)
    response_mask = right_pad([[1] * len(a) for a in answers], 0, prompt_ids.device)
    sequence = (prompt_ids, prompt_mask, response_ids, response_mask)
    with torch.no_grad():
        actor = response_scores(engine.actor, *sequence, trainer.spec.temperature, entropy=True)
        reference = response_scores(engine.ref, *sequence, trainer.spec.temperature)
        whole = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1)
        measured = {
            "logprobs": actor.logprobs,
            "entropy": actor.entropy,
            "ref_logprobs": reference.logprobs,
            "values": response_values(engine.critic, *sequence),
        }
        return Experience(
            torch.arange(len(answers)),
            *sequence,
            **{name: value.where(response_mask.bool(), 0.0) for name, value in measured.items()},
            scores=end_scores(engine.reward, *whole),
            ended=torch.tensor([EOS in a for a in answers]),
        )


def spec(**fields: Any) -> PPOSpec:
    """A spec with short answers."""
    return PPOSpec.model_validate({"max_response_tokens": 8, **fields})


def made(trainer: Any) -> Experience:
    """Six answers of lengths 1 to 6, half of them unfinished, at some distance from the reference."""
    out = rollout_of(trainer, prompts(6)["prompt"], ANSWERS)
    drift = 0.3 * torch.randn(out.logprobs.shape, generator=torch.Generator().manual_seed(0))
    return replace(out, ref_logprobs=(out.logprobs + drift) * out.response_mask)


def with_spec(trainer: Any, **fields: Any) -> Any:
    """Another trainer on the same engines."""
    return type(trainer)(trainer.engine, spec(**fields))


def masked(values: Tensor, e: Experience) -> Tensor:
    """What stands on the tokens of the answers."""
    return values[e.response_mask.bool()]


def weights(engine: Any) -> Tensor:
    """All weights of an engine's model in one row."""
    return torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])
