"""The faults: processes that are killed, storage that fails through the proxy, a server that dies, a disk that fills up.

A `Kind` strikes a run and says whether it hit anything. Storage faults last a drawn time and until they have hit enough requests,
and are over when `strike` returns. A `Blow` is a kind at a moment. What is drawn comes from the dice of the chain, so that a seed
gives the same faults; how far the job is then differs a little from run to run, which is the point.
"""

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import proxy as faults
from proxy import Fault, FaultProxy, Request
from runs import Moment, Run, kill
from s3 import S3Server

from rlhf_core import guard

UPLOADS = r"/(parts|files)/"


@dataclass
class World:
    """What a chain's faults act upon beside its processes."""

    server: S3Server
    proxy: FaultProxy
    temporary: Path
    dice: random.Random


@dataclass(frozen=True)
class Kind:
    """One kind of fault.

    Attributes:
        strike: does it; False: there was nothing to hit any more.
        storage: storage fails; else processes are killed.
        flow: the control plane ends, at least.
        saves: the job is told, and nothing it has done may be lost.
        leaves: nobody is left who could remove the job's local files.
    """

    name: str
    strike: Callable[[Run, World], bool]
    storage: bool = False
    flow: bool = False
    saves: bool = False
    leaves: bool = False


@dataclass(frozen=True)
class Blow:
    """A fault at a moment."""

    kind: Kind
    moment: Moment


# --- processes -----------------------------------------------------------------------------------------------------------


def _process(what: str, signo: int = signal.SIGKILL) -> Callable[[Run, World], bool]:
    def strike(run: Run, _: World) -> bool:
        pid = run.find(what)
        return pid is not None and kill(pid, signo)

    return strike


def _flow(signo: int) -> Callable[[Run, World], bool]:
    return lambda run, _: run.process.poll() is None and kill(run.process.pid, signo)


def _machine(run: Run, _: World) -> bool:
    """Everything at once, so that nobody cleans up: first who would."""
    owner, job = run.find("guard"), run.job()
    if owner is None:
        return False
    for pid in [run.process.pid, owner, *guard.processes_of(job)]:
        kill(pid)
    return True


def _flow_without_storage(run: Run, world: World) -> bool:
    """The flow dies while the storage is away, which comes back some seconds later."""
    world.proxy.down()
    time.sleep(world.dice.uniform(0.2, 1.5))
    hit = run.process.poll() is None and kill(run.process.pid)
    time.sleep(world.dice.uniform(1, 6))
    world.proxy.up()
    return hit


KILLS = {
    kind.name: kind
    for kind in (
        Kind("kill -9 of rank 0", _process("rank 0")),
        Kind("kill -9 of rank 1", _process("rank 1")),
        Kind("kill -9 of the launcher", _process("launcher")),
        Kind("kill -9 of the guard", _process("guard")),
        Kind("kill -9 of the flow", _flow(signal.SIGKILL), flow=True),
        Kind("kill -9 of the flow, storage away", _flow_without_storage, flow=True),
        Kind("kill -9 of everything", _machine, flow=True, leaves=True),
        Kind("SIGTERM to the flow", _flow(signal.SIGTERM), flow=True, saves=True),
        Kind("SIGTERM to the job", _process("guard", signal.SIGTERM), saves=True),
    )
}


# --- storage -------------------------------------------------------------------------------------------------------------


class Burst:
    """A plan that hits what its rule hits for some time, and does so at least `least` times."""

    def __init__(self, fault: Fault, operations: tuple[str, ...] = (), path: str = "", most: int | None = None) -> None:
        self._rule = faults.Rule(fault, None, path, most)
        self._operations = operations
        self.hits = 0

    def __call__(self, request: Request) -> Fault | None:
        if (self._operations and request.operation not in self._operations) or not self._rule.hits(request):
            return None
        self.hits += 1
        return self._rule.fault


def _burst(
    make: Callable[[random.Random], Fault], seconds: tuple[float, float], least: int = 1, **rule: object
) -> Callable[[Run, World], bool]:
    """A fault that lasts for a drawn time, and until it has hit `least` requests."""

    def strike(run: Run, world: World) -> bool:
        plan = Burst(make(world.dice), **rule)  # pyright: ignore[reportArgumentType]
        enough = time.monotonic() + world.dice.uniform(*seconds)
        give_up = enough + 30
        world.proxy.plan = plan
        while time.monotonic() < give_up and run.process.poll() is None:
            if time.monotonic() > enough and plan.hits >= least:
                break
            time.sleep(0.05)
        world.proxy.plan = lambda _: None
        return plan.hits > 0

    return strike


def _storm(run: Run, world: World) -> bool:
    """All faults at once, each now and then."""
    all_of_them = (
        faults.INTERNAL, faults.SLOW_DOWN, faults.NO_SPACE, faults.refuse(), faults.cut_request(1000), faults.cut_response(100),
        faults.drop_answer(), faults.flip(50), faults.delay(0.5),
    )  # fmt: skip
    before = world.proxy.injected.total()
    world.proxy.plan = faults.Storm(world.dice.randrange(10**6), [(fault, 0.06) for fault in all_of_them])
    time.sleep(world.dice.uniform(6, 10))
    world.proxy.plan = lambda _: None
    return world.proxy.injected.total() > before


def _refused(seconds: tuple[float, float]) -> Callable[[Run, World], bool]:
    def strike(run: Run, world: World) -> bool:
        world.proxy.down()
        time.sleep(world.dice.uniform(*seconds))
        world.proxy.up()
        return True

    return strike


def _server_dies(run: Run, world: World) -> bool:
    world.server.kill9()
    time.sleep(world.dice.uniform(0.5, 5))
    world.server.start()
    return True


def _disk_full(run: Run, world: World) -> bool:
    """No room in the folder of local files, until the run ends or some seconds have passed."""
    ballast = world.temporary / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(512))
    end = time.monotonic() + 8
    while time.monotonic() < end and run.process.poll() is None:
        time.sleep(0.1)
    ballast.unlink()
    return True


WRITES = ("write", "part", "begin-upload", "complete-upload")
READS = ("read",)
STORAGE = {
    kind.name: kind
    for kind in (
        Kind("500 to every request", _burst(lambda _: faults.INTERNAL, (1, 4)), storage=True),
        Kind("SlowDown", _burst(lambda _: faults.SLOW_DOWN, (2, 6)), storage=True),
        Kind("slow answers", _burst(lambda dice: faults.delay(dice.uniform(0.3, 1.5)), (3, 5)), storage=True),
        Kind(
            "uploads cut under way",
            _burst(lambda dice: faults.cut_request(dice.randrange(1, 10**5)), (0, 1), 3, operations=WRITES, path=UPLOADS, most=6),
            storage=True,
        ),
        Kind(
            "downloads cut under way",
            _burst(lambda dice: faults.cut_response(dice.randrange(1, 2000)), (0, 1), 2, operations=READS, path=UPLOADS, most=5),
            storage=True,
        ),
        Kind("lost answers", _burst(lambda _: faults.drop_answer(), (0.5, 2), 4, operations=WRITES, most=12), storage=True),
        Kind("damaged uploads", _burst(lambda dice: faults.flip(dice.randrange(99)), (0.5, 2), 3, operations=WRITES), storage=True),
        Kind("requests that stall", _burst(lambda dice: faults.stall(dice.uniform(3, 8)), (1, 2), 2, most=4), storage=True),
        Kind("uploads that stall for ever", _burst(lambda _: faults.stall(), (0, 1), 1, path=UPLOADS, most=1), storage=True),
        Kind("no space left at the server", _burst(lambda _: faults.NO_SPACE, (2, 6), operations=WRITES), storage=True),
        Kind("refused connections", _refused((1, 6)), storage=True),
        Kind("all of these at random", _storm, storage=True),
        Kind("kill -9 of the server", _server_dies, storage=True),
        Kind("storage away for longer than patience", _refused((9, 12)), storage=True),
        Kind("local disk full", _disk_full, storage=True),
    )
}  # fmt: skip
