"""Rollouts of an actor whose weights are divided among the ranks; started by `ranks.run`."""

import gc
import os
import weakref
from typing import Any

import torch
from scenarios import main

from rlhf_core import answer_sampler
from rlhf_core.distributed import gather
from rlhf_core.models import load_tokenizer
from rlhf_core.ppo_trainer import DeepSpeedPPOTrainer
from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine

PROMPTS = [[5, 6, 7], [9, 3], [8, 7, 6, 5, 4, 3, 10], [11, 12], [30, 2, 30], [13] * 6]
SPEC = {"max_response_tokens": 24, "rollout_batch_size": 6, "actor_optim": {"lr": 1e-3, "schedule": "constant"}}


class GivenUp(Exception):
    """Ends a rollout."""


def parts(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of what this rank holds of each weight."""
    return [p.ds_tensor.detach().clone() for p in model.parameters()]


def equal(before: list[torch.Tensor], now: list[torch.Tensor]) -> bool:
    return len(before) == len(now) and all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


class Watched:
    """Counts the passes of the twins that rollouts make, and sees whether their weights are gone."""

    def __init__(self) -> None:
        self.passes, self.twins, self._weights, make = 0, 0, [], answer_sampler.twin

        def watched(model: Any, merge: bool) -> Any:
            made = make(model, merge)
            own = [p for p in made.parameters() if all(p is not q for q in model.parameters())]
            self._weights += [weakref.ref(p) for p in own]
            made.register_forward_hook(lambda *_: self._passed())
            self.twins += 1
            return made

        answer_sampler.twin = watched

    def _passed(self) -> None:
        self.passes += 1

    def gone(self) -> bool:
        gc.collect()
        return all(weight() is None for weight in self._weights)


def gathered(folders: dict[str, str], spec: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank found: the same rollouts layer by layer and gathered once, one that is given up, and training after it."""
    watched = Watched()
    rank = int(os.environ["RANK"])
    tokenizer = load_tokenizer(folders["tokenizer"])
    mine = PROMPTS[rank::2]
    found: dict[str, Any] = {}
    for how in ("layers", "once"):
        args = {**SPEC, **spec, "zero_stage": 3, "rollout_gather": how, "rollout_micro_batch": 2}
        watched.passes = watched.twins = 0
        engine = DeepSpeedRLHFEngine(folders["actor"], folders["critic"], tokenizer, 2, args)
        trainer = DeepSpeedPPOTrainer(engine, args)
        model, result = engine.actor.module, {}
        trainer.train_rlhf(trainer.generate_experience({"prompt": mine, "sample_ids": range(rank, 6, 2)}))
        before = parts(model)
        made = trainer.sample({"prompt": mine, "sample_ids": [10 + rank, 12 + rank, 14 + rank]})
        result["kept"] = equal(before, parts(model))
        result["answers"] = [
            row[mask.bool()].tolist() for row, mask in zip(made.response_ids, made.response_mask, strict=True)
        ]
        result["logprobs"] = made.logprobs.tolist()
        result |= {"lock_step": trainer.sampler.lock_step, "twins": watched.twins, "passes": watched.passes}
        if how == "once":
            result["gone"] = watched.gone()
            result["given_up"] = _given_up(trainer, mine, rank)
            result["kept_after"] = equal(before, parts(model)) and watched.gone()
        scored = trainer.score(made)
        result["reference"] = scored.ref_logprobs.tolist()
        trainer.measure(scored)
        result["losses"] = trainer.train_rlhf(scored)
        found[how] = result
    return gather(found)


def _given_up(trainer: DeepSpeedPPOTrainer, mine: list[list[int]], rank: int) -> bool:
    """Whether a rollout ends by what is raised in it, on rank 1 alone; the others end theirs."""
    calls = 0

    def third() -> None:
        nonlocal calls
        calls += 1
        if rank and calls == 3:
            raise GivenUp

    trainer.give_up = third
    try:
        trainer.sample({"prompt": mine, "sample_ids": [20 + rank, 22 + rank, 24 + rank]})
    except GivenUp:
        return True
    finally:
        trainer.give_up = None
    return False


if __name__ == "__main__":
    main(globals())
