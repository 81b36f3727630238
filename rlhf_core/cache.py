"""A cache of artifacts on the node's own disk: folders that appear whole, are checked at each use and go when they are not used.

`{key}/` are the files; `{key}.part` is a download under way, which a killed process leaves and the next one removes;
`{key}.lock` is held while a folder is looked at, filled or removed, so the first process of a node downloads and the others wait;
`{key}.use` is held, shared, by every process that has taken the folder, for as long as it lives: the kernel lets go of it however
the process ends, also in another container. Before a download, folders go that nobody holds and that were not taken for a day,
the least recently taken first, until the cache is below its limit (RLHF_CACHE_GB, 100 by default). The limit gives way to what
is in use. Copies of checkpoints (`local_parts`) lie here too, below `checkpoints/`, and may go at any time. Not here: what the
files are and where they come from.
"""

import fcntl
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from rlhf_core.entries import FileEntry, sha256_file
from rlhf_core.errors import ConfigError, IntegrityError
from rlhf_core.parallel import in_threads

CHEAP_BYTES = 1 << 20  # files up to this size are hashed again whenever they are used
IDLE_SECONDS = (
    24 * 3600.0
)  # what was taken since then stays, though nobody holds it: a pipeline's next stage may want it
LIMIT_GB = 100.0
SPARE_BYTES = 64 << 20  # room that a download leaves on the disk
COPIES = "checkpoints"  # in it a folder for each artifact, and in that one for each checkpoint

_held: dict[str, int] = {}  # open `.use` files of this process; closed by its end and never before


def take(cache: Path, key: str, files: Sequence[FileEntry], download: Callable[[FileEntry, Path], None]) -> Path:
    """The folder of `key` with these files, filled by `download` unless it is there, and kept while this process lives.

    Args:
        cache: the folder of all.
        key: the folder's name; other files have another key.
        files: what it must hold.
        download: brings one file to a local path; called in several threads.

    Raises:
        IntegrityError: a download is not what its entry says.
        ConfigError: others may write to `cache`, its disk has no room, or RLHF_CACHE_GB is no number.
    """
    private_folder(cache)
    folder = cache / key
    with _locked(cache / f"{key}.lock"):
        if not _intact(folder, files):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(_part(folder), ignore_errors=True)
            _require_room(cache, sum(entry.size for entry in files))
            _fill(folder, files, download)
        _hold(cache / f"{key}.use")
    return folder


def private_folder(folder: Path) -> None:
    """Make a folder that only this user may enter; ConfigError if somebody else made it or may have written to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{folder}: others may have written to this cache of artifacts (owner {found.st_uid}, mode "
            f"{stat.filemode(found.st_mode)}); it must be a folder of user {os.getuid()} that no one else may write to: "
            "remove it"
        )
    if found.st_mode & 0o077:
        folder.chmod(0o700)


def limit_bytes() -> float:
    """The size that the cache is kept below, from RLHF_CACHE_GB; ConfigError if that is no number of at least 0."""
    text = os.environ.get("RLHF_CACHE_GB", "")
    try:
        limit = float(text or LIMIT_GB)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise ConfigError(f"RLHF_CACHE_GB: {text!r} is no size; write gigabytes, e.g. RLHF_CACHE_GB=50")
    return limit * 1e9


def make_room(cache: Path, new: int, disk: int) -> Literal["limit", "disk"] | None:
    """Remove what may go, the least recently taken first, until there is room.

    Args:
        cache: the folder of all.
        new: bytes that are to be added, for the limit.
        disk: bytes that are to be free on the disk, besides those that are always spared.

    Returns:
        What is still too small, the disk before all, or None.
    """
    limit = limit_bytes()
    folders = [f for f in cache.iterdir() if f.is_dir() and f.name != COPIES]
    for left in [f for f in folders if f.suffix == ".part"]:
        with _locked(left.with_suffix(".lock"), wait=False) as alone:
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    copies = set(cache.glob(f"{COPIES}/*/*"))
    sizes = {f: _size(f) for f in (*folders, *copies) if f.suffix != ".part"}

    def lacking() -> Literal["limit", "disk"] | None:
        if _free(cache) < disk + SPARE_BYTES:
            return "disk"
        return "limit" if sum(sizes.values()) + new > limit else None

    for folder in sorted(sizes, key=_taken):
        if not lacking():
            return None
        if folder in copies:
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]
        elif time.time() - _taken(folder) > IDLE_SECONDS and _remove(folder):
            del sizes[folder]
    return lacking()


def _require_room(cache: Path, needed: int) -> None:
    """Make room for a download as far as can be; ConfigError if the disk has none. The limit gives way."""
    if make_room(cache, needed, needed) == "disk":
        raise ConfigError(
            f"{cache}: {needed:,} bytes of inputs and {SPARE_BYTES:,} to spare are needed, the disk has {_free(cache):,} free; "
            "free some, lower RLHF_CACHE_GB, or set TMPDIR to a larger disk"
        )


def _fill(folder: Path, files: Sequence[FileEntry], download: Callable[[FileEntry, Path], None]) -> None:
    part = _part(folder)
    part.mkdir()

    def bring(entry: FileEntry) -> None:
        local = part / entry.path
        download(entry, local)
        if local.stat().st_size != entry.size or sha256_file(local) != entry.sha256:
            raise IntegrityError(f"{entry.path}: the content that arrived differs from the manifest's sha256")

    in_threads(bring, files)
    part.rename(folder)


def _remove(folder: Path) -> bool:
    """Remove a folder unless a living process is at it; returns whether."""
    with _locked(folder.with_name(f"{folder.name}.lock"), wait=False) as alone:
        if not alone:
            return False
        with _locked(folder.with_name(f"{folder.name}.use"), wait=False) as unused:
            if unused:
                folder.rename(_part(folder))  # a kill from here on leaves nothing that looks whole
                shutil.rmtree(_part(folder), ignore_errors=True)
            return unused


@contextmanager
def _locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file alone; yields whether it is held, which is always so with `wait`."""
    # Opened for appending: the time of `.use` is that of the last use, and a look must not change it.
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _hold(file: Path) -> None:
    """Share a folder's `.use` file until this process ends, and note the time."""
    if str(file) not in _held:
        _held[str(file)] = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(_held[str(file)], fcntl.LOCK_SH)
    os.utime(file)


def _part(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.part")


def _taken(folder: Path) -> float:
    """When a folder was last taken, seconds of the clock; 0 if it is gone."""
    for file in (folder.with_name(f"{folder.name}.use"), folder):
        with suppress(FileNotFoundError):
            return file.stat().st_mtime
    return 0.0


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, as far as they are still there; one that is in several places counts in parts."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found = os.lstat(os.path.join(place, name))
                total += found.st_size // max(1, found.st_nlink)
    return total


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _intact(folder: Path, files: Iterable[FileEntry]) -> bool:
    """Whether a folder still has every file in its size, and the small ones with their content."""
    try:
        return folder.is_dir() and all(
            (local := folder / entry.path).stat().st_size == entry.size
            and (entry.size > CHEAP_BYTES or sha256_file(local) == entry.sha256)
            for entry in files
        )
    except OSError:
        return False
