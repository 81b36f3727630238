"""What all specs are made of: the frozen base, a model, a tokenizer, an optimizer, adapters.

Part of `rlhf_core.specs`, which is the module to import from. Reference values in the comments are named there.
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


class BranchSpec(Frozen):
    """Where a stage leaves another one's course: it begins from a checkpoint of that one."""

    artifact: str = Field(
        pattern=r"^(sft|reward|ppo|dpo)/[a-z0-9][a-z0-9._-]*-[0-9a-f]{12}$", description="id of the stage it leaves"
    )
    step: Positive = Field(description="finished steps or rollouts of the checkpoint")


class TrainedSpec(StageSpec):
    """What the spec of every stage that trains has."""

    branch: BranchSpec | None = Field(
        default=None, description="go on from another run's checkpoint; `rlhf branch` sets it"
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
