"""How jobs end: real processes, the real deepspeed launcher, stages that misbehave (fake_stage.py)."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest

from rlhf_core import guard, launch, lease
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.errors import ConfigError, JobFailed, is_transient
from rlhf_core.job import JobSpec
from rlhf_core.lease import acquire
from rlhf_core.resources import CheckpointPlan, Resources
from rlhf_core.specs import StageName
from rlhf_core.store import Store

HERE = Path(__file__).parent
MODULE = "fake_stage"


@pytest.fixture(autouse=True)
def _fake_stage_is_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(launch, "STACK_SECONDS", 0.5)
    monkeypatch.setenv("RLHF_LEASE_BEAT", "0.2")  # of processes that tests start
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)


@pytest.fixture(autouse=True)
def local(tmp_path, monkeypatch):
    """Where jobs have their local files."""
    folder = tmp_path / "local"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def make(store):
    """Makes jobs, and asserts at the test's end that nothing of them is left."""
    jobs = []

    def make(behave, stage: StageName = "data", processes=1, grace=1.0, **resources):
        digest = hashlib.sha256(uuid.uuid4().bytes).hexdigest()
        ref = ArtifactRef(stage=stage, name="test", fingerprint=digest)
        job = JobSpec(
            stage=stage,
            store=store.url,
            output=ref,
            attempt=1,
            job_id="",
            spec={"behave": behave},
            identity={},
            model=None,
            resources=Resources(
                processes=processes, threads=1, checkpoint=CheckpointPlan(grace_seconds=grace), **resources
            ),
        )
        job = job.model_copy(update={"job_id": f"{job.family}{uuid.uuid4().hex}"})
        jobs.append(job)
        return job

    yield make
    for job in jobs:
        assert until(lambda job=job: not living(job), 3), {p: guard.argv(p) for p in living(job)}


def until(condition, seconds):
    end = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def living(job):
    """Every process of the job: by its id, or by MARK, which one grandchild carries instead."""
    return guard.processes_of(job.job_id) | {p for p in guard.pids() if guard.variable(p, "MARK") == job.job_id}


def run(store, job, on_event=lambda event: None, on_line=lambda line: None):
    with acquire(store, job) as held:
        launch.end_leftovers(held.job)
        return launch.run_job(store, held, on_event, on_line, module=MODULE)


def failed(store, job, **options):
    with pytest.raises(JobFailed) as info:
        run(store, job, **options)
    return info.value


def log_of(store, job, attempt=1):
    return store.read(f"{job.output.id}/attempts/{attempt:04d}/log.txt").decode()


def run_in_a_process(store, job):
    """`run_job` in a process of its own, for tests that kill or interrupt it."""
    script = (
        "import sys; from rlhf_core import launch, lease, job, store\n"
        "root, request = store.Store(sys.argv[1]), job.JobSpec.model_validate_json(sys.argv[2])\n"
        "with lease.acquire(root, request) as held: launch.run_job(root, held, module='fake_stage')"
    )
    argv = [sys.executable, "-c", script, store.url, job.model_dump_json()]
    # A test run in the background has SIGINT ignored, and children inherit that.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def ranks(job):
    return {p for p in guard.processes_of(job.job_id) if guard.python_module(p) == MODULE}


def hanging_ranks(job, count, seconds=20):
    """The job's ranks, once all of them have reached their hang."""
    assert until(lambda: len([p for p in ranks(job) if guard.catches(p, signal.SIGUSR1)]) == count, seconds)
    time.sleep(0.2)
    return ranks(job)


# --- success -----------------------------------------------------------------------------------------------------


def test_a_job_that_exits_0_and_writes_its_result_succeeds(store, make):
    job, events, lines = make("succeed"), [], []
    result = run(store, job, on_event=events.append, on_line=lines.append)
    assert result.job_id == job.job_id and result.metrics == {"loss": 1.5}
    assert [event["step"] for event in events] == [1, 2], "an event between other text is found too"
    assert "100% done" in lines and "a warning without a newlineand another" in lines
    log = log_of(store, job)
    assert log.count("%") == 1, "a progress bar is one line"
    assert "@rlhf" not in log
    rows = store.read(f"{job.output.id}/attempts/0001/metrics.jsonl").decode().splitlines()
    assert json.loads(rows[0])["metrics"] == {"loss": 2.0}


def test_attempts_do_not_overwrite_each_other(store, make):
    job = make("say nothing of a result")
    for _ in range(2):
        failed(store, job)
    assert {key.split("/")[3] for key in store.list(f"{job.output.id}/attempts")} == {"0001", "0002"}
    assert "attempt 2" in log_of(store, job, 2)


# --- failures and what they are called -----------------------------------------------------------------------------


def test_exit_0_without_a_result_is_a_failure(store, make):
    error = failed(store, make("say nothing of a result"))
    assert error.reason == "no result" and is_transient(error.code)


def test_the_result_of_another_job_is_a_failure(store, make):
    assert "another job" in failed(store, make("result of another job")).reason


def test_a_wrong_configuration_is_one_line_without_a_traceback(store, make):
    error = failed(store, make("wrong configuration"))
    assert str(error) == "optim.lr: 0 must be positive; e.g. 1e-5"
    assert error.code == 2 and not is_transient(error.code)


def test_a_crash_shows_the_end_of_the_log_and_where_it_is(store, make):
    job = make("raise")
    error = failed(store, job)
    assert error.code == 1 and is_transient(error.code)
    assert "RuntimeError: the loss went for a walk" in str(error)
    assert f"{store.url}/{job.output.id}/attempts/0001/log.txt" in str(error)
    assert "line 99" in str(error) and "line 60" not in str(error)
    assert "line 0" in log_of(store, job)


def test_a_killed_process_is_named_by_its_signal(store, make):
    error = failed(store, make("die"))
    assert (error.code, error.reason) == (-9, "killed by SIGKILL")
    assert "memory" in str(error)


def test_silence_is_ended_and_the_log_shows_where_each_rank_was(store, make):
    job = make("hang", stall_minutes=1 / 60)
    error = failed(store, job)
    assert error.reason == "stalled" and is_transient(error.code)
    assert "stuck_in_this_function" in str(error) and "stuck_in_this_function" in log_of(store, job)


def test_log_lines_are_no_sign_of_life_but_progress_is(store, make):
    assert failed(store, make("chat for ever", stall_minutes=1 / 60)).reason == "stalled"
    error = failed(store, make("progress for ever", stall_minutes=1 / 60, timeout_hours=2 / 3600))
    assert error.reason == "timed out"


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(store, make):
    assert failed(store, make("hang and ignore SIGTERM", stall_minutes=1 / 60)).reason == "stalled"


def test_grandchildren_do_not_outlive_the_command(store, make):
    error = failed(store, make("leave grandchildren"))
    assert error.code == guard.ORPHANED and is_transient(error.code)


# --- somebody is killed ----------------------------------------------------------------------------------------------


def test_when_the_control_plane_is_killed_the_job_ends(store, make):
    job = make("hang and ignore SIGTERM")
    process = run_in_a_process(store, job)
    hanging_ranks(job, 1)
    process.kill()
    process.wait()
    assert until(lambda: not living(job), 5)


def test_a_job_may_be_run_from_a_thread(store, make):
    """The guard gets a signal when the thread that started it ends; run_job stays in it to the job's end."""
    job, results = make("succeed"), []
    thread = threading.Thread(target=lambda: results.append(run(store, job)))
    thread.start()
    thread.join(20)
    assert [result.job_id for result in results] == [job.job_id]


def test_an_interrupt_ends_the_job_and_goes_on(store, make):
    job = make("hang")
    process = run_in_a_process(store, job)
    hanging_ranks(job, 1)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=10)[1]
    assert not living(job)
    assert "ended by KeyboardInterrupt" in log_of(store, job)


def test_an_exception_in_a_callback_ends_the_job(store, make):
    job = make("progress for ever")

    def on_event(event):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(store, job, on_event=on_event)
    assert not living(job)


def test_when_the_guard_is_killed_run_job_ends_the_job_itself(store, make):
    job = make("hang and ignore SIGTERM")
    killer = threading.Thread(target=lambda: (hanging_ranks(job, 1), os.kill(launch.guards(job)[0], signal.SIGKILL)))
    killer.start()
    error = failed(store, job)
    killer.join()
    assert error.code == -9 and "guard" in error.reason
    assert not living(job)


# --- told to end: ranks save, and say 75 ----------------------------------------------------------------------------


def saving_ranks(job, count):
    """The job's ranks, once all of them have begun to train."""

    def training():
        return {p for p in ranks(job) if guard.catches(p, signal.SIGTERM)}

    assert until(lambda: len(training()) == count, 20)
    return training()


def saved(store, job):
    return {k.rpartition("-")[2]: store.read(k).decode() for k in store.list(job.output.id) if "/saved-" in k}


def test_told_to_end_all_ranks_save_and_their_75_comes_through_the_launcher(store, make):
    """The first rank to leave has the launcher end the others, which are not disturbed."""
    job = make("save when told", stage="sft", processes=2, grace=20)
    teller = threading.Thread(
        target=lambda: (saving_ranks(job, 2), os.kill(launch.guards(job)[0], signal.SIGTERM)),
    )
    teller.start()
    error = failed(store, job)
    teller.join()
    assert (error.code, error.reason) == (75, "preempted") and is_transient(error.code)
    assert "received SIGTERM; saved at step 1" in str(error)
    assert sorted(saved(store, job)) == ["0", "1"]


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_control_plane_the_ranks_save(store, make, signo):
    job = make("save when told", stage="sft", processes=2, grace=20)
    process = run_in_a_process(store, job)
    saving_ranks(job, 2)
    process.send_signal(signo)
    process.communicate(timeout=20)
    assert until(lambda: not living(job), 20)
    assert sorted(saved(store, job)) == ["0", "1"]


def test_ranks_that_save_for_longer_than_the_grace_are_ended(store, make):
    job = make("save when told", stage="sft", processes=1, grace=1)
    process = run_in_a_process(store, job)
    saving_ranks(job, 1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert not living(job)
    assert saved(store, job) == {}


def test_a_notice_that_appears_makes_the_job_save_and_end(store, make, tmp_path):
    job = make("save when told", stage="sft", grace=20)
    job = job.model_copy(
        update={"resources": Resources(threads=1, checkpoint=CheckpointPlan(notice=str(tmp_path / "notice")))}
    )
    teller = threading.Thread(target=lambda: (saving_ranks(job, 1), (tmp_path / "notice").touch()))
    teller.start()
    error = failed(store, job)
    teller.join()
    assert error.reason == "preempted" and f"notice at {tmp_path}/notice; saved" in str(error)


def test_the_local_files_of_a_job_go_with_it(store, make, local):
    """Also those of a control plane that was killed, and then its log."""
    job = make("save when told", stage="sft", grace=20)
    process = run_in_a_process(store, job)
    saving_ranks(job, 1)
    [folder] = local.glob("rlhf-job-*")
    assert (folder / "output").exists() and list((folder / "scratch").iterdir())
    process.kill()
    process.communicate()
    assert until(lambda: not living(job) and not list(local.glob("rlhf-job-*")), 20)
    assert str(folder / "scratch") in saved(store, job)["0"]
    run(store, make("succeed"))
    assert not list(local.glob("rlhf-job-*"))


# --- other runs of the same artifact ---------------------------------------------------------------------------------


def test_a_second_run_of_the_same_artifact_is_refused_and_the_first_goes_on(store, make):
    job = make("hang")
    process = run_in_a_process(store, job)
    before = hanging_ranks(job, 1)
    error = failed(store, job.model_copy(update={"job_id": f"{job.family}second"}))
    assert error.reason == "busy" and f"pid {process.pid}" in str(error)
    assert ranks(job) == before
    process.terminate()
    process.communicate()
    assert until(lambda: not living(job), 5)


def test_of_runs_that_start_at_the_same_moment_one_goes_on(store, make):
    job, ends = make("hang", stall_minutes=1 / 60), []

    def one(name):
        try:
            ends.append(run(store, job.model_copy(update={"job_id": f"{job.family}{name}"})).job_id)
        except JobFailed as error:
            ends.append(error.reason)

    threads = [threading.Thread(target=one, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(ends) == ["busy", "busy", "stalled"]
    assert len([key for key in store.list(job.output.id) if key.endswith("/job.json")]) == 1


def test_a_job_whose_lease_is_taken_over_ends_at_once(store, make):
    job = make("hang")
    other = job.model_copy(update={"job_id": f"{job.family}other"})
    usurper = threading.Thread(target=lambda: (hanging_ranks(job, 1), lease.take(store, other, 2)))
    usurper.start()
    error = failed(store, job)
    usurper.join()
    assert error.reason == "superseded" and "another run has taken over" in str(error)
    assert not living(job)


def test_who_takes_over_from_a_suspended_run_ends_its_job(store, make, monkeypatch):
    monkeypatch.setattr(lease, "TTL_SECONDS", 1)
    job = make("hang")
    process = run_in_a_process(store, job)
    before = hanging_ranks(job, 1)
    process.send_signal(signal.SIGSTOP)
    after = job.model_copy(update={"job_id": f"{job.family}after", "spec": {"behave": "succeed"}})
    assert run(store, after).job_id == after.job_id
    assert not before & guard.processes_of(job.job_id)
    process.send_signal(signal.SIGCONT)
    assert "JobFailed" in process.communicate(timeout=20)[1]
    assert process.returncode == 1


def test_leftovers_of_an_earlier_attempt_are_ended_before_a_new_one(store, make):
    job = make("succeed")
    env = {**os.environ, "RLHF_JOB_ID": f"{job.family}earlier"}
    neighbour = make("hang")
    left = subprocess.Popen(["sleep", "1000"], env=env)
    other = subprocess.Popen(["sleep", "1000"], env={**os.environ, "RLHF_JOB_ID": neighbour.job_id})
    run(store, job)
    assert left.wait(5) == -signal.SIGTERM
    assert other.poll() is None, "another artifact's process is not ours to end"
    other.kill()
    other.wait()


# --- the deepspeed launcher ----------------------------------------------------------------------------------------


def test_deepspeed_runs_two_ranks(store, make):
    job, lines = make("succeed", stage="sft", processes=2), []
    assert run(store, job, on_line=lines.append).job_id == job.job_id
    assert {line[:11] for line in lines if " here at " in line} == {"rank 0 of 2", "rank 1 of 2"}


def test_deepspeed_passes_on_the_exit_code_of_a_wrong_configuration(store, make):
    error = failed(store, make("wrong configuration", stage="sft", processes=2))
    assert (error.code, str(error)) == (2, "optim.lr: 0 must be positive; e.g. 1e-5")


def test_a_killed_launch_process_is_never_a_success(store, make):
    """`deepspeed` exits 0 then and leaves its ranks; the guard ends them and says 70."""
    job = make("hang", stage="sft", processes=2)

    def kill():
        hanging_ranks(job, 2)
        for pid in guard.processes_of(job.job_id):
            if guard.python_module(pid) == "deepspeed.launcher.launch":
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    error = failed(store, job)
    killer.join()
    assert (error.code, error.reason) == (guard.ORPHANED, "the launcher ended before its ranks")


def test_without_its_guard_a_deepspeed_job_ends_by_itself(store, make, tmp_path):
    """Guard and control plane are both gone: the ranks see it, and then launch.py and deepspeed end too."""
    job = acquire(store, make("hang", stage="sft", processes=2)).job
    process = launch.start(job, launch.command(job, store, MODULE), tmp_path)
    hanging_ranks(job, 2)
    process.kill()
    process.wait()
    assert until(lambda: not living(job), 8)


# --- command and environment ---------------------------------------------------------------------------------------


def test_visible_gpus_are_used_not_the_first_ones(store, make, monkeypatch):
    job = make("succeed", stage="ppo", processes=2)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    argv = launch.command(job, store)
    assert argv[argv.index("--include") + 1] == "localhost:4,5" and "--num_gpus" not in argv
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ConfigError, match=r"resources.processes: 2"):
        launch.command(job, store)


def test_the_environment_is_the_same_wherever_the_job_is_started(make, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    env = launch.environment(make("succeed", processes=2))
    assert env["OMP_NUM_THREADS"] == "1" and env["DS_ACCELERATOR"] == "cpu"
    assert env["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert env["PYTHONPATH"].split(":")[0] == str(Path(launch.__file__).parent.parent)


def test_a_store_in_memory_is_refused(make):
    with pytest.raises(ConfigError, match="memory://"):
        run(Store("memory://x"), make("succeed"))
