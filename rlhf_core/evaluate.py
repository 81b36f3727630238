"""The evaluate stage: base, SFT and PPO or DPO models answer held-out prompts; reward model, gold and KL judge the answers.

Every model answers N prompts of the PPO test set once, with the same noise; where there are more, a seeded sample of them,
so that every source is represented. Prompts are cut into batches by length before they are dealt to ranks, so a batch is
computed alike whoever computes it and the numbers do not depend on the number of processes. One model at a time is in
memory, in fp32: whole on every rank, or with resources.zero_stage 3 divided among them, who then run the same number of
forward passes. SFT comes last because it also measures the others' KL. The base model takes part only if it is
pretrained, the average of PPO's actor (`ppo_ema`) only if there is one, the reward model only if the pipeline has one.
Rank 0 writes evaluation.json, samples.jsonl, report.html and plots/.
"""

import gc
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core import gold
from rlhf_core.batches import Row, open_rows, some_rows
from rlhf_core.checkpointing import Checkpointer, Resumable
from rlhf_core.checkpoints import Position
from rlhf_core.comparison import MODELS, Answer, TokenLoss, aligned_of, evaluation_of, flat_metrics, sample_rows
from rlhf_core.context import JobContext
from rlhf_core.distributed import gather, start
from rlhf_core.engine import frozen_engine, zero_init
from rlhf_core.errors import NonFiniteError
from rlhf_core.measure import RewardScorer, by_length, deal_batches, divergence, sample, token_losses
from rlhf_core.models import ValueModel, base_model, load_causal_lm, load_tokenizer
from rlhf_core.plots import label
from rlhf_core.report import write_report
from rlhf_core.rollout import Rollout, Sampling, noise_seed
from rlhf_core.specs import EvaluateSpec

HELD_OUT_ROWS = 200
CURVE_STAGES = ("sft", "reward", "ppo", "dpo")


class Evaluator(Resumable):
    """Owns one evaluate stage on this rank.

    Attributes:
        rollouts, losses: of the models that are done, in order: answers, a rollout a batch, and losses of held-out rows.
        kl: nats to SFT of every answer, a list a batch; when all models are done.
        sampling_seconds: spent in sampling.
    """

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.spec = EvaluateSpec.model_validate(context.job.spec)
        self.resources = context.job.resources
        self.ranks = start(context.seed)
        self.tokenizer = load_tokenizer(context.input("data", "tokenizer"))
        self.zero_init = zero_init(self.resources, "fp32")
        self.prompts = held_out_rows(context.input("data", "ppo/test"), self.spec.prompts, context.seed)
        self.batches = self._mine([len(row["prompt_ids"]) for row in self.prompts], self.resources.rollout_micro_batch)
        self.held_out: list[Row] = []
        if self.spec.perplexity:
            self.held_out = held_out_rows(context.input("data", "sft/test"), HELD_OUT_ROWS, context.seed)
        assert self.spec.max_response_tokens is not None, "the plan fills it in"
        self.sampling = Sampling(self.spec.max_response_tokens, self.spec.temperature, vocabulary=len(self.tokenizer))
        self.rollouts: dict[str, list[Rollout]] = {}
        self.losses: dict[str, dict[int, TokenLoss]] = {}
        self.kl: dict[str, list[list[float]]] = {}
        self.sampling_seconds = 0.0

    def _mine(self, lengths: Sequence[int], size: int) -> list[list[int]]:
        """This rank's batches of row numbers; at ZeRO-3 as many on every rank."""
        return deal_batches(by_length(lengths, size), self.ranks.rank, self.ranks.world, self.zero_init is not None)

    @property
    def _passes(self) -> int | None:
        """At ZeRO-3: forward passes over a batch of answers on every rank."""
        if self.zero_init is None:
            return None
        largest = min(len(self.prompts), self.resources.rollout_micro_batch)
        return math.ceil(largest / self.resources.micro_batch)

    def placed(self, model: Any) -> Any:
        """A model that only scores, whole on this rank's device, or divided as it was loaded (`zero_init`)."""
        if self.zero_init is None:
            return model.to(self.ranks.device).eval()
        return frozen_engine(model, self.resources, "fp32").module

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Sample, judge, compare, write; returns the manifest's metrics."""
        with Checkpointer(self.context, self.ranks, {}, self) as self.checkpoints:
            self.checkpoints.restore()
            for name, load in self._loaders().items():
                if name in self.rollouts:
                    continue
                done = Position(step=len(self.rollouts))
                if self.checkpoints.unless_told(partial(self.measure, name, load)) is None:
                    self.rollouts.pop(name, None)  # other ranks may have come to the end of it
                    self.losses.pop(name, None)
                    self.kl = {}
                    self.checkpoints.at(done)
                gc.collect()  # an engine is a cycle of references, which would keep its weights
                self.checkpoints.at(Position(step=len(self.rollouts)), always=True)
            self.checkpoints.close(Position(step=len(self.rollouts)))
        mine = self.judge(self.rollouts, self.kl)
        answers, token_losses = self._in_order(mine), self._in_order(self.losses)
        check_numbers(answers)
        settings = {
            "temperature": self.spec.temperature,
            "max_response_tokens": self.sampling.max_new_tokens,
            "seed": self.context.seed,
            "gold": self.spec.gold,
        }
        evaluation = evaluation_of(answers, token_losses, settings)
        tokens = sum(a.tokens for row in answers.values() for a in row)
        metrics = flat_metrics(evaluation) | {"tokens": tokens, "tokens_per_second": tokens / self.sampling_seconds}
        if self.context.is_main:
            self.write(evaluation, answers, metrics | {"seconds": time.monotonic() - self.context.started})
        return metrics | {"seconds": time.monotonic() - self.context.started}

    def measure(self, name: str, load: Callable[[], Any]) -> bool:
        """Everything that one language model has to do; for SFT, the last, the KL of the others' answers as well."""
        model = self.placed(load())
        began = time.monotonic()
        rollouts = self.sample(name, model)
        seconds = time.monotonic() - began
        losses = self.held_out_losses(name, model)
        if name == "sft":
            answers = {**self.rollouts, name: rollouts}
            self.kl = {other: self.divergence(other, parts, model) for other, parts in answers.items()}
        self.rollouts[name], self.losses[name] = rollouts, losses
        self.sampling_seconds += seconds
        return True

    def record(self) -> dict[str, Any]:
        """What this rank has measured of the models that are done, for a checkpoint."""
        losses = {
            name: {str(i): [loss.nats, loss.tokens] for i, loss in rows.items()} for name, rows in self.losses.items()
        }
        own = {"dealt": self._dealt(), "seconds": self.sampling_seconds, "losses": losses, "kl": self.kl}
        return {**own, "models": {name: len(parts) for name, parts in self.rollouts.items()}}

    def _dealt(self) -> list[int]:
        return [
            self.ranks.world,
            self.resources.rollout_micro_batch,
            self.resources.micro_batch,
            int(self.zero_init is None),
        ]

    def own(self) -> dict[str, Tensor]:
        """This rank's answers of the models that are done."""
        return {
            f"{name}/{i}/{field}": value.cpu()
            for name, parts in self.rollouts.items()
            for i, part in enumerate(parts)
            for field, value in vars(part).items()
            if value is not None
        }

    def accepts(self, record: dict[str, Any]) -> bool:
        """Whether the batches are dealt as they were; else every model answers anew."""
        if record["dealt"] != self._dealt():
            self.context.say("checkpoint passed over: the prompts are dealt to other processes or batches now")
            return False
        return True

    def resume(
        self, position: Position, record: dict[str, Any], shared: dict[str, Tensor], own: Sequence[dict[str, Tensor]]
    ) -> None:
        """Take up what `record` and `own` said."""
        self.sampling_seconds, self.kl = record["seconds"], record["kl"]
        rows = {n: {int(i): TokenLoss(*loss) for i, loss in found.items()} for n, found in record["losses"].items()}
        self.losses = rows
        for name, count in record["models"].items():
            parts: list[dict[str, Tensor]] = [{} for _ in range(count)]
            for key, value in own[0].items() if own else ():
                model, i, field = key.rsplit("/", 2)
                if model == name:
                    parts[int(i)][field] = value.to(self.ranks.device)
            self.rollouts[name] = [Rollout(**part) for part in parts]

    def _loaders(self) -> dict[str, Callable[[], Any]]:
        """How to load each language model; SFT comes last."""
        context, spec = self.context, self.context.job.model
        loaders: dict[str, Callable[[], Any]] = {}
        if spec is not None and spec.path is not None:
            loaders["base"] = lambda: base_model(spec, self.tokenizer, context.seed, zero_init=self.zero_init)
        for name, folder in self._aligned().items():
            loaders[name] = partial(load_causal_lm, str(folder), zero_init=self.zero_init)
        loaders["sft"] = partial(load_causal_lm, str(context.input("sft", "model")), zero_init=self.zero_init)
        return loaders

    def _aligned(self) -> dict[str, Path]:
        """The folders of what preferences made of SFT: PPO's actor and its average, or DPO's model."""
        stage = aligned_of(self.context.job.inputs)
        assert stage, f"evaluate needs ppo or dpo among its inputs, it has {list(self.context.job.inputs)}"
        if stage == "dpo":
            return {"dpo": self.context.input(stage, "model")}
        names = {"ppo": "actor", "ppo_ema": "actor_ema"}
        return {name: self.context.input(stage, f) for name, f in names.items() if self.context.has_input(stage, f)}

    def _tell(self, phase: str) -> Callable[[int, int], None]:
        def tell(done: int, total: int) -> None:
            self.context.progress(done, total, phase, unit="batch")
            self.checkpoints.stop_if_told(alike=self.zero_init is not None)

        return tell

    def sample(self, name: str, model: Any) -> list[Rollout]:
        """One answer to each prompt of this rank, a rollout a batch."""
        prompts = [row["prompt_ids"] for row in self.prompts]
        seed, tell = noise_seed(self.context.seed, "evaluate"), self._tell(f"sample {name}")
        lock_step = self.zero_init is not None
        return sample(model, self.tokenizer, prompts, self.batches, self.sampling, seed, tell, lock_step)

    def held_out_losses(self, name: str, model: Any) -> dict[int, TokenLoss]:
        """-log p of the held-out SFT responses of this rank, by row."""
        batches = self._mine([len(row["input_ids"]) for row in self.held_out], self.resources.micro_batch)
        return token_losses(
            model, self.tokenizer.pad_token_id, self.held_out, batches, self._tell(f"perplexity {name}")
        )

    def divergence(self, name: str, rollouts: Sequence[Rollout], sft: Any) -> list[list[float]]:
        """log p(answer | model) - log p(answer | sft) of each answer, nats, a list a batch; 0 for SFT itself."""
        if name == "sft":
            return [[0.0] * len(r.response_ids) for r in rollouts]
        tell = self._tell(f"KL {name}")
        return divergence(sft, rollouts, self.sampling, self.resources.micro_batch, tell, self._passes)

    def judge(
        self, rollouts: dict[str, list[Rollout]], kl: dict[str, list[list[float]]]
    ) -> dict[str, dict[int, Answer]]:
        """Reward scores and gold of all answers of this rank: model -> prompt number -> answer."""
        reward = None
        if "reward" in self.context.job.inputs:
            folder = self.context.input("reward", "model")
            model = self.placed(ValueModel.load(folder, zero_init=self.zero_init))
            reward = RewardScorer(folder, self.tokenizer, self.ranks.device, self.resources.micro_batch, model)
        answers: dict[str, dict[int, Answer]] = {name: {} for name in rollouts}
        for name, parts in rollouts.items():
            for done, (rows, rollout, nats) in enumerate(zip(self.batches, parts, kl[name], strict=True)):
                scores = reward.scores(rollout, self._passes) if reward else [None] * len(rows)
                if rows:
                    answers[name].update(zip(rows, self._answers(rows, rollout, scores, nats), strict=True))
                self.context.progress(done + 1, len(parts), f"judge {name}", unit="batch")
        return answers

    def _answers(
        self, rows: Sequence[int], rollout: Rollout, scores: Sequence[float | None], kl: Sequence[float]
    ) -> list[Answer]:
        ids = rollout.responses()
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = [self.prompts[i]["prompt"] for i in rows]
        golds = gold.score(self.spec.gold, prompts, texts) if self.spec.gold else [{} for _ in rows]
        return [
            Answer(text, len(tokens), tokens[-1] == self.tokenizer.eos_token_id, nats, score, judged)
            for text, tokens, nats, score, judged in zip(texts, ids, kl, scores, golds, strict=True)
        ]

    def _in_order(self, mine: dict[str, dict[int, Any]]) -> dict[str, list[Any]]:
        """Every rank's records of every model, in the order of their rows, on every rank; collective."""
        ranks = gather(mine)
        merged = {name: {i: v for part in ranks for i, v in part[name].items()} for name in MODELS if name in mine}
        return {name: [records[i] for i in sorted(records)] for name, records in merged.items()}

    def write(self, evaluation: dict[str, Any], answers: dict[str, list[Answer]], metrics: dict[str, Any]) -> None:
        """evaluation.json, samples.jsonl, report.html and plots/ in the output folder."""
        self.context.progress(0, 1, "report")
        out, context = self.context.out, self.context
        (out / "evaluation.json").write_text(json.dumps(evaluation, indent=1, allow_nan=False))
        samples = sample_rows([row["prompt"] for row in self.prompts], answers)
        with (out / "samples.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in samples)
        write_report(
            out,
            title=f"{context.job.output.name}: did {label(aligned_of(answers) or '')} help?",
            stages={
                stage: read_rows(context.input(stage, "metrics.jsonl"))
                for stage in CURVE_STAGES
                if stage in context.job.inputs
            },
            evaluation=evaluation,
            samples=samples[: self.spec.samples],
            lineage=lineage(context, metrics),
        )
        context.progress(1, 1, "report")


def check_numbers(answers: Mapping[str, Sequence[Answer]]) -> None:
    """NonFiniteError if a model's answers have a score or KL that is not finite; alike on all ranks."""
    for model, rows in answers.items():
        if bad := sum(not (math.isfinite(a.reward or 0.0) and math.isfinite(a.kl)) for a in rows):
            raise NonFiniteError(
                f"evaluate: {bad} of {len(rows)} answers of {model} have a score or KL that is not finite"
            )


def held_out_rows(folder: Path, most: int, seed: int) -> list[Row]:
    """Up to `most` rows of a split, in its order: all, or a seeded sample. DataError if there are none."""
    rows = open_rows(folder)
    return rows.select(some_rows(len(rows), most, seed)).to_list()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def lineage(context: JobContext, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The base model, the inputs in the order of the pipeline, and this evaluation."""
    model = context.job.model
    rows: list[dict[str, Any]] = []
    if model is not None:
        origin = model.path or f"new {model.family}, {model.layers} layers of {model.hidden_size}"
        rows.append({"stage": "base model", "id": origin})
    for name in context.job.inputs:
        manifest = context.input_manifest(name)
        seconds = manifest.metrics.get("seconds")
        facts = {"id": manifest.ref.id, "created": manifest.created, "seconds": seconds, "metrics": manifest.metrics}
        rows.append({"stage": manifest.ref.stage, **facts})
    facts = {"id": context.job.output.id, "created": "this report", "seconds": metrics["seconds"], "metrics": metrics}
    return [*rows, {"stage": context.job.stage, **facts}]


def run(context: JobContext) -> dict[str, Any]:
    """The evaluate stage."""
    return Evaluator(context).run()
