"""Reward models of another family and tokenizer, adapters, and what of a reward's configuration excludes each other."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from pydantic import ValidationError

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.batches import some_rows
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.retokenize import Retokenizer
from rlhf_core.reward import RewardTrainer
from rlhf_core.specs import RewardSpec
from rlhf_core.store import Store

SPEC = {"batch_size": 8, "max_steps": 8, "optim": {"lr": 3e-3}}
NEW = {"family": "gpt2", "hidden_size": 32, "layers": 2, "heads": 4}


def trainer(root: Path, out: Path, spec: dict, **resources: Any) -> RewardTrainer:
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((root / "refs.json").read_text()).items()}
    inputs = {"data": refs["data"], "sft": refs["sft"]}
    return RewardTrainer(tiny.context(Store(f"file://{root}/store"), "reward", spec, inputs, out, **resources))


def test_a_reward_model_of_another_family_reads_its_own_tokens(tiny_root, tmp_path, shared):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec = {**SPEC, "model": {"path": str(shared / "models" / "stories260k")}, "tokenizer": {"pad_token": "<unk>"}}
    stage = trainer(tiny_root, tmp_path, spec, micro_batch=3)
    metrics = stage.run()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.get_vocab() == stage.reads.get_vocab() and len(tokenizer) == 512
    assert tokenizer.pad_token == "<unk>"
    rows = Dataset.load_from_disk(str(tiny_root / "data" / "reward" / "test")).to_list()
    data, right = tiny.tokenizer(), 0
    for row, scores in zip(rows, stage.score_pairs(stage.test_rows, "evaluate", stage._scores), strict=True):
        for answer, score in zip((row["chosen_ids"], row["rejected_ids"]), scores, strict=True):
            text = data.decode(row["prompt_ids"] + answer[:-1])
            ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            assert model.score(model.model(ids).last_hidden_state)[0, -1].item() == pytest.approx(score, abs=1e-4)
        right += scores[0] > scores[1]
    assert right / len(rows) == pytest.approx(metrics["eval_accuracy"])


def test_a_model_that_brings_no_tokenizer_reads_the_datas(tiny_root, tmp_path):
    stage = trainer(tiny_root, tmp_path, {**SPEC, "model": NEW})
    assert stage.retokenizer is None and stage.reads is stage.tokenizer
    assert stage.run()["steps"] == 8
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == [
        "GPT2ForSequenceClassification"
    ]


def test_tokens_named_for_the_reward_model_count_where_it_reads_the_datas_tokenizer(tiny_root, tmp_path):
    spec = {**SPEC, "model": NEW, "tokenizer": {"eos_token": "w7", "pad_token": "<eos>", "chat_template": "{{ 1 }}"}}
    stage = trainer(tiny_root, tmp_path, spec)
    assert (stage.reads.eos_token, stage.reads.pad_token, stage.reads.chat_template) == ("w7", "<eos>", "{{ 1 }}")
    assert (stage.tokenizer.eos_token, stage.tokenizer.pad_token) == ("<eos>", "<pad>"), "the data's stays as it is"
    row = stage.train_rows[0]
    assert stage._text(row, "chosen_ids") == [*row["prompt_ids"], *row["chosen_ids"][:-1], stage.reads.eos_token_id]
    with pytest.raises(ConfigError, match=r"reward.tokenizer.pad_token: 'none' is not in the vocabulary"):
        trainer(tiny_root, tmp_path, {**SPEC, "model": NEW, "tokenizer": {"pad_token": "none"}})


def test_moments_are_of_a_sample_of_the_training_pairs(tiny_root, tmp_path, monkeypatch):
    stage = trainer(tiny_root, tmp_path, SPEC)
    everything = stage.score_pairs(stage.train_rows, "all", stage._scores)
    assert stage.moments() == pytest.approx((everything.mean(), everything.std()), abs=1e-5), "all of up to 512"
    monkeypatch.setattr("rlhf_core.reward.MOMENT_PAIRS", 10)
    some = everything[some_rows(len(everything), 10, seed=0)]
    assert stage.moments() == pytest.approx((some.mean(), some.std()), abs=1e-5)
    assert abs(some.mean() - everything[:10].mean()) > 1e-4


def test_a_tokenizer_of_the_same_vocabulary_is_not_converted_to(tiny_root, tmp_path):
    spec = {**SPEC, "model": {"path": str(tiny_root / "sft" / "model")}}
    assert trainer(tiny_root, tmp_path, spec).retokenizer is None


def test_rows_that_are_too_long_in_the_reward_models_tokens_are_an_error(tiny_root, tmp_path, shared):
    spec = {**SPEC, "model": {**NEW, "positions": 16}, "tokenizer": {"path": str(shared / "models" / "gpt2-tokenizer")}}
    rows = Dataset.load_from_disk(str(tiny_root / "data" / "reward" / "train")).to_list()
    assert max(len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows) <= 16
    with pytest.raises(DataError, match=r"reward.model: a prompt and its answer have \d+ of its tokens.* 16 positions"):
        trainer(tiny_root, tmp_path, spec)


def test_a_conversion_is_what_the_trainer_feeds(tiny_root, tmp_path, shared):
    spec = {**SPEC, "model": NEW, "tokenizer": {"path": str(shared / "models" / "gpt2-tokenizer")}}
    stage = trainer(tiny_root, tmp_path, spec)
    row = stage.train_rows[0]
    converted = Retokenizer(tiny.tokenizer(), stage.reads).convert(row["prompt_ids"], row["chosen_ids"])
    assert stage._text(row, "chosen_ids") == converted and converted[-1] == stage.reads.eos_token_id


def test_adapters_train_with_the_head_and_are_saved_beside_the_model(tiny_root, tmp_path):
    stage = trainer(tiny_root, tmp_path, {**SPEC, "max_steps": None, "lora": {"rank": 4}})
    metrics = stage.run()
    assert metrics["parameters_trained"] < metrics["parameters"] / 4 and metrics["eval_accuracy"] > 0.7
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": {}, "train_layers": 1}, "train_layers 1 and lora exclude"),
        ({"tokenizer": {"path": "x"}}, "tokenizer: the SFT model reads the data's"),
        ({"model": NEW, "tokenizer": {"train_vocab_size": 300}}, "tokenizer.train_vocab_size 300"),
    ],
)
def test_what_excludes_each_other_is_told_when_the_configuration_is_read(fields, message):
    with pytest.raises(ValidationError, match=message):
        RewardSpec.model_validate({**SPEC, **fields})


def test_a_tokenizer_that_is_not_there_is_an_error_that_names_the_field(tiny_root, tmp_path):
    with pytest.raises(ConfigError, match=r"reward.tokenizer.path.*nowhere"):
        trainer(tiny_root, tmp_path, {**SPEC, "model": NEW, "tokenizer": {"path": "/nowhere"}})
