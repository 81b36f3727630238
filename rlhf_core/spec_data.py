"""The data stage's spec: sources, pairs sampled from a model, shares, lengths.

Part of `rlhf_core.specs`, which is the module to import from.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.spec_base import Frozen, GoldName, NonNegative, Positive, StageSpec, TokenizerSpec


class SourceSpec(Frozen):
    """What every source has.

    `weight` w is how often a training row counts: as often as floor(w), and once more for a part w - floor(w) of the
    prompts, chosen by a hash of seed and prompt. 0.5 leaves out half of the prompts, 2 has each row twice, 1.5 half of
    them twice. Test rows are never repeated or left out, so that a weight changes no evaluation.
    """

    weight: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="how often a row counts in training; default 1"
    )
    feeds: tuple[Literal["sft", "reward", "ppo"], ...] | None = Field(
        default=None, min_length=1, description="stages that may have its rows, e.g. [sft]; default: all it can feed"
    )


class QuickstartSource(SourceSpec):
    """Preference data generated from a seed, with a known rule for what is preferred (`rlhf_core.quickstart`)."""

    kind: Literal["quickstart"] = "quickstart"
    prompts: Positive = 4000
    pairs_per_prompt: Positive = 1


class FileSource(SourceSpec):
    """Files on disk or in object storage: .jsonl, .json, .parquet (each also .gz), or plain text."""

    kind: Literal["files"] = "files"
    paths: tuple[str, ...] = Field(min_length=1)
    test_paths: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="files whose prompts are all held out for tests, and then those of `paths` are for training; "
        "default: shares.test of `paths`",
    )
    format: Literal["auto", "pairs", "messages", "dialogue", "stories", "text"] = Field(
        default="auto",
        description="pairs: prompt/chosen/rejected columns; messages: lists of role/content; dialogue: hh-rlhf's "
        "'Human: … Assistant: …' strings; stories: text cut at `story_start`, first sentence is the prompt; "
        "text (for `pretrain`): .txt, or a column `text`",
    )
    columns: dict[str, str] = Field(default={}, description="our column name -> the file's, e.g. {chosen: better}")
    story_start: str = Field(r"^(?=Once upon a time|One day,)", description="regular expression between two stories")
    limit: Positive | None = Field(default=None, description="use only the first N rows")


class HubSource(SourceSpec):
    """A data set by its `datasets` name. The names in `data/known.py` need nothing else."""

    kind: Literal["hub"] = "hub"
    name: str
    subset: str | None = None
    split: str = "train"
    test_split: str | None = Field(
        default=None,
        description="split whose prompts are all held out for tests, and then those of `split` are for training; "
        "default: a known set's own, else shares.test of `split`",
    )
    revision: str | None = None
    format: Literal["auto", "pairs", "messages", "dialogue", "text"] = "auto"
    columns: dict[str, str] = {}
    limit: Positive | None = Field(default=None, description="use only the first N rows of each split")
    streaming: bool | None = Field(
        default=None, description="read rows as they arrive, without a copy of the set on this disk"
    )


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
    pretrain: tuple[Source, ...] | None = Field(
        default=None, min_length=1, description="text for the mixture loss of PPO (ppo.ptx), in blocks of full length"
    )
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
