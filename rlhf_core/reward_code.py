"""Python reward functions: whether their code may run, and how a file of them reaches the ranks of a job.

A configuration must not run code by itself, so functions run only where RLHF_ALLOW_CODE=1, which `rlhf run --allow-code` sets; it
has to be set on the nodes too, and travels to them over ssh. The file of `path/to/file.py:name` travels with the job: the control
plane stores it in the attempt's folder, below `code/`, the request says its sha256, and ranks import that copy, wherever they
run. It is one file: what it reads or imports beside itself stays behind. A `module:name` must be installed on every node. Whoever
may write to the store can change what runs, as job.json lies there too.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_core.entries import FileEntry
from rlhf_core.errors import ConfigError, IntegrityError
from rlhf_core.job import JobSpec
from rlhf_core.sources import local_path
from rlhf_core.specs import FunctionReward
from rlhf_core.store import Store

ALLOW_CODE = "RLHF_ALLOW_CODE"


def check_function(source: FunctionReward, field: str) -> None:
    """ConfigError if code is not allowed here, or the function's file is not there."""
    if os.environ.get(ALLOW_CODE) != "1":
        raise ConfigError(
            f"{field}.function {source.function!r} is code of its own; to run it use `rlhf run --allow-code`, or set "
            f"{ALLOW_CODE}=1 where the jobs run"
        )
    path, _, name = source.function.rpartition(":")
    if not path or not name:
        raise ConfigError(f"{field}.function {source.function!r}: write path/to/file.py:name or module:name")
    if path.endswith(".py") and not Path(path).expanduser().is_file():
        raise ConfigError(f"{field}.function: {path!r} does not exist (looked in {Path.cwd()})")


def pack(spec: Mapping[str, Any], identity: Mapping[str, Any]) -> tuple[FileEntry, ...]:
    """The files that a job of a stage takes along.

    Args:
        spec: the stage's.
        identity: what its fingerprint hashed, with the digests of these files.

    Raises:
        ConfigError: code is not allowed, a file is not there, or it has changed since the plan was made.
    """
    found = []
    for i, path, _ in _files(spec):
        check_function(FunctionReward.model_validate(spec["rewards"][i]), f"ppo.rewards[{i}]")
        _, digest, _ = str(identity["rewards"][i]["function"]).split(":", 2)
        data = _read(i, path, digest)
        found.append(FileEntry(path=_name(i, path), size=len(data), sha256=digest))
    return tuple(found)


def upload(store: Store, job: JobSpec) -> None:
    """Store the files that a job takes along; ConfigError if one has changed since it was packed."""
    known = {entry.path: entry.sha256 for entry in job.code}
    for i, path, _ in _files(job.spec):
        name = _name(i, path)
        store.write(f"{job.folder}/code/{name}", _read(i, path, known[name]))


def unpack(store: Store, job: JobSpec, folder: Path) -> dict[str, Any]:
    """The job's spec with the files of its reward functions replaced by those that came along, put into a local folder.

    Raises:
        IntegrityError: one is missing or is not what the request says.
    """
    known = {entry.path: entry for entry in job.code}
    rewards: list[dict[str, Any]] = list(job.spec.get("rewards") or ())
    for i, path, function in _files(job.spec):
        name = _name(i, path)
        key = f"{job.folder}/code/{name}"
        try:
            data = store.read(key)
        except KeyError:
            data = b""
        if name not in known or hashlib.sha256(data).hexdigest() != known[name].sha256:
            raise IntegrityError(f"{store.url}/{key}: missing, or not the file that came with the job as {path!r}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        rewards[i] = {**rewards[i], "function": f"{folder / name}:{function}"}
    return {**job.spec, **({"rewards": rewards} if rewards else {})}


def _files(spec: Mapping[str, Any]) -> Iterator[tuple[int, str, str]]:
    """Number, file and function of each reward source that is a function in a file."""
    for i, source in enumerate(spec.get("rewards") or ()):
        path, _, function = str(source.get("function", "")).rpartition(":")
        if source["kind"] == "function" and path.endswith(".py"):
            yield i, path, function


def _read(number: int, path: str, digest: str) -> bytes:
    """The file's content; ConfigError if it is not what it was when the stage was planned."""
    field = f"ppo.rewards[{number}].function"
    data = local_path(path, field).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ConfigError(f"{field}: {path!r} has changed since the stage was planned; start the run again")
    return data


def _name(number: int, path: str) -> str:
    """What the file is called in the attempt's folder: two sources may have files of the same name."""
    return f"{number:02d}-{Path(path).name}"
