"""The mathematics of PPO for language models, as pure functions on `[batch, response]` tensors.

Masks are bool or 0/1 and true on the tokens of the response through EOS. Masked positions may hold anything, even NaN: values
are selected before they are used. Sources: Schulman et al. 2016 (GAE, arXiv 1506.02438), 2017 (PPO, arXiv 1707.06347);
Ziegler et al. 2019 (RLHF, adaptive KL, arXiv 1909.08593); "The N implementation details of RLHF with PPO"; K1/K2/K3:
Schulman, "Approximating KL divergence", 2020.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def select(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the mask is true, 0 elsewhere, whatever stood there."""
    return torch.where(mask.bool(), x, torch.zeros((), dtype=x.dtype, device=x.device))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over true positions; 0 if there are none."""
    return select(x, mask).sum() / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance over true positions."""
    mean = masked_mean(x, mask)
    return masked_mean((select(x, mask) - mean) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Unit variance over true positions, and zero mean unless `shift_mean` is false (then the mean is kept).

    As OpenAI's lm-human-preferences: biased variance, epsilon 1e-8 under the root.
    """
    mean, var = masked_mean(x, mask), masked_var(x, mask)
    white = (x - mean) * torch.rsqrt(var + 1e-8)
    return select(white if shift_mean else white + mean, mask)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: Literal["k1", "k2", "k3"]) -> Tensor:
    """Per-token estimate of KL(actor || reference) from tokens sampled by the actor.

    k1 = log p - log q (unbiased); k2 = k1^2 / 2; k3 = exp(-k1) - 1 + k1 (unbiased and never negative).
    """
    k1 = logprobs - ref_logprobs
    if kind == "k1":
        return k1
    if kind == "k2":
        return k1.square() / 2
    return torch.expm1(-k1) + k1


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """`-kl_coef * kl` on every response token, and the score added at the last one (the EOS token if there is one).

    Args:
        scores: `[batch]`.
        kl: `[batch, response]`.
        mask: `[batch, response]`.
        kl_coef: price of one nat.
    """
    rewards = select(-kl_coef * kl, mask)
    last = mask.long().sum(1).clamp(min=1) - 1
    return rewards.scatter_add(1, last.unsqueeze(1), (scores * mask.any(1)).to(rewards.dtype).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (advantage + value), 0 where masked; the value after the end is 0.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1}.
    """
    rewards, values = select(rewards, mask), select(values, mask)
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(following)
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = select(delta + gamma * lam * following, mask[:, t])
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, select(advantages + values, mask)


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token on, `[batch, response]`: REINFORCE's return."""
    zeros = torch.zeros_like(rewards)
    return gae(rewards, zeros, mask, gamma, 1.0)[0]


def leave_one_out(scores: Tensor, answers: int) -> Tensor:
    """RLOO: each score less the mean of the other answers to its prompt (Ahmadian et al. 2024, arXiv 2402.14740).

    Args:
        scores: `[prompts * answers]`, the answers to one prompt side by side.
        answers: to a prompt, at least 2.
    """
    groups = scores.view(-1, answers)
    others = (groups.sum(1, keepdim=True) - groups) / (answers - 1)
    return (groups - others).flatten()


def group_normalized(scores: Tensor, answers: int) -> Tensor:
    """GRPO: (score - mean) / (std + 1e-4) over the answers to one prompt (Shao et al. 2024, arXiv 2402.03300).

    A group whose scores are all alike says nothing and gets 0. The deviation is the unbiased one.

    Args:
        scores: `[prompts * answers]`, the answers to one prompt side by side.
        answers: to a prompt, at least 2.
    """
    groups = scores.view(-1, answers)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()


@dataclass(frozen=True)
class PolicyTerms:
    """Per token, `[batch, response]`: `loss`, `ratio`, `approx_kl` (k3 of old || new), `clipped` (bool)."""

    loss: Tensor
    ratio: Tensor
    approx_kl: Tensor
    clipped: Tensor


def policy_terms(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> PolicyTerms:
    """Clipped surrogate: max(-A r, -A clip(r, 1 - clip, 1 + clip)), 0 where masked.

    Args:
        logprobs, old: `[batch, response]` of the policy now and of the one that sampled.
        advantages: `[batch, response]`.
        mask: `[batch, response]`.
        clip: largest change of the ratio that is rewarded.
        clip_high: another bound upwards (Yu et al. 2025, DAPO, arXiv 2503.14476); default `clip`.
        dual_clip: for A < 0 the loss is at most -A dual_clip (Ye et al. 2020, arXiv 1912.09729); default unbounded.
    """
    log_ratio = select(logprobs - old, mask)
    ratio = log_ratio.exp()
    advantages = select(advantages, mask)
    high = clip if clip_high is None else clip_high
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + high)
    loss = torch.maximum(plain, clipped)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return PolicyTerms(
        loss=select(loss, mask),
        ratio=ratio,
        approx_kl=torch.expm1(log_ratio) - log_ratio,
        clipped=(clipped > plain) & mask.bool(),
    )


def value_terms(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float | None) -> Tensor:
    """Per token 0.5 max((V - R)^2, (clip(V, old +- clip) - R)^2), 0 where masked."""
    values, old, returns = (select(x, mask) for x in (values, old, returns))
    error = (values - returns).square()
    if clip is not None:
        held = old + (values - old).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over true positions; 0 if the returns do not vary."""
    var = masked_var(returns, mask)
    unexplained = masked_var(select(returns, mask) - select(values, mask), mask)
    return torch.where(var > 1e-12, 1 - unexplained / var.clamp(min=1e-12), torch.zeros_like(var))


def adapt_kl_coef(coef: float, kl_per_sequence: float, target: float, episodes: int, horizon: int) -> float:
    """coef * (1 + clip(kl / target - 1, -0.2, 0.2) * episodes / horizon) (Ziegler et al. 2019, section 2.2)."""
    error = min(max(kl_per_sequence / target - 1, -0.2), 0.2)
    return coef * (1 + error * episodes / horizon)


def shaped_scores(
    scores: Tensor,
    ended: Tensor,
    clip: float | None,
    penalty: float | None,
    mode: Literal["subtract", "replace"],
) -> Tensor:
    """Clip scores, then punish answers without EOS: score - penalty, or -penalty in place of the score.

    Args:
        scores: `[batch]`.
        ended: `[batch]` bool, EOS was emitted.
        clip: bound on the absolute score, None for none.
        penalty: None for none.
        mode: how the penalty applies.
    """
    scores = scores if clip is None else scores.clamp(-clip, clip)
    if penalty is None:
        return scores
    punished = scores - penalty if mode == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(ended, scores, punished)
