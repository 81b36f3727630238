"""Loading is strict and saving is for plain transformers; freezing leaves what it should."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from rlhf_core.batches import deal, longest, open_rows, step_rows, total_steps
from rlhf_core.engine import lr_factor
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.models import ValueModel, load_causal_lm, new_causal_lm, save_causal_lm, save_value_model
from rlhf_core.reward import freeze_below, pair_loss
from rlhf_core.specs import ModelSpec, OptimSpec


@pytest.fixture
def model():
    return new_causal_lm(tiny.MODEL, tiny.tokenizer(), seed=0)


def test_a_saved_model_comes_back_with_its_tokenizer_and_eos(model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_causal_lm(model, model.state_dict(), tiny.tokenizer(), tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    assert back.generation_config.eos_token_id == AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 1


@pytest.mark.parametrize("kind", ["language model", "reward model"])
@pytest.mark.parametrize("fault", ["missing", "unexpected"])
def test_a_missing_or_unexpected_weight_is_named(kind, fault, model, tmp_path):
    if kind == "language model":
        save_causal_lm(model, model.state_dict(), tiny.tokenizer(), tmp_path)
    else:
        value = ValueModel.from_causal_lm(model, 0)
        save_value_model(value, value.state_dict(), tiny.tokenizer(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = next(k for k in state if "q_proj" in k)
    state[name + "x"] = state.pop(name) if fault == "missing" else state[name].clone()
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="q_proj"):
        load_causal_lm(str(tmp_path)) if kind == "language model" else ValueModel.load(tmp_path)


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
