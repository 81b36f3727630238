"""Processes, accumulation and ZeRO stage change nothing but rounding (DESIGN, rule 8)."""

from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file

SPECS = {
    "sft": {"batch_size": 8, "max_steps": 5, "optim": {"lr": 3e-3}},
    "reward": {"batch_size": 8, "max_steps": 5, "optim": {"lr": 1e-3}},
    "ppo": {
        "steps": 3, "rollout_batch_size": 16, "minibatches": 2, "ppo_epochs": 2, "max_response_tokens": 10,
        "actor_optim": {"lr": 1e-3}, "critic_optim": {"lr": 1e-3}, "kl_controller": "adaptive",
    },
}  # fmt: skip
NAMES = {
    "sft": ("loss", "perplexity", "grad_norm"),
    "reward": ("loss", "accuracy", "margin"),
    "ppo": ("actor_loss", "critic_loss", "score", "kl_sequence", "approx_kl", "clip_fraction", "entropy", "kl_coef"),
}


@pytest.fixture(scope="session")
def plain(tiny_root, tmp_path_factory):
    """Metrics of one process, whole batches, ZeRO-0."""
    made: dict[str, list] = {}

    def get(stage: str) -> list:
        if stage not in made:
            out = tmp_path_factory.mktemp(stage)
            made[stage] = ranks.run(
                1, "stage", out, root=str(tiny_root), name=stage, spec=SPECS[stage], resources={"micro_batch": 16}
            )
            get.folders[stage] = out
        return made[stage]

    get.folders = {}
    return get


def same(rows: list, expected: list, stage: str, tolerance: float = 2e-4) -> None:
    assert len(rows) == len(expected) > 0
    for row, wanted in zip(rows, expected, strict=True):
        for name in NAMES[stage]:
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], rel=tolerance, abs=tolerance), (row["step"], name)


def same_weights(folder: Path, expected: Path) -> None:
    """The saved models hold the same weights, gathered from the ranks' parts."""
    files = sorted(p.relative_to(expected) for p in expected.rglob("*.safetensors"))
    assert files
    for file in files:
        found, wanted = load_file(folder / file), load_file(expected / file)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.allclose(found[name], tensor, atol=2e-3), (file, name)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize(
    ("world", "resources"),
    [
        (1, {"micro_batch": 1}),
        (1, {"micro_batch": 8, "rollout_micro_batch": 3}),
        (1, {"micro_batch": 4, "gradient_checkpointing": True}),
        (2, {"micro_batch": 8}),
        (2, {"micro_batch": 2, "zero_stage": 1}),
        (2, {"micro_batch": 2, "zero_stage": 2}),
        (2, {"micro_batch": 2, "zero_stage": 3}),
    ],
    ids=[
        "accumulate-1",
        "accumulate-8",
        "checkpointing",
        "2-processes",
        "2-processes-zero-1",
        "2-processes-zero-2",
        "2-processes-zero-3",
    ],
)
def test_losses_equal_those_of_one_process_with_whole_batches(stage, world, resources, tiny_root, plain, tmp_path):
    rows = ranks.run(world, "stage", tmp_path, root=str(tiny_root), name=stage, spec=SPECS[stage], resources=resources)
    same(rows, plain(stage), stage)
    if resources.get("zero_stage") == 3:
        same_weights(tmp_path / "out-0", plain.folders[stage] / "out-0")


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_training_moves_the_loss(stage, plain):
    rows = [row for row in plain(stage) if row["kind"] == "train"]
    name = {"sft": "loss", "reward": "loss", "ppo": "critic_loss"}[stage]
    assert rows[-1][name] < rows[0][name] * 0.98


def test_in_the_first_minibatch_of_a_rollout_the_ratio_is_one(plain):
    rows = plain("ppo")
    assert all(row["ratio_first"] < 1e-4 for row in rows)
    assert any(row["ratio_deviation"] > 1e-3 for row in rows)  # and later ones differ: the updates do something


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_bf16_trains(stage, tiny_root, plain, tmp_path):
    spec = {**SPECS[stage], "precision": "bf16"}
    rows = ranks.run(1, "stage", tmp_path, root=str(tiny_root), name=stage, spec=spec, resources={"micro_batch": 4})
    first, wanted = rows[-1], plain(stage)[-1]
    assert first["kind"] == wanted["kind"]
    for name in ("loss", "critic_loss"):
        if name in wanted:
            assert first[name] == pytest.approx(wanted[name], rel=0.25, abs=0.05)
