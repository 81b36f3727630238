"""Rows of a split: opened, measured and sampled without reading them, and packed in time for a large held-out set."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from datasets import Dataset

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.batches import deal, open_rows, pack, row_lengths, some_rows, sources_of
from rlhf_core.dpo import DPOTrainer
from rlhf_core.errors import DataError
from rlhf_core.eval.inputs import held_out
from rlhf_core.eval.request import EvalRequest, NamedModel
from rlhf_core.evaluate import held_out_rows
from rlhf_core.reward import RewardTrainer
from rlhf_core.sft import SFTTrainer
from rlhf_core.store import Store

SOURCES = ["first"] * 40 + ["second"] * 40  # as the data stage writes them: one after the other


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data artifact's held-out prompts."""
    rows = [{"ids": [0] * (i % 7), "more": [0], "source": source} for i, source in enumerate(SOURCES)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "data" / "ppo" / "test"))
    return tmp_path / "data"


def test_a_sample_is_seeded_in_order_and_all_where_there_are_not_more():
    assert some_rows(5, 5, 3).tolist() == some_rows(5, 9, 4).tolist() == [0, 1, 2, 3, 4]
    taken = some_rows(100, 10, 3).tolist()
    assert taken == sorted(set(taken)) == some_rows(100, 10, 3).tolist() != some_rows(100, 10, 4).tolist()


def test_evaluation_takes_rows_of_every_source(data):
    rows = held_out_rows(data / "ppo" / "test", 10, seed=0)
    assert len(rows) == 10 and {row["source"] for row in rows} == {"first", "second"}
    assert [row["source"] for row in held_out_rows(data / "ppo" / "test", 80, seed=0)] == SOURCES


def test_a_limit_takes_rows_of_every_source_whatever_the_noise(data):
    request = EvalRequest(mode="compare", models=(NamedModel(name="a", path="a"),), data=str(data), limit=10)
    rows = held_out(request, "ppo")
    assert len(rows) == 10 and {row["source"] for row in rows} == {"first", "second"}
    assert held_out(request.model_copy(update={"seed": 7}), "ppo") == rows
    assert len(held_out(request.model_copy(update={"limit": None}), "ppo")) == 80


def test_lengths_and_sources_are_read_from_the_table(data):
    rows = open_rows(data / "ppo" / "test")
    assert row_lengths(rows, "ids", "more").tolist() == [i % 7 + 1 for i in range(80)]
    assert sources_of(rows) == SOURCES and sources_of(rows.remove_columns("source")) == [""] * 80


def test_a_split_without_rows_is_an_error_that_says_why(tmp_path):
    with pytest.raises(DataError, match=r"data.shares.ppo: is 0"):
        open_rows(tmp_path / "ppo" / "train")
    for split, message in (("train", "every row of it was dropped or held out"), ("test", "raise data.shares.test")):
        Dataset.from_dict({"ids": []}).save_to_disk(str(tmp_path / "sft" / split))
        with pytest.raises(DataError, match=f"data.shares.sft: .*{message}"):
            open_rows(tmp_path / "sft" / split)


def first_fit(lengths: list[int], tokens: int) -> list[list[int]]:
    """The definition: each to the first row that has room."""
    packed: list[list[int]] = []
    for index, length in enumerate(lengths):
        row = next((row for row in packed if sum(lengths[i] for i in row) + length <= tokens), None)
        if row is None:
            packed.append(row := [])
        row.append(index)
    return packed


@pytest.mark.parametrize("count", [0, 1, 2, 5, 64, 150])
def test_packing_is_first_fit(count):
    lengths = np.random.default_rng(count).integers(1, 33, count).tolist()
    assert pack(lengths, range(count), 32) == first_fit(lengths, 32)


def test_packing_a_large_held_out_set_does_not_take_the_square_of_its_rows():
    lengths = [60] * 40_000  # no two share a row, so every row is looked at by those that follow
    began = time.monotonic()
    assert len(pack(lengths, range(len(lengths)), 100)) == 40_000
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("stage", "kind", "resources"),
    [
        ("sft", SFTTrainer, {}),
        ("sft", SFTTrainer, {"pack_tokens": 16}),
        ("reward", RewardTrainer, {}),
        ("dpo", DPOTrainer, {}),
    ],
)
def test_held_out_rows_are_read_a_micro_batch_at_a_time(stage, kind, resources, tiny_root, tmp_path, monkeypatch):
    read: list[int] = []
    to_list = Dataset.to_list

    def counted(rows: Dataset) -> list[Any]:
        read.append(len(rows))
        return to_list(rows)

    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((tiny_root / "refs.json").read_text()).items()}
    spec = {"batch_size": 4, "max_steps": 1}
    inputs = {k: refs[k] for k in ("data", "sft")}
    context = tiny.context(
        Store(f"file://{tiny_root}/store"), stage, spec, inputs, tmp_path, micro_batch=3, **resources
    )
    trainer = kind(context)
    monkeypatch.setattr(Dataset, "to_list", counted)
    metrics = trainer.run()
    assert metrics["eval_loss"] > 0
    assert len(read) > 8 and max(read) <= (12 if resources else 4), "24 rows are held out"


def test_micro_batches_hold_so_many_rows_and_tokens_and_every_rank_has_as_many():
    random = np.random.default_rng(0)
    for world, tokens in ((1, None), (1, 100), (2, 100), (3, 40), (3, None)):
        lengths = random.integers(1, 60, 50).tolist()
        dealt = [deal(lengths, rank, world, 4, tokens) for rank in range(world)]
        assert len({len(parts) for parts in dealt}) == 1
        assert sorted(i for parts in dealt for part in parts for i in part) == list(range(50))
        for part in (part for parts in dealt for part in parts if part):
            width = max(lengths[i] for i in part)
            assert len(part) <= 4 and (tokens is None or len(part) == 1 or width * len(part) <= tokens)
        if tokens is None:
            assert len(dealt[0]) == -(-50 // (4 * world))
            continue
        real = [deal(lengths, rank, world, 50, tokens, padded=False) for rank in range(world)]
        assert len({len(parts) for parts in real}) == 1
        assert sorted(i for parts in real for part in parts for i in part) == list(range(50))
        assert all(len(part) <= 1 or sum(lengths[i] for i in part) <= tokens for parts in real for part in parts)
        whole = [deal(lengths, rank, world, 50, tokens) for rank in range(world)]
        assert len(real[0]) < len(whole[0]), "without padding more rows go together"
