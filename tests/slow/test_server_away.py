"""Reporting while the Prefect server is killed and started again on the same database and port: nothing waits, nothing is lost."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

AWAY_SECONDS = 20.0
PROGRAM = """
import json, sys, time
from prefect import flow, get_run_logger, task
from rlhf_core.config import parse_config
from rlhf_core.plan import make_plan
from rlhf_core.resources import Resources
from rlhf_core.store import Store
from tasks import progress as reporting
from tasks.events import emit

reporting.REPORT_SECONDS = 1.0
seconds, config = float(sys.argv[1]), parse_config(json.loads(sys.argv[2]))

@task
def stage():
    log, store = get_run_logger(), Store(config.store)
    planned = next(p for p in make_plan(config, store) if p.stage == "sft")
    longest, began, step = 0.0, time.monotonic(), 0
    with reporting.Progress(store, planned, Resources(), log) as progress:
        while (now := time.monotonic()) - began < seconds:
            step += 1
            progress.on_event({"step": step, "total": step + 1, "unit": "step", "phase": "train", "metrics": {"loss": 1 / step}})
            emit("started", planned, log)
            longest = max(longest, time.monotonic() - now)
            if step == 20:
                print("going", flush=True)
            time.sleep(0.1)
        progress.on_event({"step": step, "total": step, "unit": "step", "phase": "train", "metrics": {"loss": 1 / step}})
    print(f"step={step} longest={longest:.3f}", flush=True)

@flow(name="away")
def away():
    stage()

away()
"""


@pytest.mark.slow
def test_a_stage_that_loses_the_server_neither_waits_nor_fails_and_its_report_is_complete_at_the_end(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": url, "DO_NOT_TRACK": "1"}
    environment |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}

    def serve() -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(
            argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        until = time.monotonic() + 120
        while time.monotonic() < until and server.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                return server
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError("no server")

    def kill(server: subprocess.Popen[bytes]) -> None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()

    config = {"name": "away", "store": f"file://{tmp_path}/store", "model": {"family": "opt"},
              "data": {"sources": [{"kind": "quickstart", "prompts": 50}], "tokenizer": {"train_vocab_size": 300},
                       "max_prompt_tokens": 32, "max_response_tokens": 32}}  # fmt: skip
    server = serve()
    run = None
    try:
        argv = [sys.executable, "-c", PROGRAM, str(AWAY_SECONDS + 50), json.dumps(config)]
        run = subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert run.stdout is not None
        before = ""
        while "going" not in before:
            line = run.stdout.readline()
            assert line, before
            before += line
        kill(server)
        time.sleep(AWAY_SECONDS)
        server = serve()
        out, _ = run.communicate(timeout=300)
        assert run.returncode == 0, before + out
        told = re.search(r"step=(\d+) longest=([\d.]+)", out)
        assert told, out
        assert float(told[2]) < 5, "the caller of on_event waited for the server"
        query = urllib.request.Request(f"{url}/artifacts/filter", b"{}", {"content-type": "application/json"})
        artifacts = json.loads(urllib.request.urlopen(query, timeout=30).read())
        progress = [a for a in artifacts if a["key"] == "rlhf-sft-progress"]
        reports = [a for a in artifacts if a["key"] == "rlhf-sft-report"]
        assert len(progress) == len(reports) == 1
        assert f"train step {told[1]}/{told[1]}" in reports[0]["data"] and "![loss]" in reports[0]["data"]
        print(f"away {AWAY_SECONDS:.0f} s: longest call {told[2]} s, report whole at step {told[1]}")
    finally:
        if run and run.poll() is None:
            run.kill()
            run.wait()
        if server.poll() is None:
            kill(server)
