"""A local stack for tests, as a person has it: the command line in a folder, the calls that the UI makes, and blows."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.stack import Stack
from rlhf_core import guard
from rlhf_core.artifacts import Manifest, read_manifest
from rlhf_core.checkpoints import newest
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.plan import stage_refs
from rlhf_core.store import Store

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("stack.yaml")
WAIT_SECONDS = 300


class Stacked:
    """The stack of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stack = Stack(folder / ".rlhf")
        self.store = Store(f"file://{folder}/.rlhf/store")
        gone = ("PREFECT_API_URL", "PREFECT_HOME", "RLHF_TERMINAL")
        kept = {name: value for name, value in os.environ.items() if name not in gone}
        lease = {"RLHF_LEASE_BEAT": "1", "RLHF_LEASE_TTL": "6"}
        self.env = {**kept, "PYTHONPATH": self.path(), "OMP_NUM_THREADS": "1", **lease}

    @staticmethod
    def path() -> str:
        """PYTHONPATH by which a process finds this tree."""
        return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

    def rlhf(self, *words: str, code: int = 0, seconds: float = 400) -> str:
        """Run a command in the folder; what it said."""
        command = [sys.executable, "-m", "flows.cli", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    # --- the server's API --------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.stack.api()}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read() or b"null")

    def deployment(self, name: str) -> str:
        return self.call("GET", f"/deployments/name/{name}")["id"]

    def start(self, *overrides: str, deployment: str = "rlhf/pipeline") -> str:
        """What *Run* on a deployment's page does; the run's id."""
        body = {
            "parameters": {"config_file": str(CONFIG), "overrides": list(overrides)},
            "state": {"type": "SCHEDULED"},
        }
        return self.call("POST", f"/deployments/{self.deployment(deployment)}/create_flow_run", body)["id"]

    def set_state(self, run: str, type: str, name: str, **details: Any) -> None:
        """What the UI's buttons do."""
        state = {"type": type, "name": name, "state_details": details}
        answer = self.call("POST", f"/flow_runs/{run}/set_state", {"state": state})
        assert answer["status"] == "ACCEPT", answer

    def state(self, run: str) -> str:
        return self.call("GET", f"/flow_runs/{run}")["state"]["name"]

    def starts(self, run: str) -> int:
        return self.call("GET", f"/flow_runs/{run}")["run_count"]

    def message(self, run: str) -> str:
        return self.call("GET", f"/flow_runs/{run}")["state"]["message"] or ""

    def tasks(self, run: str) -> dict[str, str]:
        """The state of each stage's newest task."""
        body = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return {task["name"]: task["state_name"] for task in self.call("POST", "/task_runs/filter", body)}

    def artifacts(self, run: str) -> list[dict[str, Any]]:
        """What the run reports, the newest of each key last."""
        body = {"flow_runs": {"id": {"any_": [run]}}, "sort": "UPDATED_DESC"}
        return self.call("POST", "/artifacts/filter", body)[::-1]

    def wait_for_state(self, run: str, *names: str, seconds: float = WAIT_SECONDS) -> float:
        """The seconds until the run is in one of the states."""
        return wait(lambda: self.state(run) in names, lambda: f"{self.state(run)}: {self.message(run)}", seconds)

    # --- jobs --------------------------------------------------------------------------------------------------------

    def config(self, *overrides: str) -> PipelineConfig:
        return load_config(CONFIG, overrides)

    def manifest(self, stage: str, *overrides: str, store: Store | None = None) -> Manifest | None:
        return read_manifest(store or self.store, stage_refs(self.config(*overrides))[stage])

    def step(self, stage: str, *overrides: str) -> int:
        """The step of the newest checkpoint of a stage that is not finished; 0 if it has none."""
        found = newest(self.store, stage_refs(self.config(*overrides))[stage])
        return found.position.step if found else 0

    def place(self, stage: str, *overrides: str) -> str:
        """The position of the newest checkpoint of a stage that is not finished, as it is told to people."""
        found = newest(self.store, stage_refs(self.config(*overrides))[stage])
        assert found, f"{stage} has no checkpoint"
        return str(found.position)

    def resumed(self, stage: str, *overrides: str) -> list[str]:
        """Where the attempts at a finished stage were taken up."""
        manifest = self.manifest(stage, *overrides)
        assert manifest, f"{stage} is not published"
        return [entry["from"] for entry in manifest.provenance["job"]["resumed"]]

    def wait_for_step(self, step: int, stage: str, *overrides: str) -> None:
        wait(lambda: self.step(stage, *overrides) >= step, lambda: f"{stage} at {self.step(stage, *overrides)}")

    def ranks(self) -> list[int]:
        return [pid for pid in self.stack.processes() if guard.variable(pid, "RANK") is not None]

    def jobs(self) -> list[int]:
        """All processes of jobs."""
        return [pid for pid in self.stack.processes() if guard.variable(pid, "RLHF_JOB_ID") is not None]

    def part(self, name: str) -> int:
        part = self.stack.part(name)  # pyright: ignore
        assert part and self.stack.lives(part)
        return part.pid


def wait(check: Callable[[], bool], what: Callable[[], str], seconds: float = WAIT_SECONDS) -> float:
    """The seconds until `check` is true."""
    began = time.monotonic()
    while not check():
        assert time.monotonic() - began < seconds, f"still not after {seconds} s: {what()}"
        time.sleep(0.2)
    return time.monotonic() - began


def kill(*pids: int, signo: int = signal.SIGKILL) -> None:
    for pid in pids:
        guard.send(pid, signo)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
