"""A stage that is stopped and taken up again ends with the same bits as one that was never disturbed."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ranks

from rlhf_core import checkpoints
from rlhf_core.checkpoints import Checkpoint
from rlhf_core.store import Store

SFT = {"epochs": 3, "batch_size": 12, "eval_every": 4, "optim": {"lr": 1e-3, "warmup_steps": 2, "schedule": "cosine"}}
REWARD = {"epochs": 1, "batch_size": 12, "optim": {"lr": 1e-3, "warmup_steps": 2}}
DPO = {"epochs": 1, "batch_size": 12, "optim": {"lr": 1e-3}}
PPO = {
    "steps": 3,
    "rollout_batch_size": 8,
    "ppo_epochs": 2,
    "minibatches": 2,
    "max_response_tokens": 6,
    "kl_controller": "adaptive",
    "kl_target": 0.5,
    "kl_horizon": 100,
    "actor_optim": {"lr": 1e-3},
    "critic_optim": {"lr": 1e-3},
}
LORA = {"rank": 4, "alpha": 8}
OFFLOAD = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
PHASES = [[0, "score", 0], [1, "update", 0], [1, "update", 3], [2, "rollout", 0], [2, "score", 0]]


def job(name: str, spec: dict[str, Any], stops: list[Any], zero: int = 0, **more: Any) -> dict[str, Any]:
    resources = {"micro_batch": 2, "rollout_micro_batch": 4, "zero_stage": zero, **more.pop("resources", {})}
    return {"name": name, "spec": spec, "resources": resources, "stops": stops, **more}


def steps(*numbers: int) -> list[Any]:
    return [[n, "train", 0] for n in numbers]


# 72 rows in batches of 12: an epoch of SFT ends at step 6.
ALL: dict[str, dict[str, Any]] = {
    **{f"sft-zero{z}": job("sft", SFT, steps(1, 6), z) for z in range(4)},
    "sft-dropout": job("sft", {**SFT, "dropout": 0.1, "epochs": 1}, steps(2), 2),
    "sft-bf16": job("sft", {**SFT, "precision": "bf16", "epochs": 1}, steps(2), 2),
    "sft-bf16-zero3": job("sft", {**SFT, "precision": "bf16", "epochs": 1}, steps(2), 3),
    "sft-lora": job("sft", {**SFT, "lora": {**LORA, "dropout": 0.1}, "epochs": 1}, steps(2), 1),
    "sft-offload": job("sft", {**SFT, "epochs": 1}, steps(2), 2, resources={"offload_optimizer": "cpu"}),
    "sft-every-4": job("sft", SFT, steps(5, 6, 11), 2, every=4),
    **{f"reward-zero{z}": job("reward", REWARD, steps(3), z) for z in (0, 3)},
    **{f"dpo-zero{z}": job("dpo", DPO, [[0, "train", 72], *steps(0 + 2)], z) for z in (0, 2)},
    "dpo-lora": job("dpo", {**DPO, "lora": LORA}, steps(2), 3),
    **{f"ppo-zero{z}": job("ppo", PPO, PHASES, z) for z in range(4)},
    "ppo-ema-lora": job("ppo", {**PPO, "ema": {"decay": 0.9}, "actor_lora": LORA, "critic_lora": LORA}, PHASES[1:3], 2),
    "ppo-ema-zero3": job("ppo", {**PPO, "ema": {"decay": 0.9}}, PHASES[2:4], 3),
    "ppo-rloo": job("ppo", {**PPO, "advantage": "rloo", "samples_per_prompt": 2}, PHASES[1:3], 1),
    "ppo-warmup-ptx": job("ppo", {**PPO, "critic_warmup": 2, "ptx": {"coef": 0.5}}, PHASES[1:3], 0),
    "ppo-kl-stop": job("ppo", {**PPO, "kl_stop": 1e-9}, [[1, "update", 1]], 1),
    "ppo-late-ema": job("ppo", {**PPO, "ema": {"decay": 0.9, "start_step": 1}, "snapshot_every": 1}, PHASES[2:4], 2),
    "ppo-top-k": job("ppo", {**PPO, "top_k": 5, "whiten_rewards": True}, PHASES[:2], 0),
    "ppo-mixed": job(
        "ppo", {**PPO, "precision": "bf16"}, PHASES[1:3], 1, resources={"models": {"critic": {"zero_stage": 3}}}
    ),
    "ppo-offload": job("ppo", PPO, PHASES[1:3], 3, resources={**OFFLOAD, "gradient_checkpointing": True}),
    "sft-packed": job("sft", {**SFT, "epochs": 1}, steps(2), 3, resources={"pack_tokens": 128}),
    "reward-flipped": job("reward", {**REWARD, "flip_labels": 0.2, "train_layers": 1}, steps(3), 1),
    "ppo-every-2": job("ppo", PPO, [[1, "update", 1], [2, "update", 2]], 2, every=2),
}
TWO = [
    "sft-zero0", "sft-zero1", "sft-zero2", "sft-zero3", "sft-dropout", "sft-bf16", "reward-zero3", "dpo-zero0", "dpo-lora",
    "ppo-zero0", "ppo-zero1", "ppo-zero2", "ppo-zero3", "ppo-ema-lora", "ppo-ema-zero3", "ppo-every-2",
]  # fmt: skip


# The rest is for `pytest -m slow`.
USUAL = [
    "sft-zero0", "sft-zero3", "sft-dropout", "sft-bf16", "sft-lora", "sft-every-4", "reward-zero0", "dpo-zero0", "dpo-lora",
    "ppo-zero0", "ppo-zero2", "ppo-zero3", "ppo-ema-lora", "ppo-rloo", "ppo-warmup-ptx", "ppo-every-2",
]  # fmt: skip
USUAL_TWO = ["sft-zero1", "sft-zero3", "dpo-zero0", "ppo-zero0", "ppo-zero3", "ppo-ema-lora"]


def runs(world: int, labels: list[str]) -> Any:
    """A fixture: what comes of those jobs on so many processes."""

    @pytest.fixture(scope="module")
    def found(tiny_root, tmp_path_factory):
        out = tmp_path_factory.mktemp(f"resume-{world}")
        jobs = {label: ALL[label] for label in labels}
        return ranks.run(world, "resumed", out, 500, "resume_scenarios.py", root=str(tiny_root), jobs=jobs)

    return found


alone, alone_rest = runs(1, USUAL), runs(1, [label for label in ALL if label not in USUAL])
together, together_rest = runs(2, USUAL_TWO), runs(2, [label for label in TWO if label not in USUAL_TWO])


# What SIGTERM meets: [rank or all, token or point of the stage, which of them], and where the stage is saved then.
TOLD: dict[str, tuple[dict[str, Any], list[Any], str]] = {
    "sft-told": (job("sft", SFT, [], 2), [None, "point", 5], "step 5"),
    "sft-one-told": (job("sft", SFT, [], 3), [1, "point", 6], "step 6"),
    "ppo-told-in-rollout": (job("ppo", PPO, [], 1), [None, "token", 9], "rollout 1"),
    "ppo-one-told-in-rollout": (job("ppo", PPO, [], 2), [1, "token", 9], "rollout 1"),
    "ppo-told-in-score": (job("ppo", PPO, [], 1), [None, "token", 7], "rollout 0, to be scored"),
    "ppo-told-in-update": (job("ppo", PPO, [], 1), [0, "point", 5], "rollout 0, update 3"),
    "ppo-zero3-told": (job("ppo", PPO, [], 3), [None, "point", 8], "rollout 1, to be scored"),
}


@pytest.fixture(scope="module")
def told(tiny_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("told")
    jobs = {label: {**job, "term": term} for label, (job, term, _) in TOLD.items()}
    return ranks.run(2, "preempted", out, 400, "resume_scenarios.py", root=str(tiny_root), jobs=jobs)


@pytest.mark.parametrize("label", TOLD)
def test_a_stage_that_is_told_to_end_saves_where_it_is_and_goes_on_there(told, label):
    *_, where = TOLD[label]
    assert told[label]["message"] == f"received SIGTERM; saved at {where}"
    assert told[label]["same"] == [True, True]


def check(found: dict[str, Any], label: str) -> None:
    result = found[label]
    assert len(result["saved"]) >= 2
    if "every" not in ALL[label]:  # older attempts' checkpoints are removed as the last one makes its own
        assert result["saved"] == result["positions"][-len(result["saved"]) :], "a point was left out or passed twice"
    assert result["different"] == [], "weights, moments or the average differ"
    assert result["rows"][0] and result["rows"][1] >= 3, "metrics differ"
    assert result["weights"][0] and result["weights"][1], "the models written differ"


@pytest.mark.parametrize("label", USUAL)
def test_on_one_process_a_resumed_stage_has_the_bits_of_an_undisturbed_one(alone, label):
    check(alone, label)


@pytest.mark.parametrize("label", USUAL_TWO)
def test_on_two_processes_a_resumed_stage_has_the_bits_of_an_undisturbed_one(together, label):
    check(together, label)


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label in ALL if label not in USUAL])
def test_on_one_process_other_settings_have_the_bits_of_an_undisturbed_run(alone_rest, label):
    check(alone_rest, label)


@pytest.mark.slow
@pytest.mark.parametrize("label", [label for label in TWO if label not in USUAL_TWO])
def test_on_two_processes_other_settings_have_the_bits_of_an_undisturbed_run(together_rest, label):
    check(together_rest, label)


def test_checkpoints_are_made_by_steps_and_milestones_and_only_some_are_kept(tiny_root, tmp_path):
    plan = {"every_minutes": None, "every_steps": 1, "milestone_steps": 2, "keep": 1}
    arguments = {"root": str(tiny_root), "name": "cadence-steps", "plan": plan}
    found = ranks.run(2, "cadence", tmp_path, 120, "resume_scenarios.py", **arguments)
    assert found == {"saved": 5, "steps": [2, 4, 5], "kept": [2, 4], "parts not listed": 0}


def test_what_follows_the_last_step_cannot_lose_steps_that_a_plan_by_steps_had_not_saved(tiny_root, tmp_path):
    plan = {"every_minutes": None, "every_steps": 3, "keep": 2}
    arguments = {"root": str(tiny_root), "name": "cadence-last", "plan": plan}
    found = ranks.run(1, "cadence", tmp_path, 120, "resume_scenarios.py", **arguments)
    assert found["steps"] == [3, 5]


def test_checkpoints_are_made_by_minutes_and_none_without_a_plan(tiny_root, tmp_path):
    arguments = {"root": str(tiny_root), "name": "cadence-now", "plan": {"every_minutes": 1e-6}}
    found = ranks.run(1, "cadence", tmp_path / "now", 120, "resume_scenarios.py", **arguments)
    assert 1 <= found["saved"] <= 5 and len(found["steps"]) == min(2, found["saved"])
    arguments = {"root": str(tiny_root), "name": "cadence-never", "plan": {"every_minutes": None}}
    found = ranks.run(1, "cadence", tmp_path / "never", 120, "resume_scenarios.py", **arguments)
    assert found == {"saved": 0, "steps": [], "kept": [], "parts not listed": 0}


def test_only_what_has_changed_is_stored_again(tiny_root, tmp_path):
    seen = ranks.run(1, "uploads", tmp_path, 120, "resume_scenarios.py", root=str(tiny_root))
    engines = [[where, name] for where, name in seen if name.endswith("/rank-000.safetensors") and "state/" not in name]
    assert engines == [
        ["rollout 0, to be scored", "actor/rank-000.safetensors"],
        ["rollout 0, to be scored", "critic/rank-000.safetensors"],
        ["rollout 1", "critic/rank-000.safetensors"],
        ["rollout 2", "critic/rank-000.safetensors"],
        ["rollout 3", "actor/rank-000.safetensors"],
        ["rollout 3", "critic/rank-000.safetensors"],
    ], "the actor does not move at first, and neither model does while answers are scored"


@pytest.mark.parametrize(
    "harm",
    [
        "content",
        "marker",
        pytest.param("record", marks=pytest.mark.slow),
        pytest.param("missing", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tiny_root, tmp_path, harm):
    arguments = {"root": str(tiny_root), "name": f"damaged-{harm}", "harm": harm}
    found = ranks.run(2, "damaged", tmp_path, 180, "resume_scenarios.py", **arguments)
    assert found["resumed"] == ["resumed from step 3 (attempt 1)"]
    assert found["passed over"] == 1 and found["same"]


def test_without_a_whole_checkpoint_the_stage_starts_from_its_beginning_and_says_so(tiny_root, tmp_path):
    arguments = {"root": str(tiny_root), "name": "damaged-all", "harm": "everything"}
    found = ranks.run(2, "damaged", tmp_path, 180, "resume_scenarios.py", **arguments)
    assert found == {"resumed": [], "passed over": 2, "from the beginning": 1, "same": True}


def test_half_the_micro_batch_takes_up_a_checkpoint_and_changes_no_loss_beyond_rounding(tiny_root, tmp_path):
    """What the control plane does after an attempt that ran out of memory."""
    sizes = {"micro_batch": 4, "rollout_micro_batch": 8}
    jobs = {
        "sft": job("sft", {**SFT, "epochs": 1}, steps(3), 2, resources=sizes),
        "ppo": job("ppo", PPO, [[1, "update", 1]], 1, resources=sizes),
    }
    found = ranks.run(1, "halved", tmp_path, 200, "resume_scenarios.py", root=str(tiny_root), jobs=jobs)
    for label, (whole, cut) in found.items():
        names = (
            ("loss", "grad_norm", "tokens") if label == "sft" else ("score", "kl_sequence", "actor_loss", "critic_loss")
        )
        assert len(whole) == len(cut) and whole != cut, "bits differ, as sums are taken in another order"
        trained = [pair for pair in zip(whole, cut, strict=True) if pair[0]["kind"] == "train"]
        assert len(trained) >= 3
        for undisturbed, resumed in trained:
            for name in names:
                assert resumed[name] == pytest.approx(undisturbed[name], rel=1e-3, abs=1e-4), (label, name)


# --- copies on the machine itself ------------------------------------------------------------------------------------

OWN = ["model/rank-001.safetensors", "state/rank-001.json"]
# What happens between two attempts, and which parts each rank fetches then.
HARM: dict[str, list[list[str]]] = {
    "copies-store-damaged": [[], []],
    "copies-damaged": [[], ["model/rank-001.safetensors"]],
    "copies-moved": [[], OWN],
    "copies-killed": [[], []],
}


def copies_of(machine: Path, label: str) -> dict[str, Path]:
    """What a machine keeps of an interrupted stage, by checkpoint and checksum."""
    (folder,) = machine.glob(f"rlhf-cache-*/checkpoints/sft-{label}-*")
    return {str(path.relative_to(folder)): path for path in folder.glob("*/*")}


def markers_of(root: Path, label: str) -> list[Checkpoint]:
    """Checkpoints of an interrupted stage, the newest first."""
    store = Store(f"file://{root}/store")
    keys = [
        key for key in store.list("sft") if f"/{label}-" in key and key.endswith(".json") and "/checkpoints/" in key
    ]
    return [checkpoints.marker_at(store, key) for key in sorted(keys, reverse=True)]


@pytest.fixture(scope="module")
def taken_up(tiny_root, tmp_path_factory):
    out, machine = tmp_path_factory.mktemp("copies"), tmp_path_factory.mktemp("machine")
    others = [label for label in HARM if label != "copies-killed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(machine))
        arguments: dict[str, Any] = {"root": str(tiny_root), "labels": others, "killed": "copies-killed"}
        ranks.run(2, "leave_copies", out / "first", 120, "resume_scenarios.py", [-9, -9], **arguments)
        kept = {label: copies_of(machine, label) for label in HARM}
        listed = {label: markers_of(tiny_root, label) for label in HARM}
        store, (newest, *_) = Store(f"file://{tiny_root}/store"), listed["copies-store-damaged"]
        for part in newest.parts:
            store.write(newest.part_key(part), bytes(part.size))
        (damaged,) = [p.sha256 for p in listed["copies-damaged"][0].parts if p.name == "model/rank-001.safetensors"]
        for path in kept["copies-damaged"].values():
            if path.name == damaged:
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 4
                path.write_bytes(data)
        arguments = {"root": str(tiny_root), "labels": list(HARM), "moved": "copies-moved"}
        found = ranks.run(2, "take_up_copies", out / "second", 180, "resume_scenarios.py", **arguments)
    return found, kept, listed


@pytest.mark.parametrize("label", HARM)
def test_a_node_takes_its_own_copies_and_fetches_only_what_it_lacks_of_its_own_ranks(taken_up, label):
    found, *_ = taken_up
    assert found[label] == {"fetched": HARM[label], "left": False, "same": True}


@pytest.mark.parametrize("label", HARM)
def test_of_an_interrupted_stage_the_newest_checkpoints_stay_on_the_machine_and_nothing_else(taken_up, label):
    _, kept, listed = taken_up
    assert [marker.position.step for marker in listed[label]] == [4, 3]
    wanted = {
        f"{marker.attempt:06d}-{marker.position.mark}/{part.sha256}"
        for marker in listed[label]
        for part in marker.parts
    }
    assert set(kept[label]) == wanted


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of its own of 96 MB; skips where none can be made."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"needs a disk of its own: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a log may still be open


def test_a_disk_that_fills_up_costs_the_copies_and_no_checkpoint(tiny_root, small_disk, monkeypatch):
    """A snapshot is 5 MB here, and 2 MB are left for the third."""
    monkeypatch.setenv("TMPDIR", str(small_disk))
    out = small_disk / "out"
    found = ranks.run(1, "no_room_for_copies", out, 120, "resume_scenarios.py", root=str(tiny_root), fill=True)
    assert found == {"copies": [0, 1, 2, 0, 0], "saved": 5}
    assert (out / "rank-0.log").read_text().count("the disk would be too full") == 1


def test_nothing_is_copied_beyond_the_limit_of_the_cache(tiny_root, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("RLHF_CACHE_GB", "0")
    found = ranks.run(1, "no_room_for_copies", tmp_path, 120, "resume_scenarios.py", root=str(tiny_root), fill=False)
    assert found == {"copies": [0, 0, 0, 0, 0], "saved": 5}
    assert (tmp_path / "rank-0.log").read_text().count("RLHF_CACHE_GB") == 1
