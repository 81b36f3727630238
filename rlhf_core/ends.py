"""How processes of a job ended, as records: what ranks, nodes and whole attempts say of their end.

A rank writes a `RankEnd` into its job's local folder before it goes, if it still can; a node adds what it saw itself, and the
attempt's `failure.json` is what was concluded (`failures`). Plain data, so that it travels through the store.
"""

from typing import Literal

from pydantic import Field

from rlhf_core.spec_base import Frozen

Kind = Literal[
    "crashed",  # a rank raised, or ended with a code of its own
    "killed",  # by a signal that nobody of ours sent
    "out of memory",  # on the device, or by the kernel on the host
    "stalled",  # no progress for stall_minutes
    "timed out",  # longer than timeout_hours
    "unreachable",  # a node was not heard of any more
    "no result",  # exit code 0, and no result.json
    "preempted",  # told to end, and saved
    "superseded",  # another run took over
    "configuration",
    "data",
    "non-finite numbers",
    "launcher",  # what starts or holds the processes failed: ssh, Slurm, guard, launch.py
]


class RankEnd(Frozen):
    """The last words of one rank."""

    rank: int
    time: float = Field(description="seconds since the epoch, on the node's clock")
    code: int = Field(description="exit code it is about to end with; negative: by that signal")
    told: bool = Field(default=False, description="it was ended because another rank had ended, or the job was to")
    error: str = Field(default="", description="the exception in one line")
    trace: str = Field(default="", description="its traceback")
    memory: Literal["", "device", "host"] = Field(default="", description="what it ran out of")


class NodeEnd(Frozen):
    """What one node says of its part of an attempt."""

    code: int = Field(description="exit code of its guard")
    oom_kills: int = Field(default=0, description="processes the kernel killed for memory meanwhile, in our cgroup")
    ranks: tuple[RankEnd, ...] = ()
    silent: tuple[int, ...] = Field(default=(), description="ranks that were started and ended without a word")
    tail: tuple[str, ...] = Field(default=(), description="last lines of its launcher, for want of anything better")


class Failure(Frozen):
    """Why an attempt has failed: what people are told, and what is tried next."""

    kind: Kind
    code: int = Field(description="exit code of the attempt (errors.ExitCode and others)")
    host: str | None = Field(default=None, description="the node it began on, if on one")
    node: int | None = None
    rank: int | None = None
    detail: str = Field(description="one line: what happened")
    trace: str = Field(default="", description="the first failing rank's traceback")
