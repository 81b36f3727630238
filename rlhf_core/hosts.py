"""Seats: which machines a job's ranks get, from a DeepSpeed hostfile or a list of hosts.

What people write is read as DeepSpeed reads it (`NAME slots=N`, include and exclude as `node1@node2:0,2`) and checked against
`resources.processes`, which is the same on every node. Hosts that have failed are left out as long as enough remain, and only so
many take part that the batch divides among their ranks. Nothing here connects to anything; of Slurm and of nodes that somebody
else starts only the number is known beforehand.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_core.cluster import HOST_NAME, Cluster
from rlhf_core.errors import ConfigError
from rlhf_core.members import Seat
from rlhf_core.resources import Resources
from rlhf_core.spec_base import StageName

LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")
BATCHES: dict[StageName, str] = {
    "sft": "sft.batch_size",
    "reward": "reward.batch_size",
    "dpo": "dpo.batch_size",
    "ppo": "ppo.rollout_batch_size / ppo.minibatches",
}
FEWER = "lower resources.processes, give the host more slots or leave it out (resources.cluster.exclude)"


@dataclass(frozen=True)
class Machine:
    """One host that may take part.

    Attributes:
        host: as ssh takes it.
        slots: numbers of the devices it offers.
        chosen: whether include or exclude named these, so that they are not just the first ones.
        env: environment of its processes alone.
    """

    host: str
    slots: tuple[int, ...]
    chosen: bool
    env: Mapping[str, str]

    @property
    def name(self) -> str:
        """The host without a user's name, as include and exclude give it."""
        return self.host.rpartition("@")[2]


def seats(
    resources: Resources, batch: int | None = None, left_out: Collection[str] = (), field: str = "the batch"
) -> tuple[Seat, ...]:
    """The nodes of a job and the ranks of each.

    Args:
        resources: of its stage.
        batch: sequences that one optimizer step divides among all ranks; None: whatever.
        left_out: hosts that are not to take part, if `cluster.min_nodes` others remain.
        field: what gives the batch, for messages.

    Raises:
        ConfigError: the hostfile cannot be read, or hosts, slots, nodes and batch do not go together.
    """
    if resources.launcher == "local":
        if batch is not None and batch % resources.processes:
            raise _indivisible(field, batch, resources.processes, resources.processes)
        return (Seat(node=0, host="localhost", processes=resources.processes, first_rank=0),)
    found = machines(resources)
    taken = _take(found, resources, batch, left_out, field)
    return tuple(_seat(node, machine, resources.processes) for node, machine in enumerate(taken))


def world(resources: Resources) -> int:
    """Ranks of a job when all its nodes take part; raises as `seats`."""
    return sum(seat.processes for seat in seats(resources))


def is_known(resources: Resources) -> bool:
    """Whether the configuration alone says which nodes there are, without a hostfile."""
    return not isinstance(resources.cluster.hosts, str)


def is_unnamed(seat: Seat) -> bool:
    """Whether a seat's host is only a number so far: which node that is the node itself says."""
    return seat.host == _unnamed(seat.node)


def batch_of(stage: StageName, spec: Mapping[str, Any]) -> int | None:
    """The sequences that one optimizer step of a stage divides among all ranks; None if it has no such steps."""
    if stage not in BATCHES:
        return None
    if stage == "ppo":
        return int(spec["rollout_batch_size"]) // int(spec["minibatches"])
    return int(spec["batch_size"])


def machines(resources: Resources) -> list[Machine]:
    """The hosts that may take part, in their order; raises as `seats`."""
    cluster = resources.cluster
    if resources.launcher in ("slurm", "nodes"):
        assert cluster.nodes is not None, "Resources makes sure of it"
        every = tuple(range(resources.processes))
        return [Machine(_unnamed(n), every, False, {}) for n in range(cluster.nodes)]
    if isinstance(cluster.hosts, str):
        where, found = cluster.hosts, read_hostfile(cluster.hosts)
    else:
        where = "resources.cluster.hosts"
        listed = cluster.hosts or ()
        found = [Machine(h.host, tuple(range(h.slots or resources.processes)), False, h.env) for h in listed]
        if double := _double([machine.name for machine in found]):
            raise ConfigError(f"{where}: the host {double!r} is there twice; keep one, with all its slots")
    found = _select(found, cluster, where)
    for machine in found:
        if len(machine.slots) < resources.processes:
            left = " after include and exclude" if machine.chosen else ""
            raise ConfigError(
                f"{where}: {machine.host} has {len(machine.slots)} slots{left}, and resources.processes is "
                f"{resources.processes} on every node; {FEWER}"
            )
    return found


def read_hostfile(path: str) -> list[Machine]:
    """The hosts of a DeepSpeed hostfile; ConfigError names the line that is wrong."""
    file = Path(path).expanduser()
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"resources.cluster.hosts: the hostfile {path!r} cannot be read (looked for {file.absolute()}): {error}; "
            "name a file with a line `NAME slots=N` for each host"
        ) from None
    found: dict[str, Machine] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = LINE.fullmatch(text)
        if not match or not re.fullmatch(HOST_NAME, match[1]) or int(match[2]) < 1:
            raise ConfigError(f"{path}:{number}: {text!r}: write NAME slots=N, e.g. `node1 slots=8`")
        machine = Machine(match[1], tuple(range(int(match[2]))), False, {})
        if machine.name in found:
            raise ConfigError(
                f"{path}:{number}: the host {machine.name!r} is there twice; keep one line, with all its slots"
            )
        found[machine.name] = machine
    if not found:
        raise ConfigError(f"{path}: names no host; write a line `NAME slots=N` for each")
    return list(found.values())


def parse_selection(text: str, field: str) -> dict[str, tuple[int, ...]]:
    """Slots by host of `node1@node2:0,2`; no slots: all of them."""
    chosen: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, colon, numbers = part.strip().partition(":")
        if not name or (colon and not re.fullmatch(r"\d+(,\d+)*", numbers)):
            raise ConfigError(f"{field}: {text!r}: write HOST or HOST:SLOT,SLOT, joined by @, e.g. node1@node2:0,2")
        slots = (int(number) for number in numbers.split(",")) if colon else ()
        chosen[name] = tuple(sorted({*chosen.get(name, ()), *slots}))
    return chosen


def _select(found: list[Machine], cluster: Cluster, where: str) -> list[Machine]:
    """What include or exclude leaves."""
    text = cluster.include or cluster.exclude
    if not text:
        return found
    field = "resources.cluster.include" if cluster.include else "resources.cluster.exclude"
    chosen = parse_selection(text, field)
    known = {machine.name: machine for machine in found}
    for name, slots in chosen.items():
        if name not in known:
            raise ConfigError(
                f"{field}: {name!r} is not among the hosts of {where}: {', '.join(known)}; write one of these names, "
                "without a user"
            )
        if strange := sorted(set(slots) - set(known[name].slots)):
            raise ConfigError(
                f"{field}: {name} has no slot {strange[0]}; it has {len(known[name].slots)}, counted from 0"
            )
    kept = [_narrow(machine, chosen.get(machine.name), bool(cluster.include)) for machine in found]
    left = [machine for machine in kept if machine.slots]
    if not left:
        raise ConfigError(f"{field}: {text!r} leaves no host of {where}; it has {', '.join(known)}")
    return left


def _narrow(machine: Machine, named: tuple[int, ...] | None, include: bool) -> Machine:
    """A host with the slots that are left of it; `named`: those that include or exclude gives, empty for all."""
    if named is None:
        return replace(machine, slots=()) if include else machine
    if not named:
        return machine if include else replace(machine, slots=())
    slots = tuple(slot for slot in machine.slots if (slot in named) == include)
    return replace(machine, slots=slots, chosen=True)


def _take(
    found: list[Machine], resources: Resources, batch: int | None, left_out: Collection[str], field: str
) -> list[Machine]:
    """The hosts that take part: as many as the batch allows, those that are left out only if it needs them."""
    cluster, processes = resources.cluster, resources.processes
    most = cluster.nodes or len(found)
    least = cluster.min_nodes or most
    if len(found) < most or least > most:
        wanted = "nodes" if len(found) < most else "min_nodes"
        raise ConfigError(
            f"resources.cluster.{wanted}: {most if wanted == 'nodes' else least} machines, but there are {len(found)}: "
            f"{', '.join(machine.name for machine in found)}; name more hosts or lower it"
        )
    counts = [n for n in range(least, most + 1) if batch is None or batch % (n * processes) == 0]
    if not counts:
        assert batch is not None
        raise _indivisible(field, batch, most * processes, processes, most, least)
    good = [machine for machine in found if not {machine.host, machine.name} & set(left_out)]
    count = max((n for n in counts if n <= len(good)), default=counts[0])
    chosen = [*good, *(machine for machine in found if machine not in good)][:count]
    return [machine for machine in found if machine in chosen]


def _seat(node: int, machine: Machine, processes: int) -> Seat:
    devices = machine.slots[:processes] if machine.chosen else ()
    first = node * processes
    return Seat(
        node=node, host=machine.host, processes=processes, first_rank=first, devices=devices, env=dict(machine.env)
    )


def _indivisible(field: str, batch: int, ranks: int, processes: int, most: int = 1, least: int = 1) -> ConfigError:
    """The error of a batch that no allowed number of nodes divides."""
    if most == 1:
        among, change = f"{processes} processes", "resources.processes"
    else:
        nodes = f"{most}" if least == most else f"{least} to {most}"
        among = f"{nodes} nodes of {processes} processes" if processes > 1 else f"{nodes} nodes"
        change = "resources.cluster.nodes (or min_nodes, to leave some idle) or resources.processes"
    return ConfigError(
        f"{field} = {batch} cannot be divided among {among}; use a multiple of {ranks} or change {change}"
    )


def _double(names: list[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _unnamed(node: int) -> str:
    return f"node{node:04d}"
