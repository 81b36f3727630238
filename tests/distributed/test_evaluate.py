"""The evaluate stage on real processes: its numbers against plain transformers, and their independence of processes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import tiny

from rlhf_core.artifacts import ArtifactRef, make_ref
from rlhf_core.checkpoints import Position
from rlhf_core.specs import ModelSpec
from rlhf_core.store import Store

SPEC = {"prompts": 20, "temperature": 0.7, "max_response_tokens": 10, "gold": "quickstart", "samples": 3}
FILES = ("evaluation.json", "samples.jsonl")
RANK = """
import json, os, sys
from test_evaluate import evaluate_rank
metrics = evaluate_rank(**json.loads(sys.argv[1]))
print("METRICS" + json.dumps(metrics)) if os.environ["RANK"] == "0" else None
sys.stdout.flush()
os._exit(0)
"""


def evaluate_rank(root: str, out: str, base: str | None, spec: dict, resources: dict, refs: str) -> dict:
    """One rank's run of the stage."""
    from rlhf_core.checkpointing import Checkpointer
    from rlhf_core.evaluate import Evaluator

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = {k: ArtifactRef.model_validate(v) for k, v in json.loads(Path(root, refs).read_text()).items()}
    folder = Path(out) if rank == 0 else Path(f"{out}-{rank}")
    context = tiny.context(Store(f"file://{root}/store"), "evaluate", spec, found, folder, rank, world, **resources)
    # An artifact of its own, so that no run takes up what another has left.
    context.job = context.job.model_copy(update={"output": make_ref("evaluate", "tiny-out", {"out": out}, found)})
    if after := int(os.environ.get("DIE_AFTER_MODELS", "0")):
        plain = Checkpointer.at

        def at(self: Checkpointer, position: Position, always: bool = False, last: bool = False) -> None:
            plain(self, position, always, last)
            if position.step == after:
                self._wait()
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpointer.at = at
    if base:
        job = context.job.model_copy(update={"model": ModelSpec.model_validate({"path": base})})
        context = type(context)(job, context.store, context.out, rank, world)
    held: list[float] = []

    class Weighed(Evaluator):
        """Notes which share of each model's matrices lies on this rank."""

        def placed(self, model: Any) -> Any:
            placed = super().placed(model)
            if resources.get("zero_stage") == 3:
                large = [p for p in placed.parameters() if p.ds_numel >= 10_000]
                held.append(sum(p.numel() + p.ds_tensor.numel() for p in large) / sum(p.ds_numel for p in large))
            return placed

    return Weighed(context).run() | {"largest_part": max(held, default=1.0)}


@pytest.fixture(scope="module")
def root(tiny_root: Path) -> Path:
    """The tiny store with a PPO artifact: an actor of other random weights."""
    from rlhf_core.export import save_causal_lm
    from rlhf_core.models import new_causal_lm

    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((tiny_root / "refs.json").read_text()).items()}
    actor, tokenizer = new_causal_lm(tiny.MODEL, tiny.tokenizer(), seed=1), tiny.tokenizer()
    save_causal_lm(actor, tokenizer, tiny_root / "ppo" / "actor")
    rows = [{"kind": "train", "step": i, "seconds": i, "score": 0.1 * i, "score_std": 1.0} for i in range(1, 4)]
    (tiny_root / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refs["ppo"] = tiny.put(Store(f"file://{tiny_root}/store"), "ppo", tiny_root / "ppo", refs)
    (tiny_root / "evaluate-refs.json").write_text(json.dumps({k: v.model_dump() for k, v in refs.items()}))
    return tiny_root


def evaluate(
    root: Path,
    out: Path,
    world: int = 1,
    base: bool = False,
    spec: dict = SPEC,
    refs: str = "evaluate-refs.json",
    **resources: int,
) -> dict:
    """Metrics of the stage; its files are in `out`."""
    arguments = {"root": str(root), "out": str(out), "spec": spec, "resources": resources, "refs": refs}
    arguments["base"] = str(root / "sft" / "model") if base else None
    port, tests = str(ranks.free_port()), Path(__file__).parents[1]
    paths = [str(p) for p in (tests.parent, tests, tests / "distributed")]
    environment = {
        **os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(arguments)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [-signal.SIGKILL if "DIE_AFTER_MODELS" in os.environ else 0] * world
    assert [process.returncode for process in processes] == codes
    if any(codes):
        return {}
    (line,) = (line for line in printed[0].splitlines() if line.startswith("METRICS"))
    return json.loads(line.removeprefix("METRICS"))


@pytest.fixture(scope="module")
def plain(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """One process, with the SFT model as the base model."""
    out = tmp_path_factory.mktemp("plain")
    return out, evaluate(root, out, base=True, micro_batch=5, rollout_micro_batch=6)


def samples(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_two_processes_write_the_bytes_of_one(root, plain, tmp_path):
    evaluate(root, tmp_path / "two", world=2, base=True, micro_batch=5, rollout_micro_batch=6)
    for name in FILES:
        assert (tmp_path / "two" / name).read_bytes() == (plain[0] / name).read_bytes(), name
    assert not list((tmp_path / "two-1").iterdir()), "only rank 0 writes"


def test_a_killed_evaluation_goes_on_with_the_next_model_and_ends_with_the_same_bytes(
    root, plain, tmp_path, monkeypatch
):
    monkeypatch.setenv("DIE_AFTER_MODELS", "1")
    evaluate(root, tmp_path / "cut", world=2, base=True, micro_batch=5, rollout_micro_batch=6)
    monkeypatch.setenv("DIE_AFTER_MODELS", "3")
    evaluate(root, tmp_path / "cut", world=2, base=True, micro_batch=5, rollout_micro_batch=6)
    monkeypatch.delenv("DIE_AFTER_MODELS")
    evaluate(root, tmp_path / "cut", world=2, base=True, micro_batch=5, rollout_micro_batch=6)
    for name in FILES:
        assert (tmp_path / "cut" / name).read_bytes() == (plain[0] / name).read_bytes(), name


def test_at_zero_3_models_are_divided_and_nothing_changes_but_rounding(root, plain, tmp_path):
    """Three ranks with 4 batches of 5 prompts: two of them run an empty one."""
    out = tmp_path / "out"
    metrics = evaluate(root, out, world=3, base=True, micro_batch=3, rollout_micro_batch=6, zero_stage=3)
    assert [[a["text"] for a in row["answers"].values()] for row in samples(out)] == [
        [a["text"] for a in row["answers"].values()] for row in samples(plain[0])
    ]
    for name in set(plain[1]) - {"seconds", "tokens_per_second", "largest_part"}:
        assert metrics[name] == pytest.approx(plain[1][name], rel=1e-4, abs=1e-5), name
    assert metrics["largest_part"] == pytest.approx(1 / 3, abs=0.01), "a rank held more than its part of a model"


def test_batch_sizes_change_nothing_but_rounding(root, plain, tmp_path):
    metrics = evaluate(root, tmp_path / "out", base=True, micro_batch=64, rollout_micro_batch=64)
    assert [[a["text"] for a in row["answers"].values()] for row in samples(tmp_path / "out")] == [
        [a["text"] for a in row["answers"].values()] for row in samples(plain[0])
    ]
    for name in set(metrics) - {"seconds", "tokens_per_second", "largest_part"}:
        assert metrics[name] == pytest.approx(plain[1][name], rel=1e-4, abs=1e-5), name


def test_the_same_model_under_another_name_gives_the_same_answers_and_no_kl(plain):
    evaluation = json.loads((plain[0] / "evaluation.json").read_text())
    for row in samples(plain[0]):
        base, sft = row["answers"]["base"], row["answers"]["sft"]
        assert base["text"] == sft["text"] and base["kl"] == pytest.approx(0, abs=1e-4)
    assert evaluation["models"]["base"]["perplexity"] == evaluation["models"]["sft"]["perplexity"]


def test_kl_and_reward_of_an_answer_are_those_of_plain_transformers_without_padding(root, plain):
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = tiny.tokenizer()
    actor = AutoModelForCausalLM.from_pretrained(root / "ppo" / "actor").eval()
    sft = AutoModelForCausalLM.from_pretrained(root / "sft" / "model").eval()
    judge = AutoModelForSequenceClassification.from_pretrained(root / "reward" / "model").eval()
    for row in samples(plain[0])[:6]:
        answer, prompt = row["answers"]["ppo"], tokenizer.encode(row["prompt"])
        response = tokenizer.encode(answer["text"]) + [tokenizer.eos_token_id] * answer["eos"]
        if len(response) != answer["tokens"]:
            continue  # a sampled pad token is not in the text
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logprobs = [
                (m(ids).logits[0, len(prompt) - 1 : -1] / SPEC["temperature"]).log_softmax(-1) for m in (actor, sft)
            ]
            score = judge.score(judge.model(ids).last_hidden_state)[0, -1].item()
        at = torch.arange(len(response)), torch.tensor(response)
        assert answer["kl"] == pytest.approx((logprobs[0][at] - logprobs[1][at]).sum().item(), abs=1e-4)
        assert answer["reward"] == pytest.approx(score, abs=1e-4)


def test_perplexity_is_over_the_response_tokens_of_the_held_out_rows(root, plain):
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "ppo" / "actor").eval()
    nats, tokens = 0.0, 0
    for row in Dataset.load_from_disk(str(root / "data" / "sft" / "test")).to_list():
        ids, mask = torch.tensor([row["input_ids"]]), torch.tensor(row["loss_mask"][1:], dtype=torch.bool)
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        nats -= logprobs.gather(1, ids[0, 1:, None])[mask].sum().item()
        tokens += int(mask.sum())
    assert plain[1]["perplexity_ppo"] == pytest.approx(torch.tensor(nats / tokens).exp().item(), rel=1e-4)


def test_all_prompts_are_in_samples_and_the_first_in_the_report(plain):
    out, metrics = plain
    rows = samples(out)
    assert len(rows) == metrics["prompts"] == 20 and [row["index"] for row in rows] == list(range(20))
    page = (out / "report.html").read_text()
    assert page.count("<article>") == SPEC["samples"]
    assert (out / "plots" / "ppo-score.png").exists() and (out / "plots" / "gold.png").exists()


def test_a_model_from_scratch_has_no_base_and_perplexity_can_be_left_out(root, tmp_path):
    metrics = evaluate(root, tmp_path / "out", spec={**SPEC, "gold": None, "perplexity": False, "prompts": 500})
    assert metrics["prompts"] == 24, "all that there are"
    assert list(samples(tmp_path / "out")[0]["answers"]) == ["sft", "ppo"]
    assert not [name for name in metrics if name.startswith(("perplexity", "gold")) or name.endswith("_base")]


# --- other pipelines -------------------------------------------------------------------------------------------------


def with_inputs(root: Path, name: str, **made: tuple[str, str]) -> str:
    """Refs of data and SFT and of artifacts whose folders are copies of others: stage=(its folder, the copied one)."""
    import shutil

    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((root / "evaluate-refs.json").read_text()).items()}
    refs = {k: refs[k] for k in ("data", "sft")}
    for stage, (folder, copied) in made.items():
        place = root / f"{name}-{stage}"
        for part in folder.split():
            shutil.copytree(root / copied, place / part, dirs_exist_ok=True)
        refs[stage] = tiny.put(Store(f"file://{root}/store"), stage, place, refs, mark=name)
    (root / f"{name}.json").write_text(json.dumps({k: v.model_dump() for k, v in refs.items()}))
    return f"{name}.json"


def test_a_dpo_pipeline_has_no_reward_scores_and_its_gains_go_by_gold(root, plain, tmp_path):
    refs = with_inputs(root, "dpo-pipeline", dpo=("model", "ppo/actor"))
    metrics = evaluate(root, tmp_path, refs=refs, micro_batch=5, rollout_micro_batch=6)
    assert list(samples(tmp_path)[0]["answers"]) == ["sft", "dpo"]
    for name in ("gold_{}", "perplexity_{}", "length_{}"):
        assert metrics[name.format("dpo")] == plain[1][name.format("ppo")], "the same weights under another name"
    assert metrics["kl_sequence"] == plain[1]["kl_sequence"] and metrics["gold_gain"] == plain[1]["gold_gain"]
    assert not [name for name in metrics if name.startswith("reward")]
    page = re.sub(r'base64,[^"]*', "", (tmp_path / "report.html").read_text())  # where any three letters occur
    assert "DPO − SFT" in page and "did DPO help?" in page and "PPO" not in page


def test_without_reward_model_and_gold_the_report_says_that_nothing_tells(root, tmp_path):
    refs = with_inputs(root, "no-reward", ppo=("actor", "ppo/actor"))
    spec = {**SPEC, "gold": None, "perplexity": False}
    metrics = evaluate(root, tmp_path, refs=refs, spec=spec)
    assert "kl_sequence" in metrics and "win_rate" not in metrics
    assert "neither gold (evaluate.gold) nor a reward model" in (tmp_path / "report.html").read_text()


def test_the_average_of_the_actor_is_one_more_model(root, plain, tmp_path):
    refs = with_inputs(root, "averaged", ppo=("actor actor_ema", "ppo/actor"), reward=("model", "reward/model"))
    metrics = evaluate(root, tmp_path, refs=refs, micro_batch=5, rollout_micro_batch=6)
    assert list(samples(tmp_path)[0]["answers"]) == ["sft", "ppo", "ppo_ema"]
    assert metrics["reward_ppo_ema"] == metrics["reward_ppo"] == plain[1]["reward_ppo"]
    assert metrics["kl_sequence_ppo_ema"] == metrics["kl_sequence"] == plain[1]["kl_sequence"]
    assert "PPO, EMA" in (tmp_path / "report.html").read_text()


def test_a_reward_model_with_a_tokenizer_of_its_own_reads_the_texts_in_its_own_tokens(root, tmp_path):
    """Its vocabulary is ours in another order and its weights are moved alike: so its scores must be the same."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    moved = root / "moved-reward-model"
    shutil.copytree(root / "reward" / "model", moved)
    words = ["<pad>", "<eos>", *tiny.WORDS]
    order = [*range(31, 15, -1), *range(16)]  # the new id of an old token is its place here
    vocabulary = {words[old]: new for new, old in enumerate(order)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(moved)
    weights = load_file(moved / "model.safetensors")
    (name,) = (name for name in weights if "embed" in name)
    weights[name] = weights[name][torch.tensor(order)].contiguous()
    save_file(weights, moved / "model.safetensors", {"format": "pt"})

    own = with_inputs(root, "own-tokenizer", reward=("model", moved.name), ppo=("actor", "ppo/actor"))
    shared = with_inputs(root, "same-tokenizer", reward=("model", "reward/model"), ppo=("actor", "ppo/actor"))
    found = evaluate(root, tmp_path / "own", refs=own, micro_batch=5, rollout_micro_batch=6)
    wanted = evaluate(root, tmp_path / "same", refs=shared, micro_batch=5, rollout_micro_batch=6)
    pairs = zip(samples(tmp_path / "own"), samples(tmp_path / "same"), strict=True)
    for row, other in pairs:
        for model, answer in row["answers"].items():
            if (
                answer["tokens"] == len(answer["text"].split()) + answer["eos"]
            ):  # a sampled pad token is not in the text
                assert answer["reward"] == pytest.approx(other["answers"][model]["reward"], abs=1e-5)
    assert found["length_ppo"] == wanted["length_ppo"]
