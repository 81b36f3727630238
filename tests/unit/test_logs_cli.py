"""`rlhf logs`: lines of all ranks by time, one rank's, and first what an attempt failed of."""

import pytest
from commands import rlhf, small_pipeline

from rlhf_core.config import load_config
from rlhf_core.ends import Failure
from rlhf_core.plan import stage_refs
from rlhf_core.sealed import seal
from rlhf_core.store import Store


@pytest.fixture
def file(tmp_path):
    path = small_pipeline(tmp_path)
    config = load_config(str(path))
    store, folder = Store(config.store), f"{stage_refs(config)['sft'].id}/attempts/0002"
    store.write(f"{folder}/job.json", b"{}")
    for rank, lines in enumerate((("01.000Z one", "03.000Z three"), ("02.000Z two",))):
        text = "".join(f"2026-01-01T00:00:{line}\n" for line in lines)
        store.write(f"{folder}/rank-{rank:03d}.log", text.encode())
    failure = Failure(kind="crashed", code=1, host="node2", rank=1, detail="ValueError: [no]", trace="Traceback: …")
    store.write(f"{folder}/failure.json", seal(failure))
    return path


def test_lines_of_all_ranks_come_by_time_and_the_failure_first(file, capsys):
    code, out, err = rlhf(capsys, "logs", file, "sft")
    assert code == 0
    assert [line.split()[1:] for line in out.splitlines()] == [["0", "one"], ["1", "two"], ["0", "three"]]
    assert err.splitlines() == ["crashed: ValueError: [no] (rank 1 on node2)", "Traceback: …"]


def test_one_ranks_lines_alone(file, capsys):
    _, out, _ = rlhf(capsys, "logs", file, "sft", "--rank", "1")
    assert [line.split()[2] for line in out.splitlines()] == ["two"]


def test_an_attempt_that_is_not_there_is_said(file, capsys):
    code, _, err = rlhf(capsys, "logs", file, "sft", "--attempt", "7")
    assert code == 2 and "there is no attempt 7 in" in err
