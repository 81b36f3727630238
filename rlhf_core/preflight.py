"""What a machine says of itself before a job's ranks start on it, and why it is refused: `facts` there, `compare` at the head.

All that may take long (names, the store, its manifests, what an earlier attempt left) is asked at once in threads, and what does
not answer within some seconds is a finding like any other. Versions are read from the packages' records, without importing
them; `code` is the digest of our own source. `python -m rlhf_core.preflight --store URL` prints the facts as one line, for
`rlhf doctor --hosts`. Not here: how nodes are reached.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf_core import guard, hosts, launch
from rlhf_core.cluster import Cluster
from rlhf_core.doctor import GIB, check_store, memory
from rlhf_core.errors import ConfigError, RlhfError
from rlhf_core.interfaces import addresses, interface_of
from rlhf_core.job import JobSpec
from rlhf_core.members import Facts, Seat
from rlhf_core.room import Room, room_needed
from rlhf_core.store import Store

__all__ = ["alike", "ask", "compare", "facts", "interface_of", "source_digest"]

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "s3fs")
LIMIT_SECONDS = 15.0  # a store that cannot be reached says so after 13: two tries to connect, and the pause between
NAME_SECONDS = 2.0  # for the full name, which is of use but not needed
LEFTOVER_SECONDS = launch.ENDING_SECONDS + 10  # the ranks of an earlier attempt may be saving
STORE_PATIENCE = 3.0
RANK_BYTES = GIB // 2  # of memory: Python, torch and deepspeed alone
PREFIX = "@facts "


# --- on the node -----------------------------------------------------------------------------------------------------


def facts(store: Store | None, job: JobSpec | None, limit: float = LIMIT_SECONDS, see: str | None = None) -> Facts:
    """What this machine is and has, and what would make a job fail on it.

    Args:
        store: tried, if given.
        job: what earlier attempts at the same artifact left here is ended first, and room is looked for its inputs and
            checkpoints.
        limit: seconds until what has not answered is a problem; ending leftovers may take as long as their ranks save.
        see: a key in the store that somebody else has written and that must be seen from here.
    """
    calls: dict[str, Callable[[], Any]] = {"name": socket.getfqdn}
    if store is not None:
        calls["store"] = lambda: _store_problem(store, see)
    if store is not None and job is not None:
        calls["room"] = lambda: room_needed(store, job)
    limits = {name: limit if name != "name" else min(limit, NAME_SECONDS) for name in calls}
    if job is not None:
        calls["leftovers"], limits["leftovers"] = lambda: end_leftovers(job), LEFTOVER_SECONDS
    answers = ask(calls, limits)
    versions, problems = _versions()
    problems += _problems(answers, limits)
    disk = shutil.disk_usage(tempfile.gettempdir()).free
    if isinstance(room := answers.get("room"), Room) and (text := room.lacking(disk)):
        problems.append(text)
    name, ended = answers.get("name"), answers.get("leftovers")
    return Facts(
        host=socket.gethostname(),
        addresses=(*addresses(), *([name] if isinstance(name, str) and "." in name else [])),
        python=platform.python_version(),
        versions={**versions, "code": source_digest()},
        accelerator=launch.accelerator(),
        devices=devices(),
        cores=launch.cores(),
        memory_free=memory()[0],
        disk_free=disk,
        clock=time.time(),
        ended=tuple(sorted(ended)) if isinstance(ended, set) else (),
        problems=tuple(problems),
    )


def _problems(answers: Mapping[str, Any], limits: Mapping[str, float]) -> Iterator[str]:
    """What is wrong by what has been answered, or by that it was not; a name or an estimate that is missing is not."""
    for name in ("store", "leftovers"):
        if name not in limits:
            continue
        if name not in answers:
            remedy = (
                "check endpoint and network" if name == "store" else "see what processes of an earlier attempt wait for"
            )
            yield f"{name}: no answer within {limits[name]:g} s; {remedy}"
        elif isinstance(answers[name], Exception):
            yield f"{name}: {answers[name]}"
        elif name == "store" and answers[name]:
            yield answers[name]


def ask(calls: Mapping[str, Callable[[], Any]], limits: Mapping[str, float]) -> dict[str, Any]:
    """The results of calls made at once, or the errors they raised; those that are not back within their limit are missing."""
    answers: dict[str, Any] = {}

    def answer(name: str) -> None:
        try:
            answers[name] = calls[name]()
        except Exception as error:
            answers[name] = error

    threads = {name: threading.Thread(target=answer, args=(name,), daemon=True, name=f"ask {name}") for name in calls}
    began = time.monotonic()
    for thread in threads.values():
        thread.start()
    for name, thread in threads.items():
        thread.join(max(0.0, began + limits[name] - time.monotonic()))
    return dict(answers)


def end_leftovers(job: JobSpec) -> set[int]:
    """End what earlier attempts at the artifact left on this machine; returns the processes. JobFailed: they live on."""
    own = f"{job.job_id}/"
    others = {p for p in guard.processes_of(job.family) if not f"{guard.variable(p, 'RLHF_JOB_ID')}/".startswith(own)}
    if others:
        launch.end_leftovers(job)
    return {pid for pid in others if not guard.alive(pid)}


def _store_problem(store: Store, see: str | None) -> str | None:
    """Why the store cannot be used from here; None if it can."""
    if see is not None:
        try:
            Store(store.url, patience=STORE_PATIENCE).read(see)
        except KeyError:
            shared = "a file:// store must lie on a file system that all nodes share, at the same path; or use s3://"
            remedy = (
                shared
                if store.scheme == "file"
                else "endpoint or region differ (AWS_…): let them travel (cluster.forward)"
            )
            return f"store: {store.url} is another one here: what the control plane wrote is not in it; {remedy}"
        except RlhfError as error:
            return f"store: {error}; check endpoint, credentials and network here (AWS_…)"
    found = check_store(store.url, STORE_PATIENCE)
    return None if found.ok else f"store: {found.detail}; {found.remedy}"


def _versions() -> tuple[dict[str, str], list[str]]:
    """Installed versions of what ranks need, and which of it is missing."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    absent = [name for name in PACKAGES if name not in found]
    if not absent:
        return found, []
    return found, [
        f"packages: {', '.join(absent)} not installed for {sys.executable}; pip install -c constraints.txt -e . there"
    ]


def source_digest(package: Path = Path(__file__).parent) -> str:
    """sha256 over the names and contents of our own source files, so that nodes can be seen to run the same."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py"), key=lambda f: f.relative_to(package).as_posix()):
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{file.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def devices() -> int:
    """GPUs that ranks of this process would see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if launch.accelerator() == "cpu":
        return 0
    if visible is not None:
        return len([word for word in visible.split(",") if word.strip()])
    nvidia = [file for file in Path("/dev").glob("nvidia[0-9]*") if re.fullmatch(r"nvidia\d+", file.name)]
    amd = list(Path("/dev/dri").glob("renderD*")) if Path("/dev/kfd").exists() else []
    return len(nvidia) or len(amd) or int(Path("/dev/dxg").exists())


# --- at the head -----------------------------------------------------------------------------------------------------


def compare(own: Facts, seat: Seat, theirs: Facts, cluster: Cluster, heard: float | None = None) -> list[str]:
    """Why a node may not take part, each in one line with its name and a remedy; empty if it may.

    Args:
        own: of the machine where the job was started, from before the node looked at itself.
        seat: the node's.
        theirs: the node's facts.
        cluster: of the job.
        heard: when the node's facts came, on this machine's clock; None: at some time from `own` until now.
    """
    said = [*_versions_differ(own, theirs), *_too_small(seat, theirs), *theirs.problems]
    earliest, latest = (own.clock, time.time()) if heard is None else (heard, heard)
    skew = min(theirs.clock - earliest, 0.0) + max(theirs.clock - latest, 0.0)
    if abs(skew) > cluster.max_skew_seconds:
        said.append(
            f"its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}, and "
            f"resources.cluster.max_skew_seconds is {cluster.max_skew_seconds:g}; set it by NTP"
        )
    name = theirs.host if hosts.is_unnamed(seat) else seat.host
    return [f"{name}: {text}" for text in said]


def alike(nodes: Sequence[tuple[Seat, Facts]]) -> list[str]:
    """In what nodes differ from the first of them and must not: kind of device, and builds of torch (CPU, CUDA)."""
    said: list[str] = []
    for seat, theirs in nodes[1:]:
        first_seat, first = nodes[0]
        names = [f.host if hosts.is_unnamed(s) else s.host for s, f in ((seat, theirs), (first_seat, first))]
        kinds = [f"{f.accelerator or 'GPU'}, torch {f.versions.get('torch', 'missing')}" for f in (theirs, first)]
        if kinds[0] != kinds[1]:
            said.append(f"{names[0]}: computes on {kinds[0]}, but {names[1]} on {kinds[1]}; take nodes that are alike")
    return said


def _versions_differ(own: Facts, theirs: Facts) -> Iterator[str]:
    minor = [".".join(f.python.split(".")[:2]) for f in (own, theirs)]
    if minor[0] != minor[1]:
        yield (
            f"Python {theirs.python}, but {own.python} where the job was started; name an interpreter of the same version "
            "there: resources.cluster.python"
        )
    for name in PACKAGES:
        # What follows a + says for which device it was built, which may differ from a machine without one.
        here, there = (f.versions.get(name, "").partition("+")[0] for f in (own, theirs))
        if here and there and here != there:
            yield (
                f"{name} {there}, but {here} where the job was started; install the same: "
                f"pip install -c constraints.txt {name}=={here}"
            )
    here, there = (f.versions.get("code", "") for f in (own, theirs))
    if here != there:
        yield (
            f"another source of rlhf_core ({there[:12] or 'unknown'}, here {here[:12]}); bring the same commit there, or install "
            "the same package"
        )


def _too_small(seat: Seat, theirs: Facts) -> Iterator[str]:
    wanted = max((number + 1 for number in seat.devices), default=seat.processes)
    if theirs.accelerator != "cpu" and theirs.devices < wanted:
        yield (
            f"{theirs.devices} GPUs, and resources.processes {seat.processes} needs "
            f"{f'number {wanted - 1} of them' if seat.devices else f'{wanted}'}; lower resources.processes or leave the node out "
            "(resources.cluster.exclude)"
        )
    if theirs.memory_free < seat.processes * RANK_BYTES:
        yield (
            f"memory: {theirs.memory_free / GIB:.1f} GiB free, and {seat.processes} processes need at least "
            f"{seat.processes * RANK_BYTES / GIB:.1f}; lower resources.processes or end other work there"
        )


def main(argv: list[str] | None = None) -> int:
    """Print this machine's facts as one line."""
    parser = argparse.ArgumentParser(prog="rlhf_core.preflight", description="Say whether this machine can run ranks.")
    parser.add_argument("--store", required=True, help="URL of the store to try")
    parser.add_argument("--see", help="key in the store that must be seen from here")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, help="seconds")
    parser.add_argument("--attached", action="store_true", help="a JSON object of variables comes by standard input")
    args = parser.parse_args(argv)
    if args.attached:
        os.environ.update(json.loads(sys.stdin.readline()))
    try:
        found = facts(Store(args.store), None, args.limit, args.see)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    print(PREFIX + found.model_dump_json(), flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # what has not answered must not keep it
