"""One write of one object on S3: whole in one request if it is small or create-only, else in parts at once.

Each part is tried again alone. A create-only write marks the object with a word of its own, so that it knows whether it was it
that succeeded when an answer got lost, also against a writer of the same bytes. What is begun and cannot be finished is aborted,
so that no invisible parts stay and are paid for; best effort, as the server may not answer then.
"""

import asyncio
import hashlib
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rlhf_core.errors import AlreadyExists, StoreError
from rlhf_core.s3_client import Client, cancel, code_of, is_absent, is_taken

PART_BYTES = 8 << 20
MOST_PARTS = 10_000  # of one upload, by S3's rule
RESTARTS = 5
ABORT_SECONDS = 10
MARK = "write-id"


class Upload:
    """One write of one object: in one request if it is small, else in parts."""

    def __init__(
        self, client: Client, key: str, size: int, piece: Callable[[int, int], bytes], create: bool = False
    ) -> None:
        """`piece(at, n)`: n bytes of the content from a place."""
        self.client, self.key, self.size, self.piece = client, key, size, piece
        self.mark = uuid.uuid4().hex if create else ""
        self.only: dict[str, Any] = {"IfNoneMatch": "*", "Metadata": {MARK: self.mark}} if create else {}
        self.unsure = False  # the server may hold begun uploads of ours that we do not know

    async def run(self) -> None:
        """Do it. AlreadyExists: create-only, and the key is another's."""
        try:
            if (
                self.size <= PART_BYTES or self.mark
            ):  # the end of parts is no safe condition: two of a race may win (SeaweedFS)
                body = await self._piece(0, self.size)
                await self._ask("put_object", size=self.size, Body=body, **self.only)
            else:
                await self._in_parts()
        except Exception as error:
            if not (self.mark and is_taken(error)):
                raise
            if not await self._is_ours():
                raise AlreadyExists(self.key) from None

    async def _ask(self, method: str, **options: Any) -> dict[str, Any]:
        return await self.client.ask(f"write {self.key}", method, Key=self.key, **options)

    async def _piece(self, at: int, length: int) -> bytes:
        data = await asyncio.to_thread(self.piece, at, length)
        if len(data) != length:
            raise StoreError("the local file became shorter while it was being uploaded")
        return data

    async def _head(self) -> dict[str, Any]:
        try:
            return await self._ask("head_object")
        except Exception as error:
            if is_absent(error):
                return {}
            raise

    async def _is_ours(self) -> bool:
        """Whether the object under the key is of this very write, whose answer was lost."""
        words = (await self._head()).get("Metadata", {})
        return self.mark in {value for name, value in words.items() if name.lower() == MARK}

    async def _in_parts(self) -> None:
        for _ in range(RESTARTS):
            upload = await self._begin()
            try:
                if await self._fill(upload):
                    if self.unsure:
                        await self._abort_unknown()
                    return
            except BaseException:
                await self._abort(upload)
                raise
        raise StoreError(f"the server forgot the upload {RESTARTS} times")

    async def _begin(self) -> str:
        async def once(tries: int) -> dict[str, Any]:
            self.unsure = self.unsure or tries > 0
            return await self.client.call("create_multipart_upload", Key=self.key)

        return (await self.client.keep(f"write {self.key}", once))["UploadId"]

    async def _fill(self, upload: str) -> bool:
        """All parts, then the word that makes them an object. False: the server does not know the upload (any more)."""
        length = max(PART_BYTES, -(-self.size // MOST_PARTS))

        async def part(number: int, at: int) -> dict[str, Any]:
            async with self.client.connection.slots:
                body = await self._piece(at, min(length, self.size - at))
                done = await self._ask("upload_part", size=len(body), UploadId=upload, PartNumber=number, Body=body)
                checksums = {k: v for k, v in done.items() if k == "ChecksumCRC32"}
                return {"PartNumber": number, "ETag": done["ETag"], **checksums}

        tasks = [asyncio.ensure_future(part(n, at)) for n, at in enumerate(range(0, self.size, length), 1)]
        try:
            parts = await asyncio.gather(*tasks)
            await self._ask("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts})
            return True
        except Exception as error:
            if code_of(error) != "NoSuchUpload":
                raise
        finally:
            await cancel(tasks)
        # Perhaps it was completed and the answer was lost: then the object has the ETag that these parts make.
        done = [task.result()["ETag"] for task in tasks if not task.cancelled() and not task.exception()]
        made = hashlib.md5(b"".join(_hex(tag) for tag in done), usedforsecurity=False).hexdigest()
        head = await self._head()
        return len(done) == len(tasks) and head.get("ETag", "").strip('"') == f"{made}-{len(done)}"

    async def _abort(self, upload: str) -> None:
        """Best effort: what failed before may fail again."""
        with suppress(Exception):
            async with asyncio.timeout(ABORT_SECONDS):
                await self._ask("abort_multipart_upload", UploadId=upload, seconds=ABORT_SECONDS / 2)
                if self.unsure:
                    await self._abort_unknown()

    async def _abort_unknown(self) -> None:
        """Abort uploads of this key that were begun by requests whose answer was lost. Only one process writes a key in parts."""
        with suppress(Exception):
            async with asyncio.timeout(ABORT_SECONDS):
                listed = await self.client.ask(
                    "list", "list_multipart_uploads", Prefix=self.key, seconds=ABORT_SECONDS / 2
                )
                for entry in listed.get("Uploads", []):
                    if entry["Key"] == self.key:
                        await self._ask("abort_multipart_upload", UploadId=entry["UploadId"], seconds=ABORT_SECONDS / 2)


def _hex(tag: str) -> bytes:
    try:
        return bytes.fromhex(tag.strip('"'))
    except ValueError:
        return tag.encode()  # no MD5, as with some encryptions: then the ETags differ, and the upload begins again
