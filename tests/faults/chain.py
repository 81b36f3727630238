"""A chain: one stage that is struck again and again, started again where it ended, until it is done; then it is looked at.

After the last blow the result must be that of the undisturbed run, every stored object must be what its record says, no process
of any of its jobs may be left and no local file. After every kill the newest checkpoint must be at least the one that was complete
before it, with all its parts. A stage that is done before all blows have fallen is built once more, in a new store.
"""

import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

from blows import Blow, World
from pipeline import Pipeline, command, content_of, environment
from proxy import Rule, Script, delay
from runs import Moment, Run, until
from tally import Tally

from rlhf_core import checkpoints, guard
from rlhf_core.artifacts import read_manifest
from rlhf_core.checkpoints import Checkpoint
from rlhf_core.errors import ExitCode, IntegrityError
from rlhf_core.plan import plan_stage, stage_refs
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from rlhf_core.verification import verify_store
from tasks.stage import job_of

GONE_SECONDS = 60
MOST_LAPS = 6
SLOW_SECONDS = 0.3  # each file of a result


class Aftermath(threading.Thread):
    """What a kill leaves, watched while the chain may go on: how long processes live, and what the store has then.

    Attributes:
        seconds: until the job's last process had ended.
        left: processes that live still.
        newest: checkpoint from which the next attempt will go on.
        lost: bytes of acknowledged objects that are missing or damaged.
    """

    def __init__(self, run: Run, job: str, known: Checkpoint | None) -> None:
        super().__init__(daemon=True)
        self._run, self._job, self._known = run, job, known
        self.seconds, self.left, self.lost = 0.0, set[int](), 0
        self.newest: Checkpoint | None = None
        self.start()

    def run(self) -> None:
        began = time.monotonic()
        until(lambda: not self._living(), GONE_SECONDS)
        self.seconds, self.left = time.monotonic() - began, self._living()
        self.newest = checkpoints.newest(self._run.store, self._run.ref)
        self.lost = lost_bytes(self._run.store, self._known, self.newest)

    def _living(self) -> set[int]:
        return guard.processes_of(self._job) if self._job else set()

    @property
    def steps(self) -> int:
        return self.newest.position.step if self.newest else 0


def lost_bytes(store: Store, known: Checkpoint | None, newest: Checkpoint | None) -> int:
    """Bytes of complete checkpoints that are lost: of the `known` one, if an older one is newest now; of `newest`, if damaged."""
    if known and (newest is None or newest.position.order < known.position.order):
        return sum(part.size for part in known.parts)
    if newest:
        try:
            checkpoints.check(store, newest)
        except IntegrityError:
            return sum(part.size for part in newest.parts)
    return 0


class Chain:
    """One stage and the blows that it takes."""

    def __init__(
        self,
        pipeline: Pipeline,
        stage: StageName,
        world: World,
        tally: Tally,
        place: str,
        folder: Path,
        cli: bool = False,
    ) -> None:
        """`place`: URL of a folder for its stores; `folder`: for logs; `cli`: run by `rlhf run`, with its retries."""
        self.pipeline, self.stage, self.world, self.tally = pipeline, stage, world, tally
        self.place, self.folder, self.cli = place, folder, cli
        self.more: dict[str, str] = {}  # environment
        self.overrides: tuple[str, ...] = ("resources.retries=2",) if cli else ()
        self._runs: list[Run] = []
        self._logs_kept, self._no_one_left = 0, 0
        self._struck: list[Blow] = []  # storage faults that the present run has outlived so far

    def strike(self, blows: Iterable[Blow]) -> None:
        """Let all blows fall, and look at the results."""
        whole, waiting = self.pipeline.whole(self.stage), deque(blows)
        for lap in range(MOST_LAPS):
            self._begin(lap)
            try:
                self._lap(waiting)
                self._look(whole)
            finally:
                for run in self._runs:
                    run.end()
            if not waiting:
                return
        raise AssertionError(f"{self.stage}: after {MOST_LAPS} laps these had hit nothing: {list(waiting)}")

    def _begin(self, lap: int) -> None:
        self.store = Store(f"{self.place}-{lap}")
        self.pipeline.lend_inputs(self.stage, self.store)
        config = self.pipeline.config(self.stage).model_copy(update={"store": self.store.url})
        planned = plan_stage(config, self.stage, stage_refs(config), self.store)
        assert planned.ref == self.pipeline.ref(self.stage)
        self.ref, self.family = planned.ref, job_of(self.store, config, planned).family
        self._aftermaths: list[tuple[Aftermath, Blow, int]] = []
        self._last: Aftermath | Checkpoint | None = None  # what the last attempt went on from
        self._struck = []

    def _start(self) -> Run:
        argv = command(self.stage, self.store, *self.overrides, cli=self.cli)
        env = environment(self.world.temporary, **self.more)
        log = self.folder / f"{self.store.url.rpartition('/')[2]}.txt"
        self._runs.append(run := Run(argv, env, log, self.store, self.ref, self.family))
        return run

    def _lap(self, waiting: deque[Blow]) -> None:
        """Until the stage is done."""
        while True:
            run = self._start()
            goes_on = True
            while goes_on and waiting and self._reaches(run, waiting[0].moment):
                goes_on = self._blow(run, waiting)
            if not goes_on:
                continue
            code = run.wait()
            if code == 0:
                self._outlived()
                return
            assert self._struck, f"it ended with {code} and nothing had hit it: {run.tail()}"
            print(
                f"{self.stage}: ended with {code} after {self._struck[-1].kind.name}: {run.tail()[-1500:]}", flush=True
            )
            self._rerun_for_storage(run)

    def _reaches(self, run: Run, moment: Moment) -> bool:
        """Wait for a moment. The result is stored slowly if it is then that the blow is to fall, else it would miss."""
        if moment.after == "upload":
            self.world.proxy.plan = Script(Rule(delay(SLOW_SECONDS), "write", "/files/", times=None))
        reached = run.reaches(moment)
        if not reached:
            self.world.proxy.plan = lambda _: None
        return reached

    # --- one blow --------------------------------------------------------------------------------------------------------

    def _blow(self, run: Run, waiting: deque[Blow]) -> bool:
        """Strike; whether the run goes on by itself. A blow that hit nothing, as all was over, falls later."""
        blow = waiting[0]
        known, job = checkpoints.newest(self.store, self.ref), run.job()
        print(f"{self.stage}: {blow.kind.name} at {blow.moment}, {run.reached} steps told, saved {known}", flush=True)
        hit = blow.kind.strike(run, self.world)
        self.world.proxy.plan = lambda _: None
        if not hit:
            return True
        waiting.popleft()
        run.struck()
        row = self.tally.row(blow.kind.name, blow.kind.storage)
        row.injected += 1
        if blow.kind.storage:
            self._struck.append(blow)
            return True
        return self._killed(run, blow, Aftermath(run, job, known))

    def _killed(self, run: Run, blow: Blow, after: Aftermath) -> bool:
        row = self.tally.row(blow.kind.name, False)
        self._logs_kept += blow.kind.flow
        self._no_one_left += blow.kind.leaves
        if blow.kind.flow:
            code = run.wait(GONE_SECONDS)
            assert not blow.kind.saves or code == ExitCode.PREEMPTED, f"SIGTERM ended it with {code}: {run.tail()}"
        # The next attempt, if it begins at once, finds the last one's processes.
        at_once = blow.kind.flow and self.world.dice.random() < 0.5
        self._aftermaths.append((after, blow, run.reached))
        self._last = after
        if not at_once:
            after.join()
        goes_on = not blow.kind.flow and self._starts_again(run)
        if goes_on:
            row.survived += 1
        else:
            row.rerun += 1
            self._outlived()
        return goes_on

    def _starts_again(self, run: Run) -> bool:
        """Whether the control plane starts the job again by itself, or has finished."""
        run.next_job()
        until(lambda: run.process.poll() is not None or run.jobs(), GONE_SECONDS)
        if run.process.poll() == 0:
            self._last = None  # it was killed when all was done
        return run.process.poll() in (None, 0)

    def _outlived(self) -> None:
        """The storage faults of the run that has ended, or was killed, had not ended it."""
        for blow in self._struck:
            self.tally.row(blow.kind.name, True).survived += 1
        self._struck = []

    def _rerun_for_storage(self, run: Run) -> None:
        """The last storage fault has ended the run."""
        last = self._struck.pop()
        self._outlived()
        self.tally.row(last.kind.name, True).rerun += 1
        self._logs_kept += "full" not in last.kind.name
        newest = checkpoints.newest(self.store, self.ref)
        again = max(0, run.reached - (newest.position.step if newest else 0))
        self.tally.damage(last.kind.name, True, again, None, lost_bytes(self.store, None, newest))
        self._last = newest

    # --- the result ------------------------------------------------------------------------------------------------------

    def _look(self, whole: dict[str, object]) -> None:
        self._look_at_aftermaths()
        manifest = read_manifest(self.store, self.ref)
        assert manifest is not None, "not published"
        found = content_of(self.store, manifest)
        different = [name for name in {*whole, *found} if whole.get(name) != found.get(name)]
        assert not different, f"differs from the undisturbed run: {different}; {self._runs[-1].tail()}"
        assert (damages := verify_store(self.store).damages) == (), damages
        assert until(lambda: not guard.processes_of(self.family), 10), guard.processes_of(self.family)
        self._look_at_local_files()
        last = self._last.newest if isinstance(self._last, Aftermath) else self._last
        if last and self._runs[-1].how in ("built", "resumed"):
            resumed = manifest.provenance["job"]["resumed"]
            assert resumed and resumed[-1]["from"] == str(last.position), (resumed, str(last))

    def _look_at_local_files(self) -> None:
        """A log may stay where its flow was killed or it could not be stored; more only where everything was killed at once."""
        found = {path.name: path for path in self.world.temporary.glob("rlhf-*")}
        logs = {name for name in found if name.startswith("rlhf-job-")}
        scratch = {name for name in logs if (found[name] / "scratch").exists()}
        assert len(logs) <= self._logs_kept and len(scratch) <= self._no_one_left, (logs, scratch)
        known = ("rlhf-cache-", "rlhf-job-", "rlhf-prefect-")
        assert not [name for name in found if not name.startswith(known)], list(found)

    def _look_at_aftermaths(self) -> None:
        for after, blow, reached in self._aftermaths:
            after.join()
            again = max(0, reached - after.steps)
            self.tally.damage(blow.kind.name, False, again, after.seconds, after.lost)
            assert not after.left, f"{blow}: processes {after.left} live on"
            assert not after.lost, f"{blow}: {after.lost} bytes of complete checkpoints lost"
            assert not (blow.kind.saves and again), f"{blow}: was told to end, and {again} steps are lost"
