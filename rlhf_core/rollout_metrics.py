"""What a scored rollout looks like: masked statistics over the answers of all ranks, for logs and for the KL controller."""

from collections.abc import Mapping

from rlhf_core import ppo_math as pm
from rlhf_core.distributed import sum_over_ranks
from rlhf_core.experience import Experience


def rollout_metrics(e: Experience, parts: Mapping[str, float]) -> dict[str, float]:
    """Means and deviations over all ranks' answers; collective.

    Args:
        e: this rank's rows.
        parts: sums over them of what each reward source gave, by name; told as means where there are several.

    Returns:
        Names as in the README; KL and entropy in nats, lengths in tokens.
    """
    mask = e.response_mask
    kl = pm.select(e.logprobs - e.ref_logprobs, mask)
    sums = [
        len(e),
        mask.sum(),
        kl.sum(),
        pm.select(e.entropy, mask).sum(),
        e.scores.sum(),
        e.scores.double().square().sum(),
        e.ended.sum(),
        (mask.sum(1) ** 2).sum(),
        e.prompt_mask.sum(),
    ]
    totals = sum_over_ranks([*(float(v) for v in sums), *parts.values()])
    rows, tokens, kl_sum, entropy, score, score2, ended, squares, prompt = totals[:9]
    mean, length = score / rows, tokens / rows
    by_source = dict(zip(parts, totals[9:], strict=True))
    return {
        **{name: total / rows for name, total in by_source.items() if len(parts) > 1 or not name.startswith("score_")},
        "score": mean,
        "score_std": max(score2 / rows - mean**2, 0.0) ** 0.5,
        "kl_sequence": kl_sum / rows,
        "kl_token": kl_sum / tokens,
        "entropy": entropy / tokens,
        "response_length": length,
        "response_length_std": max(squares / rows - length**2, 0.0) ** 0.5,
        "eos_rate": ended / rows,
        "rollout_tokens": tokens,
        "prompt_tokens": prompt,
    }
