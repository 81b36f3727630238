"""`DeepSpeedRLHFEngine`: the four models of PPO (actor, reference, critic, reward) as DeepSpeed engines.

The name, the arguments and the attributes are DeepSpeed-Chat's. `args` is our `PPOArgs`, a `PPOSpec`, or any namespace with
some fields of `PPOSpec` or `Resources`, or DeepSpeed-Chat's names for them; what is missing has its default, and fields that
mean nothing here are passed over. The reference is a frozen copy of the actor, the critic starts from the reward model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_core.distributed import start
from rlhf_core.engine import frozen_engine, full_state, train_engine
from rlhf_core.errors import ConfigError
from rlhf_core.models import ValueModel, check_positions, load_causal_lm, save_causal_lm, save_value_model
from rlhf_core.resources import Resources
from rlhf_core.specs import OptimSpec, PPOSpec

DEFAULT_RESPONSE_TOKENS = 256

# DeepSpeed-Chat's argument -> ours; "actor_optim.lr" is a field of a field.
CHAT_NAMES = {
    "actor_learning_rate": "actor_optim.lr",
    "critic_learning_rate": "critic_optim.lr",
    "actor_weight_decay": "actor_optim.weight_decay",
    "critic_weight_decay": "critic_optim.weight_decay",
    "lr_scheduler_type": "schedule",
    "num_warmup_steps": "warmup_steps",
    "max_answer_seq_len": "max_response_tokens",
    "per_device_training_batch_size": "micro_batch",
    "per_device_generation_batch_size": "rollout_micro_batch",
    "dtype": "precision",
    "actor_zero_stage": "zero_stage",
    "actor_gradient_checkpointing": "gradient_checkpointing",
}


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
    given = dict(args) if isinstance(args, Mapping) else dict(vars(args)) if args is not None else {}
    given = {CHAT_NAMES.get(name, name): value for name, value in given.items() if value is not None}
    optims: dict[str, dict[str, Any]] = {}
    for role in ("actor_optim", "critic_optim"):
        base = given.get(role) or PPOSpec.model_fields[role].default
        optims[role] = base.model_dump() if isinstance(base, OptimSpec) else dict(base)
        for name in ("schedule", "warmup_steps"):
            if name in given:
                optims[role][name] = given[name]
        for name in ("lr", "weight_decay"):
            if f"{role}.{name}" in given:
                optims[role][name] = given[f"{role}.{name}"]
    spec = {k: v for k, v in given.items() if k in PPOSpec.model_fields}
    resources = {k: v for k, v in given.items() if k in Resources.model_fields}
    try:
        return PPOArgs(
            spec=PPOSpec.model_validate({**spec, **optims}),
            resources=Resources.model_validate(resources),
            seed=int(given.get("seed", 0)),
        )
    except ValueError as error:
        raise ConfigError(f"args: {error}") from None


class DeepSpeedRLHFEngine:
    """The four models of PPO.

    Attributes:
        actor, ref, critic, reward: DeepSpeed engines; `.module` is the model (`ValueModel` for critic and reward).
        tokenizer: with pad and EOS.
        args: the resolved `PPOArgs`.
        num_total_iters: generate/train iterations, the length of the learning-rate schedule.
    """

    def __init__(
        self,
        actor_model_name_or_path: str,
        critic_model_name_or_path: str,
        tokenizer: Any,
        num_total_iters: int,
        args: Any = None,
    ) -> None:
        """Load the models.

        Args:
            actor_model_name_or_path: a causal language model, usually the SFT stage's `model` folder.
            critic_model_name_or_path: a reward model, the reward stage's `model` folder.
            tokenizer: of both models.
            num_total_iters: how often `generate_experience` and `train_rlhf` will be called.
            args: see the module's docstring.

        Raises:
            ConfigError: a model cannot be loaded, the tokenizer has no EOS or pad, or answers do not fit the positions.
        """
        self.args = ppo_args(args)
        self.num_total_iters = num_total_iters
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise ConfigError("tokenizer: has no EOS token; PPO needs one to end answers: set tokenizer.eos_token")
        if tokenizer.pad_token_id is None:
            raise ConfigError("tokenizer: has no pad token: set tokenizer.pad_token to a token other than EOS")
        self.ranks = start(self.args.seed)
        spec, resources = self.args.spec, self.args.resources
        normal = spec.normalize_score
        actor = load_causal_lm(actor_model_name_or_path, dropout=0.0)
        check_positions(actor.config, 1, self.args.max_response_tokens)
        critic = ValueModel.load(critic_model_name_or_path).normalize(normal)
        reward = ValueModel.load(critic_model_name_or_path).normalize(normal)
        self.ref = frozen_engine(load_causal_lm(actor_model_name_or_path, dropout=0.0), resources, spec.precision)
        self.reward = frozen_engine(reward, resources, spec.precision)
        self.actor = train_engine(actor, spec.actor_optim, resources, spec.precision)
        self.critic = train_engine(critic, spec.critic_optim, resources, spec.precision)

    def save(self, actor_folder: Any, critic_folder: Any) -> None:
        """Write actor and critic as plain transformers loads them; collective, rank 0 writes."""
        actor, critic = full_state(self.actor), full_state(self.critic)
        if self.ranks.rank == 0:
            save_causal_lm(self.actor.module, actor, self.tokenizer, actor_folder)
            save_value_model(self.critic.module, critic, self.tokenizer, critic_folder)
