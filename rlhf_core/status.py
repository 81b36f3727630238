"""What runs and what there is, from the store alone: each artifact's state, how far it is, and the last sign of life of its job.

Made to be looked at again and again at little cost, since requests to S3 are paid for: records that are never rewritten are read
once, the store is listed at most every `LIST_SECONDS` (a local folder each time), and between two listings a look costs one read
for each job that runs. What is concluded from the records stands in `sight`. Not here: runs of Prefect, which the store does not
know, and how all this is shown.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from rlhf_core.artifacts import MANIFEST, ArtifactRef, Manifest, parse_manifest
from rlhf_core.ends import Failure
from rlhf_core.errors import IntegrityError
from rlhf_core.inventory import Request, as_time
from rlhf_core.layout import ATTEMPT, artifacts_of
from rlhf_core.lease import Heartbeat
from rlhf_core.members import Orders
from rlhf_core.parallel import in_threads
from rlhf_core.sealed import unseal
from rlhf_core.sight import Pulse, Sight, best_checkpoint, judge
from rlhf_core.store import Store

LIST_SECONDS = 30.0  # between two listings of a store elsewhere, while it is watched
TAIL_BYTES = 1 << 14  # of a job's metrics.jsonl: the last numbers, and enough before them to tell the speed
LONG_AGO = datetime.min.replace(tzinfo=UTC)


class Status:
    """A store that is looked at again and again.

    Attributes:
        lists, reads: requests so far; a listing of many thousand objects is several on S3.
    """

    def __init__(self, store: Store, scope: Mapping[ArtifactRef, Sequence[ArtifactRef]] | None = None) -> None:
        """Nothing is read yet.

        Args:
            store: to look at.
            scope: only these artifacts, in this order, each with its inputs; None: all there are, as they were touched,
                and what runs last.
        """
        self.store = store
        self.lists = self.reads = 0
        self._scope = scope
        self._listed: float | None = None
        self._paths: dict[str, dict[str, int]] = {}
        self._sights: dict[str, Sight] = {}
        self._records: dict[tuple[str, int], bytes] = {}  # by key and size
        self._pulses: dict[str, Pulse] = {}
        self._asked: set[str] = set()  # heartbeats that were read in this look
        self._tails: dict[str, tuple[int, list[dict[str, Any]]]] = {}  # with the size of the whole
        self._hosts: dict[str, tuple[str, ...]] = {}
        self._lock = threading.Lock()  # of the count

    def look(self) -> list[Sight]:
        """The artifacts as they are now. StoreError: the store could not be reached."""
        self._asked.clear()
        alive = [id for id, sight in self._sights.items() if sight.state in ("running", "stale lease")]
        if self._is_fresh() and not any(in_threads(self._has_ended, alive)):
            self._sights |= dict(in_threads(lambda id: (id, self._see(id)), alive))
        else:
            self._list()
            self._sights = dict(in_threads(lambda id: (id, self._see(id)), self._paths))
        if self._scope is not None:
            for ref, inputs in self._scope.items():
                self._wait_for(ref, inputs)
            return [self._sights[ref.id] for ref in self._scope]
        return sorted(self._sights.values(), key=lambda s: (s.state == "running", s.touched or LONG_AGO, s.id))

    def _wait_for(self, ref: ArtifactRef, inputs: Sequence[ArtifactRef]) -> None:
        """Of an artifact that nobody has begun: say what it waits for, if that is being made."""
        made = [one.stage for one in inputs if self._sights[one.id].state in ("running", "waiting")]
        sight = self._sights[ref.id]
        if sight.state in ("not begun", "waiting"):
            state, note = ("waiting", f"for {', '.join(made)}") if made else ("not begun", "")
            self._sights[ref.id] = replace(sight, state=state, note=note)

    # --- what is asked of the store ---

    def _is_fresh(self) -> bool:
        if self._listed is None or self.store.scheme == "file":
            return False
        return time.monotonic() - self._listed < LIST_SECONDS

    def _has_ended(self, id: str) -> bool:
        pulse = self._pulse(id, self._sights[id].attempt or 0)
        return pulse is not None and pulse.over

    def _list(self) -> None:
        if self._scope is None:
            self.lists += 1
            self._paths = artifacts_of(self.store.list(""))
        else:
            self.lists += len(self._scope)
            listed = in_threads(lambda ref: self.store.list(ref.id), self._scope)
            self._paths = {
                ref.id: artifacts_of(keys).get(ref.id, {}) for ref, keys in zip(self._scope, listed, strict=True)
            }
        self._listed = time.monotonic()

    def _read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._lock:
            self.reads += 1
        return self.store.read(key, start, stop)

    def _record(self, id: str, path: str) -> bytes:
        """An object that is never rewritten: read once. KeyError: it has gone."""
        key = (f"{id}/{path}", self._paths[id].get(path, 0))
        if key not in self._records:
            self._records[key] = self._read(key[0])
        return self._records[key]

    def _pulse(self, id: str, attempt: int) -> Pulse | None:
        """The newest heartbeat of an attempt, read at most once in a look and not after its last; None: there is none."""
        key = f"{id}/attempts/{attempt:04d}/heartbeat.json"
        known = self._pulses.get(key)
        if key in self._asked or (known and known.over):
            return known
        self._asked.add(key)
        with suppress(KeyError):
            data = self._read(key)
            if known is None or known.data != data:
                self._pulses[key] = Pulse(data, time.monotonic(), changed=known is not None)
        return self._pulses.get(key)

    def _tail(self, id: str, attempt: int) -> list[dict[str, Any]]:
        """The last progress events that the attempt's log has brought to the store, oldest first; read when it has grown."""
        path = f"attempts/{attempt:04d}/metrics.jsonl"
        size = self._paths[id].get(path, 0)
        known, events = self._tails.get(f"{id}/{path}", (0, []))
        if size != known:
            with suppress(KeyError):
                lines = self._read(f"{id}/{path}", max(0, size - TAIL_BYTES), size).splitlines()
                events = [event for line in lines if (event := _event(line))]
            self._tails[f"{id}/{path}"] = size, events
        return events

    # --- what is made of it ---

    def _see(self, id: str) -> Sight:
        paths = self._paths[id]
        attempt = max(
            (int(m[1]) for path in paths if (m := ATTEMPT.fullmatch(path)) and m[2] == "job.json"), default=None
        )
        manifest, damage = None, ""
        if MANIFEST in paths:
            try:
                manifest = parse_manifest(self._record(id, MANIFEST), f"{self.store.url}/{id}/{MANIFEST}")
            except (KeyError, IntegrityError) as error:
                damage = str(error).splitlines()[0]
        if attempt is not None and (manifest is None or attempt > manifest.attempt) and not damage:
            sight = self._see_attempt(id, attempt, paths)
            if manifest is None or sight.state == "running":  # somebody builds a published one anew
                return sight
        if damage:
            return Sight(id, "damaged", damage, attempt)
        return self._see_published(id, manifest) if manifest else Sight(id, "not begun")

    def _see_published(self, id: str, manifest: Manifest) -> Sight:
        host = manifest.provenance.get("host")
        return Sight(
            id,
            "published",
            attempt=manifest.attempt,
            hosts=self._hosts_of(id, manifest.attempt, (host,) if isinstance(host, str) else ()),
            event={"metrics": manifest.metrics},
            checkpoint=best_checkpoint(self._paths[id]),
            touched=as_time(manifest.created),
        )

    def _see_attempt(self, id: str, attempt: int, paths: Mapping[str, int]) -> Sight:
        folder = f"attempts/{attempt:04d}"
        pulse, failure, now = self._pulse(id, attempt), None, datetime.now(UTC)
        if f"{folder}/failure.json" in paths:
            with suppress(KeyError, IntegrityError):
                failure = unseal(Failure, self._record(id, f"{folder}/failure.json"), id)
        beat, touched = pulse.beat if pulse else None, None
        if pulse:
            age = pulse.age(time.monotonic(), now)
            touched = as_time(beat.time) if beat else None
        else:  # it has just begun, or its holder has gone before it could say a word
            with suppress(KeyError, IntegrityError):
                touched = as_time(unseal(Request, self._record(id, f"{folder}/job.json"), id).created)
            age = (now - touched).total_seconds() if touched else 0.0
        checkpoint = best_checkpoint(paths)
        state, note = judge(pulse, failure, checkpoint, age)
        tail = self._tail(id, attempt)
        event = _latest(beat, tail)
        return Sight(
            id,
            state,
            note,
            attempt,
            self._hosts_of(id, attempt, (beat.host,) if beat else ()),
            event,
            _eta(event, tail) if state == "running" else None,
            max(0.0, age) if state in ("running", "stale lease") else None,
            checkpoint,
            touched,
        )

    def _hosts_of(self, id: str, attempt: int, default: tuple[str, ...]) -> tuple[str, ...]:
        """The nodes of a job on several, by its head's orders, else the host that started it."""
        path = f"attempts/{attempt:04d}/orders.json"
        key = f"{id}/{path}"
        if key not in self._hosts and path in self._paths[id]:
            with suppress(KeyError, ValidationError):
                if seats := Orders.model_validate_json(self._read(key)).seats:
                    self._hosts[key] = tuple(seat.host for seat in seats)
        return self._hosts.get(key, default)


def _event(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that is cut."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("time"), int | float) else None


def _latest(beat: Heartbeat | None, tail: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last event that the heartbeat or the log tells, with its time; its numbers and unit are those that the log has."""
    said = as_time(beat.time) if beat else None
    told = {}
    if beat and beat.step is not None and said:
        told = {"time": said.timestamp(), "step": beat.step, "total": beat.total, "phase": beat.phase}
    if tail and (not told or tail[-1]["time"] > told["time"]):
        told = dict(tail[-1])
    if not told:
        return {}
    unit = next(
        (event["unit"] for event in reversed(tail) if event.get("phase") == told.get("phase") and "unit" in event),
        "step",
    )
    numbers = next((event["metrics"] for event in reversed(tail) if event.get("metrics")), {})
    return {**told, "unit": unit, "metrics": numbers}


def _eta(event: Mapping[str, Any], tail: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds until the event's phase ends, by the speed since the first event of it that is known."""
    first = next((e for e in tail if e.get("phase") == event.get("phase") and isinstance(e.get("step"), int)), None)
    step, total = event.get("step"), event.get("total")
    if first is None or not isinstance(step, int) or not isinstance(total, int) or step <= first["step"]:
        return None
    speed = (step - first["step"]) / max(event["time"] - first["time"], 0.5)
    return max(0.0, (total - step) / speed)
