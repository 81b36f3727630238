"""One ssh to one host: our interpreter runs there for as long as its standard input is open, and its end is explained.

The environment goes in by that input, so that no credential is on a command line or in the store; what must be there when Python
starts (PYTHONPATH and the like), and nothing secret, stands on the command line. When an ssh ends, its code and last words tell
what was wrong: the name, the port, the key, the interpreter, the package, or the link. It heeds no SIGTERM here: who ends all
processes of a job with one would cut the nodes off before they are told to save.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from rlhf_core.cluster import Cluster
from rlhf_core.errors import ConfigError, ExitCode
from rlhf_core.starting import Trouble

CONNECT_SECONDS = 10
OPTIONS = {
    "BatchMode": "yes",  # no question that nobody answers
    "ConnectTimeout": str(CONNECT_SECONDS),
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "3",
    "ControlMaster": "no",  # a connection that is shared would hide the end of ours
    "ControlPath": "none",
    "ForwardX11": "no",
    "ForwardAgent": "no",
    "LogLevel": "ERROR",
}
OWN = (
    "RLHF_JOB_ID",
    "RLHF_GUARD_PID",
    "RLHF_SCRATCH",
    "RLHF_RANKS",
    "RLHF_CACHE*",
)  # of this machine's part of the job
AT_START = ("PYTHON*", "LD_*", "PATH")
TAIL_LINES = 40
SSH_FAILED = 255
NOT_EXECUTABLE, NOT_FOUND = 126, 127


@dataclass(frozen=True)
class Cause:
    """A way in which ssh fails before a node has begun.

    Attributes:
        said: what ssh says then.
        remedy: for people; {host} is the host.
        passes: whether it may pass by itself, so that it counts as wrong only for a host that has never worked.
    """

    said: re.Pattern[str]
    remedy: str
    passes: bool


CAUSES = (
    Cause(
        re.compile(r"Could not resolve hostname"),
        "correct the name (resources.cluster.hosts), or give its address",
        True,
    ),
    Cause(
        re.compile(r"connect to .*: Connection refused"),
        "start sshd there, or name its port: resources.cluster.ssh: [ssh, -p, PORT]",
        True,
    ),
    Cause(
        re.compile(r"(connect to .*|Connection to .*|banner exchange.*): ?.*(timed out|No route to host|unreachable)"),
        "see that it is up and that no firewall is between, or leave it out: resources.cluster.exclude",
        True,
    ),
    Cause(
        re.compile(r"Permission denied \(|Too many authentication failures"),
        "put this user's public key into ~/.ssh/authorized_keys there, or name user and key: USER@HOST, "
        "resources.cluster.ssh: [ssh, -i, KEY]; `ssh {host} true` must work without a question",
        False,
    ),
    Cause(
        re.compile(r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|host key .* is known"),
        "connect once by hand and check the key: `ssh {host} true`",
        False,
    ),
    Cause(
        re.compile(r"Bad configuration option|unknown option|[Ii]llegal option|Can't open user config|usage: ssh"),
        "correct resources.cluster.ssh",
        False,
    ),
)
NO_MODULE = re.compile(r"No module named '?([\w.]+)'?")


def forwarded(cluster: Cluster, host_env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that a host is given: what travels of ours, the cluster's, the host's."""
    ours = {
        name: value for name, value in os.environ.items() if _matches(name, cluster.forward) and not _matches(name, OWN)
    }
    return {**ours, **cluster.env, **(host_env or {})}


def ssh_command(cluster: Cluster, host: str, arguments: Sequence[str], variables: Mapping[str, str]) -> list[str]:
    """The local command that runs our interpreter with `arguments` on a host.

    What `cluster.ssh` says goes before our options, of which ssh takes the first.
    """
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    early = {name: value for name, value in variables.items() if _matches(name, AT_START)}
    root = str(Path(__file__).resolve().parent.parent)
    if root not in (
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
    ):  # as for ranks: see launch.environment
        early["PYTHONPATH"] = os.pathsep.join(filter(None, [early.get("PYTHONPATH"), root]))
    # No module of the folder in which a session begins shadows ours.
    assignments = [f"{name}={value}" for name, value in {**early, "PYTHONSAFEPATH": "1"}.items()]
    if "RLHF_JOB_ID" in variables:
        assignments.append(f"RLHF_JOB_ID={variables['RLHF_JOB_ID']}")
    there = ["exec", "env", *assignments, interpreter(cluster), "-u", *arguments]
    return [*cluster.ssh, "-T", *options, "--", host, shlex.join(there)]


def interpreter(cluster: Cluster) -> str:
    """Python's path on the nodes."""
    return cluster.python or sys.executable


class Connection:
    """One ssh and the thread that reads what it says.

    Attributes:
        host: as ssh takes it.
        said: the last lines.
        code: how ssh ended; None while it runs.
    """

    def __init__(
        self,
        cluster: Cluster,
        host: str,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        on_line: Callable[[str], None],
        on_end: Callable[["Connection"], None] = lambda _: None,
    ) -> None:
        """Start it.

        Args:
            cluster: how hosts are reached.
            host: which.
            arguments: behind the interpreter.
            variables: the environment there, sent by standard input as one line of JSON.
            on_line: called with each line it says, in the thread.
            on_end: called in the thread when it has ended.
        """
        self.host = host
        self.cluster = cluster
        self.said: deque[str] = deque(maxlen=TAIL_LINES)
        self.code: int | None = None
        self._on_line, self._on_end = on_line, on_end
        command = ssh_command(cluster, host, arguments, variables)
        deaf = ["sh", "-c", 'trap "" TERM; exec "$@"', "sh", *command]
        self.process = subprocess.Popen(
            deaf, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        hidden = {name: value for name, value in variables.items() if name != "RLHF_JOB_ID"}
        self._greeting = json.dumps(hidden).encode() + b"\n"
        self._thread = threading.Thread(target=self._follow, daemon=True, name=f"ssh {host}")
        self._thread.start()

    def _follow(self) -> None:
        assert self.process.stdin and self.process.stdout
        with suppress(OSError):  # it has ended, and says why
            self.process.stdin.write(self._greeting)
        rest = b""
        while data := self.process.stdout.read(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                self._take(line)
        if rest:
            self._take(rest)
        self.code = self.process.wait()
        self._on_end(self)

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        self.said.append(text)
        self._on_line(text)

    def let_go(self) -> None:
        """Close its standard input, by which the host knows that nobody wants it any more."""
        assert self.process.stdin
        with suppress(OSError):
            self.process.stdin.close()

    def end(self, until: float) -> None:
        """Wait for its end to a time of the monotonic clock, and kill it then."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, until - time.monotonic()))
        self.process.kill()
        self.process.wait()
        self._thread.join(1)


def explain(host: str, code: int, said: Sequence[str], cluster: Cluster, known: bool = False) -> Trouble | None:
    """What the end of an ssh means; None if its host ended well.

    Args:
        host: the host.
        code: with which ssh ended; negative: by that signal.
        said: the last lines.
        cluster: how it was reached.
        known: it has worked before, so that what may pass will.
    """
    lines = [line.strip() for line in said if line.strip()]
    last = lines[-1] if lines else "without a word"
    if code == 0:
        return None
    if code < 0:
        return Trouble("launcher", f"{host}: its ssh was killed by {signal.Signals(-code).name}")
    if code == SSH_FAILED or lines[-1:] == ["usage: ssh"]:
        return _of_ssh(host, lines, last, known)
    if code in (NOT_EXECUTABLE, NOT_FOUND) and not any(line.startswith("error: ") for line in lines):
        return Trouble(
            "configuration",
            f"{host}: cannot start Python there: {last}; name the interpreter on the nodes: resources.cluster.python (is "
            f"{interpreter(cluster)})",
        )
    for line in reversed(lines):
        if match := NO_MODULE.search(line):
            return Trouble("configuration", _missing(host, match[1], cluster))
        if line.startswith("error: "):
            kind = "configuration" if code == ExitCode.CONFIG else "launcher"
            return Trouble(kind, f"{host}: {line.removeprefix('error: ')}")
    return Trouble("launcher", f"{host}: its node process ended with code {code}: {last}")


def _of_ssh(host: str, lines: list[str], last: str, known: bool) -> Trouble:
    for line in lines:
        for cause in CAUSES:
            if cause.said.search(line):
                said = line.removeprefix("ssh: ")
                kind = "launcher" if cause.passes and known else "configuration"
                return Trouble(kind, f"{host}: {said}; {cause.remedy.format(host=host)}")
    return Trouble("launcher", f"{host}: the connection has ended: {last}")


def _missing(host: str, module: str, cluster: Cluster) -> str:
    package = module.partition(".")[0]
    what = "this package (rlhf_core)" if package == "rlhf_core" else f"the package {package!r}"
    return (
        f"{host}: {what} is not installed for {interpreter(cluster)}; install it there from the same source: "
        "pip install -c constraints.txt -e ., or name an interpreter that has it: resources.cluster.python"
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def require_ssh(cluster: Cluster) -> None:
    """ConfigError if the ssh command is not on this machine."""
    if not cluster.ssh or not shutil.which(cluster.ssh[0]):
        raise ConfigError(
            f"resources.cluster.ssh: {' '.join(cluster.ssh) or 'nothing'!r} is no command here; install an ssh client, or "
            "give its path"
        )
