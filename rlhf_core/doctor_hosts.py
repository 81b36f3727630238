"""`rlhf doctor --hosts`: the checks that every node of a job makes before it starts, on all hosts at once and without a job.

Each host runs `rlhf_core.preflight` over the same ssh as a job, tries the store, and must see in it what was written here;
then it is compared with this machine as a node would be. A host that does not answer in time is a finding like any other.
"""

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_core import preflight
from rlhf_core.cluster import HOST_NAME, Cluster, Host
from rlhf_core.config import PipelineConfig
from rlhf_core.errors import ConfigError
from rlhf_core.hosts import seats
from rlhf_core.members import Facts, Seat
from rlhf_core.resources import Resources
from rlhf_core.ssh import Connection, explain, forwarded, require_ssh
from rlhf_core.store import Store

ANSWER_SECONDS = 8.0  # for what a host looks at
LIMIT_SECONDS = 17.0  # for all: connecting takes up to 10
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class HostFinding:
    """What was found out about one host.

    Attributes:
        host: as ssh takes it.
        facts: what it said of itself; None if it did not.
        refusals: why it cannot take part, each with the host's name and a remedy.
        seconds: until it had answered.
    """

    host: str
    facts: Facts | None
    refusals: tuple[str, ...]
    seconds: float


def hosts_of(config: PipelineConfig | None, hosts: str | None) -> Resources:
    """The resources whose hosts are to be looked at.

    Args:
        config: gives processes and how hosts are reached; None: one process, plain ssh.
        hosts: a hostfile's path or names joined by commas; None: those of the configuration.

    Raises:
        ConfigError: `hosts` and `config` do not go together.
    """
    table = [config.resources.of(stage) for stage in config.stages] if config else []
    found = next((resources for resources in table if resources.launcher == "hostfile"), None)
    if hosts is None:
        assert found is not None, "only who has hosts asks"
        return found
    given = found or next((resources for resources in reversed(table)), Resources())
    named = hosts if Path(hosts).expanduser().is_file() or "/" in hosts else tuple(_hosts(hosts))
    # Hosts that are given here are all that there are; what selects among those of the configuration does not apply.
    cluster = {"hosts": named, "nodes": None, "min_nodes": None, "include": None, "exclude": None}
    return given.model_copy(update={"launcher": "hostfile", "cluster": given.cluster.model_copy(update=cluster)})


def has_hosts(config: PipelineConfig) -> bool:
    """Whether a stage of the configuration runs over ssh."""
    return any(config.resources.of(stage).launcher == "hostfile" for stage in config.stages)


def check_hosts(store_url: str, resources: Resources) -> list[HostFinding]:
    """Look at all hosts at once.

    Raises:
        ConfigError: the hosts cannot be told, or there is no ssh here.
        RlhfError: the store cannot be written to from here.
    """
    cluster, places = resources.cluster, seats(resources)
    require_ssh(cluster)
    store, marker = Store(store_url, patience=preflight.STORE_PATIENCE), f"doctor/{uuid.uuid4().hex}"
    store.write(marker, b"seen")
    try:
        began = time.monotonic()
        looks = [_Look(cluster, seat, store.url, marker) for seat in places]
        return _gather(looks, preflight.facts(None, None, ANSWER_SECONDS), cluster, began)
    finally:
        store.delete(marker)


class _Look:
    """One host that is being looked at."""

    def __init__(self, cluster: Cluster, seat: Seat, store_url: str, marker: str) -> None:
        self.seat = seat
        self.facts: Facts | None = None
        self.heard: float | None = None
        words = ["--store", store_url, "--see", marker, "--limit", str(ANSWER_SECONDS), "--attached"]
        arguments = ["-m", "rlhf_core.preflight", *words]
        self.connection = Connection(cluster, seat.host, arguments, forwarded(cluster, seat.env), self._take)

    def _take(self, line: str) -> None:
        if line.startswith(preflight.PREFIX):
            self.facts = Facts.model_validate_json(line.removeprefix(preflight.PREFIX))
            self.heard = time.time()


def _gather(looks: Sequence[_Look], own: Facts, cluster: Cluster, began: float) -> list[HostFinding]:
    """Wait for all, no longer than the limit, and compare."""
    ended: dict[int, float] = {}
    while len(ended) < len(looks) and time.monotonic() < began + LIMIT_SECONDS:
        for number, look in enumerate(looks):
            if number not in ended and look.connection.code is not None:
                ended[number] = time.monotonic() - began
        time.sleep(POLL_SECONDS)
    for look in looks:
        look.connection.let_go()
    for look in looks:
        look.connection.end(time.monotonic() + 0.2)
    found = [
        HostFinding(look.seat.host, look.facts, _refusals(look, own, cluster, n in ended), ended.get(n, LIMIT_SECONDS))
        for n, look in enumerate(looks)
    ]
    sound = [(look.seat, look.facts) for look in looks if look.facts]
    unlike = preflight.alike(sound)
    return [
        replace(f, refusals=(*f.refusals, *(text for text in unlike if text.startswith(f"{f.host}: ")))) for f in found
    ]


def _refusals(look: _Look, own: Facts, cluster: Cluster, ended: bool) -> tuple[str, ...]:
    if look.facts:
        return tuple(preflight.compare(own, look.seat, look.facts, cluster, look.heard))
    connection = look.connection
    if ended and connection.code is not None:
        trouble = explain(look.seat.host, connection.code, connection.said, cluster)
        return (trouble.message if trouble else f"{look.seat.host}: ended without a word about itself",)
    last = f"; its last words: {connection.said[-1]}" if connection.said else ""
    return (f"{look.seat.host}: no answer within {LIMIT_SECONDS:g} s{last}; see what keeps it",)


def _hosts(names: str) -> list[Host]:
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if not re.fullmatch(HOST_NAME, name):
            raise ConfigError(
                f"--hosts: {name!r} is no host's name; write names joined by commas, or a hostfile's path"
            )
    return [Host(host=name) for name in found]
