"""How fast the store is on S3, beside what others do with the same server: `make bench-store`.

One file of 256 MiB and 64 of 1 MiB, up and down, by our `Store`, boto3's transfer manager, s3fs alone and, where it is installed,
obstore; on a server on this machine, plain and behind a proxy with the latency and the rate of one connection of a far one.
The contestants take turns, so that what else the machine does hits all; medians. What comes back is compared with what was sent.
"""

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3 import S3Server, free_ports

MIB = 1 << 20
SMALL_FILES, SMALL_AT_ONCE = 64, 8
ONE_WAY_SECONDS, CONNECTION_MIB_PER_SECOND = 0.015, 12


def far_server(port: int, target: int, delay: float, rate: float) -> None:
    """Serve as a proxy that delays each byte and limits each connection; runs in a process of its own."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop, queue, free_at = asyncio.get_running_loop(), asyncio.Queue[tuple[float, bytes]](256), 0.0

        async def send() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(due - loop.time(), 0))
                if not data:
                    writer.close()
                    return
                writer.write(data)
                await writer.drain()

        sending = asyncio.create_task(send())
        data = b"-"
        try:
            with suppress(OSError):
                while data:
                    data = await reader.read(128 << 10)
                    free_at = max(free_at, loop.time()) + len(data) / (rate * MIB)
                    await queue.put((free_at + delay, data))
                    await asyncio.sleep(max(free_at - loop.time() - 0.02, 0))
                await sending
        finally:
            sending.cancel()
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pass_on(reader, there[1]), pass_on(there[0], writer), return_exceptions=True)

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", port)
        await server.serve_forever()

    asyncio.run(main())


Verbs = tuple[Callable[[Path, str], Any], Callable[[str, Path], Any]]


def ours() -> Verbs:
    """The store of this project."""
    from rlhf_core.store import Store

    store = Store("s3://rlhf/bench")
    return store.upload, store.download


def boto3_transfers() -> Verbs:
    """boto3 with its transfer manager, parts as ours."""
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    client: Any = boto3.client("s3", config=Config(max_pool_connections=64))
    config = TransferConfig(multipart_chunksize=8 * MIB, max_concurrency=16)
    return (
        lambda path, key: client.upload_file(str(path), "rlhf", f"bench/{key}", Config=config),
        lambda key, path: client.download_file("rlhf", f"bench/{key}", str(path), Config=config),
    )


def s3fs_alone() -> Verbs:
    """s3fs with parts as ours; its defaults are slower behind latency."""
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False, config_kwargs={"max_pool_connections": 64})
    options = {"chunksize": 8 * MIB, "max_concurrency": 16}
    return (
        lambda path, key: fs.put_file(str(path), f"rlhf/bench/{key}", **options),
        lambda key, path: fs.get_file(f"rlhf/bench/{key}", str(path), **options),
    )


def s3fs_defaults() -> Verbs:
    """s3fs as it comes."""
    import s3fs

    fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
    return (
        lambda path, key: fs.put_file(str(path), f"rlhf/bench/{key}"),
        lambda key, path: fs.get_file(f"rlhf/bench/{key}", str(path)),
    )


def obstore_client() -> Verbs:
    """obstore, a client in Rust."""
    import obstore
    from obstore.store import S3Store

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    there: Any = S3Store("rlhf", endpoint=endpoint, region="us-east-1", client_options={"allow_http": True})

    def get(key: str, path: Path) -> None:
        with path.open("wb") as file:
            for piece in obstore.get(there, f"bench/{key}").stream(min_chunk_size=8 * MIB):
                file.write(piece)

    return lambda path, key: obstore.put(there, f"bench/{key}", path, chunk_size=8 * MIB, max_concurrency=16), get


CONTESTANTS = {
    "ours": ours,
    "boto3": boto3_transfers,
    "s3fs, 8 MiB x 16": s3fs_alone,
    "s3fs as it comes": s3fs_defaults,
    "obstore": obstore_client,
}


def available() -> dict[str, Verbs]:
    """Those that are installed."""
    found: dict[str, Verbs] = {}
    for name, make in CONTESTANTS.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"without {name}: {error}")
    return found


def timed(work: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sha256(path: Path) -> str:
    """Of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(folder: Path, size: int, repeats: int) -> dict[str, dict[str, float]]:
    """MiB/s, medians, by what is done and by whom."""
    large, back = folder / "large", folder / "back"
    large.write_bytes(os.urandom(size * MIB))
    small = [folder / f"small-{i}" for i in range(SMALL_FILES)]
    for path in small:
        path.write_bytes(os.urandom(MIB))
    verbs, rates = available(), dict[str, dict[str, list[float]]]()

    def note(what: str, who: str, mib: float, work: Callable[[], Any]) -> None:
        rates.setdefault(what, {}).setdefault(who, []).append(mib / timed(work))

    def turn(who: str, put: Callable[[Path, str], Any], get: Callable[[str, Path], Any]) -> None:
        note("PUT one", who, size, lambda: put(large, "large"))
        note("GET one", who, size, lambda: get("large", back))
        if sha256(back) != sha256(large):
            raise SystemExit(f"{who}: what came back is not what was sent")
        with ThreadPoolExecutor(SMALL_AT_ONCE) as pool:
            note("PUT many", who, SMALL_FILES, lambda: list(pool.map(lambda path: put(path, path.name), small)))
            note("GET many", who, SMALL_FILES, lambda: list(pool.map(lambda path: get(path.name, path), small)))

    names = list(verbs)
    for repeat in range(repeats + 1):
        if repeat == 1:
            rates.clear()  # the first round warms up
        for who in names[repeat % len(names) :] + names[: repeat % len(names)]:
            turn(who, *verbs[who])
    return {what: {who: statistics.median(found) for who, found in table.items()} for what, table in rates.items()}


def show(results: dict[str, dict[str, dict[str, float]]], size: int) -> None:
    """One table on the screen."""
    whos = list(dict.fromkeys(who for table in results.values() for row in table.values() for who in row))
    print(f"MiB/s, medians; one: {size} MiB, many: {SMALL_FILES} x 1 MiB in {SMALL_AT_ONCE} threads")
    print(f"{'':24}" + "".join(f"{who:>18}" for who in whos))
    for place, table in results.items():
        for what, row in table.items():
            print(f"{place + ', ' + what:24}" + "".join(f"{row.get(who, float('nan')):18.1f}" for who in whos))


def main() -> None:
    """Start a server, measure both ways to it, print and write the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--mib", type=int, default=256, help="size of the one large file")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--out", type=Path, default=Path("build/bench-store.json"))
    given = options.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        server = S3Server(folder / "server")
        server.folder.mkdir()
        [port] = free_ports(1)
        arguments = (port, server.ports["s3"], ONE_WAY_SECONDS, CONNECTION_MIB_PER_SECOND)
        proxy = multiprocessing.get_context("spawn").Process(target=far_server, args=arguments, daemon=True)
        try:
            server.start()
            proxy.start()
            for place, endpoint in (("near", server.endpoint), ("far", f"http://127.0.0.1:{port}")):
                os.environ.update({**server.environment, "AWS_ENDPOINT_URL": endpoint})
                import s3fs

                s3fs.S3FileSystem.clear_instance_cache()
                results[place] = measure(folder, given.mib, given.repeats)
        finally:
            server.kill9()
            proxy.kill()
    show(results, given.mib)
    about = {"machine": f"{os.cpu_count()} cores, {platform.platform()}", "mib": given.mib, "repeats": given.repeats}
    far = {"one_way_seconds": ONE_WAY_SECONDS, "mib_per_second_and_connection": CONNECTION_MIB_PER_SECOND}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({**about, "far": far, "mib_per_second": results}, indent=1))


if __name__ == "__main__":
    main()
