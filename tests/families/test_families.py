"""The table: every model family through every stage, with real tokenizers, and out again into plain transformers.

A family's "pretrained" model is tiny and random, and has what makes the family hard: more embedding rows than tokens, tied or
untied heads, learned, rotary or ALiBi positions, grouped key-value heads, tokenizers whose pad is EOS or that have none.
Stages run in this process on one rank, as the job runs them. Without the shared tokenizers, ones of the same habits are trained.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_core import chat
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.models import ValueModel, load_causal_lm, load_tokenizer
from rlhf_core.rollout import Sampling, generate
from rlhf_core.specs import ModelSpec
from rlhf_core.store import Store
from rlhf_core.train import stage_runner

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128}
BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
LLAMA = {**BASE, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 16}),
    "bloom": ("gpt2", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("neox", {**BASE, "intermediate_size": 64, "tie_word_embeddings": False}),
    "gptj": ("gpt2", {**GPT, "rotary_dim": 4}),
    "gpt_neo": (
        "gpt2",
        {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128, "window_size": 16,
            "attention_types": [[["global", "local"], 1]],
        },
    ),
    "gpt2": ("gpt2", GPT),
    "codegen": ("gpt2", {**GPT, "rotary_dim": 4}),
    "llama": ("stories", {**LLAMA, "tie_word_embeddings": False}),
    "qwen2": ("neox", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("neox", {**LLAMA, "tie_word_embeddings": True}),
    "mistral": ("stories", {**LLAMA, "sliding_window": 16}),
    "gemma3": (
        "opt",
        {
            **LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}  # fmt: skip
PLACES = {"opt": "opt-tokenizer", "gpt2": "gpt2-tokenizer", "neox": "neox-tokenizer", "stories": "stories260k"}
PAD = {"stories": "<unk>"}
SPECS: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 4, "max_steps": 2, "optim": {"lr": 1e-3}},
    "reward": {"batch_size": 4, "max_steps": 2, "optim": {"lr": 1e-3}},
    "ppo": {
        "steps": 2,
        "rollout_batch_size": 4,
        "ppo_epochs": 1,
        "max_response_tokens": 8,
        "actor_optim": {"lr": 1e-3},
    },
    "dpo": {"batch_size": 4, "max_steps": 2, "optim": {"lr": 1e-3}},
}
NEEDS = {"sft": ("data",), "reward": ("data", "sft"), "ppo": ("data", "sft", "reward"), "dpo": ("data", "sft")}
WORDS = "the small cat sat on a warm mat and looked at two red birds near our old house".split()


def texts() -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected, of unequal lengths."""
    rows = []
    for i in range(60):
        say = " ".join(WORDS[(i * 3 + k) % len(WORDS)] for k in range(2 + i % 9))
        good = " ".join(WORDS[(i * 5 + k) % len(WORDS)] for k in range(1 + i % 6))
        prompt = f"\n\nHuman: Say {say} {i} times?\n\nAssistant:"
        rows.append({"prompt": prompt, "chosen": f" {good}.", "rejected": f" {WORDS[i % 7]} no."})
    return rows


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Path]:
    """A folder for each tokenizer: the real one, or one of the same habits."""
    shared = Path(__file__).parents[3] / "shared" / "models"
    if shared.is_dir():
        return {name: shared / place for name, place in PLACES.items()}
    from rlhf_core.data.tokenizer import train
    from rlhf_core.specs import TokenizerSpec

    folders = {}
    for name in PLACES:
        tokenizer = train((row["prompt"] + row["chosen"] for row in texts()), TokenizerSpec(train_vocab_size=400))
        tokenizer.add_special_tokens({"unk_token": "<unk>"})
        if name in ("gpt2", "neox"):
            tokenizer.pad_token = tokenizer.eos_token  # as GPT-2's: pad is EOS
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def data(tokenizers, tmp_path_factory):
    """The data artifact of a tokenizer, made by the data stage once for each."""
    made: dict[str, tuple[Store, Path, ArtifactRef]] = {}

    def get(name: str) -> tuple[Store, Path, ArtifactRef]:
        if name not in made:
            root = tmp_path_factory.mktemp(f"data-{name}")
            rows = root / "rows.jsonl"
            rows.write_text("".join(json.dumps(row) + "\n" for row in texts()))
            spec = {
                "sources": [{"kind": "files", "paths": [str(rows)]}],
                "tokenizer": {"path": str(tokenizers[name]), "pad_token": PAD.get(name)},
                "shares": {"sft": 1, "reward": 1, "ppo": 1, "test": 0.2},
                "max_prompt_tokens": 90,
                "max_response_tokens": 30,
            }
            store = Store(f"file://{root}/store")
            stage_runner("data")(tiny.context(store, "data", spec, {}, root / "out"))
            made[name] = store, root, tiny.put(store, "data", root / "out", {})
        return made[name]

    return get


def pretrained(family: str, tokenizer: Any, folder: Path) -> None:
    """A random model in a folder, as it would come from the hub; its embedding has more rows than there are tokens."""
    kind = {"gemma3": "gemma3_text"}.get(family, family)
    rows = 64 * (len(tokenizer) // 64 + 1)
    sizes = FAMILIES[family][1]
    config = AutoConfig.for_model(
        kind, vocab_size=rows, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, **sizes
    )
    config.pad_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def trained(data, tokenizers, tmp_path_factory):
    """Stages of a family, each run once: (family, stage) -> output folder."""
    made: dict[tuple[str, str], tuple[Path, ArtifactRef]] = {}

    def get(family: str, stage: str) -> Path:
        return run(family, stage)[0]

    def run(family: str, stage: str) -> tuple[Path, ArtifactRef]:
        if (family, stage) not in made:
            name = FAMILIES[family][0]
            store, _, ref = data(name)
            folder = tmp_path_factory.mktemp(f"{family}-{stage}")
            base = folder.parent / f"{family}-base"
            if not base.exists():
                pretrained(family, AutoTokenizer.from_pretrained(tokenizers[name]), base)
            inputs = {need: ref if need == "data" else run(family, need)[1] for need in NEEDS[stage]}
            context = tiny.context(store, stage, SPECS[stage], inputs, folder, micro_batch=2)
            job = context.job.model_copy(update={"model": ModelSpec(path=str(base))})
            stage_runner(stage)(type(context)(job, store, folder))
            made[family, stage] = folder, tiny.put(store, stage, folder, inputs, mark=family)
        return made[family, stage]

    return get


FOLDERS = {"sft": "model", "dpo": "model", "ppo": "actor"}


@pytest.mark.parametrize("stage", ["sft", "ppo", "dpo"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_trains_saves_and_loads_in_plain_transformers(family, stage, trained):
    folder = trained(family, stage) / FOLDERS[stage]
    plain, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    settings = plain.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    ids = torch.tensor([tokenizer("Human: hello there")["input_ids"]])
    assert torch.equal(plain.eval()(input_ids=ids).logits, load_causal_lm(str(folder)).eval()(input_ids=ids).logits)
    base = load_causal_lm(str(folder.parents[1] / f"{family}-base"))
    assert plain.get_input_embeddings().weight.shape[0] >= base.get_input_embeddings().weight.shape[0], "rows stay"
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), base.parameters(), strict=True)), (
        "it has learned"
    )


@pytest.mark.parametrize(("stage", "inner"), [("reward", "model"), ("ppo", "critic")], ids=["reward", "critic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reward_model_and_critic_load_in_plain_transformers_where_the_family_has_the_class(
    family, stage, inner, trained
):
    folder = trained(family, stage) / inner
    ours, tokenizer = ValueModel.load(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[*tokenizer("Human: hello there")["input_ids"], tokenizer.eos_token_id]])
    score = ours(ids, torch.ones_like(ids))[0, -1].item()
    if family == "codegen":
        with pytest.raises(ValueError, match="CodeGen"):
            AutoModelForSequenceClassification.from_pretrained(folder)
        return
    plain, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert plain.eval()(input_ids=ids).logits.item() == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_logprobs_on_left_padded_prompts_equal_a_plain_forward_of_each_row_alone(family, trained):
    folder = trained(family, "sft") / "model"
    model, tokenizer = load_causal_lm(str(folder)).eval(), load_tokenizer(folder)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in texts()[:6]]
    assert len({len(p) for p in prompts}) > 3
    sampling = Sampling(24, vocabulary=len(tokenizer))
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rollout = generate(model, prompts, range(6), sampling, seed=1, eos=eos, pad=pad)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row, (prompt, answer) in enumerate(zip(prompts, rollout.responses(), strict=True)):
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
        expected = logits.float().log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        got = rollout.logprobs[row][rollout.response_mask[row].bool()]
        assert torch.allclose(got, expected, atol=1e-4), (family, row, (got - expected).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_can_talk_to_it(family, trained, capsys):
    folder = trained(family, "ppo") / "actor"
    assert chat.main(["--model", str(folder), "--prompt", "Say cat", "--max-new-tokens", "5", "--seed", "1"]) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_ratio_of_ppo_is_one_and_all_losses_are_numbers(family, trained):
    rows = [json.loads(line) for line in (trained(family, "ppo") / "metrics.jsonl").read_text().splitlines()]
    assert all(row["ratio_first"] < 1e-3 for row in rows)
