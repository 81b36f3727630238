"""A Prefect server for one command: the one that is configured, or a temporary one started here.

Prefect's own temporary server makes the client import the whole server first (3 s), has no UI, and dies of the same
Ctrl-C as the run it is to record. So without PREFECT_API_URL this starts `prefect server start` on a free port, in a
session of its own, while the caller goes on; its UI is up as long as the command runs, and its database is the user's
usual one. Also sets the defaults that Prefect reads when it is imported: so nothing here imports Prefect at module
level.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.settings import OFFLINE
from flows.stack import Stack
from rlhf_core.errors import RlhfError

STARTUP_SECONDS = 120
DRAIN_SECONDS = 10
PR_SET_PDEATHSIG = 1

DEFAULTS = {
    **OFFLINE,
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(STARTUP_SECONDS),
}

# A server that lives for one run schedules nothing and must not disturb others on the same database.
IDLE_SERVICES = (
    "CANCELLATION_CLEANUP",
    "CLEANUP_RECONCILER",
    "FOREMAN",
    "LATE_RUNS",
    "PAUSE_EXPIRATIONS",
    "REPOSSESSOR",
    "SCHEDULER",
    "TRIGGERS",
)


class ServerError(RlhfError):
    """The Prefect server cannot be started or reached."""


def configured_server() -> str | None:
    """The API URL of the environment, of this folder's stack (`rlhf up`), or of the active Prefect profile, or None."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if "PREFECT_API_URL" not in os.environ and (local := Stack().api()):
        os.environ["PREFECT_API_URL"] = local
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


@contextmanager
def prefect_session() -> Iterator[str]:
    """Have a Prefect server for the time of a `with` block; yields its API URL.

    Raises:
        ServerError: the configured server does not answer, or a temporary one does not start.
    """
    if configured := configured_server():
        _require_answer(configured)
        yield configured
        return
    server, log = _start_server(port := _free_port())
    try:
        url = f"http://127.0.0.1:{port}/api"
        with _settings_of(url):
            import tasks.stage  # noqa: F401  # takes a second that the server needs anyway

            _wait_until_up(server, url, log)
            try:
                yield url
            finally:
                _send_the_rest()
    finally:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.unlink(missing_ok=True)


@contextmanager
def _settings_of(url: str) -> Iterator[None]:
    """Point this process, its threads and its children at a temporary server."""
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    os.environ["PREFECT_API_URL"] = url
    refresh_global_settings_context()  # threads begin with the global settings, not with those of `with`
    try:
        # Nobody watches the heartbeat of a run on a temporary server, and ending its thread costs a second.
        with temporary_settings({PREFECT_API_URL: url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield
    finally:
        del os.environ["PREFECT_API_URL"]


def _send_the_rest() -> None:
    """Send queued logs and events (task states travel as events) while the server is still there."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=DRAIN_SECONDS)


def _require_answer(url: str) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        reason = str(error) or type(error).__name__
        raise ServerError(
            f"the Prefect server at {url} does not answer ({reason}); start it with `prefect server start`, or unset "
            "PREFECT_API_URL to run with a temporary one"
        )


def _start_server(port: int) -> tuple[subprocess.Popen[bytes], Path]:
    handle, name = tempfile.mkstemp(prefix="rlhf-prefect-", suffix=".log")
    services = {f"PREFECT_SERVER_SERVICES_{service}_ENABLED": "false" for service in IDLE_SERVICES}
    libc = ctypes.CDLL(None)
    with os.fdopen(handle, "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **services, "PREFECT_SERVER_LOGGING_LEVEL": "ERROR"},
            start_new_session=True,  # Ctrl-C ends the run first, and its end is recorded
            preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),  # and never outlives this process
        )
    return server, Path(name)


def _wait_until_up(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    ended = server.poll()
    what = f"ended with code {ended}" if ended is not None else f"did not answer within {STARTUP_SECONDS} s"
    tail = "\n".join(f"  | {line}" for line in log.read_text(errors="replace").splitlines()[-12:])
    raise ServerError(
        f"the temporary Prefect server {what}; start one with `prefect server start` and set PREFECT_API_URL\n{tail}"
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
