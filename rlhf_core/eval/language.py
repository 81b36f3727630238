"""`rlhf eval` of a language model: perplexity of the held-out SFT responses, in all and for each source.

A token mean over all responses, as in training; the interval is over responses (delta method), since the tokens of one are
not independent. Prompt tokens are not counted. For PPO and DPO this is the alignment tax: what SFT's examples cost now.
"""

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_core import stats
from rlhf_core.comparison import TokenLoss
from rlhf_core.errors import DataError
from rlhf_core.eval.inputs import held_out, language_model, tell
from rlhf_core.eval.request import EvalRequest, Result
from rlhf_core.measure import by_length, token_losses


@torch.no_grad()
def evaluate_language(request: EvalRequest) -> Result:
    """Perplexity of the model at `models[0]` on the held-out SFT responses of `data`."""
    rows = held_out(request, "sft")
    model, tokenizer = language_model(request.models[0].path)
    batches = by_length([len(row["input_ids"]) for row in rows], request.micro_batch)
    losses = token_losses(model, tokenizer.pad_token_id, rows, batches, tell("perplexity"))
    if not losses:
        raise DataError(
            "no held-out response has a token that is trained on; see data.truncate_responses and loss masks"
        )
    sources = sorted({_source(rows[i]) for i in losses})
    return {
        "mode": "language",
        "model": request.models[0].name,
        **summary(list(losses.values())),
        "sources": {name: summary([v for i, v in losses.items() if _source(rows[i]) == name]) for name in sources},
    }


def summary(losses: Sequence[TokenLoss]) -> dict[str, Any]:
    """{"perplexity", "loss"} with intervals, "responses" and "tokens"."""
    loss = stats.ratio([one.nats for one in losses], [float(one.tokens) for one in losses])
    tokens = sum(one.tokens for one in losses)
    facts = {"responses": len(losses), "tokens": tokens}
    return {"perplexity": stats.exp(loss).as_dict(), "loss": loss.as_dict(), **facts}


def _source(row: dict[str, Any]) -> str:
    return str(row.get("source") or "all")
