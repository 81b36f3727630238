"""Pretraining text for PPO's mixture loss: tokenised, joined by EOS, cut to blocks, and never mixed with the shares."""

import json

import pytest
from datasets import load_from_disk
from test_data_build import PLACES, TRAINED, build, files, open_all, pair_rows
from transformers import PreTrainedTokenizerFast

from rlhf_core.errors import ConfigError, DataError
from rlhf_core.specs import FileSource, ModelSpec, Shares, TokenizerSpec

BLOCK = {"max_prompt_tokens": 20, "max_response_tokens": 12}


def built(folder, *pretrain, **fields):
    """Blocks, tokenizer and report of a data set with this pretraining text."""
    source = files(folder / "rows.jsonl", pair_rows(200))
    build(folder / "out", sources=(source,), pretrain=pretrain, **(BLOCK | fields))
    report = json.loads((folder / "out" / "report.json").read_text())
    blocks = load_from_disk(str(folder / "out" / "ptx" / "train"))
    return blocks, PreTrainedTokenizerFast.from_pretrained(folder / "out" / "tokenizer"), report


def texts_of(blocks, tokenizer):
    """The texts between the EOS tokens."""
    ids = [i for block in blocks for i in block["input_ids"]]
    return tokenizer.decode(ids).split(tokenizer.eos_token)


def test_texts_are_joined_by_eos_and_cut_to_blocks_of_the_full_length(tmp_path):
    texts = [f"Text {i}, which says little." for i in range(50)]
    blocks, tokenizer, report = built(tmp_path, files(tmp_path / "a.jsonl", [{"text": text} for text in texts]))
    assert blocks.column_names == ["input_ids", "loss_mask"]
    assert {len(block["input_ids"]) for block in blocks} == {32}
    assert all(block["loss_mask"] == [1] * 32 for block in blocks)
    eos = tokenizer.eos_token
    assert "".join(f"{text}{eos}" for text in texts).startswith(eos.join(texts_of(blocks, tokenizer)))
    total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
    assert report["splits"]["ptx/train"]["rows"] == len(blocks) == total // 32
    assert report["pretrain"]["tokens_after_the_last_block"] == total % 32


def test_the_shares_are_the_same_with_and_without_pretraining_text(tmp_path):
    text = files(tmp_path / "a.jsonl", [{"text": "Some more text. " * 20}])
    built(tmp_path, text)
    build(tmp_path / "without", sources=(files(tmp_path / "rows.jsonl", pair_rows(200)),), **BLOCK)
    with_text, without = open_all(tmp_path / "out"), open_all(tmp_path / "without")
    assert not (tmp_path / "without" / "ptx").exists()
    assert {p: r.to_list() for p, r in with_text.items()} == {p: r.to_list() for p, r in without.items()}
    assert set(with_text) == set(PLACES)


@pytest.mark.parametrize("family", ["stories260k", "gpt2-tokenizer", None])
def test_a_plain_text_file_is_one_text_with_one_eos_however_long(family, shared, tmp_path):
    lines = "".join(f"Line {i} of a long text.\n" for i in range(6000))
    (tmp_path / "long.txt").write_text(lines)
    (tmp_path / "short.txt").write_text("The end. " * 200)
    paths = (str(tmp_path / "long.txt"), str(tmp_path / "short.txt"))
    model = ModelSpec(path=str(shared / "models" / family)) if family else None
    tokenizer = {} if family is None else {"tokenizer": TokenizerSpec()}
    blocks, tokenizer, report = built(tmp_path, FileSource(paths=paths), model=model, **tokenizer)
    assert report["pretrain"]["sources"]["long"]["read"] > 1
    first, second, *rest = texts_of(blocks, tokenizer)
    assert first.strip() == lines.strip() and second.lstrip().startswith("The end.") and not rest


def test_stories_and_pairs_are_texts_too_and_held_out_prompts_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("Once upon a time there was a cat. It sat.\n" * 30)
    stories = FileSource(paths=(str(tmp_path / "a.txt"),), format="stories")
    blocks, tokenizer, report = built(tmp_path, stories, files(tmp_path / "pairs.jsonl", pair_rows(200)))
    found = texts_of(blocks, tokenizer)
    assert found[0] == "Once upon a time there was a cat. It sat." and "Q7: maybe 7" in found
    held_out = {
        prompt for place, rows in open_all(tmp_path / "out").items() if "test" in place for prompt in rows["prompt"]
    }
    assert report["pretrain"]["sources"]["pairs"]["dropped"] == {"prompt is held out for tests": len(held_out)}
    assert not any(text.startswith(tuple(held_out)) for text in found)


def test_a_weight_reads_the_text_again_or_only_a_part_of_it(tmp_path):
    rows = [{"text": f"Text {i}, which says little."} for i in range(200)]
    sizes = {}
    for weight in (None, 0.5, 2, 2.5):
        blocks, tokenizer, report = built(tmp_path, files(tmp_path / "a.jsonl", rows, weight=weight))
        sizes[weight] = len(texts_of(blocks, tokenizer))
    assert sizes[0.5] / sizes[None] == pytest.approx(0.5, abs=0.1)
    assert sizes[2] / sizes[None] == pytest.approx(2, abs=0.1)
    assert sizes[2.5] / sizes[None] == pytest.approx(2.5, abs=0.1)
    source = report["pretrain"]["sources"]["a"]
    assert source["read"] == 200 and source["kept"] == 200 + source["notes"]["repeated by weight"]


def test_texts_of_no_use_are_counted(tmp_path):
    rows = [{"text": text} for text in ("Good text. " * 40, " ", None, "half \ud83d")]
    _, _, report = built(tmp_path, files(tmp_path / "a.jsonl", rows))
    assert report["pretrain"]["sources"]["a"]["dropped"] == {"empty text": 1, "not text": 2}


def test_less_than_a_block_of_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"data\.pretrain: 3 tokens are less than one block .* = 32; give more text"):
        built(tmp_path, files(tmp_path / "a.jsonl", [{"text": "xx"}]))


def test_a_source_of_text_among_the_others_is_an_error_that_names_the_remedy(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for source in (FileSource(paths=(str(tmp_path / "a.txt"),)), files(tmp_path / "a.jsonl", [], format="text")):
        with pytest.raises(ConfigError, match=r"data\.sources\[0\].*under data\.pretrain"):
            build(tmp_path / "out", sources=(source,), tokenizer=TRAINED, shares=Shares())


def test_a_missing_file_of_pretraining_text_is_found_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.pretrain\[0\]\.paths: 'no/such\.txt' does not exist"):
        built(tmp_path, FileSource(paths=("no/such.txt",)))
