"""Loading is strict and saving is for plain transformers; freezing leaves what it should."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import tiny
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from safetensors.torch import load_file, save_file

from rlhf_core import lora
from rlhf_core.batches import deal, longest, open_rows, step_rows, total_steps
from rlhf_core.engine import engine_config, lr_factor, parameter_groups, set_lr, zero_init
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.export import plan_shards, save_adapter, save_causal_lm, save_value_model
from rlhf_core.models import ValueModel, base_model, load_causal_lm, new_causal_lm
from rlhf_core.resources import Resources
from rlhf_core.reward import freeze_below, pair_loss
from rlhf_core.specs import Family, LoRASpec, ModelSpec, OptimSpec


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a saved model, whatever its files."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture
def model():
    return new_causal_lm(tiny.MODEL, tiny.tokenizer(), seed=0)


def test_a_saved_model_comes_back_with_its_tokenizer_and_eos(model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_causal_lm(model, tiny.tokenizer(), tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    assert back.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 1


@pytest.mark.parametrize("kind", ["language model", "reward model"])
@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_a_missing_or_unexpected_weight_is_named(kind, fault, model, tmp_path):
    if kind == "language model":
        save_causal_lm(model, tiny.tokenizer(), tmp_path)
    else:
        value = ValueModel.from_causal_lm(model, 0)
        save_value_model(value, tiny.tokenizer(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(k for k in state if "q_proj" in k)
    state[name + "x"] = state.pop(name) if fault == "missing" else state[name].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="q_proj"):
        load_causal_lm(str(tmp_path)) if kind == "language model" else ValueModel.load(tmp_path)


def test_sampling_is_the_default_of_a_saved_model_and_its_chat_template_is_kept(model, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_causal_lm(model, tokenizer, tmp_path)
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.do_sample and (generation.eos_token_id, generation.pad_token_id) == (1, 0)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    assert not model.generation_config.do_sample  # the model in training is left as it is


@pytest.mark.parametrize("family", get_args(Family))
def test_every_family_is_written_in_shards_that_plain_transformers_loads(family, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    spec = ModelSpec(family=family, hidden_size=32, layers=2, heads=4, positions=64)
    model = new_causal_lm(spec, tiny.tokenizer(), seed=0).eval()
    save_causal_lm(model, tiny.tokenizer(), tmp_path / "ours", shard_bytes=20_000)
    model.save_pretrained(tmp_path / "theirs")
    ours = weights_of(tmp_path / "ours")
    assert ours.keys() == weights_of(tmp_path / "theirs").keys()
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "ours").glob("*.safetensors")}
    assert len(files) > 2 and files == set(index["weight_map"].values())
    assert all(f"-of-{len(files):05d}." in name for name in files)
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in ours.values())
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    ids = torch.arange(2, 14)[None]
    assert torch.equal(back(ids).logits, model(ids).logits)
    assert torch.equal(load_causal_lm(str(tmp_path / "ours")).eval()(ids).logits, model(ids).logits)

    value = ValueModel.from_causal_lm(model, seed=1).eval()
    value.config.score_mean = 0.5
    save_value_model(value, tiny.tokenizer(), tmp_path / "value", shard_bytes=20_000)
    again = ValueModel.load(tmp_path / "value").eval()
    expected = value(ids, torch.ones_like(ids))
    assert torch.equal(again(ids, torch.ones_like(ids)), expected) and again.config.score_mean == 0.5
    if family != "codegen":  # has no such class
        plain, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "value", output_loading_info=True)
        assert not any(info.values())
        assert torch.allclose(plain.eval()(ids).logits[:, 0], expected[:, -1], atol=1e-5)


def test_weights_of_an_earlier_attempt_are_replaced_not_mixed(model, tmp_path):
    save_causal_lm(model, tiny.tokenizer(), tmp_path, shard_bytes=20_000)
    save_causal_lm(model, tiny.tokenizer(), tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    save_causal_lm(model, tiny.tokenizer(), tmp_path, shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists() and load_causal_lm(str(tmp_path))


def test_a_shard_is_never_larger_than_asked_unless_it_is_one_weight():
    assert plan_shards([3, 3, 3, 9, 1, 1], 6) == [0, 0, 1, 2, 3, 3]
    assert plan_shards([9], 6) == [0] and plan_shards([1, 9, 1], 6) == [0, 1, 2]


def test_rows_of_the_vocabulary_that_no_token_has_are_kept(tmp_path):
    wide = new_causal_lm(tiny.MODEL, tiny.tokenizer(), seed=0)
    wide.resize_token_embeddings(50)
    save_causal_lm(wide, tiny.tokenizer(), tmp_path / "a")
    back = base_model(ModelSpec(path=str(tmp_path / "a")), tiny.tokenizer(), seed=0)
    assert back.get_input_embeddings().weight.shape[0] == back.config.vocab_size == 50
    save_causal_lm(back, tiny.tokenizer(), tmp_path / "b")
    assert weights_of(tmp_path / "b")["model.embed_tokens.weight"].shape[0] == 50


def test_a_vocabulary_smaller_than_the_tokenizer_gets_rows_of_the_mean(model, tmp_path):
    model.resize_token_embeddings(20)
    save_causal_lm(model, tiny.tokenizer(), tmp_path)
    back = base_model(ModelSpec(path=str(tmp_path)), tiny.tokenizer(), seed=0)
    rows = back.get_input_embeddings().weight
    assert rows.shape[0] == len(tiny.tokenizer()) == 32 and back.get_output_embeddings().weight is rows
    assert torch.equal(rows[:20], model.get_input_embeddings().weight)
    assert torch.allclose(rows[20:], rows[:20].mean(0).expand(12, -1))


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_a_quantised_folder_is_refused_with_its_method_and_the_remedy(method, model, tmp_path):
    value = ValueModel.from_causal_lm(model, 0)
    save_causal_lm(model, tiny.tokenizer(), tmp_path / "lm")
    save_value_model(value, tiny.tokenizer(), tmp_path / "value")
    for folder, load in ((tmp_path / "lm", load_causal_lm), (tmp_path / "value", ValueModel.load)):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        with pytest.raises(ConfigError, match=rf"quantised \({method}\).*dequantise"):
            load(str(folder))


class Touch:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_pickled_weights_are_read_and_pickled_code_is_not_run(model, tmp_path):
    save_causal_lm(model, tiny.tokenizer(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert torch.equal(load_causal_lm(str(tmp_path)).model.norm.weight, model.model.norm.weight)
    torch.save({**state, "bad": Touch(str(tmp_path / "touched"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_causal_lm(str(tmp_path))
    assert not (tmp_path / "touched").exists()


def test_what_this_machine_cannot_do_is_said_before_anything_is_loaded(tmp_path, model):
    save_causal_lm(model, tiny.tokenizer(), tmp_path)
    with pytest.raises(ConfigError, match=r"lora.quantize: 'nf4' needs a GPU"):
        load_causal_lm(str(tmp_path), quantize="nf4")
    with pytest.raises(ConfigError, match=r"precision 'fp16': cpu .* use bf16 or fp32"):
        engine_config(Resources(), "fp16", 1.0)
    nvme = Resources(zero_stage=3, offload_optimizer="nvme", nvme_path=str(tmp_path))
    if not AsyncIOBuilder().is_compatible(verbose=False):
        with pytest.raises(ConfigError, match=r"offload to nvme: .* libaio"):
            engine_config(nvme, "fp32", 1.0)


def test_resources_become_deepspeeds_configuration():
    both = Resources(zero_stage=3, offload_optimizer="cpu", offload_parameters="cpu")
    trained, frozen = (engine_config(both, "bf16", norm)["zero_optimization"] for norm in (1.0, None))
    assert trained["offload_optimizer"]["device"] == trained["offload_param"]["device"] == "cpu"
    assert "offload_optimizer" not in frozen and frozen["offload_param"]["device"] == "cpu"
    two = Resources(zero_stage=2, offload_optimizer="cpu")
    assert engine_config(two, "fp32", None)["zero_optimization"]["stage"] == 0  # a frozen model has nothing to divide
    assert zero_init(two, "fp32") is None and zero_init(both, "bf16")["bf16"]["enabled"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("kind", ["language model", "reward model"])
@pytest.mark.parametrize("also", [(), ("norms",), ("biases",), ("embeddings",)], ids=lambda also: "-".join(also) or "-")
def test_adapters_are_exported_merged_and_for_peft(family, kind, also, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    spec = ModelSpec(family=family, hidden_size=32, layers=2, heads=4, positions=64)
    model = new_causal_lm(spec, tiny.tokenizer(), seed=0)
    scalar = kind == "reward model"
    adapted = (ValueModel.from_causal_lm(model, 0) if scalar else model).eval()
    save = save_value_model if scalar else save_causal_lm
    save(adapted, tiny.tokenizer(), tmp_path / "base")
    ids, mask = torch.arange(2, 14)[None], torch.ones(1, 12, dtype=torch.long)
    adapters = LoRASpec(rank=4, alpha=8, also_train=also)
    torch.manual_seed(0)
    lora.add_lora(adapted, adapters, "x.lora")
    for p in adapted.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)  # as if trained, all parts of it
    wanted = adapted(ids, mask)[:, -1] if scalar else adapted(ids).logits
    state = {k: v.clone() for k, v in adapted.state_dict().items()}
    save(adapted, tiny.tokenizer(), tmp_path / "merged")
    save_adapter(adapted, tmp_path / "adapter", adapters, str(tmp_path / "base"))
    assert all(torch.equal(v, adapted.state_dict()[k]) for k, v in state.items())  # the model in training is untouched
    assert weights_of(tmp_path / "merged").keys() == weights_of(tmp_path / "base").keys()
    auto = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    merged, plain = (auto.from_pretrained(tmp_path / name).eval() for name in ("merged", "base"))
    before = plain(ids).logits.squeeze(-1)
    with_peft = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    for logits in (merged(ids).logits, with_peft(ids).logits):
        assert torch.allclose(logits.squeeze(-1) if scalar else logits, wanted, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-2)


def test_adapters_have_their_own_learning_rate_and_only_matrices_decay(model):
    lora.add_lora(model, LoRASpec(rank=2, lr=1e-2, also_train=("norms", "embeddings")), "x.lora")
    optim = OptimSpec(lr=1e-3, weight_decay=0.1, schedule="linear")
    groups = parameter_groups(model, optim, LoRASpec(rank=2, lr=1e-2))
    names = {id(p): n for n, p in model.named_parameters()}
    kinds = {(g["lr"], g["weight_decay"]): {".lora_" in names[id(p)] for p in g["params"]} for g in groups}
    assert kinds == {(1e-3, 0.0): {False}, (1e-2, 0.1): {True}}
    engine = SimpleNamespace(optimizer=torch.optim.AdamW(groups))
    assert set_lr(engine, 1, optim, 2) == pytest.approx(5e-4)
    assert sorted(g["lr"] for g in engine.optimizer.param_groups) == pytest.approx([5e-4, 5e-3])


def test_a_critic_may_start_with_a_head_of_zeros(model):
    ids = torch.arange(2, 14)[None]
    assert not ValueModel.from_causal_lm(model, 0, zero_head=True)(ids, torch.ones_like(ids)).any()
    assert ValueModel.from_causal_lm(model, 0)(ids, torch.ones_like(ids)).any()


def test_dropout_does_not_change_the_weights_of_a_new_model():
    plain, dropped = (base_model(tiny.MODEL, tiny.tokenizer(), seed=1, dropout=p) for p in (None, 0.3))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), dropped.parameters(), strict=True))
    assert dropped.config.attention_dropout == 0.3


def test_the_seed_alone_decides_a_new_model():
    spec = ModelSpec(family="gpt2", hidden_size=32, layers=1, heads=2, positions=16)
    torch.manual_seed(9)
    one = new_causal_lm(spec, tiny.tokenizer(), seed=1).state_dict()
    torch.manual_seed(8)
    two, other = (new_causal_lm(spec, tiny.tokenizer(), seed=s).state_dict() for s in (1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one) and not torch.equal(
        one["transformer.wte.weight"], other["transformer.wte.weight"]
    )


def test_freezing_leaves_the_last_blocks_the_final_norm_and_the_head(model):
    value = ValueModel.from_causal_lm(model, 0)
    freeze_below(value, 1)
    trained = {name for name, p in value.named_parameters() if p.requires_grad}
    assert all("layers.1." in n or n in ("trunk.norm.weight", "score.weight") for n in trained)
    assert any("layers.1." in n for n in trained) and {"trunk.norm.weight", "score.weight"} <= trained


def test_pair_loss_has_its_value_and_the_centring_term():
    chosen, rejected = torch.tensor([2.0]), torch.tensor([1.0])
    assert pair_loss(chosen, rejected, 0.0).item() == pytest.approx(0.313262, abs=1e-6)
    assert pair_loss(chosen, rejected, 0.1).item() == pytest.approx(0.313262 + 0.9, abs=1e-6)


def test_learning_rate_schedules():
    linear = OptimSpec(schedule="linear", warmup_steps=2)
    assert [lr_factor(s, linear, 6) for s in range(7)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    cosine = OptimSpec(schedule="cosine", min_lr_ratio=0.1)
    assert [lr_factor(s, cosine, 4) for s in (0, 2, 4)] == pytest.approx([1.0, 0.55, 0.1])
    assert lr_factor(99, OptimSpec(schedule="constant"), 4) == 1.0


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own():
    seen = [int(i) for step in range(5) for i in step_rows(10, 4, step, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert total_steps(10, 4, 2, None, "sft") == 5 and total_steps(10, 4, 2, 3, "sft") == 3
    with pytest.raises(DataError, match=r"sft.batch_size 11 .* has 10"):
        total_steps(10, 11, 1, None, "sft")


def test_the_longest_row_is_found_in_a_saved_split(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"ids": [1]}, {"ids": [1, 2, 3]}, {"ids": []}]).save_to_disk(str(tmp_path / "split"))
    assert longest(open_rows(tmp_path / "split"), "ids") == 3


def test_rows_are_dealt_evenly_and_each_to_one_rank():
    lengths = [5, 1, 9, 7, 3, 2, 8, 4]
    parts = [deal(lengths, rank, 2, 3) for rank in range(2)]
    assert sorted(i for rank in parts for part in rank for i in part) == list(range(8))
    assert [[len(p) for p in rank] for rank in parts] == [[3, 1], [3, 1]]
