"""A checkpoint is taken up by another number of processes or at another ZeRO stage: the same state, the same data order."""

from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from safetensors.torch import load_file

from rlhf_core import checkpoints
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.store import Store

SFT = {"max_steps": 6, "batch_size": 12, "optim": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"}}
PPO = {
    "steps": 3, "rollout_batch_size": 12, "ppo_epochs": 1, "minibatches": 2, "max_response_tokens": 6, "ema": {"decay": 0.9},
    "kl_controller": "adaptive", "actor_optim": {"lr": 3e-4}, "critic_optim": {"lr": 3e-4},
}  # fmt: skip
LORA = {"rank": 4, "alpha": 8}
# stage, spec, where it is stopped, (processes, ZeRO stage) before and after
CASES: dict[str, tuple[str, dict[str, Any], list[Any], tuple[int, int], tuple[int, int]]] = {
    "sft-2-to-1": ("sft", SFT, [3, "train", 0], (2, 2), (1, 2)),
    "sft-1-to-2": ("sft", SFT, [3, "train", 0], (1, 1), (2, 3)),
    "sft-2-to-3": ("sft", SFT, [3, "train", 0], (2, 3), (3, 1)),
    "sft-zero0-to-3": ("sft", SFT, [3, "train", 0], (2, 0), (2, 3)),
    "sft-zero3-to-0": ("sft", SFT, [3, "train", 0], (2, 3), (2, 0)),
    "sft-lora": ("sft", {**SFT, "lora": LORA}, [3, "train", 0], (2, 2), (1, 0)),
    "ppo-score": ("ppo", PPO, [1, "score", 0], (2, 1), (1, 3)),
    "ppo-update": ("ppo", PPO, [1, "update", 1], (1, 0), (2, 2)),
    "ppo-rloo": ("ppo", {**PPO, "advantage": "rloo", "samples_per_prompt": 2}, [1, "score", 0], (2, 2), (3, 3)),
}


def job(label: str, after: bool) -> dict[str, Any]:
    name, spec, stop, *layouts = CASES[label]
    resources = {"micro_batch": 2, "rollout_micro_batch": 4, "zero_stage": layouts[after][1]}
    return {"name": name, "spec": spec, "resources": resources, "stops": [stop], "world": 0}


@pytest.fixture(scope="module")
def runs(tiny_root, tmp_path_factory) -> dict[str, dict[str, list[Any]]]:
    """Metrics of each case: undisturbed in its first layout ("whole"), and stopped there and ended in its second ("cut")."""
    found: dict[str, dict[str, list[Any]]] = {"whole": {}, "cut": {}}

    def launch(number: int, after: bool, stopped: bool, mark: str = "") -> None:
        worlds = {label: CASES[label][3 + after][0] for label in CASES}
        for world in sorted(set(worlds.values())):
            jobs = {label + mark: job(label, after) for label in CASES if worlds[label] == world}
            out = tmp_path_factory.mktemp(f"elastic-{number}-{world}")
            arguments: dict[str, Any] = {"root": str(tiny_root), "jobs": jobs, "number": number, "stopped": stopped}
            rows = ranks.run(world, "one_attempt", out, 400, "resume_scenarios.py", **arguments)
            if not stopped:
                found["whole" if mark else "cut"].update({k.removesuffix(mark): v for k, v in rows.items()})

    launch(1, after=False, stopped=False, mark="-whole")
    launch(1, after=False, stopped=True)
    launch(2, after=True, stopped=False)
    return found


def saved_state(root: Path, label: str, attempt: int) -> dict[str, torch.Tensor]:
    """Every tensor of the engines as an attempt saved it at the stop, put together from the files of all ranks."""
    store = Store(f"file://{root}/store")
    name, _, (step, phase, update), *_ = CASES[label]
    (folder,) = (root / "store" / name).glob(f"{label}-????????????")
    mark = f"{step:08d}-{phase}-{update:06d}.json"
    (key,) = [k for k in store.list(f"{name}/{folder.name}") if k.endswith(f"/{attempt:04d}/{mark}")]
    ref = ArtifactRef(stage=name, name=label, fingerprint=folder.name[-12:].ljust(64, "0"))
    marker = checkpoints.read_marker(store, ref, key)
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for part in marker.parts:
        if "/rank-" in part.name and part.name.endswith(".safetensors") and not part.name.startswith("state/"):
            path = store.local_path(marker.part_key(part))
            assert path is not None
            for tensor_key, tensor in load_file(path).items():
                whole, _, start = tensor_key.rpartition("@")
                pieces.setdefault(f"{part.name.partition('/')[0]}/{whole}", []).append((int(start), tensor))
    return {whole: torch.cat([t for _, t in sorted(found, key=lambda p: p[0])]) for whole, found in pieces.items()}


@pytest.mark.parametrize("label", CASES)
def test_weights_moments_and_average_are_the_same_to_the_last_bit_in_another_layout(runs, tiny_root, label):
    before, after = saved_state(tiny_root, label, 1), saved_state(tiny_root, label, 2)
    assert set(before) == set(after) and any("exp_avg_sq/" in name for name in before)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    if CASES[label][0] == "ppo":
        assert any("average/" in name for name in before)


@pytest.mark.parametrize("label", CASES)
def test_the_stage_goes_on_with_the_same_data_and_the_same_metrics_but_for_rounding(runs, label):
    whole, cut = runs["whole"][label], runs["cut"][label]
    assert len(whole) == len(cut) >= 3
    for undisturbed, resumed in zip(whole, cut, strict=True):
        assert undisturbed.keys() == resumed.keys()
        for name in (
            "tokens",
            "rollout_tokens",
            "prompt_tokens",
            "loss",
            "grad_norm",
            "score",
            "kl_coef",
            "actor_loss",
        ):
            if name in undisturbed:
                assert resumed[name] == pytest.approx(undisturbed[name], rel=2e-3, abs=2e-4), (
                    name,
                    undisturbed["step"],
                )
