"""The verbs of `Store` on a local folder that are more than one call: whole writes, and looking at a tree of files.

A write goes to `.tmp-…` beside its place and is then renamed or linked to it; a killed one leaves that file, which no listing
shows and `unfinished` finds. Only a folder or file that is not there (any more) counts as absent: one that cannot be read is an
error, or an outage would look like an empty store. Links are listed as the files that they lead to, and never followed into
folders.
"""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf_core.errors import AlreadyExists

UNFINISHED = ".tmp-"


def write(path: Path, fill: Callable[[Path], Any], create: bool = False) -> None:
    """A file that appears only when `fill` has written it whole. AlreadyExists: `create`, and it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.parent / f"{UNFINISHED}{uuid.uuid4().hex}"
    try:
        fill(tmp)
        if create:
            os.link(tmp, path)  # fails if the name is taken; the content is whole already
        else:
            os.replace(tmp, path)
    except FileExistsError:
        raise AlreadyExists(str(path)) from None
    finally:
        tmp.unlink(missing_ok=True)


def sizes(base: Path, root: Path) -> dict[str, int]:
    """Sizes in bytes of the whole files below `base`, by path relative to `root`. OSError: a folder cannot be read."""
    found = {}
    for entry in _files(base):
        if not entry.name.startswith(UNFINISHED):
            with suppress(FileNotFoundError):  # removed meanwhile, or a link that leads nowhere
                found[_key(entry, root)] = entry.stat().st_size
    return found


def unfinished(root: Path, before: float) -> dict[str, int]:
    """What cut-off writes have left that nobody has written to since `before` (seconds of the epoch), as `sizes` does."""
    found = {}
    for entry in _files(root):
        if entry.name.startswith(UNFINISHED):
            with suppress(FileNotFoundError):
                state = entry.stat(follow_symlinks=False)
                if state.st_mtime <= before:
                    found[_key(entry, root)] = state.st_size
    return found


def _files(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            inside = list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            yield from _files(entry.path)
        else:
            yield entry


def _key(entry: os.DirEntry[str], root: Path) -> str:
    return entry.path[len(str(root)) :].lstrip("/")
