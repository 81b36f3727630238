"""The evaluate stage: base, SFT and PPO models answer held-out prompts; reward model, gold and KL judge the answers.

Every model answers the first N prompts of the PPO test set once, with the same noise. Prompts are cut into batches by
length before they are dealt to ranks, so a batch is computed alike whoever computes it and the numbers do not depend on
the number of processes. One model at a time is in memory, whole on every rank (nothing is partitioned); SFT comes last
because it also measures the others' KL. The base model takes part only if it is pretrained. Rank 0 writes
evaluation.json, samples.jsonl, report.html and plots/.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk

from rlhf_core import gold
from rlhf_core.batches import right_pad
from rlhf_core.comparison import MODELS, Answer, TokenLoss, evaluation_of, flat_metrics, sample_rows
from rlhf_core.context import JobContext
from rlhf_core.distributed import gather, start
from rlhf_core.errors import DataError, NonFiniteError
from rlhf_core.models import ValueModel, base_model, check_positions, forward_inputs, load_causal_lm, load_tokenizer
from rlhf_core.report import write_report
from rlhf_core.rollout import Rollout, Sampling, generate, noise_seed
from rlhf_core.scoring import end_scores, response_scores, target_logprobs
from rlhf_core.specs import EvaluateSpec

HELD_OUT_ROWS = 200
CURVE_STAGES = ("sft", "reward", "ppo")


class Evaluator:
    """Owns one evaluate stage on this rank."""

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.spec = EvaluateSpec.model_validate(context.job.spec)
        self.resources = context.job.resources
        self.ranks = start(context.seed)
        data = context.input("data")
        self.tokenizer = load_tokenizer(data / "tokenizer")
        self.prompts = first_rows(data / "ppo" / "test", self.spec.prompts)
        if not self.prompts:
            raise DataError("data.shares: no prompt is held out for evaluation; raise ppo, test, or give more data")
        lengths = [len(row["prompt_ids"]) for row in self.prompts]
        self.batches = self._mine(lengths, self.resources.rollout_micro_batch)
        self.held_out = first_rows(data / "sft" / "test", HELD_OUT_ROWS if self.spec.perplexity else 0)
        assert self.spec.max_response_tokens is not None, "the plan fills it in"
        self.sampling = Sampling(self.spec.max_response_tokens, self.spec.temperature)
        self.longest = max(lengths)

    def _mine(self, lengths: Sequence[int], size: int) -> list[list[int]]:
        """This rank's batches of row numbers: rows in order of length, cut evenly, then dealt in turn."""
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        size = math.ceil(len(order) / math.ceil(len(order) / size)) if order else size
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        return batches[self.ranks.rank :: self.ranks.world]

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Sample, judge, compare, write; returns the manifest's metrics."""
        began, sampling_seconds = time.monotonic(), 0.0
        rollouts: dict[str, list[Rollout]] = {}
        kl: dict[str, list[list[float]]] = {}
        losses: dict[str, dict[int, TokenLoss]] = {}
        for name, load in self._loaders().items():
            model: Any = load().to(self.ranks.device).eval()
            sampling_began = time.monotonic()
            rollouts[name] = self.sample(name, model)
            sampling_seconds += time.monotonic() - sampling_began
            losses[name] = self.held_out_losses(name, model)
            if name == "sft":
                kl = {other: self.divergence(other, parts, model) for other, parts in rollouts.items()}
            del model
        mine = self.judge(rollouts, kl)
        answers, token_losses = self._in_order(mine), self._in_order(losses)
        check_numbers(answers)
        settings = {
            "temperature": self.spec.temperature,
            "max_response_tokens": self.sampling.max_new_tokens,
            "seed": self.context.seed,
            "gold": self.spec.gold,
        }
        evaluation = evaluation_of(answers, token_losses, settings)
        tokens = sum(a.tokens for row in answers.values() for a in row)
        metrics = flat_metrics(evaluation) | {"tokens": tokens, "tokens_per_second": tokens / sampling_seconds}
        if self.context.is_main:
            self.write(evaluation, answers, metrics | {"seconds": time.monotonic() - began})
        return metrics | {"seconds": time.monotonic() - began}

    def _loaders(self) -> dict[str, Callable[[], Any]]:
        """How to load each language model; SFT comes last."""
        context, spec = self.context, self.context.job.model
        loaders: dict[str, Callable[[], Any]] = {}
        if spec is not None and spec.path is not None:
            loaders["base"] = lambda: base_model(spec, self.tokenizer, context.seed)
        loaders["ppo"] = lambda: load_causal_lm(str(context.input("ppo") / "actor"))
        loaders["sft"] = lambda: load_causal_lm(str(context.input("sft") / "model"))
        return loaders

    def sample(self, name: str, model: Any) -> list[Rollout]:
        """One answer to each prompt of this rank, a rollout a batch; the noise is named by the prompt's number."""
        check_positions(model.config, self.longest, self.sampling.max_new_tokens)
        rollouts: list[Rollout] = []
        for done, rows in enumerate(self.batches):
            rollout = generate(
                model,
                [self.prompts[i]["prompt_ids"] for i in rows],
                rows,
                self.sampling,
                seed=noise_seed(self.context.seed, "evaluate"),
                eos=self.tokenizer.eos_token_id,
                pad=self.tokenizer.pad_token_id,
                batch_size=len(rows),
            )
            rollouts.append(rollout)
            self.context.progress(done + 1, len(self.batches), f"sample {name}", unit="batch")
        return rollouts

    def held_out_losses(self, name: str, model: Any) -> dict[int, TokenLoss]:
        """-log p of the held-out SFT responses of this rank, by row."""
        found: dict[int, TokenLoss] = {}
        batches = self._mine([len(row["input_ids"]) for row in self.held_out], self.resources.micro_batch)
        for done, rows in enumerate(batches):
            texts = [self.held_out[i]["input_ids"] for i in rows]
            ids = right_pad(texts, self.tokenizer.pad_token_id, self.ranks.device)
            mask = right_pad([[1] * len(text) for text in texts], 0, self.ranks.device)
            labelled = right_pad([self.held_out[i]["loss_mask"] for i in rows], 0, self.ranks.device)[:, 1:].bool()
            logits = model(**forward_inputs(model, ids, mask), use_cache=False).logits[:, :-1]
            loss = torch.zeros(labelled.shape, device=self.ranks.device)
            loss[labelled] = -target_logprobs(logits[labelled], ids[:, 1:][labelled])
            sums, counts = loss.double().sum(1).tolist(), labelled.sum(1).tolist()
            found.update({i: TokenLoss(s, n) for i, s, n in zip(rows, sums, counts, strict=True) if n})
            self.context.progress(done + 1, len(batches), f"perplexity {name}", unit="batch")
        return found

    def divergence(self, name: str, rollouts: Sequence[Rollout], sft: Any) -> list[list[float]]:
        """log p(answer | model) - log p(answer | sft) of each answer, nats, a list a batch; 0 for SFT itself."""
        if name == "sft":
            return [[0.0] * len(r.response_ids) for r in rollouts]
        found: list[list[float]] = []
        for done, rollout in enumerate(rollouts):
            own: list[float] = []
            for part in self._micro_batches(rollout):
                sequence = (part.prompt_ids, part.prompt_mask, part.response_ids, part.response_mask)
                reference = response_scores(sft, *sequence, self.spec.temperature).logprobs
                difference = torch.where(part.response_mask.bool(), part.logprobs - reference, 0.0)
                own += difference.double().sum(1).tolist()
            found.append(own)
            self.context.progress(done + 1, len(rollouts), f"KL {name}", unit="batch")
        return found

    def judge(
        self, rollouts: dict[str, list[Rollout]], kl: dict[str, list[list[float]]]
    ) -> dict[str, dict[int, Answer]]:
        """Reward scores and gold of all answers of this rank: model -> prompt number -> answer."""
        reward = ValueModel.load(self.context.input("reward") / "model").normalize(True).to(self.ranks.device).eval()
        answers: dict[str, dict[int, Answer]] = {name: {} for name in rollouts}
        for name, parts in rollouts.items():
            for done, (rows, rollout, divergence) in enumerate(zip(self.batches, parts, kl[name], strict=True)):
                scores = self._scores(reward, rollout)
                judged = self._answers(rows, rollout, scores, divergence)
                answers[name].update(zip(rows, judged, strict=True))
                self.context.progress(done + 1, len(parts), f"judge {name}", unit="batch")
        return answers

    def _scores(self, reward: ValueModel, rollout: Rollout) -> list[float]:
        scores: list[float] = []
        for part in self._micro_batches(rollout):
            ids = torch.cat([part.prompt_ids, part.response_ids], 1)
            mask = torch.cat([part.prompt_mask, part.response_mask], 1)
            scores += end_scores(reward, ids, mask).tolist()
        return scores

    def _answers(
        self, rows: Sequence[int], rollout: Rollout, scores: Sequence[float], kl: Sequence[float]
    ) -> list[Answer]:
        ids = rollout.responses()
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        prompts = [self.prompts[i]["prompt"] for i in rows]
        golds = gold.score(self.spec.gold, prompts, texts) if self.spec.gold else [{} for _ in rows]
        return [
            Answer(text, len(tokens), tokens[-1] == self.tokenizer.eos_token_id, divergence, score, judged)
            for text, tokens, divergence, score, judged in zip(texts, ids, kl, scores, golds, strict=True)
        ]

    def _micro_batches(self, rollout: Rollout) -> list[Rollout]:
        """The rollout in rows of `micro_batch`, for forward passes over whole answers."""
        size, count = self.resources.micro_batch, len(rollout.response_ids)
        names = ("prompt_ids", "prompt_mask", "response_ids", "response_mask", "logprobs", "entropy")
        return [Rollout(*(getattr(rollout, n)[i : i + size] for n in names)) for i in range(0, count, size)]

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
            title=f"{context.job.output.name}: did PPO help?",
            stages={stage: read_rows(context.input(stage) / "metrics.jsonl") for stage in CURVE_STAGES},
            evaluation=evaluation,
            samples=samples[: self.spec.samples],
            lineage=lineage(context, metrics),
        )
        context.progress(1, 1, "report")


def check_numbers(answers: Mapping[str, Sequence[Answer]]) -> None:
    """NonFiniteError if a model's answers have a score or KL that is not finite; alike on all ranks."""
    for model, rows in answers.items():
        if bad := sum(not (math.isfinite(a.reward) and math.isfinite(a.kl)) for a in rows):
            raise NonFiniteError(
                f"evaluate: {bad} of {len(rows)} answers of {model} have a score or KL that is not finite"
            )


def first_rows(folder: Path, most: int) -> list[dict[str, Any]]:
    """The first rows of a data set, in its order."""
    data = load_from_disk(str(folder))
    assert isinstance(data, Dataset)
    return data.select(range(min(most, len(data)))).to_list()


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
