"""A stage on two test hosts, struck at some moment: when that is noticed, when nothing of the job is left, what it is taken for.

The stage is that of the other fault tests, with a node for each of its two processes; so its result must be that of the
undisturbed run on one machine. What is measured is seen from outside: the head's orders in the store, and the processes of the
job's family in every host and here.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from hosts import Hosts
from pipeline import HERE, Pipeline, command, content_of, environment
from runs import Moment, Run, kill, until
from s3 import S3Server

from rlhf_core import guard
from rlhf_core.artifacts import Manifest, read_manifest
from rlhf_core.ends import Failure
from rlhf_core.members import newest_attempt, read_orders
from rlhf_core.plan import plan_stage, stage_refs
from rlhf_core.sealed import unseal
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from rlhf_core.verification import verify_store
from tasks.stage import job_of

GONE_SECONDS = 90
GOES_ON = ("preempted", "out of memory")  # by itself: the ranks have saved, or less memory may do
STALL_SECONDS = 20.0  # where a rank hangs; else a busy machine is given longer to start
HEADER = ("fault", "noticed after, s", "nothing left after, s", "taken for", "told", "next attempt from")


@dataclass
class Outcome:
    """What one fault led to."""

    fault: str
    noticed: float
    gone: float
    kind: str
    told: str
    resumed: str = ""

    def cells(self) -> tuple[str, ...]:
        return (self.fault, f"{self.noticed:.1f}", f"{self.gone:.1f}", self.kind, self.told, self.resumed)


class Table:
    """The outcomes of a session."""

    def __init__(self) -> None:
        self.rows: list[Outcome] = []

    def markdown(self) -> str:
        lines = [HEADER, tuple("---" for _ in HEADER), *(row.cells() for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nodes.json").write_text(json.dumps([asdict(row) for row in self.rows], indent=1) + "\n")
        (folder / "nodes.md").write_text(self.markdown())


@dataclass(frozen=True)
class Fault:
    """One fault of a job on several nodes.

    Attributes:
        strike: does it.
        kinds: what the attempt may be taken for.
        heal: makes the host usable again.
        flow: the control plane ends with it.
        stall: seconds without progress that the job is given.
        outlived: the job may also go on to its end.
    """

    name: str
    strike: Callable[["NodeRun"], None]
    kinds: tuple[str, ...]
    heal: Callable[["NodeRun"], None] = lambda _: None
    flow: bool = False
    stall: float = 120.0
    outlived: bool = False


class NodeRun:
    """One stage on hosts node1 and node2, in a store on the S3 server."""

    def __init__(self, pipeline: Pipeline, stage: StageName, hosts: Hosts, s3: S3Server, folder: Path) -> None:
        self.pipeline, self.stage, self.hosts, self.folder = pipeline, stage, hosts, folder
        self.store = Store(f"s3://rlhf/{folder.name}")
        pipeline.lend_inputs(stage, self.store)
        config = pipeline.config(stage).model_copy(update={"store": self.store.url})
        planned = plan_stage(config, stage, stage_refs(config), self.store)
        assert planned.ref == pipeline.ref(stage)
        self.ref, self.family = planned.ref, job_of(self.store, config, planned).family
        self.environment = environment(folder / "tmp", **s3.environment)
        self.run: Run | None = None

    def overrides(self, stall: float) -> tuple[str, ...]:
        cluster = {
            "hosts": [{"host": "node1"}, {"host": "node2"}],
            "ssh": list(self.hosts.ssh),
            "env": {"PYTHONPATH": str(HERE / "inside")},
            "start_seconds": 60,
        }
        return (
            "resources.launcher=hostfile",
            "resources.processes=1",
            f"resources.stages.{self.stage}.processes=1",
            f"resources.cluster={json.dumps(cluster)}",
            f"resources.stall_minutes={stall / 60}",
            "resources.checkpoint.grace_seconds=8",
        )

    def start(self, stall: float = 120.0) -> Run:
        argv = command(self.stage, self.store, *self.overrides(stall))
        self.run = Run(argv, self.environment, self.folder / "log.txt", self.store, self.ref, self.family)
        return self.run

    def strike(self, fault: Fault, moment: Moment) -> Outcome:
        """Run to a moment, strike, and wait until nothing of the job is left anywhere."""
        run = self.run if self.run and self.run.process.poll() is None else self.start(fault.stall)
        run.struck()  # one that has saved goes on by itself
        assert run.reaches(moment), f"it ended before {fault.name}: {run.tail()}"
        attempt = newest_attempt(self.store, self.ref.id)
        assert attempt
        watch = Watch(self, attempt)
        fault.strike(self)
        watch.join()
        failure = until(lambda: self.failure(attempt), 20) if not fault.flow else None
        survived = fault.outlived and not failure and run.wait(GONE_SECONDS) == 0
        if not survived and not (failure and failure.kind in GOES_ON):
            assert run.wait(GONE_SECONDS) != 0, f"{fault.name} hit nothing: {run.tail()}"
        fault.heal(self)
        if survived:
            return Outcome(fault.name, 0.0, 0.0, "nothing: the job went on", "")
        kind = failure.kind if failure else "the control plane was gone" if fault.flow else "?"
        told = failure.detail if failure else ""
        outcome = Outcome(fault.name, watch.noticed, watch.gone, kind, told)
        assert not watch.left, f"{fault.name}: {watch.left} live on"
        assert fault.flow or kind in fault.kinds, f"{fault.name} was taken for {kind}: {run.tail()}"
        return outcome

    def finish(self) -> list[str]:
        """Run to the end; the result must be the undisturbed one. Returns where attempts went on from."""
        manifest = self.end_well()
        whole, found = self.pipeline.whole(self.stage), content_of(self.store, manifest)
        different = [name for name in {*whole, *found} if whole.get(name) != found.get(name)]
        assert not different, f"differs from the undisturbed run: {different}; {self.run and self.run.tail()}"
        return [str(entry["from"]) for entry in manifest.provenance["job"]["resumed"]]

    def end_well(self) -> Manifest:
        """Run to the end; everything stored must be whole and no process left."""
        run = self.run if self.run and self.run.process.poll() is None else self.start()
        assert run.wait() == 0, run.tail()
        manifest = read_manifest(self.store, self.ref)
        assert manifest
        assert verify_store(self.store).damages == ()
        assert until(lambda: not self.living(), 10), self.living()
        return manifest

    def failure(self, attempt: str) -> Failure | None:
        try:
            return unseal(Failure, self.store.read(f"{attempt}/failure.json"), attempt)
        except KeyError:
            return None

    def living(self, job_id: str = "") -> set[int]:
        """Processes of one attempt, or of any, in every host and here."""
        return (
            guard.processes_of(job_id) | guard.processes_of(f"{job_id}/") if job_id else guard.processes_of(self.family)
        )

    def rank(self, number: int) -> int:
        """The process of a rank."""
        found = [p for p in self.living() if guard.python_module(p) == "rlhf_core.train"]
        return next(p for p in found if guard.variable(p, "RANK") == str(number))

    def module(self, name: str, host: str | None = None) -> int:
        """The process that runs a module, here or on a host."""
        there = self.hosts.processes(host, self.family) if host else self.living()
        return next(p for p in there if guard.python_module(p) == name)

    def ssh(self, host: str) -> int:
        """The ssh that holds a node."""
        return next(p for p in self.living() if guard.argv(p)[:1] == [self.hosts.ssh[0]] and host in guard.argv(p))

    def end(self) -> None:
        if self.run:
            self.run.end()
        with suppress(Exception):
            guard.end(self.living, 2)


class Watch(threading.Thread):
    """Looks at a job that is struck now: when the head orders its end or a process goes, and when none is left."""

    def __init__(self, run: NodeRun, attempt: str) -> None:
        super().__init__(daemon=True)
        orders = read_orders(run.store, attempt)
        assert orders
        self._run, self._attempt, self._job = run, attempt, orders.job_id
        self.noticed, self.gone, self.left = 0.0, 0.0, set[int]()
        self._began = time.monotonic()
        self.start()

    def run(self) -> None:
        threading.Thread(target=self._orders, daemon=True).start()
        until(lambda: not self._run.living(self._job), GONE_SECONDS)
        self.gone, self.left = time.monotonic() - self._began, self._run.living(self._job)
        self.noticed = self.noticed or self.gone

    def _orders(self) -> None:
        store = Store(self._run.store.url, patience=1)
        while not self.gone:
            with suppress(Exception):
                orders = read_orders(store, self._attempt)
                if orders and orders.order == "end":
                    self.noticed = time.monotonic() - self._began
                    return
            time.sleep(0.2)


def on(host: str, *argv: str) -> Callable[[NodeRun], None]:
    """A command on a host as a fault."""

    def strike(run: NodeRun) -> None:
        done = run.hosts.run(host, argv)
        assert done.returncode == 0, done.stderr

    return strike


def process(find: Callable[[NodeRun], int], signo: int = 9) -> Callable[[NodeRun], None]:
    """A signal to a process as a fault."""

    def strike(run: NodeRun) -> None:
        assert kill(find(run), signo)

    return strike


@pytest.fixture(scope="session")
def node_table(request: pytest.FixtureRequest) -> Table:
    """The session's table of faults of nodes."""
    found = Table()
    request.config.stash[TABLE] = found
    return found


TABLE = pytest.StashKey[Table]()
