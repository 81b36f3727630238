"""The plan: for each stage its artifact id, whether it is there already, and if not, why it will be built or from where resumed.

The flow and `rlhf plan` both work from here, so what was announced is what happens. Ids depend only on specs, digests of
outside inputs, and upstream ids; so the whole plan is known before anything runs.
"""

from typing import Any

from rlhf_core.artifacts import ArtifactRef, Manifest, list_manifests, make_ref, read_manifest, retired_before
from rlhf_core.canonical import differences
from rlhf_core.checkpoints import newest
from rlhf_core.config import PipelineConfig
from rlhf_core.sources import Digest, content_id, data_identity, model_identity, rewards_identity
from rlhf_core.specs import Frozen, StageName
from rlhf_core.store import Store


def stage_inputs(config: PipelineConfig, stage: StageName) -> tuple[StageName, ...]:
    """The stages whose artifacts a stage reads."""
    before: dict[StageName, tuple[StageName, ...]] = {
        "data": (),
        "sft": ("data",),
        "reward": ("data", "sft"),
        "ppo": ("data", "sft", "reward"),
        "dpo": ("data", "sft"),
        "evaluate": ("data", "sft", "reward", "ppo", "dpo"),
    }
    return tuple(name for name in before[stage] if name in config.stages)


class StagePlan(Frozen):
    """What will happen to one stage."""

    stage: StageName
    ref: ArtifactRef
    action: str  # "reuse", "build" or "resume"
    why: str
    spec: dict[str, Any]
    identity: dict[str, Any]
    inputs: dict[str, ArtifactRef]


def stage_spec(config: PipelineConfig, stage: StageName) -> dict[str, Any]:
    """The stage's spec as plain JSON with the pipeline's defaults filled in."""
    spec = getattr(config, stage).model_dump(mode="json")
    if spec.get("seed") is None:
        spec["seed"] = config.seed
    if stage in ("ppo", "evaluate") and spec["max_response_tokens"] is None:
        spec["max_response_tokens"] = config.data.max_response_tokens
    return spec


def stage_identity(config: PipelineConfig, stage: StageName, of: Digest = content_id) -> dict[str, Any]:
    """What the fingerprint hashes: the resolved spec, with places replaced by digests.

    The base model is part of the stages that read it: sft starts from it, data takes its tokenizer or samples from it.
    """
    identity = stage_spec(config, stage)
    if stage == "data":
        identity = {**data_identity(config.data, of), "seed": identity["seed"]}
        if config.data.tokenizer.path is None and config.data.tokenizer.train_vocab_size is None:
            identity["model"] = model_identity(config.model, of)
        if config.data.sampled_pairs:
            identity["model"] = model_identity(config.model, of)
    if stage == "sft":
        identity["model"] = model_identity(config.model, of)
    if stage == "reward" and config.reward.model:
        identity["model"] = model_identity(config.reward.model, of, "reward.model.path")
    if stage == "reward" and config.reward.tokenizer and config.reward.tokenizer.path:
        identity["tokenizer"]["path"] = of(config.reward.tokenizer.path, "reward.tokenizer.path")
    if stage == "ppo" and config.ppo.rewards:
        identity["rewards"] = rewards_identity(config.ppo.rewards, of)
    return identity


def stage_refs(config: PipelineConfig, of: Digest = content_id) -> dict[StageName, ArtifactRef]:
    """The artifact ids of all stages, in order."""
    refs: dict[StageName, ArtifactRef] = {}
    for stage in config.stages:
        inputs = {name: refs[name] for name in stage_inputs(config, stage)}
        refs[stage] = make_ref(stage, config.name, stage_identity(config, stage, of), {**inputs})
    return refs


def plan_stage(
    config: PipelineConfig, stage: StageName, refs: dict[StageName, ArtifactRef], store: Store, force: bool = False
) -> StagePlan:
    """Whether one stage is reused, resumed or built, and why."""
    ref = refs[stage]
    identity = stage_identity(config, stage)
    inputs: dict[str, ArtifactRef] = {name: refs[name] for name in stage_inputs(config, stage)}
    manifest, since = read_manifest(store, ref), retired_before(store, ref)
    if force:
        action, why = "build", "forced"
    elif manifest is not None and manifest.attempt >= since:
        action, why = "reuse", f"made {manifest.created}"
    elif checkpoint := newest(store, ref, since=since):
        action, why = "resume", f"from {checkpoint}"
    else:
        action, why = "build", _why(store, stage, identity, inputs)
    return StagePlan(
        stage=stage, ref=ref, action=action, why=why, spec=stage_spec(config, stage), identity=identity, inputs=inputs
    )


def make_plan(config: PipelineConfig, store: Store, force: tuple[str, ...] = ()) -> list[StagePlan]:
    """The plan of the whole pipeline."""
    refs = stage_refs(config)
    return [plan_stage(config, stage, refs, store, stage in force) for stage in refs]


def _why(store: Store, stage: StageName, identity: dict[str, Any], inputs: dict[str, ArtifactRef]) -> str:
    """The nearest published artifact of the stage and what differs from it."""
    if branch := identity.get("branch"):
        return f"branches off {branch['artifact']} at step {branch['step']}"
    nearest: tuple[int, Manifest, list[str]] | None = None
    for manifest in list_manifests(store, stage):
        changes = differences(manifest.spec, identity)
        reasons = [f"{path}: {old} -> {new}" for path, (old, new) in changes.items()]
        for name, ref in inputs.items():
            before = manifest.inputs.get(name)
            if before is None or before.fingerprint != ref.fingerprint:
                reasons.append(f"input {name} changed")
        if nearest is None or len(reasons) <= nearest[0]:
            nearest = (len(reasons), manifest, reasons)
    if nearest is None:
        return "first of its kind in this store"
    _, manifest, reasons = nearest
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    return f"nearest {manifest.ref.id}: {shown or 'same definition under another name'}"
