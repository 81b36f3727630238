"""`PPOArgs`: all that PPO needs to know, from our own specs or from a DeepSpeed-Chat argument namespace.

`args` of the library's classes may be a `PPOArgs`, a `PPOSpec`, or any mapping or namespace with some fields of `PPOSpec` or
`Resources`, or DeepSpeed-Chat's names for them; what is missing has its default, and fields that mean nothing here (paths,
logging) are passed over. A wrong value is an error that names it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.errors import ConfigError
from rlhf_core.resources import Resources
from rlhf_core.specs import OptimSpec, PPOSpec

DEFAULT_RESPONSE_TOKENS = 256

# DeepSpeed-Chat's argument -> ours; "actor_optim.lr" is a field of a field.
CHAT_NAMES = {
    "lr_scheduler_type": "schedule",
    "num_warmup_steps": "warmup_steps",
    "actor_learning_rate": "actor_optim.lr",
    "critic_learning_rate": "critic_optim.lr",
    "actor_weight_decay": "actor_optim.weight_decay",
    "critic_weight_decay": "critic_optim.weight_decay",
    "max_answer_seq_len": "max_response_tokens",
    "per_device_training_batch_size": "micro_batch",
    "per_device_generation_batch_size": "rollout_micro_batch",
    "dtype": "precision",
    "kl_ctl": "kl_coef",
    "clip_reward_value": "score_clip",
    "cliprange": "clip",
    "cliprange_value": "value_clip",
    "actor_zero_stage": "models.actor.zero_stage",
    "critic_zero_stage": "models.critic.zero_stage",
    "actor_gradient_checkpointing": "models.actor.gradient_checkpointing",
    "critic_gradient_checkpointing": "models.critic.gradient_checkpointing",
}
# Its schedules with its settings (one cycle, power 1) under our names; warm-up is a field of its own.
CHAT_SCHEDULES = {"cosine_with_restarts": "cosine", "polynomial": "linear", "constant_with_warmup": "constant"}
FROZEN = {"reference": "actor", "reward": "critic"}  # a frozen model is partitioned like the one it stands beside


@dataclass(frozen=True)
class PPOArgs:
    """All that PPO needs to know: the algorithm, the resources, the seed."""

    spec: PPOSpec = PPOSpec()
    resources: Resources = Resources()
    seed: int = 0

    @property
    def max_response_tokens(self) -> int:
        """Longest answer, tokens."""
        return self.spec.max_response_tokens or DEFAULT_RESPONSE_TOKENS


def ppo_args(args: Any = None) -> PPOArgs:
    """`PPOArgs` from one, from a `PPOSpec`, from a mapping or namespace with some of the fields, or from None."""
    if isinstance(args, PPOArgs):
        return args
    if isinstance(args, PPOSpec):
        return PPOArgs(spec=args, seed=args.seed or 0)
    raw: dict[str, Any] = dict(args) if isinstance(args, Mapping) else dict(vars(args)) if args is not None else {}
    given = {CHAT_NAMES.get(name, name): value for name, value in raw.items() if value is not None}
    chat = _chat_switches(given)
    spec = {k: v for k, v in given.items() if k in PPOSpec.model_fields}
    resources = {k: v for k, v in given.items() if k in Resources.model_fields}
    try:
        return PPOArgs(
            spec=PPOSpec.model_validate({**chat, **spec, **_optims(given)}),
            resources=Resources.model_validate({**resources, "models": _models(given)}),
            seed=int(given.get("seed", 0)),
        )
    except ValueError as error:
        raise ConfigError(f"args: {error}") from None


def _optims(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Actor's and critic's optimizer: DeepSpeed-Chat names one schedule for both."""
    optims: dict[str, dict[str, Any]] = {}
    for role in ("actor_optim", "critic_optim"):
        base = given.get(role) or PPOSpec.model_fields[role].default
        optims[role] = base.model_dump() if isinstance(base, OptimSpec) else dict(base)
        for name in ("schedule", "warmup_steps", "lr", "weight_decay"):
            value = given.get(f"{role}.{name}", given.get(name) if name in ("schedule", "warmup_steps") else None)
            if value is not None:
                optims[role][name] = CHAT_SCHEDULES.get(value, value) if name == "schedule" else value
    return optims


def _models(given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the four models' memory settings have of their own, from DeepSpeed-Chat's flags."""
    own: dict[str, dict[str, Any]] = {role: dict(fields) for role, fields in (given.get("models") or {}).items()}
    for role in ("actor", "critic"):
        for name in ("zero_stage", "gradient_checkpointing"):
            if f"models.{role}.{name}" in given:
                own.setdefault(role, {})[name] = given[f"models.{role}.{name}"]
        stage = own.get(role, {}).get("zero_stage", given.get("zero_stage", 0))
        if given.get("offload") and stage:
            own.setdefault(role, {})["offload_optimizer"] = "cpu"
            if stage == 3:
                own[role]["offload_parameters"] = "cpu"
    for role, beside in FROZEN.items():
        stage = own.get(beside, {}).get("zero_stage", given.get("zero_stage"))
        if stage is not None:
            own.setdefault(role, {})["zero_stage"] = 3 if stage == 3 else 0
        if given.get(f"offload_{role}_model") and stage == 3:
            own[role]["offload_parameters"] = "cpu"
    return own


def _chat_switches(given: Mapping[str, Any]) -> dict[str, Any]:
    """What DeepSpeed-Chat switches by flags and we by sections: LoRA, EMA, the mixture loss."""
    found: dict[str, Any] = {}
    for role in ("actor", "critic"):
        rank = given.get(f"{role}_lora_dim")
        if rank:
            # DeepSpeed-Chat scales the adapters by 1 / rank and trains embeddings, norms and biases beside them.
            extra = () if given.get("only_optimize_lora") else ("embeddings", "norms", "biases")
            lr = given.get(f"{role}_lora_learning_rate")
            found[f"{role}_lora"] = {"rank": rank, "alpha": 1.0, "lr": lr, "also_train": extra}
    if given.get("enable_ema"):
        found["ema"] = {"decay": 0.992}
    if given.get("unsupervised_dataset_name") and given.get("unsup_coef"):
        found["ptx"] = {"coef": given["unsup_coef"]}
    return found
