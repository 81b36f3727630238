"""Whole jobs on a real Slurm: its two nodes run the ranks of a stage that does what fake_stage.py is told, and of a real one."""

import hashlib
import os
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest
import tiny

from rlhf_core import guard, launch, lease
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.cluster import Cluster, SlurmPlan
from rlhf_core.errors import JobFailed, is_transient
from rlhf_core.job import JobSpec
from rlhf_core.resources import CheckpointPlan, Resources
from rlhf_core.specs import SFTSpec
from rlhf_core.start_slurm import job_name
from rlhf_core.store import Store

pytest_plugins = ["slurm"]

HERE = Path(__file__).parent
MODULE = "fake_stage"


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    (tmp_path / "local").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "local"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setenv("RLHF_NODE_BEAT", "0.5")
    monkeypatch.setenv("RLHF_NODE_LOST", "8")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def make(store, slurm):
    """Makes jobs, and asserts at the test's end that nothing of them is left on any node."""
    jobs = []

    def make(behave, nodes=2, grace=10.0, ref=None, **plan):
        digest = hashlib.sha256(uuid.uuid4().bytes).hexdigest()
        cluster = Cluster(nodes=nodes, slurm=SlurmPlan(**plan), start_seconds=40)
        job = JobSpec(
            stage="sft", store=store.url, attempt=1, job_id="", spec={"behave": behave, "batch_size": 4}, identity={},
            output=ref or ArtifactRef(stage="sft", name="test", fingerprint=digest),
            resources=Resources(
                launcher="slurm", cluster=cluster, threads=1, checkpoint=CheckpointPlan(grace_seconds=grace)
            ),
        )  # fmt: skip
        jobs.append(job := job.model_copy(update={"job_id": f"{job.family}{uuid.uuid4().hex[:12]}"}))
        return job

    yield make
    for job in jobs:
        left = lambda job=job: {p: guard.argv(p) for p in guard.processes_of(job.family)}  # noqa: E731
        assert until(lambda left=left: not left(), 15), left()


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def run(store, job, on_event=lambda event: None, on_line=lambda line: None, module=MODULE):
    with lease.acquire(store, job) as held:
        launch.end_leftovers(held.job)
        return launch.run_job(store, held, on_event, on_line, module=module)


def failed(store, job, meanwhile=lambda: None, **options) -> JobFailed:
    """The error of a job, while something happens to it."""
    thread = threading.Thread(target=meanwhile)
    thread.start()
    with pytest.raises(JobFailed) as info:
        run(store, job, **options)
    thread.join()
    return info.value


def ranks(job, count=2, seconds=40.0) -> set[int]:
    """The job's ranks on all nodes, once all of them are where the test wants them."""

    def there():
        found = {p for p in guard.processes_of(job.family) if guard.python_module(p) == MODULE}
        places = {Path(guard.variable(p, "RLHF_SCRATCH") or "/", f"arrived-{guard.variable(p, 'RANK')}") for p in found}
        return found if len(found) == count and all(place.exists() for place in places) else set()

    found = until(there, seconds)
    assert found, "the ranks have not come"
    return found


def number(slurm, job) -> str:
    """The number of the job in Slurm's queue."""
    return slurm.run("squeue", "-h", f"--name={job_name(job)}", "-o", "%A")


def saved(store, job) -> list[str]:
    return sorted(key.rpartition("-")[2] for key in store.list(job.output.id) if "/saved-" in key)


def test_a_stage_runs_on_two_nodes_of_slurm(slurm, store, make):
    job, events, lines = make("succeed"), [], []
    result = run(store, job, on_event=events.append, on_line=lines.append)
    assert result.job_id == job.job_id and result.metrics == {"loss": 1.5}
    assert [event["step"] for event in events if event.get("phase") == "train"] == [1]
    assert any("rank 1 of 2 here" in line for line in lines)
    keys = store.list(f"{job.output.id}/attempts/0001")
    assert {"rank-000.log", "rank-001.log"} <= {key.rpartition("/")[2] for key in keys}


def test_a_partition_that_is_not_there_is_one_clear_line_at_once(slurm, store, make):
    began = time.monotonic()
    error = failed(store, make("succeed", partition="nowhere"))
    assert time.monotonic() - began < 20
    assert error.code == 2 and not is_transient(error.code)
    assert str(error).startswith("Slurm refuses the job: invalid partition specified: nowhere")
    assert "\n" not in str(error)


@pytest.mark.slow
def test_a_job_that_waits_for_nodes_shows_its_state(slurm, store, make):
    other, phases = slurm.occupy(), []

    def note(event):
        phases.append(str(event.get("phase")))
        if "PENDING (Resources)" in phases[-1]:
            slurm.run("scancel", other)

    run(store, make("succeed"), on_event=note)
    assert any("Slurm job" in phase and "PENDING (Resources)" in phase for phase in phases)


@pytest.mark.slow
def test_scancel_lets_ranks_save_and_is_not_tried_again(slurm, store, make):
    job = make("save when told")
    error = failed(store, job, lambda: (ranks(job), slurm.run("scancel", number(slurm, job))))
    assert saved(store, job) == ["0", "1"]
    assert not is_transient(error.code)
    assert "cancelled by somebody (scancel)" in str(error)


@pytest.mark.slow
def test_a_preempted_stage_saves_and_is_to_go_on(slurm, store, make):
    job = make("save when told", partition="low")
    other = []
    error = failed(store, job, lambda: (ranks(job), other.append(slurm.occupy("high", nodes=1))))
    slurm.run("scancel", *other)
    assert (error.code, error.reason) == (75, "preempted") and is_transient(error.code)
    assert saved(store, job) == ["0", "1"]


@pytest.mark.slow
def test_a_stage_that_is_requeued_goes_on_in_the_same_slurm_job(slurm, store, make):
    job, numbers = make("save when told"), []

    def requeue():
        ranks(job)
        numbers.append(number(slurm, job))
        slurm.run("scontrol", "requeue", numbers[0])

    error = failed(store, job, requeue)
    assert (error.code, error.reason) == (75, "preempted")
    assert saved(store, job) == ["0", "1"]
    again = make("succeed", ref=job.output)
    run(store, again, on_event=lambda _: numbers.append(number(slurm, job)))
    assert set(filter(None, numbers)) == {numbers[0]}


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job_on_both_nodes(slurm, store, make):
    job = make("rank 1 raises, the others wait for it")
    error = failed(store, job)
    assert "the loss went for a walk" in str(error) and is_transient(error.code)


@pytest.mark.slow
def test_an_interrupt_ends_the_job_and_takes_it_out_of_the_queue(slurm, store, make):
    job = make("save when told")

    class Interrupted(Exception):
        pass

    def interrupt(event):
        if event.get("phase") == "train":
            ranks(job)
            raise Interrupted

    with pytest.raises(Interrupted):
        run(store, job, on_event=interrupt)
    assert saved(store, job) == ["0", "1"]
    assert until(lambda: not number(slurm, job))


@pytest.mark.slow
def test_when_the_head_is_killed_nodes_end_and_the_next_attempt_takes_none_of_them(slurm, store, make):
    job = make("save when told")

    def kill():
        ranks(job)
        [head] = [p for p in guard.processes_of(job.family) if guard.python_module(p) == "rlhf_core.head"]
        os.kill(head, 9)

    error = failed(store, job, kill)
    assert is_transient(error.code)
    run(store, make("succeed", ref=job.output))


@pytest.mark.slow
def test_a_real_stage_that_slurm_queues_again_resumes_and_gives_what_one_machine_gives(slurm, store, make, tmp_path):
    inputs = {"data": tiny.make_data(store, tmp_path)}
    spec = SFTSpec(seed=0, batch_size=4, max_steps=60, epochs=4).model_dump(mode="json")
    often = CheckpointPlan(every_steps=1, every_minutes=None, grace_seconds=20)

    def attempt(job, **resources):
        own = {"processes": 1, "threads": 1, "micro_batch": 2, "zero_stage": 2, "checkpoint": often}
        changed = {
            "spec": spec,
            "inputs": inputs,
            "model": tiny.MODEL,
            "resources": Resources(**own | resources),
        }
        return job.model_copy(update=changed)

    alone = run(store, attempt(make(""), launcher="local", processes=2), module=launch.TRAIN)
    nodes = {"launcher": "slurm", "cluster": Cluster(nodes=2, start_seconds=60)}
    job = attempt(make(""), **nodes)
    numbers = []

    def requeue(event):
        if (event.get("step") or 0) >= 3 and event.get("phase") == "train" and not numbers:
            numbers.append(number(slurm, job))
            slurm.run("scontrol", "requeue", numbers[0])

    with pytest.raises(JobFailed) as info:
        run(store, job, requeue, module=launch.TRAIN)
    assert (info.value.code, info.value.reason) == (75, "preempted")
    again = run(store, attempt(make("", ref=job.output), **nodes), module=launch.TRAIN)
    assert again.provenance["resumed"] and again.provenance["processes"] == 2
    assert again.metrics["checkpoints"] < 60
    measured = [
        {name: value for name, value in result.metrics.items() if not name.startswith(("checkpoint", "tokens_per"))}
        for result in (again, alone)
    ]
    assert any("loss" in name for name in measured[0])
    assert measured[0] == pytest.approx(measured[1], rel=1e-5)
