"""Records in the store carry their own checksum, so that damage to a record is noticed as damage to a file is.

A sealed record is JSON whose last entry, `seal`, is the sha256 of all bytes before it. Manifests, markers of checkpoints, job
requests and results are written so. A record without a seal is one of an older version, and is read as it is.
"""

import hashlib
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rlhf_core.errors import IntegrityError

R = TypeVar("R", bound=BaseModel)
TAIL = re.compile(rb',\n "seal": "([0-9a-f]{64})"\n}\Z')
LIKE_TAIL = re.compile(rb'[0-9a-f]{64}"\s*}\s*\Z')  # a seal whose name was hit; no record without one ends so


def seal(record: BaseModel) -> bytes:
    """The record as JSON with its seal."""
    body = record.model_dump_json(indent=1).encode().removesuffix(b"\n}")
    return body + b',\n "seal": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}'


def parse(data: bytes, where: str) -> dict[str, Any]:
    """The record's fields without its seal. IntegrityError: it is not whole, or not JSON."""
    found = TAIL.search(data)
    if found and hashlib.sha256(data[: found.start()]).hexdigest().encode() != found[1]:
        raise IntegrityError(f"{where}: damaged: its content is not what its seal says")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where}: damaged: not JSON: {error}") from error
    if not isinstance(fields, dict) or (not found and ("seal" in fields or LIKE_TAIL.search(data))):
        raise IntegrityError(f"{where}: damaged: not a sealed record")
    fields.pop("seal", None)
    return fields


def unseal(kind: type[R], data: bytes, where: str, schema: int | None = None) -> R:
    """The record from its bytes.

    Args:
        kind: its model.
        data: as stored.
        where: its place, for messages.
        schema: the newest `schema_version` that this version reads.

    Raises:
        IntegrityError: damaged, written by a newer version, or not such a record.
    """
    fields = parse(data, where)
    version = fields.get("schema_version")
    if schema is not None and isinstance(version, int) and version > schema:
        raise IntegrityError(f"{where}: schema {version} is newer than {schema}, which this version reads; upgrade")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise IntegrityError(f"{where}: not a {kind.__name__}: {error}") from error
