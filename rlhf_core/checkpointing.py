"""Save and resume a stage: every rank its part, in the background, the marker last.

A trainer calls `at(position)` wherever its state is complete: after an optimizer step, between the phases of a rollout. All
ranks agree there whether to save: by steps, by minutes, because the machine is to be given up, or because a rollout has just
been made with weights that are saved already, so that it costs next to nothing to keep. A save writes this rank's state to local
disk and returns; a thread uploads it while training goes on. When all ranks have confirmed what they stored, rank 0 writes the
marker and only then removes what is older. An upload that fails ends the stage at the next step; it never fails silently.
`restore` takes the newest checkpoint that is whole, down to the checksums of what each rank reads.
"""

import base64
import platform
import random
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from pydantic import ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core import checkpoints, preemption
from rlhf_core.artifacts import describe, sha256_file
from rlhf_core.checkpoints import Checkpoint, Part, Position
from rlhf_core.context import JobContext
from rlhf_core.distributed import Ranks, any_rank, gather, sum_over_ranks
from rlhf_core.ema import EMA
from rlhf_core.engine_state import EngineState
from rlhf_core.errors import ConfigError, IntegrityError, Preempted, StoreError
from rlhf_core.sealed import seal, unseal
from rlhf_core.specs import Frozen

CONFIRM_SECONDS = 3600.0  # how long rank 0 waits for the others' uploads
CONFIRM_POLL_SECONDS = 0.1
SHARED = "shared.safetensors"
FILES = "files/"


class Resumable(Protocol):
    """What a trainer says of its own state, beside its engines."""

    def record(self) -> dict[str, Any]:
        """Counters and the like, as JSON; alike on all ranks."""
        ...

    def shared(self) -> dict[str, Tensor]:
        """Tensors that are alike on all ranks; saved once."""
        ...

    def own(self) -> dict[str, Tensor]:
        """Tensors of this rank."""
        ...

    def resume(
        self,
        position: Position,
        record: dict[str, Any],
        shared: dict[str, Tensor],
        own: Sequence[dict[str, Tensor]],
    ) -> None:
        """Take up that state. `own` is this rank's, or after a change of their number that of all ranks that wrote it."""
        ...


class Confirmation(Frozen):
    """What one rank has stored of a checkpoint."""

    parts: tuple[Part, ...]


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


@dataclass
class _Upload:
    """One save on its way: local files by the names of their parts, and the thread that stores them."""

    position: Position
    kept: bool
    files: dict[str, Path]
    same: dict[str, Part]  # parts stored before, which have not changed
    error: BaseException | None = None
    parts: tuple[Part, ...] = ()
    thread: threading.Thread | None = field(default=None, repr=False)

    @property
    def busy(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Checkpointer:
    """Saves and restores one stage on this rank.

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
        self.plan = context.job.resources.checkpoint
        self.engines = {name: EngineState(engine, ema) for name, (engine, ema) in engines.items()}
        self.off = not all(state.readable for state in self.engines.values())
        plan = self.plan
        if self.off and (plan.every_minutes or plan.every_steps or plan.milestone_steps):
            raise ConfigError(
                "resources.checkpoint: what is offloaded to nvme cannot be saved; offload to cpu, or set every_minutes, "
                "every_steps and milestone_steps to null and do without checkpoints"
            )
        self.saves, self.seconds, self.stored = 0, 0.0, 0
        self._local = context.scratch / f"checkpoint-{ranks.rank}"
        self._upload: _Upload | None = None
        self._saved: Position | None = None
        self._saved_at = time.monotonic()
        self._moves: tuple[int, ...] | None = None  # of the engines when they were saved
        self._parts: dict[str, Part] = {}  # what this rank stored last
        self._ages: dict[str, tuple[int, int]] = {}  # size and time of change of files when they were saved
        self._before: str | None = None  # marker of the checkpoint this job resumed from
        self._restored: list[dict[str, Any]] = []
        if not self.off:
            preemption.install(plan.notice)

    # --- saving ------------------------------------------------------------------------------------------------------

    def at(self, position: Position, always: bool = False, last: bool = False) -> None:
        """A point from which the stage can be resumed; collective.

        Args:
            position: how far the stage has come.
            always: save here whatever the plan says.
            last: all steps are done; what follows (evaluation, export, upload) cannot be saved, so save if it is worth it.

        Raises:
            Preempted: this job is to end, and has saved its state.
            StoreError: the last checkpoint could not be stored, or the local disk is full.
        """
        if self.off:
            return
        began = time.monotonic()
        main, reason = self.ranks.rank == 0, preemption.requested()
        upload = self._upload
        told = [
            float(upload is not None and upload.error is not None),
            float(reason is not None),
            float(upload is not None and upload.busy),
            float(main and self._by_time(last)),
        ]
        failed, stop, busy, late = sum_over_ranks(told)
        if failed:
            self._raise_upload_error()
        if stop:
            self._save_and_end(position, reason)
        kept = self._is_milestone(position)
        if position != self._saved and (always or kept or self._by_progress(position) or (late and not busy)):
            self.save(position, kept)
        self.seconds += time.monotonic() - began

    def _by_time(self, last: bool) -> bool:
        minutes = self.plan.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * (min(minutes, 1) if last else minutes)

    def _is_milestone(self, position: Position) -> bool:
        every = self.plan.milestone_steps
        return (
            bool(every) and position.phase in ("train", "rollout") and position.step > 0 and not position.step % every
        )

    def _by_progress(self, position: Position) -> bool:
        """Whether to save for the sake of the steps, or of a rollout whose weights are saved or due to be."""
        every = self.plan.every_steps
        on_step = bool(every) and position.step % every == 0
        if position.phase in ("train", "rollout"):
            return on_step and position.step > 0 and position.update == 0
        if position.phase == "score" or not position.update:
            return on_step or (self._moves is not None and self._moves == self._now())
        return False

    def _now(self) -> tuple[int, ...]:
        return tuple(state.moves for state in self.engines.values())

    def _raise_upload_error(self) -> None:
        if self._upload is None or self._upload.error is None:
            raise StoreError("a checkpoint could not be stored by another rank; its own message tells why")
        error = self._upload.error
        raise StoreError(f"the checkpoint of {self._upload.position} could not be stored: {error}") from error

    def _save_and_end(self, position: Position, reason: str | None) -> None:
        if position != self._saved:
            self.save(position, self._is_milestone(position))
        self._wait()
        if any_rank(self._upload is not None and self._upload.error is not None):
            self._raise_upload_error()
        reasons = [text for text in gather(reason) if text]
        raise Preempted(f"{reasons[0]}; saved at {position}")

    def save(self, position: Position, kept: bool = False) -> None:
        """Write this rank's state to local disk and have it stored; waits for the save before, if that is still going on."""
        self._wait()
        if self._upload is not None and self._upload.error is not None:
            self._raise_upload_error()
        shutil.rmtree(self._local, ignore_errors=True)
        try:
            upload = _Upload(position, kept, *self._snapshot())
        except OSError as error:
            raise StoreError(
                f"the checkpoint of {position} cannot be written to {self._local}: {error.strerror or error}; make room "
                "there, or set TMPDIR to another folder"
            ) from error
        upload.thread = threading.Thread(target=self._store, args=(upload,), daemon=True, name=f"save {position}")
        self._upload, self._saved, self._moves = upload, position, self._now()
        self._saved_at = time.monotonic()
        self.saves += 1
        upload.thread.start()

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
        for path in sorted(p for p in self.context.out.rglob("*") if p.is_file()):
            name = FILES + path.relative_to(self.context.out).as_posix()
            age = path.stat().st_size, path.stat().st_mtime_ns
            if name in self._parts and self._ages.get(name) == age:
                same[name] = self._parts[name]
            else:
                shutil.copyfile(path, self._new(files, name))
            self._ages[name] = age

    def _new(self, files: dict[str, Path], name: str) -> Path:
        path = files[name] = self._local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _wait(self) -> None:
        if self._upload is not None and self._upload.thread is not None:
            self._upload.thread.join()

    def metrics(self) -> dict[str, float]:
        """What checkpoints have cost so far: how many, seconds training waited for them, bytes this rank has stored."""
        return {"checkpoints": self.saves, "checkpoint_seconds": self.seconds, "checkpoint_bytes": self.stored}

    def close(self) -> None:
        """Wait for the last save; what went wrong with it is told, as the result is about to make it needless."""
        self._wait()
        if self._upload is not None and self._upload.error is not None:
            print(f"the last checkpoint could not be stored: {self._upload.error}", file=sys.stderr, flush=True)
        preemption.uninstall()

    # --- in the background ---------------------------------------------------------------------------------------------

    def _store(self, upload: _Upload) -> None:
        try:
            began = time.monotonic()
            upload.parts = tuple(self._store_part(name, path) for name, path in upload.files.items())
            upload.parts += tuple(upload.same.values())
            self._parts = {part.name: part for part in upload.parts}
            shutil.rmtree(self._local, ignore_errors=True)
            if self.ranks.rank:
                self._confirm(upload)
            else:
                self._complete(upload, began)
        except BaseException as error:
            upload.error = error

    def _store_part(self, name: str, path: Path) -> Part:
        part = Part(name=name, size=path.stat().st_size, sha256=sha256_file(path))
        if self._parts.get(name) != part:
            self.context.store.upload(path, f"{self._folder}/parts/{part.sha256}")
            self.stored += part.size
        return part

    @property
    def _folder(self) -> str:
        return checkpoints.folder_of(self.context.job.output.id, self.context.job.attempt)

    def _confirmation(self, upload: _Upload, rank: int) -> str:
        p = upload.position
        return f"{self._folder}/confirmed/{p.step:08d}-{p.phase}-{p.update:06d}/rank-{rank:03d}.json"

    def _confirm(self, upload: _Upload) -> None:
        key = self._confirmation(upload, self.ranks.rank)
        self.context.store.write(key, seal(Confirmation(parts=upload.parts)))

    def _complete(self, upload: _Upload, began: float) -> None:
        """Rank 0: wait for all, write the marker, then remove what it replaces."""
        store = self.context.store
        keys = [self._confirmation(upload, rank) for rank in range(1, self.ranks.world)]
        parts = {part.name: part for key in keys for part in self._await(key).parts}
        parts |= {part.name: part for part in upload.parts}
        marker = Checkpoint(
            artifact=self.context.job.output.id,
            attempt=self.context.job.attempt,
            position=upload.position,
            kept=upload.kept,
            world=self.ranks.world,
            layout={name: engine.layout for name, engine in self.engines.items()},
            parts=tuple(parts[name] for name in sorted(parts)),
            versions=versions(),
        )
        store.write(marker.key, seal(marker))
        size = sum(part.size for part in marker.parts)
        self.context.say(
            f"saved {upload.position}: {size / 1e6:.1f} MB, complete after {time.monotonic() - began:.2f} s"
        )
        for key in keys:
            store.delete(key)
        self._prune()

    def _await(self, key: str) -> Confirmation:
        until = time.monotonic() + CONFIRM_SECONDS
        pause = CONFIRM_POLL_SECONDS
        while time.monotonic() < until:
            try:
                return unseal(Confirmation, self.context.store.read(key), key)
            except KeyError:
                time.sleep(pause)
                pause = min(2.0, 1.5 * pause)
        raise StoreError(f"{key}: not confirmed within {CONFIRM_SECONDS:g} s")

    def _prune(self) -> None:
        """Keep the newest of this attempt, and until they are enough the one it resumed from."""
        store, job = self.context.store, self.context.job
        keys = [key for key in checkpoints.marker_keys(store, job.output) if not checkpoints.is_kept(key)]
        mine = [key for key in keys if key.startswith(f"{self._folder}/")]
        keep = {*mine[: self.plan.keep], *([self._before] if len(mine) < self.plan.keep else [])}
        earlier = checkpoints.earlier(job.output.id, job.attempt, keys)
        checkpoints.delete(store, job.output, [key for key in [*mine, *earlier] if key not in keep])

    # --- resuming ------------------------------------------------------------------------------------------------------

    def restore(self) -> Position | None:
        """Take up the newest whole checkpoint; None if there is none. Collective.

        What is damaged is told and passed over for the one before it.
        """
        if self.off:
            return None
        store, ref = self.context.store, self.context.job.output
        whole = checkpoints.whole(store, ref, self.context.say, self.context.job.since)
        found = [c.key for c in whole] if self.ranks.rank == 0 else []
        for key in gather(found)[0]:
            marker = checkpoints.read_marker(store, ref, key)
            problem: Exception | None = None
            fetched: dict[str, Path] = {}
            try:
                fetched = {part.name: self._fetch(marker, part) for part in self._mine(marker)}
            except (IntegrityError, KeyError) as error:
                problem = error
            if problems := [text for text in gather(str(problem) if problem else None) if text]:
                self.context.say(f"checkpoint passed over for the one before it: {problems[0]}")
                continue
            self._take_up(marker, fetched)
            return marker.position
        if found:
            self.context.say("no checkpoint is whole: the stage starts from its beginning")
        return None

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

    def _fetch(self, marker: Checkpoint, part: Part) -> Path:
        """A local, verified file with a part; in place where the store is local."""
        store, key = self.context.store, marker.part_key(part)
        path = store.local_path(key)
        if path is None:
            path = self.context.scratch / f"resume-{self.ranks.rank}" / part.sha256
            if not path.exists():
                store.download(key, path)
        try:
            found = sha256_file(path)
        except FileNotFoundError:
            raise IntegrityError(f"{store.url}/{key}: missing; {marker} lists it as {part.name}") from None
        if found != part.sha256:
            raise IntegrityError(f"{store.url}/{key}: content differs from its name, the sha256 of {part.name}")
        return path

    def _take_up(self, marker: Checkpoint, fetched: Mapping[str, Path]) -> None:
        names = [f"rank-{rank:03d}" for rank in range(marker.world)]
        records = {
            name: unseal(RankRecord, fetched[f"state/{name}.json"].read_bytes(), f"{marker.key}: state/{name}.json")
            for name in names
            if f"state/{name}.json" in fetched
        }
        own_record = records[names[self.ranks.rank % marker.world]]
        for engine, state in self.engines.items():
            files = [
                fetched[f"{engine}/{name}.safetensors"] for name in names if f"{engine}/{name}.safetensors" in fetched
            ]
            state.read(files, [record.engines[engine] for record in records.values()])
        own = [load_file(fetched[f"state/{n}.safetensors"]) for n in names if f"state/{n}.safetensors" in fetched]
        shared = load_file(fetched[SHARED]) if SHARED in fetched else {}
        self._restore_files(fetched)
        self._restored = [*own_record.resumed, {"attempt": marker.attempt, "from": str(marker.position)}]
        self.trainer.resume(marker.position, own_record.record, shared, own)
        self.context.started = time.monotonic() - own_record.seconds
        self.context.resumed = self._restored
        self._saved, self._before, self._saved_at = marker.position, marker.key, time.monotonic()
        self._moves = self._now()
        set_generators(own_record.generators)
        shutil.rmtree(self.context.scratch / f"resume-{self.ranks.rank}", ignore_errors=True)
        self.context.say(f"resumed from {marker}, written by {marker.world} processes, {marker.created}")
        if self.ranks.rank == 0 and (other := differing(marker.versions)):
            self.context.say(f"written with {other}: the result may differ in the last bits from an undisturbed run's")

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


def generators() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and the device's random generators, as JSON."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    accelerator: Any = get_accelerator()
    found = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached],
        "torch": _text(torch.get_rng_state()),
    }
    if accelerator.device_name() != "cpu":
        found["device"] = _text(accelerator.get_rng_state())
    return found


def set_generators(saved: Mapping[str, Any]) -> None:
    """Put the generators into the states that `generators` returned."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(saved["torch"]))
    accelerator: Any = get_accelerator()
    if "device" in saved and accelerator.device_name() != "cpu":
        accelerator.set_rng_state(_tensor(saved["device"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def versions() -> dict[str, str]:
    """What decides the last bits of a result beside the code: the libraries that compute and the machine."""
    accelerator: Any = get_accelerator()
    return {
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "device": accelerator.device_name(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def differing(saved: Mapping[str, str]) -> str:
    """What was different when a checkpoint was written, e.g. "torch 2.12.0 (now 2.13.0)"; empty if nothing was."""
    now = versions()
    return ", ".join(f"{name} {was} (now {now.get(name)})" for name, was in saved.items() if now.get(name) != was)
