"""A proxy before an S3 server that injects faults, for tests: real requests, real bytes, real sockets.

    with FaultProxy(server.endpoint, plan) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)

It parses HTTP only as far as needed to tell one request from the next and passes bytes on as they are; the Host header too, so
that signatures hold. For each request it asks the plan, a function `Request -> Fault | None`. Plans here: `Script`, rules that
hit chosen requests a chosen number of times, and `Storm`, faults at given rates, decided by seed and request alone. `down()` and
`up()` refuse connections in between. What was done is counted: `requests` by operation, `injected` by kind of fault.
Left out: TLS, pipelining, HTTP/2, which no S3 client here uses.
"""

import asyncio
import hashlib
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

Kind = Literal["answer", "delay", "cut-request", "cut-response", "drop-answer", "refuse", "stall", "flip", "trickle"]
CHUNK = 64 << 10
LINGER_SECONDS = 0.2


@dataclass(frozen=True)
class Request:
    """What a plan decides by.

    Attributes:
        method: GET, PUT, …
        path: decoded, `/bucket/key`.
        query: the names and first values of the query.
        headers: lower-case names.
        length: bytes of its body; -1: sent in chunks of unknown number.
        number: how many requests came before, over all connections.
        nth: how many requests of the same method, path and query (upload ids apart) came before.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    length: int
    number: int = 0
    nth: int = 0

    @property
    def operation(self) -> str:
        """read | head | list | write | part | begin-upload | complete-upload | abort-upload | list-uploads | delete | other."""
        if "uploadId" in self.query:
            return {"PUT": "part", "POST": "complete-upload", "DELETE": "abort-upload"}.get(self.method, "other")
        if "uploads" in self.query:
            return {"POST": "begin-upload", "GET": "list-uploads"}.get(self.method, "other")
        if self.path.count("/") < 2 or self.path.endswith("/"):
            return "list" if self.method == "GET" else "other"
        return {"GET": "read", "HEAD": "head", "PUT": "write", "DELETE": "delete"}.get(self.method, "other")

    @property
    def identity(self) -> str:
        """What stays the same when the same request is sent again, also in another run of the same test."""
        steady = sorted((k, v) for k, v in self.query.items() if k not in ("uploadId", "X-Amz-Date", "X-Amz-Signature"))
        return f"{self.method} {self.path} {steady} {self.headers.get('range', '')}"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong; make it by the functions of the same names as the kinds."""

    kind: Kind
    seconds: float = 0.0
    after: int = 0
    status: int = 0
    code: str = ""

    @property
    def name(self) -> str:
        """For counting: the kind, and of an answer its code."""
        return self.code if self.kind == "answer" else self.kind


def answer(status: int = 500, code: str = "InternalError") -> Fault:
    """Answer with this status and S3 error code, and do not ask the server."""
    return Fault("answer", status=status, code=code)


SLOW_DOWN = answer(503, "SlowDown")
INTERNAL = answer(500, "InternalError")
NO_SPACE = answer(507, "InsufficientStorage")


def delay(seconds: float) -> Fault:
    """Wait, then do as asked."""
    return Fault("delay", seconds=seconds)


def cut_request(after: int) -> Fault:
    """Reset both connections after so many bytes of the request's body: an upload that breaks under way."""
    return Fault("cut-request", after=after)


def cut_response(after: int) -> Fault:
    """Reset the client's connection after so many bytes of the response's body: a download that breaks under way."""
    return Fault("cut-response", after=after)


def drop_answer() -> Fault:
    """Let the server do it, then close the connection without a word: the client cannot know."""
    return Fault("drop-answer")


def refuse() -> Fault:
    """Reset the connection before anything is passed on."""
    return Fault("refuse")


def stall(seconds: float = 3600.0) -> Fault:
    """Read nothing more and answer nothing for so long, with the connection open; then reset it."""
    return Fault("stall", seconds=seconds)


def flip(at: int = 0) -> Fault:
    """Change one bit of the request's body at this byte, or of its last byte if it is shorter."""
    return Fault("flip", after=at)


def trickle(seconds: float) -> Fault:
    """Pass the response's body on one byte at a time, with so many seconds between."""
    return Fault("trickle", seconds=seconds)


Plan = Callable[[Request], Fault | None]


@dataclass
class Rule:
    """Hit some requests.

    Attributes:
        fault: what happens to them.
        operation: as `Request.operation`; None: any.
        path: regular expression searched in the path.
        times: how many requests to hit; None: all.
        skip: how many that match to let pass first.
    """

    fault: Fault
    operation: str | None = None
    path: str = ""
    times: int | None = 1
    skip: int = 0

    def hits(self, request: Request) -> bool:
        """Whether this request is hit; counts it if so."""
        if self.operation not in (None, request.operation) or not re.search(self.path, request.path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None:
            if not self.times:
                return False
            self.times -= 1
        return True


class Script:
    """A plan of rules: the first that hits decides. `Script(Rule(SLOW_DOWN, "write", times=2), …)`."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = list(rules)

    def __call__(self, request: Request) -> Fault | None:
        return next((rule.fault for rule in self.rules if rule.hits(request)), None)


@dataclass
class Storm:
    """A plan of faults at random, the same for the same seed whatever the order in which requests come.

    Attributes:
        seed: any number.
        rates: (fault, share of the requests that it hits); shares add up to 1 at most.
        operations: hit only these; empty: all.
        most: no request is hit more often than this in a row of being sent again, so that patience wins in the end.
    """

    seed: int
    rates: list[tuple[Fault, float]]
    operations: Iterable[str] = ()
    most: int = 4

    def __call__(self, request: Request) -> Fault | None:
        if (self.operations and request.operation not in self.operations) or request.nth % (self.most + 1) == self.most:
            return None
        digest = hashlib.sha256(f"{self.seed} {request.identity} {request.nth}".encode()).digest()
        draw = random.Random(digest).random()
        for fault, rate in self.rates:
            draw -= rate
            if draw < 0:
                return fault
        return None


class Reset(Exception):
    """Ends a connection abruptly."""


@dataclass
class Side:
    """One end of a connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def reset(self) -> None:
        """Close with RST where the system allows, so that the peer sees an error and not an end."""
        with suppress(OSError, AttributeError):
            sock = self.writer.get_extra_info("socket")
            sock.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")  # SOL_SOCKET, SO_LINGER, on for 0 s
        self.writer.transport.abort()


@dataclass
class Head:
    """First line and headers of a message, with its bytes."""

    raw: bytes
    first: list[str]
    headers: dict[str, str]

    @property
    def length(self) -> int:
        """Bytes of its body; -1: chunked or until the connection ends."""
        if "chunked" in self.headers.get("transfer-encoding", ""):
            return -1
        return int(self.headers.get("content-length", -1 if self.first[0].startswith("HTTP/") else 0))


async def read_head(side: Side) -> Head | None:
    """The next message's head, or None at the end of the connection."""
    try:
        raw = await side.reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    lines = raw.decode("latin-1").split("\r\n")
    pairs = [line.partition(":") for line in lines[1:] if line]
    return Head(raw, lines[0].split(" ", 2), {name.strip().lower(): value.strip() for name, _, value in pairs})


Touch = Callable[[int, bytes], bytes]


async def copy_body(source: Side, target: Side | None, head: Head, touch: Touch, slow: float = 0.0) -> None:
    """Pass a body on; `touch` sees each piece with its place, and may change it or raise."""
    place, left = 0, head.length
    chunked = "chunked" in head.headers.get("transfer-encoding", "")
    tail = b""
    while left != 0:
        size = 1 if slow else CHUNK
        data = await source.reader.read(size if left < 0 else min(size, left))
        if not data:
            if left > 0:
                raise Reset
            break
        sent = touch(place, data)
        if target is not None:
            target.writer.write(sent)
            await target.writer.drain()
        place += len(data)
        left -= len(data) if left > 0 else 0
        tail = (tail + data)[-5:]
        if chunked and tail.endswith(b"0\r\n\r\n"):
            break
        if slow:
            await asyncio.sleep(slow)


def untouched(place: int, data: bytes) -> bytes:
    """Pass on as it is."""
    return data


def cut_at(after: int, side: Callable[[], Side | None]) -> Touch:
    """Pass on so many bytes and then end the connection."""

    def touch(place: int, data: bytes) -> bytes:
        if place + len(data) > after:
            target = side()
            if target is not None:
                target.writer.write(data[: max(after - place, 0)])
            raise Reset
        return data

    return touch


def flip_at(at: int, length: int) -> Touch:
    """Change one bit of one byte."""
    at = min(at, length - 1) if length > 0 else at

    def touch(place: int, data: bytes) -> bytes:
        if place <= at < place + len(data):
            changed = bytearray(data)
            changed[at - place] ^= 1
            return bytes(changed)
        return data

    return touch


@dataclass
class FaultProxy:
    """The proxy, on a port of its own that stays the same, in a thread of its own.

    Attributes:
        target: the server's URL, `http://127.0.0.1:port`.
        plan: what to do to each request; may be replaced at any time.
        requests: how many of each operation came.
        injected: how many faults of each name were injected; "down" counts connections that were refused while down.
    """

    target: str
    plan: Plan = field(default=lambda request: None)
    requests: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._port, self._seen, self._total = 0, Counter[str](), 0
        self._open: set[Side] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def endpoint(self) -> str:
        """URL for the clients."""
        return f"http://127.0.0.1:{self._port}"

    def up(self) -> None:
        """Listen (again)."""
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)

    def down(self) -> None:
        """Refuse connections from now on, and reset those that are open."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=1 << 20)
            self._port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for side in list(self._open):
            side.reset()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        client = Side(reader, writer)
        server: Side | None = None
        try:
            parts = urlsplit(self.target)
            server = Side(*await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20))
            while (head := await read_head(client)) is not None:
                await self._exchange(client, server, head)
            writer.close()
        except (Reset, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            client.reset()  # also where the server itself is down
        finally:
            self._tasks.discard(task)
            if server is not None:
                server.reset()

    def _describe(self, head: Head) -> Request:
        method, target, _ = head.first
        url = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        found = Request(method, unquote(url.path), query, head.headers, head.length, self._total)
        found = Request(**{**vars(found), "nth": self._seen[found.identity]})
        self._seen[found.identity] += 1
        self._total += 1
        self.requests[found.operation] += 1
        return found

    async def _exchange(self, client: Side, server: Side, head: Head) -> None:
        """One request and its answer."""
        request = self._describe(head)
        fault = self.plan(request)
        if fault is not None:
            self.injected[fault.name] += 1
        kind = fault.kind if fault else None
        if fault is None:
            pass
        elif kind == "answer":
            await self._answer(client, head, fault)
            return
        elif kind == "refuse":
            raise Reset
        elif kind in ("delay", "stall"):
            await asyncio.sleep(fault.seconds)
            if kind == "stall":
                raise Reset
        server.writer.write(head.raw)
        touch = untouched
        if fault and kind == "cut-request":
            touch = cut_at(fault.after, lambda: server)
        elif fault and kind == "flip":
            touch = flip_at(fault.after, head.length)
        sending = asyncio.create_task(copy_body(client, server, head, touch))
        answering = asyncio.create_task(self._pass_answer(client, server, head.first[0], fault))
        try:
            await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_EXCEPTION)
            for task in (sending, answering):
                if task.done():
                    task.result()
            if not sending.done():
                raise Reset
        finally:
            sending.cancel()
            answering.cancel()

    async def _answer(self, client: Side, head: Head, fault: Fault) -> None:
        if "expect" in head.headers:
            client.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await copy_body(client, None, head, untouched)  # else the client may see a reset and not the answer
        body = f'<?xml version="1.0"?><Error><Code>{fault.code}</Code><Message>injected {fault.code}</Message></Error>'
        if head.first[0] == "HEAD":
            body = ""
        first = f"HTTP/1.1 {fault.status} {fault.code}\r\nContent-Type: application/xml\r\n"
        client.writer.write(f"{first}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        await client.writer.drain()

    async def _pass_answer(self, client: Side, server: Side, method: str, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        while True:
            head = await read_head(server)
            if head is None:
                raise Reset
            preliminary = head.first[1].startswith("1")  # 100 Continue
            if preliminary or kind != "drop-answer":
                client.writer.write(head.raw)
            if not preliminary:
                break
        touch = cut_at(fault.after, lambda: client) if fault and kind == "cut-response" else untouched
        if method != "HEAD" and head.first[1] not in ("204", "304"):
            target = None if kind == "drop-answer" else client
            try:
                await copy_body(server, target, head, touch, fault.seconds if fault and kind == "trickle" else 0.0)
            except Reset:
                await client.writer.drain()
                await asyncio.sleep(LINGER_SECONDS)  # so that what was sent arrives before the reset
                raise
        await client.writer.drain()
        if kind == "drop-answer":
            raise Reset
