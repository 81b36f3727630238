"""Models: new or pretrained causal language models, and the scalar model of reward and critic.

A `ValueModel` is a trunk and a linear head without bias that gives one number per position. It is saved in the layout of
Hugging Face's `…ForSequenceClassification` (trunk under its usual prefix, head as `score`), so plain transformers loads it.
Pretrained models are loaded by `pretrained`; with `zero_init` (ZeRO-3) a model is divided among the ranks from the start, new
ones after they were made whole on every rank. Saving is in `export`.
"""

import inspect
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from rlhf_core.errors import ConfigError
from rlhf_core.partitioned import build, divide, is_partitioned, read, shape_of, weight_files
from rlhf_core.pretrained import NO_CODE, load_causal_lm, model_config, set_dropout
from rlhf_core.ragged import side_by_side, spread
from rlhf_core.sources import require_positions
from rlhf_core.specs import ModelSpec

transformers_logging.disable_progress_bar()  # a bar a loaded model tells nobody anything


def new_config(spec: ModelSpec, vocab_size: int, pad: int, eos: int) -> Any:
    """Configuration of a new model of `spec.family` and its sizes; dropout off."""
    h, n, heads, positions = spec.hidden_size, spec.layers, spec.heads, spec.positions
    gpt = {"n_embd": h, "n_layer": n, "n_head": heads, "n_positions": positions, "n_ctx": positions}
    llama = {
        "hidden_size": h,
        "num_hidden_layers": n,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": h // heads,
        "intermediate_size": 8 * math.ceil(h / 3),
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
    }
    neo = {"hidden_size": h, "max_position_embeddings": positions, "intermediate_size": 4 * h}
    by_family: dict[str, dict[str, Any]] = {
        "opt": {
            **{k: llama[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            "max_position_embeddings": positions,
            "ffn_dim": 4 * h,
            "word_embed_proj_dim": h,
        },
        "bloom": {"hidden_size": h, "n_layer": n, "n_head": heads},
        "gpt_neox": {**neo, "num_hidden_layers": n, "num_attention_heads": heads},
        "gpt_neo": {**neo, "num_layers": n, "num_heads": heads, "attention_types": [[["global"], n]]},
        "gpt2": gpt,
        "gptj": {**gpt, "rotary_dim": h // heads // 2},
        "codegen": {**gpt, "rotary_dim": h // heads // 2},
        "gemma3": {**llama, "query_pre_attn_scalar": h // heads, "sliding_window": positions},
    }
    assert spec.family
    kind = {"gemma3": "gemma3_text"}.get(spec.family, spec.family)
    fields = by_family.get(spec.family, llama)
    config = AutoConfig.for_model(
        kind, vocab_size=vocab_size, pad_token_id=pad, eos_token_id=eos, bos_token_id=eos, **fields
    )
    return set_dropout(config, 0.0)


def new_causal_lm(spec: ModelSpec, tokenizer: Any, seed: int, dropout: float = 0.0) -> PreTrainedModel:
    """A causal language model with random weights, the same for the same seed."""
    config = new_config(spec, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(set_dropout(config, dropout))


def base_model(
    spec: ModelSpec,
    tokenizer: Any,
    seed: int,
    dropout: float | None = None,
    zero_init: dict[str, Any] | None = None,
    quantize: str | None = None,
) -> PreTrainedModel:
    """The pipeline's starting point: pretrained or new; embeddings enlarged if the tokenizer has more tokens.

    A vocabulary that is larger than the tokenizer's keeps its padding; it is never sampled (see `rollout`).
    """
    if spec.path is None:
        if quantize:
            raise ConfigError("lora.quantize: a new model has nothing worth freezing in 4 bits; remove quantize")
        model = new_causal_lm(spec, tokenizer, seed, dropout or 0.0)
        return divide(model, zero_init) if zero_init else model
    model = load_causal_lm(spec.path, dropout, spec.revision, zero_init, quantize, rows=len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def positions_of(config: Any) -> int | None:
    """Longest sequence the model's positions allow, None where there is no limit (ALiBi)."""
    for name in ("max_position_embeddings", "n_positions"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return None


def check_positions(config: Any, prompt: int, response: int, whose: str = "the model") -> None:
    """ConfigError if the longest prompt and response do not fit the model."""
    require_positions(positions_of(config), prompt, response, whose)


@lru_cache
def _accepts(kind: type, name: str) -> bool:
    return name in inspect.signature(kind.forward).parameters


def forward_inputs(model: nn.Module, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Arguments of a forward pass for padded rows, left or right.

    Positions count real tokens only, so a left-padded row gives the logits of the row without padding.

    Args:
        model: the transformers model that will be called.
        input_ids: `[batch, tokens]`.
        mask: `[batch, tokens]`, 1 on real tokens.
    """
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if _accepts(type(model), "position_ids"):
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return inputs


class ValueModel(nn.Module):
    """A trunk with a linear head: one number per position.

    Attributes:
        config: the trunk's configuration, with `score_mean` and `score_std` of the reward model.
        shift, scale: the output is `(head - shift) / scale`.
    """

    def __init__(self, trunk: PreTrainedModel, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.config = trunk.config
        self.score = nn.Linear(width, 1, bias=False)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(width + 1))
        self.shift, self.scale = 0.0, 1.0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values `[batch, tokens]`, fp32; what stands at padding has no meaning."""
        joined = side_by_side(self.trunk, input_ids, attention_mask)
        inputs = joined or forward_inputs(self.trunk, input_ids, attention_mask)
        hidden = self.trunk(**inputs, use_cache=False).last_hidden_state
        value = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()
        value = spread(value[0], attention_mask.bool()) if joined else value
        return (value - self.shift) / self.scale

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass."""
        self.trunk.gradient_checkpointing_enable(**options)

    def normalize(self, on: bool) -> "ValueModel":
        """Give scores relative to the reward model's stored mean and deviation, or raw."""
        self.shift = float(getattr(self.config, "score_mean", 0.0)) if on else 0.0
        self.scale = float(getattr(self.config, "score_std", 1.0)) if on else 1.0
        return self

    @classmethod
    def from_causal_lm(cls, model: PreTrainedModel, seed: int, *, zero_head: bool = False) -> "ValueModel":
        """The trunk of a language model with a new head: N(0, 1/sqrt(width+1)) (Stiennon et al. 2020), or zeros.

        Where the language model is divided among the ranks, so is the head.
        """
        head: Any = model.get_output_embeddings()
        trunk: Any = model.base_model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            value = cls(trunk, shape_of(head.weight)[1])
        if zero_head:
            nn.init.zeros_(value.score.weight)
        if is_partitioned(model):
            divide(value.score, model.zero_init)  # pyright: ignore
        return value

    @classmethod
    def load(cls, path: str | Path, dropout: float = 0.0, zero_init: dict[str, Any] | None = None) -> "ValueModel":
        """Load what `export.save_value_model` wrote; strict.

        Args:
            path: a folder.
            dropout: of the trunk.
            zero_init: `engine.zero_init`'s configuration: read tensor by tensor, in parts.

        Raises:
            ConfigError: not a reward model, quantised, or a weight is missing, unexpected or of another shape.
        """
        whose = str(path)
        config = set_dropout(model_config(str(path), None, whose), dropout)
        files = weight_files(str(path))
        if not files:
            raise ConfigError(f"{whose}: has no safetensors files")
        width = _head_width(files, whose)
        if zero_init:
            model = cls(build(lambda: AutoModel.from_config(config, dtype=torch.float32), zero_init), width)
            divide(model.score, zero_init)
        else:
            with no_init_weights():
                model = cls(AutoModel.from_config(config, dtype=torch.float32), width)
        prefix = f"{model.trunk.base_model_prefix}."
        read(model, files, lambda k: f"trunk.{k.removeprefix(prefix)}" if k.startswith(prefix) else k, whose)
        return model


def _head_width(files: list[Path], whose: str) -> int:
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as handle:
            names += handle.keys()
            if "score.weight" in handle.keys():
                return int(handle.get_slice("score.weight").get_shape()[1])
    raise ConfigError(f"{whose}: not a reward model: no weight 'score.weight' among {sorted(names)[:3]}…")


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a data artifact: pad and EOS are defined and differ."""
    return AutoTokenizer.from_pretrained(str(folder), **NO_CODE)
