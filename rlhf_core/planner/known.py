"""Published models whose sizes are known without asking the hub: configuration fields of each, as on its model page.

`fields_of` takes these, else `config.json` in a folder, else the hub's local cache. Nothing is downloaded.
"""

import json
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError
from rlhf_core.sources import resolve_model


def _opt(h: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": h, "num_hidden_layers": layers, "num_attention_heads": heads,
        "ffn_dim": 4 * h, "word_embed_proj_dim": h, "max_position_embeddings": 2048, "vocab_size": 50272, **more,
    }  # fmt: skip


def _bloom(h: int, layers: int, heads: int) -> dict[str, Any]:
    return {"model_type": "bloom", "hidden_size": h, "n_layer": layers, "n_head": heads, "vocab_size": 250880}


def _gpt(kind: str, h: int, layers: int, heads: int, positions: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": kind, "n_embd": h, "n_layer": layers, "n_head": heads, "n_positions": positions,
        "vocab_size": vocabulary,
    }  # fmt: skip


def _neox(h: int, layers: int, heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_neox", "hidden_size": h, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * h, "max_position_embeddings": 2048, "vocab_size": vocabulary,
    }  # fmt: skip


def _llama(
    kind: str, h: int, layers: int, heads: int, kv: int, inner: int, vocabulary: int, positions: int, tied: bool = False,
    head_dim: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": kind, "hidden_size": h, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "max_position_embeddings": positions, **({"head_dim": head_dim} if head_dim else {}),
    }  # fmt: skip


KNOWN: dict[str, dict[str, Any]] = {
    "facebook/opt-125m": _opt(768, 12, 12),
    "facebook/opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "facebook/opt-1.3b": _opt(2048, 24, 32),
    "facebook/opt-2.7b": _opt(2560, 32, 32),
    "facebook/opt-6.7b": _opt(4096, 32, 32),
    "facebook/opt-13b": _opt(5120, 40, 40),
    "facebook/opt-30b": _opt(7168, 48, 56),
    "facebook/opt-66b": _opt(9216, 64, 72),
    "facebook/opt-175b": _opt(12288, 96, 96),
    "bigscience/bloom-560m": _bloom(1024, 24, 16),
    "bigscience/bloom-1b1": _bloom(1536, 24, 16),
    "bigscience/bloom-1b7": _bloom(2048, 24, 16),
    "bigscience/bloom-3b": _bloom(2560, 30, 32),
    "bigscience/bloom-7b1": _bloom(4096, 30, 32),
    "bigscience/bloom": _bloom(14336, 70, 112),
    "openai-community/gpt2": _gpt("gpt2", 768, 12, 12, 1024, 50257),
    "openai-community/gpt2-medium": _gpt("gpt2", 1024, 24, 16, 1024, 50257),
    "openai-community/gpt2-large": _gpt("gpt2", 1280, 36, 20, 1024, 50257),
    "openai-community/gpt2-xl": _gpt("gpt2", 1600, 48, 25, 1024, 50257),
    "EleutherAI/gpt-neo-125m": _gpt("gpt_neo", 768, 12, 12, 2048, 50257),
    "EleutherAI/gpt-neo-1.3B": _gpt("gpt_neo", 2048, 24, 16, 2048, 50257),
    "EleutherAI/gpt-neo-2.7B": _gpt("gpt_neo", 2560, 32, 20, 2048, 50257),
    "EleutherAI/gpt-j-6b": _gpt("gptj", 4096, 28, 16, 2048, 50400),
    "EleutherAI/gpt-neox-20b": _neox(6144, 44, 64, 50432),
    "EleutherAI/pythia-160m": _neox(768, 12, 12, 50304),
    "EleutherAI/pythia-410m": _neox(1024, 24, 16, 50304),
    "EleutherAI/pythia-1b": _neox(2048, 16, 8, 50304),
    "EleutherAI/pythia-6.9b": _neox(4096, 32, 32, 50432),
    "EleutherAI/pythia-12b": _neox(5120, 36, 40, 50688),
    "Salesforce/codegen-350M-mono": _gpt("codegen", 1024, 20, 16, 2048, 51200),
    "Salesforce/codegen-2B-mono": _gpt("codegen", 2560, 32, 32, 2048, 51200),
    "Salesforce/codegen-6B-mono": _gpt("codegen", 4096, 33, 16, 2048, 51200),
    "Salesforce/codegen-16B-mono": _gpt("codegen", 6144, 34, 24, 2048, 51200),
    "meta-llama/Llama-2-7b-hf": _llama("llama", 4096, 32, 32, 32, 11008, 32000, 4096),
    "meta-llama/Llama-2-13b-hf": _llama("llama", 5120, 40, 40, 40, 13824, 32000, 4096),
    "meta-llama/Llama-2-70b-hf": _llama("llama", 8192, 80, 64, 8, 28672, 32000, 4096),
    "meta-llama/Meta-Llama-3-8B": _llama("llama", 4096, 32, 32, 8, 14336, 128256, 8192),
    "meta-llama/Meta-Llama-3-70B": _llama("llama", 8192, 80, 64, 8, 28672, 128256, 8192),
    "meta-llama/Llama-3.2-1B": _llama("llama", 2048, 16, 32, 8, 8192, 128256, 131072, True, 64),
    "meta-llama/Llama-3.2-3B": _llama("llama", 3072, 28, 24, 8, 8192, 128256, 131072, True, 128),
    "HuggingFaceTB/SmolLM2-135M": _llama("llama", 576, 30, 9, 3, 1536, 49152, 8192, True),
    "HuggingFaceTB/SmolLM2-360M": _llama("llama", 960, 32, 15, 5, 2560, 49152, 8192, True),
    "HuggingFaceTB/SmolLM2-1.7B": _llama("llama", 2048, 24, 32, 32, 8192, 49152, 8192, True),
    "mistralai/Mistral-7B-v0.1": _llama("mistral", 4096, 32, 32, 8, 14336, 32000, 32768),
    "Qwen/Qwen2.5-0.5B": _llama("qwen2", 896, 24, 14, 2, 4864, 151936, 32768, True),
    "Qwen/Qwen2.5-1.5B": _llama("qwen2", 1536, 28, 12, 2, 8960, 151936, 131072, True),
    "Qwen/Qwen2.5-3B": _llama("qwen2", 2048, 36, 16, 2, 11008, 151936, 32768, True),
    "Qwen/Qwen2.5-7B": _llama("qwen2", 3584, 28, 28, 4, 18944, 152064, 131072),
    "Qwen/Qwen2.5-14B": _llama("qwen2", 5120, 48, 40, 8, 13824, 152064, 131072),
    "Qwen/Qwen2.5-32B": _llama("qwen2", 5120, 64, 40, 8, 27648, 152064, 131072),
    "Qwen/Qwen2.5-72B": _llama("qwen2", 8192, 80, 64, 8, 29568, 152064, 131072),
    "Qwen/Qwen3-0.6B": _llama("qwen3", 1024, 28, 16, 8, 3072, 151936, 40960, True, 128),
    "Qwen/Qwen3-1.7B": _llama("qwen3", 2048, 28, 16, 8, 6144, 151936, 40960, True, 128),
    "Qwen/Qwen3-4B": _llama("qwen3", 2560, 36, 32, 8, 9728, 151936, 40960, True, 128),
    "Qwen/Qwen3-8B": _llama("qwen3", 4096, 36, 32, 8, 12288, 151936, 40960, False, 128),
    "google/gemma-3-1b-pt": _llama("gemma3_text", 1152, 26, 4, 1, 6912, 262144, 32768, True, 256),
}
ENDINGS = ("-instruct", "-chat-hf", "-it", "-hf")


def fields_of(path: str, field: str = "model.path") -> dict[str, Any]:
    """Configuration fields of a model: a folder, a published model by its hub name, or one in the hub's cache here.

    Raises:
        ConfigError: none of these.
    """
    place = resolve_model(path, field) if path.startswith("package:") or Path(path).expanduser().exists() else path
    file = Path(place).expanduser() / "config.json"
    if file.is_file():
        return json.loads(file.read_text())
    names = {name.lower(): name for name in KNOWN} | {name.lower().partition("/")[2]: name for name in KNOWN}
    wanted = path.lower()
    for name in (wanted, *(wanted.replace(ending, "") for ending in ENDINGS if ending in wanted)):
        if name in names:
            return KNOWN[names[name]]
    cached = _cached(path)
    if cached:
        return json.loads(Path(cached).read_text())
    raise ConfigError(
        f"{field}: the sizes of {path!r} are not known here: no folder with a config.json, not in the hub's cache, and not "
        f"among the {len(KNOWN)} published models; name the nearest with --model, e.g. --model facebook/opt-1.3b"
    )


def _cached(name: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return found if isinstance(found, str) else None
