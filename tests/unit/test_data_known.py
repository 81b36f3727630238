"""Every data set that DeepSpeed-Chat trains on is read by its name alone, and without the faults of its reader."""

import pyarrow as pa
import pytest
from pyarrow import parquet
from test_data_build import TRAINED, build, open_all

from rlhf_core.data.examples import SourceReader
from rlhf_core.data.known import KNOWN
from rlhf_core.data.template import Dropped, Reason, Template
from rlhf_core.errors import DataError
from rlhf_core.specs import HubSource, Shares

TEMPLATE = Template("human_assistant", None)
HH = "\n\nHuman: Who?\n\nAssistant: Me.\n\nHuman: Why?\n\nAssistant:"
ASKED = "\n\nHuman: Why?\n\nAssistant:"


def passage(text):
    return {"docid": "1", "title": "T", "text": text}


# name -> a row as the set has it, and (prompt, answer, chosen, rejected) as we read it
ROWS = {
    "Dahoas/rm-static": (
        {"prompt": HH, "response": " So.", "chosen": " So.", "rejected": " No."},
        (HH, None, " So.", " No."),
    ),
    "Dahoas/full-hh-rlhf": (
        {"prompt": HH, "response": " So.", "chosen": " So.", "rejected": " No."},
        (HH, None, " So.", " No."),
    ),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        (ASKED, None, " So.", " No."),
    ),
    "yitingxie/rlhf-reward-datasets": (
        {"prompt": "\n\nHuman: Why?\n\n", "chosen": "Assistant: Say Assistant: So.", "rejected": "Assistant: No."},
        (ASKED, None, " Say Assistant: So.", " No."),
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"dataset": "eli5", "id": "1", "full_text": "Why?"},
            "answer_0": "No [3].",
            "answer_1": "So [1, 2] (in short) [sic].",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        (ASKED, None, " So (in short) [sic].", " No."),
    ),
    "stanfordnlp/SHP": (
        {"post_id": "x", "history": "Why?", "human_ref_A": "No.", "human_ref_B": "So.", "labels": 0},
        (ASKED, None, " So.", " No."),
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        {"prompt": "USER: Who is a POWERUSER? ASSISTANT: Me.</s>USER: Why? ASSISTANT:", "label": "So."},
        ("\n\nHuman: Who is a POWERUSER?\n\nAssistant: Me.\n\nHuman: Why?\n\nAssistant:", " So.", None, None),
    ),
    "wangrui6/Zhihu-KOL": ({"INSTRUCTION": "Why?", "RESPONSE": "So.", "SOURCE": "s"}, (ASKED, " So.", None, None)),
    "Hello-SimpleAI/HC3-Chinese": (
        {"id": "0", "question": "Why?", "human_answers": ["So.", "x"], "chatgpt_answers": ["y"]},
        (ASKED, " So.", None, None),
    ),
    "mkqa-Chinese": (
        {
            "queries": {"zh_cn": "Why?", "ja": "x"},
            "answers": {"zh_cn": [{"type": 1, "text": None}, {"type": 1, "text": "So."}], "ja": []},
        },
        (ASKED, " So.", None, None),
    ),
    "mkqa-Japanese": (
        {"queries": {"zh_cn": "x", "ja": "Why?"}, "answers": {"zh_cn": [], "ja": [{"type": 1, "text": "So."}]}},
        (ASKED, " So.", None, None),
    ),
    "Cohere/miracl-zh-queries-22-12": (
        {"query": "Why?", "positive_passages": [passage("So.")], "negative_passages": [passage("No."), passage("x")]},
        (ASKED, None, " So.", " No."),
    ),
    "Cohere/miracl-ja-queries-22-12": (
        {"query": "Why?", "positive_passages": [passage("So.")], "negative_passages": []},
        (ASKED, " So.", None, None),
    ),
    "lmqg/qg_jaquad": (
        {"question": "Why?", "sentence": "So.", "paragraph": "x", "answer": "y"},
        (ASKED, " So.", None, None),
    ),
    "lmqg/qag_jaquad": (
        {"questions": ["Why?", "x"], "answers": ["y"], "paragraph": "So."},
        (ASKED, " So.", None, None),
    ),
}
PLACE = {"mkqa-Chinese": "mkqa", "mkqa-Japanese": "mkqa"}


def local_copy(folder, name, **splits):
    """A folder that `datasets` loads under the name of a set on the hub."""
    place = folder / PLACE.get(name, name)
    place.mkdir(parents=True)
    for split, rows in splits.items():
        parquet.write_table(pa.Table.from_pylist(rows), place / f"{split}.parquet")


def read(name, **options):
    reader = SourceReader(HubSource(name=name, **options), "data.sources[0]", 0, TEMPLATE)
    return [(row, reader.example(row)) for row in reader.rows]


def dropped(name, row):
    with pytest.raises(Dropped) as drop:
        KNOWN[name].parse(row, "row 1")
    return drop.value.reason


def test_there_is_a_row_for_every_known_name():
    assert set(ROWS) == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_data_set_is_read_by_its_name_alone(name, tmp_path, monkeypatch):
    row, expected = ROWS[name]
    local_copy(tmp_path, name, train=[row])
    monkeypatch.chdir(tmp_path)
    [(_, example)] = read(name)
    assert (example.prompt_text, example.answer, example.chosen, example.rejected) == expected


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_data_set_without_an_expected_column_says_which(name, tmp_path, monkeypatch):
    missing = KNOWN[name].columns[0]
    local_copy(tmp_path, name, train=[{key: value for key, value in ROWS[name][0].items() if key != missing}])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"train row 1: no column '{missing}', which this data set is known to have"):
        read(name)


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if known.test_split])
def test_the_sets_own_test_split_is_held_out(name, tmp_path, monkeypatch):
    row, _ = ROWS[name]
    local_copy(tmp_path, name, train=[row, row], **{KNOWN[name].test_split: [row]})
    monkeypatch.chdir(tmp_path)
    assert [found.side for found, _ in read(name)] == ["test", "train", "train"]


@pytest.mark.parametrize("name", [name for name, known in KNOWN.items() if not known.test_split])
def test_a_set_without_a_test_split_is_divided_by_the_hash_of_its_prompts(name, tmp_path, monkeypatch):
    local_copy(tmp_path, name, train=[ROWS[name][0]])
    monkeypatch.chdir(tmp_path)
    assert [found.side for found, _ in read(name)] == [None]


def test_a_folder_elsewhere_whose_path_ends_with_the_name_is_known_too(tmp_path):
    local_copy(tmp_path, "lmqg/qg_jaquad", train=[ROWS["lmqg/qg_jaquad"][0]])
    [(_, example)] = read(str(tmp_path / "lmqg/qg_jaquad"))
    assert example.answer == " So."


def test_columns_in_the_source_go_before_what_is_known(tmp_path, monkeypatch):
    local_copy(tmp_path, "lmqg/qg_jaquad", train=[ROWS["lmqg/qg_jaquad"][0]])
    monkeypatch.chdir(tmp_path)
    [(_, example)] = read("lmqg/qg_jaquad", columns={"prompt": "question", "answer": "paragraph"})
    assert (example.prompt_text, example.answer) == ("Why?", "x")


def test_webgpt_answers_with_equal_scores_are_no_pair():
    row = ROWS["openai/webgpt_comparisons"][0] | {"score_0": 0.5}
    assert dropped("openai/webgpt_comparisons", row) is Reason.EQUAL


@pytest.mark.parametrize(("label", "chosen"), [(1, "No."), ("1", "No."), (0, "So.")])
def test_the_label_of_shp_says_which_answer_people_preferred(label, chosen):
    row = KNOWN["stanfordnlp/SHP"].parse(ROWS["stanfordnlp/SHP"][0] | {"labels": label}, "row 1")
    assert row["chosen"] == f" {chosen}"


@pytest.mark.parametrize("label", [None, -1, 0.5])
def test_a_label_of_shp_that_is_neither_0_nor_1_is_no_preference(label):
    assert dropped("stanfordnlp/SHP", ROWS["stanfordnlp/SHP"][0] | {"labels": label}) is Reason.LABEL


@pytest.mark.parametrize(
    "prompt",
    ["\n\nHuman: Why?\n\nAssistant:", "Human: Why?", "\n\nHuman: Why?\n\n", "Why?", " Human: Why?\n\nAssistant: "],
)
def test_a_prompt_of_rlhf_reward_datasets_ends_with_assistant_once(prompt):
    row = {"prompt": prompt, "chosen": "So.", "rejected": "Assistant:No."}
    ours = KNOWN["yitingxie/rlhf-reward-datasets"].parse(row, "row 1")
    assert ours == {"prompt": ASKED, "chosen": " So.", "rejected": " No."}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wangrui6/Zhihu-KOL", {"RESPONSE": None}),
        ("Hello-SimpleAI/HC3-Chinese", {"human_answers": []}),
        ("Hello-SimpleAI/HC3-Chinese", {"human_answers": None}),
        ("mkqa-Chinese", {"answers": {"zh_cn": [{"type": 1, "text": None}]}}),
        ("Cohere/miracl-zh-queries-22-12", {"positive_passages": []}),
    ],
)
def test_a_question_without_an_answer_is_a_prompt_for_ppo_and_no_crash(name, change):
    assert set(KNOWN[name].parse(ROWS[name][0] | change, "row 1")) == {"prompt"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("wangrui6/Zhihu-KOL", {"INSTRUCTION": None}),
        ("lmqg/qag_jaquad", {"questions": []}),
        ("mkqa-Japanese", {"queries": {"ja": None}}),
        ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"prompt": None}),
    ],
)
def test_an_answer_without_a_question_is_dropped(name, change):
    assert dropped(name, ROWS[name][0] | change) is Reason.EMPTY_PROMPT


def test_known_sets_of_many_shapes_make_one_data_artifact(tmp_path, monkeypatch):
    hh = [{"prompt": HH.replace("Why", f"Why {i}"), "chosen": f" So {i}.", "rejected": " No."} for i in range(120)]
    held = [row | {"prompt": row["prompt"].replace("Who", "What")} for row in hh[:30]]
    local_copy(tmp_path, "Dahoas/rm-static", train=hh, test=held)
    local_copy(tmp_path, "wangrui6/Zhihu-KOL", train=[{"INSTRUCTION": f"Z{i}?", "RESPONSE": "So."} for i in range(120)])
    monkeypatch.chdir(tmp_path)
    sources = (HubSource(name="Dahoas/rm-static"), HubSource(name="wangrui6/Zhihu-KOL"))
    build(tmp_path / "out", sources=sources, tokenizer=TRAINED, shares=Shares(sft=1, reward=1, ppo=1))
    data = open_all(tmp_path / "out")
    assert set(data["sft/train"]["source"]) == set(data["ppo/train"]["source"]) == {source.name for source in sources}
    assert set(data["reward/train"]["source"]) == {"Dahoas/rm-static"}
    for place, rows in data.items():
        own = [row["prompt"] for row in rows if row["source"] == "Dahoas/rm-static"]
        assert own and all(("What?" in prompt) == ("test" in place) for prompt in own)
