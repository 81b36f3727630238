"""The log of a job: what it makes of the launcher's and the ranks' output, and of a local disk that is full."""

import errno
import json
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from prefect.states import Failed

from rlhf_core import joblog
from rlhf_core.job import JobSpec, progress_line
from rlhf_core.joblog import JobLog
from rlhf_core.ranklog import Line, merged, ranks_folder
from rlhf_core.resources import Resources
from rlhf_core.store import Store
from tasks.stage import run_stage, worth_retrying


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(f"file://{tmp_path}/store")


@pytest.fixture
def job(store, tmp_path) -> JobSpec:
    """Of two ranks."""
    job = tiny.context(store, "sft", {}, {}, tmp_path / "out").job
    return job.model_copy(update={"resources": Resources(processes=2)})


def says(log: JobLog, rank: int | None, text: str) -> None:
    """What the launcher or a rank writes."""
    ranks_folder(log.folder).mkdir(exist_ok=True)
    with (log.raw if rank is None else ranks_folder(log.folder) / f"rank-{rank:03d}.log").open("a") as file:
        file.write(text)


def event(step: int) -> dict:
    return {"step": step, "total": 9, "unit": "step", "phase": "train", "metrics": {}}


# --- lines and events --------------------------------------------------------------------------------------------------


def test_lines_of_all_ranks_stand_in_one_log_as_they_come_and_in_each_ranks_own_with_their_times(store, job):
    lines: list[str] = []
    records: list[Line] = []
    log = JobLog(store, job, on_line=lines.append, on_record=lambda *line: records.append(Line(*line)))
    says(log, None, "the launcher\n")
    says(log, 1, "first\nhalf a ")
    log.read()
    says(log, 1, "line\n")
    says(log, 0, "third\n")
    log.read()
    says(log, 0, "an end without a newline")
    log.close()
    shown = ["the launcher", "[1] first", "[0] third", "[1] half a line", "[0] an end without a newline"]
    assert lines == shown and store.read(f"{job.folder}/log.txt").decode().splitlines() == shown
    assert [(line.rank, line.text) for line in records] == [
        (None, "the launcher"), (1, "first"), (0, "third"), (1, "half a line"), (0, "an end without a newline"),
    ]  # fmt: skip
    stored = store.read(f"{job.folder}/rank-001.log").decode().splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    assert [re.sub(stamp, "", line) for line in stored] == ["first", "half a line"]
    assert all(re.match(stamp, line) for line in stored)
    assert [(line.rank, line.text) for line in merged(store, job.folder)] == [
        (line.rank, line.text) for line in records if line.rank is not None
    ]
    assert not log.folder.exists()


def test_lines_of_the_only_rank_are_shown_as_they_are(store, job):
    log = JobLog(store, job.model_copy(update={"resources": Resources()}))
    says(log, 0, "alone\n")
    log.close()
    assert store.read(f"{job.folder}/log.txt") == b"alone\n"


def test_only_what_rank_0_tells_is_progress_of_the_job_but_it_is_known_how_far_each_is(store, job):
    events: list[dict] = []
    log = JobLog(store, job, events.append)
    says(log, 0, progress_line(event(3)) + "\n")
    says(log, 1, progress_line(event(1)) + "\n" + progress_line(event(2)) + "\n")
    assert log.read() == 1
    assert [e["step"] for e in events] == [3]
    assert {rank: e["step"] for rank, (_, e) in log.ranks.items()} == {0: 3, 1: 2}
    log.close()
    rows = store.read(f"{job.folder}/metrics.jsonl").decode().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3]
    assert f"{job.folder}/log.txt" not in store.list(job.folder), "events are no lines"


def test_the_log_of_one_node_leaves_the_jobs_own_files_to_the_head(store, job):
    log = JobLog(store, job, name="node-0001.txt")
    says(log, None, "its launcher\n")
    says(log, 0, progress_line(event(3)) + "\na line\n")
    log.close()
    assert set(store.list(job.folder)) == {f"{job.folder}/{name}" for name in ("node-0001.txt", "rank-000.log")}


def test_the_stored_logs_of_ranks_keep_up_while_the_job_runs(store, job, monkeypatch):
    monkeypatch.setattr(joblog, "UPLOAD_SECONDS", -1.0)
    log = JobLog(store, job)
    says(log, 0, "one\n")
    says(log, 1, "two\n")
    log.read()
    assert [line.text for line in merged(store, job.folder)] == ["one", "two"]
    says(log, 1, "three\n")
    log.read()
    assert [line.text for line in merged(store, job.folder)] == ["one", "two", "three"]
    log.close()


# --- a full disk -------------------------------------------------------------------------------------------------------


def test_a_full_local_disk_costs_the_log_its_end_and_not_the_run_its_life(store, job):
    events: list[dict] = []
    log = JobLog(store, job, events.append)
    says(log, None, ("x" * 1000 + "\n") * 3000)
    says(log, 0, ("y" * 1000 + "\n") * 3000 + progress_line(event(1)) + "\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # stands for a disk with that much room
    try:
        assert log.read() == 1
        log.note("still there")
        place = log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [e["step"] for e in events] == [1] and log.tail[-1] == "[0] " + "y" * 1000
    assert place == f"{store.url}/{job.folder}/log.txt (not all of it: [Errno 27] File too large)"
    assert [len(store.read(f"{job.folder}/{name}")) for name in ("log.txt", "rank-000.log")] == [1 << 20, 1 << 20]
    assert {len(line.text) for line in list(merged(store, job.folder))[:-1]} == {1000}
    assert not Path(log.folder).exists()


def test_a_disk_without_room_for_another_file_costs_a_rank_its_own_log(store, job):
    log = JobLog(store, job)
    says(log, 1, "a line\n")
    (log.folder / "rank-001.log").mkdir()  # stands for it: no file can be made there
    log.read()
    assert "not all of it" in log.close()
    assert store.read(f"{job.folder}/log.txt") == b"[1] a line\n"


def test_a_stage_that_could_not_start_on_a_full_disk_is_worth_another_try():
    full = Failed(data=OSError(errno.ENOSPC, "No space left on device"))
    assert worth_retrying(run_stage, SimpleNamespace(name="sft"), full)
    assert not worth_retrying(run_stage, SimpleNamespace(name="sft"), Failed(data=ValueError("a mistake in the code")))
