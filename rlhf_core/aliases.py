"""Aliases: names for artifacts that people promote, e.g. `@production`, kept with all that they ever stood for.

`aliases/{name}/{number}.json` are sealed records, numbered from 1, written create-only and never changed: the newest is what the
name stands for, the one before is `@name~1`. Of two that promote at once each gets a number of its own. A damaged record is an
error, never passed over, since an older artifact is not what was asked for. Not here: whether an artifact is good enough.
"""

import re
from datetime import UTC, datetime

from pydantic import Field

from rlhf_core.artifacts import ArtifactRef, Manifest, read_manifest, verify
from rlhf_core.errors import AlreadyExists, ConfigError, IntegrityError, StoreError
from rlhf_core.sealed import seal, unseal
from rlhf_core.specs import Frozen
from rlhf_core.store import Store

SCHEMA = 1
FOLDER = "aliases"
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
KEY = re.compile(rf"{FOLDER}/({NAME.pattern})/(\d{{6}})\.json")
TEXT = re.compile(rf"@({NAME.pattern})(?:~(\d{{1,6}}))?")


class Alias(Frozen):
    """One promotion."""

    schema_version: int = SCHEMA
    name: str = Field(pattern=rf"^{NAME.pattern}$")
    number: int = Field(ge=1, le=999_999)
    ref: ArtifactRef
    note: str = ""
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def key(self) -> str:
        """Where the record lies."""
        return f"{FOLDER}/{self.name}/{self.number:06d}.json"


def promote(store: Store, name: str, manifest: Manifest, note: str = "", checksums: bool = True) -> Alias:
    """Make `@name` stand for a published artifact whose files are all right.

    Args:
        store: where the artifact is, and the alias will be.
        name: lower-case letters, digits, '.', '_' and '-'.
        manifest: of the artifact.
        note: why, for people.
        checksums: compare contents, too, and not sizes alone.

    Raises:
        ConfigError: `name` is no name, or the artifact is not published.
        IntegrityError: the artifact's files are not what its manifest says.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"alias {name!r}: use lower-case letters, digits, '.', '_' and '-', e.g. production")
    if read_manifest(store, manifest.ref) is None:
        raise ConfigError(f"{manifest.ref.id} is not published in {store.url}; only what is can be promoted")
    verify(store, manifest, checksums)
    number = max((int(KEY.fullmatch(key)[2]) for key in keys_of(store, name)), default=0)  # pyright: ignore
    for candidate in range(number + 1, number + 1000):
        made = Alias(name=name, number=candidate, ref=manifest.ref, note=note)
        try:
            store.write(made.key, seal(made), create=True)
            return made
        except AlreadyExists:
            continue
    raise StoreError(f"{FOLDER}/{name}: no free number after {number}")


def keys_of(store: Store, name: str | None = None) -> list[str]:
    """Keys of the records of one alias, or of all, in order of name and age."""
    return [key for key in store.list(f"{FOLDER}/{name}" if name else FOLDER) if KEY.fullmatch(key)]


def read_alias(store: Store, key: str) -> Alias:
    """The record at a key. IntegrityError: damaged, missing, or that of another key."""
    try:
        data = store.read(key)
    except KeyError:
        raise IntegrityError(f"{store.url}/{key}: missing") from None
    found = unseal(Alias, data, f"{store.url}/{key}", SCHEMA)
    if found.key != key:
        raise IntegrityError(f"{store.url}/{key}: is the record {found.key}")
    return found


def resolve_alias(store: Store, text: str) -> ArtifactRef:
    """What `@NAME`, or `@NAME~1` for the one before, stands for.

    Raises:
        ConfigError: there is no such alias, or it never stood for so many.
        IntegrityError: its record is damaged.
    """
    match = TEXT.fullmatch(text)
    if not match:
        raise ConfigError(f"{text!r} is no alias; write @NAME or @NAME~1 for what it stood for before")
    name, back = match[1], int(match[2] or 0)
    keys = keys_of(store, name)
    if not keys:
        known = sorted({key.split("/")[1] for key in keys_of(store)})
        raise ConfigError(
            f"no alias {name!r} in {store.url}; " + (f"it has {', '.join(known)}" if known else "it has none")
        )
    if back >= len(keys):
        raise ConfigError(f"{text}: {name!r} was promoted {len(keys)} times; go back at most ~{len(keys) - 1}")
    return read_alias(store, keys[-1 - back]).ref
