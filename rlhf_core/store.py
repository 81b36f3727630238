"""Object storage under one root URL (`file://`, `s3://`, `memory://`), through fsspec: six verbs and nothing else.

Keys are relative, with `/`. Writes are whole: a reader sees the old object, the new one or none, never a part. `create=True`
writes only if the key is absent and raises `AlreadyExists` otherwise (on S3 by If-None-Match). Only a real "not found" means
absent (`KeyError`); anything else that goes wrong is a `StoreError`, so an outage is never taken for an empty store.
Credentials come from the environment or the machine's role and are never kept here.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rlhf_core.errors import AlreadyExists, ConfigError, StoreError

T = TypeVar("T")
PART_BYTES = 8 << 20
PARTS_AT_ONCE = 10


class Store:
    """Objects under one root URL."""

    def __init__(self, url: str) -> None:
        """`url`: `file:///abs`, `file://./relative`, a plain path, `s3://bucket/prefix` or `memory://name`."""
        scheme, separator, rest = url.partition("://")
        if not separator:
            scheme, rest = "file", url
        if scheme not in ("file", "s3", "memory"):
            raise ConfigError(f"store: {url!r} has the scheme {scheme!r}; use file://, s3:// or memory://")
        if not rest:
            raise ConfigError(f"store: {url!r} names no place; e.g. file://./.rlhf or s3://bucket/prefix")
        self.scheme = scheme
        self.root = str(Path(rest).expanduser().absolute()) if scheme == "file" else rest.rstrip("/")
        self.url = f"{scheme}://{self.root}"

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        if self.scheme == "s3":
            return fsspec.filesystem("s3", use_listings_cache=False, default_block_size=PART_BYTES)
        return fsspec.filesystem(self.scheme)

    def _path(self, key: str) -> str:
        parts = key.split("/")
        if key.startswith("/") or any(part in ("", ".", "..") for part in parts):
            raise StoreError(f"store key {key!r}: must be relative, without empty, '.' or '..' parts")
        return f"{self.root}/{key}"

    def _call(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Run `call`; FileNotFoundError becomes KeyError, any other failure, and that of a write, StoreError."""
        try:
            return call()
        except FileNotFoundError as error:
            if verb in ("write", "upload") or "bucket" in str(error):  # no such bucket is never merely absent
                raise StoreError(f"{verb} {self.url}/{key}: {error}") from error
            raise KeyError(key) from None
        except (AlreadyExists, StoreError):
            raise
        except Exception as error:
            raise StoreError(f"{verb} {self.url}/{key}: {type(error).__name__}: {error}") from error

    def local_path(self, key: str) -> Path | None:
        """The file or folder itself where the store is a local folder, else None."""
        return Path(self._path(key)) if self.scheme == "file" else None

    def read(self, key: str) -> bytes:
        """The object's bytes. KeyError: absent. StoreError: could not be read."""
        path = self._path(key)
        if self.scheme == "file":
            return self._call("read", key, lambda: Path(path).read_bytes())
        return self._call("read", key, lambda: self._fs.cat_file(path))

    def write(self, key: str, data: bytes, create: bool = False) -> None:
        """Write an object whole. With `create`, AlreadyExists if the key is taken."""
        path = self._path(key)
        if self.scheme == "file":
            self._call("write", key, lambda: self._write_local(Path(path), lambda tmp: tmp.write_bytes(data), create))
        elif self.scheme == "s3":
            self._call("write", key, lambda: self._write_s3(path, data, create))
        else:
            self._call("write", key, lambda: self._write_memory(path, data, create))

    def upload(self, local: Path, key: str) -> None:
        """Store a local file under `key`, in parallel parts where the store has them."""
        path = self._path(key)
        if self.scheme == "file":
            self._call("upload", key, lambda: self._write_local(Path(path), lambda tmp: shutil.copyfile(local, tmp)))
        else:
            options = {"chunksize": PART_BYTES, "max_concurrency": PARTS_AT_ONCE} if self.scheme == "s3" else {}
            self._call("upload", key, lambda: self._fs.put_file(str(local), path, **options))

    def download(self, key: str, local: Path) -> None:
        """Fetch an object into a local file; the file appears only when whole."""
        path = self._path(key)

        def fetch(tmp: Path) -> None:
            if self.scheme == "file":
                shutil.copyfile(path, tmp)
            else:
                self._fs.get_file(path, str(tmp))

        self._call("download", key, lambda: self._write_local(local, fetch))

    def list(self, prefix: str) -> dict[str, int]:
        """Keys under the folder `prefix` ("" for all) with their sizes in bytes; empty if there are none."""
        base = self._path(prefix) if prefix else self.root

        def find() -> dict[str, int]:
            if self.scheme == "file" and not Path(base).exists():
                return {}
            try:
                found = self._fs.find(base, detail=True)
            except FileNotFoundError:
                return {}
            start = len(self._fs._strip_protocol(self.root)) + 1
            names = {path[start:]: int(info["size"] or 0) for path, info in found.items()}
            return {k: v for k, v in sorted(names.items()) if not k.rsplit("/", 1)[-1].startswith(".tmp-")}

        return self._call("list", prefix, find)

    def delete(self, key: str) -> None:
        """Remove an object; KeyError if it is not there."""
        path = self._path(key)
        if self.scheme == "file":
            self._call("delete", key, lambda: os.unlink(path))
        else:
            self._call("delete", key, lambda: self._fs.rm_file(path))

    @staticmethod
    def _write_local(path: Path, fill: Callable[[Path], Any], create: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.parent / f".tmp-{uuid.uuid4().hex}"
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

    def _write_s3(self, path: str, data: bytes, create: bool) -> None:
        try:
            self._fs.pipe_file(path, data, mode="create" if create else "overwrite")
        except FileExistsError:
            raise AlreadyExists(path) from None
        except OSError as error:
            # s3fs reports a failed If-None-Match as EINVAL with the server's sentence.
            if create and error.errno == errno.EINVAL and "pre-conditions" in str(error):
                raise AlreadyExists(path) from None
            raise

    def _write_memory(self, path: str, data: bytes, create: bool) -> None:
        if create and self._fs.exists(path):
            raise AlreadyExists(path)
        self._fs.pipe_file(path, data)
