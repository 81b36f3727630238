"""Models in parts: built and read under ZeRO-3 so that no rank ever holds a whole model.

`build` allocates layer by layer inside `deepspeed.zero.Init`, which keeps this rank's part of each weight and drops the rest.
`read` then goes through the safetensors files tensor by tensor: rank 0 reads one, all receive it, each keeps its part. Peak
memory is a part of the model and one weight. Names are matched strictly, with and without the family's prefix, and with the
renamings transformers itself applies. What cannot be read this way (pickled weights, .gguf, new models, layouts that
transformers converts as a whole) is loaded whole by the caller and divided afterwards with `divide`.
"""

import contextlib
import ctypes
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import prevent_arange_dtype_change
from transformers.utils.hub import cached_file

from rlhf_core.entries import inside
from rlhf_core.errors import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LEGACY_BUFFERS = (
    r"rotary_emb\.inv_freq$",
    r"(^|\.)position_ids$",
    r"\.masked_bias$",
)  # were saved once, are computed now
Config = dict[str, Any]


def release_freed() -> None:
    """Give memory that was freed back to the system: glibc keeps blocks of up to 32 MB, here as much as the model."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def is_partitioned(model: nn.Module) -> bool:
    """Whether the model's weights are divided among the ranks."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def shape_of(weight: Tensor) -> torch.Size:
    """Shape of a weight, also where it is divided among the ranks."""
    return getattr(weight, "ds_shape", weight.shape)


def build(make: Callable[[], Any], zero_init: Config) -> Any:
    """What `make` makes, allocated in parts and not initialised; remembers its configuration as `zero_init`."""
    with no_init_weights(), prevent_arange_dtype_change(), deepspeed.zero.Init(config_dict_or_path=zero_init):
        model = make()
    model.tie_weights()
    release_freed()
    model.zero_init = zero_init
    return model


def divide(module: nn.Module, zero_init: Config) -> Any:
    """Divide a module that exists whole on every rank; rank 0's values count."""
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((t for name, t in kinds.items() if zero_init.get(name, {}).get("enabled")), torch.float32)
    device = get_accelerator().current_device_name()  # pyright: ignore
    for parameter in module.parameters():
        if parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)
    deepspeed.zero.Init(module=module, config_dict_or_path=zero_init)
    module.zero_init = zero_init  # pyright: ignore
    return module


def weight_files(place: str, revision: str | None = None) -> list[Path] | None:
    """The safetensors files of a model in a folder or on the hub; None where it has none."""
    found = _file(place, INDEX, revision)
    if found is not None:
        names = shards(found, f"{place}: {INDEX}")
        files = [_file(place, name, revision) for name in names]
        if None in files:
            raise ConfigError(f"{place}: {INDEX} names {names[files.index(None)]}, which is not there")
        return [f for f in files if f]
    single = _file(place, SINGLE, revision)
    return [single] if single else None


def shards(index: Path, where: str) -> list[str]:
    """The files that an index names; ConfigError for one that is not in the index's own folder or below it."""
    named = json.loads(index.read_text())["weight_map"]
    for weight, file in named.items():
        try:
            inside(str(file))
        except ValueError as error:
            raise ConfigError(f"{where} says {weight!r} is in a file outside the model's folder: {error}") from None
    return sorted({str(file) for file in named.values()})


def _file(place: str, name: str, revision: str | None) -> Path | None:
    if Path(place).is_dir():
        return Path(place) / name if (Path(place) / name).is_file() else None
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    found = cached_file(place, name, revision=revision, **options)
    return Path(found) if found else None


def renaming(model: Any) -> Callable[[str], str] | None:
    """From the names in files to those of `model`; None where transformers converts weights, not only names."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    if len(renamings) < len(conversions):
        return None
    present: dict[str, Any] = dict.fromkeys(_names(model), True)
    prefix = model.base_model_prefix
    return lambda key: rename_source_key(key, renamings, [], prefix, present)[0]


def saved_name(model: Any) -> Callable[[str], str]:
    """From the names of `model` to those that transformers writes (e.g. `embed_out` for GPT-NeoX's `lm_head`)."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)[::-1]
    reverse = [
        c.reverse_transform() for c in conversions if isinstance(c, WeightRenaming) and not isinstance(c, PrefixChange)
    ]
    renamings = [c for c in reverse if isinstance(c, WeightRenaming)]
    return lambda name: rename_source_key(name, renamings, [])[0]


def _names(model: nn.Module) -> dict[str, Tensor]:
    """All names of the weights and of the buffers that are saved; tied weights under each of their names."""
    saved = model.state_dict().keys()
    named = {n: p for n, p in model.named_parameters(remove_duplicate=False) if n in saved}
    return {**named, **{n: b for n, b in model.named_buffers() if n in saved}}


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file, and where it goes."""

    file: Path
    key: str
    shape: tuple[int, ...]
    target: Tensor


def read(
    model: nn.Module,
    files: Sequence[Path],
    rename: Callable[[str], str],
    whose: str,
    grown: Sequence[Tensor] = (),
) -> None:
    """Fill a model from safetensors files, one tensor at a time; collective where the model is partitioned.

    Args:
        model: whole, or made by `build`.
        files: all files of the model.
        rename: from a name in the files to the name in the model.
        whose: begins the message of an error, e.g. `model.path: 'x'`.
        grown: weights of the model that may have more rows than the file's; the new rows are the mean of the old.

    Raises:
        ConfigError: a weight is missing, unexpected, or has another shape.
    """
    entries = _match(model, files, rename, whose, {id(p) for p in grown})
    main = not dist.is_initialized() or dist.get_rank() == 0
    for entry in entries:
        target = entry.target
        partitioned = hasattr(target, "ds_id")
        with torch.no_grad(), deepspeed.zero.GatheredParameters([target], modifier_rank=0, enabled=partitioned):
            if main or not partitioned:
                # Opened anew each time: an open file keeps the pages of all that was read from it in memory.
                with safe_open(entry.file, framework="pt") as handle:
                    fill_rows(target, handle.get_tensor(entry.key))
        release_freed()


def fill_rows(target: Tensor, source: Tensor) -> None:
    """Copy `source` `[rows, …]` into `target` `[rows or more, …]`; further rows get the mean of the old (Hewitt 2021)."""
    rows = source.shape[0] if source.dim() else 0
    if source.dim() and target.shape[0] > rows:
        target.data[rows:] = source.float().mean(0).to(target.dtype)
        target.data[:rows].copy_(source)
    else:
        target.data.copy_(source)


def _match(
    model: nn.Module, files: Sequence[Path], rename: Callable[[str], str], whose: str, grown: set[int]
) -> list[_Entry]:
    """What is read into what, in the files' order; ConfigError unless it is exactly the model."""
    targets = _names(model)
    found: dict[int, tuple[str, _Entry]] = {}
    unexpected, mismatched = [], []
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():
                name, shape = rename(key), tuple(handle.get_slice(key).get_shape())
                target = targets.get(name)
                if target is None:
                    unexpected.append(key)
                    continue
                wanted = tuple(shape_of(target))
                longer = id(target) in grown and shape[0] < wanted[0] and shape[1:] == wanted[1:]
                if shape != wanted and not longer:
                    mismatched.append(f"{key} {list(shape)}, the model has {list(wanted)}")
                known = found.get(id(target))
                if known is None or _order(targets, name) < _order(targets, known[0]):  # a tied weight stored twice
                    found[id(target)] = (name, _Entry(file, key, shape, target))
    ignored = [*LEGACY_BUFFERS, *_patterns(model, "_keys_to_ignore_on_load_unexpected")]
    optional = _patterns(model, "_keys_to_ignore_on_load_missing")
    missing = {id(t): n for n, t in reversed(targets.items()) if id(t) not in found}
    problems = {
        "missing": [n for n in missing.values() if not any(re.search(p, n) for p in optional)],
        "unexpected": [k for k in unexpected if not any(re.search(p, k) for p in ignored)],
        "mismatched": mismatched,
    }
    for problem, names in problems.items():
        if names:
            raise ConfigError(f"{whose}: {problem} weights: {sorted(names)[:5]}")
    return [entry for _, entry in found.values()]


def _order(targets: dict[str, Tensor], name: str) -> int:
    return list(targets).index(name)


def _patterns(model: nn.Module, attribute: str) -> list[str]:
    return sorted({p for m in model.modules() for p in getattr(m, attribute, None) or ()})
