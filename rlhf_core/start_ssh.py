"""Launcher `hostfile`: one ssh to each host, all at once, with `rlhf_core.node` at its other end (see `ssh`).

What a host says is passed on with its name. A connection that has ended is told once, with its reason; what may pass by itself
counts as a mistake of the configuration only for a host that no earlier attempt has heard of.
"""

import sys
import threading
import time
from dataclasses import replace

from rlhf_core.errors import StoreError
from rlhf_core.job import JobSpec
from rlhf_core.members import Seat, read_beat, read_orders
from rlhf_core.ssh import SSH_FAILED, Connection, explain, forwarded, require_ssh
from rlhf_core.starting import Trouble, agent_id, node_command
from rlhf_core.store import Store

HOLD_SECONDS = 3.0  # a node that ends by itself has told why; whoever reads that comes first
STOP_SECONDS = 5.0
EARLIER_ATTEMPTS = 5


class SSHStarter:
    """Starts a job's nodes over ssh; see `starting.Starter`."""

    def __init__(self, store: Store, job: JobSpec, seats: tuple[Seat, ...]) -> None:
        self.store, self.job, self.seats = store, job, seats
        self.cluster = job.resources.cluster
        self._connections: list[Connection] = []
        self._found: list[tuple[float, Trouble]] = []  # from when on it is told
        self._printing = threading.Lock()

    def start(self) -> None:
        """Start all at once. ConfigError: there is no ssh command here."""
        require_ssh(self.cluster)
        for seat in self.seats:
            arguments = node_command(self.store, self.job.output, seat.node, attached=True)
            variables = {**forwarded(self.cluster, seat.env), "RLHF_JOB_ID": agent_id(self.job, seat.node)}
            self._connections.append(
                Connection(
                    self.cluster,
                    seat.host,
                    arguments,
                    variables,
                    on_line=lambda text, host=seat.host: self._print(f"{host}: {text}"),
                    on_end=lambda connection, seat=seat: self._ended(connection, seat),
                )
            )

    def look(self) -> list[Trouble]:
        """Connections that have ended, each once; one whose node may have told more itself a little later."""
        now, found = time.monotonic(), self._found
        due = [entry for entry in found if entry[0] <= now]
        for entry in due:
            found.remove(entry)
        return [trouble for _, trouble in due]

    def waits(self) -> str | None:
        """Nothing: ssh connects or fails."""
        return None

    def stop(self) -> None:
        """Let all hosts go, and end what is left of the connections after some seconds."""
        for connection in self._connections:
            connection.let_go()
        until = time.monotonic() + STOP_SECONDS
        for connection in self._connections:
            connection.end(until)

    def _ended(self, connection: Connection, seat: Seat) -> None:
        assert connection.code is not None
        trouble = explain(seat.host, connection.code, connection.said, self.cluster)
        if trouble is None:
            return
        if trouble.kind == "configuration" and connection.code == SSH_FAILED and self._has_worked(seat.host):
            trouble = explain(seat.host, connection.code, connection.said, self.cluster, known=True) or trouble
        hold = 0.0 if trouble.kind == "configuration" else HOLD_SECONDS
        self._found.append((time.monotonic() + hold, replace(trouble, node=seat.node)))

    def _has_worked(self, host: str) -> bool:
        """Whether an earlier attempt has heard of a node on that host."""
        newest = self.job.attempt - 1
        for number in range(newest, max(0, newest - EARLIER_ATTEMPTS), -1):
            folder = self.job.model_copy(update={"attempt": number}).folder
            try:
                orders = read_orders(self.store, folder)
                seats = [seat for seat in orders.seats if seat.host == host] if orders else []
                if any(read_beat(self.store, folder, seat.node) for seat in seats):
                    return True
            except StoreError:
                return True  # not found out: another try tells
        return False

    def _print(self, line: str) -> None:
        with self._printing:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
