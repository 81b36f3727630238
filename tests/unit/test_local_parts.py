"""Copies of checkpoints on a node's own disk: real files, and a store that is treated as one elsewhere."""

import os
import tempfile
from pathlib import Path

import pytest
import stored

from rlhf_core import cache as caching
from rlhf_core.artifacts import fetch, job_cache, make_ref
from rlhf_core.checkpoints import Checkpoint, Part, Position
from rlhf_core.context import JobContext
from rlhf_core.errors import ConfigError, IntegrityError
from rlhf_core.local_parts import LocalParts, folder_of
from rlhf_core.store import Store

A, B = b"a" * 1000, b"b" * 1000


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """The folder in which this machine has its caches."""
    (folder := tmp_path / "machine").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def context(tmp_path) -> JobContext:
    (out := tmp_path / "job" / "files").mkdir(parents=True)
    store = stored.Remote(f"file://{tmp_path}/store")
    return JobContext(job=stored.begin(store, make_ref("sft", "demo", {}, {})), store=store, out=out)


def save(context: JobContext, step: int, **data: bytes) -> Checkpoint:
    """A checkpoint in the store, whose local files have become copies."""
    marker = stored.save(context.store, context.job.output, step, data)
    files = {context.scratch / part.name: part for part in marker.parts}
    for path, part in files.items():
        path.write_bytes(data[part.name])
    LocalParts(context).keep(1, marker.position, files)
    assert not any(path.exists() for path in files) or not copies(context, step)
    return marker


def copies(context: JobContext, step: int) -> list[Path]:
    """What this machine has of a checkpoint."""
    return sorted(folder_of(context.store, context.job.output).glob(f"*-{step:08d}-*/*"))


def test_a_local_file_becomes_the_copy_and_what_two_checkpoints_share_is_on_the_disk_once(context):
    path = context.scratch / "weights"
    path.write_bytes(A)
    number, part = path.stat().st_ino, Part(name="weights", size=len(A), sha256=caching.sha256_file(path))
    LocalParts(context).keep(1, Position(step=2), {path: part})
    LocalParts(context).keep(1, Position(step=3), {}, same=[part])
    assert [copy.stat().st_ino for copy in copies(context, 2) + copies(context, 3)] == [number, number]


def test_a_part_is_brought_once_for_all_ranks_from_its_copy_or_else_from_the_store(context, monkeypatch):
    marker = save(context, 1, weights=A, moments=B)
    weights, moments = sorted(marker.parts, key=lambda part: part.name, reverse=True)
    copies(context, 1)[[copy.read_bytes() for copy in copies(context, 1)].index(B)].unlink()
    (scratch := context.scratch / "shared").mkdir()
    monkeypatch.setenv("RLHF_SCRATCH", str(scratch))  # of all ranks
    first, second = LocalParts(context), LocalParts(context)
    assert [rank.bring(marker, weights).read_bytes() for rank in (first, second)] == [A, A]
    assert [rank.bring(marker, moments).read_bytes() for rank in (first, second)] == [B, B]
    assert (first.local, first.fetched, second.local, second.fetched) == (len(A), len(B), 0, 0)


def test_what_was_fetched_stays_as_a_copy_and_what_came_after_it_goes(context):
    marker = stored.save(context.store, context.job.output, 4, {"weights": A})
    save(context, 5, weights=B)  # of a checkpoint that was never completed, or that is damaged
    here = LocalParts(context)
    here.settle(marker, {part.name: here.bring(marker, part) for part in marker.parts})
    assert [copy.read_bytes() for copy in copies(context, 4)] == [A] and copies(context, 5) == []
    assert not list((context.scratch / "resume").glob(f"{marker.parts[0].sha256}"))


def test_a_damaged_copy_goes_wherever_it_is_linked_and_the_store_is_asked(context, capfd):
    marker = save(context, 1, weights=A)
    LocalParts(context).keep(1, Position(step=2), {}, same=marker.parts)
    copies(context, 1)[0].write_bytes(b"A" + A[1:])
    here = LocalParts(context)
    assert here.bring(marker, marker.parts[0]).read_bytes() == A and here.fetched == len(A)
    assert copies(context, 1) == copies(context, 2) == []
    assert "damaged: fetching weights from the store" in capfd.readouterr().err


def test_a_part_that_is_damaged_in_the_store_too_is_an_error_and_never_used(context):
    marker = stored.save(context.store, context.job.output, 1, {"weights": A})
    context.store.write(marker.part_key(marker.parts[0]), B)
    for _ in range(2):
        with pytest.raises(IntegrityError, match="content differs from its name"):
            LocalParts(context).bring(marker, marker.parts[0])
    context.store.delete(marker.part_key(marker.parts[0]))
    with pytest.raises(KeyError):
        LocalParts(context).bring(marker, marker.parts[0])


def test_a_store_on_this_disk_is_read_in_place_and_nothing_is_copied(tmp_path):
    store = Store(f"file://{tmp_path}/store")
    (out := tmp_path / "job" / "files").mkdir(parents=True)
    context = JobContext(job=stored.begin(store, make_ref("sft", "demo", {}, {})), store=store, out=out)
    marker = stored.save(store, context.job.output, 1, {"weights": A})
    (context.scratch / "weights").write_bytes(A)
    LocalParts(context).keep(1, Position(step=1), {context.scratch / "weights": marker.parts[0]})
    assert LocalParts(context).bring(marker, marker.parts[0]) == store.local_path(marker.part_key(marker.parts[0]))
    assert not job_cache().exists()


def test_the_oldest_copies_make_room_for_new_ones_and_for_inputs_but_inputs_of_today_stay(context, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE_GB", "0.000003")  # 3,000 bytes
    for step in (1, 2, 3):
        save(context, step, weights=bytes([step]) * 900)
        for copy in copies(context, step):
            os.utime(copy.parent, (step, step))
    one = stored.put(context.store, "data", {"rows": b"r" * 1500})
    folder, _ = fetch(context.store, one.ref, job_cache())
    assert [bool(copies(context, step)) for step in (1, 2, 3)] == [False, False, True]
    save(context, 4, weights=bytes([4]) * 1400)
    assert folder.is_dir() and not copies(context, 3) and copies(context, 4)


def test_an_input_that_needs_the_disk_gets_what_copies_take_even_below_the_limit(context, monkeypatch):
    save(context, 1, weights=A)
    monkeypatch.setattr(caching, "_free", lambda folder: 10**12 if not copies(context, 1) else 10)
    one = stored.put(context.store, "data", {"rows": b"r" * 1500})
    assert (fetch(context.store, one.ref, job_cache())[0] / "rows").exists() and not copies(context, 1)


@pytest.mark.parametrize("trouble", ["others may write", "no folder", "no link from there"])
def test_whatever_keeps_a_copy_from_being_made_is_told_once_and_costs_nothing_else(
    context, trouble, capfd, monkeypatch
):
    if trouble == "others may write":
        job_cache().mkdir()
        job_cache().chmod(0o777)
    elif trouble == "no folder":
        (job_cache() / caching.COPIES).parent.mkdir(mode=0o700)
        (job_cache() / caching.COPIES).write_text("in the way")
    else:
        monkeypatch.setattr(Path, "replace", refuse)
    here = LocalParts(context)
    for step in (1, 2):
        (context.scratch / "weights").write_bytes(A)
        part = Part(name="weights", size=len(A), sha256=caching.sha256_file(context.scratch / "weights"))
        here.keep(1, Position(step=step), {context.scratch / "weights": part})
    assert capfd.readouterr().err.count("no copy of the checkpoint of step 1 stays on this machine: ") == 1
    if trouble != "others may write":
        return
    with pytest.raises(ConfigError, match="others may have written"):
        fetch(context.store, stored.put(context.store, "data", {"rows": b"r"}).ref, job_cache())


def refuse(self: Path, target: Path) -> None:
    raise OSError(18, "Invalid cross-device link")
