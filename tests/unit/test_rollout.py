"""Rollouts are exact: their log-probabilities are those of a plain forward pass, whatever the padding and the batch."""

import numpy as np
import pytest
import torch

from rlhf_core.models import ValueModel, new_causal_lm
from rlhf_core.rollout import Sampling, generate, keep_tokens, pack_bits, sample_token, uniform, unpack_bits
from rlhf_core.scoring import response_scores, response_values
from rlhf_core.specs import ModelSpec

FAMILIES = [
    "opt",
    "bloom",
    "gpt_neox",
    "gptj",
    "gpt_neo",
    "gpt2",
    "codegen",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma3",
]
PROMPTS = [[5, 6, 7], [9], [8, 7, 6, 5, 4, 3, 10], [11, 12]]


class Tokenizer:
    """The three facts of a tokenizer that models need."""

    pad_token_id, eos_token_id = 0, 1

    def __len__(self) -> int:
        return 40


def tiny(family: str, positions: int = 64) -> torch.nn.Module:
    spec = ModelSpec(family=family, hidden_size=64, layers=2, heads=4, positions=positions)
    model = new_causal_lm(spec, Tokenizer(), seed=3).eval()
    for p in model.parameters():  # random weights of a size that makes the distribution uneven
        p.data += 0.07 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def roll(model, prompts=PROMPTS, sampling=Sampling(12), names=None, batch_size=64):
    return generate(model, prompts, names or range(len(prompts)), sampling, seed=7, eos=1, pad=0, batch_size=batch_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_rollout_logprobs_of_left_padded_prompts_equal_a_plain_forward_of_each_row_alone(family):
    model = tiny(family)
    rollout = roll(model)
    for row, (prompt, answer) in enumerate(zip(PROMPTS, rollout.responses(), strict=True)):
        ids = torch.tensor([prompt + answer])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        got = rollout.logprobs[row][rollout.response_mask[row].bool()]
        assert torch.allclose(got, expected, atol=1e-4), family


@pytest.mark.parametrize("family", FAMILIES)
def test_training_forward_gives_the_rollout_logprobs_so_the_first_ratio_is_one(family):
    model = tiny(family)
    r = roll(model)
    scores = response_scores(model, r.prompt_ids, r.prompt_mask, r.response_ids, r.response_mask)
    ratio = torch.where(r.response_mask.bool(), scores.logprobs - r.logprobs, 0.0).exp()
    assert torch.allclose(ratio, torch.ones_like(ratio), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_do_not_depend_on_left_padding(family):
    model = ValueModel.from_causal_lm(tiny(family), seed=1).eval()
    r = roll(tiny(family))
    together = response_values(model, r.prompt_ids, r.prompt_mask, r.response_ids, r.response_mask)
    for row, prompt in enumerate(PROMPTS):
        length = int(r.response_mask[row].sum())
        ids = torch.tensor([prompt + r.responses()[row]])
        alone = model(ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
        assert torch.allclose(together[row, :length], alone, atol=1e-4)


def test_answers_do_not_depend_on_batch_size_or_order():
    model = tiny("llama")
    one = roll(model).responses()
    assert roll(model, batch_size=1).responses() == one
    backwards = roll(model, PROMPTS[::-1], names=[3, 2, 1, 0]).responses()
    assert backwards[::-1] == one
    assert roll(model, names=[10, 11, 12, 13]).responses() != one


def test_nothing_follows_eos_and_the_mask_includes_it():
    model = tiny("gpt2")
    model.lm_head.weight.data[1] += 0.5  # EOS becomes likely (tied to the embedding)
    rollout = roll(model, [[5, 6]] * 64, Sampling(16), names=list(range(64)))
    ended = 0
    for answer in rollout.responses():
        if 1 in answer:
            ended += 1
            assert answer.index(1) == len(answer) - 1
    assert ended > 10


def test_top_k_and_top_p_logprobs_are_those_of_the_distribution_sampled_from():
    model = tiny("llama")
    for sampling in (Sampling(8, 0.7, top_k=3), Sampling(8, 1.3, top_p=0.5), Sampling(8, 1.0, top_k=10, top_p=0.8)):
        r = roll(model, sampling=sampling)
        assert r.support is not None
        scores = response_scores(
            model, r.prompt_ids, r.prompt_mask, r.response_ids, r.response_mask, sampling.temperature, r.support
        )
        mask = r.response_mask.bool()
        assert torch.allclose(scores.logprobs[mask], r.logprobs[mask], atol=1e-4)
        kept = unpack_bits(r.support, 40)[mask]
        assert kept.gather(1, r.response_ids[mask].unsqueeze(1)).all()
        if sampling.top_k:
            assert int(kept.sum(1).max()) <= sampling.top_k


def test_sampled_tokens_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    n = 20_000
    noise = uniform(5, np.arange(n), 3)
    drawn = sample_token(logits.expand(n, -1), Sampling(1, 2.0), noise)
    counts = torch.bincount(drawn.token, minlength=4).numpy()
    expected = (logits[0] / 2).softmax(0).double().numpy() * n
    assert ((counts - expected) ** 2 / expected).sum() < 16.27  # chi-square, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_logits_that_are_not_numbers_give_a_token_of_the_vocabulary_and_a_log_probability_that_tells(value, top_p):
    logits = torch.zeros(2, 300)
    logits[0, 5] = value
    drawn = sample_token(logits, Sampling(1, top_p=top_p), np.array([0.99, 0.5]))
    assert int(drawn.token.max()) < 300
    assert not torch.isfinite(drawn.logprob[0]) and torch.isfinite(drawn.logprob[1])


def test_noise_is_uniform_and_differs_by_seed_sample_and_position():
    x = uniform(0, np.arange(50_000), 0)
    assert 0 <= x.min() and x.max() < 1
    assert abs(x.mean() - 0.5) < 0.01 and abs(x.var() - 1 / 12) < 0.002
    for other in (
        uniform(1, np.arange(50_000), 0),
        uniform(0, np.arange(50_000), 1),
        uniform(0, np.arange(1, 50_001), 0),
    ):
        assert abs(np.corrcoef(x, other)[0, 1]) < 0.02


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert keep_tokens(logits, Sampling(1, top_p=0.5)).tolist() == [[True, False, False, False]]
    assert keep_tokens(logits, Sampling(1, top_p=0.51)).tolist() == [[True, True, False, False]]
    assert keep_tokens(logits, Sampling(1, top_k=3, top_p=0.9)).tolist() == [[True, True, True, False]]


def test_packed_bits_come_back():
    mask = torch.rand(3, 5, 41) > 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), 41), mask)


def test_gradients_through_top_p_are_finite_also_where_rows_are_padded():
    model = tiny("llama")
    r = roll(model, sampling=Sampling(8, top_p=0.5), names=[4, 5, 6, 7])
    r.response_mask[0, 2:] = 0
    r.support[0, 2:] = 0
    scores = response_scores(
        model, r.prompt_ids, r.prompt_mask, r.response_ids, r.response_mask, 1.0, r.support, entropy=True
    )
    torch.where(r.response_mask.bool(), scores.logprobs + scores.entropy, 0.0).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
