"""What in a store nobody needs any more, and its removal: `rlhf artifacts gc`.

Kept are the roots and all they were made of: what aliases stand for, published artifacts within the policy, artifacts that a job
builds, and unfinished ones that are young. All else of our layout may go; what is not of our layout is never touched. A record
goes before what it lists, and what was made before what it was made of, so a kill at any moment leaves no record that lists what
is not there; what it leaves of an artifact is an unfinished one, and goes as such. Before each `BATCH` of removals the whole store
is looked at anew, and right before each single one its artifact and all aliases; what was promoted, published or begun until then
is spared. A job or a copy that takes an artifact into use for something new after the batch began (seconds), or an alias after
the last look (milliseconds), finds it not published, and says so. Where a record cannot be read, what it needs is not known, and
no artifact is removed until that is put right.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Literal

from rlhf_core.aliases import FOLDER as ALIASES
from rlhf_core.artifacts import MANIFEST
from rlhf_core.checkpoints import is_kept, marker_at
from rlhf_core.errors import IntegrityError
from rlhf_core.inventory import Found, View, as_time, look, look_again
from rlhf_core.layout import ATTEMPT, CHECKPOINTS, artifacts_of, is_marker
from rlhf_core.parallel import in_threads
from rlhf_core.specs import STAGES
from rlhf_core.store import Store

Kind = Literal["artifact", "unfinished", "checkpoints", "files", "parts", "writes"]
# Before that, parts without a marker may be of a checkpoint that is being written, and a write may be under way.
IDLE = timedelta(days=1)
BATCH = 50


@dataclass(frozen=True)
class Policy:
    """Which artifacts may go.

    Attributes:
        keep_last: published artifacts kept for each stage and name; None: all.
        older_than: published artifacts at least so old may go; None: of any age. With both, both must hold.
        unfinished: an unfinished artifact goes when nothing has happened to it for so long; zero: also one of unknown age.
    """

    keep_last: int | None = None
    older_than: timedelta | None = None
    unfinished: timedelta = timedelta(days=7)


@dataclass(frozen=True)
class Removal:
    """Something that may go.

    Attributes:
        artifact: whose it is, by id; or "aliases".
        kind: artifact (published) and unfinished: all of it; else which part of an artifact that stays, or (writes) what
            cut-off writes have left there.
        steps: keys, in the order in which they have to go; those of one step in any order. For writes their names.
        bytes: of all of them.
    """

    artifact: str
    kind: Kind
    why: str
    steps: tuple[tuple[str, ...], ...]
    bytes: int


def plan(view: View, policy: Policy, now: datetime | None = None) -> list[Removal]:
    """What may go, in the order in which it has to."""
    now = now or datetime.now(UTC)
    kept = _reachable(view, _roots(view, policy, now))
    removals = [removal for one in view.artifacts.values() for removal in _removals(view, one, kept, policy)]
    order: tuple[str, ...] = STAGES
    kinds = ("parts", "files", "checkpoints", "unfinished", "artifact")
    return sorted(removals, key=lambda r: (kinds.index(r.kind), -order.index(r.artifact.partition("/")[0]), r.artifact))


def orphans(store: Store, view: View, policy: Policy, now: datetime | None = None) -> list[Removal]:
    """Parts in artifacts that stay, which no marker lists, where nothing has happened for a day; and confirmations of such."""
    now = now or datetime.now(UTC)
    kept = _reachable(view, _roots(view, policy, now))
    idle = [one for one in view.artifacts.values() if _is_idle(one, kept, now)]
    return [removal for one in idle if (removal := _orphans(store, one))]


def unfinished_writes(store: Store, view: View, older_than: timedelta = IDLE) -> list[Removal]:
    """What writes that were cut off have left of artifacts and aliases, which no listing shows; not where a job runs."""
    left = store.unfinished(older_than)
    found = artifacts_of(left)
    if names := {n.removeprefix(f"{ALIASES}/"): size for n, size in left.items() if n.startswith(f"{ALIASES}/")}:
        found[ALIASES] = names
    return [
        _removal(Found(id, names), "writes", "of writes that were cut off", [sorted(names)])
        for id, names in sorted(found.items())
        if id not in view.artifacts or not view.artifacts[id].running
    ]


def collect(
    store: Store,
    policy: Policy,
    removals: Iterable[Removal],
    on_removed: Callable[[Removal], None] = lambda _: None,
    on_spared: Callable[[Removal], None] = lambda _: None,
) -> int:
    """Remove what was planned and may still go; returns the bytes removed.

    Args:
        store: where.
        policy: that of the plan.
        removals: the plan.
        on_removed: called after each.
        on_spared: called for what may no longer go.

    Raises:
        StoreError: something could not be removed; what was not yet removed is whole.
    """
    freed, view = 0, None
    for number, planned in enumerate(removals):
        if view is None or number % BATCH == 0:
            view = look(store, before=view)
        else:
            look_again(store, view, planned.artifact)
        fresh = _still(store, view, policy, planned)
        if fresh is None:
            on_spared(planned)
            continue
        for step in fresh.steps:
            in_threads(store.abort if fresh.kind == "writes" else store.delete, step)
        freed += fresh.bytes
        on_removed(fresh)
    return freed


def _still(store: Store, view: View, policy: Policy, planned: Removal) -> Removal | None:
    """What of a planned removal may go now."""
    one = view.artifacts.get(planned.artifact)
    if planned.kind == "writes":
        return None if one and one.running else planned
    if one is None:
        return None
    now = datetime.now(UTC)
    kept = _reachable(view, _roots(view, policy, now))
    if planned.kind == "parts":
        return _orphans(store, one) if _is_idle(one, kept, now) else None
    return next((r for r in _removals(view, one, kept, policy) if r.kind == planned.kind), None)


# --- what stays ------------------------------------------------------------------------------------------------------


def _roots(view: View, policy: Policy, now: datetime) -> set[str]:
    found = view.artifacts.values()
    roots = {one.id for one in found if one.running} | view.targets
    roots |= {one.id for one in found if not one.published and _young(one, policy, now)}
    published = [one.manifest for one in found if one.manifest]
    if policy.keep_last is None and policy.older_than is None:
        return roots | {manifest.ref.id for manifest in published}
    published.sort(key=lambda m: (m.ref.stage, m.ref.name, m.created), reverse=True)
    for _, group in groupby(published, key=lambda m: (m.ref.stage, m.ref.name)):
        for number, manifest in enumerate(group):
            made = as_time(manifest.created)
            last = policy.keep_last is not None and number < policy.keep_last
            young = policy.older_than is not None and (made is None or now - made < policy.older_than)
            if last or young:
                roots.add(manifest.ref.id)
    return roots


def _young(one: Found, policy: Policy, now: datetime) -> bool:
    """Whether an unfinished artifact may still be wanted; one of unknown age is, unless every age may go."""
    return bool(policy.unfinished) if one.touched is None else now - one.touched < policy.unfinished


def _reachable(view: View, roots: Collection[str]) -> set[str]:
    """The roots and all that they were made of, or are being made of."""
    reached: set[str] = set()
    ahead = list(roots)
    while ahead:
        id = ahead.pop()
        if id not in reached:
            reached.add(id)
            ahead += view.artifacts[id].inputs if id in view.artifacts else ()
    return reached


# --- what goes -------------------------------------------------------------------------------------------------------


def _removals(view: View, one: Found, kept: Collection[str], policy: Policy) -> list[Removal]:
    """What of one artifact may go, by the records of the whole store."""
    if one.running or (one.published and one.manifest is None):
        return []
    if one.id in kept:
        return _leftovers(one) if one.published else []
    if view.unreadable:
        return []
    return [_removal(one, "artifact" if one.published else "unfinished", _why(one, policy), _all_of(one))]


def _is_idle(one: Found, kept: Collection[str], now: datetime) -> bool:
    """Whether it is an artifact that stays, and nothing has happened to it for a day."""
    if one.id not in kept or one.running:
        return False
    return one.touched is not None and now - one.touched > IDLE


def _why(one: Found, policy: Policy) -> str:
    if not one.published:
        return f"unfinished, last touched {one.touched.date()}" if one.touched else "unfinished, of unknown age"
    days = policy.older_than.total_seconds() / 86400 if policy.older_than else 0
    rules = [f"not among the last {policy.keep_last}"] if policy.keep_last is not None else []
    rules += [f"older than {days:g} days"] if policy.older_than else []
    return f"{', '.join(rules)}; nothing that is kept was made of it"


def _all_of(one: Found) -> list[list[str]]:
    """Everything in an artifact's folder: records first, then what they list.

    A new attempt takes the number after the greatest there is. So the attempts go from the last to the first, each with
    job.json as its last, and no key that is still to go can be that of an attempt which begins meanwhile.
    """
    records = {path: match for path in one.paths if (match := ATTEMPT.fullmatch(path))}
    last = {p: int(m[1]) for p, m in records.items() if m[2] in ("job.json", "heartbeat.json")}
    results = [p for p, m in records.items() if m[2] == "result.json"]
    markers = [p for p in one.paths if is_marker(p)]
    rest = [p for p in one.paths if p not in {MANIFEST, *last, *results, *markers}]
    ending = [[p] for p in sorted(last, key=lambda p: (-last[p], p.endswith("/job.json")))]
    return [[MANIFEST] if one.published else [], results, markers, rest, *ending]


def _leftovers(one: Found) -> list[Removal]:
    """What a published artifact that stays does not consist of. Logs, metrics and requests of all attempts stay."""
    assert one.manifest
    chosen = {one.manifest.key(entry.path).removeprefix(f"{one.id}/") for entry in one.manifest.files}
    own = one.manifest.folder.rpartition("/")[0]
    results, files = [], []
    for path in one.paths:
        match = ATTEMPT.fullmatch(path)
        if path.startswith("superseded/manifest-") or (match and match[2].startswith("files/") and path not in chosen):
            files.append(path)
        elif match and match[2] == "result.json" and path != f"{own}/result.json":
            results.append(path)
    milestones = {p.split("/")[1] for p in one.paths if is_marker(p) and is_kept(p)}  # of which attempts
    markers = [p for p in one.paths if is_marker(p) and not is_kept(p)]
    others = [p for p in one.paths if (m := CHECKPOINTS.fullmatch(p)) and not is_marker(p) and m[1] not in milestones]
    found = [
        _removal(one, "files", "of attempts that the manifest does not choose", [results, files]),
        _removal(one, "checkpoints", "the artifact is published, and these are no milestones", [markers, others]),
    ]
    return [removal for removal in found if removal.steps]


def _orphans(store: Store, one: Found) -> Removal | None:
    """Parts of the attempts whose markers can all be read, and none of them lists it.

    Of a published artifact these are the attempts with milestones; all others' parts are leftovers, listed or not.
    """
    listed: set[str] = set()
    unclear: set[str] = set()
    milestones: set[str] = set()
    for path in filter(is_marker, one.paths):
        attempt = path.split("/")[1]
        milestones |= {attempt} if is_kept(path) else set()
        try:
            marker = marker_at(store, f"{one.id}/{path}")
            listed |= {marker.part_key(part).removeprefix(f"{one.id}/") for part in marker.parts}
        except (KeyError, IntegrityError):
            unclear.add(attempt)
    lost = [
        path
        for path in one.paths
        if (match := CHECKPOINTS.fullmatch(path)) and match[2].startswith(("parts/", "confirmed/"))
        if path not in listed and match[1] not in unclear and (match[1] in milestones or not one.published)
    ]
    return _removal(one, "parts", "no checkpoint lists them", [lost]) if lost else None


def _removal(one: Found, kind: Kind, why: str, steps: list[list[str]]) -> Removal:
    keys = tuple(tuple(f"{one.id}/{path}" for path in step) for step in steps if step)
    return Removal(one.id, kind, why, keys, sum(one.paths[path] for step in steps for path in step))
