"""What a launcher of several nodes has to do: start `rlhf_core.node` on each of them. The rest is alike for all (`head`, `node`).

`start_ssh` runs one ssh a node, `start_slurm` one batch job, `start_nodes` waits for nodes that somebody else starts. The
command is the same for every attempt at an artifact: a node serves the newest attempt that is not over.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.job import JobSpec
from rlhf_core.members import Seat
from rlhf_core.store import Store


@dataclass(frozen=True)
class Trouble:
    """A node that could not be started, or that was lost by what holds it.

    Attributes:
        kind: "configuration": trying again cannot help; "launcher": it may; "preempted": the scheduler took the nodes away.
        message: for people: which node, what, the remedy.
        node: whose; None: all nodes'.
    """

    kind: Literal["configuration", "launcher", "preempted", "timed out"]
    message: str
    node: int | None = None


class Starter(Protocol):
    """One way to start a job's nodes. Made with the store, the job and the seats; used by the head alone, in one thread."""

    def start(self) -> None:
        """Begin to start the nodes; does not wait for them."""
        ...

    def look(self) -> list[Trouble]:
        """What went wrong since the last look; called several times a second, so it must be quick."""
        ...

    def waits(self) -> str | None:
        """Why nodes cannot have come yet, e.g. "Slurm job 12 is PENDING (Resources)"; None: they should be on their way."""
        ...

    def stop(self) -> None:
        """End what was started and is left; nodes have been told, or are lost. Called in any case, also after errors."""
        ...


def node_command(store: Store, ref: ArtifactRef, node: int | None = None, attached: bool = False) -> list[str]:
    """The arguments behind the interpreter that make a process a node of an artifact's jobs.

    Args:
        store: of the job.
        ref: the artifact; the node serves its newest attempt that is not over.
        node: its number; None: the one of SLURM_NODEID.
        attached: standard input is held by who starts it, and its end is the node's; its first line is a JSON object of
            environment variables.
    """
    number = [] if node is None else ["--node", str(node)]
    return [
        "-m",
        "rlhf_core.node",
        "--artifact",
        f"{store.url}#{ref.id}",
        *number,
        *(["--attached"] if attached else []),
    ]


def agent_id(job: JobSpec, node: int) -> str:
    """RLHF_JOB_ID of the process `rlhf_core.node`: of the job's family, but not what its own guard would end."""
    return f"{job.job_id}/agent-{node:04d}"


def node_id(job: JobSpec, node: int) -> str:
    """RLHF_JOB_ID of a node's guard and ranks: unlike those of other nodes, which may share a machine in small set-ups."""
    return f"{job.job_id}/node-{node:04d}"


def seats_of(names: list[str], processes: int) -> tuple[Seat, ...]:
    """The seats of nodes that each run so many ranks, numbered in this order."""
    return tuple(Seat(node=n, host=name, processes=processes, first_rank=n * processes) for n, name in enumerate(names))
