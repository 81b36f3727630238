"""ZeRO-3 never holds a whole model, offload and ZeRO change no loss, and what is exported is what was trained."""

from pathlib import Path
from typing import get_args

import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file

from rlhf_core.export import save_causal_lm, save_value_model
from rlhf_core.models import ValueModel, new_causal_lm
from rlhf_core.specs import Family, ModelSpec

FAMILIES = get_args(Family)


def run(world: int, function: str, out: Path, **arguments):
    return ranks.run(world, function, out, script="memory_scenarios.py", **arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a saved model, whatever its files."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A saved tiny llama."""
    folder = tmp_path_factory.mktemp("small")
    save_causal_lm(new_causal_lm(tiny.MODEL, tiny.tokenizer(), seed=0), tiny.tokenizer(), folder)
    return folder


@pytest.mark.slow
def test_at_zero_3_no_rank_holds_the_whole_model_when_it_is_loaded_or_exported(small, tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=8_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=12,
        num_key_value_heads=12, tie_word_embeddings=True, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    whole = sum(p.numel() for p in model.parameters()) * 4
    assert whole > 400e6
    save_causal_lm(model.bfloat16(), tiny.tokenizer(), tmp_path / "model")
    written = weights(tmp_path / "model")
    del model  # stored in bf16, so that reading it in fp32 takes memory of its own and is no view of the file
    # What is freed goes back at once: else the allocator keeps what it likes, up to all that a step of training took.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
    options = {"folder": str(tmp_path / "model"), "small": str(small), "shard_bytes": 50_000_000, "variables": exact}
    parts = run(2, "large", tmp_path / "p", target=str(tmp_path / "parts"), parts=True, **options)
    plain = run(2, "large", tmp_path / "w", target=str(tmp_path / "whole"), parts=False, **options)
    for rank in range(2):
        # Half the model and one weight, 0.65 here; and one shard or less, 0.14.
        assert parts[rank]["load"] < 0.8 * whole < 0.95 * whole < plain[rank]["load"]
        assert parts[rank]["export"] < 0.4 * whole
        assert parts[rank]["losses"] == pytest.approx(plain[rank]["losses"], rel=1e-4)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 8
    found, wanted = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys() == written.keys()
    assert all(torch.allclose(found[k], wanted[k], atol=3e-3) for k in wanted)
    assert not torch.equal(found["model.norm.weight"], written["model.norm.weight"].float())


def test_offload_and_zero_change_no_loss(small, tmp_path):
    cases = [
        {"zero_stage": 0},
        {"zero_stage": 1, "offload_optimizer": "cpu"},
        {"zero_stage": 2, "offload_optimizer": "cpu"},
        {"zero_stage": 3},
        {"zero_stage": 3, "offload_optimizer": "cpu"},
        {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
        {"zero_stage": 3, "gradient_checkpointing": True},
    ]
    plain, *others = run(2, "losses", tmp_path, folder=str(small), cases=cases)
    assert plain[-1] < plain[0] * 0.98
    for case, other in zip(cases[1:], others, strict=True):
        assert other == pytest.approx(plain, rel=1e-4), case


def test_in_bf16_losses_are_those_of_fp32_but_for_rounding_at_every_zero_stage(small, tmp_path):
    cases = [{"zero_stage": 0}, *({"zero_stage": stage, "precision": "bf16"} for stage in range(4))]
    plain, *others = run(2, "losses", tmp_path, folder=str(small), cases=cases)
    for case, other in zip(cases[1:], others, strict=True):
        assert other == pytest.approx(plain, rel=2e-3), case


def test_a_gradient_that_is_not_finite_stops_training_at_every_zero_stage(small, tmp_path):
    cases = [{"zero_stage": stage, "precision": p} for stage in range(4) for p in ("fp32", "bf16")]
    cases += [{"zero_stage": 2, "offload_optimizer": "cpu"}, {"zero_stage": 3, "offload_optimizer": "cpu"}]
    assert run(2, "poisoned", tmp_path, folder=str(small), cases=cases) == ["refused"] * len(cases)


def test_in_fp16_an_overflow_skips_the_update_is_counted_and_training_goes_on(small, tmp_path):
    plain = run(1, "losses", tmp_path / "plain", folder=str(small), cases=[{}])[0]
    for found in run(2, "overflow", tmp_path / "fp16", folder=str(small), stages=[0, 2, 3]):
        assert found["before"] == pytest.approx(plain, rel=2e-3)
        assert found["skipped"] == 2 and found["norm"] == 0
        assert found["after"][1] < found["after"][0] < plain[-1]
    assert "update skipped (2 so far)" in (tmp_path / "fp16" / "rank-0.log").read_text()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_family_is_read_and_written_in_parts_as_it_was(precision, tmp_path):
    from transformers import AutoModelForCausalLM

    for family in FAMILIES:
        spec = ModelSpec(family=family, hidden_size=32, layers=2, heads=4, positions=64)
        model = new_causal_lm(spec, tiny.tokenizer(), seed=1)
        save_causal_lm(model, tiny.tokenizer(), tmp_path / "m" / family / "whole", shard_bytes=30_000)
        save_value_model(ValueModel.from_causal_lm(model, 2), tiny.tokenizer(), tmp_path / "m" / family / "value")
    run(2, "export", tmp_path / "run", root=str(tmp_path / "m"), precision=precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for folder in (tmp_path / "m").iterdir():
        for before, after in (("whole", "parts"), ("value", "value-parts")):
            wanted, found = weights(folder / before), weights(folder / after)
            assert wanted.keys() == found.keys(), folder.name
            assert all(torch.equal(found[k], wanted[k].to(dtype)) for k in wanted), folder.name
        back, info = AutoModelForCausalLM.from_pretrained(folder / "parts", output_loading_info=True)
        assert not any(info.values()), info
        assert back.config.dtype == back.dtype == dtype


def test_a_vocabulary_is_enlarged_in_parts_as_it_is_whole(tmp_path):
    from transformers import AutoModelForCausalLM, GPTJConfig

    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=20, n_embd=32, n_layer=1, n_head=4, n_positions=32, rotary_dim=4)
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.lm_head.bias)
    save_causal_lm(model, tiny.tokenizer(), tmp_path / "model")
    run(2, "grown", tmp_path / "run", folder=str(tmp_path / "model"), target=str(tmp_path / "out"))
    for name in ("", "value-"):
        whole, parts = (weights(tmp_path / "out" / f"{name}{kind}") for kind in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    found = weights(tmp_path / "out" / "parts")
    assert found["transformer.wte.weight"].shape[0] == found["lm_head.bias"].shape[0] == len(tiny.tokenizer()) == 32
    assert torch.equal(found["lm_head.bias"][:20], model.lm_head.bias)
    assert torch.allclose(found["lm_head.bias"][20:], model.lm_head.bias.mean())


def test_adapters_train_and_export_at_zero_3_as_at_zero_0(small, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    first = run(1, "adapters", tmp_path / "0", folder=str(small), target=str(tmp_path / "zero-0"), zero_stage=0)
    second = run(2, "adapters", tmp_path / "3", folder=str(small), target=str(tmp_path / "zero-3"), zero_stage=3)
    assert second == pytest.approx(first, rel=1e-4) and first[-1] < first[0]
    wanted, found = weights(tmp_path / "zero-0" / "merged"), weights(tmp_path / "zero-3" / "merged")
    assert wanted.keys() == found.keys() and all(torch.allclose(found[k], wanted[k], atol=1e-4) for k in wanted)
    ids = torch.arange(2, 20)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "zero-3" / "merged")(ids).logits
    base = AutoModelForCausalLM.from_pretrained(small)
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "zero-3" / "adapter"))(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-5) and not torch.allclose(before, adapted, atol=1e-3)
