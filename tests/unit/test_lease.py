"""The lease on an artifact: real processes that hold it, are killed, suspended and cut off; a real store on disk."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_core import lease
from rlhf_core.artifacts import Manifest, describe, make_ref, publish, read_manifest, verify
from rlhf_core.errors import AlreadyExists, JobFailed, StoreError
from rlhf_core.job import JobSpec, job_url, read_job
from rlhf_core.lease import Busy, Heartbeat, acquire, free_number, take
from rlhf_core.sealed import seal
from rlhf_core.store import Store

REF = make_ref("sft", "demo", {}, {})
BEAT, TTL = 0.2, 2.0

# Takes the lease once the file `go` is there, says so, and holds it until the file `over` is there.
HOLDER = """
import sys, time
from pathlib import Path
from rlhf_core.job import JobSpec
from rlhf_core.lease import Busy, acquire
from rlhf_core.store import Store

folder, job = Path(sys.argv[1]), JobSpec.model_validate_json(sys.argv[2])
print("up", flush=True)
while not (folder / "go").exists():
    time.sleep(0.01)
try:
    with acquire(Store(job.store), job) as held:
        held.note({"step": 40, "total": 100, "phase": "train"})
        print("holds", held.job.attempt, flush=True)
        while not (folder / "over").exists() and not held.lost:
            time.sleep(0.01)
        print("lost" if held.lost else "over", flush=True)
except Busy as busy:
    print("busy", busy, flush=True)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT_SECONDS", BEAT)
    monkeypatch.setattr(lease, "TTL_SECONDS", TTL)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setenv("RLHF_LEASE_BEAT", str(BEAT))
    monkeypatch.setenv("RLHF_LEASE_TTL", str(TTL))


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def a_job(store) -> JobSpec:
    job = JobSpec(stage="sft", store=store.url, output=REF, attempt=1, job_id="", spec={}, identity={})
    return job.model_copy(update={"job_id": f"{job.family}{uuid.uuid4().hex}"})


@pytest.fixture
def hold(store, tmp_path):
    """Starts processes that want the lease; `go=False`: they wait for the file `go`."""
    started = []

    def hold(go=True, **environment):
        if go:
            (tmp_path / "go").touch()
        argv = [sys.executable, "-c", HOLDER, str(tmp_path), a_job(store).model_dump_json()]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
        started.append(process)
        assert said(process) == "up"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def said(process) -> str:
    return process.stdout.readline().strip()


def heartbeat(store, attempt=1) -> Heartbeat | None:
    return lease._parse(lease._read(store, REF, attempt))


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    assert answer
    return answer


def foreign(store, attempt=1, **changes) -> None:
    """An attempt whose holder is on another machine, as its one heartbeat says."""
    job = a_job(store).model_copy(update={"attempt": attempt})
    store.write(f"{job.folder}/job.json", seal(job))
    beat(store, attempt, **changes)


def beat(store, attempt=1, **changes) -> None:
    fields = {
        "owner": "sft/demo/x",
        "host": "elsewhere",
        "boot_id": "b",
        "pid": 1,
        "pid_started": 1,
        "began": "2020-01-01T00:00:00+00:00",
        "beat": 1,
        "time": "2020-01-01T00:00:00+00:00",
        "ended": None,
    }
    store.write(f"{REF.id}/attempts/{attempt:04d}/heartbeat.json", json.dumps({**fields, **changes}).encode())


# --- one of many -----------------------------------------------------------------------------------------------------


def test_attempts_get_new_numbers_and_a_job_reads_back(store):
    with acquire(store, a_job(store)) as one:
        pass
    with acquire(store, a_job(store)) as two:
        assert (one.job.attempt, two.job.attempt) == (1, 2)
        assert read_job(job_url(store, two.job))[1] == two.job


def test_of_processes_that_want_the_lease_at_the_same_moment_one_gets_it(store, hold, tmp_path):
    processes = [hold(go=False) for _ in range(6)]
    (tmp_path / "go").touch()
    answers = [said(process).split()[0] for process in processes]
    assert sorted(answers) == ["busy"] * 5 + ["holds"]
    assert len([key for key in store.list(REF.id) if key.endswith("/job.json")]) == 1


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_of_racing_threads_one_gets_each_number(store, where, request):
    if where == "s3":
        store = Store(request.getfixturevalue("bucket"))

    def one(number):
        try:
            return take(store, a_job(store), number).job.attempt
        except Busy:
            return None

    for number in (1, 2, 3):
        with ThreadPoolExecutor(16) as pool:
            got = list(pool.map(one, [number] * 16))
        assert sorted(got, key=str) == [number] + [None] * 15
        beat(store, number, ended="done")


def test_the_message_says_who_holds_it_and_how_far_it_is(store, hold):
    process = hold()
    assert said(process) == "holds 1"
    until(lambda: (h := heartbeat(store)) and h.step == 40)
    with pytest.raises(
        Busy, match=rf"pid {process.pid}, attempt 1, train 40/100, since 20\d\d-.*wait for it or end it"
    ):
        acquire(store, a_job(store))


def test_a_write_whose_answer_was_lost_is_ours(store):
    """The client of a store repeats a write that was not answered, and then finds its own object there."""
    job = a_job(store)
    store.write(f"{job.folder}/job.json", seal(job))
    assert take(store, job, 1).job.attempt == 1


def test_a_number_that_checkpoints_carry_is_not_given_again(store):
    store.write(f"{REF.id}/checkpoints/0007/00000040-train-000000.json", b"{}")
    assert acquire(store, a_job(store)).job.attempt == 8


# --- holders that end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"), [(None, "done"), (JobFailed("", 1, "stalled"), "stalled"), (KeyError(), "KeyError")]
)
def test_a_holder_that_ends_says_how_and_makes_room_at_once(store, error, reason):
    try:
        with acquire(store, a_job(store)):
            if error:
                raise error
    except (JobFailed, KeyError):
        pass
    last = heartbeat(store)
    assert last and last.ended == reason
    assert free_number(store, REF) == 2


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(store, hold, monkeypatch):
    monkeypatch.setattr(lease, "TTL_SECONDS", 1000)
    process = hold()
    said(process)
    until(lambda: heartbeat(store))
    process.kill()
    process.wait()
    assert free_number(store, REF) == 2


def test_a_process_that_got_the_pid_of_a_dead_holder_is_not_taken_for_it(store, monkeypatch):
    monkeypatch.setattr(lease, "TTL_SECONDS", 1000)
    host, boot, namespace = lease._here()
    foreign(store, host=host, boot_id=boot, pid_namespace=namespace, pid=os.getpid(), pid_started=1)
    assert free_number(store, REF) == 2


def test_a_pid_of_another_container_of_this_machine_says_nothing(store):
    """Containers may share the host's name and boot, and each has a process 1 or 4194303 of its own, or none."""
    host, boot, _ = lease._here()
    foreign(store, host=host, boot_id=boot, pid_namespace="pid:[1]", pid=4194303, pid_started=1)
    beating = threading.Timer(0.5, lambda: beat(store, host=host, boot_id=boot, pid_namespace="pid:[1]", beat=2))
    beating.start()
    with pytest.raises(Busy):
        free_number(store, REF)
    beating.join()


# --- holders elsewhere -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clock", ["1970-01-01T00:00:00+00:00", "2999-01-01T00:00:00+00:00"])
def test_a_holder_elsewhere_is_judged_by_its_beats_and_not_by_its_clock(store, clock):
    foreign(store, time=clock)
    beating = threading.Timer(0.5, lambda: beat(store, beat=2, time=clock))
    beating.start()
    with pytest.raises(Busy, match="host elsewhere"):
        acquire(store, a_job(store))
    beating.join()
    assert acquire(store, a_job(store)).job.attempt == 2


def test_an_attempt_without_a_heartbeat_is_watched_too(store):
    """One of an older version, or whose holder has not come to its first beat."""
    job = a_job(store)
    store.write(f"{job.folder}/job.json", seal(job))
    first = threading.Timer(0.5, lambda: beat(store))
    first.start()
    with pytest.raises(Busy):
        free_number(store, REF)
    first.join()
    store.delete(f"{REF.id}/attempts/0001/heartbeat.json")
    assert free_number(store, REF) == 2


def test_a_damaged_heartbeat_is_no_answer_but_its_change_is(store):
    foreign(store)
    key = f"{REF.id}/attempts/0001/heartbeat.json"
    store.write(key, b'{"owner": "sft')
    change = threading.Timer(0.5, lambda: store.write(key, b'{"owner": "sft/demo'))
    change.start()
    with pytest.raises(Busy):
        free_number(store, REF)
    change.join()


def test_who_was_suspended_while_it_watched_does_not_take_a_living_holder_for_dead(store, hold):
    """It wakes up long after the deadline, with what it saw before; it looks again first."""
    foreign(store)
    watcher = hold()
    time.sleep(0.5)
    watcher.send_signal(signal.SIGSTOP)
    beat(store, beat=2)
    time.sleep(TTL + 0.5)
    watcher.send_signal(signal.SIGCONT)
    assert said(watcher).startswith("busy")


# --- holders that are taken for dead ---------------------------------------------------------------------------------


def test_a_suspended_holder_is_taken_over_and_finds_out_when_it_wakes(store, hold):
    holder = hold()
    assert said(holder) == "holds 1"
    until(lambda: heartbeat(store))
    holder.send_signal(signal.SIGSTOP)
    with acquire(store, a_job(store)) as after:
        assert after.job.attempt == 2
        holder.send_signal(signal.SIGCONT)
        assert said(holder) == "lost"
        assert not after.lost


def cut_off(store) -> Path:
    """Make the store unreachable for everybody: where its folder was is a file."""
    root = Path(store.root)
    root.rename(away := root.with_suffix(".away"))
    root.touch()
    return away


def reach_again(store, away: Path) -> None:
    Path(store.root).unlink()
    away.rename(store.root)


def test_while_the_store_is_down_the_job_goes_on_and_then_so_does_the_lease(store):
    with acquire(store, a_job(store)) as held:
        until(lambda: heartbeat(store))
        away = cut_off(store)
        time.sleep(3 * BEAT)
        reach_again(store, away)
        before = heartbeat(store)
        assert before
        until(lambda: (h := heartbeat(store)) and h.beat > before.beat)
        assert not held.lost
        with pytest.raises(Busy):
            free_number(store, REF)


def test_a_watcher_that_loses_the_store_says_so_and_takes_nothing_over(store):
    foreign(store)
    outage = threading.Timer(0.3, lambda: cut_off(store))
    outage.start()
    with pytest.raises(StoreError):
        free_number(store, REF)
    outage.join()


def test_time_in_which_the_store_did_not_answer_is_not_held_against_the_holder(store, monkeypatch):
    """As with an S3 server that is down for longer than TTL: requests wait, and then the watcher is answered first."""
    foreign(store)
    read, reads = Store.read, []

    def slow_once(self, key):
        reads.append(key)
        time.sleep(TTL + 0.2 if len(reads) == 2 else 0)
        return read(self, key)

    monkeypatch.setattr(Store, "read", slow_once)
    recovered = threading.Timer(TTL + 1, lambda: beat(store, beat=2))
    recovered.start()
    with pytest.raises(Busy):
        free_number(store, REF)
    recovered.join()


def test_a_holder_that_was_cut_off_and_taken_over_meanwhile_finds_out(store):
    with acquire(store, a_job(store)) as held:
        until(lambda: heartbeat(store))
        away = cut_off(store)
        other = a_job(store).model_copy(update={"attempt": 2})
        (away / other.folder).mkdir()
        (away / other.folder / "job.json").write_bytes(seal(other))
        reach_again(store, away)
        until(lambda: held.lost)


def test_whatever_goes_wrong_with_a_heartbeat_is_told_once_and_the_next_one_is_given(store, monkeypatch, capfd):
    write, failures = Store.write, []

    def fail(self, key, data, create=False):
        if key.endswith("heartbeat.json") and len(failures) < 3:
            failures.append(key)
            raise OSError("no file descriptor is left")
        write(self, key, data, create)

    monkeypatch.setattr(Store, "write", fail)
    with acquire(store, a_job(store)):
        until(lambda: heartbeat(store))
    last = heartbeat(store)
    assert last and last.ended == "done" and len(failures) == 3
    assert capfd.readouterr().err.count("OSError: no file descriptor is left; going on") == 1


def test_an_end_that_cannot_be_told_is_no_error(store):
    with acquire(store, a_job(store)) as held:
        away = cut_off(store)
    reach_again(store, away)
    assert not held.lost


# --- two that finish -------------------------------------------------------------------------------------------------


def test_when_both_the_dead_one_and_its_successor_finish_one_manifest_stands_whole(store, tmp_path):
    """Attempts share no file and publishing is create-only, so a holder that was wrongly taken for dead does no harm."""
    foreign(store)
    manifests = []
    for attempt in (1, 2):
        local = tmp_path / f"result{attempt}"
        local.mkdir()
        (local / "weights").write_text(f"of attempt {attempt}")
        folder = f"attempts/{attempt:04d}/files"
        store.upload(local / "weights", f"{REF.id}/{folder}/weights")
        manifests.append(Manifest(ref=REF, spec={}, folder=folder, files=describe(local)))
    second = publish(store, manifests[1])
    assert publish(store, manifests[0]) == second, "the late one is given what stands"
    assert read_manifest(store, REF) == second
    verify(store, second)
    assert store.read(second.key("weights")) == b"of attempt 2"
    with pytest.raises(AlreadyExists):
        store.write(f"{REF.id}/manifest.json", b"", create=True)
