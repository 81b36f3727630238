"""Read again and hash again all that a store holds, and say what is damaged: `rlhf artifacts verify`.

Looked at are the files of published artifacts, the parts of the checkpoints of unfinished ones, and every sealed record:
manifests, markers, requests and results of jobs, aliases. Nothing stops at the first damage. What a job or another command
removes meanwhile is no damage, so what looks damaged is looked at twice. Not told: an object that no record lists any more, as
when a marker was removed: what it stood for does not exist then, for anybody.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core import aliases
from rlhf_core.artifacts import MANIFEST, Manifest, manifest_at, parse_manifest
from rlhf_core.checkpoints import Checkpoint, marker_at
from rlhf_core.errors import IntegrityError
from rlhf_core.layout import ATTEMPT, artifacts_of, is_marker
from rlhf_core.parallel import in_threads
from rlhf_core.sealed import parse
from rlhf_core.store import Store


@dataclass(frozen=True)
class Listed:
    """An object that a record lists.

    Attributes:
        name: of a file in the artifact, or of a part in its checkpoint.
        record: key of the record: it has to exist still for a damage to be one.
    """

    artifact: str
    name: str
    key: str
    size: int
    sha256: str
    record: str


@dataclass(frozen=True)
class Damage:
    """One object that is not what it should be: whose it is, which, and what is wrong."""

    artifact: str
    file: str
    what: str


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what is wrong with it.

    Attributes:
        records: sealed records read.
        files: objects hashed.
        bytes: of those.
    """

    artifacts: int
    records: int
    files: int
    bytes: int
    damages: tuple[Damage, ...]


def verify_store(
    store: Store,
    ids: Collection[str] | None = None,
    begin: Callable[[int], None] = lambda _: None,
    advance: Callable[[int], None] = lambda _: None,
) -> Verified:
    """Look at everything, or at some artifacts.

    Args:
        store: where.
        ids: of artifacts; None: all of them, and the aliases.
        begin: told how many bytes will be hashed.
        advance: told how many more have been; from several threads.

    Raises:
        StoreError: the store could not be reached; then nothing can be said.
    """
    sizes = store.list("")
    found = {id: paths for id, paths in artifacts_of(sizes).items() if ids is None or id in ids}
    records = [f"{id}/{path}" for id, paths in found.items() for path in paths if _is_record(path, paths)]
    if ids is None:
        records += aliases.keys_of(store)
    read = in_threads(lambda key: _read(store, key), records)
    damages = [damage for damage in read if isinstance(damage, Damage)]
    listed = [item for some in read if not isinstance(some, Damage) for item in some]
    objects = list({(item.key, item.sha256): item for item in listed}.values())
    begin(sum(item.size for item in objects))
    checked = in_threads(lambda item: _check(store, item, sizes, advance), objects)
    damages += [damage for damage in checked if damage]
    return Verified(len(found), len(records), len(objects), sum(i.size for i in objects), tuple(damages))


def _is_record(path: str, paths: Mapping[str, int]) -> bool:
    """Whether a path is that of a record to be read; the checkpoints of a published artifact are nobody's any more."""
    if is_marker(path):
        return MANIFEST not in paths
    match = ATTEMPT.fullmatch(path)
    of_job = match is not None and match[2] in ("job.json", "result.json")
    return path == MANIFEST or path.startswith("superseded/manifest-") or of_job


def _read(store: Store, key: str) -> Damage | list[Listed]:
    """What a record lists, or what is wrong with it; nothing for one that has gone meanwhile."""
    stage, name, *rest = key.split("/")
    id, path = f"{stage}/{name}", "/".join(rest)
    try:
        if stage == aliases.FOLDER:
            _check_alias(store, key)
        elif path == MANIFEST:
            manifest = manifest_at(store, id)
            return _files(manifest, key) if manifest else []
        elif is_marker(path):
            return _parts(marker_at(store, key), key)
        elif path.startswith("superseded/"):
            parse_manifest(store.read(key), key)
        else:
            _check_attempt(parse(store.read(key), key), id, path)
    except KeyError:
        return []
    except IntegrityError as error:
        short = str(error).removeprefix(f"{store.url}/").removeprefix(f"{key}: ").splitlines()[0]
        return Damage(id, path, short)
    return []


def _check_alias(store: Store, key: str) -> None:
    """IntegrityError if a record is damaged, its predecessor is missing, or the newest stands for nothing."""
    alias = aliases.read_alias(store, key)
    keys = aliases.keys_of(store, alias.name)
    if key == keys[-1] and f"{alias.ref.id}/{MANIFEST}" not in store.list(alias.ref.id):
        raise IntegrityError(f"stands for {alias.ref.id}, which is not published")
    before = alias.model_copy(update={"number": alias.number - 1})
    if before.number and before.key not in keys:
        raise IntegrityError(f"the record before it, {before.key}, is missing")


def _check_attempt(fields: Mapping[str, Any], id: str, path: str) -> None:
    """IntegrityError if the request or result of a job lies in another attempt's folder than its own."""
    folder = path.rpartition("/")[0]
    if path.endswith("/result.json"):
        own = [
            f"{fields.get('folder', folder)}/".startswith(f"{folder}/"),
            str(fields.get("job_id")).startswith(f"{id}@"),
        ]
    else:
        output = fields.get("output") or {}
        made = f"{output.get('stage')}/{output.get('name')}-{str(output.get('fingerprint'))[:12]}"
        own = [made == id, folder == f"attempts/{str(fields.get('attempt')).zfill(4)}"]
    if not all(own):
        raise IntegrityError("is the record of another attempt")


def _files(manifest: Manifest, record: str) -> list[Listed]:
    of = manifest.ref.id
    return [Listed(of, f.path, manifest.key(f.path), f.size, f.sha256, record) for f in manifest.files]


def _parts(checkpoint: Checkpoint, record: str) -> list[Listed]:
    of = checkpoint.artifact
    name = f"{checkpoint}: "
    return [Listed(of, name + p.name, checkpoint.part_key(p), p.size, p.sha256, record) for p in checkpoint.parts]


def _check(store: Store, item: Listed, sizes: Mapping[str, int], advance: Callable[[int], None]) -> Damage | None:
    """What is wrong with a listed object, if anything is and its record still lists it."""
    try:
        what = _wrong(store, item, sizes)
        if what and _gone(store, item):
            return None
        return Damage(item.artifact, item.name, what) if what else None
    finally:
        advance(item.size)


def _wrong(store: Store, item: Listed, sizes: Mapping[str, int]) -> str:
    if item.key not in sizes:
        return "missing"
    if sizes[item.key] < item.size:
        return f"truncated: {sizes[item.key]:,} of {item.size:,} bytes"
    if sizes[item.key] > item.size:
        return f"{sizes[item.key]:,} bytes instead of {item.size:,}"
    try:
        return "" if store.sha256(item.key) == item.sha256 else "content changed: its sha256 is another"
    except KeyError:
        return "missing"


def _gone(store: Store, item: Listed) -> bool:
    """Whether the record that listed an object has been removed meanwhile."""
    return item.record not in store.list(item.record.rpartition("/")[0])
