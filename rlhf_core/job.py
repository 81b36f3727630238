"""JobSpec: one resolved launch request, the only way in to a job; result.json is the way out.

`job.json` holds all that the ranks need (spec, inputs, resources, store, output), no credentials. The job's rank 0 uploads
the result's files to its attempt's folder and then `result.json`, which lists them; the control plane verifies and publishes.
While the job runs, rank 0 prints progress as single lines that begin with `PROGRESS`.
"""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

from pydantic import Field

from rlhf_core.artifacts import ArtifactRef, FileEntry
from rlhf_core.entries import Inside
from rlhf_core.errors import IntegrityError
from rlhf_core.resources import Resources
from rlhf_core.sealed import unseal
from rlhf_core.specs import Frozen, ModelSpec, StageName
from rlhf_core.store import Store

PROGRESS = "@rlhf "


class JobSpec(Frozen):
    """One launch of one stage."""

    stage: StageName
    store: str = Field(description="root URL")
    output: ArtifactRef
    attempt: int = Field(ge=1)
    since: int = Field(default=1, ge=1, description="checkpoints of attempts before this one do not count")
    job_id: str = Field(
        description="`family` and a part that is unique; every process of the job carries it in RLHF_JOB_ID"
    )
    spec: dict[str, Any] = Field(description="the stage's spec with seed and places resolved")
    identity: dict[str, Any] = Field(description="what the fingerprint hashed")
    inputs: dict[str, ArtifactRef] = {}
    model: ModelSpec | None = Field(default=None, description="the pipeline's base model")
    resources: Resources = Resources()
    left_out: tuple[str, ...] = Field(
        default=(), description="hosts that failed before, and sit out if enough others remain"
    )
    halved: bool = Field(
        default=False, description="resources has half the micro-batch, as the memory did not suffice before"
    )
    code: tuple[FileEntry, ...] = Field(
        default=(), description="Python files of reward functions, below `code/` of the attempt"
    )
    commit: str | None = Field(
        default=None, description="of the code that asks for this attempt; with + if its tree differs"
    )
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def family(self) -> str:
        """What all attempts at this artifact in this store have in common: the beginning of their job ids."""
        return f"{self.output.id}@{hashlib.sha256(self.store.encode()).hexdigest()[:8]}/"

    @property
    def folder(self) -> str:
        """The attempt's folder in the store."""
        return f"{self.output.id}/{self.attempt_folder}"

    @property
    def attempt_folder(self) -> str:
        """The attempt's folder, relative to the artifact's."""
        return f"attempts/{self.attempt:04d}"


class JobResult(Frozen):
    """What a finished job says of itself."""

    job_id: str
    folder: Inside = Field(description="where the files are, relative to the artifact's folder")
    files: tuple[FileEntry, ...]
    metrics: dict[str, Any]
    seconds: float = Field(ge=0, description="wall time inside the job")
    provenance: dict[str, Any] = {}


def read_job(url: str) -> tuple[Store, JobSpec]:
    """The store and the job behind the URL of a job.json."""
    root, _, key = url.partition("#")
    store = Store(root)
    job = unseal(JobSpec, store.read(key), url)
    if key != f"{job.folder}/job.json":
        raise IntegrityError(f"{url}: is the request of {job.folder}")
    return store, job


def job_url(store: Store, job: JobSpec) -> str:
    """The URL that `read_job` takes: the store's root, '#', the key."""
    return f"{store.url}#{job.folder}/job.json"


def progress_line(event: dict[str, Any]) -> str:
    """One event as a line for the launcher: {"step", "total", "unit", "phase", "metrics": {...}}."""
    return PROGRESS + json.dumps(event, separators=(",", ":"))


def parse_progress(line: str) -> dict[str, Any] | None:
    """The event of a progress line, None for any other line."""
    if not line.startswith(PROGRESS):
        return None
    try:
        event = json.loads(line[len(PROGRESS) :])
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
