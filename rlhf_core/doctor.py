"""Checks of a machine before a run: `checks(store_url)` returns plain data, the command line renders it.

`ok` is True, False (a job would fail or hang) or None (worth knowing, or could not be found out). Each check that is
not True says what to do. torch is imported only in a subprocess: this stays as light as the rest of the control plane.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rlhf_core.compiler import compiler
from rlhf_core.errors import AlreadyExists, ConfigError, RlhfError
from rlhf_core.guard import pids, variable
from rlhf_core.launch import PORTS, accelerator, build_locks, cores
from rlhf_core.store import Store

GIB = 1 << 30
ROOT = Path(__file__).resolve().parent.parent
REQUIRED = ("torch", "deepspeed", "transformers", "safetensors", "datasets", "prefect", "fastapi", "s3fs", "pydantic")
MEMORY_GIB, DISK_GIB = 4, 5
TORCH_PROBE = """
import json, torch
from deepspeed.accelerator import get_accelerator
a = get_accelerator()
found = {"torch": torch.__version__, "name": a._name, "devices": a.device_count(), "bf16": a.is_bf16_supported()}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        ok: True good, False bad, None not decisive.
        detail: what was found.
        remedy: what to do; empty if `ok`.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def checks(store_url: str) -> list[Check]:
    """All checks, in the order a person would want to read them; takes some seconds."""
    return [
        check_python(),
        *check_packages(),
        check_modules(),
        check_commit(),
        check_accelerator(),
        check_compiler(),
        check_build_locks(),
        check_cores(),
        check_memory(),
        *check_disk(store_url),
        check_store(store_url),
        check_ports(),
        check_jobs(),
    ]


def check_python() -> Check:
    """Python's version."""
    found = ".".join(map(str, sys.version_info[:3]))
    ok = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Check("python", ok, f"{found} at {sys.executable}", "" if ok else "use Python 3.11 or 3.12")


def check_packages() -> Iterator[Check]:
    """Installed versions of what we need, against what our own distribution asks for."""
    for name in REQUIRED:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", "pip install -e .")
            continue
        wanted = _wanted(name)
        ok = wanted is None or _satisfies(found, wanted)
        yield Check(name, ok, found, "" if ok else f"needs {wanted}: pip install -e .")


def _wanted(package: str) -> str | None:
    """Version rule for a package in our distribution's requirements."""
    try:
        requirements = metadata.requires("rlhf") or []
    except metadata.PackageNotFoundError:
        return None
    for line in requirements:
        name = line.split(";")[0].strip()
        rest = name[len(package) :]
        if name.startswith(package) and rest[:1] in ("<", ">", "=", "!", "~"):
            return rest
    return None


def _satisfies(found: str, wanted: str) -> bool | None:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return None
    return SpecifierSet(wanted).contains(found, prereleases=True)


def check_modules() -> Check:
    """Whether flows, tasks and rlhf_core come from one tree."""
    places = {}
    for name in ("flows", "tasks", "rlhf_core"):
        spec = importlib.util.find_spec(name)
        places[name] = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
    strange = [f"{name} from {place}" for name, place in places.items() if place != ROOT]
    if strange:
        return Check(
            "modules", False, "; ".join(strange), f"another package has this name; run from {ROOT} or rename it"
        )
    return Check("modules", True, f"flows, tasks and rlhf_core from {ROOT}")


def check_commit() -> Check:
    """Git commit of the source tree, and whether it has changes."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = len(_git("status", "--porcelain").splitlines())
    except (OSError, subprocess.SubprocessError):
        return Check("commit", None, f"{ROOT} is no git tree", "provenance will name no commit")
    if changed:
        return Check(
            "commit", None, f"{commit} and {changed} changed files", "commit, so that provenance says what ran"
        )
    return Check("commit", True, commit)


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=20)
    return done.stdout.strip()


def check_accelerator() -> Check:
    """What deepspeed would compute on, asked in a subprocess."""
    env = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if accelerator() == "cpu" else {})}
    argv = [sys.executable, "-c", TORCH_PROBE]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=env)
    except subprocess.TimeoutExpired:
        return Check(
            "accelerator", False, "import of torch and deepspeed takes over 120 s", "check the disk and its load"
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("accelerator", False, last, "reinstall torch and deepspeed for this machine: pip install -e .")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    detail = f"{found['name']} x {found['devices']}, torch {found['torch']}, bf16 {'yes' if found['bf16'] else 'no'}"
    if found["name"] == "cpu":
        if accelerator() != "cpu":
            return Check(
                "accelerator", False, f"{detail}, though the machine has a GPU", "install torch with CUDA or ROCm"
            )
        return Check("accelerator", None, detail, "no GPU here: small models only")
    return Check("accelerator", True, detail)


def check_compiler() -> Check:
    """A C++ compiler, for our kernels on CPUs (slower without), and ninja, for deepspeed's extensions."""
    found = " ".join(compiler())
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    missing = [name for name, there in (("a C++ compiler", found), ("ninja", ninja)) if not there]
    if missing:
        return Check(
            "compiler",
            None,
            "without " + " and ".join(missing),
            "apt install g++ ninja-build: CPUs are slower without a compiler",
        )
    return Check("compiler", True, f"{found}, {ninja}")


def check_build_locks() -> Check:
    """Locks of extension builds: while one exists every job that needs that extension waits."""
    locks = build_locks()
    if not locks:
        return Check("build locks", True, "none")
    return Check(
        "build locks", False, ", ".join(map(str, locks)), "if nothing builds now: rm " + " ".join(map(str, locks))
    )


def check_cores() -> Check:
    """Cores this process may use, and how busy they are."""
    count, load = cores(), os.getloadavg()[0]
    ok = True if load < count * 1.5 else None
    return Check("cores", ok, f"{count}, load {load:.1f}", "" if ok else "other work slows the job; end it or wait")


def check_memory() -> Check:
    """Memory that is free for a job, within the cgroup's limit."""
    free, total = memory()
    ok = True if free >= MEMORY_GIB * GIB else None
    detail = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    return Check("memory", ok, detail, "" if ok else "lower resources.micro_batch and processes, or end other work")


def memory() -> tuple[int, int]:
    """Bytes that this process and its children may still use, and of how many: the machine's or those of a cgroup above it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    free, total = table["MemAvailable"], table["MemTotal"]
    for limit, used in cgroup_memory():
        free, total = min(free, max(0, limit - used)), min(total, limit)
    return free, total


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """(limit, used) of this process's cgroup and those above it that have a limit, cgroup v2 and v1; files that can be dropped
    from memory do not count as used."""
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif not controllers:
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        else:
            continue
        # In a container its own cgroup is mounted as the root, while the path is as seen from outside.
        places = {base, *(base / part for part in (path.strip("/"), *map(str, Path(path.strip("/")).parents)))}
        for place in places:
            try:
                limit, used = (int((place / name).read_text()) for name in names[:2])
                stat = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # no limit ("max"), or no such cgroup
            yield limit, used - int(stat.get(names[2], 0))


def check_disk(store_url: str) -> Iterator[Check]:
    """Room for temporary files (a job builds its result there) and for a local store."""
    places = {"disk, temporary": Path(tempfile.gettempdir())}
    try:
        root = Store(store_url).local_path("probe")
    except ConfigError:
        root = None  # check_store says so
    if root is not None:
        places["disk, store"] = next(folder for folder in root.parents if folder.exists())
    for name, place in places.items():
        free = shutil.disk_usage(place).free
        ok = True if free >= DISK_GIB * GIB else None
        remedy = "" if ok else "free some, or set TMPDIR or the store to a larger disk"
        yield Check(name, ok, f"{free / GIB:.1f} GiB free at {place}", remedy)


def check_store(store_url: str, patience: float = 5) -> Check:
    """Write, read, refuse a second create, delete: what artifacts need of the store; `patience`: seconds, as Store takes it."""
    key = f"doctor/{uuid.uuid4().hex}"
    try:
        store = Store(store_url, patience=patience)
    except ConfigError as error:
        return Check("store", False, str(error), "correct the store's URL")
    try:
        store.write(key, b"first", create=True)
        try:
            store.write(key, b"second", create=True)
            refused = False
        except AlreadyExists:
            refused = True
        content = store.read(key)
        store.delete(key)
    except (RlhfError, KeyError) as error:
        return Check("store", False, str(error), "check URL, credentials, region and endpoint (AWS_…); see the message")
    if not refused or content != b"first":
        remedy = "the server ignores If-None-Match; use one that honours it, or two runs may publish over each other"
        return Check("store", False, f"{store.url}: a create-only write replaced an object", remedy)
    return Check("store", True, f"{store.url}: read, write, create-only and delete work")


def check_ports() -> Check:
    """Whether ranks can listen on the loopback, on a port of the range that jobs use."""
    with socket.socket() as probe:
        for port in PORTS[:50]:
            try:
                probe.bind(("127.0.0.1", port))
                probe.listen()
                return Check("ports", True, f"{PORTS.start}-{PORTS.stop - 1} usable, tried {port}")
            except OSError:
                continue
    remedy = "a job's ranks meet on one of these ports; allow them or end what holds them"
    return Check("ports", False, f"none of {PORTS.start}-{PORTS.start + 49} can be opened", remedy)


def check_jobs() -> Check:
    """Jobs of ours that run on this machine now."""
    found: dict[str, list[int]] = {}
    for pid in pids():
        if job_id := variable(pid, "RLHF_JOB_ID"):
            found.setdefault(job_id, []).append(pid)
    if not found:
        return Check("jobs", True, "none running")
    detail = "; ".join(f"{job_id}: {len(members)} processes from {min(members)}" for job_id, members in found.items())
    return Check("jobs", None, detail, "they share this machine; a new attempt at the same artifact ends what was left")
