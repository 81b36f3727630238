"""Why an attempt has failed: last words of real ranks, and what is concluded from them; the kernel's count of memory kills."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from rlhf_core import guard
from rlhf_core.ends import Kind, NodeEnd, RankEnd
from rlhf_core.failures import RULES, conclude, is_neighbours, oom_kills
from rlhf_core.ranklog import ends_of

LOST = "RuntimeError: [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:916."
KILLED = 256 - signal.SIGKILL  # what launch.py makes of it


def end(rank=0, time=1.0, code=1, **fields) -> RankEnd:
    return RankEnd(rank=rank, time=time, code=code, **fields)


def of_one(*ranks: RankEnd, code: int = 1, **fields):
    """What a job on one machine comes to."""
    return conclude([(None, NodeEnd(code=code, ranks=ranks, **fields))], code)


# --- the rank that began it --------------------------------------------------------------------------------------------


def test_the_earliest_error_that_is_a_ranks_own_is_the_cause():
    found = of_one(
        end(0, 3.0, error="KeyError: 'a later one'"),
        end(1, 1.0, error=LOST),
        end(2, 2.0, error="RuntimeError: the loss went for a walk", trace="Traceback …"),
        end(3, 0.5, told=True, code=143, error="received SIGTERM"),
    )
    assert (found.kind, found.rank, found.code, found.trace) == ("crashed", 2, 1, "Traceback …")
    assert found.detail == "RuntimeError: the loss went for a walk"


@pytest.mark.parametrize(
    ("code", "kind"),
    [(2, "configuration"), (3, "data"), (4, "non-finite numbers"), (5, "out of memory"), (1, "crashed")],
)
def test_a_ranks_exit_code_tells_the_kind_whatever_code_the_launcher_passes_on(code, kind):
    found = of_one(end(0, 2.0, error=LOST), end(1, 1.0, code=code, error="its own"), code=1)
    assert (found.kind, found.code, found.rank, found.detail) == (kind, code, 1, "its own")


def test_a_rank_without_memory_for_a_tensor_is_told_from_its_neighbours():
    error = "DistBackendError: NCCL error in: x.cpp:12, unhandled cuda error: out of memory"
    found = of_one(end(0, 1.0, code=5, memory="device", error=error), end(1, 0.9, error=LOST))
    assert (found.kind, found.code, found.rank) == ("out of memory", 5, 0)


def test_ranks_that_have_saved_make_it_preempted():
    told = [end(rank, 1.0, code=75, told=True, error="received SIGTERM; saved at step 7") for rank in (0, 1)]
    found = of_one(*told, end(2, 2.0, error=LOST), code=75, silent=(3,))
    assert (found.kind, found.code, found.detail) == ("preempted", 75, "received SIGTERM; saved at step 7")


def test_a_rank_that_could_not_save_is_not_preempted():
    found = of_one(end(0, code=75, told=True), end(1, 2.0, error="OSError: No space left on device"), code=75)
    assert (found.kind, found.rank) == ("crashed", 1)


def test_a_silent_rank_was_killed_if_the_launcher_saw_a_signal():
    """Also if another says what nobody has heard of yet: the launcher had not ended anyone by then."""
    found = of_one(end(0, error="SomethingWrapped: peer lost"), code=KILLED, silent=(1,))
    assert (found.kind, found.code, found.rank, found.detail) == ("killed", -9, 1, "ended by SIGKILL")


def test_a_rank_that_crashed_in_c_is_no_silent_one():
    words = end(1, code=-11, error="Fatal Python error: Segmentation fault", trace="Fatal …")
    found = of_one(end(0, 0.5, error=LOST), words, code=256 - signal.SIGSEGV)
    assert (found.kind, found.code, found.rank, found.trace) == ("crashed", -11, 1, "Fatal …")


def test_a_silent_rank_was_killed_if_its_neighbours_lost_it():
    """The launcher found the neighbour first, and passes on its code."""
    found = of_one(end(0, error=LOST), code=1, silent=(1,))
    assert (found.kind, found.code, found.rank) == ("killed", 1, 1) and "without a word" in found.detail


def test_several_silent_ranks_are_all_named():
    assert "ranks 1, 3: ended by SIGKILL" == of_one(code=KILLED, silent=(1, 3)).detail


def test_a_silent_rank_ran_out_of_memory_if_the_kernel_counts_one_that_did():
    for code in (KILLED, 1):
        found = of_one(end(0, error=LOST), code=code, silent=(1,), oom_kills=1)
        assert (found.kind, found.code, found.rank) == ("out of memory", 5, 1)
    assert of_one(code=256 - signal.SIGSEGV, silent=(1,), oom_kills=1).kind == "killed"


def test_a_rank_whose_process_of_its_own_the_kernel_killed_says_so_beside_its_error():
    found = of_one(end(0, error="BrokenProcessPool: a child ended"), oom_kills=2)
    assert found.kind == "crashed" and found.detail.endswith(
        "the kernel killed 2 of the job's processes for want of memory"
    )


def test_neighbours_that_all_lost_somebody_are_a_crash_of_the_first():
    found = of_one(end(0, 2.0, error=LOST), end(1, 1.0, error=LOST))
    assert (found.kind, found.rank) == ("crashed", 1)


@pytest.mark.parametrize(
    ("code", "detail"),
    [
        (128 + 9, "the launcher was killed by SIGKILL"),
        (-9, "its guard was killed by SIGKILL"),
        (guard.ORPHANED, "the launcher ended before its ranks"),
        (guard.NOT_STARTED, "the launcher could not be started"),
    ],
)
def test_what_holds_the_ranks_may_fail_too(code, detail):
    found = of_one(end(0, code=143, told=True), end(1, error=LOST), code=code)
    assert (found.kind, found.detail) == ("launcher", detail)


def test_a_rank_that_somebody_told_to_end_is_named():
    found = of_one(end(1, 1.0, code=143, told=True), end(0, 2.0, code=143, told=True), code=143)
    assert (found.kind, found.code, found.rank, found.detail) == ("killed", -15, 1, "ended by SIGTERM")


def test_without_last_words_the_code_and_the_line_that_says_error_tell():
    found = of_one(code=2, tail=("usage: …", "[1] error: optim.lr: 0 must be positive", "more"), silent=(0, 1))
    assert (found.kind, found.code, found.detail) == ("configuration", 2, "optim.lr: 0 must be positive")
    assert of_one(code=17).detail == "exit code 17" and of_one(code=17).kind == "crashed"


def test_exit_code_0_without_a_result_is_a_failure_of_its_own():
    found = of_one(end(0, code=0), code=0)
    assert (found.kind, found.code) == ("no result", 1)


@pytest.mark.parametrize("limit", ["stalled", "timed out", "superseded"])
def test_what_passed_a_limit_is_called_by_it_whatever_its_ranks_say_when_they_are_ended(limit):
    found = conclude([(None, NodeEnd(code=143, ranks=(end(error="x"),), silent=(1,)))], 124, limit)
    assert (found.kind, found.code, found.rank) == (limit, 124, None)


def test_on_several_nodes_the_failure_names_the_node():
    first = NodeEnd(code=131, ranks=(end(0, 0.5, error=LOST), end(1, code=143, told=True)))
    second = NodeEnd(code=KILLED, ranks=(end(3, error=LOST),), silent=(2,))
    found = conclude([("node1", first), ("node2", second)], 131)
    assert (found.kind, found.host, found.node, found.rank) == ("killed", "node2", 1, 2)
    third = NodeEnd(code=1, ranks=(end(4, 0.4, error="ValueError: x"),))
    found = conclude([("node1", first), ("node3", third)], 131)
    assert (found.kind, found.host, found.node, found.rank) == ("crashed", "node3", 1, 4)
    lost = NodeEnd(code=137, ranks=(end(2, code=143, told=True),))
    assert conclude([("node1", first), ("node2", lost)], 131).kind == "launcher"


# What torch 2.13 says on a rank when another is killed, exits, hangs or never comes; and what sounds like it and is not.
@pytest.mark.parametrize(
    "error",
    [
        LOST,
        "RuntimeError: [/p/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete",
        "RuntimeError: [/p/gloo/gloo/transport/tcp/pair.cc:598] Read error [10.0.0.2]:916: Connection reset by peer",
        "RuntimeError: [Rank 0]: Rank 1 failed to pass monitoredBarrier in 1800000 ms Original exception: …",
        "DistStoreError: wait timeout after 20000ms, keys: /default_pg/0//key",
        "DistStoreError: Timed out after 6 seconds waiting for clients. 1/2 clients joined.",
        "DistNetworkError: The client socket has timed out after 5000ms while trying to connect to (127.0.0.1, 23185).",
        "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "DistNetworkError: Broken pipe",
        "DistBackendError: NCCL error in: x.cpp:1, remote process exited or there was a network error, NCCL version 2.28",
        "Fatal Python error: Aborted terminate called after throwing an instance of 'c10::DistBackendError'",
        "another rank could not store its part; its own message tells why",
    ],
)
def test_errors_by_which_a_rank_tells_of_another(error):
    assert is_neighbours(end(error=error))


@pytest.mark.parametrize(
    "error",
    [
        "DistNetworkError: The server socket has failed to listen on any local network address. port: 29500, EADDRINUSE",
        "RuntimeError: [enforce fail at /gloo/gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: eth9",
        "ConnectionResetError: [Errno 104] Connection reset by peer",
        "upload s3://b/k: connection timed out",
        "RuntimeError: the loss went for a walk",
    ],
)
def test_errors_that_are_a_ranks_own(error):
    assert not is_neighbours(end(error=error))


# --- what follows from it ----------------------------------------------------------------------------------------------


def test_every_kind_has_its_rule_and_those_that_cannot_change_are_not_tried_again():
    assert set(RULES) == set(get_args(Kind))
    assert {kind for kind, rule in RULES.items() if not rule.retry} == {
        "configuration", "data", "non-finite numbers", "superseded",
    }  # fmt: skip
    speak_against_a_node = {kind for kind, rule in RULES.items() if not rule.same_nodes}
    assert speak_against_a_node == {"crashed", "killed", "unreachable", "launcher", "preempted"}


# --- last words of real ranks --------------------------------------------------------------------------------------------

RANK = """
import ctypes, multiprocessing, os, sys, time
from rlhf_core.errors import ConfigError, Preempted
from rlhf_core.train import begin, run_to_end
begin()
print("up", flush=True)
def work():
    {body}
code = run_to_end(work, "URL")
os._exit(code)
"""


def ended(folder: Path, body: str, act=lambda process: None, **environment):
    """The code, the last words and the log of a rank with this body."""
    (folder / "ranks").mkdir(exist_ok=True)
    (folder / "scratch").mkdir()
    env = {
        **os.environ,
        "RLHF_RANKS": f"{folder}/ranks",
        "RANK": "3",
        "WORLD_SIZE": "4",
        "RLHF_SCRATCH": f"{folder}/scratch",
    }
    env |= {"RLHF_GUARD_PID": str(os.getpid()), **environment}
    process = subprocess.Popen([sys.executable, "-u", "-c", RANK.format(body=body)], env=env, stderr=subprocess.PIPE)
    log = folder / "ranks" / "rank-003.log"
    until = time.monotonic() + 30
    while not (log.exists() and "up" in log.read_text()) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    act(process)
    code = process.wait(30)
    assert process.stderr is not None and process.stderr.read() == b"", "all it says is in its own log"
    records, silent = ends_of(folder)
    return code, (records[0] if records else None), silent, log.read_text()


def test_a_rank_that_raises_says_what_with_its_traceback(tmp_path):
    code, words, silent, log = ended(tmp_path, "raise KeyError('a key')")
    assert words and (code, words.code, words.rank, words.told) == (1, 1, 3, False)
    assert words.error == "KeyError: 'a key'" and "in work" in words.trace and silent == ()
    assert "KeyError: 'a key'" in log


@pytest.mark.parametrize(
    ("body", "code", "error", "told"),
    [
        ("raise ConfigError('optim.lr: 0 must be positive')", 2, "optim.lr: 0 must be positive", False),
        ("raise Preempted('saved at step 7')", 75, "saved at step 7", True),
        ("raise SystemExit(9)", 9, "SystemExit: 9", False),
        ("pass", 0, "", False),
    ],
)
def test_a_rank_says_how_it_ends(tmp_path, body, code, error, told):
    found, words, _, _ = ended(tmp_path, body)
    assert words and (found, words.code, words.error, words.told) == (code, code, error, told)


@pytest.mark.parametrize(
    ("body", "memory"),
    [
        ("raise MemoryError", "host"),
        ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory: you tried to allocate 9 bytes')", "host"),
        ("raise type('OutOfMemoryError', (RuntimeError,), {})('CUDA')", "device"),
    ],
)
def test_a_rank_says_which_memory_was_full(tmp_path, body, memory):
    code, words, _, _ = ended(tmp_path, body)
    assert words and (code, words.code, words.memory) == (5, 5, memory)


def test_a_rank_that_crashes_in_c_is_known_by_its_log(tmp_path):
    code, words, silent, _ = ended(tmp_path, "ctypes.string_at(0)")
    assert words and (code, words.code, silent) == (-11, -11, ())
    assert words.error == "Fatal Python error: Segmentation fault" and "in work" in words.trace


def test_a_rank_that_is_killed_is_silent(tmp_path):
    code, words, silent, _ = ended(tmp_path, "time.sleep(100)", lambda process: process.kill())
    assert (code, words, silent) == (-9, None, (3,))


def test_a_rank_that_its_launcher_ends_while_it_still_loads_says_that_it_was_told(tmp_path):
    """The main thread is inside C, as when it waits for the others to come."""
    stuck = "while True: ctypes.CDLL(None).poll(None, 0, -1)"
    code, words, silent, _ = ended(tmp_path, stuck, lambda process: process.terminate())
    assert words and (code, words.code, words.told, silent) == (143, 143, True, ())


def test_a_rank_whose_guard_is_gone_says_that_it_was_told(tmp_path):
    other = subprocess.Popen(["sleep", "1000"])

    def gone(_):
        other.kill()
        other.wait()

    code, words, _, _ = ended(tmp_path, "time.sleep(100)", gone, RLHF_GUARD_PID=str(other.pid))
    assert words and (code, words.code, words.told) == (1, 1, True)


def test_what_a_rank_has_forked_is_ended_without_ending_the_rank(tmp_path):
    body = "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(100,)); child.start(); "
    body += "child.terminate(); child.join(20); assert child.exitcode == -15, child.exitcode"
    code, words, _, log = ended(tmp_path, body)
    assert words and (code, words.code) == (0, 0), log


def test_a_rank_that_cannot_write_its_last_words_ends_with_its_own_error(tmp_path):
    def bring_back(process):
        process.wait(30)
        (tmp_path / "gone").rename(tmp_path / "ranks")

    body = f"os.rename('{tmp_path}/ranks', '{tmp_path}/gone'); raise KeyError('a key')"
    code, words, silent, log = ended(tmp_path, body, bring_back)
    assert (code, words, silent) == (1, None, (3,)) and "KeyError: 'a key'" in log


def test_a_rank_whose_disk_is_full_says_so_in_the_room_that_it_has_kept(tmp_path):
    (ranks := tmp_path / "ranks").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(ranks)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs a disk of its own: {mounted.stderr.decode().strip()}")
    try:
        fill = f"subprocess.run(['dd', 'if=/dev/zero', 'of={ranks}/ballast', 'bs=4k'], stderr=subprocess.DEVNULL)"
        code, words, silent, _ = ended(tmp_path, f"import subprocess; {fill}; raise KeyError('a key')")
    finally:
        subprocess.run(["umount", "--lazy", str(ranks)], check=True)
    assert words and (code, words.code, words.error, silent) == (1, 1, "KeyError: 'a key'", ())
    assert words.trace.startswith("Traceback")


def test_what_a_rank_has_said_first_stands(tmp_path):
    body = "from rlhf_core.ranklog import last_words; last_words(5, 'first'); raise KeyError('second')"
    _, words, _, _ = ended(tmp_path, body)
    assert words and (words.code, words.error) == (5, "first")


def test_ranks_that_have_not_even_begun_count_as_silent_only_if_others_have(tmp_path):
    (tmp_path / "ranks").mkdir()
    assert ends_of(tmp_path, 4, 2) == ((), ())
    (tmp_path / "ranks" / "rank-004.log").touch()
    assert ends_of(tmp_path, 4, 2) == ((), (4, 5))


# --- the kernel's count --------------------------------------------------------------------------------------------------


def test_the_kernels_count_is_that_of_our_cgroup_or_the_nearest_above_it_that_has_one(tmp_path):
    own, groups = tmp_path / "cgroup", tmp_path / "fs"
    (groups / "a" / "b").mkdir(parents=True)
    own.write_text("0::/a/b\n")
    (groups / "a" / "memory.events").write_text("low 0\noom 9\noom_kill 4\n")
    assert oom_kills(groups, own) == 4
    (groups / "a" / "b" / "memory.events").write_text("oom 9\noom_kill 3\noom_group_kill 0\n")
    assert oom_kills(groups, own) == 3


def test_the_first_version_of_cgroups_counts_too_and_in_a_container_where_the_mount_begins(tmp_path):
    own, groups = tmp_path / "cgroup", tmp_path / "fs"
    (groups / "memory").mkdir(parents=True)
    own.write_text("9:name=systemd:/x\n4:memory:/docker/abc\n0::/\n")
    (groups / "memory" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 7\n")
    assert oom_kills(groups, own) == 7


def test_without_cgroups_the_machines_count_tells(tmp_path):
    vmstat = next(line for line in Path("/proc/vmstat").read_text().splitlines() if line.startswith("oom_kill "))
    assert oom_kills(tmp_path, tmp_path / "none") >= int(vmstat.split()[1])
