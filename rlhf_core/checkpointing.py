"""Save and resume a stage: every rank its part, in the background, the marker last.

A trainer calls `at(position)` wherever its state is complete: after an optimizer step, between the phases of a rollout. All
ranks agree there whether to save: by steps, by minutes, because the machine is to be given up, or because a rollout has just
been made with weights that are saved already, so that only the rollout is new. A save writes this rank's state to local disk and
returns; `saving` stores it while training goes on. A save that fails is told at the next step and tried again; one after the
other that fails ends the stage. `restore` takes the newest checkpoint that is whole, down to the checksums of what each rank
reads, and passes over what is damaged. What this node wrote itself it need not fetch (`local_parts`).
"""

import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core import checkpoints, preemption
from rlhf_core.artifacts import describe
from rlhf_core.checkpoints import Checkpoint, Part, Position
from rlhf_core.context import JobContext
from rlhf_core.distributed import Ranks, any_rank, gather, sum_over_ranks
from rlhf_core.ema import EMA
from rlhf_core.engine_state import EngineState
from rlhf_core.errors import ConfigError, IntegrityError, Preempted, StoreError
from rlhf_core.generators import differing, generators, set_generators
from rlhf_core.local_parts import LocalParts
from rlhf_core.saving import Save
from rlhf_core.sealed import seal, unseal
from rlhf_core.specs import Frozen

T = TypeVar("T")
SHARED = "shared.safetensors"
FILES = "files/"
FAILURES = 3  # saves in a row that may fail before the stage does
SHARE = 33  # saving by time takes at most one part in so many of the time


class Resumable(ABC):
    """What a trainer says of its own state, beside its engines."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """Counters and the like of this rank, as JSON."""

    def shared(self) -> dict[str, Tensor]:
        """Tensors that are alike on all ranks; saved once."""
        return {}

    def own(self) -> dict[str, Tensor]:
        """Tensors of this rank."""
        return {}

    def accepts(self, record: dict[str, Any]) -> bool:
        """Whether a state with this record can be taken up; if not, the checkpoint is passed over."""
        return True

    @abstractmethod
    def resume(
        self,
        position: Position,
        record: dict[str, Any],
        shared: dict[str, Tensor],
        own: Sequence[dict[str, Tensor]],
    ) -> None:
        """Take up that state. `own` is this rank's, or after a change of their number that of all ranks that wrote it."""


class RankRecord(Frozen):
    """What a rank saves that is no tensor."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # a metric may be NaN, and null would not be it

    record: dict[str, Any] = Field(description="of the trainer")
    engines: dict[str, dict[str, Any]] = Field(description="counters of each engine")
    generators: dict[str, Any] = Field(description="states of the random generators")
    seconds: float = Field(description="the stage has run for so long")
    resumed: list[dict[str, Any]] = Field(description="the attempts before, and where each was taken up")


class GivenUp(Exception):
    """Raised in the middle of what need not be finished before a job ends."""


class Checkpointer:
    """Saves and restores one stage on this rank; a context manager around its loop.

    Attributes:
        off: this stage cannot be saved, and its plan does not ask for it.
        saves: checkpoints begun by this process.
        seconds: that training has waited for them.
        stored: bytes uploaded by this rank.
    """

    def __init__(
        self, context: JobContext, ranks: Ranks, engines: Mapping[str, tuple[Any, EMA | None]], trainer: Resumable
    ) -> None:
        """`engines`: what is trained, by name, each with its moving average or None. ConfigError: they cannot be saved."""
        self.context, self.ranks, self.trainer = context, ranks, trainer
        self.plan = plan = context.job.resources.checkpoint
        self.engines = {name: EngineState(engine, ema) for name, (engine, ema) in engines.items()}
        self.off = not all(state.readable for state in self.engines.values())
        if self.off and (plan.every_minutes or plan.every_steps or plan.milestone_steps):
            raise ConfigError(
                "resources.checkpoint: what is offloaded to nvme cannot be saved; offload to cpu, or set every_minutes, "
                "every_steps and milestone_steps to null and do without checkpoints"
            )
        self.saves, self.seconds, self.stored = 0, 0.0, 0
        self._local = context.scratch / f"checkpoint-{ranks.rank}"
        self._save: Save | None = None
        self._failures = 0
        self._saved: Position | None = None  # the newest that is stored, or on its way
        self._saved_at = time.monotonic()
        self._last_seconds = 0.0  # that training waited for the last save
        self._moves: tuple[int, ...] | None = None  # of the engines when they were saved
        self._parts: dict[str, Part] = {}  # what this rank stored last
        self._ages: dict[str, tuple[int, int]] = {}  # size and time of change of files when they were saved
        self._before: str | None = None  # marker of the checkpoint this job resumed from
        self._restored: list[dict[str, Any]] = []
        self._copies = LocalParts(context)
        self._calls = 0
        if not self.off:
            preemption.install(plan.notice)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        preemption.uninstall()

    # --- saving ------------------------------------------------------------------------------------------------------

    def at(self, position: Position, always: bool = False, last: bool = False) -> None:
        """A point from which the stage can be resumed; collective.

        Args:
            position: how far the stage has come.
            always: save here whatever the plan says.
            last: all steps are done; what follows (evaluation, export, upload) cannot be saved, so save if it is worth it.

        Raises:
            Preempted: this job is to end, and has saved its state.
            StoreError: checkpoints could not be stored again and again, or the local disk is full.
        """
        if self.off:
            return
        began = time.monotonic()
        reason, save, main = preemption.requested(), self._save, self.ranks.rank == 0
        told = [
            float(save is not None and save.failed),
            float(reason is not None),
            float(save is not None and save.busy),
            float(main and self._by_time(last)),
        ]
        failed, stop, busy, late = sum_over_ranks(told)
        if failed:
            self._forget_failed(final=False)
        if stop:
            self._save_and_end(position, reason)
        kept = self._is_milestone(position)
        by_steps = self._by_steps(position) or (last and self.plan.every_steps is not None)
        due = always or kept or by_steps or ((late or self._is_cheap(position)) and not busy)
        if position != self._saved and (due or failed):
            self.save(position, kept)
            self._last_seconds = time.monotonic() - began
        self.seconds += time.monotonic() - began

    def _by_time(self, last: bool) -> bool:
        minutes = self.plan.every_minutes
        if minutes is None:
            return False
        pause = 60 * (min(minutes, 1) if last else minutes)
        return time.monotonic() - self._saved_at >= max(pause, SHARE * self._last_seconds)

    def _is_milestone(self, position: Position) -> bool:
        every = self.plan.milestone_steps
        return (
            bool(every) and position.phase in ("train", "rollout") and position.step > 0 and not position.step % every
        )

    def _by_steps(self, position: Position) -> bool:
        every = self.plan.every_steps
        if not every or position.step % every or position.update:
            return False
        return position.step > 0 or position.phase in ("score", "update")

    def _is_cheap(self, position: Position) -> bool:
        """Whether there is a rollout to save whose weights are saved already."""
        return position.phase in ("score", "update") and self._moves is not None and self._moves == self._now()

    def _now(self) -> tuple[int, ...]:
        return tuple(state.moves for state in self.engines.values())

    def _forget_failed(self, final: bool) -> None:
        """A save has failed on some rank: tell it, and be ready to save all of it again; collective.

        Raises:
            StoreError: it was one too many, or the error is not the store's.
        """
        assert self._save is not None
        self._save.give_up()
        position, error = self._save.position, self._save.error
        self._save, self._saved, self._moves, self._parts, self._ages = None, None, None, {}, {}
        self._failures += 1
        told = f"the checkpoint of {position} could not be stored"
        told += f": {error}" if error else " by another rank; its own message tells why"
        ours = error is None or isinstance(error, StoreError)
        if any_rank(final or not ours or self._failures >= FAILURES):
            raise StoreError(told) from error
        if error:
            said = f"[{self.context.job.stage}] rank {self.ranks.rank}: {told}; saving again ({self._failures} of {FAILURES})"
            print(said, flush=True)

    def _save_and_end(self, position: Position, reason: str | None) -> None:
        if position != self._saved:
            self.save(position, self._is_milestone(position))
        if self._wait():
            self._forget_failed(final=True)
        reasons = [text for text in gather(reason) if text]
        raise Preempted(f"{reasons[0]}; saved at {position}")

    def save(self, position: Position, kept: bool = False) -> None:
        """Write this rank's state to local disk and have it stored; collective. Waits for a save that is under way."""
        if self._wait():
            self._forget_failed(final=False)
        shutil.rmtree(self._local, ignore_errors=True)
        try:
            files, same = self._snapshot_making_room()
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"the checkpoint of {position} cannot be written to {self._local}: {error}; make room there, or set "
                "TMPDIR to another folder"
            ) from error
        layout = {name: engine.layout for name, engine in self.engines.items()}
        before = self._parts, layout, self._before
        self._save = Save(self.context, position, kept, self._local, files, same, *before, self._copies)
        self._saved, self._saved_at, self._moves = position, time.monotonic(), self._now()
        self.saves += 1

    def _wait(self) -> bool:
        """Until no rank's save is under way, or one has failed; whether one has. Collective."""
        if (save := self._save) is None:
            return False
        pause = 0.01
        while True:
            failed, busy = sum_over_ranks([float(save.failed), float(save.busy)])
            if failed:
                return True
            if not busy:
                break
            save.join(pause)
            if not save.busy:
                time.sleep(pause)
            pause = min(1.0, 2 * pause)
            self.context.alive()  # not from a thread: while a rank hangs, none may say that all goes well
        self._save, self._parts, self._failures = None, save.parts, 0
        self.stored += save.stored
        return False

    def _snapshot_making_room(self) -> tuple[dict[str, Path], dict[str, Part]]:
        """As `_snapshot`; copies that only save time make room if they must."""
        try:
            return self._snapshot()
        except (OSError, SafetensorError):
            if not self._copies.forget():
                raise
            shutil.rmtree(self._local, ignore_errors=True)
            return self._snapshot()

    def _snapshot(self) -> tuple[dict[str, Path], dict[str, Part]]:
        """This rank's state as local files; parts that are stored already are named only."""
        rank, moved = f"rank-{self.ranks.rank:03d}", self._moves != self._now()
        files: dict[str, Path] = {}
        same: dict[str, Part] = {}
        for name, engine in self.engines.items():
            part = f"{name}/{rank}.safetensors"
            if not moved and part in self._parts:
                same[part] = self._parts[part]
            else:
                engine.write(self._new(files, part))
        if own := self.trainer.own():
            save_file(apart(own), str(self._new(files, f"state/{rank}.safetensors")))
        record = RankRecord(
            record=self.trainer.record(),
            engines={name: engine.counters() for name, engine in self.engines.items()},
            generators=generators(),
            seconds=time.monotonic() - self.context.started,
            resumed=self._restored,
        )
        self._new(files, f"state/{rank}.json").write_bytes(seal(record))
        if self.ranks.rank == 0:
            if shared := self.trainer.shared():
                save_file(apart(shared), str(self._new(files, SHARED)))
            self._snapshot_files(files, same)
        return files, same

    def _snapshot_files(self, files: dict[str, Path], same: dict[str, Part]) -> None:
        """What the stage has written to its output folder so far: copies, as a file may grow while it is stored."""
        ages: dict[str, tuple[int, int]] = {}
        for path in sorted(p for p in self.context.out.rglob("*") if p.is_file()):
            name = FILES + path.relative_to(self.context.out).as_posix()
            age = path.stat().st_size, path.stat().st_mtime_ns
            if name in self._parts and self._ages.get(name) == age:
                same[name] = self._parts[name]
            else:
                shutil.copyfile(path, self._new(files, name))
            ages[name] = age
        self._ages = ages

    def _new(self, files: dict[str, Path], name: str) -> Path:
        path = files[name] = self._local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def metrics(self) -> dict[str, float]:
        """What checkpoints have cost so far: how many, seconds training waited for them, bytes this rank has stored."""
        return {"checkpoints": self.saves, "checkpoint_seconds": self.seconds, "checkpoint_bytes": self.stored}

    def close(self, position: Position) -> None:
        """All steps are done, and `position` is the last; collective. From here on SIGTERM ends this process at once.

        Raises:
            Preempted: this job is to end, and has saved its state.
        """
        if not self.off and any_rank((reason := preemption.requested()) is not None):
            self._save_and_end(position, reason)
        preemption.uninstall()

    def finish(self) -> None:
        """Wait for the last save; collective. A failure is told only, as the result is about to make it needless."""
        if self._wait():
            self._failures = 0
            self._forget_failed(final=False)
        self._copies.forget()

    # --- what need not be finished ---------------------------------------------------------------------------------

    def unless_told(self, make: Callable[[], T]) -> T | None:
        """What `make` makes; None on all ranks if one has given it up in `stop_if_told`. Collective."""
        self._calls = 0
        found = None
        try:
            found = make()
        except GivenUp:
            pass
        return None if any_rank(found is None) else found

    def stop_if_told(self, alike: bool, every: int = 1) -> None:
        """Inside `unless_told`: GivenUp if this job is to end.

        Args:
            alike: all ranks call this equally often, as every forward pass is collective (ZeRO-3): then they stop together.
            every: with `alike`, calls between two looks, each of which costs a small collective.
        """
        self._calls += 1
        if alike and self._calls % every:
            return
        told = preemption.requested() is not None
        if any_rank(told) if alike else told:
            raise GivenUp

    # --- resuming ------------------------------------------------------------------------------------------------------

    def restore(self) -> Position | None:
        """Take up the newest whole checkpoint; None if there is none. Collective.

        What is damaged, or cannot be taken up, is told and passed over for the one before it.

        Raises:
            IntegrityError: there is none, and the stage is a branch, which has no beginning of its own.
        """
        position = None
        if not self.off:
            with self.context.transferring("resume"):
                position, gone = self._restore_newest()
                if position is None and gone:  # by another attempt, believed dead, which has stored newer ones
                    self.context.say("checkpoints were removed while they were being read; looking again")
                    position, _ = self._restore_newest()
        if position is None and self.context.job.spec.get("branch"):
            raise IntegrityError(
                f"{self.context.job.output.id}: a branch begins from a checkpoint, and none can be taken up here: what is "
                "offloaded to nvme has none; a damaged one is copied again with --force"
            )
        return position

    def _restore_newest(self) -> tuple[Position | None, bool]:
        """The position taken up, and whether something that was listed was not there any more."""
        store, job = self.context.store, self.context.job
        whole = checkpoints.whole(store, job.output, self.context.say, job.since)
        found = [c.key for c in whole] if self.ranks.rank == 0 else []
        gone = False
        for key in gather(found)[0]:
            fetched: dict[str, Path] = {}
            marker, problem = None, None
            try:
                marker = checkpoints.read_marker(store, job.output, key)
                fetched = {part.name: self._copies.bring(marker, part) for part in self._mine(marker)}
            except (IntegrityError, KeyError) as error:
                problem = f"{key}: missing" if isinstance(error, KeyError) else str(error)
            if problems := [text for text in gather(problem) if text]:
                gone = gone or any("missing" in text for text in problems)
                self.context.say(f"checkpoint passed over for the one before it: {problems[0]}")
                continue
            assert marker is not None
            if self._take_up(marker, fetched):
                self._copies.settle(marker, fetched)
                return marker.position, False
        if found:
            self.context.say("no checkpoint can be taken up: the stage starts from its beginning")
        return None, gone

    def _mine(self, marker: Checkpoint) -> list[Part]:
        """The parts that this rank reads: its own, or where the state is divided otherwise now those of all ranks."""
        resized = marker.world != self.ranks.world
        scattered = {n for n, e in self.engines.items() if e.layout != marker.layout.get(n) or e.shared_out}
        wanted = []
        for part in marker.parts:
            folder, _, name = part.name.partition("/")
            if part.name.startswith(FILES):
                mine = self.ranks.rank == 0
            elif folder == "state":
                mine = resized or (name.endswith(".json") and bool(scattered))
            else:
                mine = part.name == SHARED or folder in scattered
            wanted += [part] if mine or name.startswith(f"rank-{self.ranks.rank:03d}.") else []
        return wanted

    def _take_up(self, marker: Checkpoint, fetched: Mapping[str, Path]) -> bool:
        """Put everything into the state that is in the files; False if the trainer cannot use it. Collective."""
        names = [f"rank-{rank:03d}" for rank in range(marker.world)]
        records = {
            name: unseal(RankRecord, fetched[f"state/{name}.json"].read_bytes(), f"{marker.key}: state/{name}.json")
            for name in names
            if f"state/{name}.json" in fetched
        }
        own_record = records[names[self.ranks.rank % marker.world]]
        if any_rank(not self.trainer.accepts(own_record.record)):
            return False
        for engine, state in self.engines.items():
            files = [fetched[part] for name in names if (part := f"{engine}/{name}.safetensors") in fetched]
            state.read(files, [record.engines[engine] for record in records.values()])
        own = [load_file(fetched[part]) for name in names if (part := f"state/{name}.safetensors") in fetched]
        shared = load_file(fetched[SHARED]) if SHARED in fetched else {}
        self._restore_files(fetched)
        bytes_local, bytes_fetched = sum_over_ranks([self._copies.local, self._copies.fetched])
        here = {"bytes_local": int(bytes_local), "bytes_fetched": int(bytes_fetched)}
        self._restored = [*own_record.resumed, {"attempt": marker.attempt, "from": str(marker.position), **here}]
        self.trainer.resume(marker.position, own_record.record, shared, own)
        self.context.started = time.monotonic() - own_record.seconds
        self.context.resumed = self._restored
        self._saved, self._before, self._saved_at = marker.position, marker.key, time.monotonic()
        self._moves = self._now()
        set_generators(own_record.generators)
        self.context.say(
            f"resumed from {marker}, written by {marker.world} processes, {marker.created}; "
            f"{bytes_local / 1e6:.1f} MB of it from local disks, {bytes_fetched / 1e6:.1f} MB from the store"
        )
        if self.ranks.rank == 0 and (other := differing(marker.versions)):
            self.context.say(f"written with {other}: the result may differ in the last bits from an undisturbed run's")
        return True

    def _restore_files(self, fetched: Mapping[str, Path]) -> None:
        """Put back what the stage had written to its output folder."""
        if self.ranks.rank:
            return
        for entry in describe(self.context.out):
            (self.context.out / entry.path).unlink()
        for name, path in fetched.items():
            if name.startswith(FILES):
                target = self.context.out / name.removeprefix(FILES)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, which safetensors refuses."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
