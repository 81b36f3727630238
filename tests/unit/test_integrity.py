"""Damage to what is stored: none goes unnoticed, none is loaded. Seeded damage on a real store, one at a time, then put right."""

import random
from collections import Counter
from pathlib import Path

import pytest
import stored
from commands import rlhf

from rlhf_core import aliases
from rlhf_core.artifacts import Manifest, fetch, list_manifests, survey, verify
from rlhf_core.checkpoints import Checkpoint, check, whole
from rlhf_core.errors import IntegrityError
from rlhf_core.job import JobResult, JobSpec, read_job
from rlhf_core.sealed import parse, seal, unseal
from rlhf_core.store import Store
from rlhf_core.verification import verify_store

CORRUPTIONS = 1000


@pytest.fixture
def everything(tmp_path):
    """A store with a published pipeline, aliases and an unfinished artifact with two checkpoints."""
    store = Store(f"file://{tmp_path}/store")
    made, unfinished = stored.full(store)
    return store, made, unfinished


def damage(rng: random.Random, store: Store, keys: list[str], deletable: list[str]) -> tuple[str, dict[str, bytes]]:
    """Damage one object, or two; returns how, and what was there before."""
    kind = rng.choice(["flip", "flip", "truncate", "delete", "swap"])
    if kind == "delete":
        key = rng.choice(deletable)
        before = {key: store.read(key)}
        store.delete(key)
        return kind, before
    if kind == "swap":
        while True:
            a, b = rng.sample(keys, 2)
            one, two = store.read(a), store.read(b)
            if one != two:
                store.write(a, two)
                store.write(b, one)
                return kind, {a: one, b: two}
    key = rng.choice([k for k in keys if not k.endswith("/empty")])
    data = bytearray(store.read(key))
    before = {key: bytes(data)}
    if kind == "flip":
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    else:
        del data[rng.randrange(len(data)) :]
    store.write(key, bytes(data))
    return kind, before


def loads(store: Store, made: dict[str, Manifest], unfinished, whole_bytes: dict[str, bytes]) -> int:
    """Use everything there is as jobs and commands do; returns how much was refused. What is not refused is as it was made."""
    refused = 0
    for manifest in made.values():
        try:
            folder, found = fetch(store, manifest.ref, Path("unused"))
            assert found == manifest
            for entry in manifest.files:
                assert (folder / entry.path).read_bytes() == whole_bytes[manifest.key(entry.path)]
        except IntegrityError:
            refused += 1
    for text, stage in (("@best", "ppo"), ("@best~1", "sft")):
        try:
            assert aliases.resolve_alias(store, text) == made[stage].ref
        except (IntegrityError, ValueError):
            refused += 1
    for key in (k for k in whole_bytes if k.endswith("/job.json")):
        try:
            assert seal(read_job(f"{store.url}#{key}")[1]) == whole_bytes[key]
        except (IntegrityError, KeyError):
            refused += 1
    for key in (k for k in whole_bytes if k.endswith("/result.json")):
        refused += not publishable(store, key, whole_bytes[key])
    intact = 0
    for checkpoint in whole(store, unfinished, lambda _: None):
        try:
            check(store, checkpoint)
        except IntegrityError:
            continue  # for the one before it
        assert all(store.read(checkpoint.part_key(p)) == whole_bytes[checkpoint.part_key(p)] for p in checkpoint.parts)
        assert whole_bytes[checkpoint.key] == seal(checkpoint)
        intact += 1
    return refused + 2 - intact


def publishable(store: Store, key: str, before: bytes) -> bool:
    """Whether an attempt's result could be published: as it was made, with its files."""
    id = "/".join(key.split("/")[:2])
    try:
        result = unseal(JobResult, store.read(key), key)
        ref = read_job(f"{store.url}#{key.replace('result', 'job')}")[1].output
        verify(store, Manifest(ref=ref, spec={}, folder=result.folder, files=result.files))
    except (IntegrityError, KeyError):
        return False
    assert ref.id == id and seal(result) == before
    return True


def test_of_a_thousand_seeded_corruptions_each_is_found_and_none_is_loaded(everything, capsys):
    store, made, unfinished = everything
    keys = [k for k in store.list("") if not k.endswith(("log.txt", "heartbeat.json"))]
    original = {key: store.read(key) for key in keys}
    # A record that is gone stands for nothing any more; what a record lists, and an alias's past and target, are missed.
    gone = (f"aliases/best/{1:06d}.json", f"{made['ppo'].ref.id}/manifest.json")
    deletable = [k for k in keys if "/files/" in k or "/parts/" in k or k in gone]
    assert verify_store(store).damages == () and loads(store, made, unfinished, original) == 0
    counts: Counter[str] = Counter()
    for number in range(CORRUPTIONS):
        kind, before = damage(random.Random(number), store, keys, deletable)
        found = verify_store(store).damages
        where = ", ".join(before)
        assert found, f"corruption {number}: {kind} of {where} went unnoticed"
        assert loads(store, made, unfinished, original), f"corruption {number}: {kind} of {where} was loaded"
        counts[f"{kind} of {'a record' if where.endswith('.json') else 'content'}"] += 1
        for key, data in before.items():
            store.write(key, data)
    assert verify_store(store).damages == ()
    assert sum(counts.values()) == CORRUPTIONS and len(counts) >= 7
    with capsys.disabled():
        print(
            "\n  "
            + ", ".join(f"{count} x {kind}" for kind, count in sorted(counts.items()))
            + ": all found, none loaded"
        )


@pytest.mark.parametrize("kind", ["manifest", "marker", "alias", "result", "job"])
def test_no_single_bit_of_a_record_can_change_and_no_byte_can_go_or_come(everything, kind):
    store, _, _ = everything
    ending, model = {
        "manifest": ("/manifest.json", Manifest),
        "marker": ("00000010-train-000000.json", Checkpoint),
        "alias": ("aliases/best/000001.json", aliases.Alias),
        "result": ("/result.json", JobResult),
        "job": ("/job.json", JobSpec),
    }[kind]
    data = store.read(next(key for key in store.list("") if key.endswith(ending)))
    unseal(model, data, "whole")
    changed = [data[: b // 8] + bytes([data[b // 8] ^ 1 << b % 8]) + data[b // 8 + 1 :] for b in range(8 * len(data))]
    changed += [data[:end] for end in range(len(data))]
    changed += [data[:at] + b" " + data[at:] for at in range(len(data) + 1)]
    changed += [data[:at] + data[at + 1 :] for at in range(len(data))]
    for number, other in enumerate(changed):
        with pytest.raises(IntegrityError):
            parse(other, "changed")
            pytest.fail(f"change {number} of {len(changed)} is taken for a whole record: {other[-120:]!r}")


def test_a_record_of_an_older_version_has_no_seal_and_is_read(tmp_path):
    made = stored.put(Store(f"file://{tmp_path}"), "sft", {"a": b"1"})
    assert unseal(Manifest, made.model_dump_json().encode(), "old") == made


def test_a_record_of_absurd_depth_is_damaged_and_ends_nobody(tmp_path):
    with pytest.raises(IntegrityError, match="not JSON"):
        parse(b"[" * 1_000_000, "deep")


def test_records_that_were_exchanged_are_not_taken_for_each_other(everything):
    store, made, _ = everything
    a, b = (f"{made[stage].ref.id}/attempts/0001" for stage in ("sft", "reward"))
    for name in ("job.json", "result.json"):
        one, two = store.read(f"{a}/{name}"), store.read(f"{b}/{name}")
        store.write(f"{a}/{name}", two)
        store.write(f"{b}/{name}", one)
    found = {(d.artifact, d.file): d.what for d in verify_store(store).damages}
    assert found == {
        (made[stage].ref.id, f"attempts/0001/{name}"): "is the record of another attempt"
        for stage in ("sft", "reward")
        for name in ("job.json", "result.json")
    }


def test_verify_names_each_damage_and_what_it_is_and_goes_on(everything, capfd):
    store, made, unfinished = everything
    sft, reward, ppo = (made[stage] for stage in ("sft", "reward", "ppo"))
    store.write(sft.key("model/weights"), store.read(sft.key("model/weights"))[:-1])
    store.delete(reward.key("metrics.jsonl"))
    weights = store.read(ppo.key("model/weights"))
    store.write(ppo.key("model/weights"), weights[:-1] + bytes([weights[-1] ^ 1]))
    newer = made["data"].model_copy(update={"schema_version": 99})
    store.write(f"{made['data'].ref.id}/manifest.json", seal(newer))
    store.write("evaluate/odd-000000000000/manifest.json", b"{")
    part = next(key for key in store.list(f"{unfinished.id}/checkpoints") if "/parts/" in key)
    store.delete(part)
    code, out, _ = rlhf(capfd, "artifacts", "verify", "--store", store.url)
    said = " ".join(out.split())
    assert code == 3
    for words in (
        f"{sft.ref.id} model/weights truncated: 2,999 of 3,000 bytes",
        f"{reward.ref.id} metrics.jsonl missing",
        f"{ppo.ref.id} model/weights content changed",
        f"{made['data'].ref.id} manifest.json schema 99 is newer than 1, which this version reads; upgrade",
        "evaluate/odd-000000000000 manifest.json damaged: not JSON",
        f"{unfinished.id} step",
        " artifacts, ",
    ):
        assert words in said, words


def test_verify_of_one_artifact_looks_at_nothing_else(everything, capfd):
    store, made, _ = everything
    store.delete(made["sft"].key("model/weights"))
    assert rlhf(capfd, "artifacts", "verify", made["ppo"].ref.id, "--store", store.url)[0] == 0
    assert rlhf(capfd, "artifacts", "verify", "@best", "--store", store.url)[0] == 0
    assert rlhf(capfd, "artifacts", "verify", "@best~1", "--store", store.url)[0] == 3
    code, _, err = rlhf(capfd, "artifacts", "verify", "sft/other", "--store", store.url)
    assert code == 2 and "no artifact begins with 'sft/other'" in err


def test_what_is_removed_while_verify_looks_is_no_damage(everything):
    store, made, _ = everything

    class Removing(Store):
        """A store from which another command removes an artifact right after its records were read."""

        def list(self, prefix: str) -> dict[str, int]:
            found = super().list(prefix)
            if prefix == "":
                gone = made["ppo"].ref.id
                for key in [f"{gone}/manifest.json", *(k for k in found if "/files/" in k and k.startswith(gone))]:
                    data = super().read(key) if key.endswith("manifest.json") else b""
                    self.kept = {**getattr(self, "kept", {}), key: data}
                    super().delete(key)
            return found

        def read(self, key: str, *args, **kwargs) -> bytes:
            kept = getattr(self, "kept", {}).get(key)
            return kept or super().read(key, *args, **kwargs)

    damages = verify_store(Removing(store.url), ids={made["ppo"].ref.id}).damages
    assert damages == ()


def test_one_damaged_manifest_hides_no_other_and_is_shown_as_damaged(everything, capfd):
    store, made, _ = everything
    key = f"{made['sft'].ref.id}/manifest.json"
    store.write(key, store.read(key).replace(b"demo", b"dem0", 1))
    manifests, damaged = survey(store)
    assert {m.ref.stage for m in manifests} == {"data", "reward", "ppo"} and set(damaged) == {made["sft"].ref.id}
    assert len(list_manifests(store, "sft")) == 0
    code, out, _ = rlhf(capfd, "artifacts", "list", "--store", store.url)
    assert code == 0
    assert f"{made['sft'].ref.id} damaged: its content is not what its seal says" in " ".join(out.split())
    assert all(made[stage].ref.id in out for stage in ("data", "reward", "ppo"))
    code, _, err = rlhf(capfd, "artifacts", "show", made["sft"].ref.id, "--store", store.url)
    assert code == 3 and "damaged" in err
