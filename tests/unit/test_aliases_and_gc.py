"""Aliases that are never rewritten, and a clean-up that keeps all that is needed and may be killed at any moment."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import stored
from commands import rlhf

from rlhf_core import gc
from rlhf_core.aliases import keys_of, promote, read_alias, resolve_alias
from rlhf_core.artifacts import list_manifests, make_ref, read_manifest
from rlhf_core.checkpoints import check, clear, newest, sweep
from rlhf_core.errors import ConfigError, IntegrityError, StoreError
from rlhf_core.gc import Policy, collect, orphans, plan, unfinished_writes
from rlhf_core.inventory import look
from rlhf_core.store import Store
from rlhf_core.verification import verify_store

ONE = Policy(keep_last=1)
TESTS = Path(__file__).parents[1]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(f"file://{tmp_path}/store")


def run_gc(store: Store, policy: Policy = Policy()) -> dict[tuple[str, str], int]:  # noqa: B008
    """Plan and remove; what was removed, as (artifact, kind), with its bytes."""
    view = look(store)
    removed = {}
    collect(
        store,
        policy,
        [*unfinished_writes(store, view), *orphans(store, view, policy), *plan(view, policy)],
        lambda r: removed.update({(r.artifact, r.kind): r.bytes}),
    )
    return removed


# --- aliases ---------------------------------------------------------------------------------------------------------


def test_an_alias_stands_for_its_newest_target_and_knows_all_before(store, capfd):
    made = stored.pipeline(store)
    for stage, note in (("sft", "first"), ("reward", ""), ("ppo", "better [bold]")):
        code, out, _ = rlhf(capfd, "artifacts", "promote", "prod", stage, "--note", note, "--store", store.url)
        assert code == 0 and made[stage].ref.id in out
    assert [resolve_alias(store, text).stage for text in ("@prod", "@prod~1", "@prod~2")] == ["ppo", "reward", "sft"]
    _, out, _ = rlhf(capfd, "artifacts", "aliases", "prod", "--store", store.url)
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["@prod", made["ppo"].ref.id], ["@prod~1", made["reward"].ref.id], ["@prod~2", made["sft"].ref.id]
    ]  # fmt: skip
    assert "better [bold]" in out and "first" in out
    _, out, _ = rlhf(capfd, "artifacts", "aliases", "--store", store.url)
    assert len(out.splitlines()) == 2 and made["ppo"].ref.id in out


def test_an_alias_is_taken_wherever_an_artifact_is(store, capfd):
    made = stored.pipeline(store)
    promote(store, "prod", made["sft"])
    promote(store, "prod", made["ppo"])
    for words in (["show", "@prod"], ["lineage", "@prod"], ["verify", "@prod"]):
        code, out, _ = rlhf(capfd, "artifacts", *words, "--store", store.url)
        assert code == 0 and (words[0] == "verify" or made["ppo"].ref.id in out)
    from flows.targets import resolve

    assert resolve("@prod:actor", store=store.url).name == f"{made['ppo'].ref.id}:actor"
    assert resolve("@prod~1", store=store.url).manifest == made["sft"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("@nobody", "no alias 'nobody' in .*; it has prod"),
        ("@prod~5", "was promoted 1 times; go back at most ~0"),
        ("@Prod", "is no alias; write @NAME or @NAME~1"),
        ("@../x", "is no alias"),
    ],
)
def test_an_alias_that_is_not_there_says_what_is(store, text, words):
    promote(store, "prod", stored.pipeline(store)["sft"])
    with pytest.raises(ConfigError, match=words):
        resolve_alias(store, text)


def test_only_what_is_published_and_whole_is_promoted(store):
    made = stored.pipeline(store)
    unpublished = made["sft"].model_copy(update={"ref": make_ref("sft", "demo", {"mark": "other"}, {})})
    with pytest.raises(ConfigError, match="not published"):
        promote(store, "prod", unpublished)
    with pytest.raises(ConfigError, match="use lower-case"):
        promote(store, "Prod!", made["sft"])
    weights = made["sft"].key("model/weights")
    store.write(weights, store.read(weights)[::-1])
    with pytest.raises(IntegrityError, match="content differs"):
        promote(store, "prod", made["sft"])
    assert keys_of(store) == []
    assert promote(store, "prod", made["sft"], checksums=False).number == 1  # sizes alone are right
    store.delete(weights)
    with pytest.raises(IntegrityError, match="missing"):
        promote(store, "prod", made["sft"], checksums=False)


def test_of_many_that_promote_at_once_each_gets_a_number_of_its_own(store):
    made = stored.pipeline(store)["sft"]
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda i: promote(store, "prod", made, str(i), checksums=False).number, range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert {read_alias(store, key).note for key in keys_of(store, "prod")} == {str(i) for i in range(24)}


def test_a_damaged_alias_is_an_error_and_never_the_one_before(store, capfd):
    made = stored.pipeline(store)
    promote(store, "prod", made["sft"])
    damaged = promote(store, "prod", made["ppo"])
    store.write(damaged.key, store.read(damaged.key).replace(b"ppo", b"dpo"))
    with pytest.raises(IntegrityError, match="damaged"):
        resolve_alias(store, "@prod")
    assert resolve_alias(store, "@prod~1") == made["sft"].ref
    code, out, _ = rlhf(capfd, "artifacts", "aliases", "prod", "--store", store.url)
    assert code == 0 and "damaged" in out and made["sft"].ref.id in out
    store.write(damaged.key, store.read(f"aliases/prod/{1:06d}.json"))  # whole, but the record of another number
    with pytest.raises(IntegrityError, match=r"is the record aliases/prod/000001\.json"):
        resolve_alias(store, "@prod")


# --- what may go -----------------------------------------------------------------------------------------------------


def test_without_a_policy_everything_published_stays_and_nothing_goes_without_being_asked(store, capfd):
    made = stored.pipeline(store) | {f"{k}2": v for k, v in stored.pipeline(store, "2", stored.ago(days=900)).items()}
    code, out, _ = rlhf(capfd, "artifacts", "gc", "--store", store.url)
    assert code == 0 and "nothing to remove" in out
    before = store.list("")
    code, out, _ = rlhf(capfd, "artifacts", "gc", "--keep-last", 1, "--store", store.url)
    said = " ".join(out.split())
    assert code == 0 and "nothing was removed: add --delete" in said
    assert f"{made['ppo2'].ref.id} artifact" in said and "not among the last 1; nothing that is kept" in said
    assert store.list("") == before
    code, out, _ = rlhf(capfd, "artifacts", "gc", "--keep-last", 1, "--delete", "--store", store.url)
    assert code == 0 and "freed" in out
    assert {m.ref for m in list_manifests(store)} == {made[stage].ref for stage in ("data", "sft", "reward", "ppo")}
    assert not any(m.ref.id in key for key in store.list("") for k, m in made.items() if k.endswith("2"))
    assert verify_store(store).damages == ()


def test_last_and_age_must_both_allow_it(store):
    old = stored.pipeline(store, "old", stored.ago(days=40))
    mid = stored.pipeline(store, "mid", stored.ago(days=20))
    new = stored.pipeline(store, "new", stored.ago(days=10))
    ids = {name: {m.ref.id for m in made.values()} for name, made in (("old", old), ("mid", mid), ("new", new))}

    def goes(policy: Policy) -> set[str]:
        return {removal.artifact for removal in plan(look(store), policy)}

    assert goes(Policy(keep_last=2)) == ids["old"]
    assert goes(Policy(older_than=timedelta(days=15))) == ids["old"] | ids["mid"]
    assert goes(Policy(keep_last=1, older_than=timedelta(days=30))) == ids["old"]
    assert goes(Policy(keep_last=3, older_than=timedelta(days=1))) == set()


def test_what_is_kept_keeps_all_it_was_made_of(store):
    old = stored.pipeline(store, "old", stored.ago(days=40))
    stored.pipeline(store, "new")
    promote(store, "prod", old["reward"])
    assert set(run_gc(store, ONE)) == {(old["ppo"].ref.id, "artifact")}
    assert {m.ref.id for m in list_manifests(store)} >= {old[s].ref.id for s in ("data", "sft", "reward")}


def test_an_unfinished_artifact_goes_when_it_is_old_and_keeps_its_inputs_until_then(store):
    old = stored.pipeline(store, "old", stored.ago(days=40))
    stored.pipeline(store, "new")
    ref = make_ref("ppo", "demo", {"mark": "unfinished"}, {"sft": old["sft"].ref})
    job = stored.begin(store, ref, inputs={"sft": old["sft"].ref})
    stored.beat(store, job, stored.ago(days=6), ended="failed")
    stored.save(store, ref, 10, {"a": b"1"}, created=stored.ago(days=6))
    assert set(run_gc(store, ONE)) == {(old[s].ref.id, "artifact") for s in ("reward", "ppo")}
    assert newest(store, ref) and read_manifest(store, old["sft"].ref)
    removed = run_gc(store, Policy(keep_last=1, unfinished=timedelta(days=5)))
    assert set(removed) == {(ref.id, "unfinished"), (old["sft"].ref.id, "artifact"), (old["data"].ref.id, "artifact")}
    assert store.list(ref.id) == {}


def test_an_unfinished_artifact_of_unknown_age_goes_only_when_every_age_may(store):
    ref = make_ref("sft", "demo", {}, {})
    stored.begin(store, ref)
    assert run_gc(store, Policy(unfinished=timedelta(days=1))) == {}
    assert set(run_gc(store, Policy(unfinished=timedelta(0)))) == {(ref.id, "unfinished")}


def test_nothing_of_an_artifact_goes_while_a_job_builds_it(store):
    old = stored.pipeline(store, "old", stored.ago(days=40))
    ref = make_ref("ppo", "demo", {"mark": "runs"}, {"sft": old["sft"].ref})
    job = stored.begin(store, ref, inputs={"sft": old["sft"].ref})
    stored.beat(store, job, stored.ago(minutes=10))
    checkpoint = stored.save(store, ref, 10, {"a": b"1"}, created=stored.ago(days=30))
    store.write(f"{ref.id}/checkpoints/0001/parts/{'0' * 64}", b"of a checkpoint that is just being written")
    before = store.list(ref.id)
    every = Policy(older_than=timedelta(0), unfinished=timedelta(0))
    assert {artifact for artifact, _ in run_gc(store, every)} == {old["reward"].ref.id, old["ppo"].ref.id}
    assert store.list(ref.id) == before and newest(store, ref) == checkpoint
    stored.beat(store, job, stored.ago(minutes=20))  # it has been silent for too long: dead
    assert (ref.id, "unfinished") in run_gc(store, every)


def test_of_an_artifact_that_stays_go_checkpoints_files_not_chosen_and_results_of_other_attempts(store):
    made = stored.pipeline(store)["sft"]
    second = stored.begin(store, made.ref, attempt=2)
    stored.finish(store, second, {"model/weights": b"of another attempt"})
    stored.beat(store, second, stored.ago(hours=1), ended="done")
    checkpoint = stored.save(store, made.ref, 10, {"a": b"1" * 50})
    store.write(f"{made.ref.id}/superseded/manifest-20200101T000000.000000Z.json", b"{}")
    store.write(f"{made.ref.id}/superseded/by-a-run.json", b"{}")
    store.write(f"{made.ref.id}/notes.txt", b"somebody's")
    store.write("elsewhere/notes.txt", b"somebody's")
    before = set(store.list(""))
    removed = run_gc(store)
    assert set(removed) == {(made.ref.id, "files"), (made.ref.id, "checkpoints")}
    gone = {
        checkpoint.key, checkpoint.part_key(checkpoint.parts[0]), f"{second.folder}/result.json",
        f"{second.folder}/files/model/weights", f"{made.ref.id}/superseded/manifest-20200101T000000.000000Z.json",
    }  # fmt: skip
    assert before - set(store.list("")) == gone
    assert f"{second.folder}/log.txt" in store.list("") and verify_store(store).damages == ()
    assert run_gc(store) == {}


def test_milestones_of_an_artifact_that_stays_stay_with_all_their_parts(store):
    ref = stored.pipeline(store)["sft"].ref
    shared = {"shared": b"2" * 30}
    milestone = stored.save(store, ref, 10, {"a": b"1" * 50, **shared}, kept=True)
    later = stored.save(store, ref, 20, {"b": b"3" * 40, **shared})
    store_size = store.list(ref.id)[later.key]
    assert run_gc(store) == {(ref.id, "checkpoints"): store_size}
    check(store, milestone)
    assert newest(store, ref) == milestone
    other = stored.save(store, ref, 30, {"c": b"4" * 10, **shared}, attempt=2)
    assert clear(store, ref) == 40 + 40, "of attempt 2 all, of attempt 1 what no milestone needs"
    assert sum("/parts/" in key for key in store.list(ref.id)) == 2
    assert other.key not in store.list("") and newest(store, ref) == milestone


def test_parts_that_no_checkpoint_lists_go_when_nothing_has_happened_for_a_day(store):
    ref = make_ref("sft", "demo", {}, {})
    job = stored.begin(store, ref)
    listed = stored.save(store, ref, 10, {"a": b"1"}, created=stored.ago(hours=30))
    lost = f"{ref.id}/checkpoints/0001/parts/{'0' * 64}"
    store.write(lost, b"lost")
    stored.beat(store, job, stored.ago(hours=20), ended="failed")
    assert run_gc(store) == {}
    stored.beat(store, job, stored.ago(hours=25), ended="failed")
    assert run_gc(store) == {(ref.id, "parts"): 4}
    assert lost not in store.list("") and newest(store, ref) == listed


def test_beside_milestones_of_a_published_artifact_go_parts_and_confirmations_that_no_marker_lists(store):
    made = stored.pipeline(store, created=stored.ago(days=2))["sft"]
    milestone = stored.save(store, made.ref, 10, {"a": b"1" * 50}, kept=True)
    for name in (f"parts/{'0' * 64}", "confirmed/00000020-train-000000/rank-001.json"):
        store.write(f"{made.ref.id}/checkpoints/0001/{name}", b"lost")
    assert run_gc(store) == {(made.ref.id, "parts"): 8}
    check(store, milestone)


def test_the_parts_of_an_attempt_with_a_damaged_marker_stay(store):
    ref = make_ref("sft", "demo", {}, {})
    stored.beat(store, stored.begin(store, ref), stored.ago(hours=30), ended="failed")
    made = stored.save(store, ref, 10, {"a": b"1"}, created=stored.ago(hours=30))
    store.write(made.key, store.read(made.key)[:-9])
    assert run_gc(store) == {}


def test_a_published_artifact_keeps_of_its_checkpoints_what_milestones_list_and_nothing_else(store):
    ref = make_ref("sft", "demo", {}, {})
    lost = [
        f"{ref.id}/checkpoints/{n:04d}/{path}" for n in (1, 2, 3) for path in (f"parts/{'0' * 64}", "confirmed/x/r")
    ]
    milestone = stored.save(store, ref, 10, {"a": b"1"}, kept=True)
    damaged = stored.save(store, ref, 10, {"b": b"2"}, attempt=3, kept=True)
    stored.save(store, ref, 20, {"c": b"3"}, attempt=2)
    for key in lost:
        store.write(key, b"lost")
    store.write(damaged.key, store.read(damaged.key)[:-9])
    assert clear(store, ref, before=1) == 0
    assert clear(store, ref) == 4 * 4 + 1
    kept = {m.key for m in (milestone, damaged)} | {m.part_key(m.parts[0]) for m in (milestone, damaged)}
    assert set(store.list(ref.id)) == kept | set(lost[4:]), "what a damaged marker needs is not known"


def test_a_sweep_takes_what_no_marker_lists_from_the_folders_of_earlier_attempts_alone(store):
    ref = make_ref("sft", "demo", {}, {})
    keys = [
        f"{ref.id}/checkpoints/{n:04d}/{path}" for n in (1, 2, 3, 4) for path in (f"parts/{'0' * 64}", "confirmed/x/r")
    ]
    whole = stored.save(store, ref, 10, {"a": b"1"}, attempt=1)
    damaged = stored.save(store, ref, 20, {"a": b"1"}, attempt=2)
    store.write(damaged.key, b"{")
    for key in keys:
        store.write(key, b"lost")
    store.write(f"{ref.id}/checkpoints/notes.txt", b"somebody's")
    before = set(store.list(ref.id))
    assert sweep(store, ref, 3) == 8
    assert before - set(store.list(ref.id)) == set(keys[:2])
    check(store, whole)
    assert sweep(store, ref, 4) == 8 and before - set(store.list(ref.id)) == {*keys[:2], *keys[4:6]}


def test_what_killed_writes_have_left_is_shown_and_removed_after_a_day(store, capfd):
    made = stored.pipeline(store)["sft"]
    writer = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from rlhf_core import store_local\n"
        "def fill(tmp): tmp.write_bytes(b'x' * 70); os.kill(os.getpid(), signal.SIGKILL)\n"
        "store_local.write(Path(sys.argv[1]), fill)\n"
    )
    for key in (f"{made.place}/model/more", f"aliases/prod/{1:06d}.json", "elsewhere/x"):
        argv = [sys.executable, "-c", writer, f"{store.root}/{key}"]
        assert subprocess.run(argv, cwd=TESTS.parent, timeout=60).returncode == -signal.SIGKILL
    before = store.list("")
    (left,) = [name for name in store.unfinished(timedelta(0)) if name.startswith(made.place)]
    assert run_gc(store) == {} and store.unfinished(timedelta(days=1)) == {}
    for name in store.unfinished(timedelta(0)):
        os.utime(f"{store.root}/{name}", (0, 0))
    code, out, _ = rlhf(capfd, "artifacts", "gc", "--store", store.url)
    assert code == 0 and "cut-off writes" in out and "140 B" in out and left in store.unfinished(timedelta(0))
    code, out, _ = rlhf(capfd, "artifacts", "gc", "--delete", "--store", store.url)
    assert code == 0 and "140 B freed" in out
    assert [name.split("/")[0] for name in store.unfinished(timedelta(0))] == ["elsewhere"], "not ours"
    assert store.list("") == before


@pytest.mark.parametrize(
    "inputs", ['{"sft": {"stage": "sft", "name": "x"}}', '["sft/x"]', '"sft"', '{"sft": null}', '{"sft": {"stage": 3}}']
)
def test_no_artifact_goes_while_a_request_does_not_say_of_what_its_own_is_made(store, inputs):
    old = stored.pipeline(store, "old", stored.ago(days=40))
    stored.pipeline(store, "new")
    ref = make_ref("ppo", "demo", {"mark": "unfinished"}, {})
    key = f"{ref.id}/attempts/0001/job.json"
    store.write(key, f'{{"created": "{stored.ago(days=1)}", "inputs": {inputs}}}'.encode())
    assert any(key in trouble for trouble in look(store).unreadable)
    assert run_gc(store, ONE) == {}
    assert all(read_manifest(store, manifest.ref) for manifest in old.values())


@pytest.mark.parametrize("record", ["manifest", "alias"])
def test_no_artifact_goes_while_a_record_cannot_be_read(store, capfd, record):
    old = stored.pipeline(store, "old", stored.ago(days=40))
    new = stored.pipeline(store, "new")
    promote(store, "prod", new["sft"])
    key = f"{new['ppo'].ref.id}/manifest.json" if record == "manifest" else f"aliases/prod/{1:06d}.json"
    whole = store.read(key)
    store.write(key, whole[:-5])
    before = store.list("")
    code, _, err = rlhf(capfd, "artifacts", "gc", "--keep-last", 1, "--delete", "--store", store.url)
    assert code == 0 and "cannot be read, so no artifact is removed" in err and key in err
    assert store.list("") == before
    store.write(key, whole)
    assert len(run_gc(store, ONE)) == len(old)


@pytest.mark.parametrize("text", ["30", "d", "1y", "-1d", "1.5d"])
def test_an_age_that_is_none_is_refused(store, capfd, text):
    code, _, err = rlhf(capfd, "artifacts", "gc", f"--older-than={text}", "--store", store.url)
    assert code == 2 and "write a number and h, d or w" in err


# --- killed, and raced -----------------------------------------------------------------------------------------------


class Dying(Store):
    """A store that removes so many objects and then fails, as if gc were killed there."""

    left = 0
    lock = threading.Lock()

    def delete(self, key: str) -> None:
        with self.lock:
            if not self.left:
                raise StoreError("killed here")
            self.left -= 1
            super().delete(key)


def messy(store: Store) -> set[str]:
    """A store where there is something of every kind to remove; ids of what has to stay."""
    kept = stored.pipeline(store, "new")
    old = stored.pipeline(store, "old", stored.ago(days=40))
    for made in (kept["sft"], old["sft"]):
        stored.finish(store, stored.begin(store, made.ref, attempt=2), {"model/weights": b"not chosen", "x": b"2"})
        stored.save(store, made.ref, 10, {"a": b"1", "b": b"2"})
    ref = make_ref("dpo", "demo", {"mark": "gone"}, {"sft": old["sft"].ref})
    job = stored.begin(store, ref, inputs={"sft": old["sft"].ref})
    stored.beat(store, job, stored.ago(days=20), ended="failed")
    for step in (10, 20):
        stored.save(store, ref, step, {"same": b"same", "other": bytes([step])}, created=stored.ago(days=20))
    return {manifest.ref.id for manifest in kept.values()}


def consistent(store: Store) -> None:
    """Every record that is there is whole, and so is all it lists; inputs of what is published are published."""
    assert verify_store(store).damages == ()
    manifests = {m.ref.id: m for m in list_manifests(store)}
    assert all(ref.id in manifests for m in manifests.values() for ref in m.inputs.values())


def test_killed_after_any_number_of_removals_the_store_is_consistent_and_the_next_call_ends_the_work(tmp_path):
    first = Store(f"file://{tmp_path}/first")
    kept = messy(first)
    objects = first.list("")
    run_gc(first, ONE)
    total = len(objects) - len(first.list(""))
    assert total > 50
    for deletions in range(total):
        store = Dying(f"file://{tmp_path}/{deletions}")
        messy(store)
        store.left = deletions
        with pytest.raises(StoreError, match="killed here"):
            run_gc(store, ONE)
        consistent(store)
        store.left = 10_000
        run_gc(store, Policy(keep_last=1, unfinished=timedelta(0)))
        consistent(store)
        assert {m.ref.id for m in list_manifests(store)} == kept
        assert {"/".join(key.split("/")[:2]) for key in store.list("")} == kept


def test_a_process_that_is_killed_leaves_a_consistent_store(tmp_path):
    store = Store(f"file://{tmp_path}/store")
    kept = messy(store)
    slow = (
        "import time, stored\n"
        "from datetime import timedelta\n"
        "from rlhf_core import gc\n"
        "from rlhf_core.inventory import look\n"
        "from rlhf_core.store import Store\n"
        "class Slow(Store):\n"
        "    def delete(self, key):\n"
        "        super().delete(key); print(key, flush=True); time.sleep(0.05)\n"
        f"store, policy = Slow({store.url!r}), gc.Policy(keep_last=1)\n"
        "gc.collect(store, policy, gc.plan(look(store), policy))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", slow], stdout=subprocess.PIPE, cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    assert process.stdout
    for _ in range(12):
        assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    consistent(store)
    run_gc(store, Policy(keep_last=1, unfinished=timedelta(0)))
    assert {m.ref.id for m in list_manifests(store)} == kept


@pytest.mark.parametrize("taken", ["promoted", "an input of a new artifact", "being built"])
def test_what_is_taken_into_use_after_the_plan_is_spared(store, taken):
    old = stored.pipeline(store, "old", stored.ago(days=40))
    stored.pipeline(store, "new")
    planned = plan(look(store), ONE)
    assert {removal.artifact for removal in planned} == {m.ref.id for m in old.values()}
    if taken == "promoted":
        promote(store, "prod", old["sft"])
    elif taken == "being built":
        stored.beat(store, stored.begin(store, old["sft"].ref, attempt=2), stored.ago(minutes=0))
    else:
        stored.put(store, "dpo", {"a": b"1"}, {"data": old["data"].ref, "sft": old["sft"].ref})
    spared: list[str] = []
    collect(store, ONE, planned, on_spared=lambda removal: spared.append(removal.artifact))
    assert set(spared) == {old["sft"].ref.id, old["data"].ref.id}
    consistent(store)
    assert read_manifest(store, old["sft"].ref) and not read_manifest(store, old["ppo"].ref)


def test_between_two_looks_at_the_whole_store_what_is_promoted_or_built_is_spared(store, monkeypatch):
    """As the same at the second removal of a batch."""
    old = stored.pipeline(store, "old", stored.ago(days=40))
    stored.pipeline(store, "new")
    spared: list[str] = []

    def take_into_use(removal):
        if removal.artifact == old["ppo"].ref.id:
            promote(store, "prod", old["sft"])
            stored.beat(store, stored.begin(store, old["reward"].ref, attempt=2), stored.ago(minutes=0))

    planned = plan(look(store), ONE)
    collect(store, ONE, planned, take_into_use, lambda removal: spared.append(removal.artifact))
    assert set(spared) == {old[stage].ref.id for stage in ("reward", "sft", "data")}
    consistent(store)


def test_an_artifact_that_is_made_of_a_doomed_one_during_the_clean_up_spares_it_from_the_next_batch_on(
    store, monkeypatch
):
    monkeypatch.setattr(gc, "BATCH", 1)
    removed: list[str] = []
    old = stored.pipeline(store, "old", stored.ago(days=40))
    stored.pipeline(store, "new")

    def use(removal):
        removed.append(removal.artifact)
        if removal.artifact == old["ppo"].ref.id:
            stored.put(store, "dpo", {"a": b"1"}, {"sft": old["sft"].ref})

    collect(store, ONE, plan(look(store), ONE), use)
    assert removed == [old["ppo"].ref.id, old["reward"].ref.id]
    consistent(store)


def test_a_clean_up_asks_the_store_for_so_much_an_artifact_however_many_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(gc, "BATCH", 10)

    class Counting(Store):
        asked = 0

        def read(self, key, start=0, stop=None):
            self.asked += 1
            return super().read(key, start, stop)

    def asked(count: int) -> float:
        store = Counting(f"file://{tmp_path}/{count}")
        for number in range(count):
            stored.put(store, "sft", {"a": b"1"}, mark=str(number))
        planned = plan(look(store), ONE)
        assert len(planned) == count - 1
        store.asked = 0
        collect(store, ONE, planned)
        assert len(list_manifests(store)) == 1
        return store.asked / count

    assert asked(40) < 1.5 * asked(20)


def test_an_attempt_that_begins_while_its_artifact_is_removed_loses_nothing(store):
    old = stored.pipeline(store, "old", stored.ago(days=40))
    stored.pipeline(store, "new")
    ref = old["ppo"].ref
    begun = []

    class Raced(Store):
        """When the manifest has gone, another run begins to build the artifact anew."""

        def delete(self, key: str) -> None:
            super().delete(key)
            if key == f"{ref.id}/manifest.json":
                job = stored.begin(self, ref, attempt=2)
                stored.beat(self, job, stored.ago(minutes=0))
                begun.extend([f"{job.folder}/job.json", f"{job.folder}/heartbeat.json"])

    run_gc(Raced(store.url), ONE)
    assert set(store.list(ref.id)) == set(begun) and begun
