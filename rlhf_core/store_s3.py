"""The verbs of `Store` on S3: ranged reads in parallel, writes by `s3_upload`, requests by `s3_client`.

Transfers are ours and not those of s3fs, because each part must be tried again alone, and because an object that is replaced
while it is being read must not come half old and half new: all ranges are asked of one version. Reads come in order through a
window of parts. Memory: 16 parts of 8 MiB for each download, and as many for all uploads together.
"""

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rlhf_core.errors import StoreError
from rlhf_core.patience import Patience
from rlhf_core.s3_client import Broken, Client, cancel, code_of, is_absent, is_taken
from rlhf_core.s3_upload import RESTARTS, Upload

RANGE_BYTES = 8 << 20
RANGES_AT_ONCE = 16
UPLOAD = "?uploadId="  # between key and id in the name of an unfinished upload
Begin = Callable[[], Callable[[bytes], Any]]


class Replaced(Exception):
    """The object is another one than when the transfer began."""


@dataclass
class Version:
    """Which object is being read: known from the first answer, asked for in every later request."""

    etag: str = ""
    size: int = 0
    known: asyncio.Event = field(default_factory=asyncio.Event)


class S3Objects:
    """Objects of one bucket, by their whole keys. FileNotFoundError: absent. May be used from many threads."""

    def __init__(self, bucket: str, patience: Patience) -> None:
        self.client = Client(bucket, patience)

    def read(self, key: str, start: int, stop: int | None) -> bytes:
        """Bytes `start` to `stop`, as a slice would give them."""
        pieces: list[bytes] = []

        def begin() -> Callable[[bytes], Any]:
            pieces.clear()
            return pieces.append

        self.client.run(self._stream(key, start, stop, begin))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def sha256(self, key: str) -> str:
        """Hex digest of the object."""
        digest = hashlib.sha256()

        def begin() -> Callable[[bytes], Any]:
            nonlocal digest
            digest = hashlib.sha256()
            return digest.update

        self.client.run(self._stream(key, 0, None, begin))
        return digest.hexdigest()

    def download(self, key: str, local: Path) -> None:
        """The object into a file."""
        with local.open("wb") as file:

            def begin() -> Callable[[bytes], Any]:
                file.seek(0)
                file.truncate()
                return file.write

            self.client.run(self._stream(key, 0, None, begin))

    def write(self, key: str, data: bytes, create: bool) -> None:
        """An object whole. AlreadyExists: `create`, and another write was first."""
        self.client.run(Upload(self.client, key, len(data), lambda at, n: data[at : at + n], create).run())

    def upload(self, local: Path, key: str) -> None:
        """A file whole, as long as it is now."""
        with local.open("rb") as file:
            number = file.fileno()
            size = os.fstat(number).st_size
            self.client.run(Upload(self.client, key, size, lambda at, n: os.pread(number, n, at)).run())

    def delete(self, key: str) -> None:
        """Remove it, if it is there."""
        self.client.run(self.client.ask(f"delete {key}", "delete_object", Key=key))

    def list(self, prefix: str) -> dict[str, int]:
        """Sizes of all objects whose keys begin so, in bytes."""
        return self.client.run(self._list(prefix))

    def unfinished(self, prefix: str, older_than: timedelta) -> dict[str, int]:
        """Uploads in parts that were begun so long ago and have not ended: bytes stored so far, by key and upload id."""
        return self.client.run(self._unfinished(prefix, datetime.now(UTC) - older_than))

    def abort(self, name: str) -> None:
        """Remove an upload's parts, by its name in `unfinished`, if the server knows it."""
        key, _, upload = name.rpartition(UPLOAD)
        self.client.run(self._abort(key, upload))

    async def _abort(self, key: str, upload: str) -> None:
        try:
            await self.client.ask(f"abort {key}", "abort_multipart_upload", Key=key, UploadId=upload)
        except Exception as error:
            if code_of(error) != "NoSuchUpload":
                raise

    async def _unfinished(self, prefix: str, before: datetime) -> dict[str, int]:
        found: dict[str, int] = {}
        more: dict[str, Any] = {}
        while True:
            page = await self.client.ask("list uploads", "list_multipart_uploads", Prefix=prefix, **more)
            for entry in page.get("Uploads", []):
                if entry["Key"].startswith(prefix) and entry["Initiated"] <= before:
                    found[f"{entry['Key']}{UPLOAD}{entry['UploadId']}"] = await self._stored(
                        entry["Key"], entry["UploadId"]
                    )
            if not page.get("IsTruncated"):
                return found
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    async def _stored(self, key: str, upload: str) -> int:
        """Bytes of an upload's parts; 0 if it has ended meanwhile."""
        size, more = 0, dict[str, Any]()
        while True:
            try:
                page = await self.client.ask(f"list {key}", "list_parts", Key=key, UploadId=upload, **more)
            except Exception as error:
                if code_of(error) != "NoSuchUpload":
                    raise
                return 0
            size += sum(part["Size"] for part in page.get("Parts", []))
            if not page.get("IsTruncated"):
                return size
            more = {"PartNumberMarker": page["NextPartNumberMarker"]}

    async def _list(self, prefix: str) -> dict[str, int]:
        found: dict[str, int] = {}
        more: dict[str, Any] = {}
        while True:
            page = await self.client.ask(f"list {prefix}", "list_objects_v2", Prefix=prefix, **more)
            found.update({entry["Key"]: entry["Size"] for entry in page.get("Contents", [])})
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}

    async def _range(self, key: str, start: int, stop: int, version: Version) -> bytes:
        """A range of one version of an object; the first answer tells which version."""

        async def once(tries: int) -> bytes:
            asked = {"IfMatch": version.etag} if version.etag else {}
            answer = await self.client.call("get_object", Key=key, Range=f"bytes={start}-{stop - 1}", **asked)
            async with answer["Body"] as body:
                version.etag = version.etag or answer["ETag"]
                version.size = int(answer["ContentRange"].rpartition("/")[2])
                version.known.set()
                data = await body.read()
            if len(data) != answer["ContentLength"]:
                raise Broken(f"{len(data)} of {answer['ContentLength']} bytes came")
            return data

        try:
            return await self.client.keep(f"read {key}", once, stop - start)
        except Exception as error:
            if is_absent(error):
                raise FileNotFoundError(key) from None
            if is_taken(error):
                raise Replaced from None
            if code_of(error) in ("InvalidRange", "416"):  # there are no bytes from `start` on
                return b""
            raise

    async def _stream(self, key: str, start: int, stop: int | None, begin: Begin) -> None:
        """Give the bytes in order to what `begin()` returns; from the start again when the object is replaced meanwhile."""
        for _ in range(RESTARTS):
            with suppress(Replaced):
                return await self._pieces(key, start, stop, begin())
        raise StoreError(f"it was replaced {RESTARTS} times while it was being read")

    async def _pieces(self, key: str, start: int, stop: int | None, take: Callable[[bytes], Any]) -> None:
        version = Version()

        async def piece(at: int, end: int) -> bytes:
            async with self.client.connection.slots:
                return await self._range(key, at, end, version)

        if stop is not None and stop <= start:  # nothing is wanted, but whether the object is there
            stop, take = start + 1, len
        head = start + RANGE_BYTES if stop is None else min(start + RANGE_BYTES, stop)
        # The first range takes no slot, so that a record is read at once while large files are under way.
        first = asyncio.ensure_future(self._range(key, start, head, version))
        known = asyncio.ensure_future(version.known.wait())
        window = deque([first])
        try:
            await asyncio.wait({first, known}, return_when=asyncio.FIRST_COMPLETED)
            end = version.size if stop is None else min(version.size, stop)
            places = iter(range(head, end, RANGE_BYTES))
            while window:
                while len(window) < RANGES_AT_ONCE and (at := next(places, None)) is not None:
                    window.append(asyncio.ensure_future(piece(at, min(at + RANGE_BYTES, end))))
                data = await window[0]
                window.popleft()
                await asyncio.to_thread(take, data)
        finally:
            await cancel([known, *window])
