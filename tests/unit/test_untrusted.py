"""What others wrote, models, data, records, configurations, is read and never run, and stays in its place.

Each file here would leave a mark if what it holds were run.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import stored
import torch
import yaml
from commands import rlhf
from tiny import MODEL, tokenizer

from rlhf_core.artifacts import FileEntry, fetch, parse_manifest
from rlhf_core.checkpoints import Checkpoint, Position
from rlhf_core.config import load_config, parse_config
from rlhf_core.errors import ConfigError, IntegrityError, RlhfError, StoreError
from rlhf_core.export import save_causal_lm
from rlhf_core.job import JobResult
from rlhf_core.models import ValueModel, load_tokenizer, new_causal_lm
from rlhf_core.pretrained import load_causal_lm
from rlhf_core.sealed import seal, unseal
from rlhf_core.store import Store
from rlhf_core.verification import verify_store

ROOT = Path(__file__).parents[2]
OUTSIDE = ["../x", "a/../../x", "/etc/passwd", "a\\..\\b", "a\0b", "./x", "a//b", ""]
BASE = {
    "name": "demo",
    "model": {"family": "llama", "positions": 600},
    "data": {"sources": [{"kind": "quickstart"}], "tokenizer": {"train_vocab_size": 300}},
}


class Payload:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path) -> Path:
    """A file that appears if a payload runs."""
    return tmp_path / "mark"


@pytest.fixture
def model(tmp_path) -> Path:
    """The folder of a whole small model with its tokenizer."""
    folder = tmp_path / "model"
    save_causal_lm(new_causal_lm(MODEL, tokenizer(), seed=0), tokenizer(), folder)
    return folder


def pickled(folder: Path, mark: Path, form: str) -> None:
    """Put a payload in the place of a model's weights."""
    (folder / "model.safetensors").unlink()
    evil = {"model.embed_tokens.weight": Payload(mark)}
    if form == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(evil))
    elif form == "torch file":
        torch.save(evil, folder / "pytorch_model.bin")
    else:
        torch.save(evil, folder / "pytorch_model-00001-of-00001.bin")
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model-00001-of-00001.bin"}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


# --- pickles ---------------------------------------------------------------------------------------------------------


def test_the_payload_works_where_it_is_let(mark, tmp_path):
    torch.save(Payload(mark), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("form", ["plain pickle", "torch file", "divided torch file"])
@pytest.mark.parametrize("load", [load_causal_lm, ValueModel.load], ids=["language model", "reward model"])
def test_a_pickle_in_the_place_of_weights_is_refused_and_not_run(model, mark, form, load):
    pickled(model, mark, form)
    with pytest.raises(RlhfError):
        load(str(model))
    assert not mark.exists()


def test_plain_weights_in_a_pickle_are_read(model):
    whole = load_causal_lm(str(model))
    (model / "model.safetensors").unlink()
    torch.save(whole.state_dict(), model / "pytorch_model.bin")
    again = load_causal_lm(str(model))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_pickles_that_lie_beside_the_weights_are_not_looked_at(model, mark):
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "training_args.bin",
        "pytorch_model.bin",
        "model.pkl",
    ):
        torch.save(Payload(mark), model / name)
    load_causal_lm(str(model))
    load_tokenizer(str(model))
    assert not mark.exists()


def test_a_pickled_adapter_beside_the_weights_is_not_run(model, mark):
    torch.save({"base_model.model.x": Payload(mark)}, model / "adapter_model.bin")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(model), "target_modules": ["q_proj"], "r": 2}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    try:
        load_causal_lm(str(model))
    except Exception as error:
        assert "pickle" in str(error).lower() or isinstance(error, RlhfError), error
    assert not mark.exists()


# --- code in models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["unknown_to_transformers", "llama"])
def test_code_that_a_model_brings_is_not_run_even_by_who_says_yes(model, mark, model_type):
    evil = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
    classes = ("EvilConfig", "EvilModel", "EvilTokenizer")
    (model / "evil.py").write_text(evil + "".join(f"class {name}: pass\n" for name in classes))
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel", "AutoModel": "evil.EvilModel"}
    config = json.loads((model / "config.json").read_text()) | {"model_type": model_type, "auto_map": names}
    (model / "config.json").write_text(json.dumps(config))
    for_tokens = json.loads((model / "tokenizer_config.json").read_text())
    for_tokens |= {"auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}, "tokenizer_class": "EvilTokenizer"}
    (model / "tokenizer_config.json").write_text(json.dumps(for_tokens))
    code = (
        "from rlhf_core.data.tokenizer import load\n"
        "from rlhf_core.models import ValueModel, load_tokenizer\n"
        "from rlhf_core.pretrained import load_causal_lm\n"
        "for call in (load_causal_lm, ValueModel.load, load_tokenizer, lambda path: load(path, None, 'model.path')):\n"
        "    try:\n"
        f"        call({str(model)!r})\n"
        "    except Exception as error:\n"
        "        print('refused by', type(error).__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(model.parent / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], input="y\n" * 9, text=True, capture_output=True, env=environment, timeout=120
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0 and not mark.exists() and "[y/N]" not in said, said
    if model_type != "llama":  # one that transformers knows is loaded by transformers' own code
        assert said.count("refused by ConfigError") >= 2, said


# --- records that point outside --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OUTSIDE)
def test_no_record_can_name_a_place_outside_its_artifact(tmp_path, path):
    made = stored.put(Store(f"file://{tmp_path}"), "sft", {"a": b"1"})
    fields = json.loads(made.model_dump_json())
    entry = {"path": path, "size": 1, "sha256": "0" * 64}
    changes = [
        {"files": [entry]},
        {"ref": {**fields["ref"], "name": path}},
        {"inputs": {"x": {**fields["ref"], "name": path}}},
    ]
    changes += [{"folder": path}] if path else []  # an empty folder is the artifact's own
    for change in changes:
        with pytest.raises(IntegrityError, match="not a Manifest"):
            parse_manifest(json.dumps(fields | change).encode(), "forged")
    part = {"name": path, "size": 1, "sha256": "0" * 64}
    with pytest.raises(ValueError):
        Checkpoint(artifact="sft/a", attempt=1, position=Position(step=1), world=1, parts=(part,))  # pyright: ignore
    with pytest.raises(ValueError):
        FileEntry.model_validate(entry)
    result = {"job_id": "x", "metrics": {}, "seconds": 1}
    for change in ({"folder": path, "files": []}, {"folder": "attempts/0001/files", "files": [entry]}):
        with pytest.raises(IntegrityError, match="not a JobResult"):
            unseal(JobResult, json.dumps(result | change).encode(), "forged")


@pytest.mark.parametrize("path", [p for p in OUTSIDE if p])
def test_no_key_leads_out_of_a_store(tmp_path, path):
    store = Store(f"file://{tmp_path}/store")
    (tmp_path / "x").write_bytes(b"secret")
    calls = [
        store.read,
        store.delete,
        lambda key: store.write(key, b"1"),
        lambda key: store.upload(tmp_path / "x", key),
    ]
    for call in [*calls, lambda key: store.download(key, tmp_path / "got"), store.sha256]:
        try:
            call(path)
        except (StoreError, KeyError):
            continue
        assert "\\" in path  # an ordinary character of a file's name here
    assert (tmp_path / "x").read_bytes() == b"secret" and {p.name for p in tmp_path.iterdir()} <= {"x", "store", "got"}


@pytest.mark.parametrize("place", ["sft/../../x-000000000000", "ppo/x-000000000000", "nowhere/x-000000000000"])
def test_a_manifest_that_lies_in_anothers_place_is_damaged(tmp_path, place):
    store = Store(f"file://{tmp_path}/store")
    made = stored.put(store, "sft", {"a": b"1"})
    if ".." in place:
        with pytest.raises(StoreError):
            store.write(f"{place}/manifest.json", seal(made))
        return
    store.write(f"{place}/manifest.json", seal(made))
    damages = [damage.what for damage in verify_store(store).damages]
    assert damages == ([f"is the manifest of {made.ref.id}"] if place.startswith("ppo") else [])


def test_a_link_out_of_a_local_store_is_refused_and_one_to_the_whole_store_is_not(tmp_path):
    store = Store(f"file://{tmp_path}/store")
    made = stored.put(store, "sft", {"a": b"1", "model/b": b"2"})
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b").write_bytes(b"2")
    local = store.local_path(made.key("model"))
    assert local
    (local / "b").unlink()
    (local / "b").symlink_to(tmp_path / "elsewhere" / "b")
    with pytest.raises(IntegrityError, match="link out of the store"):
        fetch(store, made.ref, tmp_path / "cache")
    (local / "b").unlink()
    local.rmdir()
    local.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="link out of the store"):
        fetch(store, made.ref, tmp_path / "cache")
    local.unlink()
    local.mkdir()
    (local / "b").write_bytes(b"2")
    (tmp_path / "link").symlink_to(tmp_path / "store")
    assert (
        fetch(Store(f"file://{tmp_path}/link"), made.ref, tmp_path / "cache")[0] / "model" / "b"
    ).read_bytes() == b"2"


def test_a_forged_id_in_a_request_is_not_followed(tmp_path, capfd):
    store = Store(f"file://{tmp_path}/store")
    stored.put(store, "sft", {"a": b"1"})
    for words in (
        ["show", "../../etc"],
        ["verify", "../.."],
        ["promote", "../x", "sft"],
        ["show", "@../x"],
        ["aliases", "../.."],
    ):
        code, _, err = rlhf(capfd, "artifacts", *words, "--store", store.url)
        assert code != 0 and "Traceback" not in err, words


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"]
)
def test_a_configuration_cannot_name_code_by_a_tag(tmp_path, mark, tag):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(BASE) + f"seed: !!{tag} ['touch {mark}']\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(file)
    file.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(file, [f"seed=!!{tag} ['touch {mark}']"])
    assert not mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[-1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ messages.append('x') }}",
        "{% import 'os' as os %}",
    ],
)
def test_a_chat_template_cannot_reach_python(mark, template):
    from rlhf_core.data.template import Template

    tok = tokenizer()
    tok.chat_template = template.replace("MARK", str(mark))
    try:
        Template("chat", tok)
    except ConfigError as error:
        assert "chat_template cannot render" in str(error)
    else:  # an attribute that the sandbox hides renders as nothing
        assert tok.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False).strip() == ""
    assert not mark.exists()


@pytest.mark.parametrize("file", ["../outside/model.safetensors", "/etc/passwd", "a/../../x", ""])
def test_an_index_of_weights_that_leads_out_of_the_models_folder_is_refused(tmp_path, model, file):
    from rlhf_core.partitioned import INDEX, weight_files

    (tmp_path / "outside").mkdir()
    (model / "model.safetensors").rename(tmp_path / "outside" / "model.safetensors")
    (model / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": file}}))
    for load in (weight_files, load_causal_lm):
        with pytest.raises(ConfigError) as caught:
            load(str(model))
        assert all(word in str(caught.value) for word in (INDEX, "lm_head.weight", repr(file))), load


def test_a_data_set_that_brings_a_script_is_refused(tmp_path, mark, monkeypatch):
    from rlhf_core.data.readers import _load
    from rlhf_core.spec_data import HubSource

    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    source = HubSource(name=str(folder))
    with pytest.raises(RlhfError):
        list(_load(source, "train", "data.sources[0]"))
    assert not mark.exists()


# --- credentials in configurations -----------------------------------------------------------------------------------

SECRET = "hunter2hunter2"
URLS = {
    "store": f"s3://AKEY:{SECRET}@bucket/x",
    "model.path": f"https://user:{SECRET}@host/model",
    "data.sources.0.name": f"s3://{SECRET}@bucket/set",
    "resources.checkpoint.notice": f"https://host/notice?X-Amz-Credential=abc&X-Amz-Signature={SECRET}",
    "ppo.rewards": f"[{{kind: http, name: x, url: 'http://u:{SECRET}@host'}}]",
}


@pytest.mark.parametrize("field", URLS)
def test_a_url_with_credentials_is_refused_and_not_repeated(tmp_path, capfd, field):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(BASE))
    code, out, err = rlhf(
        capfd, "run", file, "--set", f"{field}={URLS[field]}", "--set", f"store=file://{tmp_path}/store"
    )
    assert code == 2 and field in err and "credentials" in err
    assert SECRET not in out + err and not (tmp_path / "store").exists()


def test_a_url_with_credentials_in_a_file_is_refused_and_not_repeated():
    for name, url in (("store", URLS["store"]), ("model", {"path": URLS["model.path"]})):
        with pytest.raises(ConfigError, match=name) as caught:
            parse_config({**BASE, name: url})
        assert "credentials" in str(caught.value) and SECRET not in str(caught.value)
    parse_config({**BASE, "store": "s3://bucket/a@b/c"})
