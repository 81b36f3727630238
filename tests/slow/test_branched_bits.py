"""Branches of real stages: without a change the same bits as the course that was left, with one another course from there on."""

import json
from pathlib import Path

import pytest
import tiny

from rlhf_core.artifacts import Manifest
from rlhf_core.branch import branch_of, plant
from rlhf_core.config import PipelineConfig, parse_config
from rlhf_core.plan import make_plan
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from tasks.stage import build_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PipelineConfig:
    """A pipeline of seconds whose stages keep a checkpoint in their middle."""
    return parse_config(
        {
            **tiny.pipeline(tmp_path_factory.mktemp("branches")),
            "sft": {"max_steps": 6, "optim": {"lr": 1e-3}},
            "reward": {"max_steps": 4},
            "ppo": {"steps": 6, "rollout_batch_size": 8, "max_response_tokens": 8, "actor_optim": {"lr": 1e-3}},
            "resources": {"threads": 1, "checkpoint": {"milestone_steps": 3}},
        }
    )


def run(config: PipelineConfig, last: StageName) -> Manifest:
    """The stages up to `last`; its manifest."""
    store = Store(config.store)
    for planned in make_plan(config, store):
        made = build_stage(store, config, planned).manifest
        if planned.stage == last:
            return made
    raise AssertionError(last)


def weights(manifest: Manifest) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in manifest.files if entry.path.endswith(".safetensors")}


def course(config: PipelineConfig, manifest: Manifest) -> list[dict]:
    """What was logged at each step, without times."""
    place = Store(config.store).local_path(manifest.key("metrics.jsonl"))
    rows = [json.loads(line) for line in Path(str(place)).read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k and "per_second" not in k} for row in rows]


@pytest.mark.parametrize(("stage", "change"), [("sft", "sft.optim.lr=1e-4"), ("ppo", "ppo.kl_coef=0.5")])
def test_a_branch_has_the_bits_of_what_it_leaves_until_a_setting_differs(config, stage: StageName, change: str):
    store = Store(config.store)
    left = run(config, stage)
    same = run(branch_of(config, stage, 3, (), store), stage)
    assert same.ref.id != left.ref.id and same.provenance["job"]["resumed"][-1]["attempt"] == 1
    assert weights(same) == weights(left) and weights(left)
    assert course(config, same) == course(config, left)
    other = run(branch_of(config, stage, 3, [change], store), stage)
    assert weights(other) != weights(left)
    rows, before = course(config, other), course(config, left)
    assert [row for row in rows if row["step"] <= 3] == [row for row in before if row["step"] <= 3]
    assert rows != before
    if stage == "ppo":
        assert [row["kl_coef"] for row in rows if row["kind"] == "train"] == 3 * [0.05] + 3 * [0.5]


def test_a_branch_whose_checkpoint_is_damaged_fails_and_does_not_begin_anew(config):
    from rlhf_core.errors import JobFailed
    from tasks.stage import job_of

    store = Store(config.store)
    run(config, "sft")
    made = branch_of(config, "sft", 3, ["sft.optim.lr=1e-5"], store)
    [planned] = [each for each in make_plan(made, store) if each.stage == "sft"]
    plant(store, job_of(store, made, planned))
    for key, size in store.list(f"{planned.ref.id}/checkpoints/0001/parts").items():
        store.write(key, b"x" * size)
    with pytest.raises(JobFailed, match="a branch begins from a checkpoint"):
        build_stage(store, made, planned)
