"""Estimators without a critic and the variants of the clip, on numbers made by hand."""

import pytest
import torch
from pydantic import ValidationError

from rlhf_core import ppo_math as pm
from rlhf_core.specs import PPOSpec


def test_leave_one_out_compares_each_answer_with_the_mean_of_the_others():
    gains = pm.leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), answers=3)
    assert gains.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])


def test_group_normalized_has_mean_0_and_unit_deviation_and_a_group_without_differences_gives_0():
    gains = pm.group_normalized(torch.tensor([1.0, 2.0, 3.0, 7.0, 7.0, 7.0]), answers=3)
    assert gains.tolist() == pytest.approx([-1, 0, 1, 0, 0, 0], abs=1e-3)


def test_reward_to_go_is_the_discounted_sum_of_what_follows_and_ignores_padding():
    rewards = torch.tensor([[1.0, 2.0, 4.0, float("nan")]])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert pm.reward_to_go(rewards, mask, 1.0).tolist() == [[7.0, 6.0, 4.0, 0.0]]
    assert pm.reward_to_go(rewards, mask, 0.5).tolist() == [[3.0, 4.0, 4.0, 0.0]]


def test_clip_high_raises_only_the_upper_bound():
    mask, old = torch.ones(1, 2), torch.zeros(1, 2)
    new = torch.tensor([[1.5, 0.5]]).log()
    gains = torch.tensor([[1.0, -1.0]])
    plain = pm.policy_terms(new, old, gains, mask, 0.2)
    higher = pm.policy_terms(new, old, gains, mask, 0.2, clip_high=0.4)
    assert plain.loss.tolist()[0] == pytest.approx([-1.2, 0.8])
    assert higher.loss.tolist()[0] == pytest.approx([-1.4, 0.8])


def test_dual_clip_bounds_the_loss_of_a_negative_advantage_and_is_off_by_default():
    mask, old = torch.ones(1, 2), torch.zeros(1, 2)
    new = torch.tensor([[10.0, 10.0]]).log()
    gains = torch.tensor([[-1.0, 1.0]])
    assert pm.policy_terms(new, old, gains, mask, 0.2).loss.tolist()[0] == pytest.approx([10, -1.2])
    assert pm.policy_terms(new, old, gains, mask, 0.2, dual_clip=3.0).loss.tolist()[0] == pytest.approx([3, -1.2])


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_comparing_answers_needs_two_of_them(advantage):
    with pytest.raises(ValidationError, match="at least 2"):
        PPOSpec(advantage=advantage, samples_per_prompt=1)
    assert PPOSpec(advantage=advantage).answers == 4


def test_an_estimator_without_critic_refuses_settings_of_the_critic():
    with pytest.raises(ValidationError, match="critic"):
        PPOSpec(advantage="rloo", critic_warmup=3)


def test_grpo_pays_the_kl_penalty_in_the_loss_and_the_others_in_the_reward():
    assert PPOSpec(advantage="grpo").kl_penalty == "loss"
    assert PPOSpec(advantage="rloo").kl_penalty == PPOSpec().kl_penalty == "reward"
    assert PPOSpec(advantage="grpo", kl_in="reward").kl_penalty == "reward"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 5, "critic_warmup": 5}, "none of the 5 rollouts"),
        ({"steps": 5, "ema": {"start_step": 5}}, "never reached"),
        ({"critic_lora": {"quantize": "nf4"}}, "critic_lora.quantize"),
        ({"actor_lora": {"quantize": "nf4", "also_train": ["norms"]}}, "quantize and also_train"),
        ({"actor_lora": {"dropout": 0.1}}, "dropout is off in PPO"),
        ({"advantage": "rloo", "gamma": 0.9}, "gamma 0.9"),
        ({"rewards": []}, "empty"),
    ],
)
def test_what_would_silently_mean_nothing_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        PPOSpec.model_validate(fields)
