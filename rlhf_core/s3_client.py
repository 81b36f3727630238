"""Requests to one S3 bucket, each tried again by itself, on the connection of s3fs; and what their failures mean.

s3fs gives session, credentials and configuration (its own and fsspec's). A stalled connection is noticed: by time-outs of
connecting and reading, by TCP for a body that nobody takes, and by a limit for each request in whole. Uploads carry a CRC32 that
the server checks. One connection pool for each process and setting of the environment.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from rlhf_core.errors import StoreError
from rlhf_core.patience import GaveUp, Patience

T = TypeVar("T")
PARTS_AT_ONCE = 16
CONNECTIONS = 64
CONNECT_SECONDS = 5
READ_SECONDS = 30
REQUEST_SECONDS = 60  # of a whole request, and longer by its bytes at the slowest rate
SLOWEST_BYTES_PER_SECOND = 32 << 10
TRANSIENT_CODES = {
    "SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException", "TooManyRequestsException",
    "InternalError", "ServiceUnavailable", "ConditionalRequestConflict", "OperationAborted",
    # The request was damaged on its way and the server noticed (the XML is never ill-formed otherwise):
    "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "InvalidDigest",
    "MalformedXML",
}  # fmt: skip


class Broken(Exception):
    """An answer that ended early or did not end."""


class Missing(Exception):
    """The server knows no such key, bucket or upload; which, its code says. s3fs makes one error of all of them."""


@dataclass
class Connection:
    """What all stores of one process and environment share."""

    fs: Any
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PARTS_AT_ONCE))


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """A socket whose peer must take what is sent: HTTP clients limit waiting for an answer, not for a body to be read."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_SECONDS * 1000)
    return made


def _send_at_once(params: dict[str, Any], **_: Any) -> None:
    """Take back "Expect: 100-continue": it costs a round trip for each part, and no time-out limits waiting for its answer."""
    params["headers"].pop("Expect", None)


@lru_cache(maxsize=8)
def _connect(process: int, environment: int) -> Connection:
    """One connection pool for each process (a fork may not use its parent's) and each setting of the variables."""
    import fsspec
    from aiobotocore.session import AioSession
    from fsspec.config import conf

    session = AioSession()
    session.register("before-call.s3", _send_at_once)
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_SECONDS,
        "read_timeout": READ_SECONDS,
        "max_pool_connections": CONNECTIONS,
        "retries": {"total_max_attempts": 1, "mode": "standard"},  # Patience does that
        # A checksum with each upload: without it SeaweedFS stores a damaged body (measured), whatever was signed.
        "request_checksum_calculation": "when_supported",
        "response_checksum_validation": "when_required",  # checksums are of whole objects, reads are of ranges
        "connector_args": {"socket_factory": _socket},
    }
    own = conf.get("s3", {}).get("config_kwargs", {})
    fs = fsspec.filesystem(
        "s3", use_listings_cache=False, skip_instance_cache=True, session=session, config_kwargs={**options, **own}
    )
    fs.retries = 1
    return Connection(fs)


def _answer(error: BaseException | None) -> dict[str, Any]:
    """S3's answer in an error, or {}: s3fs hides it in the cause."""
    for found in (error, getattr(error, "__cause__", None)):
        if isinstance(answer := getattr(found, "response", None), dict) and "Error" in answer:
            return answer
    return {}


def code_of(error: BaseException | None) -> str:
    """S3's code in an error, or the status as text, or ""."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    import aiohttp
    from botocore.exceptions import ConnectionError as NotConnected
    from botocore.exceptions import HTTPClientError, ResponseStreamingError
    from botocore.parsers import ResponseParserError

    if answer := _answer(error):
        status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        return status >= 500 or status in (408, 429) or code_of(error) in TRANSIENT_CODES
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    broken = (NotConnected, HTTPClientError, ResponseStreamingError, ResponseParserError, aiohttp.ClientError)
    return isinstance(error, (Broken, TimeoutError, ConnectionError, *broken))


def is_absent(error: Exception) -> bool:
    """No such object; a bucket that does not exist is another matter."""
    return code_of(error) in ("NoSuchKey", "404")


def is_taken(error: Exception) -> bool:
    """The request's condition (create only, or the same version) did not hold."""
    return code_of(error) in ("PreconditionFailed", "412")


class Client:
    """Requests to one bucket. May be used from many threads; they all run on the thread of s3fs."""

    def __init__(self, bucket: str, patience: Patience) -> None:
        self.bucket, self.patience = bucket, patience

    @property
    def connection(self) -> Connection:
        """The one of this process and environment."""
        names = sorted(name for name in os.environ if name.startswith(("AWS_", "FSSPEC_")))
        return _connect(os.getpid(), hash(tuple((name, os.environ[name]) for name in names)))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the thread of s3fs; an interrupt here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self.connection.fs.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def call(self, method: str, **options: Any) -> dict[str, Any]:
        """One request, once. Errors as s3fs raises them, but `Missing` for its FileNotFoundError."""
        try:
            return await self.connection.fs._call_s3(method, Bucket=self.bucket, **options)
        except FileNotFoundError as error:
            raise Missing(str(error)) from error.__cause__

    async def keep(
        self, what: str, call: Callable[[int], Awaitable[T]], size: int = 0, seconds: float | None = None
    ) -> T:
        """The result of `call(tries so far)`, tried again with patience, or for `seconds`; `size` bytes go either way."""
        return await self.patience.keep(what, lambda tries: _limited(call(tries), size), is_transient, seconds)

    async def ask(
        self, what: str, method: str, size: int = 0, seconds: float | None = None, **options: Any
    ) -> dict[str, Any]:
        """One request, tried again; `what` is its name for people."""
        return await self.keep(what, lambda _: self.call(method, **options), size, seconds)


async def _limited(work: Awaitable[T], size: int) -> T:
    """The result, or `Broken` after the longest time that a request with so many bytes may take."""
    limit = REQUEST_SECONDS + size / SLOWEST_BYTES_PER_SECOND
    clock = asyncio.timeout(limit)
    try:
        async with clock:
            return await work
    except TimeoutError as error:
        raise Broken(f"no end after {limit:.0f} s") if clock.expired() else error from None


async def cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel them and see them end."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def explain(error: Exception) -> str:
    """The failure in one line: what the server or the client said, and how long it was tried."""
    tried = ""
    if isinstance(error, GaveUp):
        times = "once" if error.tries == 1 else f"{error.tries} times"
        error, tried = error.error, f"; tried {times} in {error.seconds:.1f} s"
    code = code_of(error)
    name = f"{type(error).__name__} {code}".strip() if code and not code.isdigit() else type(error).__name__
    said = str(error) if isinstance(error, StoreError) else f"{name}: {error}"
    return f"{said}{tried}"
