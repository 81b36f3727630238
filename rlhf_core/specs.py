"""Specs: what each stage computes. Frozen, without unknown keys; a spec is identity, so it enters the fingerprint whole.

Where and how a stage runs is `resources.Resources` and never identity. Places (a file's path, a model's folder) are written
here for people but are replaced by the digest of what they hold before hashing (`sources.identity`). Reference values in the
comments of `PPOSpec`: N = "The N implementation details of RLHF with PPO" (lm-human-preferences), N+ = arXiv 2403.17031,
DSC = DeepSpeed-Chat. New optional fields default to None, so that they change no fingerprint.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

StageName = Literal["data", "sft", "reward", "ppo", "evaluate"]
STAGES: tuple[StageName, ...] = ("data", "sft", "reward", "ppo", "evaluate")
GoldName = Literal["quickstart", "vader"]
Precision = Literal["fp32", "bf16"]
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


class SFTSpec(StageSpec):
    """Supervised fine-tuning: token-mean cross-entropy."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    batch_size: Positive = Field(default=16, description="sequences an optimizer step, over all processes")
    loss_on: Literal["response", "all"] = "response"
    dropout: Fraction | None = Field(default=None, description="default: the model's own")
    precision: Precision = "fp32"
    optim: OptimSpec = OptimSpec(lr=1e-5)
    eval_every: Positive | None = Field(default=None, description="steps between evaluations; default: at the end only")


class RewardSpec(StageSpec):
    """Reward model: -log sigmoid(r(chosen) - r(rejected)) on the score of each response's last token."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Positive | None = None
    model: ModelSpec | None = Field(
        default=None, description="another model to start from, with the same tokenizer; default: the SFT model"
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
    eval_every: Positive | None = None


class PPOSpec(StageSpec):
    """Proximal policy optimisation. Every constant of the algorithm is a field here."""

    steps: Positive = Field(default=100, description="rollouts; each is followed by ppo_epochs x minibatches updates")
    rollout_batch_size: Positive = Field(default=64, description="prompts a rollout, over all processes")
    ppo_epochs: Positive = Field(default=4, description="passes over a rollout (N 4; DSC 1)")
    minibatches: Positive = Field(default=1, description="optimizer steps a pass (N 1)")
    max_response_tokens: Positive | None = Field(default=None, description="default: the data stage's")
    # sampling
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="N 0.7; divides every model's logits everywhere"
    )
    top_k: Annotated[int, Field(ge=0)] = Field(default=0, description="0 = off")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(default=1.0, description="1 = off")
    # reward
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
    entropy_coef: NonNegative = Field(default=0.0, description="weight of the entropy bonus")
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


class EvaluateSpec(StageSpec):
    """Base, SFT and PPO models on held-out prompts."""

    prompts: Positive = Field(default=200, description="held-out prompts at most")
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_response_tokens: Positive | None = None
    gold: GoldName | None = Field(default=None, description="ground truth of the task, which no stage has trained on")
    perplexity: bool = Field(default=True, description="perplexity of the held-out SFT responses: the alignment tax")
    samples: Positive = Field(default=12, description="rows of the side-by-side table")
