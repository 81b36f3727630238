"""Artifacts copied to another store: inputs first, verified on the way, and going on where a copy was cut off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import stored
from commands import rlhf

from rlhf_core.aliases import promote
from rlhf_core.artifacts import list_manifests, read_manifest
from rlhf_core.errors import IntegrityError, StoreError
from rlhf_core.store import Store
from rlhf_core.transfer import closure, copy
from rlhf_core.verification import verify_store

TESTS = Path(__file__).parents[1]


@pytest.fixture(params=[Store, stored.Remote])
def stores(tmp_path, request) -> tuple[Store, Store]:
    """A source, read in place or fetched, and a destination."""
    return request.param(f"file://{tmp_path}/from"), Store(f"file://{tmp_path}/to")


def copy_all(source: Store, target: Store, *stages: str) -> list[tuple[str, int, int]]:
    """Copy artifacts of some stages with their inputs; what was sent and what was there."""
    wanted = closure(source, [m for m in list_manifests(source) if m.ref.stage in stages])
    done = [copy(source, target, manifest) for manifest in wanted]
    return [(c.manifest.ref.stage, c.sent, c.present) for c in done]


def test_a_copy_brings_the_inputs_too_and_is_whole(stores):
    source, target = stores
    made = stored.pipeline(source)
    assert copy_all(source, target, "ppo") == [(stage, 3, 0) for stage in ("data", "sft", "reward", "ppo")]
    assert [read_manifest(target, m.ref) for m in made.values()] == list(made.values())
    assert verify_store(target).damages == ()
    manifests = [f"{m.ref.id}/manifest.json" for m in made.values()]
    assert all(target.read(key) == source.read(key) for key in manifests)
    assert copy_all(source, target, "ppo") == [(stage, 0, 3) for stage in ("data", "sft", "reward", "ppo")]


def test_the_command_takes_aliases_and_leaves_inputs_if_asked_to(tmp_path, capfd):
    source, target = Store(f"file://{tmp_path}/from"), Store(f"file://{tmp_path}/to")
    made = stored.pipeline(source)
    promote(source, "best", made["reward"])
    words = ["artifacts", "copy", "@best", "--store", source.url, "--to", target.url]
    code, out, _ = rlhf(capfd, *words, "--no-inputs")
    assert code == 0 and f"{made['reward'].ref.id}  3 files sent, 0 there" in out
    assert [m.ref.stage for m in list_manifests(target)] == ["reward"]
    code, out, _ = rlhf(capfd, *words)
    assert code == 0 and "3 artifacts in" in out and f"{made['reward'].ref.id}  0 files sent, 3 there" in out
    code, _, err = rlhf(capfd, *words[:-1], source.url)
    assert code == 2 and "that is the store itself" in err


def test_a_copy_that_was_killed_publishes_nothing_half_and_goes_on(tmp_path):
    source, target = Store(f"file://{tmp_path}/from"), Store(f"file://{tmp_path}/to")
    stored.pipeline(source)
    code = (
        "import os, sys, threading\n"
        "from rlhf_core.artifacts import list_manifests\n"
        "from rlhf_core.store import Store\n"
        "from rlhf_core.transfer import closure, copy\n"
        "class Dying(Store):\n"
        "    left = int(sys.argv[1])\n"
        "    lock = threading.Lock()\n"
        "    def upload(self, local, key):\n"
        "        with self.lock:\n"
        "            if not Dying.left: os.kill(os.getpid(), 9)\n"
        "            Dying.left -= 1\n"
        "            super().upload(local, key)\n"
        f"source, target = Store({source.url!r}), Dying({target.url!r})\n"
        "for manifest in closure(source, list_manifests(source, 'ppo')): copy(source, target, manifest)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    for uploads in (2, 5):  # the second one goes on where the first was killed
        done = subprocess.run([sys.executable, "-c", code, str(uploads)], cwd=TESTS.parent, env=environment, timeout=60)
        assert done.returncode == -9
        assert verify_store(target).damages == ()
        published = {m.ref.stage for m in list_manifests(target)}
        assert all(ref.stage in published for m in list_manifests(target) for ref in m.inputs.values())
    assert "data" in published and "ppo" not in published
    counts = copy_all(source, target, "ppo")
    assert sum(present for _, _, present in counts) >= 6 and verify_store(target).damages == ()
    assert {m.ref.stage for m in list_manifests(target)} == {"data", "sft", "reward", "ppo"}


def test_what_is_damaged_at_the_source_is_not_copied(stores):
    source, target = stores
    made = stored.pipeline(source)["data"]
    source.write(made.key("model/weights"), b"0" * 3000)
    with pytest.raises(IntegrityError, match=r"from/data/.*model/weights: content differs"):
        copy(source, target, made)
    source.delete(made.key("model/weights"))
    with pytest.raises(IntegrityError, match="model/weights"):
        copy(source, target, made)
    assert read_manifest(target, made.ref) is None


def test_what_arrives_changed_is_not_published(stores):
    source, _ = stores
    made = stored.pipeline(source)["data"]

    class Changing(Store):
        def upload(self, local: Path, key: str) -> None:
            self.write(key, local.read_bytes()[::-1])

    target = Changing(stores[1].url)
    with pytest.raises(IntegrityError, match="content differs"):
        copy(source, target, made)
    assert read_manifest(target, made.ref) is None


def test_what_was_damaged_at_the_destination_is_put_right(stores):
    source, target = stores
    made = stored.pipeline(source)["data"]
    copy(source, target, made)
    target.write(made.key("metrics.jsonl"), b"x" * 200)
    assert (copied := copy(source, target, made)).sent == 1 and copied.present == 2
    assert verify_store(target).damages == ()


def test_an_artifact_that_the_destination_made_itself_is_left(stores):
    source, target = stores
    made = stored.put(source, "sft", {"a": b"ours"})
    theirs = stored.put(target, "sft", {"a": b"theirs"})
    assert made.ref == theirs.ref
    with pytest.raises(IntegrityError, match=r"was published there on .* and is another"):
        copy(source, target, made)
    assert read_manifest(target, made.ref) == theirs and verify_store(target).damages == ()


def test_an_attempt_under_way_at_the_destination_is_not_written_into(stores):
    source, target = stores
    made = stored.put(source, "sft", {"a": b"ours"})
    stored.finish(target, stored.begin(target, made.ref), {"a": b"theirs"})
    with pytest.raises(IntegrityError, match="a job of that store is making it"):
        copy(source, target, made)
    assert target.read(made.key("a")) == b"theirs"


def test_a_missing_input_is_named_with_the_way_around(stores):
    source, _ = stores
    made = stored.pipeline(source)
    source.delete(f"{made['sft'].ref.id}/manifest.json")
    with pytest.raises(IntegrityError, match=f"its input {made['sft'].ref.id} is not published.*--no-inputs"):
        closure(source, [made["reward"]])
    assert closure(source, [made["reward"]], inputs=False) == [made["reward"]]


def test_a_destination_that_fails_ends_the_copy_with_its_error(stores):
    source, _ = stores
    made = stored.pipeline(source)["data"]

    class Full(Store):
        def upload(self, local: Path, key: str) -> None:
            raise StoreError("no space left")

    with pytest.raises(StoreError, match="no space left"):
        copy(source, Full(stores[1].url), made)
