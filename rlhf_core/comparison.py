"""From answers to numbers: what each model did on the held-out prompts, and how PPO or DPO compares with SFT.

Pure, on plain records and without torch, so that every number of evaluation.json can be checked by hand. All models
answer the same prompts with the same noise, so comparisons are paired by prompt. The unit of observation is the prompt.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_core import stats

MODELS = ("base", "sft", "ppo", "ppo_ema", "dpo")
ALIGNED = ("ppo", "dpo")  # what preferences made of SFT; a pipeline has one of them


def aligned_of(models: Iterable[str]) -> str | None:
    """Which of the models is compared with SFT, None if there is none."""
    return next((name for name in ALIGNED if name in models), None)


@dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt.

    Attributes:
        text: without special tokens.
        tokens: its length, end of sequence included.
        eos: whether it ended by itself.
        kl: log p(answer | model) - log p(answer | sft), nats, under the sampling temperature.
        reward: normalised score of the reward model; None without one.
        gold: "gold" and its parts; empty without a gold reward.
    """

    text: str
    tokens: int
    eos: bool
    kl: float
    reward: float | None
    gold: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenLoss:
    """Summed -log p of one held-out response and its number of tokens."""

    nats: float
    tokens: int


def describe(answers: Sequence[Answer], losses: Sequence[TokenLoss]) -> dict[str, Any]:
    """One model's means, each {"value", "low", "high", "n"}; reward, gold and perplexity only where there are any."""
    tokens = [float(a.tokens) for a in answers]
    found: dict[str, Any] = {}
    if rewards := _rewards(answers):
        found["reward"] = stats.mean(rewards).as_dict()
    found |= {
        "kl_sequence": stats.mean([a.kl for a in answers]).as_dict(),
        "kl_token": stats.ratio([a.kl for a in answers], tokens).as_dict(),
        "length": stats.mean(tokens).as_dict(),
        "eos_rate": stats.proportion(sum(a.eos for a in answers), len(answers)).as_dict(),
    }
    if answers[0].gold:
        means = {name: stats.mean([a.gold[name] for a in answers]).as_dict() for name in answers[0].gold}
        found["gold"] = means.pop("gold")
        found["gold_parts"] = means
    if losses:
        loss = stats.ratio([one.nats for one in losses], [float(one.tokens) for one in losses])
        found["perplexity"] = stats.exp(loss).as_dict()
    return found


def compare(after: Sequence[Answer], before: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Paired differences (`gains`) and win rates (`win_rate`) of `after` over `before`, prompt by prompt."""
    scored = _rewards(after), _rewards(before)
    columns = {"reward": scored} if all(scored) else {}
    for name in after[0].gold:
        key = "gold" if name == "gold" else f"gold_{name}"
        columns[key] = ([a.gold[name] for a in after], [b.gold[name] for b in before])
    gains = dict(columns)
    gains["length"] = ([float(a.tokens) for a in after], [float(b.tokens) for b in before])
    gains["eos_rate"] = ([float(a.eos) for a in after], [float(b.eos) for b in before])
    return {
        "gains": {key: stats.paired_difference(*pair).as_dict() for key, pair in gains.items()},
        "win_rate": {k: stats.win_rate(*columns[k]).as_dict() for k in ("reward", "gold") if k in columns},
    }


def evaluation_of(
    answers: Mapping[str, Sequence[Answer]], losses: Mapping[str, Sequence[TokenLoss]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """All of evaluation.json: settings, each model's numbers, the aligned model against SFT."""
    models = {m: describe(answers[m], losses.get(m, ())) for m in MODELS if m in answers}
    aligned = aligned_of(models)
    assert aligned, f"nothing to compare with SFT among {list(models)}"
    return {
        **settings,
        "prompts": len(answers["sft"]),
        "models": models,
        **compare(answers[aligned], answers["sft"]),
        "method": f"95 % intervals over prompts: Student's t (means, paired differences {aligned} - sft), Wilson (shares; "
        "a tie is half a win), delta method (token means). kl: sampled k1 estimate against sft, at the same temperature.",
    }


def flat_metrics(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The manifest's metrics: one number a name, interval ends where a decision hangs on them."""
    flat: dict[str, float] = {}
    for key in ("gold", "reward"):
        if gain := evaluation["gains"].get(key):
            flat |= {f"{key}_gain": gain["value"], f"{key}_gain_low": gain["low"], f"{key}_gain_high": gain["high"]}
    wins = evaluation["win_rate"]
    for key, win in wins.items():
        name = "win_rate" if key == "gold" or "gold" not in wins else "win_rate_reward"
        flat |= {name: win["value"], f"{name}_low": win["low"], f"{name}_high": win["high"]}
    for model, values in evaluation["models"].items():
        for key in ("gold", "reward", "length", "eos_rate", "perplexity"):
            if key in values:
                flat[f"{key}_{model}"] = values[key]["value"]
        for part, value in values.get("gold_parts", {}).items():
            flat[f"gold_{part}_{model}"] = value["value"]
    for model, values in evaluation["models"].items():
        if model in (*ALIGNED, "ppo_ema"):
            suffix = "" if model in ALIGNED else f"_{model}"
            flat |= {f"{key}{suffix}": values[key]["value"] for key in ("kl_sequence", "kl_token")}
    return flat | {"prompts": evaluation["prompts"]}


def sample_rows(prompts: Sequence[str], answers: Mapping[str, Sequence[Answer]]) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: every prompt with the answers of all models."""
    return [
        {"index": i, "prompt": prompt, "answers": {m: _answer_row(answers[m][i]) for m in MODELS if m in answers}}
        for i, prompt in enumerate(prompts)
    ]


def _rewards(answers: Sequence[Answer]) -> list[float]:
    """The reward model's scores, empty without one."""
    return [a.reward for a in answers if a.reward is not None]


def _answer_row(answer: Answer) -> dict[str, Any]:
    scored = {} if answer.reward is None else {"reward": answer.reward}
    row: dict[str, Any] = {"text": answer.text, **scored, "kl": answer.kl}
    if answer.gold:
        row |= {"gold": answer.gold["gold"], "gold_parts": {k: v for k, v in answer.gold.items() if k != "gold"}}
    return row | {"tokens": answer.tokens, "eos": answer.eos}
