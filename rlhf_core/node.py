"""One node of a job: `python -m rlhf_core.node --artifact STORE#STAGE/NAME-FP12 --node N [--attached]`.

It serves the newest attempt at the artifact that is not over: looks at its machine, meets the other nodes, starts its ranks
under a guard (DeepSpeed's own launch.py, as everywhere), stores their logs, and ends them when it is told to, when it is told
nothing any more, when it is cut off, when who holds its standard input is gone, and when any of them ends. Everything between
nodes goes through the store (`members`, `link`), so this needs no shared file system and no connection from the outside.
Who waits for artifact after artifact (`rlhf node`) calls `serve` again and again. Not here: how it came to be started.
"""

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rlhf_core import failures, guard, launch, preflight
from rlhf_core.ends import NodeEnd
from rlhf_core.errors import ExitCode, RlhfError
from rlhf_core.job import JobSpec, read_job
from rlhf_core.joblog import JobLog
from rlhf_core.link import Link, greeting, reaches
from rlhf_core.members import (
    LOST_SECONDS,
    NodeBeat,
    Orders,
    RankState,
    newest_attempt,
    orders_key,
    read_beat,
    read_orders,
)
from rlhf_core.ranklog import ends_of
from rlhf_core.starting import agent_id, node_id
from rlhf_core.store import Store

ENVIRONMENT = "RLHF_NODE_ENVIRONMENT"  # set: the environment has been taken from standard input
POLL_SECONDS = 0.2
LAST_WORDS_SECONDS = 20.0  # for the logs and the last beat
PATIENCE_SECONDS = 3.0  # of the store that beats go through: the next one is as good
TAIL_LINES = 30
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def main(argv: list[str] | None = None) -> int:
    """Serve one attempt; returns its exit code on this node."""
    parser = argparse.ArgumentParser(prog="rlhf_core.node", description="Run one node's part of a stage's job.")
    parser.add_argument(
        "--artifact", required=True, metavar="STORE#ID", help="the store's root, '#', the artifact's id"
    )
    parser.add_argument("--node", type=int, help="number of this node, from 0; default: SLURM_NODEID")
    parser.add_argument(
        "--attached", action="store_true", help="take the environment from standard input, and end with it"
    )
    parser.add_argument("--wait", type=float, default=120, metavar="SECONDS", help="for an attempt that is not over")
    args = parser.parse_args(argv)
    if args.attached and not os.environ.pop(ENVIRONMENT, ""):
        take_environment()
    try:
        root, _, artifact = args.artifact.partition("#")
        node = args.node if args.node is not None else int(os.environ["SLURM_NODEID"])
        store = Store(root)
        folder = await_attempt(store, artifact, args.wait)
        if folder is None:
            print(f"{artifact}: nothing to do: no attempt is under way", file=sys.stderr)
            return ExitCode.DONE
        be_of(store, folder, node)
        return serve(store, folder, node, attached=args.attached)
    except KeyError:
        print("error: --node: give this node's number; there is no SLURM_NODEID to take it from", file=sys.stderr)
        return ExitCode.CONFIG
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def take_environment() -> None:
    """Begin anew in the environment that standard input's first line gives, which is thus on no command line."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            raise SystemExit("error: standard input ended before it gave an environment")
        line += byte
    given: dict[str, str] = json.loads(line)
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}  # by which this module was found
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **given, **kept, ENVIRONMENT: "taken"})


def await_attempt(store: Store, artifact: str, seconds: float) -> str | None:
    """The folder of the newest attempt once it is one that is not over; None if there is none for so long."""
    until = time.monotonic() + seconds
    while True:
        folder = newest_attempt(store, artifact)
        orders = read_orders(store, folder) if folder else None
        if folder and orders and orders.order != "end":
            return folder
        if time.monotonic() > until:
            return None
        time.sleep(1)


def be_of(store: Store, folder: str, node: int) -> None:
    """Begin anew as part of this attempt, if it was another one's that had this process started."""
    _, job = read_job(f"{store.url}#{folder}/job.json")
    own = agent_id(job, node)
    if os.environ.get("RLHF_JOB_ID", own) != own:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "RLHF_JOB_ID": own, ENVIRONMENT: "taken"})


def serve(store: Store, folder: str, node: int, *, attached: bool) -> int:
    """Take part in one attempt until it is over on this node.

    Args:
        store: of the job.
        folder: the attempt's, in the store.
        node: the number of this node.
        attached: standard input's end is this node's.

    Returns:
        The exit code of this node's part.

    Raises:
        RlhfError: it could not take part; what it could tell the head is told.
    """
    _, job = read_job(f"{store.url}#{folder}/job.json")
    before = read_beat(store, folder, node)
    part = Node(store, job, node, attached)
    try:
        return part.run(before)
    finally:
        part.close()


class Node:
    """This machine's part of one attempt."""

    def __init__(self, store: Store, job: JobSpec, node: int, attached: bool) -> None:
        self.store = store
        self.job = job
        self.node = node
        self.attached = attached
        self.module = launch.TRAIN
        self.told: str | None = None  # why the ranks are to end
        self.grace: float | None = None
        self.cut_off = False  # nothing can be told or stored any more
        self.log: JobLog | None = None
        self.link = Link(Store(store.url, patience=PATIENCE_SECONDS), job, node, self.rank_states)
        self._stdin_open = attached
        self._stacks = 0
        self._before = {signo: signal.signal(signo, self._on_signal) for signo in SIGNALS}

    def run(self, before: NodeBeat | None) -> int:
        """Go through the orders to the end; returns the exit code of this node's ranks."""
        if before is not None and before.state == "running":  # the head sees another incarnation, and ends the attempt
            self._until("end", seconds=3 * LOST_SECONDS)
            return ExitCode.PREEMPTED
        self.link.facts = preflight.facts(self.store, self.job, see=orders_key(self.job.folder))
        self.link.say("ready")
        orders = self._until("meet", "go", "end")
        if orders and orders.order == "meet":
            self.link.reached = tuple(self._reached(orders))
            self.link.say("met")
            orders = self._until("go", "end")
        if not orders or orders.order != "go":
            return ExitCode.PREEMPTED if self.told else ExitCode.DONE
        return self._run_ranks(orders)

    def close(self) -> None:
        """Tell the last beat, let go of the ports and give back the signals."""
        self.link.close(self.link.end, 0 if self.cut_off else LAST_WORDS_SECONDS)
        for signo, before in self._before.items():
            signal.signal(signo, before)

    # --- orders ------------------------------------------------------------------------------------------------------

    def _until(self, *orders: str, seconds: float | None = None) -> Orders | None:
        """The head's orders once they are among these; None if this node is to end before, or `seconds` are over."""
        began = time.monotonic()
        while not self._must_end():
            heard = self.link.orders
            if heard and heard.order in orders:
                return heard
            if seconds is not None and time.monotonic() - began > seconds:
                return None
            time.sleep(POLL_SECONDS)
        return None

    def _must_end(self) -> bool:
        """Whether there is a reason to end; the first one found stays."""
        if self.told:
            return True
        heard = self.link.orders
        if heard and heard.order == "end":
            self.told, self.grace = heard.reason or "the head ends the attempt", heard.grace
        elif self._stdin_open and self._stdin_ended():
            self.told = "who started this node is gone"
        elif self.link.silence > LOST_SECONDS:
            self.told = f"the head has been silent for {self.link.silence:.0f} s"
        elif self.link.unanswered > LOST_SECONDS and self._is_cut_off():
            self.told, self.grace = "neither the store nor another node can be reached from here", 0
            self.cut_off = True
        return self.told is not None

    def _stdin_ended(self) -> bool:
        ready, _, _ = select.select([0], [], [], 0)
        self._stdin_open = not (ready and not os.read(0, 4096))
        return not self._stdin_open

    def _is_cut_off(self) -> bool:
        """Whether this node is alone; a job of one node never is, and goes on while the store is away."""
        heard = self.link.orders
        return heard is not None and len(heard.peers) > 1 and not self.link.sees_another()

    def _on_signal(self, signo: int, frame: Any) -> None:
        self.told = self.told or f"received {signal.Signals(signo).name}"
        if callable(before := self._before[signal.Signals(signo)]):
            before(signo, frame)

    def _reached(self, orders: Orders) -> list[str]:
        if self.node == 0:
            return list(orders.candidates)
        return reaches(orders.candidates, orders.probe_port, greeting(self.job, 0))

    # --- the ranks ---------------------------------------------------------------------------------------------------

    def _run_ranks(self, orders: Orders) -> int:
        seat, self.module = orders.seats[self.node], orders.module
        os.environ.update(seat.env)
        interface = preflight.interface_of(orders.master_addr)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if interface:
                os.environ.setdefault(name, interface)
        argv = launch.ranks_command(
            orders.seats, self.node, orders.master_addr, orders.master_port, self.store, self.job, self.module
        )
        kills = failures.oom_kills()
        self.log = log = JobLog(
            self.store,
            self.job,
            self.link.event,
            on_record=self.link.line,
            name=f"node-{self.node:04d}.txt",
        )
        self.link.release_port()
        process = launch.start(self.job, argv, log.folder, job_id=node_id(self.job, self.node))
        self.link.say("running")
        try:
            code = self._follow(process, log)
        finally:
            code = launch.end_guard(process, self.job, log, job_id=node_id(self.job, self.node), grace=self.grace)
            records, silent = ends_of(log.folder, seat.first_rank, seat.processes)
            tail = tuple(log.tail)[-TAIL_LINES:]
            if self.cut_off:
                shutil.rmtree(log.folder, ignore_errors=True)
            else:
                log.close()
        self.link.end = NodeEnd(
            code=code, oom_kills=failures.oom_kills() - kills, ranks=records, silent=silent, tail=tail
        )
        return code if 0 <= code < 256 else 1

    def _follow(self, process: "subprocess.Popen[bytes]", log: JobLog) -> int | None:
        """Follow the ranks until they end or are to end."""
        while (code := process.poll()) is None and not self._must_end():
            log.read()
            orders = self.link.orders
            if orders and orders.stacks > self._stacks:
                self._stacks = orders.stacks
                launch.dump_stacks(self.job, self.module, job_id=node_id(self.job, self.node))
            time.sleep(POLL_SECONDS)
        if code is None:
            log.note(f"ending the ranks here: {self.told}")
        return code

    def rank_states(self) -> dict[int, RankState]:
        """This node's ranks as their processes and what they have told show them."""
        if self.log is None:
            return {}
        now, states = time.time(), {}
        for pid in guard.processes_of(node_id(self.job, self.node)):
            if (number := guard.variable(pid, "RANK")) is None or guard.python_module(pid) != self.module:
                continue
            when, event = self.log.ranks.get(int(number), (now, {}))
            states[int(number)] = RankState(
                step=event.get("step"),
                total=event.get("total"),
                phase=event.get("phase"),
                age=round(now - when, 1),
                memory=resident(pid),
                stopped=state_of(pid) in "Tt",
            )
        return states


def resident(pid: int) -> int:
    """Bytes of a process that are in memory; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def state_of(pid: int) -> str:
    """The letter of a process's state, T if it is halted; X if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
