"""One save of a checkpoint on its way from local disk to the store, on this rank, in a thread of its own.

Every rank stores its parts and leaves a confirmation, `confirmed/…` beside them. Rank 0 waits for those of all ranks, writes the
marker that makes the checkpoint exist, and then removes what it replaces. What goes wrong is kept in `error` for the trainer's
thread; after the marker it is only told, as the checkpoint is there.
"""

import shutil
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from rlhf_core import checkpoints
from rlhf_core.artifacts import sha256_file
from rlhf_core.checkpoints import Checkpoint, Part, Position
from rlhf_core.context import JobContext
from rlhf_core.errors import StoreError
from rlhf_core.generators import versions
from rlhf_core.local_parts import LocalParts
from rlhf_core.sealed import seal, unseal
from rlhf_core.specs import Frozen

CONFIRM_SECONDS = 3600.0  # how long rank 0 waits for the others' uploads
CONFIRM_POLL_SECONDS = 0.1


class Confirmation(Frozen):
    """What one rank has stored of a checkpoint."""

    parts: tuple[Part, ...]


class Save:
    """One checkpoint on its way.

    Attributes:
        error: why it has failed, if it has.
        parts: what this rank has stored or had stored before, by name; when it is done.
        stored: bytes that were uploaded for it.
    """

    def __init__(
        self,
        context: JobContext,
        position: Position,
        kept: bool,
        folder: Path,
        files: Mapping[str, Path],
        same: Mapping[str, Part],
        before: Mapping[str, Part],
        layout: Mapping[str, str],
        resumed_from: str | None,
        copies: LocalParts,
    ) -> None:
        """Begin it.

        Args:
            context: of this rank.
            position: of the state.
            kept: a milestone.
            folder: of the local files, which it is rid of when they are stored.
            files: local files by the names of their parts.
            same: parts that have not changed since they were stored.
            before: what this rank stored last; of these what has the same content is not stored again.
            layout: how the engines' states are divided.
            resumed_from: the marker that this attempt began with, kept until there are enough of its own.
            copies: of this node; they get the local files.
        """
        self.context, self.position, self.kept, self.folder = context, position, kept, folder
        self.layout, self.resumed_from, self.copies = dict(layout), resumed_from, copies
        self.error: BaseException | None = None
        self.parts: dict[str, Part] = {}
        self.stored = 0
        self._given_up = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(files, same, before), daemon=True, name=f"save {position}"
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether it is still on its way."""
        return self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it has failed on this rank."""
        return self.error is not None

    def join(self, seconds: float) -> None:
        """Wait for it for so long."""
        self._thread.join(seconds)

    def give_up(self) -> None:
        """Wait for no other rank any more, as one has failed."""
        self._given_up.set()
        self._thread.join()

    def _run(self, files: Mapping[str, Path], same: Mapping[str, Part], before: Mapping[str, Part]) -> None:
        try:
            began = time.monotonic()
            stored = {name: self._store(name, path, before) for name, path in files.items()}
            self.parts = {**same, **stored}
            self._keep({files[name]: part for name, part in stored.items()}, same)
            shutil.rmtree(self.folder, ignore_errors=True)
            if self.context.rank:
                confirmation = Confirmation(parts=tuple(self.parts.values()))
                self.context.store.write(self._confirmation(self.context.rank), seal(confirmation))
            else:
                self._complete(began)
        except BaseException as error:
            self.error = error

    def _store(self, name: str, path: Path, before: Mapping[str, Part]) -> Part:
        part = Part(name=name, size=path.stat().st_size, sha256=sha256_file(path))
        if before.get(name) != part:
            self.context.store.upload(path, f"{self._place}/parts/{part.sha256}")
            self.stored += part.size
        return part

    def _keep(self, stored: Mapping[Path, Part], same: Mapping[str, Part]) -> None:
        """Leave copies on this machine. Until this checkpoint is complete, the last one that is stays too."""
        job = self.context.job
        self.copies.prune(job.attempt, self.position, earlier=max(1, job.resources.checkpoint.keep - 1))
        self.copies.keep(job.attempt, self.position, stored, same.values())

    @property
    def _place(self) -> str:
        return checkpoints.folder_of(self.context.job.output.id, self.context.job.attempt)

    def _confirmation(self, rank: int) -> str:
        return f"{self._place}/confirmed/{self.position.mark}/rank-{rank:03d}.json"

    def _complete(self, began: float) -> None:
        """Rank 0: wait for all, write the marker, then remove what it replaces."""
        store, job = self.context.store, self.context.job
        keys = [self._confirmation(rank) for rank in range(1, self.context.world)]
        parts = {part.name: part for key in keys for part in self._await(key).parts} | self.parts
        marker = Checkpoint(
            artifact=job.output.id,
            attempt=job.attempt,
            position=self.position,
            kept=self.kept,
            world=self.context.world,
            layout=self.layout,
            parts=tuple(parts[name] for name in sorted(parts)),
            versions=versions(),
        )
        store.write(marker.key, seal(marker))
        size = sum(part.size for part in marker.parts)
        self.context.say(f"saved {self.position}: {size / 1e6:.1f} MB, stored in {time.monotonic() - began:.2f} s")
        self.copies.prune(job.attempt, self.position, earlier=job.resources.checkpoint.keep - 1)
        try:
            for key in keys:
                store.delete(key)
            self._prune()
        except Exception as error:
            print(f"older checkpoints could not be removed: {error}", file=sys.stderr, flush=True)

    def _await(self, key: str) -> Confirmation:
        until = time.monotonic() + CONFIRM_SECONDS
        pause = CONFIRM_POLL_SECONDS
        while time.monotonic() < until:
            try:
                return unseal(Confirmation, self.context.store.read(key), key)
            except KeyError:
                if self._given_up.wait(pause):
                    raise StoreError("another rank could not store its part; its own message tells why") from None
                pause = min(2.0, 1.5 * pause)
        raise StoreError(f"{key}: not confirmed within {CONFIRM_SECONDS:g} s")

    def _prune(self) -> None:
        """Keep the newest of this attempt, and until they are enough the one it resumed from."""
        store, job, keep = self.context.store, self.context.job, self.context.job.resources.checkpoint.keep
        keys = [key for key in checkpoints.marker_keys(store, job.output) if not checkpoints.is_kept(key)]
        mine = [key for key in keys if key.startswith(f"{self._place}/")]
        spared = {*mine[:keep], *([self.resumed_from] if len(mine) < keep else [])}
        earlier = checkpoints.earlier(job.output.id, job.attempt, keys)
        checkpoints.delete(store, job.output, [key for key in [*mine, *earlier] if key not in spared])
        if job.attempt > 1 and len(mine) >= keep:
            checkpoints.sweep(store, job.output, job.attempt)
