"""All artifacts of a store, published or not, with what decides whether they are still needed: for `gc`.

One look at the whole store: what artifacts were made of, what aliases stand for, which of them a job is building, and when
something last happened to each. Times are those of the machines that wrote them. What cannot be read is told, not guessed.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from rlhf_core import aliases
from rlhf_core.artifacts import MANIFEST, Manifest, manifest_at
from rlhf_core.errors import IntegrityError
from rlhf_core.layout import ATTEMPT, artifacts_of, is_marker, marker_at
from rlhf_core.parallel import in_threads
from rlhf_core.sealed import parse
from rlhf_core.store import Store

RUNNING = timedelta(minutes=15)  # a heartbeat that is no older is a living job's, whatever the clocks


@dataclass
class Found:
    """One artifact as it was found: paths within its folder, and what its records say."""

    id: str
    paths: Mapping[str, int]
    manifest: Manifest | None = None
    inputs: frozenset[str] = frozenset()
    running: bool = False
    touched: datetime | None = None  # when something last happened to it; None: not known

    @property
    def published(self) -> bool:
        """Whether it has a manifest, readable or not."""
        return MANIFEST in self.paths


@dataclass
class View:
    """A store as it was found.

    Attributes:
        artifacts: by id.
        targets: ids that aliases stand for.
        unreadable: records that cannot be read, and why.
    """

    artifacts: dict[str, Found] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)
    unreadable: list[str] = field(default_factory=list)


def look(store: Store, now: datetime | None = None) -> View:
    """The store as it is; StoreError if it cannot be reached."""
    view = View()
    now = now or datetime.now(UTC)
    for name in {key.split("/")[1] for key in aliases.keys_of(store)}:
        try:
            view.targets.add(aliases.resolve_alias(store, f"@{name}").id)
        except IntegrityError as error:
            view.unreadable.append(str(error).splitlines()[0])
    found = artifacts_of(store.list(""))
    for one in in_threads(lambda id: _look_at(store, id, found[id], now, view.unreadable), found):
        view.artifacts[one.id] = one
    return view


def _look_at(store: Store, id: str, paths: Mapping[str, int], now: datetime, unreadable: list[str]) -> Found:
    one = Found(id, paths)
    try:
        if one.published:
            one.manifest = manifest_at(store, id)
    except IntegrityError as error:
        unreadable.append(str(error).splitlines()[0])
    inputs = {ref.id for ref in one.manifest.inputs.values()} if one.manifest else set[str]()
    times = [] if one.manifest is None else [as_time(one.manifest.created)]
    for path in paths:
        match = ATTEMPT.fullmatch(path)
        if match and match[2] == "heartbeat.json":
            beat = _plain(store, f"{id}/{path}")
            times.append(as_time(beat.get("time")))
            one.running = one.running or _runs(beat, now)
        elif is_marker(path) and not one.published:
            with suppress(KeyError, IntegrityError):
                times.append(as_time(marker_at(store, f"{id}/{path}").created))
        elif match and match[2] == "job.json" and not one.manifest:
            try:
                fields = parse(store.read(f"{id}/{path}"), f"{store.url}/{id}/{path}")
                inputs |= {_id_of(ref) for ref in fields.get("inputs", {}).values()}
                times.append(as_time(fields.get("created")))
            except KeyError:
                continue
            except IntegrityError as error:
                unreadable.append(str(error).splitlines()[0])
    one.inputs = frozenset(inputs)
    one.touched = max(filter(None, times), default=None)
    return one


def _plain(store: Store, key: str) -> dict[str, Any]:
    """A record without a seal; empty if it has gone or is none."""
    try:
        fields = json.loads(store.read(key))
    except (KeyError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _runs(beat: Mapping[str, Any], now: datetime) -> bool:
    """Whether a heartbeat is that of a living job; one that says no time counts as such."""
    time = as_time(beat.get("time"))
    return beat.get("ended") is None and (time is None or now - time < RUNNING)


def as_time(text: Any) -> datetime | None:
    """A time as records say it (ISO, UTC where nothing else is said); None if it is none."""
    try:
        time = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _id_of(ref: Mapping[str, str]) -> str:
    return f"{ref['stage']}/{ref['name']}-{ref['fingerprint'][:12]}"
