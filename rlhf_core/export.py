"""Writing models as plain transformers and PEFT load them, one weight at a time, from any ZeRO stage.

A weight is gathered from its parts (at ZeRO-3), merged with its adapter (LoRA), and put into the open shard on rank 0, which is
written as soon as it is full. So no rank ever holds more than one weight and one shard of the model. The number of shards is
known beforehand from the sizes, and files and index are named as transformers names them. Every function here is collective:
all ranks call it, rank 0 writes. Tied weights are written once. Nothing is uploaded; that is the job's business.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from rlhf_core import lora
from rlhf_core.partitioned import release_freed, saved_name
from rlhf_core.specs import LoRASpec

SHARD_BYTES = 2_000_000_000


def save_causal_lm(engine_or_model: Any, tokenizer: Any, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a language model: weights, configuration, generation configuration, tokenizer with its chat template.

    Args:
        engine_or_model: a DeepSpeed engine of any ZeRO stage, or a module; adapters are merged in what is written only.
        tokenizer: saved beside the model.
        folder: made if needed; weights that lie there are replaced.
        shard_bytes: largest file of weights; a single larger weight has a file of its own.
    """
    model = getattr(engine_or_model, "module", engine_or_model)
    folder = Path(folder)
    name = saved_name(model)
    weights = [lora.Weight(name(w.name), w.parts, w.make) for w in lora.weights(model)]
    _write_weights(weights, folder, shard_bytes)
    if not _is_main():
        return
    config = copy.deepcopy(model.config)
    config.dtype = _dtype(weights)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is written is plain
    config.save_pretrained(folder)
    if model.generation_config is not None:
        generation = copy.deepcopy(model.generation_config)
        generation.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True)
        generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_value_model(
    engine_or_model: Any, tokenizer: Any, folder: str | Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a reward model or critic in the layout of `…ForSequenceClassification`: the trunk under its usual prefix, `score`.

    Args:
        engine_or_model: a DeepSpeed engine of any ZeRO stage around a `ValueModel`, or the `ValueModel`.
        tokenizer: saved beside the model.
        folder: made if needed; weights that lie there are replaced.
        shard_bytes: largest file of weights.
    """
    model = getattr(engine_or_model, "module", engine_or_model)
    folder = Path(folder)
    prefix = f"{model.trunk.base_model_prefix}."
    weights = [
        lora.Weight(prefix + w.name.removeprefix("trunk."), w.parts, w.make) if w.name.startswith("trunk.") else w
        for w in lora.weights(model)
    ]
    _write_weights(weights, folder, shard_bytes)
    if not _is_main():
        return
    config = json.loads(model.config.to_json_string(use_diff=False))
    kind = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config["model_type"])
    config.update(architectures=[kind] if kind else None, num_labels=1, id2label={"0": "score"}, label2id={"score": 0})
    config["dtype"] = str(_dtype(weights)).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    tokenizer.save_pretrained(folder)


def save_adapter(engine_or_model: Any, folder: str | Path, spec: LoRASpec, base: str) -> None:
    """Write the adapters, and what else was trained, as `peft.PeftModel.from_pretrained` reads them.

    Args:
        engine_or_model: a DeepSpeed engine of any ZeRO stage, or a module, with adapters.
        folder: made if needed.
        spec: sizes of the adapters.
        base: name or path of the model they belong to.
    """
    model = getattr(engine_or_model, "module", engine_or_model)
    state = {name: tensor for name, tensor in _values(lora.adapter_weights(model)) if tensor is not None}
    if _is_main():
        lora.write_adapter(Path(folder), state, model, spec, base)


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _dtype(weights: list[lora.Weight]) -> torch.dtype:
    """The number format of the model: that of its first floating-point weight."""
    return next((w.parts[0].dtype for w in weights if w.parts[0].is_floating_point()), torch.float32)


def _bytes(weight: lora.Weight) -> int:
    """Size of a weight, also where it is partitioned."""
    first = weight.parts[0]
    quantised = getattr(first, "quant_state", None)
    if quantised is not None:
        return quantised.shape.numel() * quantised.dtype.itemsize
    return int(getattr(first, "ds_numel", first.numel())) * first.element_size()


def _values(weights: list[lora.Weight]) -> Iterator[tuple[str, Tensor | None]]:
    """Name and value of every weight, on the CPU of rank 0; None on other ranks, which take part in the gathering."""
    main = _is_main()
    for weight in weights:
        parts = [p for p in weight.parts if isinstance(p, nn.Parameter)]
        with torch.no_grad(), deepspeed.zero.GatheredParameters(parts, enabled=bool(parts)):  # no-op unless partitioned
            yield weight.name, weight.make(*weight.parts).detach().cpu().clone().contiguous() if main else None


def plan_shards(sizes: list[int], limit: int) -> list[int]:
    """For each weight, in order, the number of the shard it goes into; a shard is at most `limit` bytes, or one weight."""
    shards: list[int] = []
    filled = 0
    for size in sizes:
        new = not shards or filled + size > limit
        filled = size if new else filled + size
        shards.append((shards[-1] + 1 if shards else 0) if new else shards[-1])
    return shards


def _write_weights(weights: list[lora.Weight], folder: Path, shard_bytes: int) -> None:
    """Write `model.safetensors`, or `model-0000i-of-0000N.safetensors` and their index."""
    sizes = [_bytes(weight) for weight in weights]
    shards = plan_shards(sizes, shard_bytes)
    count = shards[-1] + 1
    names = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    main = _is_main()
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        for old in [*folder.glob("model*.safetensors"), folder / "model.safetensors.index.json"]:
            old.unlink(missing_ok=True)
    held: dict[str, Tensor] = {}
    for i, (name, value) in enumerate(_values(weights)):
        if value is None:
            continue
        held[name] = value
        if i + 1 == len(weights) or shards[i + 1] != shards[i]:
            save_file(held, str(folder / names[shards[i]]), metadata={"format": "pt"})
            held = {}
            release_freed()
    if main and count > 1:
        index = {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {weight.name: names[shard] for weight, shard in zip(weights, shards, strict=True)},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
