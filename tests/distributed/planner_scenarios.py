"""Real stages on real ranks, with the peak memory of their phases, to compare the planner with; started by `ranks.run`."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from memory_scenarios import Peak
from scenarios import INPUTS, main

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.context import JobContext
from rlhf_core.distributed import gather, start
from rlhf_core.engine import train_engine
from rlhf_core.models import new_causal_lm
from rlhf_core.partitioned import release_freed
from rlhf_core.ppo import PPOStage
from rlhf_core.resources import Resources
from rlhf_core.reward import RewardTrainer
from rlhf_core.sft import SFTTrainer
from rlhf_core.specs import ModelSpec, OptimSpec
from rlhf_core.store import Store


class PhasePeak(Peak):
    """Highest memory over what there was before a model was built, phase by phase."""

    def phase(self, work: Callable[[], Any]) -> tuple[Any, int]:
        """What `work` gives, and the highest memory while it ran, bytes over the base."""
        release_freed()
        with self._lock:
            self.highest = self._read()
        done = work()
        return done, self.rise()


def context_of(root: str, name: str, spec: dict[str, Any], resources: dict[str, Any], model: str) -> JobContext:
    """The stage's job on the store at `root`, its base model the folder `model`."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((Path(root) / "refs.json").read_text()).items()}
    out = Path(os.environ["RANKS_OUT"]) / f"out-{rank}"
    inputs = {k: refs[k] for k in INPUTS[name]}
    made = tiny.context(Store(f"file://{root}/store"), name, spec, inputs, out, rank, world)
    job = made.job.model_copy(update={"model": ModelSpec(path=model), "resources": Resources(**resources)})
    return dataclasses.replace(made, job=job)


def warm_up() -> None:
    """What a process needs once and for all, whatever the model: code that is loaded late, kernels, threads."""
    for precision in ("fp32", "bf16"):
        spec = ModelSpec(family="llama", hidden_size=32, layers=1, heads=2, positions=16)
        engine = train_engine(new_causal_lm(spec, tiny.tokenizer(), 0), OptimSpec(), Resources(), precision)
        ids = torch.randint(2, 30, (2, 8))
        engine.backward(engine(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().square().mean())
        engine.step()
    release_freed()


def measured(root: str, name: str, spec: dict[str, Any], resources: dict[str, Any], model: str) -> dict[str, int]:
    """Peak of each phase of two steps of a stage, bytes, the highest of all ranks."""
    start(0)
    warm_up()
    context = context_of(root, name, spec, resources, model)
    peak, found = PhasePeak(), {}
    if name == "ppo":
        stage = PPOStage(context)
        for step in range(2):
            answers, found["generation"] = peak.phase(lambda step=step: stage.trainer.sample(stage.prompts(step)))
            scored, found["scoring"] = peak.phase(lambda answers=answers: stage.trainer.score(answers))
            stage.trainer.measure(scored)
            _, found["training"] = peak.phase(lambda scored=scored: stage.trainer.train_rlhf(scored))
    else:
        trainer = (SFTTrainer if name == "sft" else RewardTrainer)(context)
        for step in range(2):
            _, found["training"] = peak.phase(lambda step=step: trainer.step(step))
    return {phase: max(each[phase] for each in gather(found)) for phase in found}


if __name__ == "__main__":
    main(globals())
