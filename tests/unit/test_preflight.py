"""What a machine says of itself before ranks start on it, and what is refused at the head."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stored import Remote, put

from rlhf_core import cache, doctor, guard, interfaces, preflight, room
from rlhf_core.artifacts import job_cache, make_ref
from rlhf_core.cluster import Cluster
from rlhf_core.job import JobSpec
from rlhf_core.members import Facts, Seat
from rlhf_core.resources import Resources
from rlhf_core.store import Store

SEAT = Seat(node=1, host="node2", processes=2, first_rank=2)
GIB = 1 << 30


@pytest.fixture
def own() -> Facts:
    return Facts(
        host="laptop", python="3.11.7", accelerator="cpu", devices=0, cores=2, memory_free=8 * GIB, disk_free=9 * GIB,
        versions={"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "code": "a" * 64}, clock=time.time(),
    )  # fmt: skip


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """A temporary folder of this test alone, and so a cache of artifacts."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    return tmp_path / "tmp"


def refusals(own: Facts, seat: Seat = SEAT, cluster: Cluster | None = None, **theirs: object) -> list[str]:
    return preflight.compare(own, seat, own.model_copy(update={"host": "n2", **theirs}), cluster or Cluster())


# --- the comparison --------------------------------------------------------------------------------------------------


def test_a_node_that_is_like_this_machine_is_not_refused(own):
    assert refusals(own) == []


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"python": "3.12.1"}, "Python 3.12.1, but 3.11.7 where the job was started"),
        ({"versions": {"torch": "2.13.0", "deepspeed": "0.19.7", "code": "a" * 64}}, "deepspeed 0.19.7, but 0.19.8"),
        ({"versions": {"torch": "2.12.0+cpu", "deepspeed": "0.19.8", "code": "a" * 64}}, "torch 2.12.0, but 2.13.0"),
        ({"versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "code": "b" * 64}}, "another source of rlhf_core"),
        ({"accelerator": "", "devices": 1}, "1 GPUs, and resources.processes 2 needs 2"),
        ({"memory_free": GIB // 2}, "memory: 0.5 GiB free, and 2 processes need at least 1.0"),
        ({"problems": ("store: no answer; check it",)}, "store: no answer; check it"),
    ],
)
def test_what_does_not_fit_is_one_line_with_the_node_s_name_and_a_remedy(own, theirs, said):
    [line] = refusals(own, **theirs)
    assert line.startswith("node2: ") and said in line
    assert ";" in line, "no remedy"


def test_the_remedy_for_another_version_is_the_command_that_installs_the_same(own):
    [line] = refusals(own, versions={**own.versions, "deepspeed": "0.19.7"})
    assert "pip install -c constraints.txt deepspeed==0.19.8" in line


def test_python_s_last_number_and_the_device_torch_was_built_for_may_differ_from_the_control_plane(own):
    theirs = {"python": "3.11.2", "versions": {**own.versions, "torch": "2.13.0+cu128"}}
    assert refusals(own, accelerator="", devices=8, **theirs) == []


def test_a_device_that_was_selected_must_be_there(own):
    seat = SEAT.model_copy(update={"devices": (4, 7)})
    assert refusals(own, seat, accelerator="", devices=8) == []
    [line] = refusals(own, seat, accelerator="", devices=7)
    assert "number 7" in line


def test_a_node_of_slurm_is_called_by_the_name_it_gives_itself(own):
    [line] = refusals(own, SEAT.model_copy(update={"host": "node0001"}), python="3.12.0")
    assert line.startswith("n2: ")


@pytest.mark.parametrize(("ahead", "word"), [(90, "90 s ahead"), (-90, "90 s behind")])
def test_a_clock_that_is_wrong_is_refused(own, ahead, word):
    heard = time.time()
    theirs = own.model_copy(update={"clock": heard + ahead})
    [line] = preflight.compare(own, SEAT, theirs, Cluster(), heard)
    assert word in line and "max_skew_seconds is 60" in line
    assert preflight.compare(own, SEAT, theirs, Cluster(max_skew_seconds=100), heard) == []


def test_a_node_that_took_its_time_to_report_has_no_wrong_clock_for_that(own):
    before = own.model_copy(update={"clock": time.time() - 600})
    assert preflight.compare(before, SEAT, own.model_copy(update={"clock": time.time() - 300}), Cluster()) == []
    assert preflight.compare(before, SEAT, own.model_copy(update={"clock": time.time() - 700}), Cluster()) != []


def test_nodes_must_compute_on_the_same_kind_of_device_with_the_same_build(own):
    gpu = own.model_copy(
        update={"accelerator": "", "devices": 8, "versions": {**own.versions, "torch": "2.13.0+cu128"}}
    )
    first = SEAT.model_copy(update={"node": 0, "host": "node1"})
    assert preflight.alike([(first, gpu), (SEAT, gpu)]) == []
    [line] = preflight.alike([(first, gpu), (SEAT, own)])
    assert line == (
        "node2: computes on cpu, torch 2.13.0+cpu, but node1 on GPU, torch 2.13.0+cu128; take nodes that are alike"
    )


# --- the facts -------------------------------------------------------------------------------------------------------


def test_the_facts_of_this_machine_are_its_own(tmp_path):
    found = preflight.facts(Store(f"file://{tmp_path}/store"), None)
    import deepspeed
    import torch

    assert found.problems == ()
    assert found.host == socket.gethostname() and found.python == ".".join(map(str, sys.version_info[:3]))
    assert (found.versions["torch"], found.versions["deepspeed"]) == (torch.__version__, deepspeed.__version__)
    assert (found.accelerator, found.devices) == ("cpu", 0)
    assert found.disk_free > 0 and found.memory_free > 0 and found.cores >= 1
    assert abs(found.clock - time.time()) < 10
    assert not list((tmp_path / "store").rglob("doctor/*")), "the trial left an object"


def test_facts_are_found_without_importing_the_training_stack(tmp_path):
    code = (
        "import sys; from rlhf_core.preflight import facts; from rlhf_core.store import Store; "
        f"facts(Store('file://{tmp_path}'), None); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def test_a_store_that_does_not_answer_is_a_problem_after_the_limit(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts, and never says anything
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "long-secret")
        began = time.monotonic()
        found = preflight.facts(Store("s3://bucket/x"), None, limit=2)
    assert time.monotonic() - began < 10
    [problem] = found.problems
    assert problem.startswith("store: no answer within 2 s; check endpoint")


def test_a_store_that_refuses_is_a_problem_with_its_reason(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "long-secret")
    [problem] = preflight.facts(Store("s3://bucket/x"), None).problems
    assert problem.startswith("store: ") and f"127.0.0.1:{port}" in problem


def test_a_store_that_does_not_hold_what_the_control_plane_wrote_is_another_one(tmp_path):
    store = Store(f"file://{tmp_path}/store")
    store.write("doctor/seen", b"1")
    assert preflight.facts(store, None, see="doctor/seen").problems == ()
    [problem] = preflight.facts(store, None, see="doctor/other").problems
    assert "is another one here" in problem and "share" in problem


def test_calls_that_do_not_come_back_are_missing_and_the_others_are_not_kept_waiting():
    never = threading.Event()
    calls = {"good": lambda: 1, "bad": lambda: 1 / 0, "slow": never.wait}
    began = time.monotonic()
    found = preflight.ask(calls, dict.fromkeys(calls, 0.5))
    assert time.monotonic() - began < 5
    assert found["good"] == 1 and isinstance(found["bad"], ZeroDivisionError) and "slow" not in found
    never.set()


def test_the_digest_of_the_source_changes_with_content_and_names_and_not_with_line_ends(tmp_path):
    copy = tmp_path / "rlhf_core"
    shutil.copytree(Path(preflight.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    here = preflight.source_digest()
    assert preflight.source_digest(copy) == here and len(here) == hashlib.sha256().digest_size * 2
    file = copy / "eval" / "request.py"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    (copy / "notes.txt").write_text("no source")
    assert preflight.source_digest(copy) == here
    file.rename(file.with_name("asked.py"))
    renamed = preflight.source_digest(copy)
    (copy / "errors.py").write_text((copy / "errors.py").read_text() + "# changed\n")
    assert len({here, renamed, preflight.source_digest(copy)}) == 3


def test_addresses_are_what_others_may_reach_and_the_way_to_one_has_an_interface():
    found = interfaces.addresses()
    assert not [address for address in found if address.startswith(("127.", "::1", "fe80"))]
    assert preflight.interface_of("127.0.0.1") == "lo"
    assert preflight.interface_of("no.such.host.invalid") is None
    names = {name for _, name in socket.if_nameindex()}
    assert {preflight.interface_of(address) for address in found} <= names - {"lo"}


def test_visible_devices_limit_the_gpus_that_count(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert preflight.devices() == 2
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert preflight.devices() == 0


# --- leftovers -------------------------------------------------------------------------------------------------------


def job_of(store: Store, stage: str = "sft", **fields: object) -> JobSpec:
    ref = make_ref(stage, "demo", {"mark": os.getpid()}, {})  # pyright: ignore[reportArgumentType]
    given = {"stage": stage, "store": store.url, "output": ref, "attempt": 2, "spec": {}, "identity": {}, **fields}
    return JobSpec.model_validate(
        {**given, "job_id": f"{ref.id}@{hashlib.sha256(store.url.encode()).hexdigest()[:8]}/2-b"}
    )


def sleeper(job_id: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"], env={**os.environ, "RLHF_JOB_ID": job_id})


def test_what_earlier_attempts_left_is_ended_and_told_and_nothing_of_this_attempt_or_of_others(tmp_path, temporary):
    store = Store(f"file://{tmp_path}/store")
    job = job_of(store)
    old = sleeper(f"{job.family}1-a/node-0000")
    kept = [sleeper(job.job_id), sleeper(f"{job.job_id}/node-0001"), sleeper("sft/other-000000000000@00000000/1-a")]
    try:
        found = preflight.facts(store, job)
        assert found.ended == (old.pid,) and old.wait(5) < 0
        assert all(process.poll() is None for process in kept)
        assert all(guard.alive(process.pid) for process in kept)
    finally:
        for process in (old, *kept):
            process.kill()
            process.wait()


# --- room ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path) -> Remote:
    return Remote(f"file://{tmp_path}/store")


def test_a_job_needs_room_for_inputs_that_are_not_here_yet_and_for_checkpoints_of_its_models(remote, temporary):
    files = {"model/model.safetensors": b"w" * 1000, "model/config.json": b"{}"}
    sft = put(remote, "sft", files)
    job = job_of(remote, "reward", inputs={"sft": sft.ref})
    needed = room.room_needed(remote, job)
    assert (needed.inputs, needed.checkpoints) == (1002, 4000)
    assert room.room_needed(Store(remote.url), job).inputs == 0, "a local store is read in place"
    (job_cache() / f"{sft.ref.fingerprint[:12]}-{'0' * 32}").mkdir(parents=True)
    assert room.room_needed(remote, job).inputs == 0, "it is in the cache"
    assert room.room_needed(remote, job_of(remote, "evaluate", inputs={"sft": sft.ref})).checkpoints == 0


def test_what_is_divided_among_nodes_takes_its_share_of_each(remote, temporary):
    sft = put(remote, "sft", {"model/model.safetensors": b"w" * 1000})
    resources = Resources.model_validate({"launcher": "nodes", "cluster": {"nodes": 4}, "zero_stage": 2})
    job = job_of(remote, "reward", inputs={"sft": sft.ref}, resources=resources)
    assert room.room_needed(remote, job).checkpoints == 1000


def test_too_little_room_is_told_with_what_is_needed_and_what_was_estimated(temporary):
    needed = room.Room(inputs=2 * GIB, checkpoints=4 * GIB)
    assert needed.lacking(6 * GIB) is None
    said = needed.lacking(5 * GIB)
    assert said and "5.0 GiB free" in said and "2.0 for its inputs" in said and "estimated" in said and "TMPDIR" in said


def test_what_nobody_has_used_for_a_day_counts_as_room(temporary):
    folder = job_cache() / "abc"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 1000)
    use = job_cache() / "abc.use"
    use.touch()
    needed = room.Room(inputs=1500, checkpoints=0)
    assert needed.lacking(600) is not None
    day_ago = time.time() - cache.IDLE_SECONDS - 10
    os.utime(use, (day_ago, day_ago))
    assert needed.lacking(600) is None


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "place", "names"),
    [
        ("0::/job/step", "job", ("memory.max", "memory.current", "inactive_file")),
        ("4:memory:/job/step", "memory/job", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
        ("0::/seen/from/outside", "", ("memory.max", "memory.current", "inactive_file")),
    ],
)
def test_the_memory_of_a_cgroup_above_counts_and_what_can_be_dropped_from_it_does_not(tmp_path, own, place, names):
    folder = tmp_path / "cgroup" / place
    (folder / "step").mkdir(parents=True)
    (folder / names[0]).write_text("1000\n")
    (folder / names[1]).write_text("700\n")
    (folder / "memory.stat").write_text(f"anon 300\n{names[2]} 400\n")
    (tmp_path / "self").write_text(f"9:name=systemd:/\n{own}\n")
    assert list(doctor.cgroup_memory(tmp_path / "cgroup", tmp_path / "self")) == [(1000, 300)]


def test_a_cgroup_without_a_limit_is_none(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "self").write_text("0::/\n")
    assert list(doctor.cgroup_memory(tmp_path, tmp_path / "self")) == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_facts_as_one_line_and_takes_its_environment_from_standard_input(tmp_path):
    words = ["--store", f"file://{tmp_path}", "--attached"]
    given = json.dumps({"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0,1,2"}) + "\n"
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_core.preflight", *words], input=given, capture_output=True, text=True, timeout=60
    )
    [line] = [line for line in done.stdout.splitlines() if line.startswith(preflight.PREFIX)]
    assert Facts.model_validate_json(line.removeprefix(preflight.PREFIX)).devices == 3
