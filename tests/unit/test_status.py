"""`rlhf status`: what each artifact's state is, what a look costs, and how it is shown at any width. Records as jobs leave them."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import stored
from commands import rlhf, small_pipeline

from flows import prefect_runs, status_cli
from flows.show_status import status_lines
from rlhf_core import status as status_module
from rlhf_core.artifacts import ArtifactRef, Manifest, make_ref, publish
from rlhf_core.config import load_config
from rlhf_core.ends import Failure
from rlhf_core.job import JobSpec
from rlhf_core.lease import Heartbeat
from rlhf_core.plan import stage_refs
from rlhf_core.sealed import seal
from rlhf_core.status import Status
from rlhf_core.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_server(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(status_cli, "SECONDS", 0.0)  # nobody waits to be told that there is no server
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(tmp_path) -> Path:
    """A small pipeline with a store of its own."""
    return small_pipeline(tmp_path)


@pytest.fixture
def refs(file) -> dict[str, ArtifactRef]:
    return {**stage_refs(load_config(file))}


@pytest.fixture
def store(file) -> Store:
    return Store(load_config(file).store)


def beat(store: Store, job: JobSpec, host: str = "node7", ago: float = 1, **said) -> None:
    """A heartbeat of another machine's."""
    fields = {
        "owner": job.job_id,
        "host": host,
        "boot_id": "another",
        "pid": 7,
        "pid_started": 1,
        "began": stored.ago(hours=1),
    }
    heartbeat = Heartbeat.model_validate({**fields, "beat": 3, "time": stored.ago(seconds=ago), **said})
    store.write(f"{job.folder}/heartbeat.json", heartbeat.model_dump_json().encode())


def publish_one(store: Store, ref: ArtifactRef, **metrics) -> None:
    job = stored.begin(store, ref)
    result = stored.finish(store, job, {"weights": b"1"})
    publish(store, Manifest(ref=ref, spec={}, folder=result.folder, files=result.files, metrics=metrics))


def log_progress(store: Store, job: JobSpec, *steps: int, phase: str = "train", total: int = 100) -> None:
    """What a job's log has of its progress: a step a second until now."""
    events = [
        {"time": time.time() - steps[-1] + step, "step": step, "total": total, "unit": "step", "phase": phase,
         "metrics": {"loss": 2.5, "tokens_per_second": 1234.0}} for step in steps
    ]  # fmt: skip
    store.write(f"{job.folder}/metrics.jsonl", "".join(json.dumps(event) + "\n" for event in events).encode())


def states(store: Store, config: Path, capfd) -> dict[str, dict]:
    """By stage what `rlhf status --json` says."""
    code, out, _ = rlhf(capfd, "status", config, "--json")
    assert code == 0
    return {seen["stage"]: seen for seen in json.loads(out)["stages"]}


# --- states ----------------------------------------------------------------------------------------------------------


def test_a_running_stage_tells_how_far_it_is_when_it_ends_and_where_and_those_after_it_wait(file, refs, store, capfd):
    publish_one(store, refs["data"], rows_kept=50)
    job = stored.begin(store, refs["sft"])
    log_progress(store, job, 10, 20, 30)
    beat(store, job, step=30, total=100, phase="train")
    stored.save(store, refs["sft"], 20, {"a": b"1"})
    seen = states(store, file, capfd)
    assert {stage: one["state"] for stage, one in seen.items()} == {
        "data": "published", "sft": "running", "reward": "waiting", "ppo": "waiting", "evaluate": "waiting"
    }  # fmt: skip
    sft = seen["sft"]
    assert (sft["step"], sft["total"], sft["phase"], sft["hosts"], sft["attempt"]) == (30, 100, "train", ["node7"], 1)
    assert sft["metrics"]["tokens_per_second"] == 1234 and sft["checkpoint"]["step"] == 20
    assert 50 < sft["eta"] < 90 and 0 <= sft["age"] < 50, "70 steps are left, at one a second"
    assert seen["ppo"]["note"] == "for sft, reward"


def test_a_new_attempt_shows_nothing_of_the_numbers_of_the_one_before(refs, store):
    first = stored.begin(store, refs["sft"])
    log_progress(store, first, 10, 20, 30)
    beat(store, first, step=30, total=100, phase="train")
    status = Status(store)
    assert status.look()[0].event["metrics"]["loss"] == 2.5
    beat(store, stored.begin(store, refs["sft"], attempt=2))
    seen = status.look()[0]
    assert (seen.state, seen.attempt, seen.event, seen.eta) == ("running", 2, {}, None)


def test_a_holder_of_another_machine_that_fell_silent_is_told_from_one_that_lives(file, refs, store, capfd):
    job = stored.begin(store, refs["data"])
    beat(store, job, ago=600, step=5, total=9, phase="read")
    seen = states(store, file, capfd)["data"]
    assert seen["state"] == "stale lease" and "node7, pid 7; the next run begins anew" in seen["note"]


def test_a_silent_holder_whose_clock_is_behind_lives_as_soon_as_its_heartbeat_is_seen_to_change(refs, store):
    job = stored.begin(store, refs["data"])
    seen = []
    status = Status(store)
    for number in (1, 2):
        beat(store, job, ago=3600, step=number, total=9, phase="read")
        seen.append(status.look()[0].state)
    assert seen == ["stale lease", "running"]


def test_what_failed_says_why_and_is_resumable_only_where_another_attempt_may_help(file, refs, store, capfd):
    job = stored.begin(store, refs["data"])
    beat(store, job, ended="data")
    store.write(f"{job.folder}/failure.json", seal(Failure(kind="data", code=3, detail="row 7: no prompt")))
    assert states(store, file, capfd)["data"]["state"] == "failed"
    later = stored.begin(store, refs["data"], attempt=2)
    beat(store, later, ended="crashed")
    crash = Failure(kind="crashed", code=1, host="node3", rank=1, detail="ValueError: no")
    store.write(f"{later.folder}/failure.json", seal(crash))
    stored.save(store, refs["data"], 40, {"a": b"1"})
    seen = states(store, file, capfd)["data"]
    assert (seen["state"], seen["attempt"], seen["checkpoint"]["step"]) == ("resumable", 2, 40)
    assert seen["note"] == "crashed: ValueError: no (rank 1 on node3)"


def test_what_was_ended_by_hand_says_so(file, refs, store, capfd):
    beat(store, stored.begin(store, refs["data"]), ended="KeyboardInterrupt")
    seen = states(store, file, capfd)["data"]
    assert (seen["state"], seen["note"]) == ("stopped", "ended by Ctrl-C")


def test_a_published_artifact_that_is_built_anew_is_running(file, refs, store, capfd):
    publish_one(store, refs["data"])
    beat(store, stored.begin(store, refs["data"], attempt=2))
    assert states(store, file, capfd)["data"]["state"] == "running"


def test_a_damaged_manifest_hides_nothing_else(store, capfd):
    made = stored.pipeline(store)
    store.write(f"{made['sft'].ref.id}/manifest.json", b"{}")
    code, out, _ = rlhf(capfd, "status", "--store", store.url, "--json")
    seen = {one["stage"]: one["state"] for one in json.loads(out)["stages"]}
    assert code == 0 and seen["sft"] == "damaged" and seen["ppo"] == seen["data"] == "published"


def test_nodes_of_a_job_on_several_are_named(store):
    ref = make_ref("sft", "many", {}, {})
    job = stored.begin(store, ref)
    beat(store, job, host="head")
    seats = [{"node": n, "host": f"node{n}", "processes": 2, "first_rank": 2 * n} for n in range(5)]
    store.write(
        f"{job.folder}/orders.json", json.dumps({"job_id": "1", "beat": 1, "order": "go", "seats": seats}).encode()
    )
    sight = Status(store).look()[0]
    assert sight.hosts == ("node0", "node1", "node2", "node3", "node4")
    assert "node0, node1, node2 and 2 more" in "\n".join(line.plain for line in status_lines([sight], 160))


# --- what a look costs -----------------------------------------------------------------------------------------------


def test_between_listings_a_look_is_one_read_for_each_running_job_and_the_end_of_one_is_seen_at_once(monkeypatch):
    store = Store(f"memory://{os.getpid()}-{time.monotonic_ns()}")
    stored.pipeline(store)
    jobs = [stored.begin(store, make_ref("ppo", "demo", {"mark": str(n)}, {})) for n in range(2)]
    for job in jobs:
        beat(store, job, step=1, total=9, phase="train")
    status = Status(store)
    assert [sight.state for sight in status.look()] == ["published"] * 4 + ["running"] * 2
    assert (status.lists, status.reads) == (1, 4 + 2)
    for number in range(3):
        beat(store, jobs[0], step=2 + number, total=9, phase="train")
        assert {sight.event["step"] for sight in status.look()[4:]} == {1, 2 + number}
    assert (status.lists, status.reads) == (1, 6 + 3 * 2)
    beat(store, jobs[1], ended="preempted")
    assert [sight.state for sight in status.look()].count("stopped") == 1
    assert (status.lists, status.reads) == (2, 12 + 2), (
        "listed anew; what is published and who has ended is not read again"
    )
    monkeypatch.setattr(status_module, "LIST_SECONDS", 0)
    status.look()
    assert (status.lists, status.reads) == (3, 14 + 1)


# --- how it is shown -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 100, 140, 220])
def test_at_any_width_no_line_is_longer_and_nothing_is_lost(width, refs, store):
    publish_one(store, refs["data"], rows_kept=50)
    job = stored.begin(store, refs["sft"], attempt=3)
    log_progress(store, job, 10, 20, 30)
    beat(store, job, step=30, total=100, phase="train")
    stored.save(store, refs["sft"], 20, {"a": b"1"}, attempt=3)
    failed = stored.begin(store, refs["reward"])
    detail = "RuntimeError: " + "a long story of what went wrong, " * 5 + "and its end"
    store.write(f"{failed.folder}/failure.json", seal(Failure(kind="crashed", code=1, detail=detail)))
    lines = [line.plain for line in status_lines(Status(store).look(), width)]
    assert max(map(len, lines)) <= width
    words = " ".join(" ".join(lines).split())
    for fact in (
        *(refs[s].id for s in ("data", "sft", "reward")),
        "30/100 train",
        "1,234",
        "loss 2.5",
        "step 20",
        "node7",
        detail,
    ):
        assert " ".join(fact.split()) in words, fact


def test_of_a_large_store_the_newest_are_shown_and_the_others_counted(store, capfd):
    for number in range(23):
        stored.put(store, "sft", {"a": b"1"}, mark=str(number), created=stored.ago(days=30 - number))
    _, out, _ = rlhf(capfd, "status", "--store", store.url)
    assert out.splitlines()[0].startswith("(3 that were touched earlier") and out.count("published") == 20
    _, out, _ = rlhf(capfd, "status", "--store", store.url, "--all")
    assert out.count("published") == 23


def test_an_empty_store_and_a_server_that_does_not_answer_are_said(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(status_cli, "SECONDS", 60.0)  # a loaded machine may be long in importing Prefect
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    code, out, _ = rlhf(capfd, "status", "--store", str(tmp_path / "none"))
    assert code == 0 and f"nothing in file://{tmp_path}/none" in out
    assert "Prefect  http://127.0.0.1:9/api does not answer" in out


def test_a_server_that_never_answers_holds_nothing_up(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(status_cli, "SECONDS", 0.1)
    monkeypatch.setattr(prefect_runs, "COMMAND", ("sleep", "1000"))
    assert rlhf(capfd, "status", "--store", str(tmp_path / "none"))[0] == 0


# --- watching --------------------------------------------------------------------------------------------------------


def watching(store: Store, *words: str, **streams) -> subprocess.Popen:
    argv = [sys.executable, "-m", "flows.cli", "status", "--store", store.url, "--watch", "--every", "0.2", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    return subprocess.Popen(argv, env=environment, **streams)


def test_without_a_terminal_a_watch_tells_what_has_changed_line_by_line_until_ctrl_c(store, refs):
    job = stored.begin(store, refs["sft"])
    beat(store, job, step=1, total=9, phase="train")
    process = watching(store, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    first = process.stdout.readline()
    assert "running" in first and "1/9 train" in first
    publish_one(store, refs["data"])
    while "published" not in (line := process.stdout.readline()):
        assert refs["sft"].id in line
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0 and err.strip() == "no longer watching; what runs goes on"


def test_on_a_terminal_a_watch_is_refreshed_in_place_within_its_height_until_ctrl_c(store, refs):
    for number in range(30):
        stored.put(store, "sft", {"a": b"1"}, mark=str(number), created=stored.ago(days=30 - number))
    job = stored.begin(store, refs["ppo"])
    beat(store, job, step=1, total=9, phase="train")
    own, its = pty.openpty()
    termios.tcsetwinsize(its, (12, 80))
    process = watching(store, stdin=its, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    shown = b""

    def until(word: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + 60
        while word not in shown and time.monotonic() < end:
            if select.select([own], [], [], 0.2)[0]:
                shown += os.read(own, 1 << 16)
        assert word in shown, shown[-2000:]

    until(b"1/9 train")
    beat(store, job, step=8, total=9, phase="train")
    until(b"8/9 train")
    assert b"\x1b[1A" in shown or b"\x1b[11A" in shown, "the cursor goes back up"
    assert b"touched earlier are not shown" in shown
    process.send_signal(signal.SIGINT)
    until(b"no longer watching")
    assert process.wait(30) == 0
    os.close(own)
