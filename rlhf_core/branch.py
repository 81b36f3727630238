"""Branches: a stage that goes on from another one's checkpoint with changed settings.

A branch is an artifact of its own: `branch` in its spec, the id of what it leaves and the step, is part of its fingerprint; so
reuse and resume are those of any stage. Before its first job the checkpoint is copied into its own folder as its attempt's; from
there on it needs nothing of the artifact it has left, which may be removed. What may change in the middle of a course is listed
(`CHANGEABLE`): what shapes the model, the order of the data or the counting of steps may not, as the checkpoint is full of them.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from rlhf_core import checkpoints
from rlhf_core.canonical import differences
from rlhf_core.checkpoints import Checkpoint
from rlhf_core.config import PipelineConfig, changed
from rlhf_core.errors import ConfigError, IntegrityError
from rlhf_core.job import JobSpec
from rlhf_core.layout import is_marker
from rlhf_core.plan import stage_identity, stage_refs
from rlhf_core.sealed import seal
from rlhf_core.specs import BranchSpec, StageName
from rlhf_core.store import Store

OPTIM = ("lr", "schedule", "warmup_steps", "min_lr_ratio", "max_grad_norm")
ROWS = ("epochs", "max_steps", "eval_every", *(f"optim.{name}" for name in OPTIM))
CHANGEABLE: dict[StageName, tuple[str, ...]] = {
    "sft": ROWS,
    "reward": (*ROWS, "center_coef"),
    "dpo": (*ROWS, "beta", "label_smoothing"),
    "ppo": (
        "steps", "temperature", "top_k", "top_p", "kl_coef", "kl_target", "kl_horizon", "kl_stop", "score_clip",
        "missing_eos_penalty", "missing_eos", "whiten_rewards", "gamma", "lam", "whiten_advantages", "clip", "value_clip",
        "clip_high", "dual_clip", "entropy_coef", "snapshot_every",
        *(f"{side}_optim.{name}" for side in ("actor", "critic") for name in OPTIM),
    ),
}  # fmt: skip


def branch_of(
    config: PipelineConfig, stage: StageName, step: int, overrides: Iterable[str], store: Store
) -> PipelineConfig:
    """The configuration of a branch.

    Args:
        config: of what it leaves.
        stage: that it branches in; the stages before it are the same, those after it are made of the branch.
        step: of the checkpoint.
        overrides: what changes, as after `--set`.
        store: where the checkpoint is.

    Raises:
        ConfigError: there is no such checkpoint, or an override may not change in the middle of a course.
    """
    if stage not in CHANGEABLE:
        raise ConfigError(
            f"stage {stage} trains nothing and has no checkpoints to branch from: {', '.join(CHANGEABLE)}"
        )
    refs = stage_refs(config)
    checkpoint_at(store, refs[stage].id, step)
    place = f"{stage}.branch={{artifact: {refs[stage].id}, step: {step}}}"
    made = changed(config, [*overrides, place], "branch")
    if made.stages != config.stages:
        raise ConfigError("method: a branch is a part of the same pipeline; start another run for another method")
    after = stage_refs(made)
    for before in config.stages[: config.stages.index(stage)]:
        if after[before] != refs[before]:
            raise ConfigError(f"{before}: what is set changes this stage, which the checkpoint of {stage} is made of")
    changes = differences(stage_identity(config, stage), stage_identity(made, stage))
    wrong = [path for path in changes if not _may_change(config, stage, path)]
    if wrong:
        raise ConfigError(
            f"{', '.join(f'{stage}.{path}' for path in wrong)}: cannot change in the middle of a course, as the checkpoint "
            f"depends on it; of {stage} these can: {', '.join(CHANGEABLE[stage])}"
        )
    if stage == "ppo" and made.ppo.steps <= step:
        raise ConfigError(f"ppo.steps {made.ppo.steps}: the checkpoint is at {step} already; set more")
    return made


def _may_change(config: PipelineConfig, stage: StageName, path: str) -> bool:
    if path == "kl_coef" and config.ppo.kl_controller == "adaptive":
        return False  # part of the controller's state: its target may change
    return path.startswith("branch.") or path in CHANGEABLE[stage]


def checkpoint_at(store: Store, artifact: str, step: int) -> Checkpoint:
    """The whole checkpoint of an artifact, known by its id, right after a step.

    Raises:
        ConfigError: there is none; the message names those that there are.
    """
    known: list[int] = []
    keys = [key for key in store.list(f"{artifact}/checkpoints") if is_marker(key.removeprefix(f"{artifact}/"))]
    for key in sorted(keys, reverse=True):  # of equal ones the later attempt's
        try:
            found = checkpoints.marker_at(store, key)
            checkpoints.check(store, found, checksums=False)
        except (IntegrityError, KeyError):
            continue
        if found.position.phase not in ("train", "rollout"):
            continue  # in the midst of a rollout that was made with the settings that are left
        if found.position.step == step:
            return found
        known.append(found.position.step)
    there = ", ".join(map(str, sorted(set(known)))) or "none"
    raise ConfigError(
        f"{artifact} has no checkpoint at step {step}; there are: {there}. Of a finished stage only milestones stay: "
        "set resources.checkpoint.milestone_steps before it runs"
    )


def plant(store: Store, job: JobSpec, tell: Callable[[str], None] = lambda _: None) -> None:
    """Give a branch that has no checkpoint yet the one it begins from, copied, as its attempt's own; who holds its lease may.

    Raises:
        ConfigError: it is gone, or of another stage.
        IntegrityError: it is damaged.
        StoreError: it could not be copied.
    """
    if not job.spec.get("branch") or checkpoints.newest(store, job.output, since=job.since):
        return
    branch = BranchSpec.model_validate(job.spec["branch"])
    if branch.artifact.partition("/")[0] != job.stage:
        raise ConfigError(
            f"{job.stage}.branch.artifact: {branch.artifact} is not of this stage; name one of {job.stage}/"
        )
    origin = checkpoint_at(store, branch.artifact, branch.step)
    checkpoints.check(store, origin)
    own = origin.model_copy(update={"artifact": job.output.id, "attempt": job.attempt, "kept": False})
    try:
        with tempfile.TemporaryDirectory() as scratch:
            for part in origin.parts:
                local = Path(scratch) / "part"
                store.download(origin.part_key(part), local)
                store.upload(local, own.part_key(part))
    except KeyError:
        raise IntegrityError(f"{store.url}/{origin.key}: removed while a branch was taking a copy; try again") from None
    checkpoints.check(store, own)
    store.write(own.key, seal(own))
    tell(f"{job.stage}: branches off {branch.artifact} at {origin.position}")
