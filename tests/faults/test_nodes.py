"""A stage on two hosts that loses a rank, a link, a host or its head is noticed, ends everywhere, and goes on with the same bits.

`pytest tests/faults -m faults`; one chain of a few of these is part of the ordinary suite. Network namespaces are the hosts, so
this needs root; see `hosts.py`. `--faults-report DIR` keeps the table as nodes.md.
"""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hosts import Hosts
from nodes import STALL_SECONDS, Fault, NodeRun, Table, on, process
from runs import Moment
from s3 import S3Server

LAUNCH, HEAD, NODE = "deepspeed.launcher.launch", "rlhf_core.head", "rlhf_core.node"
MEMORY = Path("/sys/fs/cgroup/memory")
LIMIT = 30.0  # seconds in which anything must be noticed


def _flow(run: NodeRun) -> None:
    assert run.run
    run.run.process.kill()


def _limit_memory(run: NodeRun) -> None:
    """Let rank 1 eat until the kernel ends it: its host gets a limit just above what it uses."""
    group = MEMORY / f"rlhf-test-{os.getpid()}"
    group.mkdir(exist_ok=True)
    for pid in run.hosts.processes("node2"):
        (group / "cgroup.procs").write_text(str(pid))
    (group / "memory.limit_in_bytes").write_text(str(256 << 20))
    on("node2", "sh", "-c", "echo eat > ~/fault-1")(run)


def _free_memory(run: NodeRun) -> None:
    group = MEMORY / f"rlhf-test-{os.getpid()}"
    for pid in (group / "cgroup.procs").read_text().split():
        (MEMORY / "cgroup.procs").write_text(pid)
    group.rmdir()


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("raise on rank 1", on("node2", "sh", "-c", "echo raise > ~/fault-1"), ("crashed",)),
        Fault("segfault of rank 0", on("node1", "sh", "-c", "echo segfault > ~/fault-0"), ("crashed",)),
        Fault("kill -9 of rank 0", process(lambda run: run.rank(0)), ("killed",)),
        Fault("kill -9 of rank 1", process(lambda run: run.rank(1)), ("killed",)),
        Fault(
            "kill -9 of launch.py on node2",
            process(lambda run: run.module(LAUNCH, "node2")),
            ("preempted", "launcher", "killed"),
        ),
        Fault(
            "kill -9 of the guard on node2",
            process(lambda run: run.module("rlhf_core.guard", "node2")),
            ("preempted", "launcher", "killed", "crashed"),
        ),
        Fault(
            "kill -9 of the node's process on node2",
            process(lambda run: run.module(NODE, "node2")),
            ("preempted", "launcher", "unreachable"),
        ),
        Fault("kill -9 of ssh to node2", process(lambda run: run.ssh("node2")), ("preempted", "launcher")),
        Fault("kill -9 of the head", process(lambda run: run.module(HEAD)), ("killed", "launcher")),
        Fault("kill -9 of the control plane", _flow, (), flow=True),
        Fault(
            "link of node2 down",
            lambda run: run.hosts.cut("node2"),
            ("unreachable", "launcher"),
            lambda run: run.hosts.heal("node2"),
        ),
        Fault(
            "crash of node2",
            lambda run: run.hosts.crash("node2"),
            ("unreachable", "launcher", "crashed"),
            lambda run: run.hosts.boot("node2"),
        ),
        Fault("SIGSTOP of rank 1", process(lambda run: run.rank(1), signal.SIGSTOP), ("stalled",), stall=STALL_SECONDS),
        Fault(
            "full disk on node2",
            on("node2", "sh", "-c", "dd if=/dev/zero of=/tmp/ballast bs=1M 2> /dev/null; true"),
            ("crashed",),
            on("node2", "rm", "/tmp/ballast"),
            outlived=True,  # copies of checkpoints that only save time make room
        ),
        Fault(
            "SIGTERM to the control plane", lambda run: run.run.process.terminate() if run.run else None, (), flow=True
        ),
    )
}


@pytest.fixture
def make(undisturbed, hosts: Hosts, hosts_s3: S3Server, tmp_path: Path) -> Iterator[Callable[[str], NodeRun]]:
    made: list[NodeRun] = []

    def make(stage: str) -> NodeRun:
        made.append(NodeRun(undisturbed, stage, hosts, hosts_s3, tmp_path))  # pyright: ignore[reportArgumentType]
        return made[-1]

    yield make
    for run in made:
        run.end()


def strike(run: NodeRun, names: Sequence[str], table: Table) -> None:
    """Let faults fall one after the other, each into an attempt that went on from where the last one had saved."""
    outcomes = []
    for number, name in enumerate(names):
        outcomes.append(run.strike(FAULTS[name], Moment("train", 3 + number % 2, 0.2)))
        print(outcomes[-1], flush=True)
    resumed = run.finish()
    for outcome, where in zip(outcomes, resumed, strict=False):
        outcome.resumed = where
    table.rows += outcomes
    late = [outcome for outcome in outcomes if outcome.noticed > LIMIT]
    assert not late, late


@pytest.mark.faults
def test_a_job_on_two_hosts_goes_on_with_the_same_bits_after_a_rank_and_a_link_were_lost(make, node_table):
    strike(make("sft"), ("kill -9 of rank 1", "link of node2 down"), node_table)


SMALL = ("kill -9 of rank 1", "link of node2 down")
MEMORY_LOST = Fault("out of memory on node2", _limit_memory, ("out of memory",), _free_memory)
# The stage has 50 steps, of which each fault takes some, on a fast machine up to 17; a shorter limit must be there from the start.
CHAINS = [
    sorted([name for name in FAULTS if name not in SMALL][n::5], key=lambda name: FAULTS[name].stall) for n in range(5)
]


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("names", CHAINS, ids=["first", "second", "third", "fourth", "fifth"])
def test_whatever_is_lost_on_two_hosts_the_job_ends_everywhere_and_goes_on(make, node_table, names):
    strike(make("sft"), names, node_table)


@pytest.mark.faults
@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="no memory cgroup of version 1 that may be written to")
def test_out_of_memory_on_a_host_is_told_from_a_kill_and_tried_again_with_half_the_micro_batch(make, node_table):
    run = make("sft")
    outcome = run.strike(MEMORY_LOST, Moment("train", 4, 0.2))
    manifest = run.end_well()
    outcome.resumed = manifest.provenance["job"]["resumed"][0]["from"]
    node_table.rows.append(outcome)
    assert outcome.noticed < LIMIT and manifest.provenance["halved"]["micro_batch"] == 2
    undisturbed = run.pipeline.manifest("sft").metrics
    # Which units drop out depends on the micro-batch.
    assert manifest.metrics["loss_last"] == pytest.approx(undisturbed["loss_last"], rel=1e-2)
