"""The data stage as a whole: from files to tokenised shares, with every row accounted for."""

import json
import os
import subprocess
import sys

import pytest
from datasets import load_from_disk
from transformers import PreTrainedTokenizerFast

from rlhf_core import gold
from rlhf_core.artifacts import ArtifactRef, describe
from rlhf_core.context import JobContext
from rlhf_core.data.build import run
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.job import JobSpec
from rlhf_core.specs import (
    DataSpec,
    FileSource,
    ModelSpec,
    QuickstartSource,
    SampledPairs,
    Shares,
    TokenizerSpec,
)
from rlhf_core.store import Store

TRAINED = TokenizerSpec(train_vocab_size=320)
PLACES = [f"{share}/{split}" for share in ("sft", "reward", "ppo") for split in ("train", "test")]


def context_for(out, spec, model=None, seed=0):
    out.mkdir(parents=True, exist_ok=True)
    job = JobSpec(
        stage="data",
        store="memory://data",
        output=ArtifactRef(stage="data", name="test", fingerprint="0" * 64),
        attempt=1,
        job_id="test",
        spec=spec.model_dump(mode="json") | {"seed": seed},
        identity={},
        model=model,
    )
    return JobContext(job=job, store=Store("memory://data"), out=out)


def build(out, model=None, seed=0, **fields):
    fields.setdefault("tokenizer", TRAINED)
    return run(context_for(out, DataSpec(**fields), model, seed))


def files(path, rows, **options):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(paths=(str(path),), **options)


def open_all(out):
    return {place: load_from_disk(str(out / place)) for place in PLACES if (out / place).exists()}


def prompts_of(data):
    return {place: set(rows["prompt"]) for place, rows in data.items()}


def pair_rows(n, offset=0):
    return [
        {"prompt": f"Q{i + offset}:", "chosen": f" yes {i}", "rejected": f" no {i}", "answer": f" maybe {i}"}
        for i in range(n)
    ]


def fails(error, message, out, **fields):
    with pytest.raises(error, match=message):
        build(out, **fields)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    return out, build(out, sources=(QuickstartSource(prompts=600, pairs_per_prompt=2),))


def test_the_columns_are_those_the_trainers_read(quickstart):
    columns = {
        "sft": ["input_ids", "loss_mask", "prompt", "response", "source"],
        "reward": ["prompt_ids", "chosen_ids", "rejected_ids", "prompt", "chosen", "rejected", "source"],
        "ppo": ["prompt_ids", "prompt", "response_ids", "response", "source"],
    }
    for place, rows in open_all(quickstart[0]).items():
        assert rows.column_names == columns[place.split("/")[0]]
        assert rows.cache_files, "read from memory-mapped files"


def test_no_prompt_is_in_two_stages_or_in_train_and_test(quickstart):
    prompts = list(prompts_of(open_all(quickstart[0])).values())
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 600


def test_prompt_and_response_together_are_the_input(quickstart):
    out, _ = quickstart
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    for row in open_all(out)["sft/train"]:
        start = row["loss_mask"].index(1)
        assert row["loss_mask"] == [0] * start + [1] * (len(row["input_ids"]) - start)
        assert tokenizer.decode(row["input_ids"][:start]) == row["prompt"]
        assert tokenizer.decode(row["input_ids"][start:-1]) == row["response"]
        assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_every_stage_encodes_a_text_in_the_same_way(quickstart):
    out, _ = quickstart
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    eos = [tokenizer.eos_token_id]
    data = open_all(out)
    for row in data["reward/train"]:
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert row["chosen_ids"] == tokenizer(row["chosen"])["input_ids"] + eos
        assert row["rejected_ids"] == tokenizer(row["rejected"])["input_ids"] + eos
        assert row["source"] == "quickstart"
    for row in data["ppo/train"]:
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert row["response_ids"] == tokenizer(row["response"])["input_ids"] + eos


def test_every_row_is_kept_or_counted(quickstart):
    out, metrics = quickstart
    report = json.loads((out / "report.json").read_text())
    data = open_all(out)
    assert metrics["rows_read"] == report["sources"]["quickstart"]["read"] == 1200
    assert metrics["rows_read"] == metrics["rows_kept"] + sum(metrics["dropped"].values())
    assert metrics["rows_kept"] == report["sources"]["quickstart"]["kept"] == sum(map(len, data.values()))
    for place, rows in data.items():
        ids = [column for column in rows.column_names if column.endswith("_ids")]
        assert metrics["splits"][place]["rows"] == report["splits"][place]["rows"] == len(rows)
        assert metrics["splits"][place]["tokens"] == sum(len(row) for column in ids for row in rows[column])
        for column in ids:
            assert report["splits"][place]["columns"][column]["max"] == max(map(len, rows[column]))
    assert sum(part["count"] for part in report["prompts"].values()) == 600
    # PPO asks each prompt once, however many pairs it has; the other stages use both rows.
    assert metrics["dropped"] == {"duplicate": report["prompts"]["ppo"]["count"]}


def test_two_processes_build_the_same_bytes_without_torch(tmp_path):
    script = (
        "import pathlib, sys\n"
        "from test_data_build import QuickstartSource, build\n"
        "build(pathlib.Path(sys.argv[1]), sources=(QuickstartSource(prompts=200),))\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True, env=environment)
    first, second = describe(tmp_path / "a"), describe(tmp_path / "b")
    assert first == second and len(first) > 20


def test_the_tokenizer_is_trained_without_the_test_splits(tmp_path):
    rows = pair_rows(200)
    build(tmp_path / "a", sources=(files(tmp_path / "rows.jsonl", rows),))
    held_out = set().union(
        *(prompts for place, prompts in prompts_of(open_all(tmp_path / "a")).items() if "test" in place)
    )
    other = [row | {"chosen": " xyzzy", "answer": " xyzzy"} if row["prompt"] in held_out else row for row in rows]
    build(tmp_path / "b", sources=(files(tmp_path / "rows.jsonl", other),))
    first, second = ((tmp_path / name / "tokenizer" / "tokenizer.json").read_text() for name in ("a", "b"))
    assert held_out and first == second


def test_another_seed_splits_otherwise(tmp_path):
    source = files(tmp_path / "a.jsonl", pair_rows(200))
    for seed in (0, 1):
        build(tmp_path / str(seed), sources=(source,), seed=seed)
    assert prompts_of(open_all(tmp_path / "0")) != prompts_of(open_all(tmp_path / "1"))


def test_a_share_of_weight_zero_has_no_folder(tmp_path):
    source = files(tmp_path / "a.jsonl", pair_rows(100))
    metrics = build(tmp_path / "out", sources=(source,), shares=Shares(sft=0, reward=1, ppo=1))
    assert not (tmp_path / "out" / "sft").exists()
    assert metrics["splits"]["sft/train"] == {"rows": 0, "tokens": 0}


def test_sft_learns_the_answer_if_there_is_one_and_the_chosen_text_otherwise(tmp_path):
    rows = pair_rows(100) + [{k: v for k, v in row.items() if k != "answer"} for row in pair_rows(100, offset=100)]
    build(tmp_path / "out", sources=(files(tmp_path / "a.jsonl", rows),), shares=Shares(sft=1, reward=1, ppo=0))
    learned = {row["prompt"]: row["response"] for row in open_all(tmp_path / "out")["sft/train"]}
    assert {response.split()[0] for prompt, response in learned.items() if int(prompt[1:-1]) < 100} == {"maybe"}
    assert {response.split()[0] for prompt, response in learned.items() if int(prompt[1:-1]) >= 100} == {"yes"}


def test_each_source_feeds_the_shares_it_can(tmp_path):
    sources = (
        files(tmp_path / "pairs.jsonl", pair_rows(300)),
        files(tmp_path / "answers.jsonl", [{"prompt": f"A{i}:", "response": " x"} for i in range(300)]),
        files(tmp_path / "prompts.jsonl", [{"prompt": f"P{i}:"} for i in range(300)]),
    )
    build(tmp_path / "out", sources=sources)
    data = open_all(tmp_path / "out")
    letters = {share: {p[0] for p in data[f"{share}/train"]["prompt"]} for share in ("sft", "reward", "ppo")}
    assert letters == {"sft": {"Q", "A"}, "reward": {"Q"}, "ppo": {"Q", "A", "P"}}
    references = {row["prompt"][0]: row["response_ids"] for row in data["ppo/train"]}
    assert references["P"] == [] != references["A"]


def test_a_prompt_in_two_sources_stays_in_one_share(tmp_path):
    sources = (
        files(tmp_path / "pairs.jsonl", pair_rows(200)),
        files(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"].lower()} for row in pair_rows(200)]),
    )
    metrics = build(tmp_path / "out", sources=sources)
    prompts = [{p.lower() for p in found} for found in prompts_of(open_all(tmp_path / "out")).values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 200
    assert metrics["dropped"]["prompt is in a share this row cannot feed"] > 0


def test_long_rows_are_dropped_and_counted(tmp_path):
    long = " many" * 500
    rows = [*pair_rows(200), {"prompt": "Q" + long, "chosen": " a", "rejected": " b"}]
    rows += [{"prompt": f"L{i}:", "chosen": long, "rejected": " b"} for i in range(20)]
    metrics = build(tmp_path / "out", sources=(files(tmp_path / "a.jsonl", rows),))
    report = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]["a"]
    assert metrics["dropped"]["prompt over max_prompt_tokens"] == 1
    # A reference that is too long does not cost PPO its prompt.
    kept = report["notes"]["references over max_response_tokens"]
    assert metrics["dropped"]["response over max_response_tokens"] + kept == 20 and 0 < kept < 20
    assert metrics["rows_read"] == metrics["rows_kept"] + sum(metrics["dropped"].values())


def test_long_responses_may_be_cut_and_then_have_no_eos(tmp_path):
    rows = [{"prompt": f"Q{i}:", "response": " one two" * (1 + 50 * (i % 2))} for i in range(200)]
    source, shares = files(tmp_path / "a.jsonl", rows), Shares(sft=1, reward=0, ppo=0)
    build(tmp_path / "out", sources=(source,), shares=shares, max_response_tokens=8, truncate_responses=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]["a"]
    assert report["notes"] == {"responses truncated": 100} and report["dropped"] == {}
    for row in open_all(tmp_path / "out")["sft/train"]:
        learned = [i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        cut = int(row["prompt"][1:-1]) % 2 == 1
        assert (len(learned) == 8 and 1 not in learned) if cut else learned[-1] == 1


def test_pairs_that_are_the_same_once_cut_are_dropped(tmp_path):
    rows = [{"prompt": f"Q{i}:", "chosen": " a" * 20 + " b", "rejected": " a" * 20 + " c"} for i in range(50)]
    rows += pair_rows(200, offset=1000)
    metrics = build(
        tmp_path / "out",
        sources=(files(tmp_path / "a.jsonl", rows),),
        max_response_tokens=6,
        truncate_responses=True,
        shares=Shares(sft=0, reward=1, ppo=0),
    )
    assert metrics["dropped"] == {"chosen equals rejected": 50}


def test_all_answers_of_a_dialogue_are_learned(tmp_path):
    rows = [
        {
            "messages": [
                {"role": r, "content": f"{c}{i}"} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)
            ]
        }
        for i in range(100)
    ]
    build(tmp_path / "out", sources=(files(tmp_path / "a.jsonl", rows),), shares=Shares(sft=1, reward=0, ppo=1))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out" / "tokenizer")
    data = open_all(tmp_path / "out")
    row = data["sft/train"][0]
    number = row["response"].strip(" d")
    learned = [i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
    assert tokenizer.decode(learned) == f" b{number}<eos> d{number}<eos>"
    # PPO's prompt has the same ids as SFT's context: EOS after the earlier answer.
    assert data["ppo/train"][0]["prompt_ids"].count(tokenizer.eos_token_id) == 1


def test_a_chat_template_needs_no_vocabulary_yet(tmp_path):
    choice = TokenizerSpec(train_vocab_size=320, chat_template="{{ messages[-1].content }}>")
    rows = [{"prompt": [{"role": "user", "content": f"Q{i}"}], "response": "x"} for i in range(100)]
    source, shares = files(tmp_path / "a.jsonl", rows), Shares(sft=1, reward=0, ppo=1)
    build(tmp_path / "out", sources=(source,), tokenizer=choice, template="chat", shares=shares)
    assert all(p.startswith("Q") and p.endswith(">") for p in open_all(tmp_path / "out")["sft/train"]["prompt"])


def test_a_missing_file_is_found_before_anything_is_read(tmp_path):
    good = files(tmp_path / "a.jsonl", [{"nonsense": 1}])
    missing = FileSource(paths=(str(tmp_path / "none.jsonl"),))
    fails(ConfigError, r"data\.sources\[1\]\.paths", tmp_path / "out", sources=(good, missing))


def test_an_empty_file_is_an_error(tmp_path):
    fails(DataError, r"data\.sources\[0\]: has no rows", tmp_path / "out", sources=(files(tmp_path / "a.jsonl", []),))


def test_an_empty_share_says_what_was_read_and_dropped(tmp_path):
    rows = [{"prompt": f"Q{i}:", "response": " x"} for i in range(200)] + [{"prompt": "", "response": " x"}]
    message = (
        r"data\.shares\.reward is 4, but its train split has no rows\. Rows read: 201; dropped: empty prompt 1; "
        r"kept: sft/train .* give a source with chosen and rejected, set data\.sampled_pairs, or set "
        r"data\.shares\.reward to 0"
    )
    fails(DataError, message, tmp_path / "out", sources=(files(tmp_path / "a.jsonl", rows),))


def test_an_empty_test_split_is_an_error_too(tmp_path):
    source = files(tmp_path / "a.jsonl", pair_rows(60))
    message = r"its test split has no rows.* raise data\.shares\.test \(is 0\.0001\)"
    fails(DataError, message, tmp_path / "out", sources=(source,), shares=Shares(test=0.0001))


def test_hh_rlhf_is_built_and_accounted_for(shared, tmp_path):
    paths = tuple(str(p) for p in sorted((shared / "data" / "hh-rlhf").glob("*.jsonl.gz")))
    model = ModelSpec(path=str(shared / "models" / "opt-tokenizer"))
    metrics = build(tmp_path, sources=(FileSource(paths=paths),), tokenizer=TokenizerSpec(), model=model)
    assert metrics["rows_read"] == 8552 == metrics["rows_kept"] + sum(metrics["dropped"].values())
    assert metrics["dropped"]["chosen equals rejected"] == 36
    data = open_all(tmp_path)
    prompts = [{p.casefold() for p in found} for found in prompts_of(data).values()]
    assert sum(map(len, prompts)) == len(set().union(*prompts))
    assert set(data["reward/train"]["source"]) == {p.rsplit("/", 1)[1].removesuffix(".jsonl.gz") for p in paths}
    for row in data["reward/test"]:
        assert row["prompt_ids"][0] == 2 and row["prompt_ids"].count(2) == 1
        assert row["chosen_ids"][-1] == 2 and row["chosen_ids"].count(2) == 1


def sampling(shared, **fields):
    story = FileSource(paths=(str(shared / "data" / "tinystories" / "tiny_stories.txt"),), format="stories", limit=400)
    return {
        "sources": (story,),
        "tokenizer": TokenizerSpec(eos_token="<s>"),
        "template": "none",
        "max_response_tokens": 24,
        "truncate_responses": True,
        "shares": Shares(test=0.3),
        "model": ModelSpec(path=str(shared / "models" / "stories260k")),
    } | fields


def test_pairs_are_sampled_from_the_model_and_judged_by_gold(shared, tmp_path):
    pytest.importorskip("vaderSentiment")
    plan = SampledPairs(gold="vader", per_prompt=3, max_prompts=30)
    metrics = build(tmp_path, **sampling(shared, sampled_pairs=plan))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    data = open_all(tmp_path)
    rows = [*data["reward/train"], *data["reward/test"]]
    assert len(rows) + metrics["dropped"].get("all sampled answers have the same gold", 0) == 30
    assert metrics["rows_read"] == metrics["rows_kept"] + sum(metrics["dropped"].values())
    assert metrics["gold_chosen"] > metrics["gold_mean"] > metrics["gold_rejected"]
    for row in rows:
        better, worse = gold.score("vader", [row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert better["gold"] > worse["gold"]
        for name in ("chosen", "rejected"):
            ids = row[f"{name}_ids"]
            assert len(ids) <= 24 and tokenizer.eos_token_id not in ids[:-1]
            assert row[name].strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("model", "tokenizer", "message"),
    [
        (ModelSpec(family="llama"), TokenizerSpec(train_vocab_size=300), "model.path is not set"),
        (ModelSpec(path="/some/model"), TokenizerSpec(train_vocab_size=300), "remove one of the two"),
    ],
)
def test_sampled_pairs_need_a_pretrained_model_and_its_tokenizer(tmp_path, model, tokenizer, message):
    plan, source = SampledPairs(gold="quickstart"), QuickstartSource()
    fails(ConfigError, message, tmp_path, sources=(source,), sampled_pairs=plan, model=model, tokenizer=tokenizer)


def test_the_threads_of_the_tokenizer_follow_the_resources(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    context = context_for(tmp_path, DataSpec(sources=(QuickstartSource(prompts=200),), tokenizer=TRAINED))
    resources = context.job.resources.model_copy(update={"data_workers": 2})
    run(JobContext(context.job.model_copy(update={"resources": resources}), context.store, tmp_path))
    assert os.environ["RAYON_NUM_THREADS"] == "2"
