"""Start one stage job, follow it, decide how it ended.

`run_job` starts the attempt that a `lease` is held on: the deepspeed launcher under `guard`, whose output is followed
to the end. Success is exit code 0 *and* a result.json with our job id; everything else is a `JobFailed` that says why.
The job writes to a local file, not to a pipe: a control plane that is slow, or killed, never blocks or breaks a rank
that prints. All limits are kept here (no progress for so long, longest run, a lease that was lost, grace between SIGTERM
and SIGKILL), so `run_job` returns whatever the job does. It must run in the main thread of a flow's process, or in a
thread that lives as long as it does (see `guard`). Not here: other machines, retries, publishing.
"""

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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_core import guard
from rlhf_core.errors import ConfigError, ExitCode, IntegrityError, JobFailed
from rlhf_core.job import JobResult, JobSpec, job_url
from rlhf_core.joblog import JobLog
from rlhf_core.lease import Lease, superseded
from rlhf_core.sealed import unseal
from rlhf_core.store import Store

TRAIN = "rlhf_core.train"
STACK_SECONDS = 2.0  # for the ranks to write their stacks
POLL_SECONDS = 0.2
ENDING_SECONDS = 35.0  # how long a new attempt waits for an earlier one's guard: the longest grace, and its SIGKILL
TAIL_LINES = 30
LIMIT_EXCEEDED = 124  # as timeout(1)
PORTS = range(
    20_000, 32_000
)  # below the ephemeral range, where an outgoing connection could take it before the ranks do


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
    try:
        process = start(job, argv, log.folder)
        try:
            code, limit = watch(process, lease, log, module)
            end_guard(process, job, log)
            if code and lease.check():  # whoever took over on this machine ended the job, before we were told
                limit = "superseded"
        except BaseException as error:  # also KeyboardInterrupt and Prefect's cancellation
            log.on_event, log.on_line = _ignore, _ignore
            log.note(f"ended by {type(error).__name__}")
            end_guard(process, job, log)
            raise
    finally:
        place = log.close()
    return outcome(store, job, code, limit, log, place)


# --- the command and its environment ---------------------------------------------------------------------------------


def command(job: JobSpec, store: Store, module: str = TRAIN) -> list[str]:
    """The command line of a job: plain Python for the data stage, the deepspeed launcher for all others."""
    if job.stage == "data":
        return [sys.executable, "-u", "-m", module, "--job", job_url(store, job)]
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.runner", "--log_level", "warning"]
    # Without this, a /job/hostfile on the machine would turn a local job into a multi-node one.
    local = ["--hostfile", "/nonexistent/hostfile", "--master_port", str(free_port())]
    return [*launcher, *local, *_devices(job.resources.processes), "--module", module, "--job", job_url(store, job)]


def _devices(processes: int) -> list[str]:
    """Launcher options for so many ranks: with --num_gpus it would ignore CUDA_VISIBLE_DEVICES and start at GPU 0."""
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    if accelerator() == "cpu" or not visible:
        return ["--num_gpus", str(processes)]
    if len(visible) < processes:
        raise ConfigError(
            f"resources.processes: {processes}, but CUDA_VISIBLE_DEVICES={','.join(visible)} has {len(visible)}, "
            "and each process needs a GPU; lower processes or show more"
        )
    return ["--include", "localhost:" + ",".join(visible[:processes])]


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
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        env.setdefault("GOMP_SPINCOUNT", "0")
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


def start(job: JobSpec, argv: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command under the guard, in a session of its own, writing to `folder`/output.

    The job's scratch folder is below `folder`; the guard removes it, and all of `folder` if nobody is left to read it.
    """
    grace = str(job.resources.checkpoint.grace_seconds)
    owner = ["--job-id", job.job_id, "--parent", str(os.getpid()), "--grace", grace, "--folder", str(folder)]
    with (folder / "output").open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "rlhf_core.guard", *owner, "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment(job),
            start_new_session=True,
        )


# --- what earlier attempts left --------------------------------------------------------------------------------------


def guards(job: JobSpec) -> list[int]:
    """Guards on this machine, of any attempt, that build the job's artifact."""
    return [p for p in guard.processes_of(job.family) if guard.python_module(p) == "rlhf_core.guard"]


def end_leftovers(job: JobSpec) -> None:
    """End what earlier attempts at the same artifact left on this machine; only who holds the lease may.

    Their guards are told first, as those let their ranks save; one whose control plane is gone is at it already. So this
    comes before one looks for the newest checkpoint.

    Raises:
        JobFailed: they cannot be ended.
    """

    def others() -> set[int]:
        return {p for p in guard.processes_of(job.family) if guard.variable(p, "RLHF_JOB_ID") != job.job_id}

    guard.end(lambda: others() & set(guards(job)), ENDING_SECONDS)
    if left := guard.end(others, grace=5):
        raise JobFailed(
            f"{job.output.id}: processes {sorted(left)} of an earlier attempt cannot be ended; see what they wait for",
            code=guard.ORPHANED,
            reason="leftovers",
        )


# --- while it runs ---------------------------------------------------------------------------------------------------


def watch(process: subprocess.Popen[bytes], lease: Lease, log: JobLog, module: str) -> tuple[int, str | None]:
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
        log.wait(STACK_SECONDS)
        return LIMIT_EXCEEDED, limit
    return code, None


def dump_stacks(job: JobSpec, module: str) -> None:
    """Have every rank write the stacks of its threads to its stderr, and so into the log."""
    for pid in guard.processes_of(job.job_id):
        # Unless it has registered faulthandler already, SIGUSR1 would end it before it says anything.
        if guard.python_module(pid) == module and guard.catches(pid, signal.SIGUSR1):
            guard.send(pid, signal.SIGUSR1)


def end_guard(process: subprocess.Popen[bytes], job: JobSpec, log: JobLog) -> None:
    """End the guard and with it the job; returns when no process of the job is left."""
    grace = job.resources.checkpoint.grace_seconds
    if process.poll() is None:
        process.terminate()
        until = time.monotonic() + grace + guard.KILL_SECONDS + 2
        while process.poll() is None and time.monotonic() < until:
            log.wait(POLL_SECONDS)
    process.kill()
    process.wait()
    # Normally nothing: the guard returns when all is ended. If the guard itself was killed, this does its work.
    guard.end(lambda: guard.processes_of(job.job_id), grace)
    shutil.rmtree(guard.scratch(log.folder), ignore_errors=True)
    log.read()


# --- how it ended ----------------------------------------------------------------------------------------------------


def outcome(store: Store, job: JobSpec, code: int, limit: str | None, log: JobLog, place: str) -> JobResult:
    """The job's result; JobFailed says why there is none."""
    if code == 0 and limit is None:
        try:
            result = unseal(JobResult, store.read(key := f"{job.folder}/result.json"), f"{store.url}/{key}")
        except KeyError:
            raise failure(job, 1, "no result", log, place) from None
        except IntegrityError as error:
            raise failure(job, 1, f"unreadable result.json ({error})", log, place) from error
        if result.job_id != job.job_id:
            raise failure(job, 1, f"result.json is of another job, {result.job_id}", log, place)
        return result
    signo = signal_of(code)
    if limit is not None:
        reason = limit
    elif signo is not None:
        name = signal.Signals(signo).name
        code, reason = -signo, f"its guard was killed by {name}" if code < 0 else f"killed by {name}"
    else:
        reason = {
            ExitCode.NON_FINITE: "non-finite numbers",
            ExitCode.OUT_OF_MEMORY: "out of memory",
            ExitCode.PREEMPTED: "preempted",
            guard.ORPHANED: "the launcher ended before its ranks",
        }.get(code, f"exit code {code}")
    raise failure(job, code, reason, log, place)


def signal_of(code: int) -> int | None:
    """The signal an exit code stands for: -n from Python, 128+n from the guard, 256-n from deepspeed's launch.py."""
    for candidate in (-code, code - 128, 256 - code):
        if 0 < candidate <= 31 and code != 255:  # 255 is what many tools return for "failed"
            return candidate
    return None


def failure(job: JobSpec, code: int, reason: str, log: JobLog, place: str) -> JobFailed:
    """The error of a failed job: its own one line if the user is to act on it, else the end of its log."""
    said = [line.removeprefix("error: ") for line in log.tail if line.startswith("error: ")]
    if code in (ExitCode.CONFIG, ExitCode.DATA) and said:
        return JobFailed(said[-1], code=code, reason=reason)
    if reason == "superseded":
        return superseded(job)
    parts = [f"{job.output.id}, attempt {job.attempt}: {reason}"]
    if said:
        parts[0] += f": {said[-1]}"
    if code == -signal.SIGKILL:
        parts.append("If nobody ended it, the machine ran out of memory: lower resources.micro_batch or processes.")
    if reason == "stalled":
        parts += [
            f"A left-over build lock makes jobs wait for ever; remove it if nothing builds: {p}" for p in build_locks()
        ]
    lines = list(log.tail)[-(120 if reason in ("stalled", "timed out") else TAIL_LINES) :]
    parts += [f"Log: {place}", *(f"  | {line}" for line in lines)]
    return JobFailed("\n".join(parts), code=code, reason=reason)
