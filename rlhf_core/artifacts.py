"""Artifacts: immutable results of stages, made to exist by a manifest written last.

Layout under the store's root: `{stage}/{name}-{fingerprint12}/` with `manifest.json`, `checkpoints/` and `attempts/NNNN/`, one
folder for each launch: job.json, log.txt, metrics.jsonl, result.json and `files/`, the result. The manifest says which
attempt's files the artifact consists of, so no file is ever written twice and attempts cannot spoil each other's. `publish`
verifies size and sha256 of every file in the store and then writes the manifest create-only; a reader needs one GET to know
whether an artifact exists, and `fetch` verifies again what it takes.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from rlhf_core.canonical import fingerprint
from rlhf_core.errors import AlreadyExists, ConfigError, IntegrityError
from rlhf_core.sealed import seal, unseal
from rlhf_core.specs import Frozen, StageName
from rlhf_core.store import Store

SCHEMA = 1
MANIFEST = "manifest.json"
CHEAP_BYTES = 1 << 20  # files of a cache up to this size are hashed again whenever they are used


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


class FileEntry(Frozen):
    """One file of an artifact."""

    path: str = Field(description="relative to the artifact's folder, never out of it")
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        return inside(path)


def inside(path: str) -> str:
    """The path if it cannot leave the folder it is relative to; ValueError otherwise."""
    if path.startswith("/") or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} must be relative, without empty, '.' or '..' parts")
    return path


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

    def key(self, path: str) -> str:
        """Where a file is, relative to the store's root."""
        return f"{self.place}/{path}"

    def file(self, path: str) -> FileEntry:
        """The entry of one file; KeyError if the artifact has none."""
        for entry in self.files:
            if entry.path == path:
                return entry
        raise KeyError(path)


def make_ref(stage: StageName, name: str, spec: dict[str, Any], inputs: dict[str, ArtifactRef]) -> ArtifactRef:
    """The id of what `stage` makes of `spec` and `inputs`: a hash of both and of nothing else."""
    ids = {key: ref.fingerprint for key, ref in inputs.items()}
    return ArtifactRef(
        stage=stage,
        name=name,
        fingerprint=fingerprint({"schema": SCHEMA, "stage": stage, "spec": spec, "inputs": ids}),
    )


def sha256_file(path: Path) -> str:
    """sha256 of a local file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path) -> tuple[FileEntry, ...]:
    """Entries of all files below a local folder, in order of path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return tuple(
        FileEntry(path=p.relative_to(folder).as_posix(), size=p.stat().st_size, sha256=sha256_file(p)) for p in files
    )


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Manifest from its bytes; IntegrityError if it is not one that this version can read."""
    return unseal(Manifest, data, where, SCHEMA)


def read_manifest(store: Store, ref: ArtifactRef) -> Manifest | None:
    """The manifest, or None if the artifact does not exist. Storage errors raise."""
    key = f"{ref.id}/{MANIFEST}"
    try:
        data = store.read(key)
    except KeyError:
        return None
    manifest = parse_manifest(data, f"{store.url}/{key}")
    if manifest.ref.fingerprint != ref.fingerprint:
        raise IntegrityError(f"{store.url}/{key}: is the manifest of {manifest.ref.fingerprint}, not {ref.fingerprint}")
    return manifest


def list_manifests(store: Store, stage: StageName | None = None) -> list[Manifest]:
    """All published artifacts (of one stage), oldest first; what is not published is not listed."""
    keys = [k for k in store.list(stage or "") if k.endswith(f"/{MANIFEST}") and k.count("/") == 2]
    return sorted((parse_manifest(store.read(k), k) for k in keys), key=lambda m: m.created)


def verify(store: Store, manifest: Manifest, checksums: bool = True) -> None:
    """Compare what is stored with the manifest's entries; IntegrityError names the first file that differs."""
    sizes = store.list(manifest.place)
    for entry in manifest.files:
        key = manifest.key(entry.path)
        if key not in sizes:
            raise IntegrityError(f"{store.url}/{key}: missing; the manifest lists it")
        if sizes[key] != entry.size:
            raise IntegrityError(f"{store.url}/{key}: {sizes[key]} bytes, the manifest says {entry.size}")
        if checksums and _sha256(store, key) != entry.sha256:
            raise IntegrityError(f"{store.url}/{key}: content differs from the manifest's sha256 {entry.sha256[:12]}…")


def _sha256(store: Store, key: str) -> str:
    local = store.local_path(key)
    return sha256_file(local) if local else hashlib.sha256(store.read(key)).hexdigest()


def publish(store: Store, manifest: Manifest) -> Manifest:
    """Verify the files and write the manifest, create-only; returns the manifest that stands.

    If another run published the same artifact first, its manifest stands and is returned.
    """
    verify(store, manifest)
    try:
        store.write(f"{manifest.ref.id}/{MANIFEST}", seal(manifest), create=True)
    except AlreadyExists:
        standing = read_manifest(store, manifest.ref)
        assert standing is not None
        return standing
    return manifest


def fetch(store: Store, ref: ArtifactRef, cache: Path) -> tuple[Path, Manifest]:
    """A local folder with the artifact's files, verified, and its manifest.

    A local store is read in place. Otherwise files go to `cache`, once for all processes of the node: the first to
    take the lock downloads, the others wait and use the same folder. That folder belongs to one store and one list of
    files, so an artifact that was built anew is fetched anew; it appears when all of it is verified, and each use looks
    at all sizes and at the checksums of small files. What fails that is fetched again.

    Raises:
        IntegrityError: not published, or what is stored is not what the manifest says.
        ConfigError: others may write to `cache`.
    """
    manifest = read_manifest(store, ref)
    if manifest is None:
        raise IntegrityError(f"{store.url}/{ref.id}: not published; run the stage that makes it first")
    in_place = store.local_path(manifest.place)
    if in_place is not None:
        verify(store, manifest)
        return in_place, manifest
    private_folder(cache)
    key = _cache_key(store, manifest)
    folder = cache / key
    with (cache / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _intact(folder, manifest.files):
            return folder, manifest
        shutil.rmtree(folder, ignore_errors=True)
        partial = cache / f"{key}.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for entry in manifest.files:
            local = partial / entry.path
            store.download(manifest.key(entry.path), local)
            if sha256_file(local) != entry.sha256:
                raise IntegrityError(
                    f"{store.url}/{manifest.key(entry.path)}: content differs from the manifest's sha256"
                )
        partial.rename(folder)
    return folder, manifest


def job_cache() -> Path:
    """Where the jobs of this user keep what they fetched, on the node's own disk."""
    return Path(tempfile.gettempdir()) / f"rlhf-cache-{os.getuid()}"


def private_folder(folder: Path) -> None:
    """Make a folder that only this user may enter; ConfigError if somebody else made it or may have written to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{folder}: others may have written to this cache of artifacts (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}); it must be a folder of user {os.getuid()} that no one else may write to: "
            "remove it"
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)


def _cache_key(store: Store, manifest: Manifest) -> str:
    """The name of an artifact's folder in a cache: of its fingerprint, its store and its files."""
    files = [entry.model_dump() for entry in manifest.files]
    place = f"{store.url}/{manifest.place}"
    return f"{manifest.ref.fingerprint[:12]}-{fingerprint({'place': place, 'files': files})[:32]}"


def _intact(folder: Path, files: Iterable[FileEntry]) -> bool:
    """Whether a fetched folder still has every file in its size, and the small ones with their content."""
    try:
        return folder.is_dir() and all(
            (local := folder / entry.path).stat().st_size == entry.size
            and (entry.size > CHEAP_BYTES or sha256_file(local) == entry.sha256)
            for entry in files
        )
    except OSError:
        return False
