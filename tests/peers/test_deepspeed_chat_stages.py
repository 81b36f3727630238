"""Known faults of DeepSpeed-Chat in data, SFT, the reward model, LoRA and saving, each as a test of ours that fails if we have it.

The stages run in this process on tiny data; the data stage runs on the quickstart. `test_deepspeed_chat_faults.py` has the table
of all faults.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import small_ppo
import tiny
import torch
from plain import target_logprobs
from small_ppo import EOS, FAST

from rlhf_core.artifacts import ArtifactRef, make_ref
from rlhf_core.batches import open_rows
from rlhf_core.config import parse_config
from rlhf_core.context import JobContext
from rlhf_core.data.encode import Encoder
from rlhf_core.data.tokenizer import make_tokenizer
from rlhf_core.dpo import dpo_loss
from rlhf_core.engine import train_engine
from rlhf_core.errors import ConfigError
from rlhf_core.export import save_causal_lm
from rlhf_core.job import JobSpec
from rlhf_core.lora import add_lora, layers
from rlhf_core.models import ValueModel, load_causal_lm, load_tokenizer, new_causal_lm
from rlhf_core.plan import stage_refs, stage_spec
from rlhf_core.resources import Resources
from rlhf_core.reward import pair_loss
from rlhf_core.scoring import end_scores
from rlhf_core.specs import (
    DataSpec,
    LoRASpec,
    ModelSpec,
    OptimSpec,
    PPOSpec,
    QuickstartSource,
    StageName,
    TokenizerSpec,
)
from rlhf_core.store import Store
from rlhf_core.train import stage_runner

CONFIG = {
    "name": "faults",
    "seed": 7,
    "model": {"family": "llama", "positions": 160},
    "data": {
        "sources": [{"kind": "quickstart", "prompts": 240}],
        "tokenizer": {"train_vocab_size": 320},
        "max_prompt_tokens": 80,
        "max_response_tokens": 80,
    },
}


def run_stage(name: StageName, root: Path, out: Path, spec: dict, model: ModelSpec | None = None) -> dict[str, Any]:
    """Metrics of one stage on the tiny store; its files are in `out`."""
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((root / "refs.json").read_text()).items()}
    inputs = {k: refs[k] for k in ("data", "sft") if k != name}
    context = tiny.context(Store(f"file://{root}/store"), name, spec, inputs, out, micro_batch=4)
    if model:
        context = JobContext(context.job.model_copy(update={"model": model}), context.store, out)
    return stage_runner(name)(context)


def rows_of(root: Path, place: str) -> list[dict[str, Any]]:
    return open_rows(root / "data" / place).to_list()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the data stage makes of the quickstart."""
    out = tmp_path_factory.mktemp("data")
    config = parse_config(CONFIG)
    job = JobSpec(
        stage="data", store=f"file://{out}/store", output=make_ref("data", "faults", {}, {}), attempt=1, job_id="faults",
        spec=stage_spec(config, "data"), identity={}, model=config.model,
    )  # fmt: skip
    stage_runner("data")(JobContext(job, Store(job.store), out))
    return out


# Data


def test_one_eos_ends_the_answers_of_sft_reward_and_ppo(built):
    tokenizer = load_tokenizer(built / "tokenizer")
    eos = tokenizer.eos_token_id
    assert eos != tokenizer.pad_token_id
    columns = {"sft": ("input_ids",), "reward": ("chosen_ids", "rejected_ids"), "ppo": ("response_ids",)}
    answers: list[list[int]] = []
    for share, names in columns.items():
        rows = open_rows(built / share / "train")
        answers += [ids for name in names for ids in rows[name] if ids]
    assert len(answers) > 200 and all(ids[-1] == eos and ids.count(eos) == 1 for ids in answers)
    assert all(mask[-1] == 1 for mask in open_rows(built / "sft" / "train")["loss_mask"]), "and SFT learns it"


def test_the_literal_end_of_text_that_opt_has_no_token_for_ends_no_answer(shared):
    spec = DataSpec(
        sources=(QuickstartSource(),), tokenizer=TokenizerSpec(path=str(shared / "models" / "opt-tokenizer"))
    )
    tokenizer = make_tokenizer(spec, None)
    literal = tokenizer("<|endoftext|>", add_special_tokens=False)["input_ids"]
    assert len(literal) > 1, "what DeepSpeed-Chat puts at the end is several tokens"
    (ids,) = Encoder(tokenizer, chat=False).responses([" It is blue."])
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert ids[-len(literal) :] != literal and tokenizer.pad_token_id not in ids


def test_every_stage_has_the_pipelines_seed_and_no_prompt_is_in_two_stages(built):
    config = parse_config(CONFIG)
    stages: tuple[StageName, ...] = ("data", "sft", "reward", "ppo", "evaluate")
    assert {stage_spec(config, stage)["seed"] for stage in stages} == {7}
    places = [f"{share}/{split}" for share in ("sft", "reward", "ppo") for split in ("train", "test")]
    prompts = [set(open_rows(built / place)["prompt"]) for place in places]
    assert all(prompts) and sum(map(len, prompts)) == len(set.union(*prompts))


def test_data_of_other_content_or_with_another_eos_is_another_artifact(tmp_path):
    file = tmp_path / "rows.jsonl"
    source = {"kind": "files", "paths": [str(file)]}

    def data(text: str, **tokenizer: str) -> str:
        file.write_text(text)
        config = {**CONFIG["data"], "sources": [source], "tokenizer": {"train_vocab_size": 320, **tokenizer}}
        return stage_refs(parse_config({**CONFIG, "data": config}))["data"].id

    one = data('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    assert data('{"prompt": "a", "chosen": "b", "rejected": "c"}') == one
    assert data('{"prompt": "a", "chosen": "b", "rejected": "d"}') != one
    assert data('{"prompt": "a", "chosen": "b", "rejected": "c"}', eos_token="<pad>") != one


def test_data_on_disk_is_not_padded_and_is_read_through_a_memory_map(built):
    pad = load_tokenizer(built / "tokenizer").pad_token_id
    rows = open_rows(built / "reward" / "train")
    assert rows.cache_files, "rows are mapped from these files"
    ids = [row["prompt_ids"] + row["chosen_ids"] + row["rejected_ids"] for row in rows.to_list()]
    assert len({len(row) for row in ids}) > 10 and not any(pad in row for row in ids)
    size = sum(file.stat().st_size for file in (built / "reward" / "train").glob("*.arrow"))
    assert size < 2000 * len(rows), "with its texts; a padded pair of DeepSpeed-Chat takes 16 KB"


# SFT


def test_sft_loss_is_on_the_response_and_its_eos_alone(tiny_root, tmp_path):
    run_stage("sft", tiny_root, tmp_path, {"batch_size": 8, "max_steps": 1})
    model = new_causal_lm(tiny.MODEL, tiny.tokenizer(), seed=0).eval()
    nats, tokens = 0.0, 0
    for row in rows_of(tiny_root, "sft/test"):
        ids, first = torch.tensor([row["input_ids"]]), row["loss_mask"].index(1)
        assert row["input_ids"][-1] == EOS
        with torch.no_grad():
            logprobs = target_logprobs(model(input_ids=ids).logits[:, :-1], ids[:, 1:])[0]
        nats, tokens = nats - float(logprobs[first - 1 :].sum()), tokens + ids.shape[1] - first
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    before = next(row for row in rows if row["kind"] == "eval" and row["step"] == 0)
    assert before["loss"] == pytest.approx(nats / tokens, rel=1e-4)


@pytest.mark.parametrize("family", ["bloom", "gpt2", "gptj", "gpt_neo", "gpt_neox", "opt", "llama"])
def test_every_family_goes_through_sft_and_ppo(family, tiny_root, tmp_path):
    model = ModelSpec(family=family, hidden_size=32, layers=2, heads=4, positions=64)
    metrics = run_stage("sft", tiny_root, tmp_path, {"batch_size": 8, "max_steps": 2, "optim": {"lr": 1e-3}}, model)
    assert metrics["eval_loss"] < 4
    folders = small_ppo.save(tmp_path / "ppo", load_causal_lm(str(tmp_path / "model")))
    trainer = small_ppo.ppo(folders, PPOSpec(max_response_tokens=8, ppo_epochs=1))
    out = trainer.generate_experience(small_ppo.prompts(4))
    assert all(torch.isfinite(torch.tensor(trainer.train_rlhf(out)))) and trainer.metrics["ratio_first"] < 1e-4


# Reward model


def test_the_reward_loss_reads_the_last_token_and_no_padding():
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]])

    def values(_: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
        table = torch.full((2, 5), torch.nan)  # whatever is read but the last tokens shows
        table[0, 3], table[1, 1] = 2.0, -1.0
        return table

    chosen, rejected = end_scores(values, torch.zeros_like(mask), mask)
    assert pair_loss(chosen, rejected, 0.0).item() == pytest.approx(torch.tensor(-3.0).exp().log1p().item())


@pytest.mark.parametrize("margin", [1e4, -1e4, 0.0])
def test_losses_of_pairs_stay_finite_at_any_margin(margin):
    chosen = torch.tensor([margin], requires_grad=True)
    for loss in (
        pair_loss(chosen, torch.zeros(1), 0.0),
        dpo_loss(chosen, torch.zeros(1), 1.0, "sigmoid"),
        dpo_loss(chosen, torch.zeros(1), 1.0, "sigmoid", 0.1),
    ):
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_reward_accuracy_is_the_count_over_all_held_out_pairs(tiny_root, tmp_path):
    from transformers import AutoModelForSequenceClassification

    metrics = run_stage("reward", tiny_root, tmp_path, {"batch_size": 8, "max_steps": 3, "optim": {"lr": 1e-3}})
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    pairs = rows_of(tiny_root, "reward/test")
    with torch.no_grad():
        scores = [
            [
                model(input_ids=torch.tensor([row["prompt_ids"] + row[name]])).logits.item()
                for name in ("chosen_ids", "rejected_ids")
            ]
            for row in pairs
        ]
    right = sum(chosen > rejected for chosen, rejected in scores)
    assert metrics["eval_accuracy"] == pytest.approx(right / len(pairs)) and 0 < right < len(pairs)


def test_a_bloom_reward_model_takes_pairs_that_differ_from_the_first_token(tiny_root, tmp_path):
    pairs = rows_of(tiny_root, "reward/train")
    assert any(row["chosen_ids"][0] != row["rejected_ids"][0] for row in pairs)
    bloom = {"family": "bloom", "hidden_size": 32, "layers": 2, "heads": 4}
    metrics = run_stage("reward", tiny_root, tmp_path, {"batch_size": 8, "max_steps": 2, "model": bloom})
    assert 0 < metrics["loss_last"] < 5 and metrics["score_std"] > 0


def test_a_reward_model_without_its_head_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folders = small_ppo.save(tmp_path, small_ppo.language_model())
    (file,) = Path(folders.reward).glob("*.safetensors")
    state = load_file(file)
    for changed in (
        {k: v for k, v in state.items() if k != "score.weight"},
        {("rwtransformer." + k if k != "score.weight" else k): v for k, v in state.items()},
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(ConfigError):
            ValueModel.load(folders.reward)


# LoRA and saving


def test_a_critic_with_adapters_trains_its_head_and_the_reward_model_stays(plain):
    spec = PPOSpec(max_response_tokens=8, critic_lora=LoRASpec(rank=2), actor_optim=FAST, critic_optim=FAST)
    trainer = small_ppo.ppo(plain, spec)
    asked, answers = small_ppo.prompts(4)["prompt"], [[5, 6, EOS], [7, EOS], [8], [9, EOS]]
    before = small_ppo.rollout_of(trainer, asked, answers)
    critic = {name: p.detach().clone() for name, p in trainer.engine.critic.module.named_parameters()}
    trainer.train_rlhf(trainer.generate_experience(small_ppo.prompts(8)))
    moved = {name for name, p in trainer.engine.critic.module.named_parameters() if not torch.equal(p, critic[name])}
    assert "score.weight" in moved and all(".lora_" in name for name in moved - {"score.weight"}) and len(moved) > 2
    after = small_ppo.rollout_of(trainer, asked, answers)
    assert torch.equal(before.scores, after.scores) and not torch.allclose(before.values, after.values)


def test_saving_with_adapters_leaves_the_model_in_training_as_it_was(plain, tmp_path):
    spec = PPOSpec(max_response_tokens=8, actor_lora=LoRASpec(rank=2), actor_optim=FAST)
    trainer = small_ppo.ppo(plain, spec)
    trainer.train_rlhf(trainer.generate_experience(small_ppo.prompts(8)))
    before = small_ppo.weights(trainer.engine.actor)
    for name in ("one", "two"):
        save_causal_lm(trainer.engine.actor, plain.tokenizer, tmp_path / name)
    assert torch.equal(before, small_ppo.weights(trainer.engine.actor)), "not a bit of drift"
    merged, ids = load_causal_lm(str(tmp_path / "two"), dropout=0.0).eval(), torch.tensor([[5, 6, 7, 8]])
    adapted = trainer.engine.actor.module.eval()
    assert torch.allclose(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-4)
    assert not torch.allclose(
        merged(input_ids=ids).logits, load_causal_lm(plain.actor)(input_ids=ids).logits, atol=1e-2
    )


def test_adapters_get_gradients_under_gradient_checkpointing():
    model: Any = small_ppo.language_model("llama")
    add_lora(model, LoRASpec(rank=2), "sft.lora")
    engine = train_engine(model, OptimSpec(lr=0.01), Resources(gradient_checkpointing=True), "fp32", LoRASpec(rank=2))
    engine.train()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    logits = engine(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits
    engine.backward(logits.square().mean())
    engine.step()
    moved = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert len(layers(model)) > 4 and sum("lora_B" in name for name in moved) == len(layers(model))


def test_a_saved_model_brings_its_tokenizer_without_a_hub(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = small_ppo.language_model("llama", tokenizer=tokenizer)
    trainer = small_ppo.ppo(small_ppo.save(tmp_path / "first", model, tokenizer))
    trainer.engine.save(tmp_path / "actor", tmp_path / "critic")
    for name in ("actor", "critic"):
        loaded = AutoTokenizer.from_pretrained(tmp_path / name, local_files_only=True)
        assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.chat_template == tokenizer.chat_template
        assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
        assert loaded("w1 <|turn|> w2")["input_ids"] == tokenizer("w1 <|turn|> w2")["input_ids"]
    generation = json.loads((tmp_path / "actor" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
