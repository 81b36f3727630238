"""Artifacts from one store to another, with what they were made of: `rlhf artifacts copy`.

Inputs go first and manifests last, create-only, so that at any moment what the destination has published is whole, and a copy
that was killed goes on: a file that is there with the right content is not sent again. Every file is hashed on its way and once
more where it arrived. An artifact that the destination has made itself, from the same definition, is another one and is left.
Not copied: logs, requests, checkpoints, aliases.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from rlhf_core.artifacts import MANIFEST, ArtifactRef, FileEntry, Manifest, read_manifest, sha256_file, verify
from rlhf_core.errors import AlreadyExists, ConfigError, IntegrityError
from rlhf_core.parallel import in_threads
from rlhf_core.store import Store

SENT_AT_ONCE = 4  # files; each is divided into parts that are sent at once themselves


@dataclass(frozen=True)
class Copied:
    """What became of one artifact: files sent and files that were there, and the bytes of those sent."""

    manifest: Manifest
    sent: int
    present: int
    bytes: int


def closure(store: Store, wanted: Iterable[Manifest], inputs: bool = True) -> list[Manifest]:
    """The artifacts and, with `inputs`, all they were made of; what was made of others comes after those.

    Raises:
        IntegrityError: an input is not published in this store.
    """
    found: dict[str, Manifest] = {}

    def add(manifest: Manifest) -> None:
        if manifest.ref.id in found:
            return
        for ref in manifest.inputs.values() if inputs else ():
            if ref.id not in found:
                add(_published(store, ref, manifest.ref))
        found[manifest.ref.id] = manifest

    for manifest in wanted:
        add(manifest)
    return list(found.values())


def _published(store: Store, ref: ArtifactRef, child: ArtifactRef) -> Manifest:
    manifest = read_manifest(store, ref)
    if manifest is None:
        raise IntegrityError(
            f"{child.id}: its input {ref.id} is not published in {store.url}; --no-inputs copies it alone"
        )
    return manifest


def copy(source: Store, target: Store, manifest: Manifest, advance: Callable[[int], None] = lambda _: None) -> Copied:
    """Copy one published artifact, and see that it arrived.

    Args:
        source: where it is.
        target: where it will be, under the same id.
        manifest: of the artifact.
        advance: told the bytes of each file that is done; from several threads.

    Raises:
        ConfigError: both are the same store.
        IntegrityError: what is stored is not what the manifest says, or the destination has another artifact of this id.
    """
    if source.url == target.url:
        raise ConfigError(f"--to {target.url}: that is the store itself; name another")
    _refuse_another(target, manifest)
    there = target.list(manifest.place)

    def bring(entry: FileEntry) -> bool:
        missing = not _right(target, manifest, entry, there)
        if missing:
            _send(source, target, manifest, entry)
        advance(entry.size)
        return missing

    sent = in_threads(bring, manifest.files, SENT_AT_ONCE)
    verify(target, manifest)
    key = f"{manifest.ref.id}/{MANIFEST}"
    try:
        target.write(key, source.read(key), create=True)
    except KeyError:
        raise IntegrityError(f"{source.url}/{key}: was removed while it was copied") from None
    except AlreadyExists:
        _refuse_another(target, manifest)
    bytes = sum(entry.size for entry, was in zip(manifest.files, sent, strict=True) if was)
    return Copied(manifest, sum(sent), len(sent) - sum(sent), bytes)


def _refuse_another(target: Store, manifest: Manifest) -> None:
    """IntegrityError if the destination has, or is making, an artifact of this id with other files."""
    id = manifest.ref.id
    standing = read_manifest(target, manifest.ref)
    if standing is not None and standing != manifest:
        raise IntegrityError(
            f"{target.url}/{id}: was published there on {standing.created} and is another ({len(standing.files)} files); "
            "it is left as it is: copy from there instead, or remove it there first"
        )
    attempt = manifest.folder.rpartition("/")[0]
    if standing is None and attempt and f"{id}/{attempt}/job.json" in target.list(f"{id}/{attempt}"):
        raise IntegrityError(
            f"{target.url}/{id}: a job of that store is making it ({attempt}); let it finish, or remove what it left with "
            f"`rlhf artifacts gc --unfinished-days 0 --store {target.url}`"
        )


def _right(target: Store, manifest: Manifest, entry: FileEntry, there: dict[str, int]) -> bool:
    """Whether a file is at the destination with the right content."""
    key = manifest.key(entry.path)
    return there.get(key) == entry.size and target.sha256(key) == entry.sha256


def _send(source: Store, target: Store, manifest: Manifest, entry: FileEntry) -> None:
    key = manifest.key(entry.path)
    with tempfile.TemporaryDirectory(prefix="rlhf-copy-") as folder:
        local = source.local_path(key)
        if local is None:
            local = Path(folder) / "file"
            _require_room(Path(folder), entry)
            try:
                source.download(key, local)
            except KeyError:
                raise IntegrityError(f"{source.url}/{key}: missing; the manifest lists it") from None
        if not local.is_file() or local.stat().st_size != entry.size or sha256_file(local) != entry.sha256:
            raise IntegrityError(f"{source.url}/{key}: content differs from the manifest's sha256; it is not copied")
        target.upload(local, key)


def _require_room(folder: Path, entry: FileEntry) -> None:
    free = shutil.disk_usage(folder).free
    if free < SENT_AT_ONCE * entry.size:
        raise ConfigError(
            f"{folder.parent}: {entry.path} has {entry.size:,} bytes and passes through this disk, {SENT_AT_ONCE} such files at "
            f"once; it has {free:,} free: free some or set TMPDIR to a larger disk"
        )
