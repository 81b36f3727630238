"""The production form, run: the units' own commands on a PostgreSQL, and the stack where there is no way out of the machine."""

import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from stacked import CONFIG, ROOT, Stacked, free_port, wait

from flows.automations import PAUSES

PRODUCTION = ROOT / "deployments" / "production"
BINARIES = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def started():
    """Processes that are ended afterwards, last first."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in reversed(found):
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture
def postgres(started):
    """The URL of a new database, on a server of its own."""
    if BINARIES is None:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    user = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name  # it refuses to run as root
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    folder = Path(tempfile.mkdtemp(prefix="rlhf-postgres-"))
    shutil.chown(folder, user)
    port = free_port()
    options = ["-D", f"{folder}/data"]
    subprocess.run([*as_user, BINARIES / "initdb", *options, "-A", "trust", "-U", "prefect"], check=True, cwd=folder)
    command = [*as_user, BINARIES / "postgres", *options, "-p", str(port), "-k", folder, "-c", "fsync=off"]
    started.append(subprocess.Popen(command, cwd=folder))
    ready = [BINARIES / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    wait(lambda: subprocess.run(ready).returncode == 0, lambda: "PostgreSQL is not ready")
    yield f"127.0.0.1:{port}"
    shutil.rmtree(folder, ignore_errors=True)


def command_of(unit: str) -> list[str]:
    """What systemd would start, from this installation."""
    [line] = re.findall(r"^ExecStart=(.*)$", (PRODUCTION / f"{unit}.service").read_text(), re.MULTILINE)
    return shlex.split(
        line.replace("/opt/rlhf/.venv/bin/prefect", f"{sys.executable} -m prefect").replace("%H", "here")
    )


def test_the_units_commands_run_a_deployment_on_postgresql(postgres, started, tmp_path):
    port = free_port()
    lines = (PRODUCTION / "rlhf.env").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    given |= {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_HOME": str(tmp_path / "prefect")}
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    env = {**kept, **given, "PYTHONPATH": Stacked.path(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    url = f"postgresql+asyncpg://prefect@{postgres}/prefect"
    subprocess.run(
        [str(BINARIES / "createdb"), "-h", "127.0.0.1", "-p", postgres.rpartition(":")[2], "-U", "prefect", "prefect"],
        check=True,
    )
    logs = {name: (tmp_path / f"{name}.txt").open("w") for name in ("server", "worker")}

    def start(unit: str, command: list[str], **more: str) -> None:
        log = logs[unit]
        started.append(subprocess.Popen(command, cwd=tmp_path, env={**env, **more}, stdout=log, stderr=log, text=True))

    words = [str(port) if word == "4200" else word for word in command_of("rlhf-server")]
    start("server", words, PREFECT_SERVER_DATABASE_CONNECTION_URL=url)
    stacked = At(f"http://127.0.0.1:{port}/api", tmp_path)
    wait(stacked.answers, lambda: (tmp_path / "server.txt").read_text()[-2000:])
    deploy = [sys.executable, "-m", "flows.cli", "deploy", str(CONFIG), "--workdir", str(tmp_path)]
    for what in ("created", "there already"):
        done = subprocess.run(deploy, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(what) == 2 + len(PAUSES)
    start("worker", command_of("rlhf-worker"))
    run = stacked.start(deployment="rlhf-data/data")
    stacked.wait_for_state(run, "Completed")
    assert stacked.manifest("data")
    words = [
        "-h",
        "127.0.0.1",
        "-p",
        postgres.rpartition(":")[2],
        "-U",
        "prefect",
        "-tAc",
        "select state_name from flow_run",
    ]
    assert subprocess.run([str(BINARIES / "psql"), *words], capture_output=True, text=True).stdout.split() == [
        "Completed"
    ]


class At(Stacked):
    """The same calls, to a server that is not of a local stack."""

    def __init__(self, api: str, folder: Path) -> None:
        super().__init__(folder)
        self.stack.api = lambda: api

    def answers(self) -> bool:
        try:
            return self.call("GET", "/health") is True
        except OSError:
            time.sleep(0.3)
            return False


def test_nothing_wants_to_leave_the_machine_and_the_ui_is_whole_without_it(tmp_path):
    if os.geteuid() or not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("a network namespace needs root, unshare and ip")
    script = [sys.executable, str(Path(__file__).with_name("closed.py")), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([Stacked.path(), str(Path(__file__).parent)])}
    done = subprocess.run(["unshare", "--net", *script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["run"] == "Completed"
    assert result["assets"] and set(result["assets"].values()) == {200}
    assert result["would_be_seen"]
    assert result["went_out"] == []
