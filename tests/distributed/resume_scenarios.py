"""Stages that are stopped and taken up again, on every rank of a small process group; started by `ranks.run`.

A stop is an exception at a point where the stage could be saved; the next attempt builds its engines anew and has nothing but
the store to go on from. Sudden deaths of real processes are the business of the fault tests.
"""

import json
import os
import random
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from scenarios import INPUTS, main

from rlhf_core import checkpoints, local_parts
from rlhf_core.artifacts import ArtifactRef, describe, make_ref
from rlhf_core.checkpointing import Checkpointer
from rlhf_core.checkpoints import Position
from rlhf_core.context import JobContext
from rlhf_core.distributed import gather
from rlhf_core.errors import Preempted
from rlhf_core.saving import Save
from rlhf_core.store import Store

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TIMES = ("seconds", "seconds_rollout", "seconds_update")


class Stopped(BaseException):
    """The stage ends here, as if its processes had gone."""


def build(root: str, job: dict[str, Any], label: str, attempt: int) -> tuple[Any, Path]:
    """A job context of one attempt."""
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((Path(root) / "refs.json").read_text()).items()}
    inputs = {k: refs[k] for k in INPUTS[job["name"]]}
    out = Path(os.environ["RANKS_OUT"]) / f"out-{RANK}" / f"{label}-{attempt}" / "files"
    context = tiny.context(
        Store(f"file://{root}/store"), job["name"], job["spec"], inputs, out, RANK, WORLD, **job["resources"]
    )
    output = make_ref(job["name"], label, {"world": job.get("world", WORLD)}, inputs)
    context.job = context.job.model_copy(update={"output": output, "attempt": attempt})
    return context, out


def attempt(root: str, job: dict[str, Any], label: str, number: int, stop: list[Any] | None, always: bool) -> Path:
    """Run one attempt, to its end or to the position `stop`; returns its output folder."""
    from rlhf_core.train import stage_runner

    context, out = build(root, job, label, number)
    plain = Checkpointer.at

    def at(self: Checkpointer, position: Position, always_here: bool = False, last: bool = False) -> None:
        plain(self, position, always or always_here, last)
        if stop and [position.step, position.phase, position.update] == stop:
            assert not self._wait()  # so that it is known from where the next attempt goes on
            raise Stopped

    Checkpointer.at = at
    try:
        stage_runner(job["name"])(context)
        assert not stop, f"{stop} was never reached"
    except Stopped:
        shutil.rmtree(out)
    finally:
        Checkpointer.at = plain
        random.seed(99), np.random.seed(99), torch.manual_seed(99)  # whoever comes next must restore his own
    return out


def one_attempt(root: str, jobs: dict[str, dict[str, Any]], number: int, stopped: bool) -> dict[str, Any]:
    """Attempt `number` at each job, to its first stop or to its end; rank 0 returns the metrics of those that ended.

    An attempt that goes on after another saves what it has taken up before it goes on.
    """
    plain = Checkpointer.restore

    def restore(self: Checkpointer) -> Position | None:
        position = plain(self)
        if position is not None:
            self.save(position)
        return position

    Checkpointer.restore = restore
    found = {}
    for label, job in jobs.items():
        saved = {**job, "resources": {**job["resources"], "checkpoint": {"keep": 1000, "every_minutes": None}}}
        out = attempt(root, saved, label, number, job["stops"][0] if stopped else None, always=True)
        if not RANK:
            found[label] = [] if stopped else rows_of(out)
    return found


def engines_by_position(root: str, job: dict[str, Any], label: str) -> dict[str, dict[str, str]]:
    """What the store holds of a run: for each saved position the checksums of the engines' states."""
    store, (context, _) = Store(f"file://{root}/store"), build(root, job, label, 1)
    found = {}
    for key in reversed(checkpoints.marker_keys(store, context.job.output)):
        marker = checkpoints.read_marker(store, context.job.output, key)
        checkpoints.check(store, marker, checksums=False)
        found[str(marker.position)] = {
            p.name: p.sha256 for p in marker.parts if p.name.endswith(".safetensors") and "/rank-" in p.name
        }
    return found


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def weights_of(out: Path) -> dict[str, str]:
    """Checksums of all weights that a run wrote."""
    return {e.path: e.sha256 for e in describe(out) if e.path.endswith(".safetensors")}


def resumed(root: str, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each job undisturbed, and stopped at each of `stops` and taken up again; rank 0 returns what differs.

    A job is {"name", "spec", "resources", "stops", "every"}: with "every" the second run saves by that many steps only.
    """
    found: dict[str, Any] = {}
    keep = {"keep": 1000, "every_minutes": None}
    for label, job in jobs.items():
        plain = {**job, "resources": {**job["resources"], "checkpoint": keep}}
        every = job.get("every")
        sparse = {**job, "resources": {**job["resources"], "checkpoint": {**keep, "every_steps": every}}}
        whole = attempt(root, plain, f"{label}-whole", 1, None, always=True)
        stops = [*job["stops"], None]
        outs = [
            attempt(root, sparse, f"{label}-cut", n + 1, stop, always=every is None) for n, stop in enumerate(stops)
        ]
        if RANK:
            continue
        undisturbed = engines_by_position(root, job, f"{label}-whole")
        disturbed = engines_by_position(root, job, f"{label}-cut")
        found[label] = {
            "positions": list(undisturbed),
            "saved": list(disturbed),
            "different": [p for p, parts in disturbed.items() if undisturbed[p] != parts],
            "rows": [rows_of(whole) == rows_of(outs[-1]), len(rows_of(whole))],
            "weights": [weights_of(whole) == weights_of(outs[-1]), len(weights_of(whole))],
        }
    return found


def preempted(root: str, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each job undisturbed, and told to end by SIGTERM and taken up again; rank 0 returns where it was saved and what differs.

    A job has besides "term": [rank or null for all, "token" or "point", which of them].
    """
    from rlhf_core import ppo, preemption

    plan = {"every_minutes": None}
    found: dict[str, Any] = {}
    for label, job in jobs.items():
        job = {**job, "resources": {**job["resources"], "checkpoint": plan}}
        whole = attempt(root, job, f"{label}-whole", 1, None, always=False)
        rank, kind, number = job["term"]
        calls: list[int] = []

        def told(call: Any, rank: int | None = rank, number: int = number, calls: list[int] = calls) -> Any:
            def first(*args: Any, **options: Any) -> Any:
                calls.append(1)
                if len(calls) == number and rank in (None, RANK):
                    signal.raise_signal(signal.SIGTERM)
                    signal.raise_signal(signal.SIGTERM)  # the launcher passes it on a second time
                return call(*args, **options)

            return first

        owner, name = (ppo.PPOStage, "_stop_if_told") if kind == "token" else (Checkpointer, "at")
        plain = getattr(owner, name)
        setattr(owner, name, told(plain))
        try:
            attempt(root, job, f"{label}-cut", 1, None, always=False)
            raise AssertionError("it went on to its end")
        except Preempted as error:
            message = str(error)
        finally:
            setattr(owner, name, plain)
        preemption.uninstall()  # the next attempt would be another process
        last = attempt(root, job, f"{label}-cut", 2, None, always=False)
        if not RANK:
            same = [rows_of(whole) == rows_of(last), weights_of(whole) == weights_of(last)]
            found[label] = {"message": message, "same": same}
    return found


SMALL_SFT: dict[str, Any] = {
    "name": "sft",
    "resources": {"micro_batch": 4, "zero_stage": 2, "checkpoint": {"every_steps": 1, "keep": 1}},
    "spec": {"max_steps": 5, "batch_size": 12, "optim": {"lr": 1e-3}},
}


def cadence(root: str, name: str, plan: dict[str, Any]) -> dict[str, Any]:
    """Five steps of SFT under a plan: what is in the store then, and what training has waited."""
    from rlhf_core.train import stage_runner

    job = {**SMALL_SFT, "resources": {**SMALL_SFT["resources"], "checkpoint": plan}}
    context, _ = build(root, job, name, 1)
    metrics = stage_runner("sft")(context)
    store, ref = context.store, context.job.output
    markers = [checkpoints.read_marker(store, ref, key) for key in reversed(checkpoints.marker_keys(store, ref))]
    for marker in markers:
        checkpoints.check(store, marker)
    parts = {key for key in store.list(f"{ref.id}/checkpoints") if "/parts/" in key}
    return {
        "saved": metrics["checkpoints"],
        "steps": [marker.position.step for marker in markers],
        "kept": [marker.position.step for marker in markers if marker.kept],
        "parts not listed": len(parts - {m.part_key(p) for m in markers for p in m.parts}),
    }


def uploads(root: str) -> list[list[str]]:
    """Names of the parts that each save of a PPO run uploads, while the critic alone is trained and no rollout is repeated."""
    from rlhf_core.train import stage_runner

    spec = {"steps": 3, "rollout_batch_size": 8, "minibatches": 1, "max_response_tokens": 6, "critic_warmup": 2}
    resources = {
        "micro_batch": 4,
        "rollout_micro_batch": 8,
        "zero_stage": 1,
        "checkpoint": {"every_steps": 1, "keep": 9},
    }
    context, _ = build(root, {"name": "ppo", "spec": spec, "resources": resources}, "uploads", 1)
    plain, seen = Save._store, []

    def store(self: Save, name: str, path: Path, before: Any) -> Any:
        stored = self.stored
        part = plain(self, name, path, before)
        if self.stored > stored:
            seen.append([str(self.position), name])
        return part

    Save._store = store
    stage_runner("ppo")(context)
    return seen


def damaged(root: str, name: str, harm: str) -> dict[str, Any]:
    """A stage that is stopped and taken up again after the newest checkpoint has been damaged; what it does and says."""
    job = {**SMALL_SFT, "resources": {**SMALL_SFT["resources"], "checkpoint": {"every_steps": 1, "keep": 2}}}
    whole = attempt(root, job, f"{name}-whole", 1, None, always=False)
    attempt(root, job, name, 1, [4, "train", 0], always=False)
    context, _ = build(root, job, name, 2)
    store, ref = context.store, context.job.output
    newest, *older = [checkpoints.read_marker(store, ref, key) for key in checkpoints.marker_keys(store, ref)]
    gather(None)  # all ranks have looked
    if not RANK:
        for marker in [newest, *older][: 2 if harm == "everything" else 1]:
            wanted = "rank-001.safetensors" if harm != "record" else "rank-001.json"
            (part,) = [p for p in marker.parts if p.name.endswith(wanted)]
            key = marker.key if harm == "marker" else marker.part_key(part)
            data = bytearray(store.read(key))
            data[len(data) // 2] ^= 4
            store.write(key, bytes(data))
            if harm == "missing":
                store.delete(key)
    gather(None)
    said: list[str] = []
    plain = JobContext.say
    JobContext.say = lambda self, text: said.append(text)
    try:
        last = attempt(root, job, name, 2, None, always=False)
    finally:
        JobContext.say = plain
    return {
        "resumed": [line.partition(",")[0] for line in said if "resumed" in line],
        "passed over": sum("passed over" in line for line in said),
        "from the beginning": sum("from its beginning" in line for line in said),
        "same": weights_of(last) == weights_of(whole) and rows_of(last) == rows_of(whole) if not RANK else True,
    }


def deletions(root: str) -> list[int]:
    """How many complete checkpoints there are at each moment when a part is deleted."""
    from rlhf_core.train import stage_runner

    context, _ = build(root, SMALL_SFT, "deletions", 1)
    plain, seen = Store.delete, []

    def delete(self: Store, key: str) -> None:
        if "/parts/" in key or key.endswith(".json"):
            others = [k for k in checkpoints.marker_keys(self, context.job.output) if k != key]
            whole = [checkpoints.read_marker(self, context.job.output, k) for k in others]
            for marker in whole:
                checkpoints.check(self, marker, checksums=False)
            seen.append(len(whole))
        plain(self, key)

    Store.delete = delete
    stage_runner("sft")(context)
    return seen


def failing_upload(root: str, name: str, failures: int) -> dict[str, Any]:
    """What comes of a store that takes the first checkpoint and refuses the next `failures` uploads."""
    from rlhf_core.errors import StoreError
    from rlhf_core.train import stage_runner

    context, out = build(root, SMALL_SFT, name, 1)
    plain, calls = Store.upload, []
    forget, told = Checkpointer._forget_failed, []

    def tell(self: Checkpointer, final: bool) -> None:
        told.append(str(self._save and self._save.error))
        forget(self, final)

    Checkpointer._forget_failed = tell

    def upload(self: Store, local: Path, key: str) -> None:
        calls.append(key)
        if 3 < len(calls) <= 3 + failures:
            raise StoreError(f"upload {key}: no space left")
        plain(self, local, key)

    Store.upload = upload
    try:
        stage_runner("sft")(context)
        error = ""
    except StoreError as raised:
        error = str(raised)
    finally:
        Store.upload, Checkpointer._forget_failed = plain, forget
    newest = checkpoints.newest(context.store, context.job.output)
    steps = [row for row in rows_of(out) if row["kind"] == "train"]
    return {"error": error, "told": told, "steps": len(steps), "newest": str(newest and newest.position)}


def dies_while_storing(root: str) -> dict[str, Any]:
    """Rank 1 dies in the middle of storing its second part; what rank 0 finds in the store then."""
    from rlhf_core.train import stage_runner

    context, _ = build(root, SMALL_SFT, "dies-while-storing", 1)
    plain, stored = Store.upload, []

    def upload(self: Store, local: Path, key: str) -> None:
        stored.append(key)
        if RANK == 1 and len(stored) > 2:  # two parts each: the engine's and the rank's record
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, local, key)

    Store.upload = upload
    try:
        stage_runner("sft")(context)
    except Exception as error:  # the other rank is gone
        print(f"rank 0: {type(error).__name__}: {error}", flush=True)
    store, ref = context.store, context.job.output
    keys = checkpoints.marker_keys(store, ref)
    newest = checkpoints.newest(store, ref)
    return {
        "markers": [str(checkpoints.read_marker(store, ref, key).position) for key in keys],
        "resumes": str(newest and newest.position),
    }


COPIED: dict[str, Any] = {
    **SMALL_SFT,
    "resources": {**SMALL_SFT["resources"], "checkpoint": {"every_steps": 1, "keep": 2}},
    "world": 2,
}


def as_elsewhere() -> list[str]:
    """Treat the store as one on another machine, and all ranks as on one; the keys of checkpoints that this rank will download."""
    scratch = Path(os.environ["RANKS_OUT"]) / "scratch"
    scratch.mkdir(exist_ok=True)
    os.environ["RLHF_SCRATCH"] = str(scratch)
    Store.local_path = lambda self, key: None
    plain, seen = Store.download, []

    def download(self: Store, key: str, local: Path) -> None:
        if "/checkpoints/" in key:
            seen.append(key)
        plain(self, key, local)

    Store.download = download
    return seen


def leave_copies(root: str, labels: list[str], killed: str | None = None) -> None:
    """Stages that stop at their fourth step; in one of them both ranks are killed there, so it is the last."""
    as_elsewhere()
    for label in labels:
        attempt(root, COPIED, label, 1, [4, "train", 0], always=False)
    if killed:
        Stopped.__init__ = lambda self, *_: os.kill(os.getpid(), signal.SIGKILL)
        if not RANK:
            (Path(os.environ["RANKS_OUT"]) / "result.json").write_text("null")
        attempt(root, COPIED, killed, 1, [4, "train", 0], always=False)


def take_up_copies(root: str, labels: list[str], moved: str | None = None) -> dict[str, Any]:
    """Those stages taken up again, one of them with rank 1 on another machine; and what was fetched of their checkpoints."""
    seen, home, found = as_elsewhere(), tempfile.gettempdir(), {}
    whole = attempt(root, COPIED, "copies-whole", 1, None, always=False)
    for label in labels:
        context, _ = build(root, COPIED, label, 2)
        marker = checkpoints.newest(context.store, context.job.output)
        assert marker is not None
        parts = {marker.part_key(part): part for part in marker.parts}
        if RANK and label == moved:
            tempfile.tempdir = f"{home}/other"
            Path(tempfile.tempdir).mkdir()
        seen.clear()
        resumed: list[Any] = []
        plain = Checkpointer.restore

        def restore(self: Checkpointer, plain: Any = plain, resumed: list[Any] = resumed) -> Position | None:
            position = plain(self)
            resumed.extend(self.context.resumed)
            return position

        Checkpointer.restore = restore
        last = attempt(root, COPIED, label, 2, None, always=False)
        Checkpointer.restore = plain
        fetched, left = (
            gather(sorted(parts[key].name for key in seen)),
            gather(local_parts.folder_of(context.store, context.job.output).exists()),
        )
        tempfile.tempdir = home
        if not RANK:
            size = sum(part.size for part in parts.values() for names in fetched if part.name in names)
            here = sum(part.size for part in parts.values()) - size
            assert resumed == [{"attempt": 1, "from": "step 4", "bytes_local": here, "bytes_fetched": size}]
            same = weights_of(last) == weights_of(whole) and rows_of(last) == rows_of(whole)
            found[label] = {"fetched": fetched, "left": any(left), "same": same}
    return found


def halved(root: str, jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Each job undisturbed, and stopped and taken up with half its micro-batches: the metrics of both."""
    found = {}
    for label, job in jobs.items():
        plan = {"checkpoint": {"every_minutes": None}}
        job = {**job, "resources": {**job["resources"], **plan}}
        sizes = {name: size // 2 for name, size in job["resources"].items() if name.endswith("micro_batch")}
        whole = attempt(root, job, f"{label}-full", 1, None, always=False)
        attempt(root, job, f"{label}-half", 1, job["stops"][0], always=True)
        less = {**job, "resources": {**job["resources"], **sizes}}
        last = attempt(root, less, f"{label}-half", 2, None, always=False)
        if not RANK:
            found[label] = [rows_of(whole), rows_of(last)]
    return found


def no_room_for_copies(root: str, fill: bool) -> dict[str, Any]:
    """A stage whose disk is filled up before its third save (or not); how many checkpoints have copies when, and are made."""
    from rlhf_core.train import stage_runner

    as_elsewhere()
    context, _ = build(root, COPIED, "full-disk" if fill else "full-cache", 1)
    folder, disk = local_parts.folder_of(context.store, context.job.output), Path(tempfile.gettempdir())
    plain, seen = Checkpointer.at, []

    def at(self: Checkpointer, position: Position, always: bool = False, last: bool = False) -> None:
        self._wait()
        seen.append(len(list(folder.glob("*"))))
        if fill and position.step == 3:
            with (disk / "filler").open("wb") as file:
                file.write(bytes(shutil.disk_usage(disk).free - (2 << 20)))
        plain(self, position, always, last)

    Checkpointer.at = at
    metrics = stage_runner("sft")(context)
    checkpoints.check(
        context.store,
        checkpoints.marker_at(context.store, checkpoints.marker_keys(context.store, context.job.output)[0]),
    )
    return {"copies": seen, "saved": metrics["checkpoints"]}


if __name__ == "__main__":
    main(globals())
