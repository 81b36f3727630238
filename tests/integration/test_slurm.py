"""Jobs that Slurm runs: a real Slurm, whose queue, preemption, time limits and people's commands end them in their ways."""

import hashlib
import json
import time
import uuid
from pathlib import Path

import pytest

from rlhf_core import start_slurm
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.cluster import Cluster, SlurmPlan
from rlhf_core.job import JobSpec
from rlhf_core.resources import CheckpointPlan, Resources
from rlhf_core.start_slurm import SlurmStarter, job_name
from rlhf_core.starting import agent_id, seats_of
from rlhf_core.store import Store

pytest_plugins = ["slurm"]

# Stands where rlhf_core.node stands: tells that it came, and waits until it is told to end, or the file `leave` says with what.
STAND_IN = """
import json, os, signal, socket, sys, time
from pathlib import Path

def main(folder):
    def tell(what):
        number = f"{os.environ.get('SLURM_RESTART_COUNT', 0)}-{os.environ['SLURM_NODEID']}"
        part = folder / f".{number}-{os.getpid()}"
        part.write_text(json.dumps({"host": socket.gethostname(), "env": dict(os.environ)}))
        part.rename(folder / f"{what}-{os.environ['SLURM_JOB_ID']}-{number}")

    def told(signo, frame):
        tell("told")
        if not (folder / "stubborn").exists():
            time.sleep(0.5)
            os._exit(75)

    signal.signal(signal.SIGTERM, told)
    tell("came")
    while not (folder / "leave").exists():
        time.sleep(0.05)
    sys.exit(int((folder / "leave").read_text()))

if __name__ == "__main__":
    main(Path(sys.argv[1]))
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where stand-ins of nodes tell what happens to them."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setattr(start_slurm, "node_command", lambda store, ref: ["-m", "stand_in", str(folder)])
    return folder


@pytest.fixture
def make(tmp_path, slurm):
    """Makes starters of attempts at one artifact; those that are not stopped before are at the end."""
    store = Store(str(tmp_path / "store"))
    ref = ArtifactRef(stage="sft", name="test", fingerprint=hashlib.sha256(uuid.uuid4().bytes).hexdigest())
    made = []

    def make(nodes=2, python=None, left_out=(), **plan) -> SlurmStarter:
        cluster = Cluster(nodes=nodes, python=python, slurm=SlurmPlan(**plan))
        job = JobSpec(
            stage="sft", store=store.url, output=ref, attempt=len(made) + 1, job_id="", spec={}, identity={}, left_out=left_out,
            resources=Resources(launcher="slurm", cluster=cluster, threads=1, checkpoint=CheckpointPlan(grace_seconds=2)),
        )  # fmt: skip
        job = job.model_copy(update={"job_id": f"{job.family}{uuid.uuid4().hex[:12]}"})
        made.append(SlurmStarter(store, job, seats_of([f"node{n}" for n in range(nodes)], 1)))
        return made[-1]

    yield make
    for starter in made:
        starter.stop()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def heard(place: Path, what: str, starter: SlurmStarter, restarts=0, count=2, seconds=20.0) -> list[dict]:
    """What the nodes of a starter's job have told, once all of them have."""

    def found() -> list[Path]:
        return sorted(place.glob(f"{what}-{starter.number}-{restarts}-*"))

    assert until(lambda: len(found()) == count, seconds), f"{found()}; {starter.look()}; {starter.waits()}"
    return [json.loads(file.read_text()) for file in found()]


def trouble(starter: SlurmStarter, seconds=20.0):
    """The next trouble, the only one."""
    found = until(starter.look, seconds)
    assert found, f"no trouble within {seconds} s; waits: {starter.waits()}"
    assert len(found) == 1 and found[0].node is None
    return found[0]


def started(place: Path, starter: SlurmStarter) -> SlurmStarter:
    starter.start()
    heard(place, "came", starter)
    return starter


# --- from the queue to the nodes -------------------------------------------------------------------------------------


def test_each_node_runs_once_and_knows_its_number_and_its_id(slurm, place, make, monkeypatch):
    monkeypatch.setenv("RLHF_GUARD_PID", "1")
    monkeypatch.setenv("RLHF_SCRATCH", "/nowhere")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the control plane")
    starter = make()
    assert starter.waits()
    starter.start()
    came = heard(place, "came", starter)
    assert [c["env"]["SLURM_NODEID"] for c in came] == ["0", "1"]
    assert [c["env"]["RLHF_JOB_ID"] for c in came] == [agent_id(starter.job, 0), agent_id(starter.job, 1)]
    assert sorted(c["host"] for c in came) == ["n1", "n2"]
    for env in (c["env"] for c in came):
        assert not {"RLHF_GUARD_PID", "RLHF_SCRATCH", "DS_ACCELERATOR"} & env.keys(), (
            "they are of the machine that submits"
        )
        assert env["AWS_SECRET_ACCESS_KEY"] == "of the control plane"
    assert until(lambda: starter.waits() is None)
    assert slurm.field(starter.number, "JobName") == job_name(starter.job)
    assert slurm.field(starter.number, "Requeue") == "1"
    assert starter.look() == []
    starter.stop()
    assert len(heard(place, "told", starter)) == 2


def test_a_job_that_has_to_wait_says_why(slurm, place, make):
    other = slurm.occupy()
    assert until(lambda: slurm.state(other) == "RUNNING")
    starter = make()
    starter.start()
    assert until(lambda: "PENDING (" in (starter.waits() or ""))
    assert starter.waits() == f"Slurm job {starter.number} is PENDING (Resources)"
    slurm.run("scancel", other)
    heard(place, "came", starter)
    assert until(lambda: starter.waits() is None)


def test_a_job_that_waits_is_taken_back(slurm, place, make):
    other = slurm.occupy()
    starter = make()
    starter.start()
    assert until(lambda: starter.number)
    starter.stop()
    assert until(lambda: slurm.state(starter.number) == "CANCELLED")
    slurm.run("scancel", other)
    assert not list(place.glob("came-*"))


def test_hosts_that_are_left_out_get_no_part(slurm, place, make):
    starter = make(nodes=1, left_out=("n1.example.org", "gone"))
    starter.start()
    assert [c["host"] for c in heard(place, "came", starter, count=1)] == ["n2"]


# --- what is wrong with the request ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan, words",
    [
        ({"partition": "nowhere"}, ["refuses", "invalid partition specified: nowhere", "slurm.partition nowhere"]),
        ({"time_limit": "soon"}, ["refuses", "Invalid --time specification", "slurm.time_limit soon"]),
        ({"options": ("--gres=gpu:8",)}, ["refuses", "Invalid generic resource"]),
        ({"options": ("--constraint=h100",)}, ["refuses", "Invalid feature specification"]),
        ({"nodes": 3}, ["can never start (PartitionNodeLimit)", "resources.cluster (nodes, slurm)"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else "-".join(map(str, value)),
)
def test_what_slurm_cannot_give_is_told_at_once_in_its_own_words(slurm, place, make, plan, words):
    began = time.monotonic()
    starter = make(**plan)
    starter.start()
    found = trouble(starter)
    assert found.kind == "configuration"
    assert [word for word in words if word not in found.message] == []
    starter.stop()
    assert time.monotonic() - began < 20


def test_a_node_without_the_interpreter_says_so(slurm, place, make):
    starter = make(python="/opt/absent/python")
    starter.start()
    found = trouble(starter)
    assert found.kind == "configuration"
    assert "/opt/absent/python" in found.message and "not found" in found.message
    assert "resources.cluster.python" in found.message and ("n1" in found.message or "n2" in found.message)


def test_a_node_without_the_package_says_so_while_others_run(slurm, place, make, monkeypatch):
    """Its own words come by Slurm, as it may not even reach the store."""
    only_there = "import socket\nif socket.gethostname() == 'n2': import absent_package\n"
    (place / "stand_in.py").write_text(only_there + STAND_IN)
    starter = make()
    starter.start()
    found = trouble(starter)
    assert found.kind == "configuration"
    assert found.message.startswith("n2: ModuleNotFoundError: No module named 'absent_package'")
    assert slurm.state(starter.number) == "RUNNING", "the other node waits"


# --- how jobs end ----------------------------------------------------------------------------------------------------


def test_scancel_is_somebodys_will_and_not_tried_again(slurm, place, make):
    starter = started(place, make())
    slurm.run("scancel", starter.number)
    found = trouble(starter)
    assert found.kind == "configuration" and "was cancelled by somebody (scancel)" in found.message
    assert len(heard(place, "told", starter)) == 2


def test_nodes_that_end_by_themselves_are_told_of_with_their_code(slurm, place, make):
    starter = started(place, make())
    (place / "leave").write_text("3")
    found = trouble(starter)
    assert found.kind == "launcher"
    assert "FAILED (NonZeroExitCode), exit code 3" in found.message and "--output=rlhf-%j.out" in found.message


def test_a_job_that_is_queued_again_is_taken_over_by_the_next_attempt(slurm, place, make):
    first = started(place, make())
    slurm.run("scontrol", "requeue", first.number)
    found = trouble(first)
    assert found.kind == "preempted" and "was queued again" in found.message
    first.stop()
    second = make()
    second.start()
    assert until(lambda: second.number) == first.number
    heard(place, "came", second, restarts=1, seconds=30)
    assert until(lambda: second.waits() is None) and second.look() == []
    first.stop()
    assert slurm.state(second.number) == "RUNNING", "it is no more the first one's"
    second.stop()
    assert until(lambda: slurm.state(second.number) == "CANCELLED")


def test_a_node_that_fails_has_the_job_queued_again(slurm, place, make):
    starter = started(place, make())
    try:
        slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        assert trouble(starter).kind == "preempted"
    finally:
        slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
        slurm.run("scancel", starter.number)


def test_a_job_whose_attempt_died_in_the_queue_is_taken_over(slurm, place, make):
    other = slurm.occupy()
    first = make()
    first.start()
    assert until(lambda: first.number and first.waits())
    second = make()
    second.start()
    assert until(lambda: second.number) == first.number
    slurm.run("scancel", other)
    heard(place, "came", second)


def test_a_job_whose_nodes_serve_a_dead_attempt_is_cancelled(slurm, place, make):
    first = started(place, make())
    second = started(place, make())
    assert second.number != first.number
    assert len(heard(place, "told", first)) == 2
    assert slurm.state(first.number) in ("COMPLETING", "CANCELLED")


def test_a_queued_job_for_something_else_is_cancelled(slurm, place, make):
    other = slurm.occupy()
    first = make(nodes=1)
    first.start()
    assert until(lambda: first.number)
    second = make(nodes=2)
    second.start()
    assert until(lambda: second.number) != first.number
    assert slurm.state(first.number) == "CANCELLED"
    slurm.run("scancel", other)


def test_jobs_of_other_artifacts_are_left_alone(slurm, place, make):
    name = job_name(make().job)
    other = slurm.run("sbatch", "--parsable", f"--job-name={name}0", "--output=/dev/null", "--wrap", "sleep 1000")
    started(place, make()).stop()
    assert slurm.state(other) == "RUNNING"
    slurm.run("scancel", other)


# --- preemption and time limit ---------------------------------------------------------------------------------------


def test_a_preempted_job_is_told_before_its_grace_is_over(slurm, place, make):
    starter = started(place, make(partition="low"))
    other = slurm.occupy("high", nodes=1)
    found = trouble(starter)
    assert found.kind == "preempted"
    assert len(heard(place, "told", starter)) == 2
    starter.stop()
    assert until(lambda: slurm.state(other) == "RUNNING", 30)
    slurm.run("scancel", other)


@pytest.mark.slow
def test_a_job_that_is_preempted_by_force_goes_on_when_the_nodes_are_free(slurm, place, make):
    (place / "stubborn").touch()
    first = started(place, make(partition="low"))
    other = slurm.occupy("high", nodes=1)
    assert trouble(first).kind == "preempted"
    assert until(lambda: slurm.state(other) == "RUNNING", 60)
    first.stop()
    second = make(partition="low")
    second.start()
    assert until(lambda: second.number) == first.number
    assert until(lambda: "PENDING" in (second.waits() or ""), 30)
    slurm.run("scancel", other)
    heard(place, "came", second, restarts=1, seconds=60)


@pytest.mark.slow
def test_the_time_limit_lets_nodes_save(slurm, place, make):
    """Slurm counts in minutes, and tells up to one of them too early."""
    starter = started(place, make(time_limit="1"))
    found = trouble(starter, 120)
    assert found.kind == "preempted" and "of 00:01:00" in found.message
    assert len(heard(place, "told", starter)) == 2


@pytest.mark.slow
def test_nodes_that_do_not_heed_the_time_limit_are_ended_by_slurm(slurm, place, make):
    (place / "stubborn").touch()
    starter = started(place, make(time_limit="1"))
    found = trouble(starter, 180)
    assert found.kind == "timed out" and "its time limit of 00:01:00" in found.message


# --- a controller that is away ---------------------------------------------------------------------------------------


def test_a_job_goes_on_while_the_controller_is_away(slurm, place, make, monkeypatch):
    monkeypatch.setattr(start_slurm, "POLL_SECONDS", 0.2)
    starter = started(place, make())
    assert until(lambda: starter.waits() is None)
    slurm.stop_controller()
    try:
        end, longest = time.monotonic() + 12, 0.0
        while time.monotonic() < end:
            began = time.monotonic()
            assert starter.look() == [] and starter.waits() is None
            longest = max(longest, time.monotonic() - began)
            time.sleep(0.2)
        assert longest < 1
    finally:
        slurm.start_controller()
    assert slurm.state(starter.number) == "RUNNING"
    slurm.run("scancel", starter.number)
    assert "cancelled" in trouble(starter, 40).message


@pytest.mark.slow
def test_a_job_is_submitted_when_the_controller_is_back(slurm, place, make):
    slurm.stop_controller()
    try:
        starter = make()
        starter.start()
        assert until(lambda: "does not answer" in (starter.waits() or ""), 30)
    finally:
        slurm.start_controller()
    heard(place, "came", starter, seconds=40)
    assert len(slurm.queue()) == 1
