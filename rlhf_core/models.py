"""Models: new or pretrained causal language models, and the scalar model of reward and critic.

A `ValueModel` is a trunk and a linear head without bias that gives one number per position. It is saved in the layout of
Hugging Face's `…ForSequenceClassification` (trunk under its usual prefix, head as `score`), so plain transformers loads it.
Loading is strict: a missing or unexpected weight is an error that names it. Weights are read and written as safetensors.
"""

import inspect
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from rlhf_core.errors import ConfigError
from rlhf_core.sources import require_positions, resolve_model
from rlhf_core.specs import ModelSpec

transformers_logging.disable_progress_bar()  # a bar a loaded model tells nobody anything

DROPOUT_FIELDS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "embed_dropout",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "classifier_dropout",
    "layerdrop",
)


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


def set_dropout(config: Any, p: float) -> Any:
    """Set every dropout field the configuration has."""
    for name in DROPOUT_FIELDS:
        if isinstance(getattr(config, name, None), int | float):
            setattr(config, name, p)
    return config


def new_causal_lm(spec: ModelSpec, tokenizer: Any, seed: int) -> PreTrainedModel:
    """A causal language model with random weights, the same for the same seed."""
    config = new_config(spec, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def load_causal_lm(path: str, dropout: float | None = None, revision: str | None = None) -> PreTrainedModel:
    """A pretrained causal language model in fp32 from a folder, a .gguf file, `package:NAME/FILE` or the hub.

    Raises:
        ConfigError: nothing loadable is there, or a weight is missing or unexpected.
    """
    place = resolve_model(path)
    options: dict[str, Any] = {"dtype": torch.float32, "revision": revision, "output_loading_info": True}
    if place.endswith(".gguf"):
        from transformers import GgufConfig

        options.update(gguf_file=Path(place).name, quantization_config=GgufConfig(dequantize=True))
        place = str(Path(place).parent)
    elif dropout is not None:
        options["config"] = set_dropout(AutoConfig.from_pretrained(place, revision=revision), dropout)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, **options)
        model, info = loaded
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise ConfigError(
                f"model.path: {path!r}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[:5]}"
            )
    return model


def base_model(spec: ModelSpec, tokenizer: Any, seed: int, dropout: float | None = None) -> PreTrainedModel:
    """The pipeline's starting point: pretrained or new; embeddings enlarged if the tokenizer has more tokens."""
    if spec.path is None:
        model = new_causal_lm(spec, tokenizer, seed)
        return model if dropout is None else type(model)(set_dropout(model.config, dropout))
    model = load_causal_lm(spec.path, dropout, spec.revision)
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
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


def check_positions(config: Any, prompt: int, response: int) -> None:
    """ConfigError if the longest prompt and response do not fit the model."""
    require_positions(positions_of(config), prompt, response, "the model")


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
        hidden = self.trunk(**forward_inputs(self.trunk, input_ids, attention_mask), use_cache=False).last_hidden_state
        value = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1).float()
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
    def from_causal_lm(cls, model: PreTrainedModel, seed: int) -> "ValueModel":
        """The trunk of a language model with a new head (N(0, 1/sqrt(width+1)), Stiennon et al. 2020)."""
        head: Any = model.get_output_embeddings()
        trunk: Any = model.base_model
        width = head.weight.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(trunk, width)

    @classmethod
    def load(cls, path: str | Path, dropout: float = 0.0) -> "ValueModel":
        """Load what `save_value_model` wrote; strict."""
        folder = Path(path)
        config = set_dropout(AutoConfig.from_pretrained(folder), dropout)
        state: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            state.update(load_file(file))
        if "score.weight" not in state:
            raise ConfigError(f"{folder}: not a reward model: no weight 'score.weight' among {sorted(state)[:3]}…")
        trunk = AutoModel.from_config(config)
        model = cls(trunk, state["score.weight"].shape[1])
        prefix = f"{trunk.base_model_prefix}."
        renamed = {
            "trunk." + key.removeprefix(prefix) if key.startswith(prefix) else key: value
            for key, value in state.items()
        }
        problems = model.load_state_dict(renamed, strict=False)
        if problems.missing_keys or problems.unexpected_keys:
            raise ConfigError(
                f"{folder}: missing weights {problems.missing_keys[:5]}, unexpected {problems.unexpected_keys[:5]}"
            )
        return model


def save_causal_lm(model: Any, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write a language model as plain transformers loads it: weights, configuration, generation config, tokenizer."""
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def save_value_model(model: ValueModel, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    """Write a reward model or critic in the layout of `…ForSequenceClassification`."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{model.trunk.base_model_prefix}."
    renamed = {
        (prefix + k.removeprefix("trunk.") if k.startswith("trunk.") else k): v.contiguous().clone()
        for k, v in state.items()
    }
    save_file(renamed, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False))
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config["model_type"])
    config.update(architectures=[kind] if kind else None, num_labels=1, id2label={"0": "score"}, label2id={"score": 0})
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    tokenizer.save_pretrained(folder)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a data artifact: pad and EOS are defined and differ."""
    return AutoTokenizer.from_pretrained(str(folder))
