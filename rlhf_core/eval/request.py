"""What is asked of `rlhf eval`: resolved by the command line, one JSON line to the process that answers.

Everything is a place on this disk (artifacts are fetched before) or a hub name, so the process knows nothing of stores and
manifests. No torch.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from rlhf_core.specs import Frozen, GoldName, Positive

Mode = Literal["reward", "language", "compare", "frontier"]


class NamedModel(Frozen):
    """A model and what it is called in tables."""

    name: str
    path: str = Field(description="local folder, .gguf file or hub name")


class EvalRequest(Frozen):
    """One evaluation."""

    mode: Mode
    models: tuple[NamedModel, ...] = Field(description="what is evaluated: one model, two to compare, or snapshots")
    data: str | None = Field(default=None, description="folder of the data artifact")
    sft: str | None = Field(default=None, description="folder of the SFT model, from which KL is measured")
    reward: str | None = Field(default=None, description="folder of the reward model that scores answers")
    gold: GoldName | None = None
    prompts: tuple[str, ...] | None = Field(default=None, description="instead of held-out prompts")
    raw: bool = Field(default=False, description="take `prompts` as they are, without turn markers")
    limit: Positive | None = Field(default=None, description="so many held-out rows, of all sources; default: all")
    max_new_tokens: Positive = 128
    temperature: Annotated[float, Field(gt=0)] = 1.0
    greedy: bool = False
    seed: int = 0
    micro_batch: Positive = 16
    out: str | None = Field(default=None, description="folder for files")


Result = dict[str, Any]  # plain JSON; "mode" says which
