"""`DeepSpeedRLHFEngine`: the four models of PPO (actor, reference, critic, reward) as DeepSpeed engines.

The name, the arguments and the attributes are DeepSpeed-Chat's; `args` as `ppo_args` takes them. The reference is a frozen
copy of the actor, the critic starts from the reward model; with LoRA each pair is one copy of the weights, seen with and
without its adapters. A reward model with a tokenizer of its own reads the answers' text in its own tokens. A model that the
algorithm does not need (critic without GAE, reward without the reward stage's model) is not there: None.
"""

from pathlib import Path
from typing import Any

from torch import nn

from rlhf_core.distributed import start
from rlhf_core.ema import EMA
from rlhf_core.engine import frozen_engine, train_engine, zero_init
from rlhf_core.errors import ConfigError
from rlhf_core.export import save_adapter, save_causal_lm, save_value_model
from rlhf_core.lora import WithoutAdapters, add_lora, whole
from rlhf_core.models import ValueModel, check_positions, load_causal_lm, load_tokenizer
from rlhf_core.ppo_args import PPOArgs, ppo_args
from rlhf_core.ragged import needs_padding
from rlhf_core.retokenize import Retokenizer

__all__ = ["DeepSpeedRLHFEngine", "PPOArgs", "ppo_args"]


class DeepSpeedRLHFEngine:
    """The four models of PPO.

    Attributes:
        actor, ref, critic, reward: DeepSpeed engines, or views of one (`WithoutAdapters`); `.module` is the model
            (`ValueModel` for critic and reward). critic and reward may be None.
        actor_ema: the actor's moving average, or None.
        tokenizer: the actor's, with pad and EOS.
        reward_tokenizer: of critic and reward.
        retokenizer: from the actor's tokens to theirs, None where they are the same.
        args: the resolved `PPOArgs`.
        num_total_iters: generate/train iterations, the length of the learning-rate schedule.
    """

    def __init__(
        self,
        actor_model_name_or_path: str,
        critic_model_name_or_path: str | None,
        tokenizer: Any,
        num_total_iters: int,
        args: Any = None,
    ) -> None:
        """Load the models.

        Args:
            actor_model_name_or_path: a causal language model, usually the SFT stage's `model` folder.
            critic_model_name_or_path: a reward model, the reward stage's `model` folder with the tokenizer it reads;
                None where `args.rewards` names other sources: then a critic starts from the actor, its head at 0.
            tokenizer: the actor's.
            num_total_iters: how often `generate_experience` and `train_rlhf` will be called.
            args: see `ppo_args`.

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
        if critic_model_name_or_path is None and self.args.spec.uses_reward_model:
            raise ConfigError(
                "critic_model_name_or_path: is None, but args.rewards asks for the reward model; give one"
            )
        self._actor_path, self._reward_path = actor_model_name_or_path, critic_model_name_or_path
        self.ranks = start(self.args.seed)
        self.reward_tokenizer = tokenizer
        self.retokenizer = self._retokenizer()
        self.actor = self._load_actor()
        check_positions(self.actor.module.config, 1, self.args.max_response_tokens)
        self.ref = self._load_reference()
        self.critic = self._load_critic() if self.args.spec.estimator == "gae" else None
        self.reward = self._load_reward() if self.args.spec.uses_reward_model else None
        ema = self.args.spec.ema
        if ema and self.args.resources.of_model("actor").offload_parameters == "nvme":
            raise ConfigError(
                "ppo.ema: the actor's weights lie on nvme, where they cannot be averaged; offload them to cpu"
            )
        self.actor_ema = EMA(self.actor, ema.decay) if ema else None

    def _retokenizer(self) -> Retokenizer | None:
        folder = self._reward_path
        if folder is None or not (Path(folder) / "tokenizer_config.json").is_file():
            return None
        self.reward_tokenizer = load_tokenizer(folder)
        retokenizer = Retokenizer(self.tokenizer, self.reward_tokenizer)
        return None if retokenizer.same else retokenizer

    def _load_actor(self) -> Any:
        spec, resources = self.args.spec, self.args.resources.of_model("actor")
        lora = spec.actor_lora
        partition = zero_init(resources, spec.precision)
        quantize = lora.quantize if lora else None
        model = load_causal_lm(self._actor_path, dropout=0.0, zero_init=partition, quantize=quantize)
        if lora:
            add_lora(model, lora, "ppo.actor_lora", self.args.seed)
        return train_engine(model, spec.actor_optim, resources, spec.precision, lora)

    def _load_reference(self) -> Any:
        spec, resources = self.args.spec, self.args.resources.of_model("reference")
        if spec.actor_lora and not spec.actor_lora.also_train:
            return WithoutAdapters(self.actor)
        partition = zero_init(resources, spec.precision)
        return frozen_engine(
            load_causal_lm(self._actor_path, dropout=0.0, zero_init=partition), resources, spec.precision
        )

    def _value_model(self, resources: Any) -> ValueModel:
        """The reward model, its scores normalised if the spec says so."""
        spec = self.args.spec
        assert self._reward_path is not None
        partition = zero_init(resources, spec.precision)
        return ValueModel.load(self._reward_path, zero_init=partition).normalize(spec.normalize_score)

    def _load_critic(self) -> Any:
        spec, resources = self.args.spec, self.args.resources.of_model("critic")
        if self._reward_path is not None:
            model = self._value_model(resources)
        else:
            trunk = load_causal_lm(self._actor_path, dropout=0.0, zero_init=zero_init(resources, spec.precision))
            model = ValueModel.from_causal_lm(trunk, self.args.seed, zero_head=True)
        self._reward_head = whole(model.score.weight)
        if spec.critic_lora:
            add_lora(model, spec.critic_lora, "ppo.critic_lora", self.args.seed)
        return train_engine(model, spec.critic_optim, resources, spec.precision, spec.critic_lora)

    def _load_reward(self) -> Any:
        spec, resources = self.args.spec, self.args.resources.of_model("reward")
        lora = spec.critic_lora
        if self.critic is not None and lora and not lora.also_train:
            return WithoutAdapters(self.critic, self._frozen_head())
        return frozen_engine(self._value_model(resources), resources, spec.precision)

    def _frozen_head(self) -> nn.Linear:
        """The reward model's head, which the critic's moves away from."""
        assert self.critic is not None
        head = nn.Linear(self._reward_head.shape[1], 1, bias=False)
        head.weight = nn.Parameter(self._reward_head, requires_grad=False)
        return head.to(device=self.ranks.device, dtype=self.critic.module.score.weight.dtype)

    @property
    def models(self) -> dict[str, Any]:
        """The engines that exist, each once, by name."""
        found = {"actor": self.actor, "ref": self.ref, "critic": self.critic, "reward": self.reward}
        return {name: e for name, e in found.items() if e is not None and not isinstance(e, WithoutAdapters)}

    @property
    def padded(self) -> bool:
        """Whether any model's pass computes padding along with its rows."""
        return needs_padding(*(engine.module for engine in self.models.values()))

    @property
    def value_config(self) -> Any:
        """Configuration of critic and reward model; None if there is neither."""
        engine = self.critic if self.critic is not None else self.reward
        return None if engine is None else engine.module.config

    def save(self, actor_folder: str | Path, critic_folder: str | Path | None = None) -> None:
        """Write actor, and critic if there is one, as plain transformers loads them; collective, rank 0 writes."""
        save_causal_lm(self.actor, self.tokenizer, Path(actor_folder))
        if self.critic is not None and critic_folder is not None:
            save_value_model(self.critic, self.reward_tokenizer, Path(critic_folder))

    def save_ema(self, folder: str | Path) -> None:
        """Write the actor's moving average as a model of its own; collective."""
        assert self.actor_ema is not None, "args.ema is not set"
        with self.actor_ema.in_place():
            save_causal_lm(self.actor, self.tokenizer, Path(folder))

    def save_adapters(self, folder: str | Path, actor_base: str, critic_base: str) -> None:
        """Write `actor_adapter` and `critic_adapter` for PEFT where there are adapters; collective.

        Args:
            folder: their parent.
            actor_base, critic_base: names of the models they belong to.
        """
        spec = self.args.spec
        if spec.actor_lora:
            save_adapter(self.actor, Path(folder) / "actor_adapter", spec.actor_lora, actor_base)
        if spec.critic_lora:
            save_adapter(self.critic, Path(folder) / "critic_adapter", spec.critic_lora, critic_base)
