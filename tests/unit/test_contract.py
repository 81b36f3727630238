"""The contract half: fingerprints, artifacts, configuration errors, plan."""

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rlhf_core.artifacts import (
    FileEntry,
    Manifest,
    describe,
    fetch,
    job_cache,
    list_manifests,
    make_ref,
    publish,
    read_manifest,
)
from rlhf_core.canonical import canonical_json, differences, fingerprint
from rlhf_core.config import load_config, parse_config
from rlhf_core.errors import ConfigError, IntegrityError, is_transient
from rlhf_core.job import JobSpec, job_url, parse_progress, progress_line, read_job
from rlhf_core.plan import make_plan, stage_refs
from rlhf_core.resources import ResourceTable
from rlhf_core.sealed import seal
from rlhf_core.specs import PPOSpec
from rlhf_core.store import Store

BASE = {
    "name": "demo",
    "model": {"family": "llama", "positions": 600},
    "data": {"sources": [{"kind": "quickstart"}], "tokenizer": {"train_vocab_size": 300}},
}


def test_canonical_json_has_one_form_and_drops_none():
    assert (
        canonical_json({"b": (1, 2.0), "a": None, "c": {"y": -0.0, "x": True}})
        == '{"b":[1,2.0],"c":{"x":true,"y":0.0}}'
    )
    assert fingerprint({"a": 1, "b": None}) == fingerprint({"a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {"a": {1, 2}}, b"x", object()])
def test_what_has_no_stable_form_is_refused(value):
    with pytest.raises(ValueError):
        canonical_json(value)


def test_differences_name_the_dotted_path():
    assert differences({"optim": {"lr": 1e-5}, "x": 1}, {"optim": {"lr": 2e-5}, "x": 1}) == {"optim.lr": (1e-5, 2e-5)}


def test_resources_and_store_do_not_change_fingerprints_but_specs_and_seed_do():
    refs = stage_refs(parse_config(BASE))
    elsewhere = stage_refs(parse_config({**BASE, "store": "s3://b/x", "resources": {"processes": 2, "zero_stage": 3}}))
    assert refs == elsewhere
    kl = stage_refs(parse_config({**BASE, "ppo": {"kl_coef": 0.2}}))
    assert [s for s in refs if refs[s] != kl[s]] == ["ppo", "evaluate"]
    assert all(refs[s] != r for s, r in stage_refs(parse_config({**BASE, "seed": 1})).items())
    revised = stage_refs(parse_config({**BASE, "reward": {"revision": 2}}))
    assert [s for s in refs if refs[s] != revised[s]] == ["reward", "ppo", "evaluate"]


def test_a_moved_data_file_keeps_its_fingerprint_and_a_changed_one_does_not(tmp_path):
    def refs(path: Path, text: str):
        path.write_text(text)
        return stage_refs(
            parse_config({**BASE, "data": {**BASE["data"], "sources": [{"kind": "files", "paths": [str(path)]}]}})
        )

    one = refs(tmp_path / "a.jsonl", "{}")
    assert refs(tmp_path / "b.jsonl", "{}") == one
    assert refs(tmp_path / "b.jsonl", "{ }")["data"] != one["data"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modl": 1}, ["modl", "unknown key", "did you mean 'model'"]),
        ({"ppo": {"kl_ceof": 1}}, ["ppo.kl_ceof", "did you mean 'kl_coef'"]),
        ({"ppo": {"steps": 0}}, ["ppo.steps", "greater than or equal to 1", "0"]),
        ({"ppo": {"rollout_batch_size": 10, "minibatches": 4}}, ["rollout_batch_size 10", "minibatches 4"]),
        ({"sft": {"batch_size": 5}, "resources": {"processes": 2}}, ["sft.batch_size = 5", "2 processes"]),
        ({"model": {"family": "llama", "path": "x"}}, ["model", "exclude each other"]),
        ({"model": {"family": "llama", "positions": 100}}, ["positions 100", "exceeds"]),
        ({"model": {}}, ["model", "path", "family"]),
        ({"resources": {"stages": {"ppo": {"micro": 1}}}}, ["micro"]),
        ({"sft": {"optim": {"lr": float("nan")}}}, ["sft.optim.lr", "finite"]),
        ({"name": "No Spaces"}, ["name"]),
    ],
)
def test_a_wrong_configuration_names_the_field_and_the_rule(change, words):
    with pytest.raises(ConfigError) as caught:
        parse_config({**BASE, **change})
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("share", "change", "stage"),
    [
        ("sft", {}, "sft"),
        ("reward", {}, "reward"),
        ("reward", {"method": "dpo"}, "dpo"),
        ("ppo", {}, "ppo"),
        ("ppo", {"method": "dpo"}, "evaluate"),
    ],
)
def test_a_share_that_a_stage_reads_cannot_be_zero(share, change, stage):
    data = {**BASE["data"], "shares": {share: 0}}
    with pytest.raises(ConfigError, match=rf"data\.shares\.{share} is 0, but the {stage} stage.*greater than 0"):
        parse_config({**BASE, **change, "data": data})


def test_the_share_of_a_stage_that_the_pipeline_lacks_may_be_zero():
    judged = {"rewards": [{"kind": "function", "function": "a.py:f"}], "advantage": "rloo"}
    parse_config({**BASE, "ppo": judged, "data": {**BASE["data"], "shares": {"reward": 0}}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"evaluate": {"max_response_tokens": 400}},
            r"evaluate\.max_response_tokens 400 = 656 exceeds model\.positions",
        ),
        ({"ppo": {"max_response_tokens": 400}}, r"ppo\.max_response_tokens 400 = 656 exceeds model\.positions 600"),
        ({"reward": {"model": {"family": "gpt2"}}}, r"256 = 512 exceeds reward\.model\.positions 128"),
    ],
)
def test_every_stages_answers_must_fit_every_new_model(change, words):
    with pytest.raises(ConfigError, match=words):
        parse_config({**BASE, **change})


def test_what_the_pipeline_does_not_run_need_not_fit():
    other = {"ppo": {"max_response_tokens": 400}, "reward": {"model": {"family": "gpt2"}}}
    parse_config({**BASE, "method": "dpo", **other})
    parse_config({**BASE, "reward": {"model": {"family": "gpt2"}, "tokenizer": {"path": "elsewhere"}}})


def test_overrides_reach_nested_fields_and_lists_and_replace_the_models_origin(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: demo\nmodel: {path: somewhere}\ndata: {sources: [{kind: quickstart, prompts: 10}]}\n")
    config = load_config(
        file, ["ppo.kl_coef=1e-2", "data.sources.0.prompts=20", "model.family=gpt2", "model.positions=512"]
    )
    assert (config.ppo.kl_coef, config.data.sources[0].prompts, config.model.family) == (0.01, 20, "gpt2")
    for wrong in ("ppo.kl", "ppo.klcoef=1", "data.sources.3.prompts=1", "name.x=1"):
        with pytest.raises(ConfigError, match=r"ppo|data|name"):
            load_config(file, [wrong])


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1, 2]", "must be a mapping"), ("a: [", "not YAML"), (None, "no such file; there are: other.yaml")],
)
def test_a_file_that_is_no_configuration_says_why(text, words, tmp_path):
    (tmp_path / "other.yaml").write_text("")
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_config(file)


def test_per_stage_resources_override_the_common_ones():
    table = ResourceTable(micro_batch=8, stages={"ppo": {"micro_batch": 2}})
    assert table.of("sft").micro_batch == 8 and table.of("ppo").micro_batch == 2


@pytest.mark.parametrize("url", ["memory://", "file://{tmp}"])
def test_create_only_writes_and_absence(url, tmp_path):
    store = Store(url.format(tmp=tmp_path) if "file" in url else f"memory://{tmp_path.name}")
    with pytest.raises(KeyError):
        store.read("a/b")
    store.write("a/b", b"1", create=True)
    with pytest.raises(Exception, match="a/b"):
        store.write("a/b", b"2", create=True)
    assert store.read("a/b") == b"1"
    store.write("a/b", b"22")
    assert store.list("a") == {"a/b": 2} and store.list("") == {"a/b": 2} and store.list("zz") == {}
    (tmp_path / "local").write_bytes(b"333")
    store.upload(tmp_path / "local", "a/c")
    store.download("a/c", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"333"
    store.delete("a/c")
    store.delete("a/c")  # it is gone, which is what was asked
    assert store.list("a") == {"a/b": 2}
    with pytest.raises(Exception, match="relative"):
        store.read("../x")


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_range_of_an_object_is_what_a_slice_is_and_its_checksum_is_known(scheme, tmp_path):
    store = Store(f"{scheme}://{tmp_path}/ranges")
    store.write("x", b"0123456789")
    for start in (0, 3, 9, 10, 12):
        for stop in (0, 3, 4, 10, 12, None):
            assert store.read("x", start, stop) == b"0123456789"[start:stop]
    assert store.sha256("x") == hashlib.sha256(b"0123456789").hexdigest()
    for call in (lambda: store.sha256("y"), lambda: store.read("y", 1, 2)):
        with pytest.raises(KeyError):
            call()


def test_a_folder_that_cannot_be_read_is_an_error_and_one_that_is_not_there_is_empty():
    """As an ordinary user, whom a folder's mode keeps out."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / "open" / "closed").mkdir(parents=True)
        (root / "open" / "closed" / "x").write_bytes(b"1")
        (root / "open" / "closed").chmod(0)
        code = (
            "import os, sys\n"
            "from rlhf_core.errors import StoreError\n"
            "from rlhf_core.store import Store\n"
            "store = Store(sys.argv[1])\n"
            "if os.geteuid() == 0: os.setuid(65534)\n"
            "assert store.list('nowhere') == {} == Store(sys.argv[1] + '/nowhere').list('')\n"
            "for prefix in ('', 'open', 'open/closed'):\n"
            "    try: print('listed', store.list(prefix))\n"
            "    except StoreError as error: print('refused', 'Permission denied' in str(error) and 'closed' in str(error))\n"
        )
        done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60)
        (root / "open" / "closed").chmod(0o755)
    assert done.stdout.splitlines() == ["refused True"] * 3, done.stdout + done.stderr


def test_a_listing_shows_links_as_files_and_nothing_of_what_is_gone(tmp_path):
    store = Store(str(tmp_path / "store"))
    store.write("a/b", b"22")
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x").write_bytes(b"1")
    (tmp_path / "store" / "a" / "link").symlink_to(tmp_path / "far" / "x")
    (tmp_path / "store" / "a" / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "store" / "empty").mkdir()
    assert store.list("") == {"a/b": 2, "a/link": 1} and store.list("a/b") == {}


def test_an_at_sign_in_a_local_folder_is_no_credential(tmp_path):
    Store(f"{tmp_path}/me:x@home/store").write("x", b"1")
    assert Store(f"file://{tmp_path}/me:x@home/store").read("x") == b"1"


def artifact(store: Store, folder: Path) -> Manifest:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "w.bin").write_bytes(os.urandom(1000))
    ref = make_ref("sft", "demo", {"a": 1}, {})
    for entry in describe(folder):
        store.upload(folder / entry.path, f"{ref.id}/{entry.path}")
    return Manifest(ref=ref, spec={"a": 1}, files=describe(folder))


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_an_artifact_exists_when_its_manifest_does_and_is_read_back_verified(scheme, tmp_path):
    store = Store(f"{scheme}://{tmp_path}/store")
    manifest = artifact(store, tmp_path / "out")
    assert read_manifest(store, manifest.ref) is None and list_manifests(store) == []
    with pytest.raises(IntegrityError, match="not published"):
        fetch(store, manifest.ref, tmp_path / "cache")
    assert publish(store, manifest) == manifest
    folder, read = fetch(store, manifest.ref, tmp_path / "cache")
    assert (folder / "model" / "w.bin").read_bytes() == (tmp_path / "out" / "model" / "w.bin").read_bytes()
    assert read == manifest and list_manifests(store, "sft") == [manifest]
    later = manifest.model_copy(update={"metrics": {"x": 1}})
    assert publish(store, later) == manifest  # the first manifest stands


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_detected_before_publishing_and_before_reading(damage, tmp_path):
    store = Store(f"file://{tmp_path}/store")
    manifest = artifact(store, tmp_path / "out")
    key = f"{manifest.ref.id}/model/w.bin"
    data = store.read(key)

    def hurt() -> None:
        if damage == "delete":
            store.delete(key)
        else:
            store.write(key, data[:-1] if damage == "truncate" else data[:500] + bytes([data[500] ^ 1]) + data[501:])

    hurt()
    with pytest.raises(IntegrityError, match=r"w\.bin"):
        publish(store, manifest)
    assert read_manifest(store, manifest.ref) is None
    store.write(key, data)
    publish(store, manifest)
    hurt()
    with pytest.raises(IntegrityError, match=r"w\.bin"):
        fetch(store, manifest.ref, tmp_path / "cache")


def put_artifact(store: Store, folder: Path, text: str) -> Manifest:
    """The same artifact each time (one fingerprint), with this text in its file."""
    folder.mkdir()
    (folder / "a.txt").write_text(text)
    ref = make_ref("sft", "demo", {"a": 1}, {})
    store.upload(folder / "a.txt", f"{ref.id}/a.txt")
    manifest = Manifest(ref=ref, spec={"a": 1}, files=describe(folder))
    store.write(f"{ref.id}/manifest.json", manifest.model_dump_json().encode())
    return manifest


def test_an_artifact_that_was_built_anew_or_is_of_another_store_is_fetched_anew(tmp_path):
    cache, stores = tmp_path / "cache", [Store(f"memory://{tmp_path.name}-{i}") for i in range(2)]
    for number, (store, text) in enumerate([(stores[0], "first"), (stores[0], "again"), (stores[1], "other")]):
        ref = put_artifact(store, tmp_path / str(number), text).ref
        assert (fetch(store, ref, cache)[0] / "a.txt").read_text() == text
    assert (fetch(stores[0], ref, cache)[0] / "a.txt").read_text() == "again"


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing"])
def test_a_fetched_file_that_is_not_what_it_was_is_fetched_again(damage, tmp_path):
    store = Store(f"memory://{tmp_path.name}")
    ref = put_artifact(store, tmp_path / "out", "content").ref
    file = fetch(store, ref, tmp_path / "cache")[0] / "a.txt"
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("CONTENT" if damage == "changed" else "cont")
    assert (fetch(store, ref, tmp_path / "cache")[0] / "a.txt").read_text() == "content"


def test_the_cache_is_private_and_one_that_others_may_write_to_is_refused(tmp_path):
    store = Store(f"memory://{tmp_path.name}")
    ref = put_artifact(store, tmp_path / "out", "content").ref
    fetch(store, ref, tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "own")
    for folder in ("open", "link"):
        with pytest.raises(ConfigError, match=f"{folder}: others may have written"):
            fetch(store, ref, tmp_path / folder)
    assert str(os.getuid()) in job_cache().name


def test_a_manifest_from_a_newer_schema_or_of_nonsense_is_an_error_not_an_absence(tmp_path):
    store = Store(f"file://{tmp_path}")
    ref = make_ref("sft", "demo", {}, {})
    store.write(f"{ref.id}/manifest.json", b'{"schema_version": 99}')
    with pytest.raises(IntegrityError, match="newer"):
        read_manifest(store, ref)
    store.write(f"{ref.id}/manifest.json", b"{")
    with pytest.raises(IntegrityError, match="damaged: not JSON"):
        read_manifest(store, ref)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../b", "a//b", "", "."])
def test_paths_in_manifests_cannot_leave_the_artifact(path):
    with pytest.raises(ValueError):
        FileEntry(path=path, size=0, sha256="0" * 64)


def test_the_plan_says_why_a_stage_will_be_built(tmp_path):
    store = Store(f"file://{tmp_path}")
    config = parse_config(BASE)
    first = {p.stage: p for p in make_plan(config, store)}
    assert all(p.action == "build" for p in first.values())
    for plan in first.values():
        publish(store, Manifest(ref=plan.ref, spec=plan.identity, inputs=plan.inputs, files=()))
    assert all(p.action == "reuse" for p in make_plan(config, store))
    assert [p.action for p in make_plan(config, store, force=("sft",))].count("build") == 1
    changed = {p.stage: p for p in make_plan(parse_config({**BASE, "ppo": {"kl_coef": 0.2}}), store)}
    assert [s for s, p in changed.items() if p.action == "build"] == ["ppo", "evaluate"]
    assert f"nearest {first['ppo'].ref.id}: kl_coef: 0.05 -> 0.2" in changed["ppo"].why
    assert "input ppo changed" in changed["evaluate"].why


def test_a_job_reads_back_by_its_url(tmp_path):
    store = Store(f"file://{tmp_path}")
    ref = make_ref("sft", "demo", {}, {})
    job = JobSpec(stage="sft", store=store.url, output=ref, attempt=2, job_id="x", spec={}, identity={})
    store.write(f"{job.folder}/job.json", seal(job), create=True)
    assert read_job(job_url(store, job))[1] == job


def test_progress_lines_are_told_from_other_output():
    event = {"step": 1, "total": 2, "phase": "train", "metrics": {"loss": 0.5}}
    assert parse_progress(progress_line(event)) == event
    assert parse_progress("loss 0.5") is None and parse_progress("@rlhf {broken") is None


def test_exit_codes_say_what_is_worth_another_attempt():
    assert [is_transient(c) for c in (2, 3, 4, 5, 75, 1, -9, 137)] == [
        False,
        False,
        False,
        False,
        True,
        True,
        True,
        True,
    ]


def test_ppo_defaults_are_the_reference_values():
    spec = PPOSpec()
    assert (spec.gamma, spec.lam, spec.clip, spec.value_clip, spec.ppo_epochs, spec.kl_coef) == (
        1.0,
        0.95,
        0.2,
        0.2,
        4,
        0.05,
    )
