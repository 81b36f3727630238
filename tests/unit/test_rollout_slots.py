"""Continuous batching samples what the plain loop samples: every family, few slots, shared prompts, windows, filters."""

import numpy as np
import pytest
import torch
from test_rollout import FAMILIES, tiny
from transformers import AutoModelForCausalLM, GPTNeoConfig

from rlhf_core import cpu_kernels
from rlhf_core.rollout import Sampling, cache, cpu, generate
from rlhf_core.rollout.slots import Waiting, group_of, queue_of
from rlhf_core.scoring import response_scores

PROMPTS = [[5, 6, 7], [9], [8, 7, 6, 5, 4, 3, 10], [11, 12], [5, 6, 7], [30, 2, 30], [9], [13] * 12, [5, 6, 7]]


def both(model, prompts=PROMPTS, sampling=Sampling(14), slots=4, **more):
    """The same rollout by both engines; they must agree."""
    options = {"seed": 7, "eos": 1, "pad": 0, **more}
    plain = generate(model, prompts, range(len(prompts)), sampling, batch_size=64, engine="plain", **options)
    fast = generate(model, prompts, range(len(prompts)), sampling, batch_size=slots, **options)
    assert fast.responses() == plain.responses()
    assert torch.equal(fast.prompt_ids, plain.prompt_ids) and torch.equal(fast.prompt_mask, plain.prompt_mask)
    assert torch.equal(fast.response_mask, plain.response_mask) and torch.equal(fast.response_ids, plain.response_ids)
    assert torch.allclose(fast.logprobs, plain.logprobs, atol=1e-4)
    assert torch.allclose(fast.entropy, plain.entropy, atol=1e-4)
    return fast, plain


def often_ending(family: str, more: float = 2.0) -> torch.nn.Module:
    """A model whose answers end at all lengths; `more`: what EOS has on the others, nats."""
    model = tiny(family)
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[1] = more
    head.register_forward_hook(lambda _module, _inputs, logits: logits + bias)
    return model


@pytest.mark.parametrize("slots", [1, 4, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_their_log_probabilities_are_those_of_the_plain_loop(family, slots):
    fast, _ = both(often_ending(family), slots=slots)
    lengths = {len(answer) for answer in fast.responses()}
    assert len(lengths) > 3, "rows must leave at different times"


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_windows_shorter_than_a_row_are_those_of_the_plain_loop(family):
    model = often_ending(family)
    everything, _ = both(model)
    model.config.sliding_window = 4
    windowed, _ = both(model)
    assert windowed.responses() != everything.responses()


def test_local_attention_of_gpt_neo_is_that_of_the_plain_loop():
    config = GPTNeoConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, window_size=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]],
    )  # fmt: skip
    torch.manual_seed(0)
    both(AutoModelForCausalLM.from_config(config).eval())


def test_rows_that_run_out_of_columns_are_moved_and_nothing_changes(monkeypatch):
    monkeypatch.setattr(cache, "SLACK", 2)
    moves = []
    move = cache.SlotCache._move
    monkeypatch.setattr(cache.SlotCache, "_move", lambda self, end: (moves.append(end), move(self, end)))
    both(often_ending("llama", 0.5), PROMPTS * 4, Sampling(40), slots=3)
    assert len(moves) > 3


@pytest.mark.parametrize("sampling", [Sampling(9, 0.7, top_k=3), Sampling(9, 1.3, top_p=0.5, vocabulary=30)])
def test_filters_and_the_bits_of_what_they_kept_are_those_of_the_plain_loop(sampling):
    fast, plain = both(often_ending("llama"), sampling=sampling)
    mask = plain.response_mask.bool()
    assert fast.support is not None and torch.equal(fast.support[mask], plain.support[mask])
    assert not fast.support[~mask].any()


def test_the_same_call_gives_the_same_bits_and_every_pass_is_told_before_it_is_made():
    model, passes = often_ending("opt"), []
    counts = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    options = {"seed": 7, "eos": 1, "pad": 0, "batch_size": 4}
    told, done = [], []
    for _ in range(2):
        made = generate(
            model,
            PROMPTS,
            range(9),
            Sampling(14),
            on_token=lambda: told.append(len(passes)),
            on_batch=done.append,
            **options,
        )
        counts.append(made)
    assert all(
        torch.equal(a, b)
        for a, b in zip(vars(counts[0]).values(), vars(counts[1]).values(), strict=True)
        if a is not None
    )
    assert told == list(range(len(passes)))
    assert done[-1] == 9 and sorted(set(done)) == [d for i, d in enumerate(done) if d not in done[:i]]


@pytest.mark.parametrize("kernels", ["ours", "oneDNN's", "torch's"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma3"])
def test_a_bf16_model_is_as_it_was_after_a_rollout_and_samples_as_near_to_fp32_as_the_plain_loop(
    family, kernels, monkeypatch
):
    if kernels != "ours":
        monkeypatch.setattr(cpu_kernels, "library", lambda: None)
        monkeypatch.setattr(cpu, "_has_kernels", lambda _: kernels == "oneDNN's")
    exact, model = tiny(family), tiny(family).bfloat16()
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    options = {"seed": 7, "eos": 39, "pad": 0, "batch_size": 4}
    fast = generate(model, PROMPTS, range(9), Sampling(6), **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config and model.config._attn_implementation == exact.config._attn_implementation
    assert not [layer for layer in model.modules() if "forward" in vars(layer)]
    plain = generate(model, PROMPTS, range(9), Sampling(6), engine="plain", **options)

    def error(made) -> float:
        again = response_scores(exact, made.prompt_ids, made.prompt_mask, made.response_ids, made.response_mask)
        return float((again.logprobs - made.logprobs).abs().mean())

    assert error(fast) < 1.5 * error(plain) + 1e-3


def test_answers_to_one_prompt_share_its_pass():
    model, widths = tiny("llama"), []
    model.register_forward_pre_hook(
        lambda _m, _a, inputs: widths.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    generate(model, [[5, 6, 7]] * 6 + [[8, 9, 10]] * 6, range(12), Sampling(3), seed=0, eos=39, pad=0)
    assert widths == [(2, 3), (12, 1), (12, 1)]


def test_prompts_enter_longest_first_in_groups_of_similar_length_that_fit():
    queue = queue_of([[1] * 9, [2], [1] * 9, [3, 3]], slots=8)
    assert queue == [Waiting((1,) * 9, (0, 2)), Waiting((3, 3), (3,)), Waiting((2,), (1,))]
    assert queue_of([[1]] * 5, slots=5) == [Waiting((1,), (0, 1)), Waiting((1,), (2, 3)), Waiting((1,), (4,))]
    assert group_of(queue, free=1) == 0 and group_of(queue, free=2) == 1 and group_of(queue, free=9) == 3
    long = [Waiting((1,) * n, (i,)) for i, n in enumerate((1000, 990, 400))]
    assert group_of(long, free=9) == 2


def test_what_on_token_raises_gives_the_rollout_up():
    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(tiny("opt"), PROMPTS, range(9), Sampling(4), seed=0, eos=1, pad=0, on_token=stop)


def test_noise_of_rows_at_different_positions_is_that_of_each_alone():
    from rlhf_core.rollout import uniform

    together = uniform(3, np.array([4, 5, 6]), np.array([0, 9, 2]))
    assert together.tolist() == [uniform(3, np.array([n]), p)[0] for n, p in ((4, 0), (5, 9), (6, 2))]
