"""What evaluation says of given answers, checked by hand; sampling and judging are tested on real processes."""

import json
import math

import pytest

from rlhf_core.comparison import Answer, TokenLoss, compare, describe, evaluation_of, flat_metrics, sample_rows


def answer(
    reward: float | None, gold: float | None = None, tokens: int = 4, eos: bool = True, kl: float = 0.0
) -> Answer:
    parts = {} if gold is None else {"count": gold, "ending": 1.0, "gold": gold / 2 + 0.5}
    return Answer(" text", tokens, eos, kl, reward, parts)


SFT = [answer(0.0, 0.0), answer(1.0, 0.5), answer(2.0, 1.0)]
PPO = [answer(1.0, 0.5, 8, kl=4.0), answer(1.0, 1.0, 4, kl=1.0), answer(4.0, 1.0, 4, eos=False, kl=1.0)]
LOSSES = {"sft": [TokenLoss(2.0, 2), TokenLoss(1.0, 1)], "ppo": [TokenLoss(4.0, 2), TokenLoss(2.0, 1)]}


def test_means_are_over_prompts_and_token_means_over_tokens():
    found = describe(PPO, LOSSES["ppo"])
    assert found["reward"]["value"] == 2.0 and found["reward"]["n"] == 3
    assert found["kl_sequence"]["value"] == 2.0
    assert found["kl_token"]["value"] == pytest.approx(6 / 16)
    assert found["length"]["value"] == pytest.approx(16 / 3)
    assert found["eos_rate"]["value"] == pytest.approx(2 / 3)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(2.0))
    assert found["gold"]["value"] == pytest.approx((0.75 + 1 + 1) / 3)
    assert set(found["gold_parts"]) == {"count", "ending"}


def test_comparison_is_by_prompt_and_ties_are_half_wins():
    found = compare(PPO, SFT)
    assert found["gains"]["reward"]["value"] == 1.0
    assert found["gains"]["gold_count"]["value"] == pytest.approx(1 / 3)
    assert found["gains"]["gold_ending"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}
    assert found["win_rate"]["reward"]["value"] == pytest.approx(2.5 / 3)
    assert found["win_rate"]["gold"]["value"] == pytest.approx(2.5 / 3)


def test_every_interval_holds_its_value_and_says_how_many_prompts():
    evaluation = json.loads(json.dumps(evaluation_of({"sft": SFT, "ppo": PPO}, LOSSES, {"seed": 0}), allow_nan=False))
    models = evaluation["models"].values()
    cells = [c for m in models for c in [*m.values(), *m["gold_parts"].values()] if "value" in c]
    cells += [*evaluation["gains"].values(), *evaluation["win_rate"].values()]
    assert len(cells) > 20
    for cell in cells:
        assert cell["low"] <= cell["value"] + 1e-12 and cell["value"] <= cell["high"] + 1e-12 and cell["n"] in (2, 3)


def test_the_manifest_gets_one_number_a_name():
    flat = flat_metrics(evaluation_of({"sft": SFT, "ppo": PPO}, LOSSES, {}))
    wanted = (
        "gold_sft gold_ppo gold_gain gold_gain_low gold_gain_high gold_count_sft gold_count_ppo reward_sft reward_ppo "
        "reward_gain reward_gain_low reward_gain_high win_rate win_rate_low win_rate_high kl_sequence kl_token "
        "length_sft length_ppo eos_rate_sft eos_rate_ppo perplexity_sft perplexity_ppo"
    )
    assert set(wanted.split()) <= set(flat)
    assert all(isinstance(value, int | float) for value in flat.values())
    assert flat["kl_sequence"] == 2.0 and flat["gold_gain"] == pytest.approx(0.1666667)


def test_without_gold_and_held_out_rows_their_numbers_are_absent():
    plain = {"sft": [answer(0.0), answer(1.0)], "ppo": [answer(1.0), answer(3.0)]}
    flat = flat_metrics(evaluation_of(plain, {}, {}))
    assert not [name for name in flat if name.startswith(("gold", "perplexity"))]
    assert flat["win_rate"] == 1.0 and "win_rate_reward" not in flat


def test_the_base_model_is_described_and_not_compared():
    evaluation = evaluation_of({"base": SFT, "sft": SFT, "ppo": PPO}, {}, {})
    assert list(evaluation["models"]) == ["base", "sft", "ppo"]
    assert "gold_base" in flat_metrics(evaluation)


def test_samples_put_the_answers_to_a_prompt_side_by_side():
    rows = sample_rows(["a", "b", "c"], {"ppo": PPO, "sft": SFT})
    assert [row["prompt"] for row in rows] == ["a", "b", "c"]
    assert list(rows[2]["answers"]) == ["sft", "ppo"]
    assert rows[2]["answers"]["ppo"] == {
        "text": " text", "reward": 4.0, "kl": 1.0, "gold": 1.0, "gold_parts": {"count": 1.0, "ending": 1.0},
        "tokens": 4, "eos": False,
    }  # fmt: skip


def test_without_a_reward_model_its_numbers_are_absent_and_gold_decides():
    plain = {
        "sft": [answer(None, 0.0), answer(None, 0.5)],
        "dpo": [answer(None, 0.5, kl=2.0), answer(None, 1.0, kl=4.0)],
    }
    evaluation = evaluation_of(plain, {}, {})
    flat = flat_metrics(evaluation)
    assert not [name for name in flat if "reward" in name]
    assert flat["win_rate"] == 1.0 and flat["gold_dpo"] > flat["gold_sft"] and flat["kl_sequence"] == 3.0
    assert "paired differences dpo - sft" in evaluation["method"]
    assert "reward" not in sample_rows(["a", "b"], plain)[0]["answers"]["dpo"]


def test_the_averaged_actor_has_numbers_of_its_own_and_is_not_compared():
    evaluation = evaluation_of({"sft": SFT, "ppo": PPO, "ppo_ema": SFT}, {}, {})
    flat = flat_metrics(evaluation)
    assert list(evaluation["models"]) == ["sft", "ppo", "ppo_ema"]
    assert flat["kl_sequence"] == 2.0 and flat["kl_sequence_ppo_ema"] == 0.0
    assert flat["gold_gain"] == pytest.approx(flat["gold_ppo"] - flat["gold_sft"])
