"""`rlhf status` and `rlhf logs --follow` on a job that really runs and dies, and on a real S3 server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import stored
from commands import rlhf

from flows import follow, status_cli
from rlhf_core.artifacts import make_ref
from rlhf_core.lease import Heartbeat
from rlhf_core.status import Status
from rlhf_core.store import Store

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# A scheduler's part in one job, with fake_stage for the training.
SCHEDULER = """
import sys
from rlhf_core import joblog
from rlhf_core.artifacts import make_ref
from rlhf_core.job import JobSpec
from rlhf_core.launch import run_job
from rlhf_core.lease import acquire
from rlhf_core.resources import Resources
from rlhf_core.store import Store

joblog.LOCAL_SECONDS = 0.3
store, ref = Store(sys.argv[1]), make_ref("data", "real", {}, {})
job = JobSpec(
    stage="data", store=store.url, output=ref, attempt=1, job_id="", spec={"behave": sys.argv[2]}, identity={},
    resources=Resources(threads=1, retry_delay_seconds=0),
)
with acquire(store, job.model_copy(update={"job_id": job.family + str(sys.argv[3])})) as lease:
    run_job(store, lease, module="fake_stage")
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setattr(status_cli, "SECONDS", 0.0)  # nobody waits to be told that there is no server


@pytest.fixture
def schedule(tmp_path):
    """Starts schedulers in processes of their own."""
    started: list[subprocess.Popen] = []

    def schedule(store: Store, behave: str) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
        environment |= {"RLHF_LEASE_BEAT": "0.3", "RLHF_SCRATCH": str(tmp_path), "TMPDIR": str(tmp_path)}
        argv = [sys.executable, "-c", SCHEDULER, store.url, behave, str(len(started))]
        started.append(subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL))
        return started[-1]

    yield schedule
    for process in started:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def until(condition, seconds: float = 30):
    end = time.monotonic() + seconds
    while not (answer := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    assert answer
    return answer


def test_a_job_is_seen_to_run_to_die_with_its_scheduler_and_to_run_again_and_its_log_is_followed(
    tmp_path, schedule, capfd, monkeypatch
):
    store, id = Store(str(tmp_path / "store")), make_ref("data", "real", {}, {}).id
    monkeypatch.setattr(follow, "LOCAL_SECONDS", 0.1)
    status = Status(store)
    first = schedule(store, "progress for ever")
    sight = until(lambda: next((s for s in status.look() if s.state == "running" and s.event.get("step", 0) > 3), None))
    assert (sight.id, sight.attempt, sight.hosts) == (id, 1, (os.uname().nodename,))
    assert sight.event["total"] == 10**6 and sight.age is not None
    assert until(lambda: [s.eta for s in status.look() if s.eta]), "known once some progress is in the stored log"
    first.kill()
    first.wait()
    seen = until(lambda: next((s for s in status.look() if s.state == "stopped"), None))
    assert seen.note == f"its process on {os.uname().nodename} (pid {first.pid}) is gone"

    codes: list[int] = []
    following = threading.Thread(
        target=lambda: codes.append(rlhf(capfd, "logs", id, "--follow", "--store", store.url)[0])
    )
    following.start()
    second = schedule(store, "wrong configuration")
    following.join(60)
    assert second.wait(60) and codes == [2], "the code of a failure that no other attempt helps"
    seen = status.look()[0]
    assert (seen.state, seen.attempt) == ("failed", 2) and "optim.lr: 0 must be positive" in seen.note


def test_on_s3_a_watch_reads_the_heartbeat_alone_and_a_followed_log_only_what_is_new(bucket, capfd, monkeypatch):
    store = Store(bucket)
    made = stored.pipeline(store)
    job = stored.begin(store, ref := make_ref("ppo", "demo", {"mark": "new"}, {}), created=stored.ago(minutes=1))
    fields = {"owner": "1", "host": "node7", "boot_id": "another", "pid": 7, "pid_started": 1, "began": "", "beat": 1}

    def beat(step: int, ended: str | None = None) -> None:
        said = Heartbeat.model_validate(
            {**fields, "time": stored.ago(seconds=0), "step": step, "total": 9, "ended": ended}
        )
        store.write(f"{job.folder}/heartbeat.json", said.model_dump_json().encode())

    beat(1)
    status = Status(store)
    assert [sight.state for sight in status.look()] == ["published"] * 4 + ["running"]
    before = status.lists, status.reads
    beat(2)
    assert status.look()[-1].event["step"] == 2
    assert (status.lists, status.reads) == (before[0], before[1] + 1)
    code, out, _ = rlhf(capfd, "status", "--store", store.url, "--json")
    assert code == 0 and {one["artifact"] for one in json.loads(out)["stages"]} == {
        *(m.ref.id for m in made.values()),
        ref.id,
    }

    monkeypatch.setattr(follow, "REMOTE_SECONDS", 0.2)
    asked: list[tuple[int, int | None]] = []
    read = Store.read

    def noted(self: Store, key: str, start: int = 0, stop: int | None = None) -> bytes:
        if key.endswith(".log"):
            asked.append((start, stop))
        return read(self, key, start, stop)

    monkeypatch.setattr(Store, "read", noted)
    lines = [f"2026-01-01T00:00:0{n}.000Z line {n}\n" for n in range(3)]
    store.write(f"{job.folder}/rank-000.log", lines[0].encode())

    def go_on() -> None:
        until(lambda: asked)
        store.write(f"{job.folder}/rank-000.log", "".join(lines).encode())
        beat(9, ended="Terminated")

    monkeypatch.setattr("rlhf_core.follow.BETWEEN_SECONDS", -10.0)
    other = threading.Thread(target=go_on)
    other.start()
    code, out, _ = rlhf(capfd, "logs", ref.id, "--follow", "--store", store.url)
    other.join()
    size = len(lines[0])
    assert asked == [(0, size), (size, 3 * size)]
    assert code == 75 and [line.split()[-1] for line in out.splitlines()] == ["0", "1", "2"]
