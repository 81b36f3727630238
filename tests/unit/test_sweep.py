"""Sweeps: which variants a grid or list makes, what they share, and a comparison page that stays legible."""

import re

import numpy as np
import pytest
from commands import rlhf, small_pipeline
from PIL import Image

from rlhf_core.config import load_config
from rlhf_core.errors import ConfigError
from rlhf_core.plan import make_plan
from rlhf_core.store import Store
from rlhf_core.sweep import MOST, axis_of, read_list, shared_stages, sweep_id, variants_of
from rlhf_core.sweep_plots import Line, look, plane_of
from rlhf_core.sweep_report import StageResult, VariantResult, markdown, numbers_of, write_sweep_report


@pytest.fixture
def config(tmp_path):
    return load_config(small_pipeline(tmp_path))


def interval(value: float, half: float = 0.1) -> dict:
    return {"value": value, "low": value - half, "high": value + half, "n": 200}


# --- variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("ppo.seed=0,1", ["0", "1"]),
        ("ppo.kl_coef=0.02, 0.05", ["0.02", "0.05"]),
        ("a=[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("a={x: 1, y: 2},null", ["{x: 1, y: 2}", "null"]),
        ("a='b,c',d", ["'b,c'", "d"]),
        ("a=1", ["1"]),
    ],
)
def test_the_values_of_a_field_are_divided_by_commas_outside_of_brackets_and_quotes(text, values):
    name = text.partition("=")[0]
    assert axis_of(text) == tuple(f"{name}={value}" for value in values)


def test_a_grid_has_all_combinations_and_its_last_field_changes_fastest(config):
    found = variants_of(config, ["ppo.kl_coef=0.05,0.1", "ppo.seed=3,4"])
    assert [(v.number, v.config.ppo.kl_coef, v.config.ppo.seed) for v in found] == [
        (1, 0.05, 3), (2, 0.05, 4), (3, 0.1, 3), (4, 0.1, 4)
    ]  # fmt: skip
    assert found[1].label == "ppo.kl_coef=0.05  ppo.seed=4"
    assert all(v.config.data == config.data and v.config.store == config.store for v in found)


def test_a_list_has_variants_that_no_grid_has_and_each_is_tried_at_every_point_of_the_grid(config, tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text("- {}\n- {ppo.kl_coef: 0.3, ppo.actor_optim.lr: 1.0e-6}\n")
    found = variants_of(config, ["seed=0,1"], read_list(file))
    assert [(v.config.seed, v.config.ppo.kl_coef) for v in found] == [
        (0, config.ppo.kl_coef), (1, config.ppo.kl_coef), (0, 0.3), (1, 0.3)
    ]  # fmt: skip
    assert found[3].config.ppo.actor_optim.lr == 1e-6
    assert variants_of(config, (), [{}])[0].label == "as it is"


@pytest.mark.parametrize(
    ("grid", "complaint"),
    [
        ([], "--grid ppo.kl_coef=0.05,0.1"),
        (["ppo.kl_coef"], "write field=value,value"),
        (["ppo.seed=0,,1"], "a value is empty"),
        (["ppo.seed=0,0"], "given twice"),
        (["ppo.seed=0,1", "ppo.seed=2"], "ppo.seed: given twice"),
        (["name=a,b"], "name: all variants of a sweep share it"),
        (["ppo.kl_cof=0.1"], r"variant 1 \(ppo.kl_cof=0.1\): ppo.kl_cof: unknown key; did you mean 'kl_coef'"),
        ([f"ppo.seed={','.join(map(str, range(MOST + 1)))}"], f"at most {MOST}"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said(config, grid, complaint):
    with pytest.raises(ConfigError, match=complaint):
        variants_of(config, grid)


@pytest.mark.parametrize("text", ["ppo.seed: 1", "- 3", "[]", "- {1: 2}", "a: [", None])
def test_what_is_wrong_with_a_list_is_said(tmp_path, text):
    file = tmp_path / "variants.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=r"--list .*variants.yaml"):
        read_list(file)


# --- sharing ---------------------------------------------------------------------------------------------------------


def test_variants_share_every_stage_that_does_not_depend_on_what_differs(config):
    found = variants_of(config, ["reward.center_coef=0.0,0.1", "ppo.kl_coef=0.05,0.1"])
    plans = {v.number: make_plan(v.config, Store(config.store)) for v in found}
    shared = [(one.planned.stage, one.variants) for one in shared_stages(plans)]
    assert shared == [
        ("data", [1, 2, 3, 4]), ("sft", [1, 2, 3, 4]), ("reward", [1, 2]), ("reward", [3, 4]),
        *(("ppo", [n]) for n in (1, 2, 3, 4)), *(("evaluate", [n]) for n in (1, 2, 3, 4)),
    ]  # fmt: skip


def test_variants_that_are_the_same_pipeline_are_refused(config):
    found = variants_of(config, ["resources.retries=1,2"])
    with pytest.raises(ConfigError, match="variants 1 and 2 are the same pipeline"):
        shared_stages({v.number: make_plan(v.config, Store(config.store)) for v in found})


def test_the_same_variants_in_another_order_have_the_same_report(config):
    def folder(grid: str) -> str:
        plans = [make_plan(v.config, Store(config.store)) for v in variants_of(config, [grid])]
        return sweep_id(config.name, [{p.stage: p.ref for p in plan} for plan in plans])

    assert folder("ppo.seed=1,2") == folder("ppo.seed=2,1") != folder("ppo.seed=1,3")
    assert re.fullmatch(r"sweeps/small-[0-9a-f]{12}", folder("ppo.seed=1,2"))


def test_a_dry_run_shows_variants_and_who_shares_what_and_writes_nothing(tmp_path, capfd):
    file = small_pipeline(tmp_path)
    code, out, _ = rlhf(capfd, "sweep", file, "--grid", "ppo.kl_coef=0.05,0.1", "--grid", "ppo.seed=0,1", "--dry-run")
    assert code == 0
    assert "ppo.kl_coef=0.1  ppo.seed=0" in out
    assert out.count("4: all") == 3 and re.search(r"ppo +build +ppo/small-\w{12} +1: 4 ", out)
    assert "11 stages to build for 4 variants; 20 if they shared none" in out
    assert not (tmp_path / "store").exists()


# --- the comparison --------------------------------------------------------------------------------------------------


def logged(slope: float, steps: int = 40) -> list[dict]:
    rng = np.random.default_rng(int(100 * slope))
    return [
        {
            "kind": "train", "step": i + 1, "seconds": i, "score": slope * i / steps + float(rng.normal(0, 0.1)),
            "kl_sequence": 2 * slope * i / steps, "response_length": 20.0 - i, "entropy": 2.0, "actor_lr": 1e-5,
        }
        for i in range(steps)
    ]  # fmt: skip


def result(number: int, **more) -> VariantResult:
    keys = ("reward", "gold", "gold_gain", "kl_sequence", "length", "eos_rate", "perplexity")
    numbers = {key: interval(number / 10) for key in keys}
    content = {"numbers": {"score_last": {"value": 1.5}, **numbers}, "sft": {"gold": interval(0.2)}, "seconds": 60.0}
    return VariantResult(number, f"ppo.kl_coef={number}  ppo.seed=<{number}>", **{**content, **more})


def comparison(out, count: int, *, failed: tuple[int, ...] = ()) -> str:
    numbers = range(1, count + 1)
    results = [result(n, failed="died | of\nthirst", numbers={}) if n in failed else result(n) for n in numbers]
    stages = [StageResult("ppo", f"ppo/x-{n:012x}", "built", (n,), 3.0, "score 1") for n in numbers]
    stages.insert(0, StageResult("sft", "sft/x-000000000000", "reused", tuple(numbers), 3.0))
    lines = [Line((n,), logged(n, 5 if n in failed else 40)) for n in numbers]
    write_sweep_report(out, title="<t>", results=results, stages=stages, curves={"ppo": lines})
    return (out / "report.html").read_text()


def test_the_numbers_of_a_variant_are_those_of_its_evaluation_and_of_training_where_there_is_none():
    evaluation = {
        "models": {"sft": {"gold": interval(0.2)}, "ppo": {"gold": interval(0.5), "kl_sequence": interval(3.0)}},
        "gains": {"gold": interval(0.3)},
    }
    training = {"score_last": 1.25, "kl_sequence_last": 2.5}
    numbers, sft = numbers_of(training, evaluation)
    assert {key: cell["value"] for key, cell in numbers.items()} == {
        "score_last": 1.25, "gold": 0.5, "kl_sequence": 3.0, "gold_gain": 0.3
    }  # fmt: skip
    assert sft == {"gold": interval(0.2)}
    assert numbers_of(training, {}) == ({"score_last": {"value": 1.25}, "kl_sequence": {"value": 2.5}}, {})
    assert numbers_of({}, {}) == ({}, {})


def test_the_plane_has_a_point_for_each_rollout_that_logged_both_numbers():
    rows = [
        {"kind": "train", "step": 1, "kl_sequence": 0.5, "score": 1.0},
        {"kind": "train", "step": 2, "kl_sequence": float("nan"), "score": 1.0},
        {"kind": "train", "step": 3, "score": 1.0},
        {"kind": "eval", "step": 3, "kl_sequence": 0.7, "score": 1.0},
        {"kind": "train", "step": 4, "kl_sequence": 1.5, "score": 2.0},
    ]
    assert plane_of(rows).tolist() == [[0.5, 1.0], [1.5, 2.0]]
    assert plane_of([]).shape == (0, 2)


def test_each_of_the_most_variants_looks_otherwise():
    assert len({look(number) for number in range(1, MOST + 1)}) == MOST


def test_the_page_compares_all_variants_and_stands_alone(tmp_path):
    page = comparison(tmp_path, 3)
    made = {path.name for path in (tmp_path / "plots").iterdir()}
    curves = {f"ppo-{name}.png" for name in ("score", "kl_sequence", "response_length", "entropy")}
    assert made == {"plane-score.png", "plane-reward.png", "plane-gold.png"} | curves
    assert page.count("data:image/png;base64,") == len(made)
    assert not re.search(r"<script|<link|url\(|@import|https?://", page)
    assert all(f"ppo.seed=&lt;{n}&gt;" in page for n in (1, 2, 3)) and "<t>" not in page
    assert "4 stages in place of 6" in page


def test_a_failed_variant_has_a_row_that_says_why_and_is_drawn_as_far_as_it_came(tmp_path):
    page = comparison(tmp_path, 3, failed=(2,))
    assert "failed: died / of thirst" in page
    text = markdown("t", [result(1), result(2, failed="died | of\nthirst", numbers={})], [], "/there/report.html")
    assert "**failed**: died / of thirst" in text and "`/there/report.html`" in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table[:4]}) == 1


@pytest.mark.parametrize("count", [2, 12])
def test_no_label_of_a_drawing_is_clipped(tmp_path, count):
    comparison(tmp_path, count)
    for path in (tmp_path / "plots").iterdir():
        pixels = np.asarray(Image.open(path).convert("L"))
        frame = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
        assert frame.min() > 250, f"{path.name}: ink at the edge"
