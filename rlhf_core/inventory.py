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

from pydantic import BaseModel, ConfigDict

from rlhf_core import aliases
from rlhf_core.artifacts import MANIFEST, ArtifactRef, Manifest, manifest_at
from rlhf_core.checkpoints import marker_at
from rlhf_core.errors import IntegrityError
from rlhf_core.layout import ATTEMPT, artifacts_of, is_marker
from rlhf_core.parallel import in_threads
from rlhf_core.sealed import unseal
from rlhf_core.store import Store

RUNNING = timedelta(minutes=15)  # a heartbeat that is no older is a living job's, whatever the clocks


class Request(BaseModel):
    """What of an attempt's job.json is needed here; of any version."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    inputs: dict[str, ArtifactRef] = {}
    created: Any = None


@dataclass
class Found:
    """One artifact as it was found: paths within its folder, and what its records say."""

    id: str
    paths: Mapping[str, int]
    manifest: Manifest | None = None
    inputs: frozenset[str] = frozenset()
    running: bool = False
    touched: datetime | None = None  # when something last happened to it; None: not known
    unreadable: tuple[str, ...] = ()

    @property
    def published(self) -> bool:
        """Whether it has a manifest, readable or not."""
        return MANIFEST in self.paths

    @property
    def settled(self) -> bool:
        """Whether its records say the same as long as it has the same paths: they are never rewritten, but heartbeats are."""
        return self.manifest is not None and not self.running


@dataclass
class View:
    """A store as it was found.

    Attributes:
        artifacts: by id.
        aliases: keys of their records.
        targets: ids that aliases stand for.
        unreadable: records that cannot be read, and why.
    """

    artifacts: dict[str, Found] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)
    targets: set[str] = field(default_factory=set)
    unreadable_aliases: list[str] = field(default_factory=list)

    @property
    def unreadable(self) -> list[str]:
        """Aliases first."""
        return [*self.unreadable_aliases, *(why for one in self.artifacts.values() for why in one.unreadable)]


def look(store: Store, now: datetime | None = None, before: View | None = None) -> View:
    """The store as it is; StoreError if it cannot be reached. What is settled since the view `before` is not read again."""
    view = View()
    now = now or datetime.now(UTC)
    _look_at_aliases(store, view)
    known = {id: one for id, one in before.artifacts.items() if one.settled} if before else {}
    found = artifacts_of(store.list(""))

    def one_of(id: str) -> Found:
        same = id in known and known[id].paths == found[id]
        return known[id] if same else _look_at(store, id, found[id], now)

    view.artifacts = {one.id: one for one in in_threads(one_of, found)}
    return view


def look_again(store: Store, view: View, id: str, now: datetime | None = None) -> None:
    """Bring one artifact and the aliases in a view up to date."""
    if aliases.keys_of(store) != view.aliases:
        _look_at_aliases(store, view)
    paths = artifacts_of(store.list(id)).get(id)
    view.artifacts.pop(id, None)
    if paths:
        view.artifacts[id] = _look_at(store, id, paths, now or datetime.now(UTC))


def _look_at_aliases(store: Store, view: View) -> None:
    view.aliases, view.targets, view.unreadable_aliases = aliases.keys_of(store), set(), []
    for name in sorted({key.split("/")[1] for key in view.aliases}):
        try:
            view.targets.add(aliases.resolve_alias(store, f"@{name}").id)
        except IntegrityError as error:
            view.unreadable_aliases.append(str(error).splitlines()[0])


def _look_at(store: Store, id: str, paths: Mapping[str, int], now: datetime) -> Found:
    one, unreadable = Found(id, paths), list[str]()
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
                data = store.read(f"{id}/{path}")
                request = unseal(Request, data, f"{store.url}/{id}/{path}")
            except KeyError:
                continue
            except IntegrityError as error:
                unreadable.append(str(error).splitlines()[0])
                continue
            inputs |= {ref.id for ref in request.inputs.values()}
            times.append(as_time(request.created))
    one.inputs, one.unreadable = frozenset(inputs), tuple(unreadable)
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
