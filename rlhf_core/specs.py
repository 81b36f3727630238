"""Specs: what each stage computes. Frozen, without unknown keys; a spec is identity, so it enters the fingerprint whole.

Where and how a stage runs is `resources.Resources` and never identity. Places (a file's path, a model's folder) are written
here for people but are replaced by the digest of what they hold before hashing (`sources.identity`). Reference values in the
comments of `PPOSpec`: N = "The N implementation details of RLHF with PPO" (lm-human-preferences), N+ = arXiv 2403.17031,
DSC = DeepSpeed-Chat. New optional fields default to None, so that they change no fingerprint.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

StageName = Literal["data", "sft", "reward", "ppo", "dpo", "evaluate"]
STAGES: tuple[StageName, ...] = ("data", "sft", "reward", "ppo", "dpo", "evaluate")
GoldName = Literal["quickstart", "vader"]
Precision = Literal["fp32", "bf16", "fp16"]
Family = Literal[
    "opt", "bloom", "gpt_neox", "gptj", "gpt_neo", "gpt2", "codegen", "llama", "qwen2", "qwen3", "mistral", "gemma3"
]

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Frozen(BaseModel):
    """Base of all contract models: immutable, unknown keys are errors, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StageSpec(Frozen):
    """What every stage's spec has."""

    seed: int | None = Field(default=None, description="default: the pipeline's seed")
    revision: int | None = Field(
        default=None, description="raise it to say that the code now means something else: builds anew"
    )


class ModelSpec(Frozen):
    """A pretrained model (`path`) or a new one from scratch (`family` and its size), never both."""

    path: str | None = Field(
        default=None, description="folder, .gguf file, hub name, or package:NAME/FILE; leave out for a new model"
    )
    revision: str | None = Field(
        default=None, description="hub revision; a hub name without one is pinned by its name alone"
    )
    family: Family | None = Field(default=None, description="architecture of a new model, started from random weights")
    hidden_size: Positive = 128
    layers: Positive = 3
    heads: Positive = 4
    positions: Positive = Field(default=128, description="longest sequence of a new model, tokens")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.path and self.family:
            raise ValueError(f"path {self.path!r} and family {self.family!r} exclude each other; keep one")
        if not self.path and not self.family:
            raise ValueError("needs a path (pretrained model) or a family (new model)")
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        return self


class TokenizerSpec(Frozen):
    """The tokenizer of all stages: the model's own (default), one at `path`, or one trained on the data."""

    path: str | None = Field(default=None, description="folder or hub name; default: the tokenizer beside the model")
    train_vocab_size: int | None = Field(
        default=None, ge=260, description="train a byte-level BPE of this size on the data"
    )
    pad_token: str | None = Field(
        default=None, description="an existing token to pad with, e.g. <unk>; default: the tokenizer's pad"
    )
    eos_token: str | None = Field(default=None, description="token that ends a response; default: the tokenizer's EOS")
    chat_template: str | None = Field(default=None, description="Jinja chat template; default: the tokenizer's")


class QuickstartSource(Frozen):
    """Preference data generated from a seed, with a known rule for what is preferred (`rlhf_core.quickstart`)."""

    kind: Literal["quickstart"] = "quickstart"
    prompts: Positive = 4000
    pairs_per_prompt: Positive = 1


class FileSource(Frozen):
    """Files on disk or in object storage: .jsonl, .json, .parquet (each also .gz), or plain text of stories."""

    kind: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    format: Literal["auto", "pairs", "messages", "dialogue", "stories"] = Field(
        default="auto",
        description="pairs: prompt/chosen/rejected columns; messages: lists of role/content; dialogue: hh-rlhf's "
        "'Human: … Assistant: …' strings; stories: text cut at `story_start`, first sentence is the prompt",
    )
    columns: dict[str, str] = Field(default={}, description="our column name -> the file's, e.g. {chosen: better}")
    story_start: str = Field(r"^(?=Once upon a time|One day,)", description="regular expression between two stories")
    limit: Positive | None = Field(default=None, description="use only the first N rows")


class HubSource(Frozen):
    """A data set by its `datasets` name."""

    kind: Literal["hub"] = "hub"
    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    format: Literal["auto", "pairs", "messages", "dialogue"] = "auto"
    columns: dict[str, str] = {}
    limit: Positive | None = None


Source = Annotated[QuickstartSource | FileSource | HubSource, Field(discriminator="kind")]


class SampledPairs(Frozen):
    """Preference pairs for the reward share, sampled from a model and labelled by a gold reward.

    For data without preferences: two answers of the model to each prompt, the one with the higher gold is chosen; ties are
    dropped and counted.
    """

    gold: GoldName
    per_prompt: Annotated[int, Field(ge=2)] = Field(
        default=4, description="answers a prompt; best and worst make the pair"
    )
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_prompts: Positive | None = None


class Shares(Frozen):
    """Shares of the prompts that go to each stage (DeepSpeed-Chat's data_split, default 2,4,4), by a hash of the prompt."""

    sft: NonNegative = 2
    reward: NonNegative = 4
    ppo: NonNegative = 4
    test: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.1, description="part of each share held out for tests")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.sft + self.reward + self.ppo <= 0:
            raise ValueError("sft, reward and ppo are all 0; at least one share must be positive")
        return self


class DataSpec(StageSpec):
    """Sources to tokenised, split, memory-mapped examples."""

    sources: tuple[Source, ...] = Field(min_length=1)
    tokenizer: TokenizerSpec = TokenizerSpec()
    template: Literal["human_assistant", "chat", "none"] = Field(
        default="human_assistant",
        description="how messages become text; prompts that are text already are kept as they are",
    )
    sampled_pairs: SampledPairs | None = None
    shares: Shares = Shares()
    max_prompt_tokens: Positive = 256
    max_response_tokens: Positive = Field(default=256, description="including the end-of-sequence token")
    truncate_responses: bool = Field(
        default=False, description="cut over-long responses (no EOS then) instead of dropping them"
    )


class OptimSpec(Frozen):
    """AdamW and its learning-rate schedule over optimizer steps."""

    lr: NonNegative = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    min_lr_ratio: Fraction = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: NonNegative = Field(default=0.0, description="on matrices only: never on biases, norms or embeddings")
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0


class LoRASpec(Frozen):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A with B, A trained and W frozen."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = Field(default=16.0, description="the update is scaled by alpha / rank")
    dropout: Fraction = Field(default=0.0, description="on the adapter's input, in training")
    targets: tuple[str, ...] | None = Field(
        default=None,
        description="names of the layers to adapt, e.g. [q_proj, v_proj]; default: all linear ones of the blocks",
    )
    also_train: tuple[Literal["embeddings", "norms", "biases"], ...] = Field(
        default=(), description="what else is trained; the head of a reward model or critic always is"
    )
    lr: NonNegative | None = Field(default=None, description="learning rate of the adapters; default: the optimizer's")
    quantize: Literal["nf4"] | None = Field(
        default=None, description="keep W in 4 bits (QLoRA); needs a GPU and bitsandbytes"
    )


class SFTSpec(StageSpec):
    """Supervised fine-tuning: token-mean cross-entropy."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    batch_size: Positive = Field(default=16, description="sequences an optimizer step, over all processes")
    loss_on: Literal["response", "all"] = "response"
    dropout: Fraction | None = Field(default=None, description="default: the model's own")
    precision: Precision = "fp32"
    optim: OptimSpec = OptimSpec(lr=1e-5)
    lora: LoRASpec | None = Field(default=None, description="train adapters; default: all weights")
    eval_every: Positive | None = Field(default=None, description="steps between evaluations; default: at the end only")


class RewardSpec(StageSpec):
    """Reward model: -log sigmoid(r(chosen) - r(rejected)) on the score of each response's last token."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    model: ModelSpec | None = Field(
        default=None, description="another model to start from, of any family; default: the SFT model"
    )
    tokenizer: TokenizerSpec | None = Field(
        default=None,
        description="tokenizer of `model`; default: the one beside it, or the data's where there is none. "
        "Texts are tokenised anew at the boundary where it differs from the data's",
    )
    batch_size: Positive = Field(default=16, description="pairs an optimizer step, over all processes")
    dropout: Fraction = Field(default=0.0, description="N+: no dropout in the reward model")
    precision: Precision = "fp32"
    optim: OptimSpec = OptimSpec(lr=5e-5)
    center_coef: NonNegative = Field(
        default=0.0,
        description="weight of (r(chosen)+r(rejected))^2, which keeps scores near 0 (Eisenstein et al. 2023)",
    )
    flip_labels: Fraction | None = Field(
        default=None, description="share of training pairs with chosen and rejected swapped"
    )
    train_layers: Positive | None = Field(
        default=None, description="train only the last N layers and the head; default: all"
    )
    lora: LoRASpec | None = Field(default=None, description="train adapters and the head; default: all weights")
    eval_every: Positive | None = None


class DPOSpec(StageSpec):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) on the reward share's pairs.

    With h = (log p - log p_ref)(chosen) - (log p - log p_ref)(rejected): sigmoid -log sigmoid(beta h), smoothed by
    `label_smoothing` (cDPO); ipo (h - 1 / (2 beta))^2 on log-probabilities averaged over tokens (Azar et al. 2023).
    """

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    batch_size: Positive = Field(default=16, description="pairs an optimizer step, over all processes")
    beta: Annotated[float, Field(gt=0)] = Field(default=0.1, description="price of leaving the reference (DSC 0.1)")
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0, description="share of labels believed wrong"
    )
    dropout: Fraction = 0.0
    precision: Precision = "fp32"
    optim: OptimSpec = OptimSpec(lr=1e-6)
    lora: LoRASpec | None = Field(default=None, description="train adapters; default: all weights")
    eval_every: Positive | None = None


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
    url: str = Field(pattern=r"^https?://", description="where it is; not part of the identity, `name` is")
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


class PPOSpec(StageSpec):
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
        default="k1", description="k1 = log p - log q; k2 = k1^2/2; k3 = q/p - 1 + k1"
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
        default=5.0, description="clip the score to +-this (DSC 5)"
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
    lam: Fraction = Field(default=0.95, description="N, N+, DSC 0.95")
    whiten_advantages: bool = Field(
        default=True, description="zero mean, unit variance over the global batch (N, N+; DSC none)"
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


class EvaluateSpec(StageSpec):
    """Base, SFT and PPO models on held-out prompts."""

    prompts: Positive = Field(default=200, description="held-out prompts at most")
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_response_tokens: Positive | None = None
    gold: GoldName | None = Field(default=None, description="ground truth of the task, which no stage has trained on")
    perplexity: bool = Field(default=True, description="perplexity of the held-out SFT responses: the alignment tax")
    samples: Positive = Field(default=12, description="rows of the side-by-side table")
