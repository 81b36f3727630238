"""Launcher `slurm`: one batch job whose only step runs `rlhf_core.node` on each of its machines.

The job is submitted once and asked after every two seconds by a thread, as Slurm's commands take many seconds while its
controller is down; jobs go on meanwhile, and so does the head. One that Slurm queues again (preemption, `scontrol requeue`, a
node that failed) ends the attempt and stays in the queue: the next attempt finds it by its name, and takes it over if it asks for
the same as it would itself; what else has that name is cancelled. A job's comment says what it was submitted for, who has it
and, if a node cannot run Python there, why: nodes need share no files with us. Credentials travel with `--export=ALL`, which Slurm
keeps in its own state. Not here: several clusters (`--clusters`), an allocation that is there already.
"""

import hashlib
import math
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

from rlhf_core.errors import ConfigError
from rlhf_core.job import JobSpec
from rlhf_core.members import Seat
from rlhf_core.slurm import (
    CANNOT_START,
    HELD,
    NEVER,
    SUBMIT_SECONDS,
    WAITING,
    Mark,
    NoAnswer,
    Refused,
    Seen,
    ask,
    show,
    trouble_of,
)
from rlhf_core.starting import Trouble, node_command
from rlhf_core.store import Store

POLL_SECONDS = 2.0
ENDING_POLL_SECONDS = 1.0  # what a job that is ending will be called then says why it does
OUTAGE_SECONDS = 600.0  # longest wait for a controller that takes no job
HOLD_SECONDS = 5.0  # nodes that end by themselves have told why; whoever reads that comes first
# What describes this process's own part of a job, this machine's devices, and the job in which this may run itself.
NOT_FORWARDED = (
    "RLHF_JOB_ID", "RLHF_GUARD_PID", "RLHF_SCRATCH", "RLHF_RANKS", "RLHF_CACHE*", "RANK", "LOCAL_RANK", "DS_ACCELERATOR",
    "CUDA_VISIBLE_DEVICES", "PREFECT_*", "SLURM_*", "SLURMD_*", "PMI*",
)  # fmt: skip
FORWARDED_ANYWAY = ("SLURM_CONF",)
TELLING = (
    "AWS_ACCESS_KEY_ID",
    "AWS_ENDPOINT_URL",
    "AWS_PROFILE",
    "PYTHONPATH",
)  # no secrets, as all can read a comment
OURS = (
    "--clusters", "-M", "--array", "-a", "--nodes", "-N", "--ntasks", "-n", "--ntasks-per-node", "--job-name", "-J",
    "--comment", "--export", "--wait", "-W", "--wrap", "--test-only", "--parsable",
)  # fmt: skip

SCRIPT = """#!/bin/sh
# One node of the job on each machine. What ends a job reaches this shell too: it waits for the nodes, whose code is its own.
trap : TERM
srun --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 --cpu-bind=none --mpi=none --export=ALL --input=none \\
  /bin/sh -c {node} {arguments}
"""
NODE = """export RLHF_JOB_ID="$(printf '%s/agent-%04d' {job_id} "$SLURM_NODEID")"
said=$("$1" -c {probe} 2>&1) || {{
  last=$(printf '%s' "$said" | tail -n 1 | tr -dc "A-Za-z0-9 ._:/()@'-" | cut -c 1-300)
  scontrol update JobId="$SLURM_JOB_ID" Comment="{mark} ${{SLURMD_NODENAME:-node $SLURM_NODEID}}: $last"
  exit {code}
}}
exec "$@"
"""


# --- what is submitted -----------------------------------------------------------------------------------------------


def job_name(job: JobSpec) -> str:
    """The name of every attempt's job, by which the next one finds it; no slashes, as it may become part of a file's name."""
    return f"rlhf-{job.family.strip('/').replace('/', '-')}"


def python_of(job: JobSpec) -> str:
    """Python's path on the nodes."""
    return job.resources.cluster.python or sys.executable


def script(store: Store, job: JobSpec, mark: Mark) -> str:
    """The batch script: what it needs to know is in it, and no credential is."""
    command = [python_of(job), "-u", *node_command(store, job.output)]
    module = command[command.index("-m") + 1]
    node = NODE.format(
        job_id=shlex.quote(job.job_id), probe=shlex.quote(f"import {module}"), mark=mark, code=CANNOT_START
    )
    return SCRIPT.format(node=shlex.quote(node), arguments=shlex.join(["rlhf-node", *command]))


def options(job: JobSpec, nodes: int) -> list[str]:
    """The options of sbatch; the user's come last, and so are heeded.

    Raises:
        ConfigError: one of the user's is ours to give.
    """
    resources, plan = job.resources, job.resources.cluster.slurm
    for option in plan.options:
        if (option.partition("=")[0] if option.startswith("--") else option[:2]) in OURS:
            raise ConfigError(
                f"resources.cluster.slurm.options: {option!r} is decided here (cluster.nodes, resources.processes, one job of "
                "one cluster for each attempt); take it out"
            )
    named = {"partition": plan.partition, "account": plan.account, "qos": plan.qos, "time": plan.time_limit}
    return [
        "--parsable",
        f"--job-name={job_name(job)}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={resources.processes * (resources.threads or 1)}",
        "--requeue",
        f"--signal=TERM@{math.ceil(resources.checkpoint.grace_seconds) + 10}",  # before the time limit
        "--output=/dev/null",
        "--open-mode=append",
        "--export=ALL",
        *(f"--{name}={value}" for name, value in named.items() if value),
        *plan.options,
    ]


def environment(job: JobSpec) -> dict[str, str]:
    """What sbatch is given and hands on to the nodes."""

    def is_ours(name: str) -> bool:
        return name not in FORWARDED_ANYWAY and any(fnmatchcase(name, pattern) for pattern in NOT_FORWARDED)

    handed_on = {name: value for name, value in os.environ.items() if not is_ours(name)}
    return {**handed_on, **job.resources.cluster.env, "PYTHONSAFEPATH": "1"}


def digest(store: Store, job: JobSpec, nodes: int) -> str:
    """Of all that decides what a job does, whichever attempt submits it."""
    bare = script(store, job.model_copy(update={"job_id": ""}), Mark("", 0, ""))
    env = environment(job)
    told = [f"{name}={env.get(name)}" for name in (*TELLING, *sorted(job.resources.cluster.env))]
    parts = [bare, *options(job, nodes), *told, *sorted(job.left_out)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


# --- the starter -----------------------------------------------------------------------------------------------------


class SlurmStarter:
    """Starts a job's nodes as one Slurm job; see `starting.Starter`."""

    def __init__(self, store: Store, job: JobSpec, seats: Sequence[Seat]) -> None:
        """Raises ConfigError: an option that is not the user's to give."""
        self.store, self.job, self.nodes = store, job, len(seats)
        self.number: str | None = None
        self._options = options(job, self.nodes)
        self._mark = Mark(digest(store, job, self.nodes), 0, job.job_id)
        self._found: queue.SimpleQueue[Trouble] = queue.SimpleQueue()
        self._waits: str | None = "the job is being submitted to Slurm"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="slurm")

    def start(self) -> None:
        """Begin to submit the job, or to take over the one that an earlier attempt has left in the queue."""
        self._thread.start()

    def look(self) -> list[Trouble]:
        """What has become of the job, once."""
        return [self._found.get() for _ in range(self._found.qsize())]

    def waits(self) -> str | None:
        """The job's state in the queue, as long as it does not run."""
        return self._waits

    def stop(self) -> None:
        """Cancel the job, unless it was queued again or somebody else has it; returns within seconds."""
        self._over.set()
        if self.number is None and self._thread.ident is not None:
            self._thread.join(SUBMIT_SECONDS)  # what it is submitting would be nobody's
        try:
            for number in [self.number] if self.number else self._named():
                seen = show(number)
                if seen and self._is_ours(number, seen) and not self._is_kept(seen):
                    self._cancel(number)
        except Refused:
            pass  # there is no Slurm here, so nothing was submitted
        except NoAnswer as error:
            job = f"job {self.number}" if self.number else f"a job named {job_name(self.job)}"
            self._say(f"Slurm does not answer ({error}): {job} may be left; its nodes end by themselves; else: scancel")

    def _is_ours(self, number: str, seen: Seen) -> bool:
        if seen.mark and not seen.said:  # a node that cannot start repeats the mark that was submitted
            return seen.mark.holder == self.job.job_id
        return number == self.number

    def _is_kept(self, seen: Seen) -> bool:
        return seen.restarts > self._mark.restarts and not HELD.search(seen.reason)

    # --- in the thread -----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        try:
            if self._obtain():
                self._watch()
        except Refused as error:
            self._found.put(Trouble("configuration", self._refusal(str(error))))
        except Exception as error:  # a thread that ends without a word would leave the head waiting
            self._found.put(Trouble("launcher", f"Slurm: {type(error).__name__}: {error}"))

    def _refusal(self, words: str) -> str:
        plan = self.job.resources.cluster.slurm
        given = {"partition": plan.partition, "account": plan.account, "qos": plan.qos, "time_limit": plan.time_limit}
        asked = ", ".join(f"slurm.{k} {v}" for k, v in given.items() if v)
        return f"Slurm refuses the job: {words}; correct resources.cluster (nodes {self.nodes}{asked and ', '}{asked})"

    def _obtain(self) -> bool:
        """Take over or submit; tries for as long as the controller may be away. False: stopped, or given up."""
        until = time.monotonic() + OUTAGE_SECONDS
        while not self._over.is_set():
            try:
                # First, also after an sbatch that got no answer: its job may be there.
                self.number = self._take_over() or self._submit()
                return True
            except NoAnswer as error:
                self._waits = f"Slurm does not answer: {error}"
                if time.monotonic() > until:
                    limit = f"{OUTAGE_SECONDS / 60:.0f} minutes"
                    self._found.put(Trouble("launcher", f"Slurm has not taken the job for {limit}: {error}"))
                    return False
            self._over.wait(POLL_SECONDS)
        return False

    def _named(self) -> list[str]:
        """Numbers of this user's jobs with exactly this job's name."""
        mine = (f"--user={os.getuid()}", f"--name={job_name(self.job)}")
        return ask("squeue", "--noheader", *mine, "--format=%A").split()

    def _take_over(self) -> str | None:
        taken = None
        for number in self._named():
            seen = show(number)
            if taken is None and seen and self._fits(seen) and self._take(number, seen.restarts):
                taken = number
                self._say(f"Slurm job {number} of an earlier attempt is taken over")
            elif seen and seen.state != "COMPLETING":
                self._cancel(number)
                self._say(f"Slurm job {number} of an earlier attempt is cancelled")
        return taken

    def _take(self, number: str, restarts: int) -> bool:
        mark = Mark(self._mark.digest, restarts, self.job.job_id)
        try:
            ask("scontrol", "update", f"JobId={number}", f"Comment={mark}")
        except Refused:
            return False  # it has just ended, or may not be changed
        self._mark = mark
        return True

    def _cancel(self, number: str) -> None:
        with suppress(Refused):  # it has just ended
            ask("scancel", number)

    def _fits(self, seen: Seen) -> bool:
        """Whether a job is what we would submit, and its nodes have not served an earlier attempt since it was queued."""
        if not seen.mark or seen.mark.digest != self._mark.digest or seen.said or HELD.search(seen.reason):
            return False
        fresh = seen.state == "PENDING" or seen.restarts > seen.mark.restarts
        return fresh or seen.mark.holder == self.job.job_id

    def _submit(self) -> str:
        text = script(self.store, self.job, self._mark)
        given = [f"--comment={self._mark}", *self._left_out(), *self._options]
        answer = ask("sbatch", *given, text=text, env=environment(self.job))
        number = answer.splitlines()[-1].partition(";")[0]
        self._say(f"Slurm job {number} is submitted: {self.nodes} nodes")
        return number

    def _left_out(self) -> list[str]:
        """Nodes on which the job has failed before, as far as Slurm has nodes of these names."""
        if not self.job.left_out:
            return []
        names = set(ask("sinfo", "--noheader", "--Node", "--format=%N").split())
        found = sorted(names & {host.partition(".")[0] for host in self.job.left_out})
        return [f"--exclude={','.join(found)}"] if found else []

    def _watch(self) -> None:
        """Ask after the job until it is over, or until we are."""
        assert self.number
        told = never = False
        over_since = None
        while not self._over.is_set():
            try:
                seen = show(self.number)
            except NoAnswer as error:
                if self._waits:
                    self._waits = f"Slurm does not answer: {error}"
                self._over.wait(POLL_SECONDS)
                continue
            if seen is None:
                self._found.put(Trouble("launcher", f"Slurm knows nothing of job {self.number} any more"))
                return
            self._waits = self._why(seen)
            self._hurry(seen)
            trouble = trouble_of(self.number, seen, self._mark.restarts, python_of(self.job))
            if trouble and seen.state in ("COMPLETED", "FAILED") and trouble.kind != "configuration":
                over_since = over_since or time.monotonic()
                trouble = trouble if time.monotonic() - over_since > HOLD_SECONDS else None
            elif trouble and NEVER.search(seen.reason) and not never:
                never, trouble = True, None  # it may say so for a moment; the next look tells
            if trouble and not told:
                told = True
                self._found.put(trouble)
            self._over.wait(ENDING_POLL_SECONDS if seen.state == "COMPLETING" else POLL_SECONDS)

    def _why(self, seen: Seen) -> str | None:
        if seen.state not in WAITING:
            return None
        reason = "" if seen.reason in ("", "None") else f" ({seen.reason})"
        return f"Slurm job {self.number} is {seen.state}{reason}"

    def _hurry(self, seen: Seen) -> None:
        """A job that was queued again is let wait two minutes by Slurm, which no new one would have to."""
        if seen.state == "PENDING" and seen.reason == "BeginTime" and seen.restarts == self._mark.restarts > 0:
            with suppress(Refused, NoAnswer):  # then it waits
                ask("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def _say(self, line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
