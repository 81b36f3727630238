"""What goes wrong with DeepSpeed-Chat's data, and does not here; each test is named by the fault it rules out.

Others are ruled out beside what they belong to: stale caches (test_data_sources), memory (test_data_memory), the faults
of single data sets (test_data_known).
"""

import json
import os
import subprocess
import sys

import pytest
from test_data_build import TRAINED, build, files, open_all, pair_rows, prompts_of
from transformers import AutoTokenizer

from rlhf_core.batches import right_pad
from rlhf_core.config import PipelineConfig
from rlhf_core.plan import stage_refs
from rlhf_core.specs import DataSpec, ModelSpec, PPOSpec, QuickstartSource, RewardSpec, SFTSpec, Shares, TokenizerSpec

SHARES = Shares(sft=1, reward=1, ppo=1, test=0.2)


def answers(n, text=" yes it is"):
    return [{"prompt": f"Q{i}:", "response": text} for i in range(n)]


def test_the_split_is_seeded_once_for_all_stages_whatever_seeds_the_stages_have():
    """Theirs: PPO without a seed draws its prompts by another shuffle than SFT and the reward model."""

    def data_ref(**seeds):
        stages = {"sft": SFTSpec(seed=seeds.get("sft")), "reward": RewardSpec(seed=seeds.get("reward"))}
        data = DataSpec(sources=(QuickstartSource(),), tokenizer=TRAINED)
        config = PipelineConfig(
            name="x",
            model=ModelSpec(family="llama", positions=512),
            data=data,
            ppo=PPOSpec(seed=seeds.get("ppo")),
            **stages,
        )
        refs = stage_refs(config)
        return refs["data"].id, refs["ppo"].id

    one, other = data_ref(), data_ref(sft=1, reward=2, ppo=3)
    assert one[0] == other[0] and one[1] != other[1]


def test_no_prompt_of_ppo_was_seen_by_sft_or_the_reward_model_even_with_many_rows_a_prompt(tmp_path):
    """Theirs: rows are split, not prompts, so that the rows of one prompt fall on all stages and on both sides."""
    rows = [row | {"chosen": f" yes {k}"} for row in pair_rows(100) for k in range(4)]
    build(tmp_path / "out", sources=(files(tmp_path / "a.jsonl", rows),), shares=SHARES)
    prompts = list(prompts_of(open_all(tmp_path / "out")).values())
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 100


def test_prompt_tokens_are_not_trained_and_every_answer_token_is(tmp_path):
    build(tmp_path / "out", sources=(files(tmp_path / "a.jsonl", answers(80)),), shares=Shares(sft=1, reward=0, ppo=0))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    for row in open_all(tmp_path / "out")["sft/train"]:
        learned = [i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        assert tokenizer.decode(learned) == " yes it is<eos>"


def test_pads_are_never_labels_even_where_the_text_spells_the_pad_token(tmp_path):
    rows = answers(40, text=" a <pad> b") + [row | {"prompt": f"P{i}"} for i, row in enumerate(answers(40))]
    build(tmp_path / "out", sources=(files(tmp_path / "a.jsonl", rows),), shares=Shares(sft=1, reward=0, ppo=0))
    rows = open_all(tmp_path / "out")["sft/train"].to_list()
    pad = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").pad_token_id
    ids = right_pad([row["input_ids"] for row in rows], pad, "cpu")
    labelled = right_pad([row["loss_mask"] for row in rows], 0, "cpu").bool()
    assert (ids == pad).any() and not (ids[labelled] == pad).any()
    assert not any(pad in row["input_ids"] for row in rows)


@pytest.mark.parametrize("family", ["opt-tokenizer", "gpt2-tokenizer", "neox-tokenizer"])
def test_all_stages_end_an_answer_with_the_same_one_token(family, shared, tmp_path):
    """Theirs: the reward model reads '<|endoftext|>' as seven pieces of a word, and SFT ends with another token."""
    source = files(tmp_path / "a.jsonl", pair_rows(100))
    model = ModelSpec(path=str(shared / "models" / family))
    build(tmp_path / "out", sources=(source,), model=model, tokenizer=TokenizerSpec(), shares=SHARES)
    data = open_all(tmp_path / "out")
    eos = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").eos_token_id
    columns = {"sft": ["input_ids"], "reward": ["chosen_ids", "rejected_ids"], "ppo": ["response_ids"]}
    for place, rows in data.items():
        for column in columns[place.split("/")[0]]:
            assert all(ids[-1] == eos and eos not in ids[1:-1] for ids in rows[column])


def test_an_answer_never_loses_its_eos_unless_cutting_was_asked_for(tmp_path):
    """Theirs: rows are cut to the longest length, and the EOS is what is cut."""
    rows = answers(80) + [{"prompt": f"L{i}:", "response": " many" * 300} for i in range(80)]
    source = files(tmp_path / "a.jsonl", rows)
    metrics = build(tmp_path / "out", sources=(source,), shares=Shares(sft=1, reward=0, ppo=0), max_response_tokens=20)
    rows = [row for part in open_all(tmp_path / "out").values() for row in part]
    eos = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer").eos_token_id
    assert len(rows) == 80 and all(row["input_ids"][-1] == eos for row in rows)
    assert metrics["dropped"] == {"response over max_response_tokens": 80}


def test_rows_are_as_long_as_they_are_and_not_padded_to_the_limit(tmp_path):
    build(
        tmp_path / "out", sources=(files(tmp_path / "a.jsonl", pair_rows(100)),), shares=SHARES, max_prompt_tokens=4096
    )
    size = sum(file.stat().st_size for file in (tmp_path / "out").rglob("*.arrow"))
    assert size / 100 < 1000, "a padded row of these limits takes 8 bytes and more a position"


def test_the_tokenizer_loads_from_the_output_alone_offline_with_all_it_was_given(shared, tmp_path):
    """Theirs: only the vocabulary is saved, and the tokenizer is read again from the model's original name."""
    base = tmp_path / "base"
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "gpt2-tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|extra|>"]})
    tokenizer.save_pretrained(base)
    source = files(tmp_path / "a.jsonl", pair_rows(100))
    build(tmp_path / "out", sources=(source,), tokenizer=TokenizerSpec(path=str(base)), shares=SHARES)
    for file in base.iterdir():
        file.unlink()
    script = (
        "import json, sys; from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "chat = t.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False, add_generation_prompt=True)\n"
        "print(json.dumps([len(t), t.pad_token_id, t.eos_token_id, t('a<|extra|>b')['input_ids'], chat]))\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty"), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", script, str(tmp_path / "out" / "tokenizer")]
    found = subprocess.run(command, check=True, env=environment, capture_output=True, text=True, cwd=tmp_path)
    expected = [50259, 50258, 50256, [64, 50257, 65], "\n\nHuman: Hi\n\nAssistant:"]
    assert json.loads(found.stdout) == expected


def test_nothing_is_written_outside_of_the_output_so_there_is_no_cache_to_be_missing_or_corrupt(tmp_path):
    script = (
        "import pathlib, sys\nfrom test_data_build import *\n"
        "rows = files(pathlib.Path(sys.argv[1]).parent / 'rows.jsonl', pair_rows(100))\n"
        "build(pathlib.Path(sys.argv[1]), sources=(rows,), pretrain=(rows,), max_prompt_tokens=9, max_response_tokens=9)\n"
    )
    places = {name: tmp_path / name for name in ("HOME", "TMPDIR", "HF_HOME", "cwd")}
    for place in places.values():
        place.mkdir()
    environment = os.environ | {name: str(place) for name, place in places.items()}
    environment |= {"PYTHONPATH": f"{os.path.dirname(__file__)}:{os.getcwd()}", "PYTHONDONTWRITEBYTECODE": "1"}
    (tmp_path / "artifact").mkdir()
    command = [sys.executable, "-c", script, str(tmp_path / "artifact" / "out")]
    subprocess.run(command, check=True, env=environment, cwd=places["cwd"], capture_output=True)
    assert (tmp_path / "artifact" / "out" / "report.json").is_file()
    assert [file for place in places.values() for file in place.rglob("*") if file.is_file()] == []


def test_the_texts_stay_beside_the_ids_so_that_a_reward_model_may_have_another_tokenizer(tmp_path):
    build(tmp_path / "out", sources=(files(tmp_path / "a.jsonl", pair_rows(100)),), shares=SHARES)
    for row in open_all(tmp_path / "out")["reward/train"]:
        number = int(row["prompt"][1:-1])
        assert (row["chosen"], row["rejected"]) == (f" yes {number}", f" no {number}")
