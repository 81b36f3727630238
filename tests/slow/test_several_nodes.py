"""The quickstart on two hosts over ssh, and a hundred launches in a row: what must hold of jobs beyond one machine.

Hosts are network namespaces (`hosts.py`; needs root) with nothing in common but the installed software; the store is an S3 server.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest
from hosts import Hosts
from s3 import S3Server

from rlhf_core import guard, launch, lease
from rlhf_core.artifacts import ArtifactRef, read_manifest
from rlhf_core.config import load_config
from rlhf_core.job import JobSpec
from rlhf_core.plan import make_plan
from rlhf_core.resources import Resources
from rlhf_core.store import Store

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "deployments" / "configs" / "quickstart.yaml"
LAUNCHES = 100
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def run(store: Store, *sets: str) -> dict[str, list[dict[str, float]]]:
    """Run the quickstart to its end; the logged metrics of its stages."""
    words = (f"store={store.url}", *sets)
    options = [word for text in words for word in ("--set", text)]
    command = [str(Path(sys.executable).with_name("rlhf")), "run", str(QUICKSTART), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for planned in make_plan(load_config(str(QUICKSTART), words), store):
        manifest = read_manifest(store, planned.ref)
        assert manifest
        if "metrics.jsonl" in {entry.path for entry in manifest.files}:
            rows = store.read(manifest.key("metrics.jsonl")).decode().splitlines()
            found[planned.stage] = [json.loads(row) for row in rows]
    return found


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [value for row in rows for name, value in row.items() if "loss" in name]


def test_the_quickstarts_stages_over_two_hosts_give_the_losses_of_two_processes(
    hosts: Hosts, hosts_s3: S3Server, tmp_path
):
    here = run(Store(f"file://{tmp_path}/store"))
    cluster = {"hosts": [{"host": "node1"}, {"host": "node2"}], "ssh": list(hosts.ssh)}
    there = run(
        Store(f"s3://rlhf/{uuid.uuid4().hex[:12]}"),
        "resources.launcher=hostfile",
        "resources.processes=1",
        f"resources.cluster={json.dumps(cluster)}",
    )
    for stage in ("sft", "reward", "ppo"):
        assert len(losses(here[stage])) > 40, stage
        assert losses(there[stage]) == pytest.approx(losses(here[stage]), rel=1e-4, abs=1e-6), stage


def listening() -> set[int]:
    """TCP ports on which something listens here."""
    rows = [line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A"}


def test_a_hundred_launches_end_well_and_leave_nothing(tmp_path, monkeypatch):
    (local := tmp_path / "local").mkdir()
    monkeypatch.setenv("TMPDIR", str(local))
    monkeypatch.setattr(tempfile, "tempdir", str(local))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "integration"))
    store = Store(f"file://{tmp_path}/store")
    ports, files = listening(), len(os.listdir("/proc/self/fd"))
    seconds = []
    for number in range(LAUNCHES):
        ref = ArtifactRef(stage="sft", name="again", fingerprint=hashlib.sha256(str(number).encode()).hexdigest())
        job = JobSpec(
            stage="sft",
            store=store.url,
            output=ref,
            attempt=1,
            job_id="",
            spec={"behave": "succeed"},
            identity={},
            resources=Resources(processes=2, threads=1),
        )
        job = job.model_copy(update={"job_id": f"{job.family}{uuid.uuid4().hex}"})
        began = time.monotonic()
        with lease.acquire(store, job) as held:
            assert launch.run_job(store, held, module="fake_stage").job_id == job.job_id
        seconds.append(time.monotonic() - began)
        assert not guard.processes_of(job.family), f"launch {number}"
        assert not [name for name in os.listdir(local) if name.startswith("rlhf-job-")], f"launch {number}"
    print(f"{LAUNCHES} launches, median {sorted(seconds)[LAUNCHES // 2]:.1f} s, longest {max(seconds):.1f} s")
    assert os.listdir(local) == [] or all(name.startswith("torchinductor") for name in os.listdir(local))
    with socket.socket():
        assert len(os.listdir("/proc/self/fd")) <= files + 3, "open files grow with launches"
    assert not {p for p in listening() - ports if p in launch.PORTS}, "a port was left open"
