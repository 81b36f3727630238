"""Why an attempt has failed, concluded from how its ranks, its nodes and its launcher ended; and what follows from it.

When one rank of many fails, all fail: the others' collectives break, the launcher ends whoever is left, and each says something.
`conclude` looks for the one that began it: a rank that a signal took, else the earliest error that is neither a neighbour's
("Connection closed by peer") nor that of a rank which was told to end. `RULES` says of each kind of failure what people are
told, whether another attempt may help, and whether on the same nodes. What the kernel kills for want of memory looks like any
other SIGKILL, so its own count (`oom_kills`) is compared before and after. Not here: starting again, and with what (`tasks`).
"""

import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rlhf_core import guard
from rlhf_core.ends import Failure, Kind, NodeEnd, RankEnd
from rlhf_core.errors import ExitCode

CGROUPS = Path("/sys/fs/cgroup")
SAID = re.compile(r"(?:\[\d+\] )?error: (.*)")

# What torch says on a rank whose peers went away; the first alternative are classes of torch.distributed's errors.
NEIGHBOURS = re.compile(
    r"^Dist(?:Backend|Network|Store)?Error:"
    r"|\bgloo\b.*(?:closed|reset|refused|pipe|timed out|connectFullMesh)"
    r"|failed to pass monitoredBarrier|Did the remote server shutdown or crash"
    r"|NCCL.*(?:remote|unhandled system error|aborted|watchdog|timeout)|ncclRemoteError|ncclSystemError"
    r"|remote process exited or there was a network error|Socket Timeout|Watchdog caught collective operation timeout"
    r"|c10::Dist\w*Error"
    r"|its own message tells why",  # a rank of ours that waited for another in vain
    re.IGNORECASE,
)
OWN = re.compile(r"EADDRINUSE|failed to (?:listen|bind)", re.IGNORECASE)  # one of those classes too, but the cause


class Rule(NamedTuple):
    """What follows from one kind of failure.

    Attributes:
        remedy: what people are told to do; "" where the error says it.
        retry: whether another attempt may help.
        same_nodes: whether it may run on the same nodes.
    """

    remedy: str
    retry: bool
    same_nodes: bool = True


RULES: Mapping[Kind, Rule] = {
    "crashed": Rule("", retry=True, same_nodes=False),
    "killed": Rule(
        "If nobody ended it, the machine ran out of memory: lower resources.micro_batch or processes.",
        retry=True,
        same_nodes=False,
    ),
    "out of memory": Rule(
        "Lower resources.micro_batch or rollout_micro_batch, which changes no result; raise zero_stage; or offload.",
        retry=True,
    ),
    "stalled": Rule(
        "The stacks in the log show where each rank was. If it only needed longer, raise resources.stall_minutes.",
        retry=True,
    ),
    "timed out": Rule("It goes on from its last checkpoint; raise resources.timeout_hours.", retry=True),
    "unreachable": Rule("See to the node, or leave it out by resources.cluster.exclude.", retry=True, same_nodes=False),
    "no result": Rule("Something ended its processes without an error; look at the end of the log.", retry=True),
    "preempted": Rule("It goes on from what it has saved.", retry=True, same_nodes=False),
    "superseded": Rule("Wait for the run that has taken over.", retry=False),
    "configuration": Rule("", retry=False),
    "data": Rule("", retry=False),
    "non-finite numbers": Rule(
        "Lower optim.lr, or raise the precision; the same attempt would end the same.", retry=False
    ),
    "launcher": Rule("", retry=True, same_nodes=False),
}

LIMITS: Mapping[Kind, str] = {
    "stalled": "no progress for longer than resources.stall_minutes",
    "timed out": "ran for longer than resources.timeout_hours",
    "superseded": "another run has taken over",
}
CODES: Mapping[int, Kind] = {
    ExitCode.CONFIG: "configuration",
    ExitCode.DATA: "data",
    ExitCode.NON_FINITE: "non-finite numbers",
    ExitCode.OUT_OF_MEMORY: "out of memory",
    ExitCode.PREEMPTED: "preempted",
}
NO_MEMORY = "ended by the kernel, as the host (or its cgroup) had no memory left"
DETAILS: Mapping[int, str] = {
    ExitCode.OUT_OF_MEMORY: "on the device",
    ExitCode.PREEMPTED: "told to end, and saved",
    guard.ORPHANED: "the launcher ended before its ranks",
    guard.NOT_STARTED: "the launcher could not be started",
}


class _Node(NamedTuple):
    """A node's end, and which node it was."""

    host: str | None
    number: int | None
    end: NodeEnd


class _Rank(NamedTuple):
    """A rank's end, and its node."""

    node: _Node
    end: RankEnd


def conclude(nodes: Sequence[tuple[str | None, NodeEnd]], code: int, limit: Kind | None = None) -> Failure:
    """Why an attempt has failed.

    Args:
        nodes: host (None: this machine alone) and end of each node, in the order of their numbers.
        code: exit code of the attempt; 0 means that there is no result all the same.
        limit: the limit that it had passed and was ended for.
    """
    if limit is not None:
        return Failure(kind=limit, code=code, detail=LIMITS[limit])
    if code == 0:
        return Failure(kind="no result", code=1, detail="exit code 0, and no result.json")
    places = [_Node(host, number if host is not None else None, end) for number, (host, end) in enumerate(nodes)]
    ended = [_Rank(node, end) for node in places for end in node.end.ranks if end.code]
    ended.sort(key=lambda rank: (rank.end.time, rank.end.rank))
    told = [rank for rank in ended if rank.end.told]
    others = [rank for rank in ended if not rank.end.told and is_neighbours(rank.end)]
    own = [rank for rank in ended if not rank.end.told and rank not in others]
    silent = [node for node in places if node.end.silent]
    kills = sum(node.end.oom_kills for node in places)
    # launch.py's code is that of the first rank which it found ended, and it ends the others only then.
    if taken := [node for node in silent if taken_by(node.end.code)]:
        return _silent(taken[0])
    if own:
        return _of_rank(own[0], kills)
    if saved := [rank for rank in told if rank.end.code == ExitCode.PREEMPTED]:
        return _of_rank(saved[0])
    if held := next(filter(None, map(_launcher, places)), None):
        return held
    if silent and (others or kills):
        return _silent(next((node for node in silent if node.end.oom_kills), silent[0]))
    if others:
        return _of_rank(others[0], kills)
    return _by_code(places, code, told)


def is_neighbours(end: RankEnd) -> bool:
    """Whether a rank's error only says that another one, or its machine, went away or never came."""
    return not end.memory and bool(NEIGHBOURS.search(end.error)) and not OWN.search(end.error)


def taken_by(code: int) -> int | None:
    """The signal that took a rank, from the code of DeepSpeed's launch.py (256-n); not SIGTERM, which ranks are told by."""
    signo = 256 - code
    return signo if 1 < signo <= 31 and signo != signal.SIGTERM else None  # 255 is what many tools return for "failed"


def signal_of(code: int) -> int | None:
    """The signal an exit code stands for: -n from Python, 128+n from the guard, 256-n from DeepSpeed's launch.py."""
    for candidate in (-code, code - 128, 256 - code):
        if 0 < candidate <= 31 and code != 255:
            return candidate
    return None


def _of_rank(rank: _Rank, kills: int = 0) -> Failure:
    """The failure that a rank's last words tell."""
    node, end = rank
    kind: Kind = "out of memory" if end.memory else CODES.get(end.code, "crashed")
    detail = end.error or f"exit code {end.code}"
    if kills and not end.memory:
        detail += f"; meanwhile the kernel killed {kills} of the job's processes for want of memory"
    return Failure(
        kind=kind,
        code=ExitCode.OUT_OF_MEMORY if end.memory else end.code,
        host=node.host,
        node=node.number,
        rank=end.rank,
        detail=detail,
        trace=end.trace,
    )


def _silent(node: _Node) -> Failure:
    """The failure of ranks that ended without a word."""
    ranks, signo = list(node.end.silent), taken_by(node.end.code)
    which = f"ranks {', '.join(map(str, ranks))}: " if len(ranks) > 1 else ""
    kind: Kind = "killed"
    if node.end.oom_kills and signo in (None, signal.SIGKILL):
        kind, code, how = "out of memory", int(ExitCode.OUT_OF_MEMORY), NO_MEMORY
    elif signo is None:
        code, how = node.end.code, "ended without a word, and other ranks lost it"
    else:
        code, how = -signo, f"ended by {signal.Signals(signo).name}"
    return Failure(kind=kind, code=code, host=node.host, node=node.number, rank=ranks[0], detail=which + how)


def _launcher(node: _Node) -> Failure | None:
    """The failure of what started or held a node's ranks, if it was that."""
    code = node.end.code
    if code in (guard.ORPHANED, guard.NOT_STARTED):
        return Failure(kind="launcher", code=code, host=node.host, node=node.number, detail=DETAILS[code])
    signo = -code if code < 0 else code - 128
    if not 0 < signo <= 31 or (code > 0 and signo in guard.STOP_SIGNALS):  # a guard's code when it was told to end
        return None
    kind: Kind = "launcher"
    what = "its guard was" if code < 0 else "the launcher was"
    code, detail = -signo, f"{what} killed by {signal.Signals(signo).name}"
    if node.end.oom_kills and signo == signal.SIGKILL:
        kind, code, detail = "out of memory", int(ExitCode.OUT_OF_MEMORY), f"{what} {NO_MEMORY}"
    return Failure(kind=kind, code=code, host=node.host, node=node.number, detail=detail)


def _by_code(nodes: Sequence[_Node], code: int, told: Sequence[_Rank]) -> Failure:
    """What the exit code alone tells, with the line that begins with "error: " if somebody has printed one."""
    said = [match[1] for node in nodes for line in node.end.tail if (match := SAID.fullmatch(line))]
    kills, signo = sum(node.end.oom_kills for node in nodes), signal_of(code)
    kind: Kind = CODES.get(code, "crashed")
    detail = said[-1] if said else DETAILS.get(code, f"exit code {code}")
    if code not in CODES and signo == signal.SIGKILL and kills:
        kind, code, detail = "out of memory", int(ExitCode.OUT_OF_MEMORY), NO_MEMORY
    elif code not in CODES and signo is not None:
        kind, code, detail = "killed", -signo, f"ended by {signal.Signals(signo).name}"
    first = told[0] if told else None
    return Failure(
        kind=kind,
        code=code,
        host=first.node.host if first else None,
        node=first.node.number if first else None,
        rank=first.end.rank if first else None,
        detail=detail,
    )


# --- the kernel's count ----------------------------------------------------------------------------------------------


def oom_kills(groups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Processes that the kernel has killed so far for want of memory: in our cgroup, else on this machine.

    Args:
        groups: where cgroups are mounted.
        own: which ones this process is in.
    """
    for file in _counters(groups, own):
        if (count := _count(file)) is not None:
            return count
    return _count(Path("/proc/vmstat")) or 0


def _counters(groups: Path, own: Path) -> Iterator[Path]:
    """Files that may hold the count, from our cgroup upwards: in containers it often lies where the mount begins."""
    lines: list[str] = []
    with suppress(OSError):
        lines = own.read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            root, name = groups / "memory", "memory.oom_control"
        elif not controllers:
            root, name = groups, "memory.events"
        else:
            continue
        folder = root / path.lstrip("/")
        yield folder / name
        for parent in folder.parents:
            if not parent.is_relative_to(root):
                break
            yield parent / name


def _count(file: Path) -> int | None:
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, number = line.partition(" ")
            if name == "oom_kill":
                return int(number)
    return None
