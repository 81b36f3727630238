"""Files by path, size and sha256: what manifests and results list, and what a local folder is compared with.

Paths are relative and cannot leave the folder they are relative to; whoever reads an entry may rely on it, whoever wrote it.
"""

import hashlib
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from rlhf_core.specs import Frozen


def inside(path: str) -> str:
    """The path if it cannot leave the folder it is relative to; ValueError otherwise."""
    if path.startswith("/") or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"{path!r} must be relative, without backslash, NUL, empty, '.' or '..' parts")
    return path


Inside = Annotated[str, AfterValidator(inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(Frozen):
    """One file of an artifact."""

    path: Inside = Field(description="relative to the artifact's folder, never out of it")
    size: int = Field(ge=0, description="bytes")
    sha256: Sha256


def sha256_file(path: Path) -> str:
    """sha256 of a local file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(folder: Path) -> tuple[FileEntry, ...]:
    """Entries of all files below a local folder, in order of path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return tuple(
        FileEntry(path=p.relative_to(folder).as_posix(), size=p.stat().st_size, sha256=sha256_file(p)) for p in files
    )
