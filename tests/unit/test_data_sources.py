"""Sources with weights, with test rows of their own, for some stages only, streamed; and what identifies them."""

import json
from collections import Counter

import pyarrow as pa
import pytest
from pyarrow import parquet
from test_data_build import TRAINED, build, files, open_all, pair_rows

from rlhf_core.config import PipelineConfig
from rlhf_core.data.readers import read_source
from rlhf_core.plan import stage_refs
from rlhf_core.sources import data_identity
from rlhf_core.specs import DataSpec, FileSource, HubSource, ModelSpec, Shares

SHARES = Shares(sft=1, reward=1, ppo=1, test=0.2)


def weighted(folder, weight, rows=600):
    folder.mkdir(exist_ok=True)
    source = files(folder / "rows.jsonl", pair_rows(rows), weight=weight)
    metrics = build(folder / "out", sources=(source,), shares=SHARES)
    report = json.loads((folder / "out" / "report.json").read_text())["sources"]["rows"]
    return open_all(folder / "out"), metrics, report


def counts(data, side):
    return Counter(prompt for place, rows in data.items() if side in place for prompt in rows["prompt"])


@pytest.fixture(scope="module")
def unweighted(tmp_path_factory):
    return weighted(tmp_path_factory.mktemp("one"), None)[0]


def test_weight_two_has_every_training_row_twice_and_test_rows_once(unweighted, tmp_path):
    data, metrics, report = weighted(tmp_path, 2)
    assert counts(data, "train") == {prompt: 2 for prompt in counts(unweighted, "train")}
    assert counts(data, "test") == counts(unweighted, "test")
    repeated = sum(counts(unweighted, "train").values())
    assert metrics["rows_repeated"] == report["notes"]["repeated by weight"] == repeated
    assert metrics["rows_read"] + repeated == metrics["rows_kept"] == report["kept"] == 600 + repeated


def test_weight_one_half_leaves_out_half_of_the_training_prompts_and_no_test_row(unweighted, tmp_path):
    data, metrics, report = weighted(tmp_path, 0.5)
    kept, all_of = counts(data, "train"), counts(unweighted, "train")
    assert set(kept.values()) == {1} and set(kept) < set(all_of)
    assert len(kept) / len(all_of) == pytest.approx(0.5, abs=0.07)
    assert counts(data, "test") == counts(unweighted, "test")
    assert metrics["dropped"] == {"left out by weight": len(all_of) - len(kept)} == report["dropped"]


def test_weight_one_and_a_half_has_half_of_the_rows_twice_and_the_choice_is_that_of_one_half(unweighted, tmp_path):
    more, *_ = weighted(tmp_path / "more", 1.5)
    half, *_ = weighted(tmp_path / "half", 0.5)
    found = counts(more, "train")
    assert set(found) == set(counts(unweighted, "train"))
    assert {prompt for prompt, count in found.items() if count == 2} == set(counts(half, "train"))


def test_a_row_left_out_of_one_source_by_weight_may_come_from_another(tmp_path):
    sources = (
        files(tmp_path / "a.jsonl", pair_rows(200), weight=0.1),
        files(tmp_path / "b.jsonl", pair_rows(200)),
    )
    build(tmp_path / "out", sources=sources, shares=SHARES)
    assert sum(map(len, open_all(tmp_path / "out").values())) == 200


def test_a_source_feeds_only_the_stages_it_may(tmp_path):
    sources = (
        files(tmp_path / "a.jsonl", pair_rows(200)),
        files(
            tmp_path / "b.jsonl", [row | {"prompt": f"only {row['prompt']}"} for row in pair_rows(200)], feeds=["sft"]
        ),
    )
    build(tmp_path / "out", sources=sources, shares=SHARES)
    data = open_all(tmp_path / "out")
    for place, rows in data.items():
        assert any(prompt.startswith("only") for prompt in rows["prompt"]) == place.startswith("sft")
    assert sum(prompt.startswith("only") for place in data for prompt in data[place]["prompt"]) == 200


def test_sft_and_ppo_rows_say_which_source_they_are_from(tmp_path):
    sources = (
        files(tmp_path / "pairs.jsonl", pair_rows(200)),
        files(tmp_path / "answers.jsonl", [{"prompt": f"A{i}:", "response": " x"} for i in range(200)]),
        files(tmp_path / "prompts.jsonl", [{"prompt": f"P{i}:"} for i in range(200)]),
    )
    build(tmp_path / "out", sources=sources, shares=SHARES)
    letters = {"Q": "pairs", "A": "answers", "P": "prompts"}
    for rows in open_all(tmp_path / "out").values():
        assert [letters[prompt[0]] for prompt in rows["prompt"]] == rows["source"]


def test_test_paths_are_held_out_and_their_prompts_never_trained_on(tmp_path):
    rows = pair_rows(300)
    files(tmp_path / "eval.json.jsonl", rows[:60])
    source = files(tmp_path / "train.jsonl", rows, test_paths=(str(tmp_path / "eval.json.jsonl"),))
    build(tmp_path / "out", sources=(source,), shares=Shares(sft=1, reward=1, ppo=1, test=0.9))
    data = open_all(tmp_path / "out")
    assert set(counts(data, "test")) == {row["prompt"] for row in rows[:60]}
    assert set(counts(data, "train")) == {row["prompt"] for row in rows[60:]}


def hub_folder(tmp_path, **splits):
    for split, rows in splits.items():
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet")
    return str(tmp_path)


@pytest.mark.parametrize("streaming", [None, True])
def test_a_split_of_a_hub_source_can_be_held_out_and_the_limit_counts_each_split(tmp_path, streaming):
    name = hub_folder(tmp_path, train=pair_rows(30), test=pair_rows(30, offset=30))
    source = HubSource(name=name, test_split="test", limit=20, streaming=streaming)
    rows = list(read_source(source, "f", seed=0))
    assert [row.side for row in rows] == ["test"] * 20 + ["train"] * 20
    assert [row.values["prompt"] for row in rows] == [f"Q{i}:" for i in [*range(30, 50), *range(20)]]


def test_a_streamed_source_makes_the_same_data_as_one_that_is_not(tmp_path):
    (tmp_path / "set").mkdir()
    name = hub_folder(tmp_path / "set", train=pair_rows(200))
    for streaming in (None, True):
        source = HubSource(name=name, streaming=streaming)
        build(tmp_path / str(streaming), sources=(source,), tokenizer=TRAINED, shares=SHARES)
    one, other = (open_all(tmp_path / str(streaming)) for streaming in (None, True))
    assert {place: rows.to_list() for place, rows in one.items()} == {p: rows.to_list() for p, rows in other.items()}


def test_how_rows_are_fetched_is_no_part_of_the_identity_and_new_fields_left_out_change_none():
    def fingerprint(**fields):
        data = DataSpec(sources=(HubSource(name="no-one/nothing", **fields),))
        config = PipelineConfig(name="x", model=ModelSpec(path="no-one/model"), data=data)
        return stage_refs(config)["data"].fingerprint

    assert fingerprint() == fingerprint(streaming=True) == fingerprint(weight=None, test_split=None)
    assert len({fingerprint(), fingerprint(weight=2), fingerprint(feeds=["sft"]), fingerprint(test_split="x")}) == 4


def test_the_cache_cannot_be_stale_since_the_content_of_every_file_is_part_of_the_identity(tmp_path, monkeypatch):
    """DeepSpeed-Chat names its cache by paths and options only (its pitfall 8)."""

    def identity():
        local = FileSource(paths=(str(tmp_path / "a.jsonl"),), test_paths=(str(tmp_path / "b.jsonl"),))
        return data_identity(DataSpec(sources=(local, HubSource(name="some/set")), pretrain=(local,)))

    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "set").mkdir(parents=True)
    places = ("a.jsonl", "b.jsonl", "some/set/train.jsonl")
    for place in places:
        (tmp_path / place).write_text(place)
    found = [identity()]
    assert identity() == found[0]
    for place in places:
        (tmp_path / place).write_text(f"{place} changed")
        found.append(identity())
    assert all(one != other for i, one in enumerate(found) for other in found[:i])
    assert json.dumps(found[0]["pretrain"]).count("sha256:") == 2
