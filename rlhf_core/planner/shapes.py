"""Sizes of a language model from the fields of its `config.json`, without weights and without torch.

A `Shape` knows the linear layers of one block, the numbers in norms and biases, the embeddings and the head; parameters, operations
and bytes all follow from these. One function a layout, under the field names that transformers gives its configurations; tests hold
the counts against transformers' own models of all families. Mixtures of experts and encoders are refused.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.errors import ConfigError

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Linear:
    """One matrix of a block, with the layer's name as adapters call it."""

    name: str
    inside: int
    outside: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Numbers in it."""
        return self.inside * self.outside + self.outside * self.bias


@dataclass(frozen=True)
class Shape:
    """What a decoder is made of.

    Attributes:
        family: `model_type` of the configuration.
        hidden, layers, vocabulary: as everywhere.
        heads, kv_heads, head_size: of attention; keys and values may have fewer heads.
        linears: of one block.
        gated: whether the feed-forward part multiplies two branches (SwiGLU).
        rms: whether norms are RMS norms, which transformers computes in fp32.
        small: numbers in the norms of one block.
        outside: numbers beside blocks, embeddings and head: final norm, projections.
        positions: rows of a learned position table; 0 where positions are computed.
        embedded: width of the embedding, where it is not `hidden`.
        tied: whether head and embedding are one matrix.
        head_bias: whether the head has a bias.
        longest: the longest sequence, None: no limit.
    """

    family: str
    hidden: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    linears: tuple[Linear, ...]
    gated: bool
    rms: bool
    small: int
    outside: int
    positions: int = 0
    embedded: int = 0
    tied: bool = True
    head_bias: bool = False
    longest: int | None = None

    @property
    def width(self) -> int:
        """Width of embedding and head."""
        return self.embedded or self.hidden

    @property
    def inner(self) -> int:
        """Width of the feed-forward part."""
        return self.linears[-1].inside

    @property
    def block(self) -> int:
        """Parameters of one block."""
        return sum(linear.parameters for linear in self.linears) + self.small

    @property
    def embeddings(self) -> int:
        """Parameters of the embedding and of learned positions."""
        return self.vocabulary * self.width + self.positions * self.hidden

    @property
    def head(self) -> int:
        """Parameters that the head adds; 0 where it is the embedding."""
        return (0 if self.tied else self.vocabulary * self.width) + self.head_bias * self.vocabulary

    @property
    def trunk(self) -> int:
        """Parameters without the head."""
        return self.layers * self.block + self.embeddings + self.outside

    @property
    def parameters(self) -> int:
        """Parameters of the language model."""
        return self.trunk + self.head

    @property
    def value_parameters(self) -> int:
        """Parameters of a reward model or critic: the trunk and one number for each of the head's inputs."""
        return self.trunk + self.width

    def adapters(self, rank: int, targets: tuple[str, ...] | None) -> int:
        """Parameters of LoRA adapters on the named layers of all blocks; None: on all.

        Raises:
            ConfigError: no layer has such a name.
        """
        known = [linear.name for linear in self.linears]
        if unknown := sorted(set(targets or ()) - set(known)):
            raise ConfigError(
                f"lora.targets: {unknown[0]!r} is no linear layer of {self.family}; there are {', '.join(known)}"
            )
        chosen = [x for x in self.linears if targets is None or x.name in targets]
        return self.layers * rank * sum(x.inside + x.outside for x in chosen)


def shape_of(fields: Fields, whose: str = "config.json") -> Shape:
    """The shape of a model with these fields of its configuration.

    Args:
        fields: as in `config.json`; what is left out has transformers' default, as far as one makes sense.
        whose: begins the message of an error.

    Raises:
        ConfigError: another architecture than the twelve families, or a size is missing.
    """
    kind = str(fields.get("model_type"))
    if kind == "gemma3" and "text_config" in fields:
        fields, kind = {**fields["text_config"], "model_type": "gemma3_text"}, "gemma3_text"
    make = _LAYOUTS.get(kind)
    if make is None:
        raise ConfigError(f"{whose}: model_type {kind!r} cannot be planned; known are {', '.join(sorted(_LAYOUTS))}")
    try:
        return make(fields)
    except KeyError as error:
        raise ConfigError(f"{whose}: has no {error.args[0]!r}, which a {kind} model needs") from None


def _opt(f: Fields) -> Shape:
    h, bias, heads = f["hidden_size"], f.get("enable_bias", True), f["num_attention_heads"]
    embedded = f.get("word_embed_proj_dim") or h
    final = f.get("do_layer_norm_before", True) and not f.get("_remove_final_layer_norm", False)
    affine = 2 * h * f.get("layer_norm_elementwise_affine", True)
    return Shape(
        family="opt", hidden=h, layers=f["num_hidden_layers"], vocabulary=f["vocab_size"], heads=heads, kv_heads=heads,
        head_size=h // heads,
        linears=(
            *(Linear(name, h, h, bias) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
            Linear("fc1", h, f["ffn_dim"], bias), Linear("fc2", f["ffn_dim"], h, bias),
        ),
        gated=False, rms=False, small=2 * affine, outside=affine * final + (2 * h * embedded if embedded != h else 0),
        positions=f["max_position_embeddings"] + 2, embedded=embedded, tied=f.get("tie_word_embeddings", True),
        longest=f["max_position_embeddings"],
    )  # fmt: skip


def _bloom(f: Fields) -> Shape:
    h = f.get("hidden_size") or f["n_embed"]
    heads = f.get("n_head") or f["num_attention_heads"]
    return Shape(
        family="bloom", hidden=h, layers=f.get("n_layer") or f["num_hidden_layers"], vocabulary=f["vocab_size"],
        heads=heads, kv_heads=heads, head_size=h // heads,
        linears=(
            Linear("query_key_value", h, 3 * h, True), Linear("dense", h, h, True),
            Linear("dense_h_to_4h", h, 4 * h, True), Linear("dense_4h_to_h", 4 * h, h, True),
        ),
        gated=False, rms=False, small=4 * h, outside=4 * h, tied=f.get("tie_word_embeddings", True),
    )  # fmt: skip


def _gpt_neox(f: Fields) -> Shape:
    h, inner, heads, bias = (
        f["hidden_size"],
        f["intermediate_size"],
        f["num_attention_heads"],
        f.get("attention_bias", True),
    )
    return Shape(
        family="gpt_neox", hidden=h, layers=f["num_hidden_layers"], vocabulary=f["vocab_size"], heads=heads,
        kv_heads=heads, head_size=h // heads,
        linears=(
            Linear("query_key_value", h, 3 * h, bias), Linear("dense", h, h, bias),
            Linear("dense_h_to_4h", h, inner, True), Linear("dense_4h_to_h", inner, h, True),
        ),
        gated=False, rms=False, small=4 * h, outside=2 * h, tied=f.get("tie_word_embeddings", False),
        longest=f["max_position_embeddings"],
    )  # fmt: skip


def _gpt(f: Fields, names: tuple[str, ...], bias: bool, norms: int, positions: bool, tied: bool) -> Shape:
    """GPT-2 and what came of it; without biases in attention but with one in the head where `tied` is false."""
    h = f.get("n_embd") or f["hidden_size"]
    heads = f.get("n_head") or f.get("num_heads") or f["num_attention_heads"]
    layers = f.get("n_layer") or f.get("num_layers") or f["num_hidden_layers"]
    inner = f.get("n_inner") or f.get("intermediate_size") or 4 * h
    longest = f.get("n_positions") or f["max_position_embeddings"]
    fused = len(names) == 4
    attention = (Linear(names[0], h, 3 * h, bias),) if fused else tuple(Linear(name, h, h, bias) for name in names[:3])
    return Shape(
        family=f["model_type"], hidden=h, layers=layers, vocabulary=f["vocab_size"], heads=heads, kv_heads=heads,
        head_size=h // heads,
        linears=(
            *attention, Linear(names[-3], h, h, bias or positions), Linear(names[-2], h, inner, True),
            Linear(names[-1], inner, h, True),
        ),
        gated=False, rms=False, small=2 * norms * h, outside=2 * h, positions=longest * positions,
        tied=f.get("tie_word_embeddings", tied), head_bias=not tied, longest=longest,
    )  # fmt: skip


def _llama(f: Fields) -> Shape:
    """LLaMA, Mistral, Qwen and Gemma 3: gated feed-forward, RMS norms, grouped key-value heads."""
    kind, h, heads, inner = f["model_type"], f["hidden_size"], f["num_attention_heads"], f["intermediate_size"]
    kv = f.get("num_key_value_heads") or heads
    size = f.get("head_dim") or h // heads
    asked = f.get("attention_bias", False)
    qkv_bias = kind == "qwen2" or asked
    out_bias = False if kind in ("qwen2", "mistral") else asked
    mlp = f.get("mlp_bias", False)
    norms = 4 * h if kind == "gemma3_text" else 2 * h
    normed = 2 * size if kind in ("qwen3", "gemma3_text") else 0
    return Shape(
        family=kind, hidden=h, layers=f["num_hidden_layers"], vocabulary=f["vocab_size"], heads=heads, kv_heads=kv,
        head_size=size,
        linears=(
            Linear("q_proj", h, heads * size, qkv_bias), Linear("k_proj", h, kv * size, qkv_bias),
            Linear("v_proj", h, kv * size, qkv_bias), Linear("o_proj", heads * size, h, out_bias),
            Linear("gate_proj", h, inner, mlp), Linear("up_proj", h, inner, mlp), Linear("down_proj", inner, h, mlp),
        ),
        gated=True, rms=True, small=norms + normed, outside=h,
        tied=f.get("tie_word_embeddings", kind == "gemma3_text"), longest=f.get("max_position_embeddings"),
    )  # fmt: skip


_LAYOUTS: dict[str, Callable[[Fields], Shape]] = {
    "opt": _opt,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
    "gpt2": lambda f: _gpt(f, ("c_attn", "c_proj", "c_fc", "c_proj"), True, 2, True, True),
    "gpt_neo": lambda f: _gpt(f, ("q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"), False, 2, True, True),
    "gptj": lambda f: _gpt(f, ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"), False, 1, False, False),
    "codegen": lambda f: _gpt(f, ("qkv_proj", "out_proj", "fc_in", "fc_out"), False, 1, False, False),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3_text"), _llama),
}


def new_fields(family: str, hidden: int, layers: int, heads: int, positions: int, vocabulary: int) -> dict[str, Any]:
    """Configuration fields of a new model, as `models.new_config` makes it."""
    both = {"hidden_size": hidden, "vocab_size": vocabulary, "max_position_embeddings": positions}
    inner = 8 * -(-hidden // 3) if family in ("llama", "mistral", "qwen2", "qwen3", "gemma3") else 4 * hidden
    return {
        **both,
        "model_type": {"gemma3": "gemma3_text"}.get(family, family),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "intermediate_size": inner,
        "ffn_dim": inner,
        **({"tie_word_embeddings": True} if family in ("llama", "mistral", "qwen2", "qwen3", "gemma3") else {}),
    }
