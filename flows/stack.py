"""The local stack: a Prefect server, a worker and, if asked for, an S3 server, as processes of this folder.

All of it lies in `.rlhf/`: Prefect's home with a profile of our own and its database in `.rlhf/prefect`, logs and the record of
what was started in `.rlhf/stack`. A process is known by its pid, the moment it was started, and RLHF_STACK in its environment;
what is not surely ours is never ended. Every process started below inherits that variable, so runs are found even after their
worker is gone. No Prefect is imported here.
"""

import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf_core import guard
from rlhf_core.errors import ConfigError, RlhfError

FOLDER = Path(".rlhf")
MARK = "RLHF_STACK"
PartName = Literal["server", "s3", "worker"]
PARTS: tuple[PartName, ...] = ("server", "s3", "worker")
START_SECONDS = 180
END_SECONDS = 15
RUN_SECONDS = 45  # a job has up to 25 s to save, and its log and state go to the store then
HOST = "127.0.0.1"
RUN_MODULES = ("prefect.engine", "prefect.flow_engine")


class StackError(RlhfError):
    """A part of the local stack could not be started."""


@dataclass(frozen=True)
class Part:
    """One process of the stack, as `up` has recorded it.

    Attributes:
        started: in clock ticks since boot; a pid is given away again, the two together are not.
        url: where it answers, if it does.
    """

    name: PartName
    pid: int
    started: int
    url: str | None = None


class Stack:
    """The stack of one folder."""

    def __init__(self, folder: Path = FOLDER) -> None:
        """`folder`: of all its files; made when it is first needed."""
        self.folder = folder.absolute()
        self.own = self.folder / "stack"
        self.home = self.folder / "prefect"

    # --- what there is -----------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What `up` has written down: ports, keys, and the parts."""
        try:
            return json.loads((self.own / "state.json").read_text())
        except FileNotFoundError:
            return {}

    def write(self, **changes: Any) -> None:
        """Write down more."""
        record = {**self.record(), **changes}
        fresh = self.own / "state.new"
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(record, indent=1))
        fresh.replace(self.own / "state.json")

    def part(self, name: PartName) -> Part | None:
        """A part that was started and not ended by `down`, alive or not."""
        found = self.record().get(name)
        return Part(name, **found) if found else None

    def is_ours(self, pid: int) -> bool:
        """Whether a process was started, at whatever remove, by this stack."""
        return guard.alive(pid) and guard.variable(pid, MARK) == str(self.folder)

    def lives(self, part: Part) -> bool:
        """Whether the recorded process is still there, and is that one."""
        return self.is_ours(part.pid) and guard.started(part.pid) == part.started

    def processes(self) -> set[int]:
        """All processes of the stack: its parts, the runs and their jobs."""
        pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
        return {pid for pid in pids if pid != os.getpid() and self.is_ours(pid)}

    def runs(self) -> set[int]:
        """The processes of flow runs."""
        return {pid for pid in self.processes() if guard.python_module(pid) in RUN_MODULES}

    def run_ids(self) -> set[str]:
        """The ids of the flow runs whose processes live."""
        return {id for pid in self.runs() if (id := guard.variable(pid, "PREFECT__FLOW_RUN_ID"))}

    def log(self, name: PartName) -> Path:
        """Where a part writes."""
        return self.own / f"{name}.log"

    def api(self) -> str | None:
        """The URL of the Prefect server's API, if it runs."""
        server = self.part("server")
        return f"{server.url}/api" if server and self.lives(server) else None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One `up` or `down` at a time."""
        self.own.mkdir(parents=True, exist_ok=True)
        with (self.own / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    # --- starting ----------------------------------------------------------------------------------------------------

    def start(self, name: PartName, command: list[str], env: dict[str, str], url: str | None = None) -> Part:
        """Start a part in a session of its own; its output is added to its log."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder.parent,
                env={**env, MARK: str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        part = Part(name, process.pid, guard.started(process.pid), url)
        self.write(**{name: {"pid": part.pid, "started": part.started, "url": url}})
        # For a moment after its start a process shows no environment.
        self._gone(lambda: process.poll() is not None or self.lives(part), END_SECONDS)
        return part

    def wait_for(self, part: Part, ready: Callable[[], bool]) -> None:
        """Wait until a part answers. StackError, with the end of its log: it died, or took too long."""
        until = time.monotonic() + START_SECONDS
        while self.lives(part):
            if ready():
                return
            if time.monotonic() > until:
                raise StackError(f"{part.name}: did not answer within {START_SECONDS} s\n{self.last_words(part.name)}")
            time.sleep(0.2)
        raise StackError(f"{part.name}: ended by itself\n{self.last_words(part.name)}")

    def last_words(self, name: PartName, lines: int = 12) -> str:
        """The end of a part's log, indented, and where it is."""
        text = self.log(name).read_text(errors="replace").splitlines()[-lines:] if self.log(name).exists() else []
        return "\n".join([*(f"  | {line}" for line in text), f"  whole log: {self.log(name)}"])

    def keys(self) -> dict[str, str]:
        """The S3 server's keys, made once."""
        if "s3_keys" not in self.record():
            fresh = {"AWS_ACCESS_KEY_ID": secrets.token_hex(8), "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20)}
            self.write(s3_keys=fresh)
        return dict(self.record()["s3_keys"])

    # --- ending ------------------------------------------------------------------------------------------------------

    def end_part(self, name: PartName, tell: Callable[[str], None]) -> None:
        """End a part, politely and then not; forget it."""
        part = self.part(name)
        if part is None:
            return
        if self.lives(part):
            # While it ends it shows no environment; that it was ours is known by now.
            def gone() -> bool:
                return not guard.alive(part.pid) or guard.started(part.pid) != part.started

            guard.send(part.pid, signal.SIGTERM)
            if not self._gone(gone, END_SECONDS):
                with suppress(ProcessLookupError):
                    os.killpg(part.pid, signal.SIGKILL)  # it leads a session, so this is nobody else's group
                self._gone(gone, END_SECONDS)
            tell(f"{name}: ended (pid {part.pid})")
        else:
            tell(f"{name}: is gone already (pid {part.pid})")
        self.write(**{name: None})

    def end_runs(self, tell: Callable[[str], None]) -> None:
        """Have the worker take no more runs, and the running ones save and end; then what is left of them."""
        worker = self.part("worker")
        if worker and self.lives(worker):
            guard.send(worker.pid, signal.SIGTERM)  # it goes on with what it has: that is told itself
        runs = self.runs()
        if runs:
            self.write(interrupted=sorted(self.run_ids()))
            tell(f"runs: {len(runs)} told to save and end")
        for pid in runs:
            guard.send(pid, signal.SIGTERM)
        others = {part.pid for name in PARTS if (part := self.part(name))}
        self._gone(lambda: not self.processes() - others, RUN_SECONDS if runs else END_SECONDS)
        for pid in self.processes() - others:
            guard.send(pid, signal.SIGKILL)

    @staticmethod
    def _gone(check: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not (gone := check()) and time.monotonic() < until:
            time.sleep(0.2)
        return gone


def answers(url: str) -> bool:
    """Whether a GET of the URL gives 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def is_free(port: int) -> bool:
    """Whether a server can listen on the port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose_port(given: int | None, before: int | None, usual: int) -> int:
    """The port that was given, the one of last time, the usual one or the next that is free.

    ConfigError: the given one is taken.
    """
    if given is not None:
        if not is_free(given):
            raise ConfigError(
                f"--port {given}: another program listens there; give another port, or none to have one chosen"
            )
        return given
    for port in ([before] if before else []) + list(range(usual, usual + 200)):
        if is_free(port):
            return port
    raise ConfigError(f"no free port from {usual} to {usual + 199}; give one by --port")
