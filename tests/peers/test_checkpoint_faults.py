"""What other RLHF systems lose when they resume, each as a test of ours that fails if we lose it too.

The runs are real: a stage that is stopped, and another attempt that has nothing but the store. `tests/distributed/test_resume.py`
holds the same promise over all stages and layouts. The names of the systems stand in the tests' comments.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from distributed import ranks
from safetensors.torch import load_file

from rlhf_core import checkpoints
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.checkpoints import Checkpoint
from rlhf_core.store import Store

PLAN = {"micro_batch": 4, "rollout_micro_batch": 8, "zero_stage": 1}
JOBS: dict[str, dict[str, Any]] = {
    "fault-sft": {  # 72 rows in batches of 12: the first epoch ends with step 6
        "name": "sft", "resources": PLAN, "stops": [[6, "train", 0]],
        "spec": {"epochs": 2, "batch_size": 12, "optim": {"lr": 1e-3}},
    },
    "fault-ppo": {
        "name": "ppo", "resources": PLAN, "stops": [[1, "update", 1]],
        "spec": {
            "steps": 3, "rollout_batch_size": 8, "ppo_epochs": 1, "minibatches": 2, "max_response_tokens": 6,
            "critic_warmup": 1, "kl_controller": "adaptive", "kl_target": 0.1, "kl_horizon": 50,
            "actor_optim": {"lr": 1e-3}, "critic_optim": {"lr": 1e-3},
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tiny_root, tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("faults")
    return ranks.run(1, "resumed", out, 300, "resume_scenarios.py", root=str(tiny_root), jobs=JOBS)


@pytest.fixture(scope="module")
def marked(outcome, tiny_root) -> dict[str, Checkpoint]:
    """Checkpoints of the undisturbed PPO run by position."""
    store = Store(f"file://{tiny_root}/store")
    (folder,) = (tiny_root / "store" / "ppo").glob("fault-ppo-whole-*")
    ref = ArtifactRef(stage="ppo", name="fault-ppo-whole", fingerprint=folder.name[-12:].ljust(64, "0"))
    found = [checkpoints.read_marker(store, ref, key) for key in checkpoints.marker_keys(store, ref)]
    return {str(marker.position): marker for marker in found}


def part(root: Path, marker: Checkpoint, name: str) -> Path:
    (found,) = [p for p in marker.parts if p.name == name]
    path = Store(f"file://{root}/store").local_path(marker.part_key(found))
    assert path is not None
    return path


def test_a_resume_at_the_end_of_an_epoch_trains_the_next_one(outcome):
    # verl #7401, #7974, #5725: the next epoch is skipped silently
    assert outcome["fault-sft"]["saved"][-1] == "step 12"
    assert outcome["fault-sft"]["rows"] == [True, 14], "12 steps and two evaluations, as undisturbed"


def test_a_resumed_ppo_has_the_optimizers_of_both_models(outcome, marked, tiny_root):
    # NeMo-RL #3171: silently initialised anew; torchtune #1005: one model's hidden in the other's
    for model in ("actor", "critic"):
        state = load_file(part(tiny_root, marked["rollout 2"], f"{model}/rank-000.safetensors"))
        kinds = {key.partition("/")[0] for key in state}
        assert kinds == {"weight", "exp_avg", "exp_avg_sq"}
        assert any(bool(v.any()) for k, v in state.items() if k.startswith("exp_avg_sq/"))
    assert outcome["fault-ppo"]["different"] == [], "moments and weights after the resume"


def test_the_adaptive_kl_coefficient_is_in_the_checkpoint_and_goes_on_from_there(outcome, marked, tiny_root):
    # verl #2653, OpenRLHF, TRL: begins anew from its first value
    record = json.loads(part(tiny_root, marked["rollout 2"], "state/rank-000.json").read_text())
    coefficient = record["record"]["trainer"]["kl_coef"]
    assert coefficient != pytest.approx(0.05) and outcome["fault-ppo"]["rows"][0], (
        "kl_coef is among the metrics compared"
    )


def test_checkpoints_are_made_while_only_the_critic_trains(marked):
    # verl: the save stands inside the branch that updates the actor
    assert {"rollout 0, update 0", "rollout 0, update 1", "rollout 1"} <= set(marked)
    early = {p.name: p.sha256 for p in marked["rollout 0, update 1"].parts}
    late = {p.name: p.sha256 for p in marked["rollout 1"].parts}
    assert early["actor/rank-000.safetensors"] == late["actor/rank-000.safetensors"], "the actor has not moved"
    assert early["critic/rank-000.safetensors"] != late["critic/rank-000.safetensors"]


def test_a_rollout_is_not_thrown_away(outcome, marked, tiny_root):
    # every peer: rollouts, scores and advantages live in memory only
    flight = load_file(part(tiny_root, marked["rollout 1, update 1"], "state/rank-000.safetensors"))
    assert {"response_ids", "logprobs", "ref_logprobs", "values", "scores"} <= set(flight)
    assert outcome["fault-ppo"]["saved"][0] == "rollout 1, update 1", "it went on in the middle of the updates"


def test_the_generators_and_the_place_in_the_data_are_in_the_checkpoint(marked, tiny_root):
    # OpenRLHF #1103 and others: data loader or generators are not restored
    record = json.loads(part(tiny_root, marked["rollout 2"], "state/rank-000.json").read_text())
    assert set(record["generators"]) >= {"python", "numpy", "torch"}
    assert record["record"]["trainer"]["iteration"] == 2 and record["record"]["trainer"]["optimizer_step"] == 4


def test_the_old_checkpoint_is_there_until_the_new_one_is_complete(tmp_path, tiny_root):
    # OpenRLHF deletes before it saves: a crash in between leaves nothing
    saw = ranks.run(1, "deletions", tmp_path, 120, "resume_scenarios.py", root=str(tiny_root))
    assert len(saw) >= 3 and all(complete >= 1 for complete in saw), f"complete checkpoints at each deletion: {saw}"


def test_an_upload_that_fails_is_told_at_the_next_step_and_tried_again(tmp_path, tiny_root):
    # asynchronous savers that only log the error: the stage ends with no checkpoint and nobody knows
    arguments = {"root": str(tiny_root), "name": "fails-twice", "failures": 2}
    found = ranks.run(1, "failing_upload", tmp_path, 120, "resume_scenarios.py", **arguments)
    assert found["error"] == "" and found["steps"] == 5 and found["newest"] == "step 5"
    assert len(found["told"]) == 2 and all("no space left" in text for text in found["told"])


def test_uploads_that_fail_again_and_again_end_the_stage(tmp_path, tiny_root):
    arguments = {"root": str(tiny_root), "name": "fails-for-ever", "failures": 1000}
    found = ranks.run(1, "failing_upload", tmp_path, 120, "resume_scenarios.py", **arguments)
    assert "checkpoint of step 4 could not be stored" in found["error"] and found["newest"] == "step 1"
    assert len(found["told"]) == 3 and found["steps"] == 5


@pytest.mark.skipif(os.cpu_count() == 1, reason="two ranks on one core take too long")
def test_a_rank_that_dies_while_it_stores_its_part_leaves_the_checkpoint_before_it(tmp_path, tiny_root):
    # DeepSpeed at ZeRO-2: rank 0 writes `latest` while another rank's part is still missing
    told = ranks.run(2, "dies_while_storing", tmp_path, 120, "resume_scenarios.py", codes=[0, -9], root=str(tiny_root))
    assert told == {"markers": ["step 1"], "resumes": "step 1"}
