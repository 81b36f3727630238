"""Room on a node's disk: what a job's inputs and checkpoints take at least, and whether there is so much.

Inputs are known to the byte from their manifests, and those that are in the cache or in a local store take nothing. Checkpoints
are estimated from the models: too little room is told before hours of training, and what cannot be estimated is no obstacle.
"""

import tempfile
import time
from pathlib import Path

from rlhf_core import hosts
from rlhf_core.artifacts import Manifest, job_cache, read_manifest
from rlhf_core.cache import IDLE_SECONDS
from rlhf_core.job import JobSpec
from rlhf_core.store import Store

GIB = 1 << 30
CHECKPOINT_FACTOR = 4  # weights, and the optimizer's three values for each
TRAINS = ("sft", "reward", "ppo", "dpo")
WEIGHTS = (".safetensors", ".bin", ".pt")


class Room:
    """Bytes that a job needs on a node's disk."""

    def __init__(self, inputs: int, checkpoints: int) -> None:
        self.inputs = inputs
        self.checkpoints = checkpoints

    def lacking(self, free: int) -> str | None:
        """What is wrong with so little room; None if it is enough."""
        free += _idle_in_cache()
        if self.inputs + self.checkpoints <= free:
            return None
        about = (
            f" and, estimated from the models, {self.checkpoints / GIB:.1f} for checkpoints" if self.checkpoints else ""
        )
        return (
            f"disk: {free / GIB:.1f} GiB free at {tempfile.gettempdir()}, and the job needs {self.inputs / GIB:.1f} for its "
            f"inputs{about}; free some, or set TMPDIR to a larger disk (resources.cluster.env)"
        )


def room_needed(store: Store, job: JobSpec) -> Room:
    """What a job's inputs and checkpoints take of a node's disk at least; inputs that are there already take nothing."""
    manifests = [m for m in (read_manifest(store, ref) for ref in job.inputs.values()) if m]
    remote = [m for m in manifests if store.local_path(m.place) is None]
    missing = [m for m in remote if not _is_cached(m)]
    weights = sum(_weights(m) for m in manifests) or _base_weights(job)
    trained = weights * CHECKPOINT_FACTOR if job.stage in TRAINS and hosts.is_known(job.resources) else 0
    nodes = len(hosts.seats(job.resources)) if trained and job.resources.zero_stage else 1
    return Room(sum(entry.size for m in missing for entry in m.files), trained // nodes)


def _is_cached(manifest: Manifest) -> bool:
    folders = job_cache().glob(f"{manifest.ref.fingerprint[:12]}-*")
    return any(folder.is_dir() and folder.suffix != ".part" for folder in folders)


def _weights(manifest: Manifest) -> int:
    return sum(entry.size for entry in manifest.files if entry.path.endswith(WEIGHTS))


def _base_weights(job: JobSpec) -> int:
    """The size of the base model, if its folder is here."""
    folder = Path(job.model.path).expanduser() if job.model and job.model.path else None
    if folder is None or not folder.is_dir():
        return 0
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)


def _idle_in_cache() -> int:
    """Bytes in the cache of artifacts that nobody has taken for a day: a download may remove them."""
    found, before = 0, time.time() - IDLE_SECONDS
    for use in job_cache().glob("*.use"):
        if use.stat().st_mtime < before:
            found += sum(file.stat().st_size for file in use.with_suffix("").rglob("*") if file.is_file())
    return found
