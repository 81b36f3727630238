"""Nodes over ssh: what reaches a host, how it is let go, and what is said when it cannot be had. Real sshd on test hosts."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import rlhf, small_pipeline
from hosts import CONTROL, ROOT, Hosts
from s3 import SECRET_KEY, S3Server

from rlhf_core import guard, ssh, start_ssh
from rlhf_core.artifacts import make_ref
from rlhf_core.cluster import Cluster
from rlhf_core.errors import ConfigError
from rlhf_core.hosts import seats
from rlhf_core.job import JobSpec
from rlhf_core.members import NodeBeat, Orders, beat_key, orders_key, write
from rlhf_core.resources import Resources
from rlhf_core.ssh import Connection, explain
from rlhf_core.start_ssh import SSHStarter
from rlhf_core.starting import Trouble
from rlhf_core.store import Store

WAIT_SECONDS = 20.0
CLUSTER = Cluster(hosts=())
# Stands for a node: says what it was given, then lives until nobody holds its standard input.
STAYS = (
    "import json, os, sys; given = json.loads(sys.stdin.readline()); "
    "print('given', json.dumps({**given, 'own': os.environ.get('RLHF_JOB_ID'), 'cwd': os.getcwd()}), flush=True); "
    "sys.stdin.read(); print('let go', flush=True)"
)


def until(ready: Callable[[], object], seconds: float = WAIT_SECONDS) -> None:
    """Wait for something; fails when it does not come."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@pytest.fixture
def cluster(hosts: Hosts) -> Cluster:
    return Cluster(ssh=hosts.ssh)


@pytest.fixture
def connect(cluster: Cluster) -> Iterator[Callable[..., Connection]]:
    """Open connections that are ended with the test; what they say is in `heard` of each."""
    opened: list[Connection] = []

    def open_one(
        host: str, code: str = STAYS, variables: dict[str, str] | None = None, **changes: object
    ) -> Connection:
        lines: list[str] = []
        reached = cluster.model_copy(update=changes)
        made = Connection(reached, host, ["-c", code], variables or {}, lines.append)
        made.heard = lines  # pyright: ignore[reportAttributeAccessIssue]
        opened.append(made)
        return made

    yield open_one
    for connection in opened:
        connection.let_go()
        connection.end(time.monotonic())


def given_to(connection: Connection) -> dict[str, str]:
    until(lambda: connection.said)
    return json.loads(connection.said[0].removeprefix("given "))


# --- what reaches a host ---------------------------------------------------------------------------------------------


def test_a_host_runs_our_interpreter_with_the_variables_it_is_given(hosts, connect):
    given = given_to(connect("node2", variables={"NAME": "two words; $HOME", "RLHF_JOB_ID": "sft/x@1/2"}))
    assert given["NAME"] == "two words; $HOME"
    assert (given["own"], given["cwd"]) == ("sft/x@1/2", "/root")
    assert len(hosts.processes("node2", "sft/x@1/")) == 1


def test_no_credential_is_on_a_command_line_here_or_there(hosts, connect, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("HF_TOKEN", "hf-canary")
    monkeypatch.setenv("PYTHONPATH", "not-forwarded")
    variables = ssh.forwarded(CLUSTER)
    assert given_to(connect("node1", variables=variables))["HF_TOKEN"] == "hf-canary"
    lines = [" ".join(guard.argv(pid)) for pid in guard.pids()]  # those of hosts too: they are below this process
    assert any("json.loads(sys.stdin.readline())" in line for line in lines), "the search finds the processes"
    assert not [line for line in lines if SECRET_KEY in line or "hf-canary" in line]


def test_what_travels_is_what_is_named_and_nothing_of_this_machine_s_part_of_the_job(monkeypatch):
    for name in ("RLHF_JOB_ID", "RLHF_GUARD_PID", "RLHF_SCRATCH", "RLHF_RANKS", "RLHF_CACHE_GB", "RLHF_STORE_PATIENCE"):
        monkeypatch.setenv(name, "ours")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    cluster = Cluster(env={"NCCL_DEBUG": "WARN", "A": "cluster", "B": "cluster"}, forward=("RLHF_*", "NCCL_*"))
    found = ssh.forwarded(cluster, {"B": "host"})
    assert {"A": "cluster", "B": "host", "NCCL_DEBUG": "WARN", "RLHF_STORE_PATIENCE": "ours"}.items() <= found.items()
    assert not {"RLHF_JOB_ID", "RLHF_GUARD_PID", "RLHF_SCRATCH", "RLHF_RANKS", "RLHF_CACHE_GB", "PATH"} & set(found)
    assert "DS_ACCELERATOR" not in ssh.forwarded(Cluster()), "what a node computes on it says itself"


def test_what_python_needs_when_it_starts_is_there_when_it_starts(hosts, connect):
    hosts.run("node1", ["sh", "-c", "mkdir early && echo 'WORD = 42' > early/early.py"])
    connection = connect("node1", "import early; print('found', early.WORD)", variables={"PYTHONPATH": "/root/early"})
    until(lambda: connection.code is not None)
    assert list(connection.said) == ["found 42"]


def test_our_options_are_defaults_and_the_cluster_s_ssh_command_goes_before_them(cluster):
    words = ssh.ssh_command(cluster.model_copy(update={"ssh": ("ssh", "-p", "2222")}), "node1", ["-m", "x"], {})
    assert words[:3] == ["ssh", "-p", "2222"] and "BatchMode=yes" in words and "ServerAliveInterval=5" in words
    assert words[-3:-1] == ["--", "node1"]
    assert shlex.split(words[-1])[-3:] == ["-u", "-m", "x"]


# --- how a host is let go --------------------------------------------------------------------------------------------


def test_closing_its_input_ends_a_host_s_part_and_its_ssh_well(hosts, connect):
    connection = connect("node1", variables={"RLHF_JOB_ID": "sft/x@1/2"})
    given_to(connection)
    connection.let_go()
    until(lambda: connection.code is not None)
    assert connection.code == 0 and connection.said[-1] == "let go"
    assert not hosts.processes("node1")


def test_a_killed_ssh_lets_the_host_go_and_is_told_as_such(hosts, connect):
    connection = connect("node1")
    given_to(connection)
    os.kill(connection.process.pid, signal.SIGKILL)
    until(lambda: connection.code is not None)
    until(lambda: not hosts.processes("node1"))
    trouble = explain("node1", connection.code, connection.said, CLUSTER)
    assert trouble == Trouble("launcher", "node1: its ssh was killed by SIGKILL")


def test_ssh_heeds_no_sigterm_so_that_nodes_are_told_before_they_are_cut_off(connect):
    connection = connect("node1")
    given_to(connection)
    os.kill(connection.process.pid, signal.SIGTERM)
    time.sleep(1)
    assert connection.process.poll() is None
    connection.let_go()
    until(lambda: connection.code == 0)


def test_the_end_of_a_connection_to_a_host_that_is_cut_off_takes_no_longer_than_asked(hosts, connect):
    connection = connect("node1")
    given_to(connection)
    hosts.cut("node1")
    began = time.monotonic()
    connection.let_go()
    connection.end(began + 1)
    assert time.monotonic() - began < 10 and connection.process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("blow", ["crash", "cut"])
def test_a_host_that_is_lost_is_noticed_and_may_come_back(hosts, connect, cluster, blow):
    quick = (*cluster.ssh, "-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2")
    connection = connect("node2", ssh=quick)
    given_to(connection)
    getattr(hosts, blow)("node2")
    until(lambda: connection.code is not None)
    trouble = explain("node2", connection.code, connection.said, CLUSTER)
    assert trouble and trouble.kind == "launcher" and trouble.message.startswith("node2: the connection has ended")


# --- the starter -----------------------------------------------------------------------------------------------------


@pytest.fixture
def starter(hosts, tmp_path, monkeypatch) -> Iterator[Callable[..., SSHStarter]]:
    """Start a job's nodes on hosts, which run STAYS in place of a node; ended with the test."""
    made: list[SSHStarter] = []

    def start(names: list[str], attempt: int = 1, code: str | None = STAYS, **cluster: object) -> SSHStarter:
        if code is not None:
            monkeypatch.setattr(start_ssh, "node_command", lambda *_, **__: ["-c", code])
        given = {"hosts": names, "ssh": hosts.ssh, **cluster}
        resources = Resources.model_validate({"launcher": "hostfile", "cluster": given})
        made.append(
            SSHStarter(store := Store(f"file://{tmp_path}/store"), job_of(store, resources, attempt), seats(resources))
        )
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.stop()


def job_of(store: Store, resources: Resources, attempt: int = 1) -> JobSpec:
    ref = make_ref("sft", "demo", {}, {})
    return JobSpec(
        stage="sft", store=store.url, output=ref, attempt=attempt, job_id=f"{ref.id}@0/{attempt}", spec={}, identity={},
        resources=resources,
    )  # fmt: skip


def troubles(starter: SSHStarter, count: int = 1) -> list[Trouble]:
    found: list[Trouble] = []
    until(lambda: len(found.extend(starter.look()) or found) >= count)
    return found


def test_each_host_runs_its_node_under_an_id_of_its_own_and_stop_leaves_none(hosts, starter, capfd):
    started = starter(["node1", {"host": "node2", "env": {"WHO": "second"}}])
    family = started.job.family.partition("@")[0]
    until(lambda: all(hosts.processes(name, f"{family}@0/1/agent-000{n}") for n, name in enumerate(("node1", "node2"))))
    until(lambda: len(started._connections[1].said) == 1)
    assert started.look() == [] and started.waits() is None
    started.stop()
    assert not hosts.processes("node1") and not hosts.processes("node2") and started.look() == []
    said = capfd.readouterr().out
    assert "node1: given" in said and '"WHO": "second"' in said and "node2: let go" in said


@pytest.mark.parametrize(
    ("host", "options", "python", "said"),
    [
        ("nosuchhost", (), None, ["nosuchhost: Could not resolve hostname", "; correct the name"]),
        ("node1", ("-p", "2222"), None, ["port 2222: Connection refused", "; start sshd there, or name its port"]),
        ("nobody@node1", (), None, ["Permission denied (publickey)", "public key", "`ssh nobody@node1 true`"]),
        (
            "node1",
            ("-o", "UserKnownHostsFile=/dev/null"),
            None,
            ["Host key verification failed", "connect once by hand"],
        ),
        ("node1", ("-o", "NoSuchOption=1"), None, ["nosuchoption", "correct resources.cluster.ssh"]),
        ("node1", (), "/nowhere/python", ["cannot start Python there", "/nowhere/python", "resources.cluster.python"]),
        ("node1", (), "/etc", ["cannot start Python there", "Permission denied", "resources.cluster.python"]),
    ],
)
def test_a_host_that_cannot_be_had_is_told_with_its_name_the_reason_and_a_remedy(
    hosts, starter, host, options, python, said
):
    [trouble] = troubles(starter([host], ssh=(hosts.ssh[0], *options, *hosts.ssh[1:]), python=python))
    assert (trouble.kind, trouble.node) == ("configuration", 0)
    assert trouble.message.startswith(f"{host}: ") and len(trouble.message.splitlines()) == 1
    assert [part for part in said if part not in trouble.message] == []


def test_an_address_where_nobody_is_is_told_within_the_time_for_connecting(hosts, starter):
    nobody = f"root@{hosts.address('node1').rpartition('.')[0]}.99"
    [trouble] = troubles(starter([nobody]))
    assert trouble.kind == "configuration" and "see that it is up" in trouble.message


def test_an_interpreter_without_the_package_or_with_an_empty_one_is_told_with_what_installs_it(hosts, starter):
    bare = f"echo 'exec {sys.executable} -S \"$@\"' > bare && chmod +x bare"  # no installed packages
    for name in ("node1", "node2"):
        hosts.run(name, ["sh", "-c", bare], check=True)
    hosts.run("node2", ["mount", "-t", "tmpfs", "tmpfs", f"{ROOT}/rlhf_core"], check=True)
    started = starter(["node1", "node2"], code=None, python="/root/bare")
    found = {trouble.node: trouble for trouble in troubles(started, 2)}
    assert {trouble.kind for trouble in found.values()} == {"configuration"}
    assert "node1: the package 'pydantic' is not installed" in found[0].message
    assert "node2: this package (rlhf_core) is not installed" in found[1].message
    assert all("pip install -c constraints.txt -e ." in trouble.message for trouble in found.values())


def test_a_host_that_has_worked_before_is_tried_again_when_it_cannot_be_reached(hosts, starter):
    port = ("-p", "2222")
    started = starter(["node1"], attempt=3, ssh=(*hosts.ssh, *port))
    assert troubles(started)[0].kind == "configuration"
    before = started.job.model_copy(update={"attempt": 2})
    write(started.store, orders_key(before.folder), Orders(job_id="x", beat=1, order="go", seats=started.seats))
    write(started.store, beat_key(before.folder, 0), NodeBeat(node=0, incarnation="x", beat=1, state="running"))
    assert troubles(starter(["node1"], attempt=3, ssh=(*hosts.ssh, *port)))[0].kind == "launcher"
    assert troubles(starter(["nobody@node1"], attempt=3))[0].kind == "configuration", "a key does not come by itself"


def test_what_a_node_says_for_itself_is_heard_before_its_ssh_s_end_is_told(starter):
    code = "print('error: the disk is full', flush=True); raise SystemExit({})"
    [wrong] = troubles(starter(["node1"], code=code.format(2)))
    assert wrong == Trouble("configuration", "node1: the disk is full", 0)
    began = time.monotonic()
    [other] = troubles(starter(["node1"], code=code.format(1)))
    assert other == Trouble("launcher", "node1: the disk is full", 0)
    assert time.monotonic() - began >= start_ssh.HOLD_SECONDS
    done = starter(["node1"], code="print('done')")
    until(lambda: done._connections[0].code == 0)
    assert done.look() == []


def test_an_ssh_command_that_is_not_there_is_told_before_anything_is_started(starter):
    with pytest.raises(ConfigError, match=r"resources.cluster.ssh: '/nowhere/ssh' is no command"):
        starter(["node1"], ssh=("/nowhere/ssh",))


# --- rlhf doctor --hosts ---------------------------------------------------------------------------------------------


@pytest.fixture
def config(hosts: Hosts, hosts_s3: S3Server, tmp_path) -> Path:
    """A pipeline on two hosts; its store is on the S3 server."""
    resources = {"launcher": "hostfile", "cluster": {"hosts": ["node1", "node2"], "ssh": list(hosts.ssh)}}
    return small_pipeline(tmp_path, store="s3://rlhf/doctor", resources=resources)


def look(capfd, config: Path, hosts: str | None, *words: str) -> tuple[int, str, list[str]]:
    """`rlhf doctor CONFIG --hosts …`: exit code, the table, the refusals."""
    code, out, err = rlhf(capfd, "doctor", config, *(["--hosts", hosts] if hosts else []), *words)
    return code, out, [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]


def test_doctor_shows_what_each_host_has_when_all_are_well(hosts_s3, capfd, config):
    code, out, refusals = look(capfd, config, "node1,node2,node3")
    assert (code, refusals) == (0, [])
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[:2] for row in rows] == [["ok", "node1"], ["ok", "node2"], ["ok", "node3"]]
    assert all("cpu" in row for row in rows)
    assert not [key for key in Store("s3://rlhf/doctor").list("") if key.startswith("doctor/")], "something was left"


def test_doctor_names_every_host_that_cannot_take_part_though_one_is_dead(hosts, capfd, config):
    hosts.cut("node3")
    fake = "mkdir -p fake/deepspeed-0.1.dist-info && echo 'Version: 0.1' > fake/deepspeed-0.1.dist-info/METADATA"
    hosts.run("node2", ["sh", "-c", fake], check=True)
    env = "resources.cluster.env={PYTHONPATH: /root/fake}"
    code, out, refusals = look(capfd, config, "node1,node2,node3,node4", "--set", env)
    assert code == 2
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["ok", "node1"], ["no", "node2"], ["no", "node3"], ["no", "node4"]
    ]  # fmt: skip
    skew, dead, unknown = refusals
    assert "node2: deepspeed 0.1, but" in skew and "pip install" in skew
    assert "node3: " in dead and "see that it is up" in dead
    assert "node4: Could not resolve hostname" in unknown


def test_another_source_on_a_host_is_refused_by_name(hosts, capfd, config):
    copy = f"mkdir other && cp -r {ROOT}/rlhf_core other/ && echo '# changed' >> other/rlhf_core/errors.py"
    hosts.run("node2", ["sh", "-c", copy], check=True)
    code, _, [line] = look(capfd, config, "node1,node2", "--set", "resources.cluster.env={PYTHONPATH: /root/other}")
    assert code == 2 and line.startswith("node2: another source of rlhf_core")


def test_a_store_that_hosts_do_not_share_is_refused_on_each(capfd, config, tmp_path):
    code, _, refusals = look(capfd, config, "node1,node2", "--store", f"file://{tmp_path}/store")
    assert code == 2 and [line.partition(":")[0] for line in refusals] == ["node1", "node2"]
    assert all("file system that all nodes share" in line for line in refusals)
    assert not list((tmp_path / "store").rglob("doctor/*"))


def test_a_store_that_a_host_cannot_reach_is_refused_there(hosts, capfd, config):
    env = {"host": "node2", "env": {"AWS_ENDPOINT_URL": "http://10.255.255.1:1"}}
    code, _, [line] = look(
        capfd, config, None, "--set", f"resources.cluster.hosts={json.dumps([{'host': 'node1'}, env])}"
    )
    assert code == 2 and line.startswith("node2: store: ")


def test_slots_that_do_not_fit_are_one_message(capfd, config, tmp_path):
    (tmp_path / "hostfile").write_text("node1 slots=2\nnode2 slots=1\n")
    more = ("--set", "resources.processes=2")
    code, _, [line] = look(capfd, config, str(tmp_path / "hostfile"), *more)
    assert code == 2
    assert "node2 has 1 slots" in line and "resources.processes is 2" in line and "lower" in line


def test_the_control_plane_s_own_link_may_be_the_one_that_is_cut(hosts, starter):
    started = starter(["node1", "node2"], ssh=(*hosts.ssh, "-o", "ServerAliveInterval=1"))
    until(lambda: all(connection.said for connection in started._connections))
    hosts.cut(CONTROL)
    assert {trouble.kind for trouble in troubles(started, 2)} == {"launcher"}


def test_test_hosts_end_with_the_process_that_made_them_also_when_it_is_killed(hosts, tmp_path):
    code = (
        "import sys, pathlib; from hosts import Hosts; made = Hosts(1, pathlib.Path(sys.argv[1])); "
        "print(made.control, made.init('node1'), flush=True); sys.stdin.read()"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "made")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}/tests"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert maker.stdout
    control, init = maker.stdout.readline().split()

    def has_address() -> bool:
        return control in subprocess.run(["ip", "addr"], capture_output=True, text=True, check=True).stdout

    assert guard.alive(int(init)) and has_address()
    maker.kill()
    maker.wait()
    until(lambda: not guard.alive(int(init)) and not has_address())
