"""`rlhf logs --follow`: lines as they come, through attempts, to an end that the exit code tells. Others write to a real store."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import stored
from commands import rlhf

from flows import follow as follow_module
from rlhf_core import follow as attempts
from rlhf_core.artifacts import ArtifactRef, Manifest, make_ref, publish
from rlhf_core.ends import Failure
from rlhf_core.job import JobSpec
from rlhf_core.lease import Heartbeat
from rlhf_core.resources import Resources
from rlhf_core.sealed import seal
from rlhf_core.store import Store

ROOT = Path(__file__).parents[2]
REF = make_ref("sft", "demo", {}, {})


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(follow_module, "LOCAL_SECONDS", 0.05)
    monkeypatch.setattr(attempts, "BETWEEN_SECONDS", 1.5)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "store"))


def begin(store: Store, attempt: int = 1, ref: ArtifactRef = REF) -> JobSpec:
    job = stored.begin(store, ref, attempt)
    quick = job.model_copy(update={"resources": Resources(retry_delay_seconds=0)})
    store.write(f"{job.folder}/job.json", seal(quick))
    beat(store, job)
    return quick


def beat(store: Store, job: JobSpec, ended: str | None = None, minutes: float = 0) -> None:
    """A heartbeat of another machine's."""
    fields = {
        "owner": job.job_id,
        "host": "node7",
        "boot_id": "another",
        "pid": 7,
        "pid_started": 1,
        "began": "",
        "beat": 1,
    }
    heartbeat = Heartbeat.model_validate({**fields, "time": stored.ago(minutes=minutes), "ended": ended})
    store.write(f"{job.folder}/heartbeat.json", heartbeat.model_dump_json().encode())


def say(store: Store, job: JobSpec, rank: int, *lines: str) -> None:
    """The log of a rank, whole: each line "second text"."""
    text = "".join(f"2026-01-01T00:00:{line.partition(' ')[0]}.000Z {line.partition(' ')[2]}\n" for line in lines)
    store.write(f"{job.folder}/rank-{rank:03d}.log", text.encode())


def fail(store: Store, job: JobSpec, kind: str, code: int, detail: str) -> None:
    store.write(
        f"{job.folder}/failure.json", seal(Failure.model_validate({"kind": kind, "code": code, "detail": detail}))
    )
    beat(store, job, kind)


def finish(store: Store, job: JobSpec) -> None:
    result = stored.finish(store, job, {"weights": b"1"})
    publish(store, Manifest(ref=job.output, spec={}, folder=result.folder, files=result.files))
    beat(store, job, "done")


@pytest.fixture
def following(store):
    """Starts the command line in a process of its own; `heard` is what it has printed so far."""
    started: list[subprocess.Popen] = []

    class Following:
        def __init__(self, *words: str) -> None:
            argv = [sys.executable, "-m", "flows.cli", "logs", REF.id, "--follow", "--store", store.url, *words]
            both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, **both)
            started.append(self.process)
            self.heard: list[str] = []

        def until(self, word: str) -> None:
            """Read lines up to one with this word; a process that has ended, or is killed after a minute, gives no more."""
            assert self.process.stdout
            limit = threading.Timer(60, self.process.kill)
            limit.start()
            while word not in (line := self.process.stdout.readline()):
                assert line, f"{word} is not in {self.heard}"
                self.heard.append(line.strip())
            self.heard.append(line.strip())
            limit.cancel()

    yield Following
    for process in started:
        process.kill()
        process.communicate()


def test_it_waits_for_the_first_attempt_goes_on_through_the_next_and_ends_when_it_is_published(store, following):
    store.write("sft/other-0123456789ab/attempts/0001/job.json", b"{}")
    store.write(f"{REF.id}/checkpoints/0001/parts/x", b"1")
    seen = following()
    seen.until("waiting for its first attempt")
    first = begin(store)
    say(store, first, 0, "01 one")
    say(store, first, 1, "02 two")
    seen.until("two")
    say(store, first, 0, "01 one", "03 three")
    seen.until("three")
    fail(store, first, "crashed", 1, "ValueError: no")
    seen.until("crashed: ValueError: no; waiting for another attempt")
    second = begin(store, 2)
    seen.until("attempt 2 ---")
    say(store, second, 0, "04 four")
    finish(store, second)
    seen.until("published")
    assert seen.process.wait(30) == 0
    texts = [line.split()[2] for line in seen.heard if line.startswith("00:00:")]
    assert texts == ["one", "two", "three", "four"], "each line once, none of the first attempt again"


def test_ctrl_c_ends_the_following_and_nothing_else(store, following):
    begin(store)
    seen = following()
    seen.until("attempt 1 ---")
    seen.process.send_signal(signal.SIGINT)
    seen.until("no longer following; what runs goes on")
    assert seen.process.wait(30) == 130


def test_what_no_other_attempt_can_help_ends_it_at_once_with_its_exit_code(store, capfd):
    job = begin(store)
    say(store, job, 0, "01 one")
    fail(store, job, "data", 3, "row 7: no prompt")
    code, out, err = rlhf(capfd, "logs", REF.id, "--follow", "--store", store.url)
    assert (code, out.split()[2:]) == (3, ["one"])
    assert "attempt 1: data: row 7: no prompt" in err


def test_after_a_failure_without_another_attempt_it_ends_with_the_failures_code(store, capfd):
    fail(store, begin(store), "out of memory", 5, "on the device")
    code, _, err = rlhf(capfd, "logs", REF.id, "--follow", "--store", store.url)
    assert code == 5 and "no other attempt has begun for 2 s" in err


def test_a_run_that_was_ended_by_hand_ends_it_with_the_code_for_run_it_again(store, capfd):
    beat(store, begin(store), "KeyboardInterrupt", minutes=5)
    code, _, err = rlhf(capfd, "logs", REF.id, "--follow", "--store", store.url)
    assert code == 75 and "ended by Ctrl-C" in err


def test_one_attempt_alone_is_followed_to_its_own_end(store, capfd):
    fail(store, begin(store), "crashed", 1, "no")
    finish(store, begin(store, 2))
    assert rlhf(capfd, "logs", REF.id, "--follow", "--attempt", "1", "--store", store.url)[0] == 1
    assert rlhf(capfd, "logs", REF.id, "--follow", "--attempt", "2", "--store", store.url)[0] == 0


def test_what_can_never_come_is_not_waited_for(store, capfd):
    finish(store, begin(store, 2))
    code, _, err = rlhf(capfd, "logs", REF.id, "--follow", "--attempt", "1", "--store", store.url)
    assert code == 2 and "there is no attempt 1 in" in err
    for key in store.list(f"{REF.id}/attempts/0002"):
        if "/files/" not in key:
            store.delete(key)  # as in a copy of an artifact
    assert rlhf(capfd, "logs", REF.id, "--follow", "--store", store.url)[0] == 0


def test_tail_and_since_choose_lines(store, capfd):
    job = begin(store)
    say(store, job, 0, *(f"{n:02d} word{n}" for n in range(10)))
    finish(store, job)
    for follow in ((), ("--follow",)):
        _, out, _ = rlhf(capfd, "logs", REF.id, *follow, "--tail", "2", "--store", store.url)
        assert [line.split()[2] for line in out.splitlines()] == ["word8", "word9"]
        since = ("--since", "2026-01-01T00:00:07")
        _, out, _ = rlhf(capfd, "logs", REF.id, *follow, *since, "--store", store.url)
        assert [line.split()[2] for line in out.splitlines()] == ["word7", "word8", "word9"]
    assert rlhf(capfd, "logs", REF.id, "--since", "1h", "--store", store.url)[1] == ""
    code, _, err = rlhf(capfd, "logs", REF.id, "--since", "soon", "--store", store.url)
    assert code == 2 and "--since 'soon': write a number and s, m, h or d" in err


def test_a_stage_without_ranks_shows_its_one_log(store, capfd):
    ref = make_ref("data", "demo", {}, {})
    finish(store, begin(store, ref=ref))
    for follow in ((), ("--follow",)):
        code, out, _ = rlhf(capfd, "logs", ref.id, *follow, "--store", store.url)
        assert (code, out) == (0, "a line\n")


def test_an_artifact_is_named_by_any_beginning_and_one_that_is_not_there_is_an_error(store, capfd):
    finish(store, begin(store))
    for text in ("sft/de", "demo", REF.fingerprint[:6], f"{store.url}/{REF.id}"):
        assert rlhf(capfd, "logs", text, "--store", store.url)[0] == 0
    code, _, err = rlhf(capfd, "logs", "ppo/none", "--store", store.url)
    assert code == 2 and "'ppo/none' begins no artifact's id" in err
    code, _, err = rlhf(capfd, "logs", "sft/demo", "ppo", "--store", store.url)
    assert code == 2 and "leave out 'ppo'" in err
