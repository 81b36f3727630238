"""A real Slurm on this machine, for tests of jobs that it runs: a controller and two nodes, in one temporary folder.

Each node, n1 and n2, is a slurmd with a PID space and a host name of its own; network and files are this machine's. Two partitions
share the nodes: `low`, the default, whose jobs are queued again when `high` wants their nodes, after a grace. No service of the
system is used or touched, all ports are free ones, and whatever there is, jobs too, dies with this process, also when it is
killed. The fixture `slurm` ends what a test leaves in the queue and fails that test. Needs root and Debian's slurm-wlm and munge
(`apt-get install -y --no-install-recommends slurm-wlm munge`); skipped with the reason elsewhere.
"""

import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from s3 import free_ports

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "munged", "unshare")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
NODES = ("n1", "n2")
START_SECONDS = 30
PR_SET_PDEATHSIG = 1
CONFIG = """
ClusterName=rlhf-tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait={kill_wait}
NodeName=n1 NodeAddr=127.0.0.1 Port={n1} CPUs=4
NodeName=n2 NodeAddr=127.0.0.1 Port={n2} CPUs=4
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace} State=UP
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
"""
NODE = """
hostname {name}
mount --bind {folder}/hosts /etc/hosts
slurmd -D -N {name} &
wait
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    if os.geteuid():
        return "a Slurm of its own needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if absent:
        return f"no {', '.join(absent)}: apt-get install -y --no-install-recommends slurm-wlm munge"
    return None


class Slurm:
    """One controller and its two nodes.

    Attributes:
        environment: the variable by which Slurm's commands find it.
        grace: seconds that preempted jobs of partition `low` have.
        kill_wait: seconds between SIGTERM and SIGKILL for jobs that are ended.
    """

    grace = 5
    kill_wait = 10

    def __init__(self, folder: Path) -> None:
        """`folder`: of all its files; a short path, as a socket lies there."""
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        controller, n1, n2 = free_ports(3)
        host = socket.gethostname().partition(".")[0]
        text = CONFIG.format(
            host=host, folder=folder, controller=controller, n1=n1, n2=n2, grace=self.grace, kill_wait=self.kill_wait
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + f"127.0.0.1 {' '.join(NODES)}\n")
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()

    def start(self) -> "Slurm":
        """Start everything and wait until both nodes take jobs."""
        files = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={self.folder}/munge.{suffix}" for name, suffix in files.items()]
        try:
            self._start("munged", ["munged", "--force", "--foreground", "--num-threads=2", *options])
            self._await(lambda: (self.folder / "munge.sock").exists(), "munged")
            self.start_controller()
            for name in NODES:
                apart = ["unshare", "--pid", "--uts", "--mount-proc", "--fork", "--kill-child"]
                self._start(name, [*apart, "sh", "-ec", NODE.format(name=name, folder=self.folder)])
            self._await(lambda: self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T") == "idle\nidle", "nodes")
        except BaseException:
            self.close()
            raise
        return self

    def start_controller(self) -> None:
        """Start slurmctld; again after `stop_controller`."""
        self._start("slurmctld", ["slurmctld", "-D"])
        self._await(lambda: "UP" in self.run("scontrol", "ping"), "slurmctld")

    def stop_controller(self) -> None:
        """End slurmctld, politely, as it would forget the newest jobs otherwise; jobs go on."""
        self._processes["slurmctld"].terminate()
        self._processes["slurmctld"].wait(20)

    def run(self, *command: str) -> str:
        """What one of Slurm's commands writes, without the last newline; whatever its exit code."""
        done = subprocess.run(
            command, env=self._environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
        return done.stdout.rstrip("\n")

    def queue(self) -> list[str]:
        """Numbers of the jobs that are queued, run or are ending."""
        return self.run("squeue", "-h", "-o", "%i").split()

    def state(self, job: str) -> str:
        """The state of a job, e.g. RUNNING; empty if there is none."""
        return self.field(job, "JobState")

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`."""
        found = re.search(rf"(?:^| ){name}=(\S*)", self.run("scontrol", "show", "job", "-o", job))
        return found[1] if found else ""

    def occupy(self, partition: str = "high", nodes: int = 2) -> str:
        """Submit a job that holds so many whole nodes until it is cancelled; returns its number."""
        options = ["--parsable", f"--partition={partition}", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"]
        return self.run("sbatch", *options, "--wrap", "sleep 1000")

    def empty(self, seconds: float = 30) -> bool:
        """Cancel all jobs and wait until none is left; whether that is so."""
        self.run("scancel", "--user=root")
        end = time.monotonic() + seconds
        while self.queue() and time.monotonic() < end:
            time.sleep(0.1)
        return not self.queue()

    def close(self) -> None:
        """End everything at once, jobs too."""
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()
        self._processes.clear()

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **self.environment, "PATH": PATH}

    def _start(self, name: str, command: list[str]) -> None:
        libc = ctypes.CDLL(None)
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),
            )

    def _await(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not condition():
            ended = [name for name, process in self._processes.items() if process.poll() is not None]
            if ended or time.monotonic() > end:
                said = "\n".join(f.read_text(errors="replace")[-1000:] for f in sorted(self.folder.glob("*.out")))
                raise RuntimeError(f"no {what}: {', '.join(ended) or 'nothing'} ended; {said}")
            time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """The session's Slurm."""
    if reason := missing():
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm")).start()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def slurm(slurm_cluster: Slurm, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """Slurm with an empty queue, its variable in the environment of this test; at the end nothing may be queued or running."""
    for name, value in slurm_cluster.environment.items():
        monkeypatch.setenv(name, value)
    yield slurm_cluster
    end = time.monotonic() + 2 * Slurm.kill_wait
    while slurm_cluster.queue() and time.monotonic() < end:
        time.sleep(0.1)
    left = slurm_cluster.queue()
    slurm_cluster.empty()
    assert not left, f"jobs {left} were left in the queue"
