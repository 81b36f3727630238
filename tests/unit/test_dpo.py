"""DPO: the loss on numbers made by hand, the reference, and the whole stage against plain transformers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.dpo import DPOTrainer, dpo_loss
from rlhf_core.store import Store
from rlhf_core.trainer import accuracy_metrics, by_source

SPEC = {"batch_size": 8, "max_steps": 6, "beta": 0.5, "optim": {"lr": 3e-3}}


def loss(chosen: float, rejected: float, **options: Any) -> float:
    options = {"beta": 0.1, "kind": "sigmoid", **options}
    return dpo_loss(torch.tensor([chosen]), torch.tensor([rejected]), **options).item()


def test_the_loss_of_a_policy_that_has_not_moved_is_ln_2():
    assert loss(0, 0) == pytest.approx(math.log(2))
    assert loss(3, 3, beta=2.0, label_smoothing=0.2) == pytest.approx(math.log(2)), "only the difference counts"
    assert loss(0, 0, kind="ipo", beta=0.1) == pytest.approx(25.0)


def test_the_loss_has_its_known_values():
    assert loss(2, -1, beta=0.5) == pytest.approx(math.log1p(math.exp(-1.5)))
    assert loss(-1, 2, beta=0.5) == pytest.approx(math.log1p(math.exp(1.5)))
    smoothed = 0.9 * math.log1p(math.exp(-1.5)) + 0.1 * math.log1p(math.exp(1.5))
    assert loss(2, -1, beta=0.5, label_smoothing=0.1) == pytest.approx(smoothed)
    assert loss(2, -1, kind="ipo", beta=0.25) == pytest.approx(1.0)
    assert loss(1000, -1000, beta=1.0) == 0 and loss(-1000, 1000, beta=1.0) == 2000, "no overflow"


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_gradient_makes_the_chosen_answer_likelier_and_the_rejected_less_so(kind):
    chosen, rejected = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    dpo_loss(chosen, rejected, 0.1, kind).sum().backward()
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == -rejected.grad.item() < 0
    if kind == "sigmoid":  # eq. 7's gradient: -beta sigmoid(-beta h)
        assert chosen.grad.item() == pytest.approx(-0.05)


def test_ipo_stops_at_its_margin_and_smoothing_stops_at_the_odds_of_a_right_label():
    h = torch.tensor([1 / (2 * 0.1), math.log(0.8 / 0.2) / 0.1], requires_grad=True)
    ipo = dpo_loss(h[:1], torch.zeros(1), 0.1, "ipo").sum()
    smoothed = dpo_loss(h[1:], torch.zeros(1), 0.1, "sigmoid", 0.2).sum()
    (gradient,) = torch.autograd.grad(ipo + smoothed, h)
    assert gradient.abs().max() < 1e-6


def test_accuracy_and_loss_are_told_by_source_where_there_are_several():
    rows = ["a"] * 4 + ["b"] * 2
    metrics = accuracy_metrics(np.array([True, True, True, False, False, False]), rows)
    assert (metrics["accuracy"], metrics["accuracy_a"], metrics["accuracy_b"]) == (0.5, 0.75, 0.0)
    assert metrics["accuracy_low"] < 0.5 < metrics["accuracy_high"]
    tokens = np.array([1.0, 1.0, 2.0, 0.0, 5.0, 3.0])
    assert by_source("loss", np.array([1.0, 2.0, 3.0, 9.0, 0.0, 8.0]), tokens, rows) == {"loss_a": 2.25, "loss_b": 3.0}
    assert set(accuracy_metrics(np.array([True]), rows[:1])) == {"accuracy", "accuracy_low", "accuracy_high"}


def run(root: Path, out: Path, spec: dict, **resources: Any) -> tuple[DPOTrainer, dict, list[dict]]:
    """The stage in this process: its trainer, its metrics, and the rows of metrics.jsonl."""
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((root / "refs.json").read_text()).items()}
    inputs = {"data": refs["data"], "sft": refs["sft"]}
    trainer = DPOTrainer(tiny.context(Store(f"file://{root}/store"), "dpo", spec, inputs, out, **resources))
    metrics = trainer.run()
    return trainer, metrics, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def ratios(root: Path, out: Path, mean: bool) -> torch.Tensor:
    """log p - log p_ref of the held-out pairs by plain transformers without padding, `[pairs, 2]`."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(p).eval() for p in (out / "model", root / "sft" / "model")]
    found = []
    for row in Dataset.load_from_disk(str(root / "data" / "reward" / "test")).to_list():
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            ids = torch.tensor([row["prompt_ids"] + answer])
            with torch.no_grad():
                both = [m(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1) for m in models]
            each = [logprobs.gather(1, torch.tensor(answer)[:, None]).squeeze(1) for logprobs in both]
            found.append((each[0] - each[1]).mean() if mean else (each[0] - each[1]).sum())
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_stage_learns_and_its_metrics_are_those_of_plain_transformers(kind, tiny_root, tmp_path):
    _, metrics, rows = run(tiny_root, tmp_path, {**SPEC, "loss": kind}, micro_batch=3)
    found = ratios(tiny_root, tmp_path, mean=kind == "ipo")
    wanted = dpo_loss(found[:, 0], found[:, 1], 0.5, kind)
    assert metrics["eval_loss"] == pytest.approx(wanted.mean().item(), abs=1e-5)
    right = (found[:, 0] > found[:, 1]).float().mean().item()
    assert right > 0.6 and metrics["eval_accuracy"] == pytest.approx(right)
    assert metrics["eval_margin"] == pytest.approx(0.5 * (found[:, 0] - found[:, 1]).mean().item(), abs=1e-5)
    assert metrics["eval_drift"] == pytest.approx(-found.mean().item(), abs=1e-5)
    assert rows[0]["loss"] == pytest.approx(math.log(2) if kind == "sigmoid" else 1.0, abs=1e-5)
    assert rows[-2]["loss"] < rows[0]["loss"] and rows[-2]["margin"] > 0
    assert metrics["parameters_trained"] == metrics["parameters"]


def test_the_reference_is_computed_once_for_the_rows_that_are_used(tiny_root, tmp_path):
    trainer, _, _ = run(tiny_root, tmp_path, SPEC)
    known = ~np.isnan(trainer.train_reference).any(1)
    assert int(known.sum()) == 6 * 8 < len(trainer.train_rows)
    trained, _, _ = run(tiny_root, tmp_path / "more", {**SPEC, "max_steps": None, "epochs": 2.0})
    assert not np.isnan(trained.train_reference).any()
    assert np.allclose(trained.train_reference[known], trainer.train_reference[known], atol=1e-5)


def test_adapters_are_trained_alone_and_saved_merged_and_by_themselves(tiny_root, tmp_path):
    spec = {**SPEC, "optim": {"lr": 0}, "lora": {"rank": 4, "lr": 3e-3}, "dropout": 0.1}
    trainer, metrics, _ = run(tiny_root, tmp_path, spec)
    found = ratios(tiny_root, tmp_path, mean=False)
    assert metrics["eval_margin"] == pytest.approx(0.5 * (found[:, 0] - found[:, 1]).mean().item(), abs=1e-5)
    assert metrics["eval_margin"] > 0 and metrics["parameters_trained"] < metrics["parameters"] / 4
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == f"{trainer.context.job.inputs['sft'].id}/model"
