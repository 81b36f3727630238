"""The head of a job on several nodes: `python -m rlhf_core.head --job STORE#KEY`, the one local command of such a job.

It has the nodes started (`starting`), refuses those that do not fit before anything trains, lets them meet, gives them their
places among the ranks, and watches: a node that ends, falls silent or starts anew is the end of the attempt on all of them.
What ranks print and how far they are it prints in turn, so that for the control plane this is a job like any other. Its exit
code is that of the failure it has concluded, which lies in `failure.json` in RLHF_RANKS. SIGTERM: all nodes end, and may save
first; SIGQUIT: they end at once; SIGUSR1: all ranks dump their stacks. Nothing here knows how nodes are reached.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_core import failures, hosts, preflight
from rlhf_core.ends import Failure, NodeEnd
from rlhf_core.errors import ConfigError, ExitCode, RlhfError, StoreError
from rlhf_core.guard import AT_ONCE, KILL_SECONDS
from rlhf_core.job import JobSpec, progress_line, read_job
from rlhf_core.launch import TRAIN
from rlhf_core.member import Member
from rlhf_core.members import BEAT_SECONDS, LOST_SECONDS, Facts, Order, Orders, Seat, orders_key, read_beat, write
from rlhf_core.parallel import in_threads
from rlhf_core.starting import Starter, Trouble
from rlhf_core.store import Store

LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 3.0
ALIVE_SECONDS = 10.0  # between two signs of life while nodes are waited for
WHY_SECONDS = 10.0  # for Slurm to say why it has ended the nodes
OTHERS_SECONDS = 2.0  # in which other nodes that are refused too may say so
ENDING_SECONDS = 15.0  # for a node's logs and its last beat, after its ranks


def main(argv: list[str] | None = None) -> int:
    """Run one attempt on its nodes; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlhf_core.head", description="Run a job on several nodes.")
    parser.add_argument("--job", required=True, help="URL of job.json: STORE_ROOT#KEY")
    parser.add_argument("--module", default=TRAIN, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        store, job = read_job(args.job)
        seats = hosts.seats(job.resources, hosts.batch_of(job.stage, job.spec), job.left_out)
        head = Head(store, job, seats, starter_of(store, job, seats), args.module)
        failure = head.run()
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if failure is None:
        return ExitCode.DONE
    if folder := os.environ.get("RLHF_RANKS"):
        Path(folder, "failure.json").write_text(failure.model_dump_json())
    if failure.code in (ExitCode.CONFIG, ExitCode.DATA):
        print(f"error: {failure.detail}", file=sys.stderr, flush=True)
    return failure.code if 0 < failure.code < 256 else 1


def starter_of(store: Store, job: JobSpec, seats: tuple[Seat, ...]) -> Starter:
    """What starts the nodes of a job."""
    if job.resources.launcher == "hostfile":
        from rlhf_core.start_ssh import SSHStarter

        return SSHStarter(store, job, seats)
    if job.resources.launcher == "slurm":
        from rlhf_core.start_slurm import SlurmStarter

        return SlurmStarter(store, job, seats)
    if job.resources.launcher == "nodes":
        from rlhf_core.start_nodes import NodesStarter

        return NodesStarter(store, job, seats)
    raise ConfigError(f"resources.launcher: {job.resources.launcher} has no nodes to start")


class Head:
    """One attempt on its nodes."""

    def __init__(
        self, store: Store, job: JobSpec, seats: tuple[Seat, ...], starter: Starter, module: str = TRAIN
    ) -> None:
        self.job = job
        self.members = [Member(seat) for seat in seats]
        self.starter = starter
        self.told: str | None = None
        self._at_once = False
        self._quick = Store(store.url, patience=PATIENCE_SECONDS)
        self._orders = Orders(job_id=job.job_id, beat=0, order="report", seats=seats, module=module)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._now = threading.Event()
        self._troubles: list[Trouble] = []
        self._said = 0.0
        self._thread = threading.Thread(target=self._give_orders, daemon=True, name="orders")

    def run(self) -> Failure | None:
        """The whole attempt; None: every node has done its part."""
        for signo in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, AT_ONCE):
            signal.signal(signo, self._on_signal)
        signal.signal(signal.SIGUSR1, lambda *_: self._order(stacks=self._orders.stacks + 1))
        own = preflight.facts(None, None)
        write(self._quick, orders_key(self.job.folder), self._orders)
        self._thread.start()
        try:
            self.starter.start()
            failure = self._gather(own) or self._meet() or self._watch()
            return self._end(failure)
        finally:
            self._over.set()
            self._now.set()
            self._thread.join(PATIENCE_SECONDS)
            self.starter.stop()

    # --- the orders --------------------------------------------------------------------------------------------------

    def _order(self, order: Order | None = None, **fields: Any) -> None:
        with self._lock:
            self._orders = self._orders.model_copy(update={**({"order": order} if order else {}), **fields})
        self._now.set()

    def _give_orders(self) -> None:
        while not self._over.is_set():
            self._now.clear()
            with self._lock:
                self._orders = self._orders.model_copy(update={"beat": self._orders.beat + 1})
                orders = self._orders
            try:
                write(self._quick, orders_key(self.job.folder), orders)
            except StoreError:
                pass  # nodes go on for a while; the next beat says the same
            self._now.wait(BEAT_SECONDS)

    def _on_signal(self, signo: int, _: Any) -> None:
        self.told = self.told or f"received {signal.Signals(signo).name}"
        self._at_once = self._at_once or signo == AT_ONCE

    # --- the phases --------------------------------------------------------------------------------------------------

    def _gather(self, own: Facts) -> Failure | None:
        """Until every node has said what it found; whatever does not fit, on any of them, is told in one failure."""
        failure = self._until(lambda m: bool(m.beat and m.beat.state != "checking"), "nodes")
        if failure:
            return failure
        refused = [
            text
            for member in self.members
            if member.beat and member.beat.facts
            for text in preflight.compare(
                own, member.seat, member.beat.facts, self.job.resources.cluster, member.reported
            )
        ]
        refused += preflight.alike([(m.seat, m.beat.facts) for m in self.members if m.beat and m.beat.facts])
        for member in self.members:
            member.first = member.beat.incarnation if member.beat else None
            facts = member.beat.facts if member.beat else None
            if facts:
                ended = f", ended {len(facts.ended)} processes of an earlier attempt" if facts.ended else ""
                self._print(f"{member.name}: {facts.accelerator or 'gpu'}, {facts.cores} cores{ended}")
        if refused:
            return Failure(kind="configuration", code=ExitCode.CONFIG, detail="; ".join(refused))
        return None

    def _meet(self) -> Failure | None:
        """Find an address of node 0 that all others reach, and give the places."""
        first = self.members[0].beat
        assert first is not None and first.facts is not None
        candidates = tuple(dict.fromkeys((self.members[0].seat.host.rpartition("@")[2], *first.facts.addresses)))
        if len(self.members) > 1:
            self._order("meet", candidates=candidates, probe_port=first.probe_port)
            if failure := self._until(lambda m: bool(m.beat and m.beat.state == "met"), "meet"):
                return failure
        reached = [set(m.beat.reached) for m in self.members[1:] if m.beat]
        common = [address for address in candidates if all(address in found for found in reached)]
        if len(self.members) > 1 and not common:
            alone = [m for m, found in zip(self.members[1:], reached, strict=True) if not found] or self.members[1:]
            return Failure(
                kind="configuration",
                code=ExitCode.CONFIG,
                host=alone[0].name,
                node=alone[0].seat.node,
                detail=f"{', '.join(m.name for m in alone)} cannot connect to {self.members[0].name} at "
                f"{', '.join(candidates)}, port {first.probe_port}: let nodes connect to each other on ports 20000-31999 "
                "(a firewall, or names that mean something else there)",
            )
        peers = {
            m.seat.node: ((m.seat.host.rpartition("@")[2], *m.beat.facts.addresses), m.beat.probe_port)
            for m in self.members
            if m.beat and m.beat.facts
        }
        master = common[0] if common else "127.0.0.1"
        self._print(f"{len(self.members)} nodes meet at {master}:{first.master_port}")
        self._alive("ranks start", at_once=True)
        self._order("go", master_addr=master, master_port=first.master_port, peers=peers)
        return None

    def _watch(self) -> Failure | None:
        """Until all have ended, or one has ended badly or was lost."""
        while any(member.end is None for member in self.members):
            if failure := self._look():
                return failure
            if any(m.end and m.end.code for m in self.members):
                return None  # concluded when all have told how they ended
            time.sleep(LOOK_SECONDS)
        return None

    def _until(self, ready: Callable[[Member], bool], phase: str) -> Failure | None:
        """Wait until all members are; the limit counts from when nothing outside is waited for any more."""
        began = time.monotonic()
        while not all(map(ready, self.members)):
            if failure := self._look(waiting=True):
                if failure.kind == "configuration":
                    time.sleep(OTHERS_SECONDS)
                    failure = self._look(waiting=True) or failure
                return failure
            why = self.starter.waits()
            if why is not None:
                began = time.monotonic()
            missing = [m for m in self.members if not ready(m)]
            self._alive(why or f"{phase}: waiting for {', '.join(m.name for m in missing[:4])}")
            if time.monotonic() - began > self.job.resources.cluster.start_seconds:
                member = missing[0]
                return Failure(
                    kind="unreachable",
                    code=1,
                    host=member.name,
                    node=member.seat.node,
                    detail=f"{', '.join(m.name for m in missing)} did not report within "
                    f"{self.job.resources.cluster.start_seconds:g} s (resources.cluster.start_seconds)",
                )
            time.sleep(LOOK_SECONDS)
        return None

    def _look(self, waiting: bool = False) -> Failure | None:
        """Hear all members, print what they say, and see whether one is lost."""
        if self.told:
            return Failure(kind="preempted", code=ExitCode.PREEMPTED, detail=self.told)
        answered = self._hear()
        self._troubles += self.starter.look()
        if troubles := [t for t in self._troubles if t.kind != "launcher" or not self._told_its_end(t.node)]:
            return self._of_troubles(troubles)
        if not answered:
            for member in self.members:  # an outage of the store is nobody's silence
                member.heard = time.monotonic()
        for member in self.members:
            beat = member.beat
            if beat and member.first and beat.incarnation != member.first:
                return self._lost(member, "was started anew")
            silence = time.monotonic() - member.heard
            if not waiting and member.end is None and silence > LOST_SECONDS:
                return self._lost(member, f"has been silent for {silence:.0f} s")
        return None

    def _hear(self) -> bool:
        """Read all beats, print what is new in them; whether the store has answered."""
        try:
            beats = in_threads(lambda m: read_beat(self._quick, self.job.folder, m.seat.node), self.members)
        except StoreError:
            return False
        for member, beat in zip(self.members, beats, strict=True):
            member.hear(beat)
        self._show()
        return True

    def _told_its_end(self, node: int | None) -> bool:
        return node is not None and self.members[node].end is not None

    def _lost(self, member: Member, how: str) -> Failure:
        return Failure(
            kind="unreachable",
            code=1,
            host=member.name,
            node=member.seat.node,
            detail=f"{member.name} {how}; its processes end by themselves within {LOST_SECONDS + KILL_SECONDS:.0f} s",
        )

    def _of_troubles(self, troubles: list[Trouble]) -> Failure:
        """What went wrong with starting nodes; wrong settings before what may pass, all of them in one message."""
        first = next((t for t in troubles if t.kind == "configuration"), troubles[0])
        codes = {"configuration": ExitCode.CONFIG, "preempted": ExitCode.PREEMPTED}
        return Failure(
            kind=first.kind,
            code=codes.get(first.kind, 1),
            host=self.members[first.node].name if first.node is not None else None,
            node=first.node,
            detail="; ".join(dict.fromkeys(t.message for t in troubles if t.kind == first.kind)),
        )

    # --- the end -----------------------------------------------------------------------------------------------------

    def _end(self, failure: Failure | None) -> Failure | None:
        """Have all nodes end, hear their last words, and conclude."""
        done = failure is None and all(m.end and m.end.code == 0 for m in self.members)
        plan = self.job.resources.checkpoint.grace_seconds
        can_save = failure is not None and failure.kind == "preempted" and not self._at_once
        grace = plan if can_save else 0.0
        reason = "done" if done else failure.detail if failure else "a node has ended"
        self._order("end", reason=reason, grace=None if can_save else 0.0)
        until = time.monotonic() + grace + KILL_SECONDS + ENDING_SECONDS
        while time.monotonic() < until and self._are_ending(failure):
            time.sleep(LOOK_SECONDS)
        ends = [(m.name, m.end) for m in self.members if m.end]
        if failure is None:
            lost = [t for t in self._troubles if t.node is not None and self.members[t.node].end is None]
            ranks = [rank for _, end in ends for rank in end.ranks if rank.code]
            if lost and all(rank.told or failures.is_neighbours(rank) for rank in ranks):
                return self._of_troubles(lost)
            concluded = self._conclude(ends)
            return self._why(concluded) if concluded and self.job.resources.launcher == "slurm" else concluded
        if failure.kind != "preempted" or (ends and all(end.code in (0, ExitCode.PREEMPTED) for _, end in ends)):
            return failure
        # Told to end, but not all could save.
        concluded = self._conclude([(name, end) for name, end in ends if end.code != ExitCode.PREEMPTED])
        return concluded or failure.model_copy(update={"code": 128 + signal.SIGTERM, "kind": "killed"})

    def _are_ending(self, failure: Failure | None) -> bool:
        """Whether a node may still tell how it ended: not those that have lost their link or their process."""
        self._hear()
        self._troubles += self.starter.look()
        gone = {trouble.node for trouble in self._troubles} | ({failure.node} if failure else set())
        return any(m.beat and m.first and m.end is None and m.seat.node not in gone for m in self.members)

    def _why(self, concluded: Failure) -> Failure:
        """Nodes that saved or were killed were told to end by what holds them, which says a little later whether to go on."""
        until = time.monotonic() + WHY_SECONDS
        while concluded.kind in ("preempted", "killed") and time.monotonic() < until:
            if troubles := [t for t in self.starter.look() if t.kind != "launcher"]:
                return self._of_troubles(troubles)
            time.sleep(LOOK_SECONDS)
        return concluded

    def _conclude(self, ends: list[tuple[str, NodeEnd]]) -> Failure | None:
        """What the ends of nodes come to; None if none ended badly."""
        code = next((end.code for _, end in ends if end.code), 0)
        if not code:
            return None
        found = failures.conclude(ends, code)
        node = next((m.seat.node for m in self.members if m.name == found.host), None)
        return found.model_copy(update={"node": node})

    # --- for people --------------------------------------------------------------------------------------------------

    def _print(self, line: str) -> None:
        print(line, flush=True)

    def _alive(self, phase: str, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._said > ALIVE_SECONDS:
            self._said = time.monotonic()
            self._print(progress_line({"step": 0, "total": 1, "unit": "", "phase": phase, "metrics": {}}))

    def _show(self) -> None:
        """Print what ranks have said since the last look, by time."""
        lines: list[tuple[float, int | None, str]] = []
        world = sum(member.seat.processes for member in self.members)
        for member in self.members:
            beat = member.beat
            if beat is None:
                continue
            newest = member.shown
            for number, event in beat.events:
                if number > member.shown:
                    self._print(progress_line(event))
                    newest = max(newest, number)
            for number, when, rank, text in beat.lines:
                if number > member.shown:
                    lines.append((when, rank, text))
                    newest = max(newest, number)
            member.shown = newest
        for _, rank, text in sorted(lines, key=lambda line: line[0]):
            self._print(f"[{rank}] {text}" if rank is not None and world > 1 else text)


if __name__ == "__main__":
    sys.exit(main())
