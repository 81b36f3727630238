"""A node's side of what is told through the store: a thread that writes its beats and reads the head's orders.

It also keeps the one socket by which other nodes can see that this one lives when the store cannot be reached: a port that
accepts and closes. What follows from orders, silence and loneliness is decided in `node`, not here.
"""

import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from rlhf_core.ends import NodeEnd
from rlhf_core.errors import StoreError
from rlhf_core.job import JobSpec
from rlhf_core.launch import free_port
from rlhf_core.members import (
    BEAT_SECONDS,
    LINES,
    Facts,
    NodeBeat,
    Orders,
    RankState,
    State,
    beat_key,
    read_orders,
    write,
)
from rlhf_core.store import Store

CONNECT_SECONDS = 3.0
KEPT_SECONDS = 5 * BEAT_SECONDS  # what a beat repeats, should the head have missed some
LONGEST_LINE = 2000  # characters; the stored log has all of it


class Link:
    """One node's beats and the orders it has heard.

    Attributes:
        orders: the head's newest; None until there are any.
        state: told with the next beat, as are the other public fields.
    """

    def __init__(self, store: Store, job: JobSpec, node: int, ranks: Callable[[], dict[int, RankState]]) -> None:
        self.job = job
        self.node = node
        self.orders: Orders | None = None
        self.state: State = "checking"
        self.facts: Facts | None = None
        self.reached: tuple[str, ...] = ()
        self.end: NodeEnd | None = None
        self._ranks = ranks
        self._store = store
        self._incarnation = uuid.uuid4().hex[:12]
        self._beat = 0
        self._events: deque[tuple[float, int, dict[str, Any]]] = deque(maxlen=LINES)
        self._lines: deque[tuple[float, int, float, int | None, str]] = deque(maxlen=LINES)
        self._number = 0
        self._answered = self._heard = time.monotonic()
        self._now = threading.Event()
        self._over = threading.Event()
        self._probe = socket.create_server(("", free_port()), backlog=64)
        self._held: socket.socket | None = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("", free_port()))
        self._master_port = self._held.getsockname()[1]
        self._thread = threading.Thread(target=self._tell_and_hear, daemon=True, name="beats")
        threading.Thread(target=self._accept, daemon=True, name="probe").start()
        self._thread.start()

    # --- what the node says ------------------------------------------------------------------------------------------

    def say(self, state: State) -> None:
        """Enter a state; it is told at once."""
        self.state = state
        self._now.set()

    def event(self, event: dict[str, Any]) -> None:
        """Pass on a progress event of rank 0."""
        self._number += 1
        self._events.append((time.monotonic(), self._number, event))

    def line(self, when: float, rank: int | None, text: str) -> None:
        """Pass on a line of the job's output."""
        self._number += 1
        self._lines.append((time.monotonic(), self._number, when, rank, text[:LONGEST_LINE]))

    def release_port(self) -> None:
        """Let the ranks have the port that was held for them."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def close(self, end: NodeEnd | None, seconds: float) -> None:
        """Tell the end, if there is one and as long as it takes but no longer than `seconds`, and fall silent."""
        self.end = end
        if end is not None:
            self.state = "ended"
        self._over.set()
        self._now.set()
        self._thread.join(seconds)
        self.release_port()
        self._probe.close()

    # --- what it knows of the others ---------------------------------------------------------------------------------

    @property
    def silence(self) -> float:
        """Seconds for which the store has answered and the head has not said anything new."""
        return self._answered - self._heard

    @property
    def unanswered(self) -> float:
        """Seconds since the store last answered."""
        return time.monotonic() - self._answered

    def sees_another(self) -> bool:
        """Whether any other node can be connected to."""
        peers = self.orders.peers if self.orders else {}
        return any(
            reaches(addresses, port, greeting(self.job, node))
            for node, (addresses, port) in peers.items()
            if node != self.node
        )

    # --- the threads -------------------------------------------------------------------------------------------------

    def _tell_and_hear(self) -> None:
        while True:
            last = self._over.is_set()
            self._now.clear()
            try:
                self._tell()
                self._hear()
                self._answered = time.monotonic()
            except StoreError:
                if last:  # the end is worth another try, until `close` has had enough
                    time.sleep(1)
                    continue
            if last:
                return
            self._now.wait(BEAT_SECONDS)

    def _tell(self) -> None:
        self._beat += 1
        since = time.monotonic() - KEPT_SECONDS
        events = [(n, event) for when, n, event in list(self._events) if when > since]
        lines = [(n, when, rank, text) for told, n, when, rank, text in list(self._lines) if told > since]
        beat = NodeBeat(
            node=self.node,
            incarnation=self._incarnation,
            beat=self._beat,
            state=self.state,
            facts=self.facts,
            probe_port=self._probe.getsockname()[1],
            master_port=self._master_port,
            reached=self.reached,
            ranks=self._ranks(),
            events=tuple(events),
            lines=tuple(lines),
            end=self.end,
        )
        write(self._store, beat_key(self.job.folder, self.node), beat)

    def _hear(self) -> None:
        orders = read_orders(self._store, self.job.folder)
        if orders is None or orders.job_id != self.job.job_id:
            return
        if self.orders is None or orders.beat != self.orders.beat:
            self._heard = time.monotonic()
        self.orders = orders

    def _accept(self) -> None:
        while True:
            try:
                asking = self._probe.accept()[0]
            except OSError:
                return
            with asking, suppress(OSError):
                asking.sendall(greeting(self.job, self.node))


def greeting(job: JobSpec, node: int) -> bytes:
    """What a node says to whoever connects: other machines may have the same address, as that of a container's bridge."""
    return f"{job.job_id} {node}\n".encode()


def reaches(addresses: Iterable[str], port: int, expected: bytes) -> list[str]:
    """Those of the addresses at which somebody answers as expected; all are tried at once."""
    found: list[str] = []

    def attempt(address: str) -> None:
        with suppress(OSError), socket.create_connection((address, port), timeout=CONNECT_SECONDS) as connection:
            with connection.makefile("rb") as answer:
                if answer.read(len(expected)) == expected:
                    found.append(address)

    threads = [threading.Thread(target=attempt, args=(address,), daemon=True) for address in addresses]
    for thread in threads:
        thread.start()
    until = time.monotonic() + CONNECT_SECONDS + 1  # names are resolved without a limit of their own
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return sorted(found)
