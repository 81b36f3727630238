"""A rank that is told to end: real signals to real processes, a real HTTP server that answers as the clouds' do."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf_core.preemption import answers

# Says why it is to end, when it is; `quick` makes the looks at the notice frequent.
RANK = """
import sys, time
from rlhf_core import preemption
preemption.FILE_SECONDS = preemption.URL_SECONDS = 0.05
preemption.install(sys.argv[1] or None)
print("up", flush=True)
while not preemption.requested():
    time.sleep(0.01)
print(preemption.requested(), flush=True)
if sys.argv[2:] == ["uninstall"]:
    preemption.uninstall()
    print("uninstalled", flush=True)
time.sleep(float("inf") if sys.argv[2:] else 1)
print(preemption.requested(), flush=True)
"""


@pytest.fixture
def rank() -> Iterator:
    started = []

    def start(notice="", *words, **environment):
        argv = [sys.executable, "-c", RANK, str(notice), *words]
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )
        started.append(process)
        assert process.stdout.readline() == "up\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


class Service(ThreadingHTTPServer):
    """A metadata service; `answer(method, path, headers)` gives status and body."""

    def __init__(self, answer):
        class Handler(BaseHTTPRequestHandler):
            def reply(self):
                status, body = answer(self.command, self.path, self.headers)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = reply

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/latest/meta-data/spot/instance-action"


@pytest.fixture
def service():
    running = []

    def start(answer):
        server = Service(answer)
        running.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signo", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_reason_and_ends_nothing_and_a_second_one_is_ignored(rank, signo):
    process = rank()
    process.send_signal(signo)
    reason = f"received {signo.name}\n"
    assert process.stdout.readline() == reason
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[0] == reason
    assert process.returncode == 0


def test_uninstalled_a_signal_ends_the_rank_again(rank):
    process = rank("", "uninstall")
    process.terminate()
    assert [process.stdout.readline() for _ in range(2)] == ["received SIGTERM\n", "uninstalled\n"]
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


# --- the notice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_that_appears_is_a_notice(rank, tmp_path, scheme):
    process = rank(f"{scheme}{tmp_path}/notice")
    (tmp_path / "notice").touch()
    assert process.stdout.readline() == f"notice at {scheme}{tmp_path}/notice\n"


def test_every_rank_watches_since_none_may_keep_the_others_waiting(rank, tmp_path):
    second = rank(tmp_path / "notice", LOCAL_RANK="1")
    (tmp_path / "notice").touch()
    assert second.stdout.readline() == f"notice at {tmp_path}/notice\n"


def test_a_url_is_asked_until_it_answers(rank, service):
    asked = []
    server = service(lambda *request: (asked.append(request), (404, "") if len(asked) < 4 else (200, "{}"))[1])
    assert rank(server.url, http_proxy="http://127.0.0.1:9").stdout.readline() == f"notice at {server.url}\n"
    assert len(asked) == 4


def test_a_service_that_fails_is_told_once_and_asked_on(rank, service):
    asked = []
    server = service(lambda *request: (asked.append(request), (500, "") if len(asked) < 6 else (200, "{}"))[1])
    process = rank(server.url)
    assert process.stdout.readline() == f"notice at {server.url}\n"
    process.kill()
    assert process.communicate()[1].count("cannot be asked for: HTTP Error 500") == 1


@pytest.mark.parametrize(
    ("body", "given"), [("FALSE", False), ("NONE\n", False), ("TRUE", True), ("TERMINATE_ON_HOST_MAINTENANCE", True)]
)
def test_google_answers_from_the_beginning_and_wants_its_header(service, body, given):
    server = service(lambda method, path, headers: (200, body) if headers["Metadata-Flavor"] == "Google" else (403, ""))
    assert answers(server.url) == given


@pytest.mark.parametrize("given", [False, True])
def test_amazon_may_want_a_token_first(service, given):
    def answer(method, path, headers):
        if (method, path) == ("PUT", "/latest/api/token"):
            return 200, f"token for {headers['X-aws-ec2-metadata-token-ttl-seconds']}"
        if headers["X-aws-ec2-metadata-token"] != "token for 60":
            return 401, ""
        return (200, '{"action": "terminate"}') if given else (404, "")

    assert answers(service(answer).url) == given


# The main thread is inside C, where no handler of Python's can run.
STUCK = """
import ctypes
from rlhf_core import preemption
preemption.install()
print("up", flush=True)
while True:
    ctypes.CDLL(None).poll(None, 0, -1)
"""


def stuck(folder, guarded: bool) -> subprocess.Popen:
    """A rank whose main thread is inside C and comes back only to go in again."""
    guard = {"RLHF_GUARD_PID": "1", "RLHF_SCRATCH": str(folder)} if guarded else {}
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True, env={**os.environ, **guard}
    )
    assert process.stdout.readline() == "up\n"
    return process


def test_a_rank_that_its_launcher_ends_because_another_died_ends_at_once(tmp_path):
    process = stuck(tmp_path, guarded=True)
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM


def test_a_rank_that_its_guard_tells_to_end_waits_for_its_next_point(tmp_path):
    (tmp_path / "told").touch()
    process = stuck(tmp_path, guarded=True)
    process.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)
    process.kill()
    process.wait()
