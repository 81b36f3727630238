"""How jobs end: real processes, the real deepspeed launcher, stages that misbehave (fake_stage.py)."""

import base64
import hashlib
import json
import os
import re
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
from rlhf_core.ends import Failure
from rlhf_core.errors import ConfigError, JobFailed, is_transient
from rlhf_core.job import JobSpec
from rlhf_core.lease import acquire
from rlhf_core.members import Seat
from rlhf_core.ranklog import merged
from rlhf_core.resources import CheckpointPlan, Resources
from rlhf_core.sealed import unseal
from rlhf_core.specs import StageName
from rlhf_core.starting import agent_id, node_id
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


def told_of(store, job, attempt=1):
    """What the attempt's folder says of its failure."""
    key = f"{job.output.id}/attempts/{attempt:04d}/failure.json"
    return unseal(Failure, store.read(key), key)


def run_in_a_process(store, job, first=lambda: None):
    """`run_job` in a process of its own, for tests that kill or interrupt it; `first` is called in it."""
    script = (
        "import sys; from rlhf_core import launch, lease, job, store\n"
        "root, request = store.Store(sys.argv[1]), job.JobSpec.model_validate_json(sys.argv[2])\n"
        "with lease.acquire(root, request) as held: launch.run_job(root, held, module='fake_stage')"
    )
    argv = [sys.executable, "-c", script, store.url, job.model_dump_json()]
    # A test run in the background has SIGINT ignored, and children inherit that.
    heard = lambda: (signal.signal(signal.SIGINT, signal.SIG_DFL), first())  # noqa: E731
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, preexec_fn=heard)


def ranks(job):
    return {p for p in guard.processes_of(job.job_id) if guard.python_module(p) == MODULE}


def rank(job, number):
    """The pid of one rank."""
    [pid] = [p for p in ranks(job) if guard.variable(p, "RANK") == str(number)]
    return pid


def has_arrived(pid):
    number, folder = guard.variable(pid, "RANK") or "0", guard.variable(pid, "RLHF_SCRATCH")
    return folder is not None and Path(folder, f"arrived-{number}").exists()


def ranks_there(job, count, seconds=30):
    """The job's ranks, once all of them are where the test wants them: hanging, training, bound to each other."""
    assert until(lambda: len([p for p in ranks(job) if has_arrived(p)]) == count, seconds)
    return ranks(job)


def meanwhile(act):
    """Does something to a job while this thread runs it."""
    thread = threading.Thread(target=act)
    thread.start()
    return thread


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
    error = failed(store, make("result of another job"))
    assert error.reason == "no result" and "result.json is of another job, sft/other/1" in str(error)


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
    assert "| line 99" in str(error) and "| line 60" not in str(error)
    assert "line 0" in log_of(store, job)


def test_a_killed_process_is_named_by_its_signal(store, make):
    error = failed(store, make("die"))
    assert (error.code, error.reason) == (-9, "killed") and "killed: ended by SIGKILL\n" in str(error)
    assert "memory" in str(error)


def test_silence_is_ended_and_the_log_shows_where_each_rank_was(store, make):
    job = make("hang", stall_minutes=4 / 60)
    error = failed(store, job)
    assert error.reason == "stalled" and is_transient(error.code)
    assert "stuck_in_this_function" in str(error) and "stuck_in_this_function" in log_of(store, job)


def test_who_hangs_gets_no_grace_as_he_cannot_save(store, make):
    job = make("hang and ignore SIGTERM", grace=24, stall_minutes=3 / 60)
    began = time.monotonic()
    error = failed(store, job)
    assert error.reason == "stalled" and "Last heard of rank 0: train 1/2" in str(error)
    assert time.monotonic() - began < 20, "the grace was waited for"


def test_log_lines_are_no_sign_of_life_but_progress_is(store, make):
    assert failed(store, make("chat for ever", stall_minutes=1 / 60)).reason == "stalled"
    error = failed(store, make("progress for ever", stall_minutes=4 / 60, timeout_hours=6 / 3600))
    assert error.reason == "timed out"


def test_a_rank_that_ignores_sigterm_is_killed_after_the_grace(store, make):
    assert failed(store, make("hang and ignore SIGTERM", timeout_hours=2 / 3600)).reason == "timed out"


def test_grandchildren_do_not_outlive_the_command(store, make):
    error = failed(store, make("leave grandchildren"))
    assert error.code == guard.ORPHANED and is_transient(error.code)


# --- somebody is killed ----------------------------------------------------------------------------------------------


def test_when_the_control_plane_is_killed_the_job_ends(store, make):
    job = make("hang and ignore SIGTERM")
    process = run_in_a_process(store, job)
    ranks_there(job, 1)
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
    ranks_there(job, 1)
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
    killer = threading.Thread(target=lambda: (ranks_there(job, 1), os.kill(launch.guards(job)[0], signal.SIGKILL)))
    killer.start()
    error = failed(store, job)
    killer.join()
    assert (error.code, error.reason) == (-9, "launcher") and "its guard was killed by SIGKILL" in str(error)
    assert not living(job)


# --- told to end: ranks save, and say 75 ----------------------------------------------------------------------------


def saved(store, job):
    return {k.rpartition("-")[2]: store.read(k).decode() for k in store.list(job.output.id) if "/saved-" in k}


def test_told_to_end_all_ranks_save_and_their_75_comes_through_the_launcher(store, make):
    """The first rank to leave has the launcher end the others, which are not disturbed."""
    job = make("save when told", stage="sft", processes=2, grace=20)
    teller = threading.Thread(
        target=lambda: (ranks_there(job, 2), os.kill(launch.guards(job)[0], signal.SIGTERM)),
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
    ranks_there(job, 2)
    process.send_signal(signo)
    process.communicate(timeout=20)
    assert until(lambda: not living(job), 20)
    assert sorted(saved(store, job)) == ["0", "1"]


def test_ranks_that_save_for_longer_than_the_grace_are_ended(store, make):
    job = make("save when told", stage="sft", processes=1, grace=1)
    process = run_in_a_process(store, job)
    ranks_there(job, 1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert not living(job)
    assert saved(store, job) == {}


def test_a_notice_that_appears_makes_the_job_save_and_end(store, make, tmp_path):
    job = make("save when told", stage="sft", grace=20)
    job = job.model_copy(
        update={"resources": Resources(threads=1, checkpoint=CheckpointPlan(notice=str(tmp_path / "notice")))}
    )
    teller = threading.Thread(target=lambda: (ranks_there(job, 1), (tmp_path / "notice").touch()))
    teller.start()
    error = failed(store, job)
    teller.join()
    assert error.reason == "preempted" and f"notice at {tmp_path}/notice; saved" in str(error)


def test_the_local_files_of_a_job_go_with_it(store, make, local):
    """Also those of a control plane that was killed, and then its log."""
    job = make("save when told", stage="sft", grace=20)
    process = run_in_a_process(store, job)
    ranks_there(job, 1)
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
    before = ranks_there(job, 1)
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
    usurper = threading.Thread(target=lambda: (ranks_there(job, 1), lease.take(store, other, 2)))
    usurper.start()
    error = failed(store, job)
    usurper.join()
    assert error.reason == "superseded" and "another run has taken over" in str(error)
    assert not living(job)


def test_who_takes_over_from_a_suspended_run_ends_its_job(store, make, monkeypatch):
    monkeypatch.setattr(lease, "TTL_SECONDS", 1)
    job = make("hang")
    process = run_in_a_process(store, job)
    before = ranks_there(job, 1)
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
    of_a_node = subprocess.Popen(["sleep", "1000"], env={**env, "RLHF_JOB_ID": f"{job.family}earlier/node-0001"})
    run(store, job)
    assert left.wait(5) == of_a_node.wait(5) == -signal.SIGTERM
    assert other.poll() is None, "another artifact's process is not ours to end"
    other.kill()
    other.wait()


def test_what_other_nodes_of_the_same_attempt_run_on_this_machine_is_no_leftover(make):
    job = make("succeed")
    own = [
        subprocess.Popen(["sleep", "1000"], env={**os.environ, "RLHF_JOB_ID": id})
        for id in (job.job_id, node_id(job, 0), agent_id(job, 1))
    ]
    launch.end_leftovers(job)
    assert [process.poll() for process in own] == [None, None, None]
    for process in own:
        process.kill()
        process.wait()


# --- the deepspeed launcher ----------------------------------------------------------------------------------------


def test_the_first_error_of_the_first_failing_rank_is_on_top_and_not_its_neighbours_noise(store, make):
    job = make("rank 1 raises, the others wait for it", stage="sft", processes=2)
    error = failed(store, job)
    assert (error.code, error.reason) == (1, "crashed")
    lines = str(error).splitlines()
    assert lines[0] == f"{job.output.id}, attempt 1: crashed: RuntimeError: the loss went for a walk (rank 1)"
    assert lines[1] == "    Traceback (most recent call last):"
    assert (
        "RuntimeError: the loss went for a walk"
        in lines[2:][[x.startswith("Log: ") for x in lines[2:]].index(True) - 1]
    )
    assert (told := told_of(store, job)) == error.failure
    assert (told.kind, told.rank, told.host) == ("crashed", 1, None)


def test_the_exit_code_is_that_of_the_rank_which_began_it(store, make):
    """The launcher passes on the code of whichever rank it finds ended first."""
    job = make("rank 1 finds no number, the others wait for it", stage="sft", processes=2)
    error = failed(store, job)
    assert (error.code, error.reason) == (4, "non-finite numbers") and not is_transient(error.code)
    assert "step 7: the loss is nan (rank 1)" in str(error)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_rank_is_named_though_only_its_neighbours_say_something(store, make, number):
    job = make("wait for each other", stage="sft", processes=2)
    killer = meanwhile(lambda: (ranks_there(job, 2), os.kill(rank(job, number), signal.SIGKILL)))
    error = failed(store, job)
    killer.join()
    assert error.reason == "killed" and is_transient(error.code)
    assert str(error).splitlines()[0].endswith(f"(rank {number})")
    assert (error.failure.rank, error.failure.trace) == (number, "")


def test_progress_of_another_rank_than_the_first_is_no_sign_of_life(store, make):
    job, events = make("rank 1 tells of progress for ever", stage="sft", processes=2, stall_minutes=12 / 60), []
    error = failed(store, job, on_event=events.append)
    assert error.reason == "stalled" and [event["step"] for event in events] == [1]
    assert "rank 1: train 5/10" in str(error)


def test_every_rank_has_its_log_with_times_and_the_attempt_has_one_of_all(store, make):
    job = make("talk in turns", stage="sft", processes=2)
    run(store, job)
    folder = f"{job.output.id}/attempts/0001"
    own = [store.read(f"{folder}/rank-00{n}.log").decode().splitlines() for n in range(2)]
    stamp = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (.*)")
    for n, lines in enumerate(own):
        texts = [match[1] for line in lines if (match := stamp.fullmatch(line))]
        assert len(texts) == len(lines) and texts[1:] == [f"word-{m}" for m in range(n, 4, 2)]
        assert texts[0].startswith(f"rank {n} of 2 here at ")
    words = [line for line in log_of(store, job).splitlines() if "] word-" in line]
    assert words == [f"[{n % 2}] word-{n}" for n in range(4)]
    assert [f"[{line.rank}] {line.text}" for line in merged(store, folder) if "word" in line.text] == words


@pytest.fixture
def small_cgroup():
    """Puts a process that is about to start, and so all of its job, where there are 600 MB: enough for its launcher."""
    root = Path("/sys/fs/cgroup/memory")
    mine = [line.split(":", 2)[2] for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line]
    if not mine or not os.access(root / "cgroup.procs", os.W_OK):
        pytest.skip("needs root and a cgroup of version 1 for memory")
    group = root / mine[0].lstrip("/") / f"rlhf-test-{os.getpid()}-{time.monotonic_ns()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(600 << 20))
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    yield lambda: (group / "cgroup.procs").write_text(str(os.getpid()))
    assert until(lambda: not (group / "cgroup.procs").read_text(), 10)
    group.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_is_told_from_one_that_somebody_killed(store, make, small_cgroup):
    job = make("eat memory", stage="sft", processes=1)
    process = run_in_a_process(store, job, first=small_cgroup)
    _, said = process.communicate(timeout=60)
    assert "out of memory: ended by the kernel" in said and "resources.micro_batch" in said
    told = told_of(store, job)
    assert (told.kind, told.code, told.rank) == ("out of memory", 5, 0)


def test_deepspeed_runs_two_ranks(store, make):
    job, lines = make("succeed", stage="sft", processes=2), []
    assert run(store, job, on_line=lines.append).job_id == job.job_id
    assert {line[:15] for line in lines if " here at " in line} == {"[0] rank 0 of 2", "[1] rank 1 of 2"}


def test_deepspeed_passes_on_the_exit_code_of_a_wrong_configuration(store, make):
    error = failed(store, make("wrong configuration", stage="sft", processes=2))
    assert (error.code, str(error)) == (2, "optim.lr: 0 must be positive; e.g. 1e-5")


def test_a_killed_launch_process_is_never_a_success(store, make):
    """It leaves its ranks, which the guard ends."""
    job = make("hang", stage="sft", processes=2)

    def kill():
        ranks_there(job, 2)
        for pid in guard.processes_of(job.job_id):
            if guard.python_module(pid) == "deepspeed.launcher.launch":
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    error = failed(store, job)
    killer.join()
    assert (error.code, error.reason) == (-9, "launcher") and "the launcher was killed by SIGKILL" in str(error)


def test_without_its_guard_a_deepspeed_job_ends_by_itself(store, make, tmp_path):
    """Guard and control plane are both gone: the ranks see it, and then the launcher ends too."""
    job = acquire(store, make("hang", stage="sft", processes=2)).job
    process = launch.start(job, launch.command(job, store, MODULE), tmp_path)
    ranks_there(job, 2)
    process.kill()
    process.wait()
    assert until(lambda: not living(job), 8)


# --- command and environment ---------------------------------------------------------------------------------------


def world_of(argv):
    [info] = [word.partition("=")[2] for word in argv if word.startswith("--world_info=")]
    return json.loads(base64.urlsafe_b64decode(info))


def test_visible_gpus_are_used_not_the_first_ones(store, make, monkeypatch):
    job = make("succeed", stage="ppo", processes=2)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5b6c,6")
    assert world_of(launch.command(job, store)) == {"node-0000": [4, "GPU-5b6c"]}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert world_of(launch.command(job, store)) == {"node-0000": [0, 1]}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    with pytest.raises(ConfigError, match=r"resources.processes: 2"):
        launch.command(job, store)


def test_every_node_is_told_how_many_ranks_all_have_and_which_devices_are_its_own(store, make, monkeypatch):
    job = make("succeed", stage="ppo", processes=2)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    seats = [
        Seat(node=n, host="same-name", processes=2, first_rank=2 * n, devices=d) for n, d in enumerate([(), (), (6, 7)])
    ]
    first, _, last = [launch.ranks_command(seats, n, "10.0.0.1", 20_001, store, job, MODULE) for n in range(3)]
    assert world_of(first) == {"node-0000": [4, 5], "node-0001": [0, 1], "node-0002": [0, 1]}
    assert world_of(last) == {"node-0000": [0, 1], "node-0001": [0, 1], "node-0002": [6, 7]}
    assert "--node_rank=2" in last and "--master_addr=10.0.0.1" in last and "--master_port=20001" in last


def test_a_job_on_several_nodes_is_a_head_here_and_its_data_stage_a_local_process(store, make):
    on_nodes = {"launcher": "nodes", "cluster": {"nodes": 2}}
    argv = launch.command(make("succeed", stage="sft", **on_nodes), store)
    assert argv[1:4] == ["-u", "-m", "rlhf_core.head"] and "--module" not in argv
    argv = launch.command(make("succeed", stage="sft", **on_nodes), store, MODULE)
    assert argv[-2:] == ["--module", MODULE]
    assert launch.command(make("succeed", stage="data", **on_nodes), store, MODULE)[3] == MODULE


def test_the_environment_is_the_same_wherever_the_job_is_started(make, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    env = launch.environment(make("succeed", processes=2))
    assert env["OMP_NUM_THREADS"] == "1" and env["DS_ACCELERATOR"] == "cpu"
    assert env["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert env["PYTHONPATH"].split(":")[0] == str(Path(launch.__file__).parent.parent)
    assert launch.CPU_DEFAULTS.items() <= env.items()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    assert launch.environment(make("succeed"))["GLIBC_TUNABLES"] == "glibc.malloc.perturb=1"


def test_a_store_in_memory_is_refused(make):
    with pytest.raises(ConfigError, match="memory://"):
        run(Store("memory://x"), make("succeed"))
