"""Checkpoints as the store holds them: `{artifact}/checkpoints/NNNN/`, one folder for each attempt, and what may be done to them.

A checkpoint is a marker, `{step}-{phase}-{update}[-kept].json`, and parts, `parts/{sha256}`, that it lists with size and
checksum. Parts are named by their content: what has not changed since the attempt's last checkpoint is not stored again. Below
`confirmed/` the other ranks say what they have stored, until rank 0 writes the marker: last, so a checkpoint exists when its marker
does. Attempts share no part, so that one which was believed dead can damage nothing of another's. Which is newest is told by the
names alone; a damaged one is passed over for the one before it. What fills them is `checkpointing`. No torch here.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Literal, get_args

from pydantic import Field

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.entries import Inside, Sha256
from rlhf_core.errors import IntegrityError
from rlhf_core.sealed import unseal
from rlhf_core.specs import Frozen
from rlhf_core.store import Store

SCHEMA = 1
Phase = Literal["train", "rollout", "score", "update"]
PHASES: tuple[Phase, ...] = get_args(Phase)
NAME = re.compile(rf"(\d{{8,}})-({'|'.join(PHASES)})-(\d{{6,}})(-kept)?\.json")


class Position(Frozen):
    """How far a stage has come.

    Attributes:
        step: finished optimizer steps, or rollouts with all their updates.
        phase: PPO: what comes next in the rollout that is under way; other stages: train.
        update: PPO, phase update: finished optimizer steps of this rollout. DPO, before its first step: rows that the
            reference has scored.
    """

    step: int = Field(ge=0)
    phase: Phase = "train"
    update: int = Field(default=0, ge=0)

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts positions of one stage by progress."""
        return self.step, PHASES.index(self.phase), self.update

    @property
    def mark(self) -> str:
        """Its name in keys, as `NAME` reads it."""
        return f"{self.step:08d}-{self.phase}-{self.update:06d}"

    def __str__(self) -> str:
        if self.phase == "train":
            return f"step {self.step}"
        inner = {"rollout": "", "score": ", to be scored", "update": f", update {self.update}"}[self.phase]
        return f"rollout {self.step}{inner}"


class Part(Frozen):
    """One object of a checkpoint."""

    name: Inside = Field(description="what it is, e.g. actor/rank-000.safetensors, files/metrics.jsonl")
    size: int = Field(ge=0, description="bytes")
    sha256: Sha256


class Checkpoint(Frozen):
    """The marker that makes a checkpoint exist."""

    schema_version: int = SCHEMA
    artifact: str = Field(description="id of the unfinished artifact")
    attempt: int = Field(ge=1)
    position: Position
    kept: bool = Field(default=False, description="a milestone, which later checkpoints do not replace")
    world: int = Field(ge=1, description="processes that wrote it")
    layout: dict[str, str] = Field(default={}, description="how each engine's state is divided among them")
    parts: tuple[Part, ...]
    versions: dict[str, str] = {}
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def key(self) -> str:
        """Where the marker lies."""
        kept = "-kept" if self.kept else ""
        return f"{folder_of(self.artifact, self.attempt)}/{self.position.mark}{kept}.json"

    def part_key(self, part: Part) -> str:
        """Where a part lies."""
        return f"{folder_of(self.artifact, self.attempt)}/parts/{part.sha256}"

    def __str__(self) -> str:
        return f"{self.position} (attempt {self.attempt})"


def folder_of(artifact: str, attempt: int) -> str:
    """The folder of an attempt's checkpoints."""
    return f"{artifact}/checkpoints/{attempt:04d}"


def marker_keys(store: Store, ref: ArtifactRef, since: int = 1) -> list[str]:
    """Keys of an artifact's markers, most progress first, of equals the later attempt's; of attempts from `since` on."""
    found = [(place, key) for key in store.list(f"{ref.id}/checkpoints") if (place := _place(key))]
    return [key for place, key in sorted(found, reverse=True) if place[1] >= since]


def _place(key: str) -> tuple[tuple[int, int, int], int] | None:
    """Progress and attempt that a marker's key tells; None for other objects."""
    *_, folder, attempt, name = ("", "", *key.split("/"))
    match = NAME.fullmatch(name)
    if not match or folder != "checkpoints" or not attempt.isdigit():
        return None
    return (int(match[1]), PHASES.index(match[2]), int(match[3])), int(attempt)  # pyright: ignore[reportArgumentType]


def order_of(key: str) -> tuple[int, int, int]:
    """Progress that a marker's key tells, as `Position.order`."""
    place = _place(key)
    assert place, f"{key} is no marker"
    return place[0]


def is_kept(key: str) -> bool:
    """Whether a marker's key is that of a milestone."""
    return key.endswith("-kept.json")


def earlier(artifact: str, attempt: int, keys: Iterable[str]) -> list[str]:
    """Those of some keys that are in the checkpoint folders of attempts before this one."""
    numbers = {key: key.removeprefix(f"{artifact}/checkpoints/").partition("/")[0] for key in keys}
    return [key for key, number in numbers.items() if number.isdigit() and int(number) < attempt]


def marker_at(store: Store, key: str) -> Checkpoint:
    """The checkpoint of a marker. KeyError: it is gone. IntegrityError: damaged, too new, or not where it belongs."""
    found = unseal(Checkpoint, store.read(key), f"{store.url}/{key}", SCHEMA)
    if found.key != key:
        raise IntegrityError(f"{store.url}/{key}: is the marker of {found.key}")
    return found


def read_marker(store: Store, ref: ArtifactRef, key: str) -> Checkpoint:
    """The checkpoint of one of an artifact's markers, as `marker_at`; also one that is gone is an IntegrityError."""
    assert key.startswith(f"{ref.id}/"), f"{key} is not of {ref.id}"
    try:
        return marker_at(store, key)
    except KeyError:
        raise IntegrityError(f"{store.url}/{key}: missing") from None


def check(store: Store, checkpoint: Checkpoint, checksums: bool = True) -> None:
    """Compare what is stored with the marker; IntegrityError names the first part that differs."""
    sizes = store.list(f"{folder_of(checkpoint.artifact, checkpoint.attempt)}/parts")
    for part in checkpoint.parts:
        key = checkpoint.part_key(part)
        if key not in sizes:
            raise IntegrityError(f"{store.url}/{key}: missing; {checkpoint} lists it as {part.name}")
        if sizes[key] != part.size:
            raise IntegrityError(f"{store.url}/{key}: {sizes[key]} bytes, {checkpoint} says {part.size}")
        if checksums and store.sha256(key) != part.sha256:
            raise IntegrityError(f"{store.url}/{key}: content differs from its name, the sha256 of {part.name}")


def whole(store: Store, ref: ArtifactRef, say: Callable[[str], None], since: int = 1) -> Iterator[Checkpoint]:
    """Checkpoints that have all their parts in their sizes, most progress first; `say` is told what is passed over."""
    for key in marker_keys(store, ref, since):
        try:
            found = read_marker(store, ref, key)
            check(store, found, checksums=False)
        except IntegrityError as error:
            say(f"checkpoint passed over for the one before it: {error}")
            continue
        yield found


def newest(
    store: Store, ref: ArtifactRef, say: Callable[[str], None] = lambda _: None, since: int = 1
) -> Checkpoint | None:
    """The checkpoint that a job would resume from, if nothing in its parts is damaged; of attempts from `since` on."""
    return next(whole(store, ref, say, since), None)


def delete(store: Store, ref: ArtifactRef, keys: Iterable[str]) -> int:
    """Remove checkpoints by the keys of their markers: markers first, then parts no other marker of the attempt needs.

    Parts that no marker lists are left alone: they may be of a checkpoint that is just being written.

    Returns:
        Bytes of the parts removed.
    """
    parts: dict[str, dict[str, int]] = {}
    for key in set(keys):
        listed = parts.setdefault(key.rpartition("/")[0], {})
        with suppress(IntegrityError):
            found = read_marker(store, ref, key)
            listed.update({found.part_key(part): part.size for part in found.parts})
        store.delete(key)
    return sum(_remove(store, listed, _needed(store, ref, store.list(folder))) for folder, listed in parts.items())


def sweep(store: Store, ref: ArtifactRef, attempt: int) -> int:
    """Remove from the folders of attempts before `attempt` what no marker left there lists: parts and confirmations.

    A folder with a marker that cannot be read is left alone. Only who holds the lease of `attempt` may, once it needs nothing
    of theirs but what markers list; should one of them live on, a checkpoint that it completes after this is not whole.

    Returns:
        Bytes removed.
    """
    folders: dict[str, dict[str, int]] = {}
    stored = store.list(f"{ref.id}/checkpoints")
    for key in earlier(ref.id, attempt, stored):
        folders.setdefault("/".join(key.split("/")[:4]), {})[key] = stored[key]
    freed = 0
    for folder, objects in folders.items():
        kinds = (f"{folder}/parts/", f"{folder}/confirmed/")
        lost = {key: size for key, size in objects.items() if key.startswith(kinds)}
        freed += _remove(store, lost, _needed(store, ref, objects)) if lost else 0
    return freed


def clear(store: Store, ref: ArtifactRef, before: int | None = None) -> int:
    """Remove what an artifact that is published needs no more: all but milestones and their parts.

    Args:
        store: where it is.
        ref: its id.
        before: only of attempts before this one; None: of all, for who holds the lease.

    Returns:
        Bytes removed, without those of markers.
    """
    before = sys.maxsize if before is None else before
    markers = earlier(ref.id, before, marker_keys(store, ref))
    freed = delete(store, ref, [key for key in markers if not is_kept(key)])
    return freed + sweep(store, ref, before)


def _needed(store: Store, ref: ArtifactRef, keys: Iterable[str]) -> set[str] | None:
    """Keys of all parts that the markers among some keys list; None if one of them cannot be read."""
    try:
        markers = [read_marker(store, ref, key) for key in keys if _place(key)]
    except IntegrityError:
        return None
    return {marker.part_key(part) for marker in markers for part in marker.parts}


def _remove(store: Store, objects: dict[str, int], needed: set[str] | None) -> int:
    """Remove the objects that are not needed, none if that is not known; returns their bytes."""
    freed = 0
    for key in sorted(objects.keys() - needed) if needed is not None else ():
        store.delete(key)
        freed += objects[key]
    return freed
