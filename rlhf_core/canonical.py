"""Canonical JSON and the fingerprint that decides reuse.

Two specs have one fingerprint exactly when they mean the same computation. The text is JSON with sorted keys, no spaces,
UTF-8; mappings drop keys whose value is None, so that a new optional field changes no fingerprint. What has no stable form
(NaN, infinities, sets, bytes, keys that are not text, any other object) is refused.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from pydantic import BaseModel


def canonical(value: Any, where: str = "$") -> Any:
    """Reduce `value` to plain JSON types with one form per meaning; raise ValueError for what has none."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} has no canonical form; use a finite number or leave the field out")
        return 0.0 if value == 0 else value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is a {type(key).__name__}; keys must be text")
        return {key: canonical(value[key], f"{where}.{key}") for key in sorted(value) if value[key] is not None}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [canonical(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ValueError(f"{where}: a {type(value).__name__} has no canonical form")


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`."""
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON of `value`: 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a canonical value by dotted path, e.g. {"optim.lr": 1e-05}; lists count as leaves."""
    value = canonical(value)
    if not isinstance(value, dict):
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        path = f"{prefix}.{key}" if prefix else key
        leaves.update(flatten(item, path) if isinstance(item, dict) else {path: item})
    return leaves


def differences(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted paths whose leaves differ, as (old, new); a missing side is None."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
