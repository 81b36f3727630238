"""The PPO stage's spec: every constant of the algorithm, what scores answers, the average and the mixture loss.

Part of `rlhf_core.specs`, which is the module to import from and names the sources N, N+ and DSC of the values.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.spec_base import Fraction, Frozen, LoRASpec, NonNegative, OptimSpec, Positive, Precision, TrainedSpec


class ModelReward(Frozen):
    """The reward stage's model."""

    kind: Literal["model"] = "model"
    weight: float = 1.0


class FunctionReward(Frozen):
    """A Python function (prompts, responses) -> list of numbers; runs only where code is allowed (`rlhf run --allow-code`)."""

    kind: Literal["function"] = "function"
    function: str = Field(description="path/to/file.py:name, or module:name of an installed package")
    weight: float = 1.0
    mean: float = Field(default=0.0, description="the score is (value - mean) / std")
    std: Annotated[float, Field(gt=0)] = 1.0


class HTTPReward(Frozen):
    """An endpoint: POST {"prompts": [...], "responses": [...]} answers {"rewards": [...]}."""

    kind: Literal["http"] = "http"
    url: str = Field(
        pattern=r"^https?://[^@?#]+$",
        description="where it is, without credentials or query; not part of the identity, `name` is",
    )
    token_env: str | None = Field(
        default=None, description="environment variable of the jobs whose value is sent as a bearer token"
    )
    name: str = Field(description="what it computes, with its version, e.g. safety-v3: the identity of the endpoint")
    weight: float = 1.0
    mean: float = Field(default=0.0, description="the score is (value - mean) / std")
    std: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Positive = 32
    timeout_seconds: Annotated[float, Field(gt=0)] = 30
    retries: Annotated[int, Field(ge=0)] = Field(
        default=5, description="further tries of a request, with growing pauses"
    )


RewardSource = Annotated[ModelReward | FunctionReward | HTTPReward, Field(discriminator="kind")]


class EMASpec(Frozen):
    """Exponential moving average of the actor's weights, saved as a model of its own: ema = decay ema + (1 - decay) w."""

    decay: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.992, description="an optimizer step (DSC 0.992)")
    start_step: Annotated[int, Field(ge=0)] = Field(
        default=0, description="rollouts before it; until then it is the actor"
    )


class PTXSpec(Frozen):
    """Mixture loss (InstructGPT, arXiv 2203.02155): coef times the token-mean cross-entropy of pretraining text.

    The text is `data.pretrain`, or the SFT share where there is none. Its gradient is added to the policy's before one
    optimizer step, as a mean like the policy's: coef 1 weighs both alike.
    """

    coef: Annotated[float, Field(gt=0)] = 0.1
    batch_size: Positive | None = Field(
        default=None, description="sequences an optimizer step; default: the minibatch's"
    )


class PPOSpec(TrainedSpec):
    """Proximal policy optimisation. Every constant of the algorithm is a field here."""

    steps: Positive = Field(default=100, description="rollouts; each is followed by ppo_epochs x minibatches updates")
    rollout_batch_size: Positive = Field(default=64, description="prompts a rollout, over all processes")
    ppo_epochs: Positive = Field(default=4, description="passes over a rollout (N 4; DSC 1)")
    minibatches: Positive = Field(default=1, description="optimizer steps a pass (N 1)")
    max_response_tokens: Positive | None = Field(default=None, description="default: the data stage's")
    advantage: Literal["gae", "rloo", "reinforce++", "grpo"] | None = Field(
        default=None,
        description="default gae, with a critic. Without one: rloo (Ahmadian et al. 2024), reinforce++ (Hu 2025), grpo "
        "(Shao et al. 2024)",
    )
    samples_per_prompt: Positive | None = Field(
        default=None, description="answers to each prompt of a rollout; default 1, and 4 for rloo and grpo"
    )
    # sampling
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="N 0.7; divides every model's logits everywhere"
    )
    top_k: Annotated[int, Field(ge=0)] = Field(default=0, description="0 = off")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="1 = off")
    # reward
    rewards: tuple[RewardSource, ...] | None = Field(
        default=None, description="what scores answers, as a weighted sum; default: the reward stage's model"
    )
    kl_in: Literal["reward", "loss"] | None = Field(
        default=None, description="where the KL penalty is paid; default: in the reward, for grpo in the loss"
    )
    # The penalty for leaving the reference is paid per token in the reward: -kl_coef * estimate(KL(actor || reference)).
    kl_coef: NonNegative = Field(default=0.05, description="N+ and TRL 0.05; N 0.15; DSC 0.1")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1",
        description="k1 = log p - log q; k2 = k1^2/2; k3 = q/p - 1 + k1. In the loss k1 means k3, as k1's gradient is 0 on average",
    )
    kl_controller: Literal["fixed", "adaptive"] = "fixed"
    kl_target: Annotated[float, Field(gt=0)] = Field(default=6.0, description="adaptive: nats per sequence (N: 6)")
    kl_horizon: Positive = Field(default=10_000, description="adaptive: episodes (N: 10000)")
    kl_stop: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="end the updates on a rollout once approx KL(old || new) per token exceeds this"
    )
    normalize_score: bool = Field(
        default=True, description="(score - mean) / std with the reward model's stored moments (N, RM 3)"
    )
    score_clip: Annotated[float, Field(gt=0)] | None = Field(
        default=5.0, description="clip the reward model's score to +-this (DSC 5); other sources are taken as they are"
    )
    missing_eos_penalty: float | None = Field(
        default=1.0,
        description="without EOS: subtract this from the score (TRL 1.0), or replace the score by minus this",
    )
    missing_eos: Literal["subtract", "replace"] = Field(
        default="replace", description="N and N+ replace the score by -1"
    )
    whiten_rewards: bool = Field(default=False, description="scale rewards to unit variance, mean kept (N on, N+ off)")
    # advantage and losses
    gamma: Fraction = Field(default=1.0, description="N, N+, DSC 1.0")
    lam: Fraction = Field(default=0.95, description="N, N+, DSC 0.95; gae only")
    whiten_advantages: bool = Field(
        default=True,
        description="zero mean, unit variance over the global batch (N, N+; DSC none); gae and reinforce++ only",
    )
    clip: Annotated[float, Field(gt=0)] = Field(default=0.2, description="ratio clip (N, N+, DSC 0.2)")
    value_clip: Annotated[float, Field(gt=0)] | None = Field(default=0.2, description="N, N+, DSC 0.2; none = off")
    clip_high: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="upper ratio clip where it differs from `clip` (DAPO 0.28)"
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None, description="bound on the loss of negative advantages, as a ratio (Ye et al. 2020: 3)"
    )
    entropy_coef: NonNegative = Field(default=0.0, description="weight of the entropy bonus")
    ptx: PTXSpec | None = Field(default=None, description="mixture with pretraining text; default: off")
    ema: EMASpec | None = Field(default=None, description="average of the actor, saved as actor_ema; default: off")
    actor_lora: LoRASpec | None = Field(
        default=None, description="train adapters of the actor; the reference is then the actor without them"
    )
    critic_lora: LoRASpec | None = Field(
        default=None, description="train adapters of the critic; the reward model is then the critic without them"
    )
    snapshot_every: Positive | None = Field(
        default=None, description="rollouts between saved copies of the actor, for `rlhf eval`; default: none"
    )
    critic_warmup: Annotated[int, Field(ge=0)] = Field(
        default=0, description="first rollouts that train only the critic"
    )
    actor_optim: OptimSpec = Field(
        default=OptimSpec(lr=9.65e-6, warmup_steps=100), description="DSC 9.65e-6, cosine, 100"
    )
    critic_optim: OptimSpec = Field(default=OptimSpec(lr=5e-6, warmup_steps=100), description="DSC 5e-6, cosine, 100")
    precision: Precision = "fp32"

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.rollout_batch_size % self.minibatches:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is not a multiple of minibatches {self.minibatches}"
            )
        return self

    @model_validator(mode="after")
    def _estimator(self) -> Self:
        if self.estimator in ("rloo", "grpo") and self.answers < 2:
            raise ValueError(
                f"advantage {self.estimator} compares the answers to one prompt, but samples_per_prompt is "
                f"{self.answers}; use at least 2"
            )
        if self.estimator != "gae" and (self.critic_lora or self.critic_warmup):
            raise ValueError(f"advantage {self.estimator} has no critic; remove critic_lora and critic_warmup")
        if self.estimator in ("rloo", "grpo") and (self.whiten_rewards or self.gamma != 1):
            raise ValueError(
                f"advantage {self.estimator} judges whole answers: whiten_rewards and gamma {self.gamma:g} mean nothing; "
                "leave them out"
            )
        if self.critic_warmup >= self.steps:
            raise ValueError(
                f"critic_warmup {self.critic_warmup} leaves none of the {self.steps} rollouts for the actor; lower it"
            )
        if self.ema and self.ema.start_step >= self.steps:
            raise ValueError(
                f"ema.start_step {self.ema.start_step} is never reached in {self.steps} rollouts; lower it"
            )
        if self.critic_lora and self.critic_lora.quantize:
            raise ValueError("critic_lora.quantize: the critic's weights are also the reward model's; remove quantize")
        if self.actor_lora and self.actor_lora.quantize and self.actor_lora.also_train:
            raise ValueError("actor_lora: quantize and also_train exclude each other; keep one")
        for role, lora in (("actor", self.actor_lora), ("critic", self.critic_lora)):
            if lora and lora.dropout:
                raise ValueError(
                    f"{role}_lora.dropout {lora.dropout:g}: dropout is off in PPO (N, policy 4); set it to 0"
                )
        if self.rewards is not None:
            if not self.rewards:
                raise ValueError("rewards is empty; name at least one source or leave it out")
            if sum(source.kind == "model" for source in self.rewards) > 1:
                raise ValueError("rewards names the reward stage's model twice; keep one")
        return self

    @property
    def estimator(self) -> Literal["gae", "rloo", "reinforce++", "grpo"]:
        """How advantages are estimated."""
        return self.advantage or "gae"

    @property
    def answers(self) -> int:
        """Answers to each prompt."""
        return self.samples_per_prompt or (4 if self.advantage in ("rloo", "grpo") else 1)

    @property
    def kl_penalty(self) -> Literal["reward", "loss"]:
        """Where the KL penalty is paid."""
        return self.kl_in or ("loss" if self.advantage == "grpo" else "reward")

    @property
    def uses_reward_model(self) -> bool:
        """Whether the reward stage's model scores answers."""
        return self.rewards is None or any(source.kind == "model" for source in self.rewards)
