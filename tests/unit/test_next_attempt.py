"""What failed attempts change about the next one, read from a store: half the micro-batch, hosts that sit out."""

import pytest

from rlhf_core.artifacts import ArtifactRef, make_ref
from rlhf_core.ends import Failure, Kind
from rlhf_core.job import JobSpec
from rlhf_core.next_attempt import adapt, tried, worth_halving
from rlhf_core.resources import Resources
from rlhf_core.sealed import seal
from rlhf_core.store import Store

HOSTS = [{"host": name} for name in ("node1", "node2", "node3")]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(f"file://{tmp_path}/store")


def reference(stage: str = "sft") -> ArtifactRef:
    return make_ref(stage, "demo", {}, {})  # pyright: ignore[reportArgumentType]


def wanted(store: Store, stage: str = "sft", since: int = 1, **resources: object) -> JobSpec:
    """The job of the next attempt as the configuration has it."""
    fields = {"micro_batch": 16, "rollout_micro_batch": 64, **resources}
    return JobSpec(
        stage=stage, store=store.url, output=reference(stage), attempt=1, since=since, job_id="", identity={},
        spec={"batch_size": 12}, resources=Resources.model_validate(fields),
    )  # fmt: skip


def fail(
    store: Store, job: JobSpec, attempt: int, kind: Kind, host: str | None = None, detail: str = "it broke"
) -> None:
    """One attempt of the job, which fails."""
    job = job.model_copy(update={"attempt": attempt})
    store.write(f"{job.folder}/job.json", seal(job), create=True)
    failure = Failure(kind=kind, code=5 if kind == "out of memory" else 1, host=host, detail=detail)
    store.write(f"{job.folder}/failure.json", seal(failure))


def cluster(nodes: int | None = None, least: int | None = None) -> dict[str, object]:
    return {"launcher": "hostfile", "cluster": {"hosts": HOSTS, "nodes": nodes, "min_nodes": least}}


def sizes(job: JobSpec) -> tuple[int, int, bool]:
    return job.resources.micro_batch, job.resources.rollout_micro_batch, job.halved


# --- memory ----------------------------------------------------------------------------------------------------------


def test_the_first_attempt_and_one_after_another_failure_are_as_the_configuration_says(store):
    job = wanted(store)
    assert adapt(store, job) == (job, [])
    fail(store, job, 1, "crashed")
    assert adapt(store, job) == (job, []) and not worth_halving(store, job.output, 1)


@pytest.mark.parametrize(
    ("stage", "then"),
    [("sft", (8, 64, True)), ("ppo", (8, 32, True)), ("evaluate", (8, 32, True)), ("data", (16, 64, False))],
)
def test_after_one_that_ran_out_of_memory_the_next_has_half_of_what_its_stage_uses(store, stage, then):
    job = wanted(store, stage)
    fail(store, job, 1, "out of memory")
    smaller, told = adapt(store, job)
    assert sizes(smaller) == then and worth_halving(store, job.output, 1) == then[2]
    assert [line.startswith("attempt 1 ran out of memory with micro_batch 16") for line in told] == [True] * then[2]


def test_what_was_halved_is_not_halved_again_but_every_run_begins_with_it(store):
    job = wanted(store)
    fail(store, job, 1, "out of memory")
    smaller, _ = adapt(store, job)
    fail(store, smaller, 2, "out of memory")
    assert not worth_halving(store, job.output, 1)
    assert sizes(adapt(store, job)[0]) == sizes(smaller) == (8, 64, True)
    assert tried(store, job.output, 1).startswith(
        "Out of memory with micro_batch 16, then with micro_batch 8: set a lower"
    )


def test_a_configuration_that_was_lowered_counts_anew(store):
    job, lower = wanted(store), wanted(store, micro_batch=4)
    fail(store, job, 1, "out of memory")
    fail(store, adapt(store, job)[0], 2, "out of memory")
    assert adapt(store, lower) == (lower, [])
    fail(store, lower, 3, "out of memory")
    assert worth_halving(store, job.output, 1) and sizes(adapt(store, lower)[0]) == (2, 64, True)


def test_a_micro_batch_of_one_cannot_be_halved_and_an_odd_one_is_rounded_down(store):
    one = wanted(store, micro_batch=1)
    fail(store, one, 1, "out of memory")
    assert adapt(store, one) == (one, []) and not worth_halving(store, one.output, 1)
    ppo = wanted(store, "ppo", micro_batch=1, rollout_micro_batch=5)
    fail(store, ppo, 1, "out of memory")
    assert sizes(adapt(store, ppo)[0]) == (1, 2, True)


def test_attempts_before_a_forced_run_and_records_that_cannot_be_read_count_for_nothing(store):
    job = wanted(store, since=2)
    fail(store, job, 1, "out of memory")
    fail(store, job, 2, "out of memory")
    store.write(f"{reference().id}/attempts/0002/failure.json", b'{"kind": "out of mem')
    fail(store, job, 3, "out of memory")
    store.delete(f"{reference().id}/attempts/0003/job.json")
    assert adapt(store, job) == (job, []) and tried(store, job.output, 1) == ""


# --- hosts -----------------------------------------------------------------------------------------------------------


def test_a_host_that_failed_twice_is_left_out_if_enough_others_remain_and_that_is_told(store):
    job = wanted(store, **cluster(nodes=2))
    fail(store, job, 1, "unreachable", "node2", "no sign of life for 15 s")
    assert adapt(store, job) == (job, [])
    fail(store, job, 2, "unreachable", "node2", "link down")
    changed, told = adapt(store, job)
    assert changed.left_out == ("node2",)
    assert told == ["node2 has failed 2 times, last: link down; it is left out until this artifact is made"]


def test_if_not_enough_remain_it_stays_and_that_is_told_too(store):
    job = wanted(store, **cluster())
    for attempt in (1, 2):
        fail(store, job, attempt, "unreachable", "node2")
    changed, (line,) = adapt(store, job)
    assert changed.left_out == ("node2",), "seats() knows best"
    assert "it stays all the same" in line and "resources.cluster.min_nodes" in line
    job = wanted(store, **cluster(least=2))
    assert "is left out" in adapt(store, job)[1][0]


def test_two_hosts_with_one_failure_each_and_failures_that_are_not_a_hosts_leave_nobody_out(store):
    job = wanted(store, **cluster(nodes=2))
    fail(store, job, 1, "unreachable", "node1")
    fail(store, job, 2, "unreachable", "node2")
    for attempt, kind in enumerate(("preempted", "preempted", "configuration", "out of memory"), 3):
        fail(store, job, attempt, kind, "node1")  # pyright: ignore[reportArgumentType]
    fail(store, job, 9, "unreachable", None)
    assert adapt(store, job)[0].left_out == ()


@pytest.mark.parametrize("launcher", [{"launcher": "local"}, {"launcher": "nodes", "cluster": {"nodes": 2}}])
def test_where_nodes_are_not_ours_to_choose_nobody_is_left_out(store, launcher):
    job = wanted(store, **launcher)
    for attempt in (1, 2):
        fail(store, job, attempt, "unreachable", "node0001")
    assert adapt(store, job) == (job, [])
