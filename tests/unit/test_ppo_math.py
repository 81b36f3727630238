"""PPO mathematics against numbers worked out by hand."""

import math

import pytest
import torch

from rlhf_core import ppo_math as pm

T = torch.tensor
NAN = float("nan")


def test_whiten_gives_zero_mean_and_unit_variance_over_the_mask_only():
    x, mask = T([[1.0, 2.0, 99.0], [3.0, NAN, NAN]]), T([[1, 1, 0], [1, 0, 0]])
    white = pm.whiten(x, mask)  # 1, 2, 3: mean 2, biased variance 2/3
    s = math.sqrt(1.5)
    assert torch.allclose(white, T([[-s, 0.0, 0.0], [s, 0.0, 0.0]]), atol=1e-6)


def test_whiten_without_shift_keeps_the_mean_and_only_scales():
    x, mask = T([[1.0, 2.0, 3.0]]), T([[1, 1, 1]])
    s = math.sqrt(1.5)
    assert torch.allclose(pm.whiten(x, mask, shift_mean=False), T([[2 - s, 2.0, 2 + s]]), atol=1e-6)


def test_whiten_reproduces_the_published_example_of_openai_rewards():
    # "The N implementation details", detail 9: [[1,2,3],[4,5,6],[7,8,9]] -> +-1.5492 ... with the mean removed
    x = torch.arange(1.0, 10.0).reshape(3, 3)
    white = pm.whiten(x, torch.ones_like(x))
    assert torch.allclose(white[0], T([-1.5492, -1.1619, -0.7746]), atol=1e-4)
    kept = pm.whiten(x, torch.ones_like(x), shift_mean=False)
    assert torch.allclose(kept[0], T([3.4508, 3.8381, 4.2254]), atol=1e-4)


def test_kl_estimators_have_their_values_and_k3_is_never_negative():
    p, q = T([[math.log(0.5), math.log(0.2)]]), T([[math.log(0.25), math.log(0.4)]])
    log2 = math.log(2)
    assert torch.allclose(pm.kl_estimate(p, q, "k1"), T([[log2, -log2]]))
    assert torch.allclose(pm.kl_estimate(p, q, "k2"), T([[log2**2 / 2, log2**2 / 2]]))
    assert torch.allclose(pm.kl_estimate(p, q, "k3"), T([[0.5 - 1 + log2, 2 - 1 - log2]]))
    assert (pm.kl_estimate(torch.randn(9, 9), torch.randn(9, 9), "k3") >= 0).all()


def test_kl_estimators_agree_with_the_exact_kl_in_expectation():
    p, q = T([0.7, 0.2, 0.1]), T([0.3, 0.3, 0.4])
    exact = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        assert (p * pm.kl_estimate(p.log(), q.log(), kind)).sum() == pytest.approx(exact.item(), abs=1e-6)


def test_the_score_goes_to_the_last_response_token_and_kl_to_every_one():
    kl, mask = T([[1.0, 2.0, NAN], [3.0, 4.0, 5.0]]), T([[1, 1, 0], [1, 1, 1]])
    rewards = pm.token_rewards(T([10.0, 20.0]), kl, mask, 0.1)
    assert torch.allclose(rewards, T([[-0.1, 9.8, 0.0], [-0.3, -0.4, 19.5]]))


def test_gae_equals_the_numbers_worked_out_by_hand():
    # gamma 1, lambda 0.5; row 0 ends after two tokens
    rewards, values = T([[0.0, 1.0, 7.0], [0.0, 0.0, 2.0]]), T([[0.5, 0.25, 9.0], [1.0, 1.0, 1.0]])
    mask = T([[1, 1, 0], [1, 1, 1]])
    advantages, returns = pm.gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # row 0: d1 = 1 - 0.25 = 0.75; d0 = 0.25 - 0.5 = -0.25; A0 = -0.25 + 0.375 = 0.125
    # row 1: d2 = 1; d1 = 0; d0 = 0; A2 = 1, A1 = 0.5, A0 = 0.25
    assert torch.allclose(advantages, T([[0.125, 0.75, 0.0], [0.25, 0.5, 1.0]]))
    assert torch.allclose(returns, T([[0.625, 1.0, 0.0], [1.25, 1.5, 2.0]]))


def test_gae_discounts():
    advantages, _ = pm.gae(T([[0.0, 1.0]]), T([[0.0, 0.0]]), T([[1, 1]]), gamma=0.9, lam=0.5)
    assert torch.allclose(advantages, T([[0.45, 1.0]]))


def test_policy_loss_clips_only_where_the_ratio_would_gain():
    old = torch.zeros(1, 4)
    new = T([[1.5, 0.5, 1.5, 0.5]]).log()
    gains, mask = T([[1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 4)
    terms = pm.policy_terms(new, old, gains, mask, clip=0.2)
    assert torch.allclose(terms.loss, T([[-1.2, -0.5, 1.5, 0.8]]))
    assert terms.clipped.tolist() == [[True, False, False, True]]
    assert torch.allclose(terms.approx_kl, T([[0.5 - math.log(1.5), -0.5 - math.log(0.5)] * 2]))


def test_value_loss_takes_the_worse_of_clipped_and_plain():
    loss = pm.value_terms(T([[1.0, 0.1]]), T([[0.0, 0.0]]), T([[1.0, 0.1]]), T([[1, 1]]), clip=0.2)
    assert torch.allclose(loss, T([[0.5 * 0.64, 0.0]]))
    assert torch.allclose(pm.value_terms(T([[3.0]]), T([[0.0]]), T([[1.0]]), T([[1]]), clip=None), T([[2.0]]))


def test_a_nan_in_a_masked_place_reaches_no_loss_and_no_gradient():
    mask = T([[1, 1, 0]])
    new = T([[-1.0, -1.0, NAN]], requires_grad=True)
    terms = pm.policy_terms(new, T([[-1.0, -2.0, NAN]]), T([[1.0, 1.0, NAN]]), mask, 0.2)
    terms.loss.sum().backward()
    assert torch.isfinite(terms.loss).all() and torch.isfinite(new.grad).all() and new.grad[0, 2] == 0
    value = T([[1.0, 1.0, NAN]], requires_grad=True)
    pm.value_terms(value, T([[1.0, 1.0, NAN]]), T([[0.0, 0.0, NAN]]), mask, 0.2).sum().backward()
    assert torch.isfinite(value.grad).all()
    for x in pm.gae(T([[1.0, 1.0, NAN]]), T([[1.0, 1.0, NAN]]), mask, 1.0, 0.95):
        assert torch.isfinite(x).all()
    assert torch.isfinite(pm.token_rewards(T([1.0]), T([[0.0, 0.0, NAN]]), mask, 0.1)).all()


def test_explained_variance_is_one_for_perfect_values_and_zero_for_constant_ones():
    returns, mask = T([[1.0, 2.0, 3.0, NAN]]), T([[1, 1, 1, 0]])
    assert pm.explained_variance(returns, returns, mask) == pytest.approx(1)
    assert pm.explained_variance(T([[2.0, 2.0, 2.0, NAN]]), returns, mask) == pytest.approx(0)


def test_adaptive_kl_moves_toward_the_target_and_its_error_is_clipped():
    assert pm.adapt_kl_coef(0.1, 6.0, 6.0, 64, 10_000) == 0.1
    assert pm.adapt_kl_coef(0.1, 6.6, 6.0, 100, 1_000) == pytest.approx(0.1 * 1.01)
    assert pm.adapt_kl_coef(0.1, 60.0, 6.0, 100, 1_000) == pytest.approx(0.1 * 1.02)
    assert pm.adapt_kl_coef(0.1, 0.0, 6.0, 100, 1_000) == pytest.approx(0.1 * 0.98)


def test_answers_without_eos_are_punished_as_configured():
    scores, ended = T([9.0, 0.5]), T([True, False])
    assert pm.shaped_scores(scores, ended, 5.0, 1.0, "subtract").tolist() == [5.0, -0.5]
    assert pm.shaped_scores(scores, ended, 5.0, 1.0, "replace").tolist() == [5.0, -1.0]
    assert pm.shaped_scores(scores, ended, None, None, "replace").tolist() == [9.0, 0.5]


def test_the_upper_clip_may_be_wider_and_then_only_gains_upwards_are_freer():
    old, mask = torch.zeros(1, 4), torch.ones(1, 4)
    new = T([[1.25, 1.5, 0.5, 1.5]]).log()
    gains = T([[1.0, 1.0, -1.0, -1.0]])
    wide = pm.policy_terms(new, old, gains, mask, clip=0.2, clip_high=0.28)
    assert torch.allclose(wide.loss, T([[-1.25, -1.28, 0.8, 1.5]]))
    assert wide.clipped.tolist() == [[False, True, True, False]]
    assert torch.allclose(pm.policy_terms(new, old, gains, mask, clip=0.2).loss, T([[-1.2, -1.2, 0.8, 1.5]]))


def test_dual_clip_bounds_the_loss_of_negative_advantages_alone():
    old, mask = torch.zeros(1, 4), T([[1, 1, 1, 0]])
    new = T([[10.0, 2.0, 10.0, NAN]]).log()
    gains = T([[-1.0, -1.0, 1.0, NAN]])
    assert torch.allclose(pm.policy_terms(new, old, gains, mask, 0.2).loss, T([[10.0, 2.0, -1.2, 0.0]]))
    assert torch.allclose(pm.policy_terms(new, old, gains, mask, 0.2, dual_clip=3.0).loss, T([[3.0, 2.0, -1.2, 0.0]]))


def test_a_token_earns_the_discounted_rewards_from_it_on():
    rewards, mask = T([[1.0, 2.0, 4.0], [1.0, 2.0, NAN]]), T([[1, 1, 1], [1, 1, 0]])
    assert torch.allclose(pm.reward_to_go(rewards, mask, 0.5), T([[3.0, 4.0, 4.0], [2.0, 2.0, 0.0]]))
    assert torch.allclose(pm.reward_to_go(rewards, mask, 1.0), T([[7.0, 6.0, 4.0], [3.0, 2.0, 0.0]]))


def test_the_baseline_of_an_answer_is_the_mean_of_the_others_to_its_prompt():
    scores = T([1.0, 2.0, 6.0, 10.0, 20.0, 0.0])
    assert torch.allclose(pm.leave_one_out(scores, 3), T([-3.0, -1.5, 4.5, 0.0, 15.0, -15.0]))
    assert torch.allclose(pm.leave_one_out(scores, 2), T([-1.0, 1.0, -4.0, 4.0, 20.0, -20.0]))


def test_group_advantages_are_standard_scores_and_nothing_in_a_group_of_equals():
    found = pm.group_normalized(T([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    deviation = math.sqrt(7.0)  # of 1, 2, 6 about 3, with n - 1
    assert torch.allclose(found, T([-2 / deviation, -1 / deviation, 3 / deviation, 0.0, 0.0, 0.0]), atol=1e-4)


def test_advantages_of_one_group_do_not_move_those_of_another():
    scores = T([1.0, 2.0, 6.0, 5.0, 7.0, 9.0])
    moved = T([1.0, 2.0, 6.0, 500.0, -700.0, 9.0])
    for compare in (pm.leave_one_out, pm.group_normalized):
        assert torch.equal(compare(scores, 3)[:3], compare(moved, 3)[:3])
