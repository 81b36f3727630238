"""Start one stage job and follow it to its end, however it ends.

`run_job` starts the attempt that a `lease` is held on: one command under `guard`, whose output is followed to the end. Here that
is the launcher that DeepSpeed runs on every node; for several nodes it is `rlhf_core.head`, which has the same one run on each.
Success is exit code 0 *and* a result.json with our job id; everything else is a `JobFailed` that says why (`outcome`). The
job writes to local files, not to a pipe: a control plane that is slow, or killed, never blocks or breaks a rank that prints. All
limits are kept here (no progress for so long, longest run, a lease that was lost, grace between SIGTERM and SIGKILL), so `run_job`
returns whatever the job does. It must run in the main thread of a flow's process, or in a thread that lives as long as it does
(see `guard`). Not here: retries, publishing.
"""

import base64
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from rlhf_core import guard
from rlhf_core.ends import Kind
from rlhf_core.errors import ConfigError, JobFailed
from rlhf_core.failures import oom_kills
from rlhf_core.job import JobResult, JobSpec, job_url
from rlhf_core.joblog import JobLog
from rlhf_core.lease import Lease
from rlhf_core.members import BEAT_SECONDS, Seat
from rlhf_core.outcome import failure_of, outcome
from rlhf_core.ranklog import RANKS, ranks_folder
from rlhf_core.store import Store

TRAIN = "rlhf_core.train"
HEAD = "rlhf_core.head"
STACK_SECONDS = 2.0  # for the ranks to write their stacks
HEAD_SECONDS = 6.0  # what a head needs more than its nodes' ranks to end: beats there and back
POLL_SECONDS = 0.2
ENDING_SECONDS = 35.0  # how long a new attempt waits for an earlier one's guard: the longest grace, and its SIGKILL
LIMIT_EXCEEDED = 124  # as timeout(1)
CPU_DEFAULTS = {
    # A thread that is done waits some microseconds for the next of a step's many small parts; longer would cost busy machines.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
    # Freed memory is kept, in huge pages: new memory costs a fault for every 4 KiB, which a large tensor can feel more than its
    # arithmetic. What is not soon used again `partitioned.release_freed` gives back.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296",
}
# Below the ephemeral range, where an outgoing connection could take it before the ranks do.
PORTS = range(20_000, 32_000)


def _ignore(_: object) -> None: ...


def run_job(
    store: Store,
    lease: Lease,
    on_event: Callable[[dict[str, Any]], None] = _ignore,
    on_line: Callable[[str], None] = _ignore,
    *,
    module: str = TRAIN,
) -> JobResult:
    """Run one attempt of a job to its end.

    Args:
        store: where job.json, the log and the result live; not `memory://`, since other processes must reach it.
        lease: held on the job's artifact, after `end_leftovers`; its job is run.
        on_event: called with each progress event, in this thread. An exception from it ends the job.
        on_line: called with each other line of the job's output.
        module: what every rank runs.

    Raises:
        ConfigError: the request cannot be started as it is.
        JobFailed: the job ended without its result; reason "superseded": another run took over the artifact.
    """
    job = lease.job
    if store.scheme == "memory":
        raise ConfigError(f"store: {store.url} lives in one process and a job is another; use file:// or s3://")
    assert job.job_id.startswith(job.family), "leftovers are found by this prefix"
    argv = command(job, store, module)

    def noted(event: dict[str, Any]) -> None:
        lease.note(event)
        on_event(event)

    log = JobLog(store, job, noted, on_line)
    log.note(f"{job.output.id}, attempt {job.attempt}, on {platform.node()}: {shlex.join(argv)}")
    kills = oom_kills()
    try:
        process = start(job, argv, log.folder, ask="command" if has_head(job) else "ranks")
        try:
            code, limit = watch(process, lease, log, module)
            end_guard(process, job, log, grace=0 if limit == "stalled" else None)
            if code and lease.check():  # whoever took over on this machine ended the job, before we were told
                limit = "superseded"
            ranks = 0 if has_head(job) else job.resources.processes
            failure = failure_of(job, log, code, limit, oom_kills() - kills, ranks)
        except BaseException as error:  # also KeyboardInterrupt and Prefect's cancellation
            log.on_event, log.on_line = _ignore, _ignore
            log.note(f"ended by {type(error).__name__}")
            end_guard(process, job, log)
            raise
    finally:
        place = log.close()
    return outcome(store, job, code, failure, log, place, _hints(limit))


def _hints(limit: Kind | None) -> list[str]:
    """What a stalled job may have waited for."""
    locks = build_locks() if limit == "stalled" else []
    return [f"A left-over build lock makes jobs wait for ever; remove it if nothing builds: {path}" for path in locks]


# --- the command and its environment ---------------------------------------------------------------------------------


def has_head(job: JobSpec) -> bool:
    """Whether the job's processes run on other machines than this; the data stage never does, as it has no ranks."""
    return job.resources.launcher != "local" and job.stage != "data"


def command(job: JobSpec, store: Store, module: str = TRAIN) -> list[str]:
    """The local command of a job: plain Python for the data stage, DeepSpeed's launcher of one node, or the head of several."""
    python = [sys.executable, "-u", "-m"]
    if job.stage == "data":
        return [*python, module, "--job", job_url(store, job)]
    if has_head(job):
        return [*python, HEAD, "--job", job_url(store, job), *(["--module", module] if module != TRAIN else [])]
    here = Seat(node=0, host="localhost", processes=job.resources.processes, first_rank=0)
    return ranks_command([here], 0, "127.0.0.1", free_port(), store, job, module)


def ranks_command(
    seats: Sequence[Seat],
    node: int,
    master_addr: str,
    master_port: int,
    store: Store,
    job: JobSpec,
    module: str = TRAIN,
) -> list[str]:
    """What starts the ranks of one node: the command that DeepSpeed's own launcher runs there.

    Args:
        seats: of all nodes, in the order of their ranks.
        node: the number of this one.
        master_addr: where rank 0 is reached.
        master_port: free there.
        store: of the job.
        job: whose ranks they are.
        module: what every rank runs.

    Raises:
        ConfigError: fewer GPUs are shown here than the node has ranks.
    """
    # By number, as several nodes may have one name. Of other nodes only the number of ranks counts.
    world = {f"node-{seat.node:04d}": list[int | str](range(seat.processes)) for seat in seats}
    place, own = next((place, seat) for place, seat in enumerate(seats) if seat.node == node)
    world[f"node-{node:04d}"] = list(own.devices[: own.processes]) or devices(own.processes)
    info = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    return [
        *(sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={info}", f"--node_rank={place}"),
        *(f"--master_addr={master_addr}", f"--master_port={master_port}", "--log_level=warning"),
        *("--module", module, "--job", job_url(store, job)),
    ]


def devices(processes: int) -> list[int | str]:
    """The devices for so many ranks of this machine: those that CUDA_VISIBLE_DEVICES shows, else the first ones.

    Raises:
        ConfigError: it shows fewer.
    """
    visible = [v.strip() for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    if accelerator() == "cpu" or not visible:
        return list(range(processes))
    if len(visible) < processes:
        raise ConfigError(
            f"resources.processes: {processes}, but CUDA_VISIBLE_DEVICES={','.join(visible)} has {len(visible)}, "
            "and each process needs a GPU; lower processes or show more"
        )
    return [int(v) if v.isdigit() else v for v in visible[:processes]]


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise ConfigError(f"no free TCP port among 100 tried in {PORTS.start}-{PORTS.stop - 1}")


def environment(job: JobSpec) -> dict[str, str]:
    """The environment of a job's processes: ours, and what makes a job the same wherever it is started."""
    env = dict(os.environ)
    bin_folder = str(Path(sys.executable).parent)  # ninja lives there; deepspeed builds extensions with it
    root = str(Path(__file__).resolve().parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    env |= {
        "PATH": os.pathsep.join([bin_folder, *filter(None, [env.get("PATH")])]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # no module of the current folder shadows ours
        "RLHF_JOB_ID": job.job_id,
        "OMP_NUM_THREADS": str(job.resources.threads or max(1, cores() // job.resources.processes)),
        "TOKENIZERS_PARALLELISM": "false",
        "DO_NOT_TRACK": "1",
    }
    if accelerator() == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
        env = CPU_DEFAULTS | env
        env.pop("CUDA_VISIBLE_DEVICES", None)
    return env


def accelerator() -> str:
    """DS_ACCELERATOR if set, else "cpu" where the machine shows no GPU device, else "" (deepspeed finds out)."""
    named = os.environ.get("DS_ACCELERATOR")
    if named:
        return named
    gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()
    return "" if gpu else "cpu"


def cores() -> int:
    """CPU cores this process may use: its affinity and its cgroup's quota."""
    allowed = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def build_locks() -> list[Path]:
    """Lock files of torch extension builds. One left by a killed build makes every later job wait for ever."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return sorted(Path(root).glob("**/lock"))


def start(
    job: JobSpec,
    argv: list[str],
    folder: Path,
    job_id: str | None = None,
    ask: Literal["ranks", "command"] = "ranks",
) -> subprocess.Popen[bytes]:
    """Start a command under the guard, in a session of its own, writing to `folder`/output and its ranks to `folder`/ranks.

    The job's scratch folder is below `folder`; the guard removes it, and all of `folder` if nobody is left to read it.

    Args:
        job: what is run.
        argv: the command.
        folder: for the job's local files.
        job_id: what its processes carry; default: the job's.
        ask: whom the guard tells first that the job is to end; a command that is asked looks after ranks elsewhere.
    """
    job_id = job_id or job.job_id
    (ranks := ranks_folder(folder)).mkdir(mode=0o700, exist_ok=True)
    owner = ["--job-id", job_id, "--parent", str(os.getpid()), "--folder", str(folder)]
    owner += [
        "--ask",
        ask,
        "--grace",
        str(grace_of(job) if ask == "command" else job.resources.checkpoint.grace_seconds),
    ]
    with (folder / "output").open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "rlhf_core.guard", *owner, "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={**environment(job), "RLHF_JOB_ID": job_id, RANKS: str(ranks)},
            start_new_session=True,
        )


def grace_of(job: JobSpec) -> float:
    """Seconds that the job's local command has between being told to end and being killed."""
    return job.resources.checkpoint.grace_seconds + (HEAD_SECONDS if has_head(job) else 0)


# --- what earlier attempts left --------------------------------------------------------------------------------------


def guards(job: JobSpec) -> list[int]:
    """Guards on this machine, of any attempt, that build the job's artifact."""
    return [p for p in guard.processes_of(job.family) if guard.python_module(p) == "rlhf_core.guard"]


def end_leftovers(job: JobSpec) -> None:
    """End what earlier attempts at the same artifact left on this machine; only who holds the lease may.

    Their guards are told first, as those let their ranks save; one whose control plane is gone is at it already. So this
    comes before one looks for the newest checkpoint. Other nodes of the same attempt may be on this machine too.

    Raises:
        JobFailed: they cannot be ended.
    """

    def others() -> set[int]:
        ids = ((pid, guard.variable(pid, "RLHF_JOB_ID")) for pid in guard.processes_of(job.family))
        return {pid for pid, id in ids if id and id != job.job_id and not id.startswith(f"{job.job_id}/")}

    guard.end(lambda: others() & set(guards(job)), ENDING_SECONDS)
    if left := guard.end(others, grace=5):
        raise JobFailed(
            f"{job.output.id}: processes {sorted(left)} of an earlier attempt cannot be ended; see what they wait for",
            code=guard.ORPHANED,
            reason="leftovers",
        )


# --- while it runs ---------------------------------------------------------------------------------------------------


def watch(process: subprocess.Popen[bytes], lease: Lease, log: JobLog, module: str) -> tuple[int, Kind | None]:
    """Follow a job until it ends or passes a limit; returns the guard's code and which limit, if one."""
    job = lease.job
    began = sign = time.monotonic()
    while (code := process.poll()) is None:
        if log.read():
            sign = time.monotonic()
        now = time.monotonic()
        if lease.lost:
            log.note("superseded: another run has taken over")
            return LIMIT_EXCEEDED, "superseded"
        limit: Kind
        if now - sign > job.resources.stall_minutes * 60:
            limit = "stalled"
        elif now - began > job.resources.timeout_hours * 3600:
            limit = "timed out"
        else:
            time.sleep(POLL_SECONDS)
            continue
        silent = f"no progress for {now - sign:.0f} s" if limit == "stalled" else f"ran for {now - began:.0f} s"
        log.note(f"{limit}: {silent}; stacks of all ranks follow")
        dump_stacks(job, module)
        log.wait(STACK_SECONDS + (2 * BEAT_SECONDS if has_head(job) else 0))
        return LIMIT_EXCEEDED, limit
    return code, None


def dump_stacks(job: JobSpec, module: str, job_id: str | None = None) -> None:
    """Have every rank write the stacks of its threads to its log; a head orders the same of its nodes.

    Args:
        job: whose ranks.
        module: what they run.
        job_id: what they carry; default: the job's.
    """
    for pid in guard.processes_of(job_id or job.job_id):
        # Unless it has registered faulthandler already, SIGUSR1 would end it before it says anything.
        if guard.python_module(pid) in (module, HEAD) and guard.catches(pid, signal.SIGUSR1):
            guard.send(pid, signal.SIGUSR1)


def end_guard(
    process: subprocess.Popen[bytes],
    job: JobSpec,
    log: JobLog,
    *,
    job_id: str | None = None,
    grace: float | None = None,
) -> int:
    """End the guard and with it the job; returns the guard's code when no process of the job is left here.

    Args:
        process: the guard.
        job: what it guards.
        log: what the job writes, which is read on meanwhile.
        job_id: what its processes carry; default: the job's.
        grace: seconds for its ranks to save; 0: they cannot, or have nothing to; default: the plan's.
    """
    whole = grace_of(job)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM if grace != 0 else guard.AT_ONCE)
        until = (
            time.monotonic() + max(whole if grace is None else grace, guard.COMMAND_SECONDS) + guard.KILL_SECONDS + 2
        )
        while process.poll() is None and time.monotonic() < until:
            log.wait(POLL_SECONDS)
    process.kill()
    code = process.wait()
    # Normally nothing: the guard returns when all is ended. If the guard itself was killed, this does its work.
    guard.end(lambda: guard.processes_of(job_id or job.job_id), whole if grace is None else grace)
    shutil.rmtree(guard.scratch(log.folder), ignore_errors=True)
    log.read()
    return code
