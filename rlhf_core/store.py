"""Object storage under one root URL (`file://`, `s3://`, `memory://`): a few verbs and nothing else.

Keys are relative, with `/`. Writes are whole: a reader sees the old object, the new one or none, never a part. `create=True`
writes only if the key is absent and raises `AlreadyExists` otherwise (on S3 by If-None-Match). Only a real "not found" means
absent (`KeyError`); anything else that goes wrong is a `StoreError`, so an outage is never taken for an empty store. On S3 what
fails for now is tried again for up to `patience` seconds. Credentials come from the environment, a profile or the machine's role;
they are never kept here and never in a message. May be used from many threads.
"""

import hashlib
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rlhf_core import store_local
from rlhf_core.credentials import refuse_credentials, scrub
from rlhf_core.errors import AlreadyExists, ConfigError, StoreError
from rlhf_core.patience import Patience, patience_seconds

T = TypeVar("T")


class Store:
    """Objects under one root URL."""

    def __init__(self, url: str, patience: float | None = None) -> None:
        """What is at a URL.

        Args:
            url: `file:///abs`, `file://./relative`, a plain path, `s3://bucket/prefix` or `memory://name`.
            patience: seconds for which a request to S3 that fails for now is tried again; 0: once only; None: 120. The
                environment's RLHF_STORE_PATIENCE goes before it.

        Raises:
            ConfigError: not such a URL, credentials in it, or a patience that is no number of seconds.
        """
        refuse_credentials(url)
        scheme, separator, rest = url.partition("://")
        if not separator:
            scheme, rest = "file", url
        if scheme not in ("file", "s3", "memory"):
            raise ConfigError(f"store: {url!r} has the scheme {scheme!r}; use file://, s3:// or memory://")
        if not rest or (scheme == "s3" and rest.startswith("/")) or (scheme == "memory" and not rest.strip("/")):
            raise ConfigError(f"store: {url!r} names no place; e.g. file://./.rlhf or s3://bucket/prefix")
        self.scheme = scheme
        self.root = str(Path(rest).expanduser().absolute()) if scheme == "file" else rest.rstrip("/")
        self.url = f"{scheme}://{self.root}"
        self.patience = patience_seconds(patience)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        return fsspec.filesystem(self.scheme)

    @cached_property
    def _s3(self) -> Any:
        from rlhf_core.store_s3 import S3Objects

        return S3Objects(self.root.partition("/")[0], Patience(self.patience, self.url))

    def _path(self, key: str) -> str:
        """The whole name under which the scheme knows the key: a path, or on S3 the key in the bucket."""
        parts = key.split("/")
        if key.startswith("/") or any(part in ("", ".", "..") for part in parts):
            raise StoreError(f"store key {key!r}: must be relative, without empty, '.' or '..' parts")
        if self.scheme == "s3":
            return f"{self._folder}{key}"
        return f"{self.root}/{key}"

    @property
    def _folder(self) -> str:
        prefix = self.root.partition("/")[2]
        return f"{prefix}/" if prefix else ""

    def _call(self, verb: str, key: str, call: Callable[[], T]) -> T:
        """Run `call`; FileNotFoundError becomes KeyError, any other failure, and that of a write, StoreError."""
        try:
            return call()
        except FileNotFoundError as error:
            absent, reason = verb not in ("write", "upload"), str(error)
        except AlreadyExists:
            raise AlreadyExists(f"{self.url}/{key}") from None
        except Exception as error:
            absent, reason = False, self._explain(error)
        # Raised here and not above: a chained error would show, in a traceback, words that were not scrubbed.
        if absent:
            raise KeyError(key)
        raise StoreError(scrub(f"{verb} {self.url}/{key}: {reason}"))

    def _explain(self, error: Exception) -> str:
        if self.scheme == "s3":
            from rlhf_core.s3_client import explain

            return explain(error)
        return str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"

    def local_path(self, key: str) -> Path | None:
        """The file or folder itself where the store is a local folder, else None."""
        return Path(self._path(key)) if self.scheme == "file" else None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytes:
        """The object's bytes from `start` to before `stop` (None: its end), as a slice gives them: fewer where it ends.

        Raises:
            KeyError: absent.
            StoreError: could not be read.
        """
        assert start >= 0 and (stop is None or stop >= 0), "a range counts from the object's start"
        path = self._path(key)

        def local() -> bytes:
            with open(path, "rb") as file:
                file.seek(start)
                return file.read(-1 if stop is None else max(stop - start, 0))

        if self.scheme == "file":
            return self._call("read", key, local)
        if self.scheme == "s3":
            return self._call("read", key, lambda: self._s3.read(path, start, stop))
        return self._call("read", key, lambda: self._fs.cat_file(path)[start:stop])

    def sha256(self, key: str) -> str:
        """Hex digest of the object, which is never in memory whole. KeyError: absent. StoreError: could not be read."""
        path = self._path(key)

        def local() -> str:
            with open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        if self.scheme == "file":
            return self._call("read", key, local)
        if self.scheme == "s3":
            return self._call("read", key, lambda: self._s3.sha256(path))
        return hashlib.sha256(self.read(key)).hexdigest()

    def write(self, key: str, data: bytes, create: bool = False) -> None:
        """Write an object whole. With `create`, AlreadyExists if the key is taken."""
        path = self._path(key)
        if self.scheme == "file":
            self._call("write", key, lambda: store_local.write(Path(path), lambda tmp: tmp.write_bytes(data), create))
        elif self.scheme == "s3":
            self._call("write", key, lambda: self._s3.write(path, data, create))
        else:
            self._call("write", key, lambda: self._write_memory(path, data, create))

    def upload(self, local: Path, key: str) -> None:
        """Store a local file under `key`, in parallel parts where the store has them."""
        path = self._path(key)
        if self.scheme == "file":
            self._call("upload", key, lambda: store_local.write(Path(path), lambda tmp: shutil.copyfile(local, tmp)))
        elif self.scheme == "s3":
            self._call("upload", key, lambda: self._s3.upload(local, path))
        else:
            self._call("upload", key, lambda: self._fs.put_file(str(local), path))

    def download(self, key: str, local: Path) -> None:
        """Fetch an object into a local file, which appears only when whole. KeyError: absent."""
        path = self._path(key)

        def fetch(tmp: Path) -> None:
            if self.scheme == "file":
                shutil.copyfile(path, tmp)
            elif self.scheme == "s3":
                self._s3.download(path, tmp)
            else:
                self._fs.get_file(path, str(tmp))

        self._call("download", key, lambda: store_local.write(local, fetch))

    def list(self, prefix: str) -> dict[str, int]:
        """Keys under the folder `prefix` ("" for all) with their sizes in bytes; empty if there are none."""
        base = self._path(prefix) if prefix else self.root

        def find() -> dict[str, int]:
            if self.scheme == "file":
                found = store_local.sizes(Path(base), Path(self.root))
            elif self.scheme == "s3":
                listed = self._s3.list(f"{base}/" if prefix else self._folder)
                found = {key[len(self._folder) :]: size for key, size in listed.items() if not key.endswith("/")}
            else:
                start = len(self._fs._strip_protocol(self.root)) + 1
                details = self._fs.find(base, detail=True)
                found = {path[start:]: int(info["size"] or 0) for path, info in details.items()}
            return dict(sorted(found.items()))

        return self._call("list", prefix, find)

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        path = self._path(key)
        if self.scheme == "file":
            self._call("delete", key, lambda: Path(path).unlink(missing_ok=True))
        elif self.scheme == "s3":
            self._call("delete", key, lambda: self._s3.delete(path))
        elif self._fs.exists(path):
            self._call("delete", key, lambda: self._fs.rm_file(path))

    def unfinished(self, older_than: timedelta) -> dict[str, int]:
        """What writes that were cut off at least so long ago have left, with its bytes; no listing shows it.

        Returns:
            By name: the key that was being written, or the name of a file beside it; on S3 with the number of the upload.
        """
        if self.scheme == "file":
            before = time.time() - older_than.total_seconds()
            found = self._call("list", "", lambda: store_local.unfinished(Path(self.root), before))
            return dict(sorted(found.items()))
        if self.scheme == "s3":
            start = len(self._folder)
            found = self._call("list", "", lambda: self._s3.unfinished(self._folder, older_than))
            return {name[start:]: size for name, size in sorted(found.items())}
        return {}

    def abort(self, name: str) -> None:
        """Remove what a write has left, by its name in `unfinished`, if it is there."""
        path = self._path(name)
        if self.scheme == "s3":
            self._call("abort", name, lambda: self._s3.abort(path))
        elif self.scheme == "file":
            assert Path(path).name.startswith(store_local.UNFINISHED), f"{name} is no unfinished write"
            self._call("abort", name, lambda: Path(path).unlink(missing_ok=True))

    def _write_memory(self, path: str, data: bytes, create: bool) -> None:
        if create and self._fs.exists(path):
            raise AlreadyExists(path)
        self._fs.pipe_file(path, data)
