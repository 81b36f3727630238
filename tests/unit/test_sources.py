"""The identity of outside inputs: what they hold, wherever they are, without running any of it."""

import json
import sys

import pytest

from rlhf_core.errors import ConfigError
from rlhf_core.sources import data_identity, digest, model_identity, rewards_identity
from rlhf_core.specs import DataSpec, FunctionReward, HubSource, ModelSpec, TokenizerSpec


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.pt", "model.pth", "model.safetensors"])
def test_other_weights_are_another_model(weights, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / weights).write_bytes(b"1")
    before = model_identity(ModelSpec(path=str(tmp_path)))
    (tmp_path / weights).write_bytes(b"2")
    assert model_identity(ModelSpec(path=str(tmp_path))) != before


def test_what_an_optimizer_left_beside_a_model_does_not_change_it(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"1")
    before = digest(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"state")
    assert digest(tmp_path) == before


def test_a_model_folder_without_weights_is_refused_but_a_tokenizer_needs_none(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"state")
    with pytest.raises(ConfigError, match=r"reward\.model\.path.*holds no model"):
        model_identity(ModelSpec(path=str(tmp_path)), field="reward.model.path")
    with_tokenizer = DataSpec(sources=(HubSource(name="a/b"),), tokenizer=TokenizerSpec(path=str(tmp_path)))
    assert data_identity(with_tokenizer)["tokenizer"]["path"].startswith("sha256:")


def hub_identity(name, **fields):
    return data_identity(DataSpec(sources=(HubSource(name=name, **fields),)))


def test_a_data_set_in_a_folder_is_what_it_holds_and_what_its_columns_are_known_to_mean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = ("one/set", "two/other", "Dahoas/rm-static", "copy/Dahoas/rm-static")
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "train.jsonl").write_text("{}")
    own, moved, known, copied = (hub_identity(place) for place in places)
    assert own == moved == hub_identity(str(tmp_path / "one" / "set"))
    assert known == copied and known != own  # read with other columns, so other rows
    mapped = {"columns": {"prompt": "q", "chosen": "a", "rejected": "b"}}
    assert hub_identity("Dahoas/rm-static", **mapped) == hub_identity("one/set", **mapped)
    assert str(tmp_path) not in json.dumps([own, known]) and "set" not in own["sources"][0].values()


def function_identity(name):
    return rewards_identity([FunctionReward(function=name)])


def test_the_code_of_an_importable_reward_function_is_its_identity_and_is_not_run(tmp_path, monkeypatch):
    package = tmp_path / "judges_of_tests" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "short.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = function_identity("judges_of_tests.inner.short:f")
    assert before == function_identity("judges_of_tests.inner.short:f")
    (package / "short.py").write_text("raise RuntimeError('imported again')")
    assert function_identity("judges_of_tests.inner.short:f") != before
    assert "judges_of_tests" not in sys.modules


def test_a_package_of_another_version_is_another_reward_and_one_that_is_not_here_is_its_name(tmp_path, monkeypatch):
    def install(version):
        info = tmp_path / "judges_installed.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: judges-installed\nVersion: {version}\n")
        (info / "top_level.txt").write_text("judges_installed\n")
        return function_identity("judges_installed:f")

    (tmp_path / "judges_installed.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert install("1.0") != install("2.0")
    (missing,) = function_identity("no_such_package.inner:f")
    assert missing["function"] == "no_such_package.inner:f" and missing["version"] is missing["module"] is None
