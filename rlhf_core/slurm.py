"""A Slurm job as the head of a job sees it: Slurm's commands, what they say of a job, and what that means.

`scontrol show job` is asked, as every installation has it, without accounting. The first word of a job's comment is a `Mark`: what
it was submitted for and which attempt has it; what follows are the last words of a node whose Python cannot run us. Not here:
submitting, watching and cancelling (`start_slurm`).
"""

import re
import subprocess
from dataclasses import dataclass

from rlhf_core.errors import ExitCode
from rlhf_core.starting import Trouble

COMMAND_SECONDS = 15.0
SUBMIT_SECONDS = 40.0  # for sbatch, as a job that it has submitted after all would be nobody's
CANNOT_START = 78  # a node's code if its Python cannot run us
MARK = "rlhf"
NO_ANSWER = re.compile(
    r"unable to contact|timed out|zero bytes|connection refused|(send|receive|connection|shutdown) failure|temporarily|standby"
    r"|authentication|munge",
    re.IGNORECASE,
)
NEVER = re.compile(
    r"PartitionNodeLimit|PartitionTimeLimit|BadConstraints|InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed|PerJob"
)
HELD = re.compile(r"launch.failed|JobHoldMaxRequeue", re.IGNORECASE)
HALTED = ("SUSPENDED", "STOPPED")
WAITING = ("PENDING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "STAGE_OUT", *HALTED)


class NoAnswer(Exception):
    """Slurm's controller cannot be asked now."""


class Refused(Exception):
    """Slurm has answered, and said no."""


@dataclass(frozen=True)
class Mark:
    """What the first word of a job's comment says.

    Attributes:
        digest: of what it was submitted for.
        restarts: how often it had been queued again when its holder took it.
        holder: job id of the attempt that has it.
    """

    digest: str
    restarts: int
    holder: str

    def __str__(self) -> str:
        return f"{MARK}:{self.digest}:{self.restarts}:{self.holder}"


@dataclass(frozen=True)
class Seen:
    """What Slurm says of a job.

    Attributes:
        state: as squeue names it, e.g. RUNNING.
        reason: why it is pending, or has ended.
        restarts: how often it was queued again.
        code: exit code of its script.
        preempted: it is told to end, for a job that is worth more.
        ran: how long, as H:M:S.
        limit: how long it may, in the same form.
        nodes: names of its nodes, in Slurm's form.
        mark: None if the job's comment is none of ours.
        said: a node's last words, if it cannot run our Python.
    """

    state: str
    reason: str
    restarts: int = 0
    code: int = 0
    preempted: bool = False
    ran: str = ""
    limit: str = ""
    nodes: str = ""
    mark: Mark | None = None
    said: str = ""


def ask(*command: str, text: str = "", env: dict[str, str] | None = None) -> str:
    """Run one of Slurm's commands, with `text` as its input, and return what it says.

    Raises:
        NoAnswer: the controller could not be asked.
        Refused: with the command's own words.
    """
    limit = SUBMIT_SECONDS if command[0] == "sbatch" else COMMAND_SECONDS
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=limit, env=env)
    except FileNotFoundError:
        raise Refused(
            f"there is no {command[0]} on this machine; install Slurm's commands, or submit elsewhere"
        ) from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]} has not ended after {limit:.0f} s") from None
    if done.returncode == 0:
        return done.stdout.strip()
    said = (line.strip().removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in done.stderr.splitlines())
    words = "; ".join(dict.fromkeys(filter(None, said))) or f"{command[0]} ended with code {done.returncode}"
    raise (NoAnswer if done.returncode < 0 or NO_ANSWER.search(words) else Refused)(words)


def show(number: str) -> Seen | None:
    """What Slurm knows of a job; None if it knows none of that number (any more). Raises NoAnswer."""
    try:
        return parse(ask("scontrol", "--oneliner", "show", "job", number))
    except Refused:
        return None


def parse(text: str) -> Seen:
    """The line of `scontrol --oneliner show job`."""

    def field(name: str) -> str:
        found = re.search(rf"(?:^| ){name}=(\S*)", text)
        return found[1] if found else ""

    comment = re.search(rf" Comment={MARK}:(\w+):(\d+):(\S+)( [^=]*(?=\s\w+=)| [^=]*$)?", text)
    return Seen(
        state=field("JobState"),
        reason=field("Reason").replace("_", " "),
        restarts=int(field("Restarts") or 0),
        code=int(field("ExitCode").partition(":")[0] or 0),
        preempted=field("PreemptTime") not in ("", "None"),
        ran=field("RunTime"),
        limit=field("TimeLimit"),
        nodes=field("NodeList"),
        mark=Mark(comment[1], int(comment[2]), comment[3]) if comment else None,
        said=(comment[4] or "").strip() if comment else "",
    )


def trouble_of(number: str, seen: Seen, restarts: int, python: str) -> Trouble | None:
    """What a job's state means for the attempt that has it; None: it waits or runs.

    Args:
        number: the job's.
        seen: what Slurm says of it.
        restarts: how often it had been queued again when this attempt took it.
        python: the interpreter on its nodes, for messages.
    """
    job, why = f"Slurm job {number}", "" if seen.reason in ("", "None") else f" ({seen.reason})"
    if seen.said or seen.code == CANNOT_START:
        said = seen.said or "see what it says there"
        remedy = "install this package there from the same source, or name an interpreter that has it"
        return Trouble("configuration", f"{said}: {python} cannot run this package; {remedy}: resources.cluster.python")
    if seen.state == "PENDING" and HELD.search(seen.reason):
        return Trouble("launcher", f"{job} could not be launched and is held{why}; it is given up")
    if seen.restarts > restarts:
        return Trouble(
            "preempted", f"{job} was queued again: preempted, requeued by somebody, or a node of it has failed"
        )
    if seen.state == "PENDING" and NEVER.search(seen.reason):
        return Trouble("configuration", f"{job} can never start{why}; correct resources.cluster (nodes, slurm)")
    if seen.state == "CANCELLED" and not seen.preempted:
        return Trouble("configuration", f"{job} was cancelled by somebody (scancel); start the run again to go on")
    if seen.state in HALTED:
        return Trouble("preempted", f"{job} was halted by the scheduler{why}; ranks cannot be halted, they begin again")
    if seen.state in ("TIMEOUT", "DEADLINE"):
        return Trouble(
            "timed out", f"{job} has reached its time limit of {seen.limit} (resources.cluster.slurm.time_limit)"
        )
    if seen.preempted or seen.state == "PREEMPTED":
        return Trouble("preempted", f"{job} is preempted: its nodes are wanted for another job")
    if seen.state in ("COMPLETED", "FAILED") and seen.code == ExitCode.PREEMPTED:
        return Trouble("preempted", f"{job} was told to end after {seen.ran} of {seen.limit}")
    if seen.state == "OUT_OF_MEMORY":
        return Trouble(
            "launcher", f"{job} got more memory than it may (OUT_OF_MEMORY); ask for more: {_option('--mem=0')}"
        )
    if seen.state in (*WAITING, "RUNNING", "SIGNALING", "RESIZING", ""):
        return None
    output = _option("--output=rlhf-%j.out")
    return Trouble(
        "launcher",
        f"{job} has ended: {seen.state}{why}, exit code {seen.code}, after {seen.ran} on {seen.nodes}; to see what its nodes "
        f"say, add {output}",
    )


def _option(option: str) -> str:
    return f"{option} to resources.cluster.slurm.options"
