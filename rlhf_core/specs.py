"""Specs: what each stage computes. Frozen, without unknown keys; a spec is identity, so it enters the fingerprint whole.

Where and how a stage runs is `resources.Resources` and never identity. Places (a file's path, a model's folder) are written
here for people but are replaced by the digest of what they hold before hashing (`sources.identity`). Reference values in the
comments of specs: N = "The N implementation details of RLHF with PPO" (lm-human-preferences), N+ = arXiv 2403.17031,
DSC = DeepSpeed-Chat. New optional fields default to None, so that they change no fingerprint.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.spec_base import (
    STAGES,
    BranchSpec,
    Family,
    Fraction,
    Frozen,
    GoldName,
    LoRASpec,
    ModelSpec,
    NonNegative,
    OptimSpec,
    Positive,
    Precision,
    StageName,
    StageSpec,
    TokenizerSpec,
    TrainedSpec,
)
from rlhf_core.spec_data import (
    DataSpec,
    FileSource,
    HubSource,
    QuickstartSource,
    SampledPairs,
    Shares,
    Source,
    SourceSpec,
)
from rlhf_core.spec_ppo import EMASpec, FunctionReward, HTTPReward, ModelReward, PPOSpec, PTXSpec, RewardSource

__all__ = [
    "STAGES",
    "BranchSpec",
    "DPOSpec",
    "DataSpec",
    "EMASpec",
    "EvaluateSpec",
    "Family",
    "FileSource",
    "Fraction",
    "Frozen",
    "FunctionReward",
    "GoldName",
    "HTTPReward",
    "HubSource",
    "LoRASpec",
    "ModelReward",
    "ModelSpec",
    "NonNegative",
    "OptimSpec",
    "PPOSpec",
    "PTXSpec",
    "Positive",
    "Precision",
    "QuickstartSource",
    "RewardSource",
    "RewardSpec",
    "SFTSpec",
    "SampledPairs",
    "Shares",
    "Source",
    "SourceSpec",
    "StageName",
    "StageSpec",
    "TokenizerSpec",
]


class SFTSpec(TrainedSpec):
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


class RewardSpec(TrainedSpec):
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

    @model_validator(mode="after")
    def _combination(self) -> Self:
        if self.lora and self.train_layers:
            raise ValueError(
                f"train_layers {self.train_layers} and lora exclude each other: with adapters all layers stay as they are; "
                "keep one"
            )
        if self.tokenizer and not self.model:
            raise ValueError(
                "tokenizer: the SFT model reads the data's tokenizer; remove it or name another model in reward.model"
            )
        if self.tokenizer and self.tokenizer.train_vocab_size:
            raise ValueError(
                f"tokenizer.train_vocab_size {self.tokenizer.train_vocab_size}: only the data's tokenizer can be trained; "
                "give tokenizer.path or leave it out"
            )
        return self


class DPOSpec(TrainedSpec):
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

    @model_validator(mode="after")
    def _smoothing(self) -> Self:
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                f"label_smoothing {self.label_smoothing:g} belongs to the sigmoid loss; remove it or use loss: sigmoid"
            )
        return self


class EvaluateSpec(StageSpec):
    """Base, SFT and PPO or DPO models on held-out prompts."""

    prompts: Positive = Field(default=200, description="held-out prompts at most")
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_response_tokens: Positive | None = None
    gold: GoldName | None = Field(default=None, description="ground truth of the task, which no stage has trained on")
    perplexity: bool = Field(default=True, description="perplexity of the held-out SFT responses: the alignment tax")
    samples: Positive = Field(default=12, description="rows of the side-by-side table")
