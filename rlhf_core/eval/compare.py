"""`rlhf eval A B`: two models answer the same prompts with the same noise, side by side, with scores and paired numbers.

B is compared with A, prompt by prompt. The reward model scores both and gold judges both where there are any. Files:
answers.jsonl (every prompt with both answers) and answers.html (one page, the first prompts in order, not chosen).
"""

import json
from pathlib import Path
from typing import Any

import torch

from rlhf_core.comparison import Answer, compare, describe
from rlhf_core.eval.answers import Panel
from rlhf_core.eval.inputs import Prompts, language_model
from rlhf_core.eval.page import write_page
from rlhf_core.eval.request import EvalRequest, NamedModel, Result


@torch.no_grad()
def evaluate_pair(request: EvalRequest) -> Result:
    """Answers of `models[0]` (A) and `models[1]` (B), each one's numbers, and B against A."""
    prompts = Prompts(request)
    first, second = (_answers(request, prompts, named) for named in request.models)
    numbers = [describe(first, ()), describe(second, ())]
    numbers = [{k: v for k, v in one.items() if not k.startswith("kl_")} for one in numbers]  # neither is a reference
    result = {
        "mode": "compare",
        "models": [model.name for model in request.models],
        "prompts": len(prompts.texts),
        **settings(request),
        "numbers": numbers,
        **compare(second, first),
        "rows": [
            {"index": i, "prompt": prompt, "answers": [_row(first[i]), _row(second[i])]}
            for i, prompt in enumerate(prompts.texts)
        ],
    }
    if request.out:
        write(Path(request.out), result)
    return result


def settings(request: EvalRequest) -> dict[str, Any]:
    """How the answers were made, for the record."""
    how = {"greedy": True} if request.greedy else {"temperature": request.temperature, "seed": request.seed}
    return {**how, "max_new_tokens": request.max_new_tokens, "gold": request.gold}


def _answers(request: EvalRequest, prompts: Prompts, named: NamedModel) -> list[Answer]:
    model, tokenizer = language_model(named.path, prompts.own)
    return Panel(request, prompts, tokenizer).answers(named.name, model)


def _row(answer: Answer) -> dict[str, Any]:
    row: dict[str, Any] = {"text": answer.text, "tokens": answer.tokens, "eos": answer.eos}
    if answer.reward is not None:
        row["reward"] = answer.reward
    if answer.gold:
        row["gold"] = answer.gold["gold"]
    return row


def write(out: Path, result: Result) -> None:
    """answers.jsonl and answers.html."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "answers.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in result["rows"])
    write_page(out / "answers.html", result)
