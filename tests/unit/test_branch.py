"""Branches: which settings may change in the middle of a course, and from which checkpoints one can go on."""

import hashlib

import pytest
from commands import small_pipeline

from rlhf_core.branch import CHANGEABLE, branch_of, plant
from rlhf_core.checkpoints import Checkpoint, Part, Position
from rlhf_core.config import changed, load_config
from rlhf_core.errors import ConfigError, IntegrityError
from rlhf_core.plan import make_plan, stage_refs
from rlhf_core.sealed import seal
from rlhf_core.specs import STAGES, PPOSpec
from rlhf_core.store import Store
from tasks.stage import job_of


@pytest.fixture
def config(tmp_path):
    return load_config(small_pipeline(tmp_path))


@pytest.fixture
def store(config) -> Store:
    return Store(config.store)


def save(store: Store, artifact: str, position: Position, attempt: int = 1) -> Checkpoint:
    data = f"{artifact} at {position}".encode()
    part = Part(name="state/rank-000.json", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    marker = Checkpoint(artifact=artifact, attempt=attempt, position=position, kept=True, world=1, parts=(part,))
    store.write(marker.part_key(part), data)
    store.write(marker.key, seal(marker))
    return marker


@pytest.fixture
def ppo(config, store) -> str:
    """The id of a PPO artifact with checkpoints at rollouts 10 and 20, and one in the middle of 30."""
    id = stage_refs(config)["ppo"].id
    for position in (
        Position(step=10, phase="rollout"), Position(step=20, phase="rollout"), Position(step=30, phase="update", update=2)
    ):  # fmt: skip
        save(store, id, position)
    return id


def job(config, store, stage: str = "ppo"):
    [planned] = [each for each in make_plan(config, store) if each.stage == stage]
    return job_of(store, config, planned)


def test_a_branch_is_an_artifact_of_its_own_made_of_the_same_inputs(config, store, ppo):
    made = branch_of(config, "ppo", 20, ["ppo.kl_coef=0.1"], store)
    assert made.ppo.branch and (made.ppo.branch.artifact, made.ppo.branch.step) == (ppo, 20)
    before, after = stage_refs(config), stage_refs(made)
    assert [stage for stage in config.stages if before[stage] != after[stage]] == ["ppo", "evaluate"]
    refs = {stage_refs(branch_of(config, "ppo", step, (), store))["ppo"].id for step in (10, 20)}
    assert len({*refs, before["ppo"].id, after["ppo"].id}) == 4


def test_what_may_change_are_fields_of_the_stages(config):
    for stage, names in CHANGEABLE.items():
        assert stage in STAGES
        for name in names:
            spec = getattr(config, stage)
            for part in name.split("."):
                assert part in type(spec).model_fields, f"{stage}.{name}"
                spec = getattr(spec, part)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("ppo.rollout_batch_size=32", "ppo.rollout_batch_size: cannot change in the middle .* these can: .*kl_coef"),
        ("ppo.seed=7", "ppo.seed: cannot change"),
        ("ppo.actor_lora={rank: 4}", "ppo.actor_lora.*: cannot change"),
        ("sft.optim.lr=1e-3", "sft: what is set changes this stage"),
        ("method=dpo", "method: a branch is a part of the same pipeline"),
        ("ppo.steps=20", "ppo.steps 20: the checkpoint is at 20 already"),
    ],
)
def test_what_may_not_change_is_named(config, store, ppo, override, complaint):
    with pytest.raises(ConfigError, match=complaint):
        branch_of(config, "ppo", 20, [override], store)


def test_an_adaptive_controllers_coefficient_is_state_and_its_target_a_setting(config, store):
    config = changed(config, ["ppo.kl_controller=adaptive"])
    save(store, stage_refs(config)["ppo"].id, Position(step=20, phase="rollout"))
    assert branch_of(config, "ppo", 20, ["ppo.kl_target=3"], store).ppo.kl_target == 3
    with pytest.raises(ConfigError, match=r"ppo\.kl_coef: cannot change"):
        branch_of(config, "ppo", 20, ["ppo.kl_coef=0.1"], store)


def test_a_step_without_a_checkpoint_is_told_with_those_that_there_are(config, store, ppo):
    for step in (15, 30):  # at 30 there is one with a rollout in it that was made with the settings that are left
        with pytest.raises(ConfigError, match=f"no checkpoint at step {step}; there are: 10, 20. .*milestone_steps"):
            branch_of(config, "ppo", step, (), store)
    with pytest.raises(ConfigError, match="there are: none"):
        branch_of(config, "sft", 10, (), store)
    with pytest.raises(ConfigError, match="evaluate trains nothing"):
        branch_of(config, "evaluate", 10, (), store)


def test_the_checkpoint_is_copied_once_and_the_copy_is_whole_without_the_original(config, store, ppo):
    made = branch_of(config, "ppo", 20, (), store)
    request = job(made, store)
    plant(store, request)
    for key in store.list(ppo):
        store.delete(key)
    [planned] = [each for each in make_plan(made, store) if each.stage == "ppo"]
    assert (planned.action, planned.why) == ("resume", "from rollout 20 (attempt 1)")
    before = store.list("")
    plant(store, request.model_copy(update={"attempt": 2}))  # it has one of its own by now
    assert store.list("") == before


def test_a_branch_never_begins_from_nothing(config, store, ppo):
    made = branch_of(config, "ppo", 20, (), store)
    marker = save(store, ppo, Position(step=20, phase="rollout"), attempt=2)
    store.write(marker.part_key(marker.parts[0]), b"x" * marker.parts[0].size)
    with pytest.raises(IntegrityError, match="content differs"):
        plant(store, job(made, store))
    for key in store.list(ppo):
        store.delete(key)
    with pytest.raises(ConfigError, match="no checkpoint at step 20"):
        plant(store, job(made, store))
    assert not any("/checkpoints/" in key for key in store.list(stage_refs(made)["ppo"].id))


def test_a_branch_leaves_a_stage_of_its_own_kind(config, store, ppo):
    made = changed(config, [f"sft.branch={{artifact: {ppo}, step: 20}}"])
    with pytest.raises(ConfigError, match=r"sft\.branch\.artifact: ppo/small-\w+ is not of this stage"):
        plant(store, job(made, store, "sft"))


def test_a_stage_without_a_branch_is_left_alone(config, store):
    assert PPOSpec().branch is None
    plant(store, job(config, store))
    assert store.list("") == {}
