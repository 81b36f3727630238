"""The process that owns a job: `python -m rlhf_core.guard --job-id ID --parent PID [--grace S …] -- COMMAND…`.

It stands between the control plane and the launcher, because neither ends a job reliably: a flow killed with -9 signals
nobody, and ranks outlive a launcher that is killed. The guard is a session leader and a subreaper, so every process of the job
stays its descendant; it ends them all when told to (SIGTERM, SIGINT, SIGHUP), when its parent goes, or when the command ends
before its ranks. The ranks alone are told first (a command that looks after ranks elsewhere: it alone, `--ask command`), and
have the grace to save and exit 75; after SIGQUIT there is none. Processes are found by descent and by RLHF_JOB_ID in their
environment, never by name. PR_SET_PDEATHSIG fires when the *thread* that started the guard ends, which must thus be the one
that waits for it; the parent's pid is polled as well. The job's local files go with it. Standard library only.
"""

import argparse
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

ORPHANED = 70  # the command ended well, but processes of the job lived on
NOT_STARTED = 127
DONE, PREEMPTED = 0, 75  # codes of a command that has ended well although it was told to end
LINGER_SECONDS = 3.0  # for what ends a moment after its parent, e.g. multiprocessing's resource tracker
KILL_SECONDS = 5.0  # only a process in uninterruptible sleep survives SIGKILL for so long
POLL_SECONDS = 0.5
AT_ONCE = signal.SIGQUIT  # end without a grace: who hangs cannot save
AT_ONCE_SECONDS = 1.0  # between SIGTERM and SIGKILL then
COMMAND_SECONDS = 10.0  # for a command that then has to end ranks elsewhere
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, AT_ONCE)
TOLD = "told"  # this file in the scratch folder says that the ranks are told to end by their guard
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def _read(pid: int, name: str) -> bytes:
    """A file of /proc/PID; empty if the process is gone or not ours to read."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return file.read()
    except OSError:
        return b""


def _stat(pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat from the state on (state, ppid, …); empty if the process is gone."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def alive(pid: int) -> bool:
    """Whether `pid` runs (a zombie does not)."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in (b"Z", b"X")


def parent(pid: int) -> int:
    """Parent's pid; 0 if the process is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def started(pid: int) -> int:
    """Start time in clock ticks since boot; 0 if the process is gone."""
    fields = _stat(pid)
    return int(fields[19]) if fields else 0


def argv(pid: int) -> list[str]:
    """Command line of a process."""
    return _read(pid, "cmdline").decode(errors="replace").split("\0")[:-1]


def python_module(pid: int) -> str | None:
    """The module that a `python … -m MODULE` process runs, else None."""
    words = argv(pid)
    if not words or "python" not in os.path.basename(words[0]) or "-m" not in words[:-1]:
        return None
    return words[words.index("-m") + 1]


def variable(pid: int, name: str) -> str | None:
    """A variable of the environment that a process was started with."""
    key = name.encode() + b"="
    for entry in _read(pid, "environ").split(b"\0"):
        if entry.startswith(key):
            return entry[len(key) :].decode(errors="replace")
    return None


def catches(pid: int, signo: int) -> bool:
    """Whether a process has a signal handler of its own for `signo`."""
    for line in _read(pid, "status").splitlines():
        if line.startswith(b"SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signo - 1) & 1)
    return False


def pids() -> list[int]:
    """All processes that run, but this one."""
    me = os.getpid()
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pid != me and alive(pid)]


def processes_of(job_id: str) -> set[int]:
    """Processes that carry exactly this RLHF_JOB_ID; with a '/' at its end: all that begin with it."""
    found = ((pid, variable(pid, "RLHF_JOB_ID") or "") for pid in pids())
    return {pid for pid, value in found if value == job_id or (job_id.endswith("/") and value.startswith(job_id))}


def descendants(root: int) -> set[int]:
    """Running processes below `root`."""
    children: dict[int, list[int]] = {}
    for pid in pids():
        children.setdefault(parent(pid), []).append(pid)
    found, queue = set[int](), [root]
    while queue:
        for child in children.get(queue.pop(), []):
            if child not in found:
                found.add(child)
                queue.append(child)
    return found


def send(pid: int, signo: int) -> None:
    """Send a signal to one process; no error if it is gone."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signo)


def end(find: Callable[[], set[int]], grace: float, tick: Callable[[], None] = lambda: None) -> set[int]:
    """End what `find` finds: SIGTERM once to each, after `grace` seconds SIGKILL; returns what could not be ended.

    `find` is asked again and again, so that processes started meanwhile are ended too; `tick` is called between.
    """
    told = set[int]()
    kill_at = time.monotonic() + grace
    give_up = kill_at + KILL_SECONDS
    while left := find():
        now = time.monotonic()
        if now > give_up:
            return left
        for pid in left if now >= kill_at else left - told:
            send(pid, signal.SIGKILL if now >= kill_at else signal.SIGTERM)
        told |= left
        tick()
        time.sleep(0.05)
    return set()


def scratch(folder: str | os.PathLike[str]) -> str:
    """Where in a job's local folder its processes keep what lives no longer than the job."""
    return os.path.join(folder, "scratch")


class Guard:
    """One command, its descendants, and the loop that watches them."""

    def __init__(self, job_id: str, owner: int, grace: float, folder: str | None = None, ask: str = "ranks") -> None:
        """`ask`: whom to tell first that the job is to end, "ranks" or "command"."""
        self.job_id = job_id
        self.owner = owner
        self.grace = grace
        self.folder = folder
        self.ask = ask
        self.leader = 0
        self.code: int | None = None

    def run(self, command: list[str]) -> int:
        """Start the command, watch it to its end and leave nothing behind; returns the exit code."""
        watched = (*STOP_SIGNALS, signal.SIGCHLD)
        signal.pthread_sigmask(signal.SIG_BLOCK, watched)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if os.getppid() != self.owner:  # it went before PDEATHSIG was set
            return NOT_STARTED
        environment = {**os.environ, "RLHF_JOB_ID": self.job_id, "RLHF_GUARD_PID": str(os.getpid())}
        environment.pop("RANK", None)  # only a launcher of this job gives one: by it ranks are known
        if self.folder:
            os.makedirs(scratch(self.folder), mode=0o700, exist_ok=True)
            environment["RLHF_SCRATCH"] = scratch(self.folder)
        try:
            self.leader = os.posix_spawnp(
                command[0],
                command,
                environment,
                setpgroup=0,
                setsigmask=(),
                # Python ignores the first two, whoever starts us in the background others; a child would inherit that.
                setsigdef=(signal.SIGPIPE, signal.SIGXFSZ, *STOP_SIGNALS),
            )
        except OSError as error:
            self.say(f"cannot start {command[0]}: {error.strerror}")
            return NOT_STARTED
        told = self.watch(watched)
        grace = self.ask_first(told) if told else self.grace
        stragglers = not told and self.outlived()
        if told or stragglers:
            left = end(self.members, grace, self.reap)
            self.reap()
            if left:
                self.say(f"could not end {sorted(left)}")
        if told and self.code not in (DONE, PREEMPTED):
            return 128 + told  # whatever a launcher that is ended makes of it
        if self.code is None or (stragglers and self.code == 0):
            return ORPHANED
        return self.code

    def watch(self, watched: tuple[int, ...]) -> int:
        """Wait; the signal for which the job is to be ended, 0 if the command ended by itself."""
        while self.code is None:
            received = signal.sigtimedwait(watched, POLL_SECONDS)
            self.reap()
            if received is not None and received.si_signo in STOP_SIGNALS:
                self.say(f"received {signal.Signals(received.si_signo).name}, ending the job")
                return received.si_signo
            if os.getppid() != self.owner:
                self.say("the control plane is gone, ending the job")
                return signal.SIGTERM
        return 0

    def ask_first(self, told: int) -> float:
        """Tell the ranks to end and wait for the command, while the grace lasts; returns the seconds left of it.

        A launcher that is told would itself end ranks that are saving, and its code would not be theirs; a command that is
        asked in their place needs what it has started to reach them.
        """
        if told == AT_ONCE and self.ask == "ranks":
            return AT_ONCE_SECONDS
        until = time.monotonic() + (COMMAND_SECONDS if told == AT_ONCE else self.grace)
        if self.folder:  # so that ranks know this SIGTERM from that of a launcher which has lost one of them
            with suppress(OSError), open(os.path.join(scratch(self.folder), TOLD), "w"):
                pass
        asked = self.ranks() if self.ask == "ranks" else {self.leader}
        for pid in asked:
            send(pid, AT_ONCE if told == AT_ONCE else signal.SIGTERM)
        while asked and time.monotonic() < until and (self.code is None or any(map(alive, asked))):
            if signal.sigtimedwait((AT_ONCE,), 0.05) and told != AT_ONCE:
                return self.ask_first(AT_ONCE)
            self.reap()
        return max(0.0, until - time.monotonic())

    def ranks(self) -> set[int]:
        """The processes that a launcher gave a RANK, but not what they started themselves and may need to save."""
        carriers = {pid for pid in self.members() if variable(pid, "RANK") is not None}
        return {pid for pid in carriers if parent(pid) not in carriers}

    def outlived(self) -> bool:
        """Whether processes of the job are still there some time after the command's end."""
        until = time.monotonic() + LINGER_SECONDS
        while left := self.members():
            if time.monotonic() > until:
                self.say(f"the command ended with code {self.code}, but {sorted(left)} live on; ending them")
                return True
            time.sleep(0.05)
            self.reap()
        return False

    def members(self) -> set[int]:
        """What belongs to the job: all descendants, and whoever carries its id."""
        return descendants(os.getpid()) | processes_of(self.job_id)

    def reap(self) -> None:
        """Take the exit status of every ended child, adopted ones too; keep the command's."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.leader:
                    code = os.waitstatus_to_exitcode(ended[1])
                    self.code = code if code >= 0 else 128 - code

    def remove_files(self) -> None:
        """Remove the scratch folder, and the log as well if the control plane, which would store it, is gone."""
        if self.folder:
            orphan = os.getppid() != self.owner
            shutil.rmtree(self.folder if orphan else scratch(self.folder), ignore_errors=True)

    def say(self, message: str) -> None:
        """One line into the job's log, if anyone still holds it."""
        with suppress(OSError):
            os.write(2, f"guard: {message}\n".encode())


def main() -> int:
    """Parse the command line and guard the command."""
    parser = argparse.ArgumentParser(prog="rlhf_core.guard", description="Own a job and leave nothing of it behind.")
    parser.add_argument("--job-id", required=True)
    parser.add_argument("--parent", type=int, required=True, help="pid of the process that starts the guard")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds between SIGTERM and SIGKILL")
    parser.add_argument("--folder", help="the job's local files: its log, and the scratch folder made here")
    parser.add_argument("--ask", choices=("ranks", "command"), default="ranks", help="whom to tell first")
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    guard = Guard(args.job_id, args.parent, args.grace, args.folder, args.ask)
    try:
        return guard.run(args.command)
    finally:
        guard.remove_files()


if __name__ == "__main__":
    sys.exit(main())
