"""Parts of checkpoints on the node's own disk: copies that outlive the job, so that one which goes on here need not fetch them.

`{cache}/checkpoints/{artifact}/{attempt}-{position}/{sha256}`: what the ranks of this node wrote, moved there once it is stored,
so that it is on the disk once and costs no second write. A job that resumes looks there before it asks the store; a copy counts
only if it has the content that its name says. Copies are never needed: they may go at any moment, are kept only where the cache's
limit and the disk leave room for the next checkpoint besides, and whatever goes wrong with them costs the copy alone. The newest
few of an artifact stay, until the artifact is made. Stores that are local folders are read in place, and nothing is kept.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from rlhf_core.artifacts import ArtifactRef, job_cache, sha256_file
from rlhf_core.cache import COPIES, make_room, private_folder
from rlhf_core.canonical import fingerprint
from rlhf_core.checkpoints import Checkpoint, Part, Position
from rlhf_core.context import JobContext
from rlhf_core.errors import ConfigError, IntegrityError
from rlhf_core.store import Store

WHY = {
    "limit": "the cache has reached its limit, RLHF_CACHE_GB",
    "disk": "the disk would be too full for the next one",
}


def folder_of(store: Store, ref: ArtifactRef) -> Path:
    """Where this machine keeps copies of an artifact's checkpoints."""
    return job_cache() / COPIES / f"{ref.id.replace('/', '-')}-{fingerprint({'store': store.url})[:8]}"


def forget(store: Store, ref: ArtifactRef) -> bool:
    """Remove this machine's copies of an artifact's checkpoints; whether there were any."""
    folder = folder_of(store, ref)
    there = folder.is_dir()
    shutil.rmtree(folder, ignore_errors=True)
    return there


class LocalParts:
    """One artifact's parts on this node, for one rank of a job.

    Attributes:
        local: bytes that `bring` has found on this machine.
        fetched: bytes that it had to download. What another rank of this node has brought counts there.
    """

    def __init__(self, context: JobContext) -> None:
        self.store, self.job = context.store, context.job
        self.local, self.fetched = 0, 0
        self._on = self.store.local_path(self.job.output.id) is None
        self._folder = folder_of(self.store, self.job.output)
        self._arrived = Path(os.environ.get("RLHF_SCRATCH") or context.scratch) / "resume"
        self._ranks = int(os.environ.get("LOCAL_SIZE", context.world))  # on this node
        self._first = os.environ.get("LOCAL_RANK", "0") == "0"  # acts for all of them
        self._told = False

    # --- keeping -----------------------------------------------------------------------------------------------------

    def keep(self, attempt: int, position: Position, files: Mapping[Path, Part], same: Iterable[Part] = ()) -> None:
        """Move local files, which are stored, to the copies of a checkpoint, and link those it shares with one before."""
        if not self._on:
            return
        same = tuple(same)
        try:
            reason = self._lacks(sum(part.size for part in (*files.values(), *same)))
            if not reason:
                folder = self._folder / _name(attempt, position)
                folder.mkdir(parents=True, exist_ok=True)
                for part in same:
                    self._link(part, folder / part.sha256)
                for path, part in files.items():
                    with suppress(FileNotFoundError):  # another rank of this node has moved it
                        path.replace(folder / part.sha256)
        except (OSError, ConfigError) as error:
            reason = str(error)
        if reason:
            self._tell(f"no copy of the checkpoint of {position} stays on this machine: {WHY.get(reason, reason)}")

    def _link(self, part: Part, target: Path) -> None:
        """One more name for a copy that there is already."""
        for copy in self._copies(part):
            with suppress(FileExistsError):
                os.link(copy, target)
            return

    def _lacks(self, size: int) -> str | None:
        """What `size` bytes of copies would make too small: the cache's limit, or the disk for the next checkpoint."""
        private_folder(cache := job_cache())
        return make_room(cache, size, disk=size * self._ranks)

    def prune(self, attempt: int, position: Position, earlier: int, later: bool = True) -> None:
        """Remove copies, but those of a checkpoint, of so many `earlier` ones and, with `later`, of those after it."""
        if not self._first:
            return
        names, this = self._names(), _name(attempt, position)
        before = [name for name in names if name < this]
        after = [] if later else [name for name in names if name > this]
        for name in before[: max(0, len(before) - earlier)] + after:
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def forget(self) -> bool:
        """Remove all copies of this artifact; whether there were any."""
        return forget(self.store, self.job.output)

    # --- resuming ----------------------------------------------------------------------------------------------------

    def bring(self, marker: Checkpoint, part: Part) -> Path:
        """A local file with a part, its content checked: in place, from a copy, or fetched; once for all ranks of this node.

        Raises:
            IntegrityError: what is stored is not that part.
            KeyError: it is not there.
        """
        key = marker.part_key(part)
        if (path := self.store.local_path(key)) is not None:
            try:
                self._check(path, key, part)
            except FileNotFoundError:
                raise KeyError(key) from None
            self.local += part.size
            return path
        self._arrived.mkdir(parents=True, exist_ok=True)
        path = self._arrived / part.sha256
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists() and not self._take_copy(part, path):
                self._download(key, part, path)
        return path

    def settle(self, marker: Checkpoint, brought: Mapping[str, Path]) -> None:
        """All ranks have read what `bring` gave them, by name: it stays as copies, and those of later checkpoints go."""
        if self._on:
            parts = {part.name: part for part in marker.parts}
            self.keep(marker.attempt, marker.position, {path: parts[name] for name, path in brought.items()})
            for path in brought.values():
                path.unlink(missing_ok=True)
            earlier = self.job.resources.checkpoint.keep - 1
            self.prune(marker.attempt, marker.position, earlier, later=False)

    def _take_copy(self, part: Part, path: Path) -> bool:
        """Link a whole copy to `path`; whether there is one. What is damaged goes."""
        arriving = path.with_suffix(".part")
        for copy in self._copies(part):
            arriving.unlink(missing_ok=True)
            try:
                os.link(copy, arriving)  # from here on nobody can take it away
            except OSError:
                continue
            if sha256_file(arriving) == part.sha256:
                arriving.rename(path)
                self.local += part.size
                return True
            copy.unlink(missing_ok=True)
            print(f"{copy}: damaged: fetching {part.name} from the store", file=sys.stderr, flush=True)
        return False

    def _download(self, key: str, part: Part, path: Path) -> None:
        arriving = path.with_suffix(".part")
        self.store.download(key, arriving)
        self._check(arriving, key, part)
        arriving.rename(path)
        self.fetched += part.size

    def _check(self, path: Path, key: str, part: Part) -> None:
        if sha256_file(path) != part.sha256:
            raise IntegrityError(f"{self.store.url}/{key}: content differs from its name, the sha256 of {part.name}")

    # --- the copies --------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        """Checkpoints of which there are copies, oldest first."""
        with suppress(FileNotFoundError):
            return sorted(os.listdir(self._folder))
        return []

    def _copies(self, part: Part) -> Iterator[Path]:
        """Files that should be copies of a part, the newest first."""
        for name in reversed(self._names()):
            if (copy := self._folder / name / part.sha256).is_file():
                yield copy

    def _tell(self, message: str) -> None:
        if not self._told:
            self._told = True
            print(f"[{self.job.stage}] {message}", file=sys.stderr, flush=True)


def _name(attempt: int, position: Position) -> str:
    """The folder of a checkpoint's copies; names sort as checkpoints follow each other."""
    return f"{attempt:06d}-{position.mark}"
