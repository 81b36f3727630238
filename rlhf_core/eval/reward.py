"""`rlhf eval` of a reward model: its scores of the held-out pairs, and what they say (`pairs`).

Scores are taken as training takes them, at the last token of each answer, chosen and rejected of a pair in one forward pass.
Files: pairs.jsonl (texts, scores, lengths of every pair) and plots/reliability.png, plots/length.png.
"""

import json
from pathlib import Path
from typing import Any

import torch

from rlhf_core.batches import pair_length
from rlhf_core.errors import ConfigError, NonFiniteError
from rlhf_core.eval.drawings import draw_length, draw_reliability
from rlhf_core.eval.inputs import device, held_out, tell
from rlhf_core.eval.pairs import Pair, describe_pairs
from rlhf_core.eval.request import EvalRequest, Result
from rlhf_core.measure import RewardScorer, by_length
from rlhf_core.models import load_tokenizer


@torch.no_grad()
def evaluate_reward(request: EvalRequest) -> Result:
    """Numbers of the reward model at `models[0]` on the held-out pairs of `data`."""
    rows = held_out(request, "reward")
    if request.data is None:
        raise ConfigError("rlhf eval: a reward model needs its data artifact")
    tokenizer = load_tokenizer(Path(request.data) / "tokenizer")
    scorer = RewardScorer(Path(request.models[0].path), tokenizer, device(), request.micro_batch)
    pairs = score_pairs(scorer, rows, request.micro_batch)
    result = {"mode": "reward", "model": request.models[0].name, **describe_pairs(pairs)}
    if request.out:
        write(Path(request.out), rows, pairs, result)
    return result


def score_pairs(scorer: RewardScorer, rows: list[dict[str, Any]], micro_batch: int) -> list[Pair]:
    """The pairs with their scores, as the model gives them, in the order of the rows."""
    batches, say = by_length([pair_length(row) for row in rows], micro_batch), tell("score")
    found: dict[int, Pair] = {}
    for done, batch in enumerate(batches):
        texts = [(rows[i]["prompt_ids"], rows[i][side]) for side in ("chosen_ids", "rejected_ids") for i in batch]
        raw = [score * scorer.std + scorer.mean for score in scorer.score_rows(texts)]
        for i, chosen, rejected in zip(batch, raw[: len(batch)], raw[len(batch) :], strict=True):
            sizes = len(rows[i]["chosen_ids"]), len(rows[i]["rejected_ids"])
            found[i] = Pair(str(rows[i].get("source") or "all"), chosen, rejected, *sizes)
        say(done + 1, len(batches))
    pairs = [found[i] for i in range(len(rows))]
    if bad := sum(not abs(p.chosen) + abs(p.rejected) < float("inf") for p in pairs):
        raise NonFiniteError(f"rlhf eval: {bad} of {len(pairs)} pairs have a score that is not finite")
    return pairs


def write(out: Path, rows: list[dict[str, Any]], pairs: list[Pair], result: Result) -> None:
    """pairs.jsonl and the plots."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row, pair in zip(rows, pairs, strict=True):
            texts = {name: row[name] for name in ("prompt", "chosen", "rejected")}
            scores = {"chosen_score": pair.chosen, "rejected_score": pair.rejected}
            tokens = {"chosen_tokens": pair.chosen_tokens, "rejected_tokens": pair.rejected_tokens}
            file.write(json.dumps({"source": pair.source, **texts, **scores, **tokens}, ensure_ascii=False) + "\n")
    draw_reliability(out / "plots" / "reliability.png", result["calibration"])
    draw_length(out / "plots" / "length.png", result["length"])
