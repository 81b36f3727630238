"""The cache of inputs: whole or not there, kept while somebody uses it, and no larger than it may be. Real processes and files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import stored

from rlhf_core import cache as caching
from rlhf_core.artifacts import Manifest, fetch
from rlhf_core.cache import IDLE_SECONDS
from rlhf_core.errors import ConfigError, IntegrityError
from rlhf_core.store import Store

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
# Fetches an artifact as a job on another machine would; what it does next is the rest of the code.
FETCH = """
import sys, time, stored
from pathlib import Path
from rlhf_core.artifacts import fetch, manifest_at
def get(id, store=None):
    store = store or stored.Remote(sys.argv[1])
    return fetch(store, manifest_at(store, id).ref, Path(sys.argv[2]))[0]
"""


@pytest.fixture
def store(tmp_path) -> stored.Remote:
    return stored.Remote(f"file://{tmp_path}/store")


def process(store: Store, cache: Path, code: str) -> subprocess.Popen[str]:
    """A process of its own that runs code after FETCH."""
    return subprocess.Popen(
        [sys.executable, "-c", FETCH + code, store.url, str(cache)],
        stdout=subprocess.PIPE, text=True, cwd=TESTS.parent, env=ENVIRONMENT,
    )  # fmt: skip


def made(store: Store, mark: str, size: int = 1000) -> Manifest:
    return stored.put(store, "sft", {"a": mark.encode() * size, "b/c": b"2"}, mark=mark)


def idle(folder: Path, days: float) -> None:
    """As if the folder had last been taken so long ago, by processes that have ended."""
    when = time.time() - days * 86400
    os.utime(folder.with_name(f"{folder.name}.use"), (when, when))


def let_go() -> None:
    """What the kernel does when this process ends."""
    while caching._held:
        os.close(caching._held.popitem()[1])


def folders(cache: Path) -> set[str]:
    return {f.name for f in cache.iterdir() if f.is_dir()}


def test_all_processes_of_a_node_share_one_download(store, tmp_path):
    one = made(store, "x")
    running = [process(store, tmp_path / "cache", f"print(get({one.ref.id!r}))") for _ in range(4)]
    said = {p.communicate(timeout=60)[0].strip() for p in running}
    assert len(said) == 1 and [p.returncode for p in running] == [0] * 4
    assert (Path(said.pop()) / "a").read_bytes() == b"x" * 1000
    assert len(folders(tmp_path / "cache")) == 1


def test_a_download_that_is_killed_leaves_nothing_that_is_used(store, tmp_path):
    one, cache = made(store, "x"), tmp_path / "cache"
    code = f"""
class Slow(stored.Remote):
    def download(self, key, local):
        if key.endswith("/a"):
            super().download(key, local)
        else:
            while not (local.parent.parent / "a").exists():
                time.sleep(0.01)
            print("half", flush=True)
            time.sleep(60)
get({one.ref.id!r}, Slow(sys.argv[1]))
"""
    killed = process(store, cache, code)
    assert killed.stdout and killed.stdout.readline() == "half\n"
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(30) == -signal.SIGKILL
    killed.stdout.close()
    assert [name.endswith(".part") for name in folders(cache)] == [True]
    assert (fetch(store, one.ref, cache)[0] / "a").read_bytes() == b"x" * 1000
    assert [name.endswith(".part") for name in folders(cache)] == [False]


def test_what_a_killed_download_of_another_artifact_left_goes(store, tmp_path):
    cache = tmp_path / "cache"
    fetch(store, made(store, "x").ref, cache)
    (cache / "some-other.part").mkdir()
    (cache / "some-other.part" / "half").write_bytes(b"1")
    fetch(store, made(store, "y").ref, cache)
    assert not any(name.endswith(".part") for name in folders(cache)) and len(folders(cache)) == 2


def test_beyond_the_limit_the_least_recently_used_goes_unless_it_was_used_today(store, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE_GB", "0.0000025")  # 2,500 bytes: two artifacts
    cache = tmp_path / "cache"
    one, two, three, four = (made(store, mark) for mark in "1234")
    first, second = (fetch(store, m.ref, cache)[0] for m in (one, two))
    let_go()
    idle(first, 2)
    idle(second, 3)
    third, _ = fetch(store, three.ref, cache)
    assert folders(cache) == {first.name, third.name}
    idle(first, 0.5)
    let_go()
    fourth, _ = fetch(store, four.ref, cache)  # over the limit, since what was used today stays
    assert folders(cache) == {first.name, third.name, fourth.name}


def test_a_folder_that_a_living_process_took_is_never_removed_however_long_ago(store, tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE_GB", "0")
    cache, one, two = tmp_path / "cache", made(store, "1"), made(store, "2")
    holder = process(store, cache, f"print(get({one.ref.id!r}), flush=True); sys.stdin.read(); time.sleep(60)")
    assert holder.stdout
    folder = Path(holder.stdout.readline().strip())
    idle(folder, 30)
    fetch(store, two.ref, cache)
    assert (folder / "a").read_bytes() == b"1" * 1000
    holder.kill()  # it has no time to say that it is done
    holder.wait(30)
    holder.stdout.close()
    idle(folder, 30)
    fetch(store, made(store, "3").ref, cache)
    assert not folder.exists()


def test_taking_a_folder_again_makes_it_recently_used(store, tmp_path):
    one = made(store, "1")
    folder, _ = fetch(store, one.ref, tmp_path / "cache")
    idle(folder, 9)
    fetch(store, one.ref, tmp_path / "cache")
    assert time.time() - (tmp_path / "cache" / f"{folder.name}.use").stat().st_mtime < IDLE_SECONDS


def test_too_little_room_is_told_before_anything_is_fetched(store, tmp_path, monkeypatch):
    one = made(store, "1")
    monkeypatch.setattr(caching, "SPARE_BYTES", 1 << 60)
    with pytest.raises(ConfigError) as caught:
        fetch(store, one.ref, tmp_path / "cache")
    for words in ("1,001 bytes of inputs", "the disk has", str(tmp_path / "cache"), "lower RLHF_CACHE_GB", "TMPDIR"):
        assert words in str(caught.value)
    assert folders(tmp_path / "cache") == set()


def test_for_room_on_the_disk_the_unused_goes_even_below_the_limit(store, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    old, _ = fetch(store, made(store, "1").ref, cache)
    let_go()
    idle(old, 2)
    monkeypatch.setattr(caching, "_free", lambda folder: 10**6 if old.exists() else 10**12)
    new, _ = fetch(store, made(store, "2").ref, cache)
    assert folders(cache) == {new.name}


@pytest.mark.parametrize("text", ["much", "-1", "nan"])
def test_a_limit_that_is_none_is_refused(store, tmp_path, monkeypatch, text):
    monkeypatch.setenv("RLHF_CACHE_GB", text)
    with pytest.raises(ConfigError, match=f"RLHF_CACHE_GB: '{text}'"):
        fetch(store, made(store, "1").ref, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_what_is_damaged_in_the_store_never_gets_into_the_cache(store, tmp_path, damage):
    one = made(store, "1")
    key = one.key("a")
    if damage == "delete":
        store.delete(key)
    else:
        store.write(key, b"1" * 999 + (b"0" if damage == "flip" else b""))
    with pytest.raises(IntegrityError, match=f"{one.ref.id}: a: "):
        fetch(store, one.ref, tmp_path / "cache")
    assert not any(name for name in folders(tmp_path / "cache") if not name.endswith(".part"))
