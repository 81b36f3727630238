"""The report: what it says follows from the numbers, it stands alone as one file, and odd input does not break it."""

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from rlhf_core import curves, report


def interval(value: float, half: float = 0.1, n: int = 200) -> dict:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def model(reward: float, gold: float, length: float = 10.0, eos: float = 1.0, perplexity: float = 4.0) -> dict:
    return {
        "reward": interval(reward), "gold": interval(gold, 0.02),
        "gold_parts": {"count": interval(0.6), "ending": interval(0.4)},
        "kl_sequence": interval(2.0), "kl_token": interval(0.2), "length": interval(length), "eos_rate": interval(eos),
        "perplexity": interval(perplexity),
    }  # fmt: skip


def evaluation(gold_gain: float = 0.3, reward_gain: float = 1.5, **ppo: float) -> dict:
    return {
        "prompts": 200, "temperature": 1.0, "max_response_tokens": 24, "seed": 0,
        "models": {"sft": model(0.0, 0.5), "ppo": model(reward_gain, 0.5 + gold_gain, **ppo)},
        "gains": {"reward": interval(reward_gain), "gold": interval(gold_gain, 0.05), "gold_count": interval(0.1)},
        "win_rate": {"reward": interval(0.9), "gold": interval(0.8)},
    }  # fmt: skip


def training(steps: int, *names: str) -> list[dict]:
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(1.0, 0.2, steps).tolist() for name in names}
    return [
        {"kind": "train", "step": i + 1, "seconds": i, **{name: values[i] for name, values in columns.items()}}
        for i in range(steps)
    ]


SAMPLE = {
    "prompt": "Human: Name two fruits.\n\nAssistant:",
    "answers": {
        "sft": {"text": " fig. Whatever.", "reward": -0.2, "gold": 0.5, "tokens": 5, "eos": True},
        "ppo": {"text": " fig and plum", "reward": 1.2, "gold": 0.9, "tokens": 24, "eos": False},
    },
}
LINEAGE = [
    {"stage": "sft", "id": "sft/x-0123456789ab", "created": "2026-01-01", "seconds": 61, "metrics": {"steps": 3}}
]


def page_of(out, **changes) -> str:
    content = {
        "title": "t", "stages": {}, "evaluation": evaluation(), "samples": [SAMPLE], "lineage": LINEAGE, **changes
    }  # fmt: skip
    report.write_report(out, **content)
    return (out / "report.html").read_text()


def test_every_metric_of_every_stage_has_its_png_and_is_in_the_page(tmp_path):
    stages = {"sft": training(30, "loss", "lr"), "ppo": training(30, "score", "score_std", "brand/new metric")}
    page = page_of(tmp_path, stages=stages)
    files = {p.name for p in (tmp_path / "plots").iterdir()}
    curves_made = {"sft-loss.png", "sft-lr.png", "ppo-score.png", "ppo-brand-new-metric.png"}
    assert files == curves_made | {"reward.png", "gold.png"}
    assert page.count("data:image/png;base64,") == len(files)
    assert "brand/new metric" in page


def test_the_page_needs_nothing_from_outside(tmp_path):
    found: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert tag not in ("script", "link", "iframe")
            found.extend(str(v) for k, v in attrs if k in ("src", "href"))

    page = page_of(tmp_path, stages={"sft": training(5, "loss")})
    Links().feed(page)
    assert found and all(link.startswith(("data:", "#")) for link in found)
    assert not re.search(r"url\(|@import", page)


def test_text_of_models_and_people_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>&\"'"
    answers = {name: {**answer, "text": evil} for name, answer in SAMPLE["answers"].items()}
    page = page_of(
        tmp_path,
        title=evil,
        samples=[{"prompt": evil, "answers": answers}],
        lineage=[{"stage": "sft", "id": evil, "created": evil}],
        stages={"sft": [{"kind": "train", "step": 1, evil: 1.0}]},
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6


def test_the_same_data_give_the_same_bytes(tmp_path):
    stages = {"ppo": training(50, "score", "score_std")}
    assert page_of(tmp_path / "a", stages=stages) == page_of(tmp_path / "b", stages=stages)


def test_no_label_of_a_plot_is_clipped(tmp_path):
    long = "a_metric_with_a_name_that_is_much_too_long_to_fit"
    rows = [{**row, "lr": 1e-5 * i, "score": -123456.0 * i} for i, row in enumerate(training(40, long, "loss"))]
    rows += [{"kind": "eval", "step": s, "loss": 1.0, "loss_low": 0.5, "loss_high": 1.2} for s in (20, 40)]
    page_of(tmp_path, stages={"sft": rows, "ppo": rows})
    for path in (tmp_path / "plots").iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        frame = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
        assert frame.min() > 250, f"{path.name}: ink at the edge"


def test_forty_curves_of_a_thousand_steps_make_a_small_page(tmp_path):
    stages = {s: training(1000, *(f"metric_{i}" for i in range(14))) for s in ("sft", "reward", "ppo")}
    page = page_of(tmp_path, stages=stages)
    assert len(page) < 3e6


def test_numbers_that_are_not_finite_are_left_out_of_curves(tmp_path):
    rows = [
        {"kind": "train", "step": i, "loss": v, "text": "x"} for i, v in enumerate([1.0, math.nan, None, math.inf, 2.0])
    ]
    assert curves.metric_names("sft", rows) == ["loss"]
    (line,) = curves.series_of(rows, "loss")
    assert line.step.tolist() == [0, 4]
    page_of(tmp_path, stages={"sft": rows, "reward": []})
    assert (tmp_path / "plots" / "sft-loss.png").exists()


@pytest.mark.parametrize(
    "missing",
    [{"evaluation": {}}, {"samples": []}, {"lineage": []}, {"evaluation": {"models": {"sft": model(0, 0.5)}}}],
)
def test_what_is_missing_is_left_out(tmp_path, missing):
    page = page_of(tmp_path, **missing)
    assert "<h2>Result</h2>" in page or missing == {"evaluation": {}}
    assert ("Sample answers" in page) == ("samples" not in missing)
    assert ("Lineage" in page) == ("lineage" not in missing)


def test_without_gold_the_verdict_goes_by_the_reward_model(tmp_path):
    found = evaluation()
    for part in (found["gains"], found["win_rate"], *found["models"].values()):
        part.pop("gold", None)
    for values in found["models"].values():
        values.pop("gold_parts")
    text, tone = report.verdict(found)
    assert tone == "better" and "no gold" in text
    page_of(tmp_path, evaluation=found)
    assert not (tmp_path / "plots" / "gold.png").exists()


def under_dpo(found: dict) -> dict:
    """The same numbers, found of a DPO model, whose pipeline has no reward model."""
    models = {"sft": found["models"]["sft"], "dpo": found["models"]["ppo"]}
    models = {name: {k: v for k, v in values.items() if k != "reward"} for name, values in models.items()}
    kept = {part: {k: v for k, v in found[part].items() if k != "reward"} for part in ("gains", "win_rate")}
    return {**found, "models": models, **kept}


def test_a_dpo_pipeline_is_reported_under_its_own_name_and_without_reward_scores(tmp_path):
    found = under_dpo(evaluation())
    answers = {"sft": SAMPLE["answers"]["sft"], "dpo": SAMPLE["answers"]["ppo"]}
    stages = {"dpo": training(30, "loss", "accuracy", "chosen_reward")}
    page = page_of(tmp_path, evaluation=found, samples=[{**SAMPLE, "answers": answers}], stages=stages)
    page = re.sub(r'base64,[^"]*', "", page)  # where any three letters occur
    assert "DPO&#x27;s answers are better than SFT&#x27;s" in page and "DPO − SFT" in page
    assert "PPO" not in page and "Reward model's score" not in page
    assert "Direct preference optimisation" in page and "Implicit reward, chosen" in page
    assert not (tmp_path / "plots" / "reward.png").exists()


def test_the_remedies_of_a_dpo_pipeline_are_fields_of_dpo():
    (warning,) = report.warnings(under_dpo(evaluation(perplexity=99.0)))
    assert "surprise DPO" in warning and "raise dpo.beta" in warning
    assert "ppo." not in " ".join(report.warnings(under_dpo(evaluation(eos=0.5, length=30.0))))


def test_the_averaged_actor_is_a_column_of_its_own_and_the_comparison_stays_ppos(tmp_path):
    found = evaluation()
    found["models"]["ppo_ema"] = model(1.0, 0.7)
    page = page_of(tmp_path, evaluation=found)
    assert re.findall(r'<th scope="col">(.*?)</th>', page)[:4] == ["SFT", "PPO", "PPO, EMA", "PPO − SFT"]


def test_without_gold_and_reward_model_there_is_no_verdict():
    found = under_dpo(evaluation())
    for part in ("gains", "win_rate"):
        found[part].pop("gold")
    text, tone = report.verdict(found)
    assert tone == "" and "neither gold (evaluate.gold) nor a reward model" in text


@pytest.mark.parametrize(("gain", "tone"), [(0.3, "better"), (-0.3, "worse"), (0.03, "even")])
def test_the_verdict_calls_a_difference_only_if_the_interval_excludes_zero(gain, tone):
    text, found = report.verdict(evaluation(gold_gain=gain))
    assert found == tone
    assert {"better": "better than", "worse": "worse than", "even": "not clearly different"}[tone] in text


def test_a_score_that_rises_without_gold_is_called_exploitation():
    (warning,) = report.warnings(evaluation(gold_gain=0.0, reward_gain=2.0))
    assert "exploits the reward model" in warning
    assert report.warnings(evaluation(gold_gain=0.3, reward_gain=2.0)) == []


@pytest.mark.parametrize(
    ("ppo", "word"),
    [({"eos": 0.5}, "length limit"), ({"length": 30.0}, "times as long"), ({"perplexity": 99.0}, "perplexity")],
)
def test_the_price_of_a_gain_is_named(ppo, word):
    (warning,) = report.warnings(evaluation(**ppo))
    assert word in warning


def test_an_unfinished_answer_is_marked(tmp_path):
    assert page_of(tmp_path).count("cut at the limit") == 1


def test_bands_belong_to_their_metric_and_are_no_curves_of_their_own():
    rows = training(3, "score", "score_std", "accuracy", "accuracy_low", "accuracy_high", "lone_std")
    assert set(curves.metric_names("ppo", rows)) == {"score", "accuracy", "lone_std"}
    (score,) = curves.series_of(rows, "score")
    assert score.band == "± 1 std" and np.allclose(score.high - score.value, [r["score_std"] for r in rows])
    (accuracy,) = curves.series_of(rows, "accuracy")
    assert accuracy.band == "95 % interval"


def test_training_and_evaluation_of_a_metric_share_a_drawing():
    rows = [*training(3, "loss"), {"kind": "eval", "step": 3, "loss": 1.0}]
    assert [line.kind for line in curves.series_of(rows, "loss")] == ["train", "eval"]


def test_known_metrics_come_first_and_sides_are_told_apart():
    names = curves.metric_names("ppo", training(2, "zzz", "lr_actor", "critic_grad_norm", "score", "aaa"))
    assert names[0] == "score" and names[-2:] == ["aaa", "zzz"]
    shown = curves.known("ppo", "critic_grad_norm")
    assert shown is not None and shown.title == "Gradient norm, critic"
    assert curves.known("reward", "loss") is not curves.known("sft", "loss")


def test_the_moving_mean_keeps_length_and_constants_and_takes_noise_away():
    assert np.allclose(curves.moving_mean(np.ones(50), 5), 1)
    noise = np.random.default_rng(0).normal(0, 1, 500)
    smooth = curves.moving_mean(noise, 25)
    assert smooth.shape == noise.shape and smooth.std() < 0.3
    assert smooth[100] == pytest.approx(noise[88:113].mean())


def test_only_noise_is_smoothed():
    steps = np.arange(100.0)
    assert not curves.is_rough(np.cos(steps / 40)) and not curves.is_rough(np.ones(100))
    assert curves.is_rough(np.random.default_rng(0).normal(0, 1, 100))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.500"), (-12.345, "−12.3"), (123.4, "123"), (12345, "12,345"), (3e-5, "3.0e-5"),
     (2.5e7, "2.5e7"), (60, "60"), (-7, "−7"), (math.nan, "–"), (None, "–"), (0.00123, "0.00123")],
)  # fmt: skip
def test_numbers_are_short_and_readable(value, text):
    assert curves.number(value) == text


def test_a_row_of_numbers_has_the_same_places():
    places = curves.decimals([0.05, 0.52, -0.86])
    assert [curves.fixed(v, places, signed=True) for v in (0.05, -0.86, 0.0, 1e-9)] == [
        "+0.050",
        "−0.860",
        "0.000",
        "0.000",
    ]
    assert curves.decimals([880.0, 3.0]) == 0 and curves.decimals([]) == 0 and curves.decimals([4.2]) == 2
