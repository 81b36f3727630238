"""What every mode of `rlhf eval` reads: models on this machine's device, held-out rows, prompts, a line of progress.

One process and one model at a time. A model brings the tokenizer beside it; where that is the data's, held-out prompts are
taken as the token ids that training used, else their text is tokenised anew.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf_core.batches import open_rows, some_rows
from rlhf_core.chat import render
from rlhf_core.errors import ConfigError
from rlhf_core.eval.request import EvalRequest
from rlhf_core.models import load_causal_lm, load_tokenizer
from rlhf_core.rollout import Sampling

ROW_SEED = 0  # of the rows that `limit` takes; not the request's seed, which is the noise of answers


def device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def language_model(path: str, data_tokenizer: Any = None) -> tuple[Any, Any]:
    """A causal language model in eval mode and its tokenizer.

    Args:
        path: folder, .gguf file or hub name.
        data_tokenizer: taken where the model has none beside it, or one of the same vocabulary (it knows pad and EOS).

    Raises:
        ConfigError: there is no tokenizer, or one that knows no end of sequence.
    """
    model: Any = load_causal_lm(path, 0.0)
    try:
        tokenizer = load_tokenizer(Path(path).parent if path.endswith(".gguf") else path)
    except (OSError, ValueError, KeyError) as error:
        if data_tokenizer is None:
            raise ConfigError(f"{path}: has no tokenizer beside it: {str(error).splitlines()[0]}") from None
        tokenizer = data_tokenizer
    if data_tokenizer is not None and same_tokens(tokenizer, data_tokenizer):
        tokenizer = data_tokenizer
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{path}: its tokenizer has no end-of-sequence token, so no answer would end; set eos_token in it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # it only fills rows here, and is masked
    return model.to(device()).eval(), tokenizer


def held_out(request: EvalRequest, share: str) -> list[dict[str, Any]]:
    """The held-out rows of a share, in their order; with `limit` a sample of them, the same for every request.

    Raises:
        DataError: there are none.
    """
    if request.data is None:
        raise ConfigError(f"rlhf eval: {request.models[0].name} has no data artifact; name an artifact of a pipeline")
    rows = open_rows(Path(request.data) / share / "test")
    return rows.select(some_rows(len(rows), request.limit or len(rows), ROW_SEED)).to_list()


class Prompts:
    """The prompts of an evaluation: the request's own, or held-out ones.

    Attributes:
        texts: for people and gold.
        own: the data's tokenizer, if there is data.
    """

    def __init__(self, request: EvalRequest) -> None:
        self.request = request
        self.rows = held_out(request, "ppo") if request.prompts is None else []
        self.texts = list(request.prompts or ()) or [str(row["prompt"]) for row in self.rows]
        self.own = load_tokenizer(Path(request.data) / "tokenizer") if request.data else None

    def ids(self, tokenizer: Any) -> list[list[int]]:
        """Token ids of all prompts for a model's tokenizer; ConfigError for an empty prompt."""
        if self.rows and self.own is not None and same_tokens(self.own, tokenizer):
            return [row["prompt_ids"] for row in self.rows]
        texts = self.texts
        if self.request.prompts is not None and not self.request.raw:
            texts = [render([{"role": "user", "content": text}], tokenizer) for text in texts]
        found = [tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"] for text in texts]
        if not all(found):
            raise ConfigError(
                f"--prompt {self.texts[[bool(x) for x in found].index(False)]!r}: is empty; write something"
            )
        return found


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers have the same vocabulary."""
    return one.get_vocab() == other.get_vocab()


def sampling_of(request: EvalRequest, tokenizer: Any) -> Sampling:
    """How answers are sampled; greedy is top-k 1."""
    return Sampling(
        request.max_new_tokens, request.temperature, top_k=1 if request.greedy else 0, vocabulary=len(tokenizer)
    )


def tell(phase: str) -> Callable[[int, int], None]:
    """Progress as one line on stderr, overwritten where that is a terminal and silent elsewhere."""

    def say(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r\033[K{phase} {done}/{total}", end=end, file=sys.stderr, flush=True)

    return say
