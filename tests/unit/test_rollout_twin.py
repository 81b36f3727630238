"""A model's twin for rollouts samples what the model samples, and the model is bit for bit what it was."""

import pytest
import torch
from test_rollout import tiny
from test_rollout_slots import PROMPTS
from torch import nn

from rlhf_core.lora import add_lora, layers
from rlhf_core.partitioned import release_freed
from rlhf_core.rollout import Sampling, generate
from rlhf_core.rollout.twin import can_merge, twin, twin_bytes
from rlhf_core.scoring import response_scores
from rlhf_core.specs import LoRASpec

OPTIONS = {"seed": 7, "eos": 39, "pad": 0, "batch_size": 4}


def adapted(family: str) -> nn.Module:
    """A model with adapters that matter, and biases and norms that were trained beside them."""
    model = tiny(family)
    add_lora(model, LoRASpec(rank=4, alpha=8, also_train=("biases", "norms")), "lora")
    for number, (_, layer) in enumerate(layers(model)):
        weight = layer.lora_B["default"].weight
        weight.data = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    return model.eval()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "gemma3", "bloom"])
def test_with_merged_adapters_the_twin_samples_what_the_model_samples_and_no_adapter_is_computed(family):
    model, passes = adapted(family), []
    before = bits(model)
    applied = generate(model, PROMPTS, range(9), Sampling(10), **OPTIONS)
    for _, layer in layers(model):
        layer.lora_A["default"].register_forward_hook(lambda *_: passes.append(1))
    merged = generate(twin(model, merge=True), PROMPTS, range(9), Sampling(10), **OPTIONS)
    assert not passes and same_bits(model, before)
    assert merged.responses() == applied.responses()
    assert torch.allclose(merged.logprobs, applied.logprobs, atol=1e-4)
    plain = generate(tiny(family), PROMPTS, range(9), Sampling(10), **OPTIONS)
    assert not torch.allclose(plain.logprobs[:, 0], applied.logprobs[:, 0], atol=1e-2), "adapters must matter"


def test_the_twin_shares_what_is_not_adapted_and_costs_the_adapted_weights_alone():
    model = adapted("llama")
    copied = twin(model, merge=True)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in copied.parameters()}
    own = [p for p in copied.parameters() if p.data_ptr() not in shared]
    assert copied.get_input_embeddings().weight.data_ptr() in shared
    assert sum(p.numel() * p.element_size() for p in own) == twin_bytes(model, merge=True)
    assert len(own) == len(layers(model)) and twin_bytes(model, merge=False) == 0


def test_tied_weights_stay_tied_and_hooks_that_are_not_deepspeeds_stay():
    model, seen = adapted("gpt2"), []
    model.get_output_embeddings().register_forward_hook(lambda *_: seen.append(1))
    copied = twin(model, merge=True)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    copied(input_ids=torch.tensor([[5, 6]]))
    assert seen == [1]


def test_a_rollout_that_is_given_up_leaves_the_model_as_it_was_and_usable():
    model = adapted("llama")
    before, classes = bits(model), [type(m) for m in model.modules()]

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(twin(model, merge=True), PROMPTS, range(9), Sampling(10), on_token=stop, **OPTIONS)
    release_freed()
    assert same_bits(model, before) and [type(m) for m in model.modules()] == classes
    loss = model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".lora_" in name)


def test_merged_in_bf16_log_probabilities_are_as_near_to_exact_ones_as_with_adapters_applied():
    exact, model = adapted("llama"), adapted("llama").bfloat16()

    def error(made) -> float:
        again = response_scores(exact, made.prompt_ids, made.prompt_mask, made.response_ids, made.response_mask)
        return float((again.logprobs - made.logprobs).abs().mean())

    applied, merged = (
        generate(m, PROMPTS, range(9), Sampling(10), **OPTIONS) for m in (model, twin(model, merge=True))
    )
    assert error(merged) < 1.5 * error(applied) + 1e-3


def test_without_adapters_there_is_nothing_to_merge():
    assert not can_merge(tiny("opt")) and can_merge(adapted("opt"))
