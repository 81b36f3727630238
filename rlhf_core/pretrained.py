"""Loading pretrained language models, strictly: whole, in parts (ZeRO-3), from GGUF, or in four bits.

A missing, unexpected or differently shaped weight is an error that names it, so that no model trains with random weights
unnoticed. Safetensors are preferred; pickled weights are read by transformers without running code, and code that a model
brings is never run. Quantised folders are refused with a remedy, because training would need their weights plain. Four bits
(QLoRA) needs a GPU and is not tested.
"""

import contextlib
import importlib.util
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from rlhf_core.errors import ConfigError
from rlhf_core.partitioned import INDEX, build, divide, fill_rows, read, renaming, shards, weight_files
from rlhf_core.sources import resolve_model

# Said to all that loads: left open, transformers asks on a terminal whether to run the code that a model brings.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
DROPOUT_FIELDS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "embed_dropout",
    "embd_pdrop",
    "attn_pdrop",
    "resid_pdrop",
    "resid_dropout",
    "classifier_dropout",
    "layerdrop",
)


def set_dropout(config: Any, p: float) -> Any:
    """Set every dropout field the configuration has."""
    for name in DROPOUT_FIELDS:
        if isinstance(getattr(config, name, None), int | float):
            setattr(config, name, p)
    return config


def load_causal_lm(
    path: str,
    dropout: float | None = None,
    revision: str | None = None,
    zero_init: dict[str, Any] | None = None,
    quantize: str | None = None,
    rows: int | None = None,
) -> PreTrainedModel:
    """A pretrained causal language model from a folder, a .gguf file, `package:NAME/FILE` or the hub.

    With `zero_init`, safetensors are read tensor by tensor and each rank keeps its part; any other format is loaded whole by
    every rank first, then divided.

    Args:
        path: where the model is.
        dropout: sets every dropout of the model; None leaves its own.
        revision: of a hub name.
        zero_init: `engine.zero_init`'s configuration (weights in its precision), or None: whole, in fp32.
        quantize: "nf4" keeps the weights in 4 bits (needs a GPU and bitsandbytes).
        rows: enlarge the vocabulary to so many rows if it has fewer; new rows are the mean of the old.

    Raises:
        ConfigError: nothing loadable is there, a weight is missing, unexpected or of another shape, or it is quantised.
    """
    place, whose = resolve_model(path), f"model.path: {path!r}"
    if place.endswith(".gguf"):
        config = None
    else:
        config = model_config(place, revision, whose)
        if (index := Path(place) / INDEX).is_file():
            shards(index, str(index))  # also where transformers reads it, which goes wherever it leads
        if dropout is not None:
            set_dropout(config, dropout)
    if quantize:
        return _load_in_four_bits(place, config, revision, whose, zero_init, rows)
    if zero_init and config is not None and (files := weight_files(place, revision)):
        model = _load_in_parts(config, files, whose, zero_init, rows)
        if model is not None:
            _set_generation(model, place, revision)
            return model
    model = _load_whole(place, config, revision, whose)
    if rows:
        grow_vocabulary(model, rows)
    return divide(model, zero_init) if zero_init else model


def model_config(place: str, revision: str | None, whose: str) -> Any:
    """The configuration beside a model's weights; ConfigError if there is none, or the weights are quantised."""
    try:
        config = AutoConfig.from_pretrained(place, revision=revision, **NO_CODE)  # pyright: ignore
    except (OSError, ValueError) as error:
        raise ConfigError(f"{whose} cannot be loaded: {str(error).splitlines()[0]}") from error
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ConfigError(
            f"{whose} is quantised ({getattr(method, 'value', method)}); training needs plain weights: use the original model, "
            "or dequantise it first (a .gguf file is dequantised when it is loaded)"
        )
    return config


def _load_whole(place: str, config: Any, revision: str | None, whose: str, **options: Any) -> PreTrainedModel:
    """Load with transformers, in fp32; strict."""
    options = {"dtype": torch.float32, "revision": revision, "output_loading_info": True, **NO_CODE, **options}
    if config is None:
        from transformers import GgufConfig

        options.update(gguf_file=Path(place).name, quantization_config=GgufConfig(dequantize=True))
        place = str(Path(place).parent)
    else:
        options["config"] = config
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, **options)
        model, info = loaded
    except (OSError, ValueError, UnpicklingError) as error:
        raise ConfigError(f"{whose} cannot be loaded: {str(error).splitlines()[0]}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            kind = problem.replace("_keys", " weights")
            raise ConfigError(f"{whose}: {kind}: {sorted(map(str, info[problem]))[:5]}")
    return model


def _load_in_parts(
    config: Any, files: list[Path], whose: str, zero_init: dict[str, Any], rows: int | None
) -> PreTrainedModel | None:
    """Build and read tensor by tensor; None where transformers has to convert the weights as a whole."""
    with torch.device("meta"):
        if renaming(AutoModelForCausalLM.from_config(config)) is None:
            return None
    if rows:
        config.get_text_config().vocab_size = max(rows, config.get_text_config().vocab_size)
    model = build(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32), zero_init)
    rename = renaming(model)
    assert rename
    read(model, files, rename, whose, vocabulary_weights(model) if rows else ())
    return model.eval()


def _set_generation(model: PreTrainedModel, place: str, revision: str | None) -> None:
    """The generation configuration beside the weights, as `from_pretrained` would set it."""
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(place, revision=revision)  # pyright: ignore


def _load_in_four_bits(
    place: str, config: Any, revision: str | None, whose: str, zero_init: dict[str, Any] | None, rows: int | None
) -> PreTrainedModel:
    """QLoRA's frozen weights (Dettmers et al. 2023). Not tested: it needs a GPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if accelerator.device_name() == "cpu":
        raise ConfigError("lora.quantize: 'nf4' needs a GPU, and this process computes on the CPU; remove quantize")
    if zero_init:
        raise ConfigError(
            "lora.quantize: 'nf4' cannot be divided among ranks; use zero_stage 0, 1 or 2, or no quantize"
        )
    if config is None:
        raise ConfigError(
            f"{whose}: a .gguf file cannot be loaded in 4 bits; use the original model, or no lora.quantize"
        )
    if rows and config.vocab_size < rows:
        raise ConfigError(
            f"{whose}: has {config.vocab_size} embedding rows, the tokenizer {rows} tokens, and a model in 4 bits cannot "
            "grow; name an existing token in data.tokenizer.pad_token"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("lora.quantize: 'nf4' needs the package bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if accelerator.is_bf16_supported() else torch.float16
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    device = {"": accelerator.current_device_name()}
    return _load_whole(place, config, revision, whose, quantization_config=options, device_map=device, dtype=compute)


def vocabulary_weights(model: Any) -> list[Tensor]:
    """The weights with a row for every token: embeddings, and the head's weight and bias."""
    head = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight, *(() if head is None else head.parameters())]
    return list({id(w): w for w in found}.values())


def grow_vocabulary(model: Any, rows: int) -> None:
    """Enlarge the vocabulary of a whole model to `rows` if it has fewer; the new rows are the mean of the old."""
    old = model.get_input_embeddings().weight.shape[0]
    if old >= rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for weight in vocabulary_weights(model):
        fill_rows(weight, weight.data[:old].clone())
