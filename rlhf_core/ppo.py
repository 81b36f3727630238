"""The PPO stage: a stream of prompts through `DeepSpeedPPOTrainer`.

Rollout `i` takes prompts `i*B … (i+1)*B - 1` of a stream of epochs (a permutation each, by seed and epoch); the position in the
stream names the answer for the sampling noise, so the same prompt meets new noise in every epoch and the run does not depend
on the number of processes. Saves actor and critic, and where they are asked for the actor's average, its adapter, and
snapshots of it on the way. Pretraining text for the mixture loss is a stream of its own, `ptx` of the data or the SFT share.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from rlhf_core.batches import Row, open_rows, step_rows
from rlhf_core.checkpointing import Checkpointer, Resumable
from rlhf_core.checkpoints import Position
from rlhf_core.context import JobContext
from rlhf_core.errors import IntegrityError
from rlhf_core.experience import Experience, deal_experience
from rlhf_core.lora import trained
from rlhf_core.models import load_tokenizer
from rlhf_core.ppo_args import PPOArgs
from rlhf_core.ppo_trainer import DeepSpeedPPOTrainer
from rlhf_core.reward_code import unpack
from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine
from rlhf_core.specs import PPOSpec

SAMPLES_LOGGED = 4
HISTORY = ("score", "kl_sequence", "eos_rate")


class PPOStage(Resumable):
    """Owns the loop of one PPO stage on this rank.

    Attributes:
        tokens, seconds: sampled and read, and spent in finished rollouts and their updates so far, before a resume too.
        history: what the stage's metrics are made of, for every rollout.
    """

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.spec = PPOSpec.model_validate(unpack(context.store, context.job, context.scratch / "code"))
        tokenizer = load_tokenizer(context.input("data", "tokenizer"))
        self.rows = open_rows(context.input("data", "ppo/train"))
        args = PPOArgs(self.spec, context.job.resources, context.seed)
        self.engine = DeepSpeedRLHFEngine(
            actor_model_name_or_path=str(context.input("sft", "model")),
            critic_model_name_or_path=str(context.input("reward", "model")) if "reward" in context.job.inputs else None,
            tokenizer=tokenizer,
            num_total_iters=self.spec.steps,
            args=args,
        )
        self.trainer = DeepSpeedPPOTrainer(engine=self.engine, args=args)
        self.trained = trained(self.engine.actor.module)
        self.shown: dict[str, float] = {}
        self.tokens = 0.0
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self._times = {"seconds_rollout": 0.0, "seconds_update": 0.0}
        self._count: Callable[[], None] = lambda: None
        self._alike = False  # whether all ranks make the same passes in what is under way
        self._answers: Experience | None = None
        self._experience: Experience | None = None
        self.texts = self._pretraining_rows() if self.spec.ptx else None

    def _pretraining_rows(self) -> Dataset:
        """The text of the mixture loss."""
        share = "ptx" if self.context.has_input("data", "ptx") else "sft"
        return open_rows(self.context.input("data", f"{share}/train"))

    def run(self) -> dict[str, Any]:
        """Resume if there is a checkpoint, train and save; returns the stage's metrics."""
        average = self.engine.actor_ema
        engines = {"actor": (self.engine.actor, average)}
        if self.engine.critic is not None:
            engines["critic"] = (self.engine.critic, None)
        with Checkpointer(self.context, self.engine.ranks, engines, self) as self.checkpoints:
            self.train()
        self.save()
        self.checkpoints.finish()
        last = self.history[-max(1, len(self.history) // 10) :]
        return {
            "steps": self.spec.steps,
            "parameters_trained": self.trained,
            "tokens": int(self.tokens),
            "tokens_per_second": self.tokens / self.seconds,
            "score_first": self.history[0]["score"],
            **{f"{name}_last": sum(m[name] for m in last) / len(last) for name in HISTORY},
            **self.checkpoints.metrics(),
        }

    def train(self) -> None:
        """Resume, and take all rollouts that are left."""
        self.trainer.give_up = self._stop_if_told
        position = self.checkpoints.restore() or Position(step=0, phase="rollout")
        for step in range(position.step, self.spec.steps):
            self.trainer.on_life = partial(self._tell, step)
            self._tell(step)
            metrics = self.step(step)
            self.tokens += metrics["rollout_tokens"] + metrics["prompt_tokens"]
            self.history.append({name: metrics[name] for name in HISTORY})
            self.context.log("train", step + 1, metrics)
            self.shown = {k: metrics[k] for k in ("score", "kl_sequence", "response_length", "eos_rate")}
            self.shown["tokens_per_second"] = self.tokens / self.seconds
            self._tell(step + 1)
            self._snapshot(step + 1)
            self.checkpoints.at(Position(step=step + 1, phase="rollout"), last=step + 1 == self.spec.steps)
        self.checkpoints.close(Position(step=self.spec.steps, phase="rollout"))

    def _tell(self, step: int) -> None:
        """Progress; the same again and again within a rollout, as a sign of life."""
        self.context.progress(step, self.spec.steps, "train", self.shown, unit="rollout")

    def step(self, step: int) -> dict[str, float]:
        """One rollout and the updates on it; what a checkpoint has of it is not done again."""
        if self._experience is None:
            if self._answers is None:
                self._answers = self._sample(step)
            self.checkpoints.at(Position(step=step, phase="score"))
            self._experience = self._score(step, self._answers)
            self._answers = None
            self.checkpoints.at(Position(step=step, phase="update"))
        self.trainer.on_update = partial(self._updated, step)
        with self._clock("update"):
            self.trainer.train_rlhf(self._experience, self.pretraining if self.texts is not None else None)
        if step % max(1, self.spec.steps // 10) == 0:
            self._log_answers(step, self._experience)
        self._experience = None
        times, self._times = self._times, dict.fromkeys(self._times, 0.0)
        self.seconds += sum(times.values())
        return {**self.trainer.metrics, **times}

    def _sample(self, step: int) -> Experience:
        self._alike = self.trainer.sampler.lock_step
        with self._clock("rollout"):
            found = self.checkpoints.unless_told(lambda: self.trainer.sample(self.prompts(step)))
        if found is None:
            self.checkpoints.at(Position(step=step, phase="rollout"))
        assert found is not None, "the job was told to end, and has"
        return found

    def _score(self, step: int, answers: Experience) -> Experience:
        self._alike = any(int(engine.zero_optimization_stage()) == 3 for engine in self.engine.models.values())
        with self._clock("rollout"):
            found = self.checkpoints.unless_told(lambda: self.trainer.score(answers))
        if found is None:
            self.checkpoints.at(Position(step=step, phase="score"))
        assert found is not None, "the job was told to end, and has"
        self.trainer.measure(found)
        return found

    def _stop_if_told(self) -> None:
        self.checkpoints.stop_if_told(self._alike, every=16)

    def _updated(self, step: int) -> None:
        self.checkpoints.at(Position(step=step, phase="update", update=self.trainer.updates))

    @contextmanager
    def _clock(self, part: str) -> Iterator[None]:
        """Count the seconds of a `with` block, but those that checkpoints take, to a part of the rollout under way."""
        before = self._times[f"seconds_{part}"]
        began, waited = time.monotonic(), self.checkpoints.seconds

        def count() -> None:
            spent = time.monotonic() - began - (self.checkpoints.seconds - waited)
            self._times[f"seconds_{part}"] = before + spent

        self._count = count
        yield
        count()

    def record(self) -> dict[str, Any]:
        """Counters, for a checkpoint."""
        self._count()
        own = {"tokens": self.tokens, "seconds": self.seconds, "history": self.history, "shown": self.shown}
        return {**own, "times": self._times, "world": self.engine.ranks.world, "trainer": self.trainer.record()}

    def own(self) -> dict[str, Tensor]:
        """This rank's part of the rollout that is under way."""
        flight = self._answers if self._experience is None else self._experience
        return flight.to("cpu").tensors() if flight is not None else {}

    def resume(
        self, position: Position, record: dict[str, Any], shared: dict[str, Tensor], own: Sequence[dict[str, Tensor]]
    ) -> None:
        """Take up what `record` and `own` said."""
        self.trainer.resume(record["trainer"])
        self.tokens, self.history, self.shown = record["tokens"], record["history"], record["shown"]
        self.seconds, self._times = record["seconds"], record["times"]
        if position.phase == "rollout":
            return
        ranks, parts = self.engine.ranks, [Experience(**tensors) for tensors in own]  # pyright: ignore
        if not parts:
            raise IntegrityError(f"checkpoint: the rollout under way at {position} is missing")
        pad = self.engine.tokenizer.pad_token_id
        if len(parts) > 1 or record["world"] != ranks.world:
            parts = [deal_experience(parts, pad, self.spec.answers, ranks.rank, ranks.world)]
        flight = parts[0].to(ranks.device)
        self._answers, self._experience = (flight, None) if position.phase == "score" else (None, flight)

    def pretraining(self, update: int) -> list[Row]:
        """The pretraining rows of one optimizer step, the same on all ranks."""
        assert self.texts is not None and self.spec.ptx is not None
        answers = self.spec.rollout_batch_size * self.spec.answers
        size = self.spec.ptx.batch_size or answers // self.spec.minibatches
        return self.texts.select(step_rows(len(self.texts), size, update, self.context.seed)).to_list()

    def save(self) -> None:
        """Write all models of the result."""
        out, inputs = self.context.out, self.context.job.inputs
        self.engine.save(out / "actor", out / "critic")
        if self.engine.actor_ema is not None:
            self.engine.save_ema(out / "actor_ema")
        reward = inputs.get("reward", inputs["sft"])
        self.engine.save_adapters(out, f"{inputs['sft'].id}/model", f"{reward.id}/model")

    def _snapshot(self, step: int) -> None:
        """A copy of the actor on the way; the last one is the result itself."""
        every = self.spec.snapshot_every
        if every and step % every == 0 and step < self.spec.steps:
            self.engine.save(self.context.out / "snapshots" / f"step-{step:06d}")

    def prompts(self, step: int) -> dict[str, Any]:
        """This rank's prompts of rollout `step`."""
        size, ranks = self.spec.rollout_batch_size, self.engine.ranks
        indices = step_rows(len(self.rows), size, step, self.context.seed)[ranks.rank :: ranks.world]
        names = [step * size + i for i in range(ranks.rank, size, ranks.world)]
        return {"prompt": self.rows.select(indices)["prompt_ids"], "sample_ids": names}

    def _log_answers(self, step: int, experience: Experience) -> None:
        """A few answers of this rollout, with their scores, to answers.jsonl."""
        if not self.context.is_main:
            return
        with (self.context.out / "answers.jsonl").open("a") as file:
            for row in range(min(SAMPLES_LOGGED, len(experience))):
                one = experience.rows(torch.tensor([row]))
                prompt = one.prompt_ids[0][one.prompt_mask[0].bool()]
                answer = one.response_ids[0][one.response_mask[0].bool()]
                text = {
                    "step": step + 1,
                    "prompt": self.engine.tokenizer.decode(prompt, skip_special_tokens=True),
                    "answer": self.engine.tokenizer.decode(answer, skip_special_tokens=True),
                    "score": round(float(one.scores[0]), 4),
                }
                file.write(json.dumps(text) + "\n")


def run(context: JobContext) -> dict[str, Any]:
    """The PPO stage."""
    return PPOStage(context).run()
