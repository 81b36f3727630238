"""`rlhf eval` from the command line to its files, on a store of tiny artifacts; the process that answers is the real one."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
from commands import rlhf

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.store import Store

Names = dict[str, ArtifactRef]


@pytest.fixture(scope="module")
def store(tiny_root: Path, tmp_path_factory) -> Store:
    return Store(f"file://{tmp_path_factory.mktemp('eval')}/store")


@pytest.fixture(scope="module")
def made(tiny_root: Path, store: Store, tmp_path_factory) -> Names:
    """Data of two sources, an SFT and a reward model, and a PPO run with two snapshots: SFT's weights, then others."""
    from datasets import Dataset

    from rlhf_core.export import save_causal_lm
    from rlhf_core.models import new_causal_lm

    work = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_root / "data", work / "data")
    for share in ("sft", "reward"):
        rows = Dataset.load_from_disk(str(tiny_root / "data" / share / "test")).to_list()
        for i, row in enumerate(rows):
            row["source"] = "odd" if i % 2 else "even"
        shutil.rmtree(work / "data" / share / "test")
        Dataset.from_list(rows).save_to_disk(str(work / "data" / share / "test"))
    refs = {"data": tiny.put(store, "data", work / "data", {})}
    refs["sft"] = tiny.put(store, "sft", tiny_root / "sft", refs)
    refs["reward"] = tiny.put(store, "reward", tiny_root / "reward", refs)
    shutil.copytree(tiny_root / "sft" / "model", work / "ppo" / "snapshots" / "step-000002")
    for i, folder in enumerate(("snapshots/step-000004", "actor")):
        save_causal_lm(new_causal_lm(tiny.MODEL, tiny.tokenizer(), seed=i + 1), tiny.tokenizer(), work / "ppo" / folder)
    refs["ppo"] = tiny.put(store, "ppo", work / "ppo", refs, mark="ppo")
    return refs


@pytest.fixture
def evaluate(store: Store, made: Names, capfd, tmp_path: Path):
    """Run `rlhf eval` in this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        arguments = [made[w].id if w in made else w for w in map(str, words)]
        answers = "--frontier" in words or not str([*words, "--"][1]).startswith("--")  # one target answers no prompt
        short = ["--max-new-tokens", "8"] if answers else []
        return rlhf(capfd, "eval", *short, *arguments, "--store", store.url)

    return run


def test_a_reward_model_is_judged_on_held_out_pairs_by_source_with_files(evaluate, store, made, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification

    code, out, err = evaluate("reward", "--out", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert found["pairs"] == 24 and {k: v["pairs"] for k, v in found["sources"].items()} == {"even": 12, "odd": 12}
    assert "even" in out and "ECE" in out and "longer answer scores higher" in out
    assert {p.name for p in (tmp_path / "out" / "plots").iterdir()} == {"reliability.png", "length.png"}
    rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    right = sum(row["chosen_score"] > row["rejected_score"] for row in rows)
    assert found["accuracy"]["value"] == right / 24
    judge = AutoModelForSequenceClassification.from_pretrained(store.local_path(f"{made['reward'].id}/model")).eval()
    data = _rows(store, made, "reward")
    for row, ids in zip(rows[:4], data[:4], strict=True):
        for side in ("chosen", "rejected"):
            tokens = torch.tensor([ids["prompt_ids"] + ids[f"{side}_ids"]])
            score = judge.score(judge.model(tokens).last_hidden_state)[0, -1].item()
            assert row[f"{side}_score"] == pytest.approx(score, abs=1e-4)


def _rows(store: Store, made: Names, share: str) -> list[dict]:
    from datasets import Dataset

    return Dataset.load_from_disk(str(store.local_path(f"{made['data'].id}/{share}/test"))).to_list()


def test_a_language_model_is_judged_by_perplexity_by_source_and_tokens_are_counted(evaluate, store, made):
    code, out, err = evaluate("sft", "--json")
    assert code == 0, err
    found = json.loads(out)
    wanted = sum(sum(row["loss_mask"][1:]) for row in _rows(store, made, "sft"))
    assert found["tokens"] == wanted == sum(part["tokens"] for part in found["sources"].values())
    assert found["perplexity"]["low"] < found["perplexity"]["value"] < found["perplexity"]["high"]


def test_two_models_answer_the_same_prompts_side_by_side(evaluate, made, tmp_path):
    code, out, err = evaluate("sft", "ppo", "--limit", 6, "--out", tmp_path / "out", "--gold", "quickstart")
    assert code == 0, err
    assert made["sft"].id in out and made["ppo"].id in out and "B − A" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all({"text", "reward", "gold", "tokens", "eos"} <= set(a) for row in rows for a in row["answers"])
    page = (tmp_path / "out" / "answers.html").read_text()
    assert page.count("<article>") == 6 and "http" not in page and "<script" not in page


def test_the_same_weights_give_the_same_answers_and_no_gain(evaluate, made):
    code, out, err = evaluate("sft", f"{made['ppo'].id}:snapshots/step-000002", "--limit", 5, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert all(row["answers"][0] == row["answers"][1] for row in found["rows"])
    assert found["gains"]["reward"]["value"] == 0 and found["win_rate"]["reward"]["value"] == 0.5


def test_an_artifact_and_a_models_folder_answer_given_prompts_greedily(evaluate, store, made, tmp_path):
    (tmp_path / "prompts.txt").write_text("w1 w2\n\nw3\n")
    folder = store.local_path(f"{made['ppo'].id}/actor")
    words = ("--prompts", tmp_path / "prompts.txt", "--prompt", "w4", "--raw", "--greedy", "--json")
    code, out, err = evaluate("sft", folder, *words)
    assert code == 0, err
    found = json.loads(out)
    assert [row["prompt"] for row in found["rows"]] == ["w4", "w1 w2", "w3"]
    assert found["greedy"] is True and "seed" not in found
    assert json.loads(evaluate("sft", folder, *words, "--seed", 5)[1])["rows"] == found["rows"], "greedy has no noise"


def test_the_frontier_has_sft_every_snapshot_and_the_last_actor(evaluate, tmp_path):
    code, out, err = evaluate("ppo", "--frontier", "--limit", 12, "--gold", "quickstart", "--out", tmp_path / "out")
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    sft, same, other, last = found["points"]
    assert [p["name"] for p in found["points"]] == ["sft", "step 2", "step 4", "final"]
    assert sft["kl_sequence"]["value"] == 0 and same["kl_sequence"]["value"] == pytest.approx(0, abs=1e-4)
    assert same["reward"] == sft["reward"] and other["reward"] != sft["reward"] != last["reward"]
    assert abs(other["kl_sequence"]["value"]) > 1e-3
    assert found["verdict"] in ("over-optimised", "gold fell", "not seen") and found["sentence"] in " ".join(
        out.split()
    )
    assert (tmp_path / "out" / "plots" / "frontier.png").stat().st_size > 5000


def test_a_mistake_of_the_process_is_one_line_and_its_exit_code(evaluate, made):
    code, out, err = evaluate("sft", "ppo", "--prompt", "w1", "--max-new-tokens", 100)
    assert (code, out) == (2, "")
    assert err.count("error:") == 1 and "positions" in err and "Traceback" not in err
