"""News of runs, sent by a real Prefect server to a real HTTP and a real SMTP receiver."""

import json
import os
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from stacked import Stacked, free_port, kill, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILE = """
channels:
  hook: {webhook: $RLHF_TEST_HOOK, headers: {Authorization: Bearer $RLHF_TEST_TOKEN}}
  mail: {message: $RLHF_TEST_MAIL}
tell:
  failed: [hook, mail]
  crashed: [hook]
  gate: [hook, mail]
"""
GATE = """
from prefect import flow, get_run_logger
from prefect.events import emit_event
from prefect.runtime import flow_run

@flow(name="rlhf", flow_run_name="gated")
def rlhf():
    run = {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}
    emit_event(event="rlhf.gate.fired", resource={"prefect.resource.id": "rlhf.stage.ppo"}, related=[run],
               payload={"text": "ppo: kl_sequence 12 is above 10", "stage": "ppo"})
rlhf()
"""


class Hook(BaseHTTPRequestHandler):
    heard: list[tuple[dict, str | None]] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.heard.append((json.loads(body), self.headers["Authorization"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


class Mail(socketserver.StreamRequestHandler):
    heard: list[str] = []

    def handle(self):
        self.say("220 here")
        while line := self.rfile.readline().decode().strip():
            if line.upper() == "DATA":
                self.say("354 go on")
                text = ""
                while (row := self.rfile.readline().decode()) != ".\r\n":
                    text += row
                self.heard.append(text)
            self.say("250 well")
            if line.upper() == "QUIT":
                return

    def say(self, text: str):
        self.wfile.write(f"{text}\r\n".encode())


@pytest.fixture
def receivers():
    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    mail = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mail)
    for server in (hook, mail):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "RLHF_TEST_HOOK": f"http://127.0.0.1:{hook.server_port}/news",
        "RLHF_TEST_TOKEN": "a-secret-token",
        "RLHF_TEST_MAIL": f"mailto://127.0.0.1:{mail.server_address[1]}?from=rlhf@example.org&to=team@example.org&mode=insecure",
    }
    for server in (hook, mail):
        server.shutdown()
        server.server_close()


def test_a_failed_run_and_a_gate_are_told_by_webhook_and_mail_and_no_secret_is_in_the_open(tmp_path, receivers):
    stacked = Stacked(tmp_path)
    file = tmp_path / "notifications.yaml"
    file.write_text(FILE)
    try:
        stacked.rlhf("up", "--port", str(free_port()))
        stacked.env |= {"PREFECT_API_URL": stacked.stack.api(), "PREFECT_HOME": str(stacked.stack.home)}
        assert "$RLHF_TEST_TOKEN is not set" in stacked.rlhf("automations", "--notify", str(file), code=2)
        stacked.env |= receivers
        said = stacked.rlhf("automations", "--notify", str(file))
        assert "rlhf-notify-failed-hook: created" in said and "rlhf-notify-gate-mail: created" in said
        assert "rlhf-notify-failed-hook: there already" in stacked.rlhf("automations", "--notify", str(file))

        body = {"parameters": {"config_file": str(tmp_path / "none.yaml")}, "state": {"type": "SCHEDULED"}}
        deployment = stacked.deployment("rlhf/pipeline")
        run = stacked.call("POST", f"/deployments/{deployment}/create_flow_run", body)
        stacked.wait_for_state(run["id"], "Failed")
        wait(lambda: bool(Hook.heard and Mail.heard), lambda: f"{Hook.heard} {Mail.heard}")
        news, authorization = Hook.heard[-1]
        assert authorization == "Bearer a-secret-token"
        assert news["event"] == "failed" and news["run_id"] == run["id"] and "none.yaml" in news["text"]
        assert run["id"] in news["url"]
        assert "failed" in Mail.heard[-1] and "none.yaml" in Mail.heard[-1]

        told = len(Hook.heard), len(Mail.heard)
        subprocess.run([sys.executable, "-c", GATE], env={**os.environ, **stacked.env}, check=True, timeout=120)
        wait(lambda: (len(Hook.heard), len(Mail.heard)) > told and len(Mail.heard) > told[1], lambda: str(Hook.heard))
        assert Hook.heard[-1][0]["text"] == "ppo: kl_sequence 12 is above 10"
        assert Hook.heard[-1][0]["gate"]["stage"] == "ppo"
        assert "kl_sequence 12" in Mail.heard[-1]

        everything = b"".join(path.read_bytes() for path in Path(tmp_path, ".rlhf").rglob("*") if path.is_file())
        assert b"a-secret-token" not in everything, "the token lies in the open"
        file.write_text("channels: {hook: {webhook: $RLHF_TEST_HOOK}}\ntell: {failed: [hook]}")
        assert "rlhf-notify-gate-mail: removed" in stacked.rlhf("automations", "--notify", str(file))
    finally:
        stacked.rlhf("down")
        left = stacked.stack.processes()
        kill(*left)
        assert not left, "rlhf down has left processes"
