"""`rlhf eval PPO --frontier`: reward, gold and KL of every snapshot of a PPO run, on the same held-out prompts and noise.

SFT is the first point, at KL 0. KL is the k1 estimate against SFT over whole answers, at the sampling temperature, as in the
evaluate stage. SFT stays in memory, the snapshots come and go. Files: plots/frontier.png.
"""

from pathlib import Path

import torch

from rlhf_core.comparison import Answer, describe
from rlhf_core.eval.answers import Panel
from rlhf_core.eval.compare import settings
from rlhf_core.eval.drawings import draw_frontier
from rlhf_core.eval.inputs import Prompts, language_model
from rlhf_core.eval.peak import Point, over_optimisation
from rlhf_core.eval.request import EvalRequest, Result


@torch.no_grad()
def evaluate_frontier(request: EvalRequest) -> Result:
    """The points of all `models`, after SFT's, and what the frontier says."""
    assert request.sft, "the command line names it"
    reference, tokenizer = language_model(request.sft)
    panel = Panel(request, Prompts(request), tokenizer)
    answers = {"sft": panel.answers("sft", reference)}
    for named in request.models:
        answers[named.name] = panel.answers(named.name, language_model(named.path)[0], reference)
    result = {
        "mode": "frontier",
        "prompts": len(panel.ids),
        **settings(request),
        "points": [{"name": name, **describe(rows, ())} for name, rows in answers.items()],
        **over_optimisation([_point(name, rows) for name, rows in answers.items()]),
    }
    if request.out:
        draw_frontier(Path(request.out) / "plots" / "frontier.png", result["points"])
    return result


def _point(name: str, rows: list[Answer]) -> Point:
    rewards = [a.reward for a in rows if a.reward is not None]
    golds = [a.gold["gold"] for a in rows if a.gold]
    return Point(name, [a.kl for a in rows], rewards or None, golds or None)
