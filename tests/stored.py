"""Artifacts, checkpoints and heartbeats as jobs leave them in a store, of a few bytes each and made without training."""

import hashlib
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rlhf_core.aliases import promote
from rlhf_core.artifacts import ArtifactRef, FileEntry, Manifest, make_ref, publish
from rlhf_core.checkpoints import Checkpoint, Part, Position
from rlhf_core.job import JobResult, JobSpec
from rlhf_core.sealed import seal
from rlhf_core.store import Store


class Remote(Store):
    """A local store that is treated as one elsewhere: what is used of it is fetched."""

    def local_path(self, key: str) -> Path | None:
        return None


def ago(**time: float) -> str:
    """A time so long ago, as records say it."""
    return (datetime.now(UTC) - timedelta(**time)).isoformat(timespec="seconds")


def begin(
    store: Store, ref: ArtifactRef, attempt: int = 1, inputs: dict[str, ArtifactRef] | None = None, created: str = ""
) -> JobSpec:
    """The request of an attempt; without `created` of unknown age, as older versions wrote it."""
    job = JobSpec(
        stage=ref.stage, store=store.url, output=ref, attempt=attempt, job_id=f"{ref.id}@0/{attempt}", spec={}, identity={},
        inputs=inputs or {}, created=created,
    )  # fmt: skip
    store.write(f"{job.folder}/job.json", seal(job), create=True)
    return job


def beat(store: Store, job: JobSpec, time: str, ended: str | None = None) -> None:
    """The heartbeat of an attempt."""
    text = json.dumps({"owner": job.job_id, "host": "elsewhere", "pid": 1, "beat": 3, "time": time, "ended": ended})
    store.write(f"{job.folder}/heartbeat.json", text.encode())


def finish(store: Store, job: JobSpec, files: dict[str, bytes]) -> JobResult:
    """Files and result of an attempt, with a log."""
    for path, data in files.items():
        store.write(f"{job.folder}/files/{path}", data)
    entries = tuple(
        FileEntry(path=p, size=len(d), sha256=hashlib.sha256(d).hexdigest()) for p, d in sorted(files.items())
    )
    result = JobResult(
        job_id=job.job_id, folder=f"{job.attempt_folder}/files", files=entries, metrics={"steps": 3}, seconds=1
    )
    store.write(f"{job.folder}/log.txt", b"a line\n")
    store.write(f"{job.folder}/result.json", seal(result))
    return result


def put(
    store: Store,
    stage: str,
    files: dict[str, bytes],
    inputs: dict[str, ArtifactRef] | None = None,
    mark: str = "",
    created: str | None = None,
) -> Manifest:
    """A published artifact, made by one attempt that has ended."""
    ref = make_ref(stage, "demo", {"mark": mark}, inputs or {})  # pyright: ignore[reportArgumentType]
    job = begin(store, ref, inputs=inputs)
    result = finish(store, job, files)
    created = created or ago(minutes=0)
    beat(store, job, created, ended="done")
    made = Manifest(
        ref=ref, spec={"mark": mark}, inputs=inputs or {}, folder=result.folder, files=result.files, created=created
    )
    return publish(store, made)


def save(
    store: Store,
    ref: ArtifactRef,
    step: int,
    parts: dict[str, bytes],
    attempt: int = 1,
    created: str | None = None,
    kept: bool = False,
) -> Checkpoint:
    """A checkpoint of an unfinished artifact."""
    made = Checkpoint(
        artifact=ref.id, attempt=attempt, position=Position(step=step), world=1, created=created or ago(minutes=0), kept=kept,
        parts=tuple(Part(name=n, size=len(d), sha256=hashlib.sha256(d).hexdigest()) for n, d in parts.items()),
    )  # fmt: skip
    for part, data in zip(made.parts, parts.values(), strict=True):
        store.write(made.part_key(part), data)
    store.write(made.key, seal(made), create=True)
    return made


def pipeline(store: Store, mark: str = "", created: str | None = None) -> dict[str, Manifest]:
    """data, sft, reward and ppo, each made of those before it."""
    made: dict[str, Manifest] = {}
    for stage, of in {"data": (), "sft": ("data",), "reward": ("sft",), "ppo": ("sft", "reward")}.items():
        rng = random.Random(stage + mark)
        files = {"model/weights": rng.randbytes(3000), "metrics.jsonl": rng.randbytes(200), "empty": b""}
        made[stage] = put(store, stage, files, {name: made[name].ref for name in of}, mark, created)
    return made


def full(store: Store) -> tuple[dict[str, Manifest], ArtifactRef]:
    """A store with all there is: a pipeline with an alias that was promoted twice, and an artifact with two checkpoints."""
    made = pipeline(store)
    promote(store, "best", made["sft"])
    promote(store, "best", made["ppo"], note="better")
    ref = make_ref("ppo", "demo", {"mark": "unfinished"}, {"sft": made["sft"].ref})
    begin(store, ref, inputs={"sft": made["sft"].ref})
    rng = random.Random(0)
    same = rng.randbytes(500)
    for step in (10, 20):
        save(
            store, ref, step, {"actor/rank-000": rng.randbytes(2000), "same": same, f"state-{step}": rng.randbytes(100)}
        )
    return made, ref
