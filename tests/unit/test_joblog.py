"""What a local disk that is full does to the log of a job, and to its run."""

import errno
import resource
from pathlib import Path
from types import SimpleNamespace

import tiny
from prefect.states import Failed

from rlhf_core.job import JobSpec, progress_line
from rlhf_core.joblog import JobLog
from rlhf_core.store import Store
from tasks.stage import run_stage, worth_retrying


def test_a_full_local_disk_costs_the_log_its_end_and_not_the_run_its_life(tmp_path):
    store = Store(f"file://{tmp_path}/store")
    job: JobSpec = tiny.context(store, "sft", {}, {}, tmp_path / "out").job
    events: list[dict] = []
    log = JobLog(store, job, events.append, lambda line: None)
    line = progress_line({"step": 1, "total": 2, "unit": "step", "phase": "train", "metrics": {}})
    log.raw.write_text(("x" * 1000 + "\n") * 3000 + line + "\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # stands for a disk with that much room
    try:
        assert log.read() == 1
        log.note("still there")
        place = log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [event["step"] for event in events] == [1] and log.tail[-1] == "x" * 1000
    assert place == f"{store.url}/{job.folder}/log.txt (not all of it: [Errno 27] File too large)"
    assert len(store.read(f"{job.folder}/log.txt")) == 1 << 20
    assert not Path(log.folder).exists()


def test_a_stage_that_could_not_start_on_a_full_disk_is_worth_another_try():
    full = Failed(data=OSError(errno.ENOSPC, "No space left on device"))
    assert worth_retrying(run_stage, SimpleNamespace(name="sft"), full)
    assert not worth_retrying(run_stage, SimpleNamespace(name="sft"), Failed(data=ValueError("a mistake in the code")))
