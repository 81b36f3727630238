"""Artifacts: immutable results of stages, made to exist by a manifest written last.

Layout under the store's root: `{stage}/{name}-{fingerprint12}/` with `manifest.json`, `checkpoints/` and `attempts/NNNN/`, one
folder for each launch: job.json, log.txt, metrics.jsonl, result.json and `files/`, the result. The manifest says which
attempt's files the artifact consists of, so no file is ever written twice and attempts cannot spoil each other's. `publish`
verifies size and sha256 of every file in the store and then writes the manifest create-only; a reader needs one GET to know
whether an artifact exists, and `fetch` verifies again what it takes.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from rlhf_core.cache import take
from rlhf_core.canonical import fingerprint
from rlhf_core.entries import FileEntry, describe, inside, sha256_file
from rlhf_core.errors import AlreadyExists, IntegrityError
from rlhf_core.parallel import in_threads
from rlhf_core.sealed import seal, unseal
from rlhf_core.specs import STAGES, Frozen, StageName
from rlhf_core.store import Store

__all__ = [
    "MANIFEST",
    "SCHEMA",
    "ArtifactRef",
    "FileEntry",
    "Manifest",
    "describe",
    "fetch",
    "inside",
    "job_cache",
    "list_manifests",
    "make_ref",
    "manifest_at",
    "parse_manifest",
    "publish",
    "read_manifest",
    "require_manifest",
    "retired_before",
    "sha256_file",
    "survey",
    "verify",
]

SCHEMA = 1
MANIFEST = "manifest.json"


class ArtifactRef(Frozen):
    """The id of an artifact: what it is, a name for people, and the fingerprint of what defines it."""

    stage: StageName
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    fingerprint: str = Field(pattern=r"^[0-9a-f]{64}$")

    @property
    def id(self) -> str:
        """`stage/name-fingerprint12`; also the artifact's folder in the store."""
        return f"{self.stage}/{self.name}-{self.fingerprint[:12]}"

    def __str__(self) -> str:
        return self.id


class Manifest(Frozen):
    """The record whose presence makes an artifact exist."""

    schema_version: int = SCHEMA
    ref: ArtifactRef
    spec: dict[str, Any] = Field(description="the identity that was hashed: the spec with places replaced by digests")
    inputs: dict[str, ArtifactRef] = {}
    folder: str = Field(default="", description="where the files are, relative to the artifact's folder")
    files: tuple[FileEntry, ...]
    metrics: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @field_validator("folder")
    @classmethod
    def _inside(cls, folder: str) -> str:
        return inside(folder) if folder else folder

    @property
    def place(self) -> str:
        """The folder of the files, relative to the store's root."""
        return f"{self.ref.id}/{self.folder}" if self.folder else self.ref.id

    @property
    def attempt(self) -> int:
        """The attempt whose files it consists of; 1 where it does not say."""
        match = re.match(r"attempts/(\d+)/", self.folder)
        return int(match[1]) if match else 1

    def key(self, path: str) -> str:
        """Where a file is, relative to the store's root."""
        return f"{self.place}/{path}"

    def file(self, path: str) -> FileEntry:
        """The entry of one file; KeyError if the artifact has none."""
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(path)

    def files_of(self, part: str) -> tuple[FileEntry, ...]:
        """The entries of one file or of all files in a folder; none if there is no such thing."""
        return tuple(entry for entry in self.files if entry.path == part or entry.path.startswith(f"{part}/"))


def make_ref(stage: StageName, name: str, spec: dict[str, Any], inputs: dict[str, ArtifactRef]) -> ArtifactRef:
    """The id of what `stage` makes of `spec` and `inputs`: a hash of both and of nothing else."""
    ids = {key: ref.fingerprint for key, ref in inputs.items()}
    return ArtifactRef(
        stage=stage,
        name=name,
        fingerprint=fingerprint({"schema": SCHEMA, "stage": stage, "spec": spec, "inputs": ids}),
    )


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Manifest from its bytes; IntegrityError if it is not one that this version can read."""
    return unseal(Manifest, data, where, SCHEMA)


def read_manifest(store: Store, ref: ArtifactRef) -> Manifest | None:
    """The manifest, or None if the artifact does not exist. Storage errors raise."""
    manifest = manifest_at(store, ref.id)
    if manifest is not None and manifest.ref != ref:
        where = f"{store.url}/{ref.id}/{MANIFEST}"
        raise IntegrityError(f"{where}: is the manifest of {manifest.ref.fingerprint}, not {ref.fingerprint}")
    return manifest


def require_manifest(store: Store, ref: ArtifactRef) -> Manifest:
    """The manifest of an artifact that must be there; IntegrityError if it is not published."""
    manifest = read_manifest(store, ref)
    if manifest is None:
        raise IntegrityError(f"{store.url}/{ref.id}: not published; run the stage that makes it first")
    return manifest


def manifest_at(store: Store, id: str) -> Manifest | None:
    """The manifest in the folder of an artifact, known by its id alone, or None."""
    key = f"{id}/{MANIFEST}"
    try:
        data = store.read(key)
    except KeyError:
        return None
    manifest = parse_manifest(data, f"{store.url}/{key}")
    if manifest.ref.id != id:
        raise IntegrityError(f"{store.url}/{key}: is the manifest of {manifest.ref.id}")
    return manifest


def survey(store: Store, stage: StageName | None = None) -> tuple[list[Manifest], dict[str, IntegrityError]]:
    """All published artifacts (of one stage), oldest first; and by id those whose manifest cannot be read, and why."""
    keys = store.list(stage or "")
    ids = [k.removesuffix(f"/{MANIFEST}") for k in keys if k.endswith(f"/{MANIFEST}") and k.count("/") == 2]
    damaged: dict[str, IntegrityError] = {}

    def read(id: str) -> Manifest | None:
        try:
            return manifest_at(store, id)
        except IntegrityError as error:
            damaged[id] = error
            return None

    found = [manifest for manifest in in_threads(read, [i for i in ids if i.partition("/")[0] in STAGES]) if manifest]
    return sorted(found, key=lambda m: m.created), damaged


def list_manifests(store: Store, stage: StageName | None = None) -> list[Manifest]:
    """The published artifacts (of one stage) that can be read, oldest first. `survey` also tells of the others."""
    return survey(store, stage)[0]


def verify(store: Store, manifest: Manifest, checksums: bool = True) -> None:
    """Compare what is stored with the manifest's entries; IntegrityError names the first file that differs."""
    sizes = store.list(manifest.place)
    for entry in manifest.files:
        key = manifest.key(entry.path)
        if key not in sizes:
            raise IntegrityError(f"{store.url}/{key}: missing; the manifest lists it")
        if sizes[key] != entry.size:
            raise IntegrityError(f"{store.url}/{key}: {sizes[key]} bytes, the manifest says {entry.size}")

    def check(entry: FileEntry) -> None:
        key = manifest.key(entry.path)
        if store.sha256(key) != entry.sha256:
            raise IntegrityError(f"{store.url}/{key}: content differs from the manifest's sha256 {entry.sha256[:12]}…")

    if checksums:
        in_threads(check, manifest.files)


def publish(store: Store, manifest: Manifest, last_look: Callable[[], None] = lambda: None) -> Manifest:
    """Verify the files and write the manifest, create-only; returns the manifest that stands.

    If another run published the same artifact first, its manifest stands and is returned. `last_look` is called between the
    two steps, the first of which may take long; what it raises keeps the artifact from being published.
    """
    verify(store, manifest)
    last_look()
    try:
        store.write(f"{manifest.ref.id}/{MANIFEST}", seal(manifest), create=True)
    except AlreadyExists:
        standing = read_manifest(store, manifest.ref)
        assert standing is not None
        return standing
    return manifest


def retired_before(store: Store, ref: ArtifactRef) -> int:
    """The first attempt whose results and checkpoints count: that of the last run that forced the artifact, or 1.

    Raises:
        IntegrityError: the record of a run that forced it is damaged.
    """
    numbers = [1]
    for key in store.list(f"{ref.id}/superseded"):
        if "/superseded/by-" in key:
            try:
                numbers.append(int(json.loads(store.read(key)).get("attempt", 1)))
            except KeyError:
                continue
            except (ValueError, TypeError, AttributeError):
                raise IntegrityError(
                    f"{store.url}/{key}: damaged: not the record of a forced run; remove it and force the stage again"
                ) from None
    return max(numbers)


def fetch(store: Store, ref: ArtifactRef, cache: Path, part: str | None = None) -> tuple[Path, Manifest]:
    """A local folder with the artifact's files, verified, and its manifest.

    With `part`, a file or a folder in it, only that is verified and brought, and nothing if there is no such part. A local
    store is read in place; a link in it that leads out of it is refused. Otherwise files go to `cache` (see there), once for all
    processes of the node, several at a time. That folder belongs to one store and one list of files, so an artifact that was
    built anew is fetched anew.

    Raises:
        IntegrityError: not published, or what is stored is not what the manifest says.
        ConfigError: others may write to `cache`, or its disk has no room.
    """
    whole = require_manifest(store, ref)
    manifest = whole.model_copy(update={"files": whole.files_of(part)}) if part else whole
    in_place = store.local_path(manifest.place)
    if in_place is not None:
        _refuse_links_out(Path(store.root), [in_place / entry.path for entry in manifest.files])
        verify(store, manifest)
        return in_place, whole

    def download(entry: FileEntry, local: Path) -> None:
        try:
            store.download(manifest.key(entry.path), local)
        except KeyError:
            raise IntegrityError(f"{entry.path}: missing; the manifest lists it") from None

    try:
        return take(cache, _cache_key(store, manifest), manifest.files, download), whole
    except IntegrityError as error:
        raise IntegrityError(f"{store.url}/{ref.id}: {error}") from error


def _refuse_links_out(root: Path, files: Iterable[Path]) -> None:
    """IntegrityError if a file is a link out of a local store: its content would be another's to change."""
    inside_of = root.resolve()
    for file in files:
        if not file.resolve().is_relative_to(inside_of):
            raise IntegrityError(f"{file}: is a link out of the store {root}; put the file itself there")


def job_cache() -> Path:
    """Where the jobs of this user keep what they fetched, on the node's own disk."""
    return Path(tempfile.gettempdir()) / f"rlhf-cache-{os.getuid()}"


def _cache_key(store: Store, manifest: Manifest) -> str:
    """The name of an artifact's folder in a cache: of its fingerprint, its store and its files."""
    files = [entry.model_dump() for entry in manifest.files]
    place = f"{store.url}/{manifest.place}"
    return f"{manifest.ref.fingerprint[:12]}-{fingerprint({'place': place, 'files': files})[:32]}"
