"""The guard alone: exit codes, and who may end it."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest

from rlhf_core import guard


@pytest.fixture
def job_id():
    return f"unit/{uuid.uuid4().hex}"


def start(job_id, *command, parent=None, grace=1, folder=None, ask="ranks"):
    owner = ["--job-id", job_id, "--parent", str(parent or os.getpid()), "--grace", str(grace), "--ask", ask]
    owner += ["--folder", str(folder)] if folder else []
    argv = [sys.executable, "-m", "rlhf_core.guard", *owner, "--", *command]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def appears(job_id, count):
    """Waits for so many processes of the job; the guard itself is not one of them here."""
    end = time.monotonic() + 5
    while len(guard.processes_of(job_id)) < count and time.monotonic() < end:
        time.sleep(0.02)
    return len(guard.processes_of(job_id)) == count


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("exit 75", 75), ("kill -9 $$", 128 + 9), ("kill -11 $$", 128 + 11)],
)
def test_the_commands_exit_code_is_the_guards(job_id, script, code):
    assert start(job_id, "sh", "-c", script).wait(5) == code


def test_a_command_that_cannot_be_started_is_said(job_id):
    process = start(job_id, "/no/such/command")
    assert "cannot start /no/such/command: No such file" in process.communicate(timeout=5)[1]
    assert process.returncode == guard.NOT_STARTED


def test_nothing_is_started_if_the_parent_is_gone_already(job_id):
    process = start(job_id, "sh", "-c", "echo started", parent=1)
    assert process.communicate(timeout=5)[0] == ""


def test_the_command_knows_its_job_and_its_guard(job_id):
    process = start(job_id, "sh", "-c", "echo $RLHF_JOB_ID $RLHF_GUARD_PID")
    assert process.communicate(timeout=5)[0].split() == [job_id, str(process.pid)]


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_told_to_end_it_ends_the_whole_tree_after_the_grace(job_id, signo):
    script = 'trap "" TERM; setsid sh -c "sleep 100 & sleep 101" & sleep 102 & wait'
    process = start(job_id, "sh", "-c", script)
    assert appears(job_id, 5)
    process.send_signal(signo)
    process.communicate(timeout=5)
    assert not guard.processes_of(job_id)


def test_a_command_may_use_its_grace_to_write_a_checkpoint(job_id):
    process = start(
        job_id, "sh", "-c", 'trap "sleep 0.5; echo saved; exit 75" TERM; echo up; sleep 100 & wait', grace=5
    )
    assert process.stdout and process.stdout.readline() == "up\n"
    process.terminate()
    assert process.communicate(timeout=5)[0] == "saved\n"
    assert process.returncode == 75


LAUNCHER = """
trap 'echo launcher told; exit 1' TERM
RANK=0 sh -c 'trap "sleep 0.5; echo rank saved; exit 75" TERM; sleep 100 & echo up; wait' &
wait $!
code=$?
echo launcher sees $code
exit $code
"""


@pytest.mark.parametrize("outer", [None, "3"], ids=["", "in a rank of another job"])
def test_ranks_are_told_before_their_launcher_which_passes_on_their_code(job_id, monkeypatch, outer):
    monkeypatch.setenv("RANK", outer) if outer else monkeypatch.delenv("RANK", raising=False)
    process = start(job_id, "bash", "-c", LAUNCHER, grace=10)
    assert process.stdout and process.stdout.readline() == "up\n"
    process.terminate()
    out, _ = process.communicate(timeout=10)
    assert out.splitlines() == ["rank saved", "launcher sees 75"]
    assert process.returncode == 75


def test_the_processes_of_a_rank_are_left_to_it(job_id):
    script = """
RANK=0 bash -c 'sleep 100 & trap "kill -0 $! && echo child lives; exit 75" TERM; echo up; wait'
"""
    process = start(job_id, "bash", "-c", script, grace=10)
    assert process.stdout and process.stdout.readline() == "up\n"
    process.terminate()
    assert process.communicate(timeout=10)[0] == "child lives\n"
    assert process.returncode == 75


def test_the_code_of_a_launcher_that_is_ended_is_not_taken_for_its_ranks(job_id):
    """It says what it likes when it is told to end; who tells the guard finds his signal in the code."""
    process = start(job_id, "bash", "-c", "trap 'exit 3' TERM; echo up; sleep 100 & wait")
    assert process.stdout and process.stdout.readline() == "up\n"
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM


# --- a command that looks after ranks elsewhere --------------------------------------------------------------------

# What it has started would end at SIGTERM, and says so.
HEAD = """
RANK=0 bash -c 'trap "echo connection told; exit 1" TERM; sleep 100 & wait' &
trap 'echo asked to {what}; sleep 0.5; kill -0 $! && echo connection lives; kill -9 $!; exit {code}' {signal}
echo up
wait
"""


def test_a_command_that_is_asked_is_told_alone_and_has_the_grace(job_id):
    script = HEAD.format(what="save", code=75, signal="TERM")
    process = start(job_id, "bash", "-c", script, grace=10, ask="command")
    assert process.stdout and process.stdout.readline() == "up\n"
    process.terminate()
    assert process.communicate(timeout=10)[0].splitlines() == ["asked to save", "connection lives"]
    assert process.returncode == 75


def test_a_command_that_is_asked_has_some_time_to_end_its_ranks_at_once(job_id):
    script = HEAD.format(what="hurry", code=0, signal="QUIT")
    process = start(job_id, "bash", "-c", script, grace=0.1, ask="command")
    assert process.stdout and process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGQUIT)
    assert process.communicate(timeout=10)[0].splitlines() == ["asked to hurry", "connection lives"]


# --- without a grace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, signal.SIGTERM], ids=["", "while the grace lasts"])
def test_sigquit_ends_the_whole_tree_at_once(job_id, before):
    process = start(job_id, "bash", "-c", "trap '' TERM; RANK=0 sleep 100 & echo up; sleep 101 & wait", grace=500)
    assert process.stdout and process.stdout.readline() == "up\n"
    if before:
        process.send_signal(before)
        time.sleep(0.5)
    process.send_signal(signal.SIGQUIT)
    process.communicate(timeout=15)
    assert not guard.processes_of(job_id)


@pytest.mark.parametrize("script", ["exit 0", "exit 1", "sleep 100"])
def test_a_jobs_scratch_folder_lives_as_long_as_the_job(job_id, tmp_path, script):
    (tmp_path / "output").touch()
    process = start(job_id, "sh", "-c", f"touch $RLHF_SCRATCH/big; ls $RLHF_SCRATCH; {script}", folder=tmp_path)
    assert process.stdout and process.stdout.readline() == "big\n"
    process.terminate()
    process.communicate(timeout=5)
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_without_a_control_plane_nobody_reads_the_log_and_it_goes_too(job_id, tmp_path):
    """A shell stands for the control plane, and is killed."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "output").touch()
    argv = f"{sys.executable} -m rlhf_core.guard --job-id {job_id} --parent $$ --grace 1 --folder {folder} -- sleep 100"
    shell = subprocess.Popen(["bash", "-c", f"{argv} & wait"])
    assert appears(job_id, 1)
    shell.kill()
    shell.wait()
    end = time.monotonic() + 10
    while folder.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not folder.exists()
    assert not guard.processes_of(job_id)


def test_it_ends_when_the_thread_that_started_it_ends(job_id):
    """Why run_job must stay in the thread that calls it."""
    started = []
    thread = threading.Thread(target=lambda: (started.append(start(job_id, "sleep", "100")), appears(job_id, 1)))
    thread.start()
    thread.join()
    started[0].communicate(timeout=5)
    assert not guard.processes_of(job_id)


def test_a_helper_that_ends_a_moment_later_does_no_harm(job_id):
    assert start(job_id, "sh", "-c", "sleep 0.5 & exit 0").wait(5) == 0


def test_it_starts_fast_and_without_our_dependencies(job_id):
    script = "import sys, rlhf_core.guard; print([m for m in ('pydantic', 'torch', 'subprocess') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "[]"
