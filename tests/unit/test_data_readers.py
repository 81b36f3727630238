"""Files of every kind give the same rows; a mistake in a file is found by its place."""

import gzip
import json
import re

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_core.data import files as data_files
from rlhf_core.data.files import tidy
from rlhf_core.data.readers import check_places, read_source
from rlhf_core.errors import ConfigError, DataError, StoreError
from rlhf_core.sources import content_id
from rlhf_core.specs import DataSpec, FileSource, HubSource, QuickstartSource

ROWS = [{"prompt": "a", "chosen": "é", "rejected": "c"}, {"prompt": "d", "chosen": "e", "rejected": "f"}]


def write(path, data: bytes):
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def encoded(name: str, tmp_path) -> bytes:
    if "parquet" in name:
        parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "table")
        return (tmp_path / "table").read_bytes()
    if "jsonl" in name:
        return "\n".join(json.dumps(row) for row in ROWS).encode()
    return json.dumps(ROWS).encode()


def read(path, **options):
    return list(read_source(FileSource(paths=(str(path),), **options), "data.sources[0]", seed=0))


def check(*sources):
    check_places(DataSpec(sources=sources))


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "jsonl.gz", "json.gz", "parquet.gz"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, ending):
    path = write(tmp_path / f"good.test.{ending}", encoded(ending, tmp_path))
    rows = read(path)
    assert [row.values for row in rows] == ROWS
    assert {row.source for row in rows} == {"good.test"}
    assert rows[1].where.startswith(path) and rows[1].where.endswith(" 2")


def test_a_json_file_may_hold_its_list_under_a_name_or_one_object_a_line(tmp_path):
    assert [r.values for r in read(write(tmp_path / "a.json", json.dumps({"data": ROWS}).encode()))] == ROWS
    assert [r.values for r in read(write(tmp_path / "b.json", encoded("b.jsonl", tmp_path)))] == ROWS


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_json_file_is_read_element_by_element(tmp_path, indent, monkeypatch):
    monkeypatch.setattr(data_files, "CHUNK", 7)  # no element fits, and some pieces end inside of a character
    rows = [{"prompt": f"a{i}]}} \\", "chosen": "é☃\ud83d" * i, "rejected": [{"x": []}, 1e-5]} for i in range(20)]
    text = f" {json.dumps(rows, indent=indent, ensure_ascii=False)}\n"
    path = write(tmp_path / "a.json", text.encode(errors="surrogatepass"))
    assert [r.values for r in read(path)] == rows
    wide = write(tmp_path / "b.json", json.dumps(rows).encode("utf-16"))
    assert [r.values for r in read(wide)] == rows


@pytest.mark.parametrize("end", ["", ",", "}", '{"a": 1', "] x"])
def test_a_list_in_a_json_file_that_does_not_end_well_is_an_error(tmp_path, end):
    path = write(tmp_path / "a.json", ('[{"prompt": "a"}' + end).encode())
    with pytest.raises(DataError, match=r"a\.json: not JSON: .*row [12]"):
        read(path)


def test_files_may_be_in_object_storage():
    with fsspec.open("memory://bucket/pairs.jsonl", "wb") as file:
        file.write("\n".join(json.dumps(row) for row in ROWS).encode())
    source = FileSource(paths=("memory://bucket/pairs.jsonl",))
    check(source)
    assert [r.values for r in read_source(source, "data.sources[0]", seed=0)] == ROWS


def test_an_object_and_a_file_of_the_same_content_have_the_same_identity(tmp_path):
    data = json.dumps(ROWS).encode()
    with fsspec.open("memory://bucket/same.json", "wb") as file:
        file.write(data)
    local = write(tmp_path / "other.json", data)
    assert content_id("memory://bucket/same.json", "f") == content_id(local, "f")


def test_an_object_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match=r"memory://bucket/none\.jsonl' does not exist"):
        check(FileSource(paths=("memory://bucket/none.jsonl",)))


def test_storage_that_cannot_be_asked_is_not_taken_for_an_absent_file():
    with pytest.raises(StoreError, match="nowhere"):
        check(FileSource(paths=("nowhere://bucket/none.jsonl",)))


def test_two_files_of_one_name_keep_their_paths_apart(tmp_path):
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "x.jsonl", json.dumps(ROWS[0]).encode()))
    rows = read_source(FileSource(paths=tuple(paths)), "f", seed=0)
    assert [row.source for row in rows] == paths


def test_columns_are_renamed_and_the_limit_counts_rows_of_all_files(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"q": "x", "good": "y", "id": 1}\n{"q": "z", "good": "w", "id": 2}\n')
    assert [r.values for r in read(path, columns={"prompt": "q", "response": "good"}, limit=1)] == [
        {"prompt": "x", "response": "y", "id": 1}
    ]


def test_a_column_that_is_not_there_is_an_error_with_those_that_are(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"q": "x", "good": "y"}')
    with pytest.raises(
        DataError,
        match=r"a\.jsonl line 1: no column 'ask', which data\.sources\[0\]\.columns\.prompt names; there are good, q",
    ):
        read(path, columns={"prompt": "ask"})


def test_a_column_name_that_means_nothing_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{}")
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.columns: 'promt' is none of our columns"):
        check(FileSource(paths=(path,), columns={"promt": "q"}))


def test_a_missing_file_names_its_field():
    with pytest.raises(ConfigError, match=r"data\.sources\[1\]\.paths: 'no/such\.jsonl' does not exist"):
        check(QuickstartSource(), FileSource(paths=("no/such.jsonl",)))


def test_a_folder_or_an_unknown_ending_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="is a folder; list its files"):
        check(FileSource(paths=(str(tmp_path),)))
    with pytest.raises(ConfigError, match=r"ends with '\.csv'; known are \.jsonl"):
        check(FileSource(paths=(write(tmp_path / "a.csv", b""),)))


def test_a_line_that_is_not_json_is_found_by_its_number(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", b'{"prompt": "x"}\n\n{"prompt": \n')
    with pytest.raises(DataError, match=r"a\.jsonl\.gz line 3: not JSON"):
        read(path)


def test_a_line_that_is_not_utf8_is_found_by_its_number(tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl line 2: not JSON"):
        read(write(tmp_path / "a.jsonl", b'{"prompt": "x"}\n{"prompt": "\xff"}\n'))


def test_a_row_that_is_no_object_is_an_error(tmp_path):
    with pytest.raises(DataError, match="line 1: a row must be an object with named columns, not list"):
        read(write(tmp_path / "a.jsonl", b"[1, 2]"))


def test_a_json_file_without_a_list_of_rows_is_an_error(tmp_path):
    with pytest.raises(DataError, match="must hold a list of rows"):
        read(write(tmp_path / "a.json", b'{"a": 1}'))
    with pytest.raises(DataError, match=r"a\.json: not JSON"):
        read(write(tmp_path / "a.json", b"[{"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet.gz", "a.parquet", "b.jsonl.gz"])
def test_a_damaged_file_is_an_error_that_names_it(tmp_path, name):
    whole = gzip.compress(encoded("a.jsonl", tmp_path) * 50) if name == "b.jsonl.gz" else b"no such format"
    (tmp_path / name).write_bytes(whole[:-20] if name == "b.jsonl.gz" else whole)
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_stories_are_cut_at_their_beginnings_and_after_the_first_sentence(tmp_path):
    text = (
        'One day, Tom said,   "Hi!" He ran.\r\n\r\n\r\nHe fell.\n'
        "Once upon a time, there was a cat. It sat.\n\nOnce upon a time there was a dog.\n"
    )
    rows = read(write(tmp_path / "tales.txt.gz", text.encode()), format="stories")
    assert [row.values for row in rows] == [
        {"prompt": 'One day, Tom said, "Hi!"', "response": " He ran.\n\nHe fell."},
        {"prompt": "Once upon a time, there was a cat.", "response": " It sat."},
        {"prompt": "Once upon a time there was a dog.", "response": ""},
    ]
    assert rows[0].source == "tales"


@pytest.mark.parametrize("start", [r"^(?=Once upon a time|One day,)", r"(?<!\n)\n(?!\n)"])
def test_stories_are_cut_in_the_same_way_however_the_file_arrives(tmp_path, start, monkeypatch):
    text = "".join(f"Once upon a time {i}. It{' was' * i}.\n{chr(10) * (i % 3)}" for i in range(60))
    path = write(tmp_path / "a.txt", text.encode())
    whole = [row.values for row in read(path, format="stories", story_start=start)]
    assert len(whole) == 60 or start.startswith("(?<!")
    assert [tidy(w["prompt"] + w["response"]) for w in whole] == [
        story for story in map(tidy, re.split(start, text, flags=re.MULTILINE)) if story
    ]
    monkeypatch.setattr(data_files, "CHUNK", 100)
    monkeypatch.setattr(data_files, "MARGIN", 300)
    assert [row.values for row in read(path, format="stories", story_start=start)] == whole


def test_a_broken_story_start_names_the_field(tmp_path):
    path = write(tmp_path / "a.txt", b"x")
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.story_start: '\(' is no regular expression"):
        check(FileSource(paths=(path,), format="stories", story_start="("))


def test_every_tinystory_is_its_prompt_and_its_response(shared):
    path = shared / "data" / "tinystories" / "tiny_stories.txt"
    rows = read(path, format="stories")
    assert len(rows) == 804
    whole = tidy(path.read_text())
    assert all(tidy(row.values["prompt"] + row.values["response"]) in whole for row in rows)


def test_white_space_is_tidied():
    assert tidy(" a  b \t c \n\n\n\n d\u00a0e ") == "a b c\n\nd e"


def test_quickstart_rows_are_generated_from_the_seed():
    first, again, other = ([r.values for r in read_source(QuickstartSource(prompts=3), "f", s)] for s in (1, 1, 2))
    assert first == again != other
    assert set(first[0]) == {"prompt", "chosen", "rejected", "answer"}


def test_too_many_quickstart_prompts_name_the_field():
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]"):
        list(read_source(QuickstartSource(prompts=10**9), "data.sources[0]", seed=0))


def test_a_hub_data_set_that_cannot_be_reached_is_a_clear_error():
    with pytest.raises(DataError, match=r"data\.sources\[0\]\.name: the data set 'no-one/nothing' .*HF_HUB_OFFLINE"):
        list(read_source(HubSource(name="no-one/nothing"), "data.sources[0]", seed=0))


def test_a_hub_data_set_may_be_a_folder_that_datasets_can_load(tmp_path):
    write(tmp_path / "train.jsonl", encoded("a.jsonl", tmp_path))
    rows = list(read_source(HubSource(name=str(tmp_path), limit=1), "f", seed=0))
    assert [row.values for row in rows] == ROWS[:1]
