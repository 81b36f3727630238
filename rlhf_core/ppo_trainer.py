"""`DeepSpeedPPOTrainer`: rollouts and PPO updates on the engines of `DeepSpeedRLHFEngine`.

    for prompt_batch in prompt_train_dataloader:
        out = trainer.generate_experience(prompt_batch)
        actor_loss, critic_loss = trainer.train_rlhf(out)

Per rollout: sample answers (their log-probabilities are the old ones: same weights, same distribution), score them with
reference, critic and reward sources, then `ppo_epochs` passes of `minibatches` optimizer steps over the global batch. Dropout
is off in all models. Without a critic (RLOO, REINFORCE++, GRPO) the answers to one prompt, or the batch, are the baseline.
`trainer.metrics` holds the health metrics of the last call. The PPO stage runs on these two classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core import ppo_math as pm
from rlhf_core.answer_sampler import AnswerSampler
from rlhf_core.answer_scorer import AnswerScorer
from rlhf_core.batches import Row, deal
from rlhf_core.distributed import sum_over_ranks
from rlhf_core.engine import check_finite, grad_norm, set_lr
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.experience import Experience, gather_experience
from rlhf_core.models import check_positions
from rlhf_core.ppo_args import PPOArgs, ppo_args
from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine
from rlhf_core.rollout_metrics import rollout_metrics
from rlhf_core.scoring import label_nats, response_scores

PretrainingRows = Callable[[int], Sequence[Row]]
RECORDED = ("kl_coef", "iteration", "optimizer_step", "samples", "metrics", "updates", "update_sums", "last_kl")
ACTOR_SUMS = ("actor_loss", "approx_kl", "clip_fraction", "entropy_update", "ratio_mean", "kl_loss")


class DeepSpeedPPOTrainer:
    """PPO on one `DeepSpeedRLHFEngine`.

    Attributes:
        metrics: of the last `generate_experience` and `train_rlhf`, names as in the README.
        kl_coef: the current KL coefficient (moves with the adaptive controller).
        iteration: finished `train_rlhf` calls.
        updates, update_sums, last_kl: optimizer steps done in the `train_rlhf` call under way, the sums of their
            statistics, the policy's move in the last; a call with these set goes on after them.
        on_update: called after every optimizer step.
        give_up: called before every token and every micro-batch of scores; may raise to end the rollout there.
        on_life: called after every batch of answers, scores and updates, as a sign of life within a rollout.
    """

    def __init__(self, engine: DeepSpeedRLHFEngine, args: Any = None) -> None:
        """`args` as for the engine; default: the engine's."""
        self.engine = engine
        self.args: PPOArgs = engine.args if args is None else ppo_args(args)
        self.spec, self.resources = self.args.spec, self.args.resources
        self.ranks = engine.ranks
        self.tokenizer = engine.tokenizer
        self.kl_coef = self.spec.kl_coef
        self.iteration = 0
        self.optimizer_step = 0
        self.samples = 0
        self.metrics: dict[str, float] = {}
        self._forget_updates()
        self.on_update: Callable[[], None] | None = None
        self.on_life: Callable[[], None] | None = None
        self.total_steps = engine.num_total_iters * self.spec.ppo_epochs * self.spec.minibatches
        self.vocabulary = len(self.tokenizer)
        self.give_up: Callable[[], None] | None = None
        self.sampler = AnswerSampler(engine, self.args)
        self.scorer = AnswerScorer(engine, self.args, self._scored)

    def generate_experience(self, prompt_batch: Mapping[str, Any]) -> Experience:
        """Sample `samples_per_prompt` answers to each prompt of this rank and score them.

        Args:
            prompt_batch: "prompt" `[batch, tokens]` left-padded ids with "prompt_att_mask" of the same shape (as
                DeepSpeed-Chat's loader yields; without a mask, pad tokens are masked), or "prompt" as lists of ids;
                optionally "sample_ids" `[batch]`, unique numbers of the prompts for the noise, default: a running number.

        Returns:
            This rank's rows; the answers to one prompt side by side.
        """
        experience = self.score(self.sample(prompt_batch))
        self.measure(experience)
        return experience

    def sample(self, prompt_batch: Mapping[str, Any]) -> Experience:
        """The first part of `generate_experience`: answers, not scored yet."""
        prompts, answers = self._prompt_lists(prompt_batch), self.spec.answers
        ids = prompt_batch.get("sample_ids")
        numbers = self._next_names(len(prompts)) if ids is None else [int(i) for i in ids]
        names = [number * answers + k for number in numbers for k in range(answers)]
        prompts = [prompt for prompt in prompts for _ in range(answers)]
        self.eval()
        rollout = self.sampler.sample(prompts, names, lambda _: self.tell(), self.give_up)
        return self.scorer.unscored(rollout, names)

    def score(self, answers: Experience) -> Experience:
        """The second part of `generate_experience`: what reference, critic and reward sources say of the answers."""
        self.eval()
        return self.scorer.score(answers)

    def measure(self, experience: Experience) -> None:
        """The last part of `generate_experience`: `metrics` of the rollout just scored, over all ranks."""
        self.metrics = {**rollout_metrics(experience, self.scorer.parts), "kl_coef": self.kl_coef}

    def record(self) -> dict[str, Any]:
        """All that the trainer's further steps depend on beside the engines, as JSON; for a checkpoint."""
        return {**{name: getattr(self, name) for name in RECORDED}, "rollout_weights": self.sampler.decided}

    def resume(self, record: Mapping[str, Any]) -> None:
        """Take up what `record` said. ConfigError: it is of another version."""
        if missing := [name for name in RECORDED if name not in record]:
            raise ConfigError(f"checkpoint: has no {missing[0]}; it cannot be resumed")
        for name in RECORDED:
            setattr(self, name, record[name])
        if self.spec.kl_controller == "fixed":
            self.kl_coef = self.spec.kl_coef  # a branch may have another than what it leaves
        self.sampler.decided = dict(record.get("rollout_weights", {}))

    def _scored(self) -> None:
        self.tell()
        if self.give_up is not None:
            self.give_up()

    def tell(self) -> None:
        """Give a sign of life."""
        if self.on_life is not None:
            self.on_life()

    def _next_names(self, count: int) -> list[int]:
        first = self.samples + self.ranks.rank * count
        self.samples += self.ranks.world * count
        return list(range(first, first + count))

    def _prompt_lists(self, batch: Mapping[str, Any]) -> list[list[int]]:
        prompts = batch["prompt"]
        if isinstance(prompts, Tensor):
            mask = batch.get("prompt_att_mask")
            mask = prompts != self.tokenizer.pad_token_id if mask is None else mask
            prompts = [row[keep.bool()].tolist() for row, keep in zip(prompts, mask, strict=True)]
        rows = [list(map(int, row)) for row in prompts]
        if not rows or not all(rows):
            raise DataError("prompt_batch: holds an empty prompt, or none; drop it in the data stage")
        longest, answer = max(map(len, rows)), self.args.max_response_tokens
        check_positions(self.engine.actor.module.config, longest, answer)
        if self.engine.retokenizer is None and self.engine.value_config is not None:
            check_positions(self.engine.value_config, longest, answer, "the reward model")
        return rows

    def train_rlhf(self, experience: Experience, ptx: PretrainingRows | None = None) -> tuple[float, float]:
        """All updates on one rollout: `ppo_epochs` passes of `minibatches` optimizer steps of actor and critic.

        Args:
            experience: this rank's rows, as `generate_experience` returned them.
            ptx: gives the pretraining rows of optimizer step i (the same on all ranks), for `args.ptx`.

        Returns:
            Mean actor and critic loss over the updates (0 without a critic); `metrics` has the rest.

        Raises:
            NonFiniteError: a loss or gradient is not finite; the weights are those before that update.
        """
        everything = gather_experience(experience, self.tokenizer.pad_token_id)
        minibatch = len(everything) // self.spec.minibatches
        if len(everything) % self.spec.minibatches or minibatch % self.ranks.world:
            raise ConfigError(
                f"ppo.minibatches: {len(everything)} answers cannot be divided into {self.spec.minibatches} minibatches "
                f"for {self.ranks.world} processes; change rollout_batch_size or minibatches"
            )
        advantages, returns = self.advantages(everything)
        self.train()
        actor_on = self.iteration >= self.spec.critic_warmup
        planned = self.spec.ppo_epochs * self.spec.minibatches
        while self.updates < planned and not self._stopped():
            epoch, k = divmod(self.updates, self.spec.minibatches)
            order = np.random.default_rng((self.args.seed, self.iteration, epoch)).permutation(len(everything))
            chosen = torch.from_numpy(order[k * minibatch : (k + 1) * minibatch])
            rows = ptx(self.optimizer_step) if ptx and self.spec.ptx and actor_on else []
            try:
                stats = self._update(everything, advantages, returns, chosen, actor_on, rows)
            except BaseException:
                self._forget_updates()
                raise
            if not self.updates:
                self.metrics["ratio_first"] = stats["ratio_deviation"]
            self.updates += 1
            self.update_sums = {name: self.update_sums.get(name, 0.0) + value for name, value in stats.items()}
            self.last_kl = stats["approx_kl"]
            if self.on_update is not None:
                self.on_update()
        updates, stopped = self.updates, self._stopped()
        # A stopped rollout uses up its share of the schedule, so the schedule ends where it should.
        self.optimizer_step += planned - updates
        self.metrics.update({name: value / updates for name, value in self.update_sums.items()})
        self.metrics.update(updates=updates, kl_stopped=float(stopped))
        self._forget_updates()
        values, mask = everything.values, everything.response_mask
        if self.engine.critic is not None:
            self.metrics["explained_variance"] = float(pm.explained_variance(values, returns, mask))
        self.metrics["return_mean"] = float(pm.masked_mean(returns, mask))
        self._adapt_kl(len(everything))
        self.iteration += 1
        return self.metrics["actor_loss"], self.metrics.get("critic_loss", 0.0)

    def _forget_updates(self) -> None:
        self.updates, self.last_kl = 0, 0.0
        self.update_sums: dict[str, float] = {}

    def _stopped(self) -> bool:
        """Whether the last update moved the policy so far that the rest of this rollout is left out."""
        return self.spec.kl_stop is not None and self.last_kl > self.spec.kl_stop

    def advantages(self, e: Experience) -> tuple[Tensor, Tensor]:
        """Advantages and returns of the global batch, `[batch, response]` each, by the spec's estimator.

        gae and reinforce++ whiten the advantages if the spec says so; rloo and grpo compare the answers to one prompt,
        and all tokens of an answer share its advantage. Returns are the critic's targets (gae), else what was earned.
        """
        spec, mask = self.spec, e.response_mask
        # Of several sources only the model's part is clipped, and has been.
        clip = spec.score_clip if spec.rewards is None else None
        scores = pm.shaped_scores(e.scores, e.ended, clip, spec.missing_eos_penalty, spec.missing_eos)
        price = self.kl_coef if spec.kl_penalty == "reward" else 0.0
        kl = pm.kl_estimate(e.logprobs, e.ref_logprobs, spec.kl_estimator)
        if spec.estimator in ("rloo", "grpo"):
            earned = scores - price * pm.select(kl, mask).sum(1)
            compare = pm.leave_one_out if spec.estimator == "rloo" else pm.group_normalized
            gains = compare(earned, spec.answers)
            return pm.select(gains.unsqueeze(1).expand_as(kl), mask), pm.select(earned.unsqueeze(1).expand_as(kl), mask)
        rewards = pm.token_rewards(scores, kl, mask, price)
        if spec.whiten_rewards:
            rewards = pm.whiten(rewards, mask, shift_mean=False)
        if spec.estimator == "gae":
            advantages, returns = pm.gae(rewards, e.values, mask, spec.gamma, spec.lam)
        else:
            advantages = returns = pm.reward_to_go(rewards, mask, spec.gamma)
        if spec.whiten_advantages:
            advantages = pm.whiten(advantages, mask)
        return advantages, returns

    def _adapt_kl(self, episodes: int) -> None:
        spec = self.spec
        if spec.kl_controller == "adaptive" and "kl_sequence" in self.metrics:
            observed = self.metrics["kl_sequence"]
            self.kl_coef = pm.adapt_kl_coef(self.kl_coef, observed, spec.kl_target, episodes, spec.kl_horizon)

    def _update(
        self,
        e: Experience,
        advantages: Tensor,
        returns: Tensor,
        chosen: Tensor,
        actor_on: bool,
        ptx: Sequence[Row],
    ) -> dict[str, float]:
        """One optimizer step of the critic and, unless it warms up, of the actor, on the rows `chosen`."""
        spec, engine = self.spec, self.engine
        count = float(e.response_mask[chosen].sum())
        scale = self.ranks.world / count
        lengths = (e.prompt_mask[chosen].sum(1) + e.response_mask[chosen].sum(1)).tolist()
        # The actor's schedule begins with its first update.
        idle = spec.critic_warmup * spec.ppo_epochs * spec.minibatches
        lr = set_lr(engine.actor, max(0, self.optimizer_step - idle), spec.actor_optim, self.total_steps - idle)
        sums, critic_loss, largest = np.zeros(len(ACTOR_SUMS)), 0.0, 0.0
        for part in self._deal(lengths):
            index = chosen[torch.tensor(part)]
            rows = e.rows(index)
            width = rows.response_ids.shape[1]
            gains, targets = advantages[index][:, :width], returns[index][:, :width]
            stats, deviation = self._actor_part(rows, gains, scale, actor_on)
            sums += stats
            largest = max(largest, deviation)
            if engine.critic is not None:
                critic_loss += self._critic_part(rows, targets, scale)
            self.tell()
        found = {"ratio_deviation": largest, "lr_actor": lr}
        if ptx:
            found["ptx_loss"] = self._ptx_part(ptx)
        if actor_on:
            engine.actor.step()
            self._average()
            found["actor_grad_norm"] = grad_norm(engine.actor)
        totals = sum_over_ranks([*sums.tolist(), critic_loss])
        found |= {name: value / count for name, value in zip(ACTOR_SUMS, totals, strict=False)}
        if engine.critic is not None:
            found["lr_critic"] = set_lr(engine.critic, self.optimizer_step, spec.critic_optim, self.total_steps)
            engine.critic.step()
            found |= {"critic_loss": totals[-1] / count, "critic_grad_norm": grad_norm(engine.critic)}
        self.optimizer_step += 1
        return found

    def _deal(self, lengths: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of rows of these lengths."""
        place, resources = (self.ranks.rank, self.ranks.world), self.resources
        return deal(lengths, *place, resources.micro_batch, resources.micro_tokens, self.engine.padded)

    def _average(self) -> None:
        """Move the actor's average, or keep it at the actor until it starts."""
        ema, spec = self.engine.actor_ema, self.spec.ema
        if ema is not None and spec is not None:
            ema.update() if self.iteration >= spec.start_step else ema.restart()

    def _actor_part(self, rows: Experience, gains: Tensor, scale: float, train: bool) -> tuple[np.ndarray, float]:
        """Forward and backward of the actor on one micro-batch; sums of its statistics and the largest |ratio - 1|."""
        spec, mask = self.spec, rows.response_mask
        sequence = (rows.prompt_ids, rows.prompt_mask, rows.response_ids, mask)
        with torch.set_grad_enabled(train):
            scores = response_scores(
                self.engine.actor,
                *sequence,
                spec.temperature,
                rows.support,
                entropy=True,
                vocabulary=self.vocabulary,
            )
            terms = pm.policy_terms(
                scores.logprobs, rows.logprobs, gains, mask, spec.clip, spec.clip_high, spec.dual_clip
            )
            entropy = pm.select(scores.entropy, mask)
            kl = self._loss_kl(scores.logprobs, rows)
            loss = terms.loss.sum() - spec.entropy_coef * entropy.sum() if spec.entropy_coef else terms.loss.sum()
            if spec.kl_penalty == "loss":
                loss = loss + self.kl_coef * kl.sum()
        check_finite("actor loss", loss)
        if train:
            self.engine.actor.backward(loss * scale)
        ratio = pm.select(terms.ratio.detach(), mask)
        sums = [terms.loss.sum(), terms.approx_kl.sum(), terms.clipped.sum(), entropy.sum(), ratio.sum(), kl.sum()]
        deviation = pm.select((terms.ratio.detach() - 1).abs(), mask).max().item()
        return np.array([float(v.detach()) for v in sums]), deviation

    def _loss_kl(self, logprobs: Tensor, rows: Experience) -> Tensor:
        """Per-token KL to the reference as a loss, `[batch, response]`: k3, or k2. The gradient of k1 has mean 0."""
        kind = "k2" if self.spec.kl_estimator == "k2" else "k3"
        return pm.select(pm.kl_estimate(logprobs, rows.ref_logprobs, kind), rows.response_mask)

    def _ptx_part(self, rows: Sequence[Row]) -> float:
        """Backward of `coef` times the token-mean cross-entropy of the global batch of rows; that mean."""
        assert self.spec.ptx is not None
        counts = [sum(row["loss_mask"][1:]) for row in rows]
        count, total = float(sum(counts)), 0.0
        lengths = [len(row["input_ids"]) for row in rows]
        for part in self._deal(lengths):
            # A rank without a row of its own runs one that does not count, as every pass is collective at ZeRO-3.
            texts = [rows[i]["input_ids"] for i in part or [0]]
            labels = [rows[i]["loss_mask"] for i in part] or [[0] * len(texts[0])]
            total += self._text_part("ptx loss", texts, labels, self.spec.ptx.coef / count)
        return sum_over_ranks([total])[0] / count

    def _text_part(
        self, name: str, texts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], weight: float
    ) -> float:
        """Backward of the actor on `weight` times the summed -log p of the labelled tokens of some texts; that sum."""
        nats, _ = label_nats(self.engine.actor, texts, labels, self.tokenizer.pad_token_id, self.ranks.device)
        loss = nats.sum()
        check_finite(name, loss)
        self.engine.actor.backward(loss * (weight * self.ranks.world))
        return loss.item()

    def _critic_part(self, rows: Experience, targets: Tensor, scale: float) -> float:
        """Forward and backward of the critic on one micro-batch; the sum of its loss."""
        assert self.engine.critic is not None
        values = self.scorer.values(rows)
        loss = pm.value_terms(values, rows.values, targets, rows.response_mask, self.spec.value_clip).sum()
        check_finite("critic loss", loss)
        self.engine.critic.backward(loss * scale)
        return loss.item()

    def train(self) -> None:
        """Actor and critic in training mode, which gradient checkpointing needs; dropout is off in both all the same."""
        for engine in (self.engine.actor, self.engine.critic):
            if engine is not None:
                engine.train()

    def eval(self) -> None:
        """All models in evaluation mode."""
        for engine in self.engine.models.values():
            engine.eval()


class DeepSpeedPPOTrainerUnsupervised(DeepSpeedPPOTrainer):
    """DeepSpeed-Chat's trainer with an unsupervised loss of its own optimizer step.

    `train_rlhf(experience, ptx=...)` mixes the two losses in one step instead, which is what the PPO stage does.
    """

    def train_unsupervised(self, inputs: Mapping[str, Tensor], unsup_coef: float) -> float:
        """One optimizer step of the actor on `unsup_coef` times the token-mean cross-entropy of a batch; that mean.

        Args:
            inputs: "input_ids" and "attention_mask" `[batch, tokens]` of this rank, and optionally "labels" (-100: not
                counted), default: all tokens.
            unsup_coef: weight of the loss.
        """
        labels = inputs.get("labels")
        counted = inputs["attention_mask"].bool() if labels is None else labels != -100
        keep = inputs["attention_mask"].bool()
        pairs = list(zip(inputs["input_ids"], keep, counted, strict=True))
        texts = [ids[mask].tolist() for ids, mask, _ in pairs]
        labelled = [count[mask].long().tolist() for _, mask, count in pairs]
        (count,) = sum_over_ranks([float(sum(sum(row[1:]) for row in labelled))])
        total = self._text_part("unsupervised loss", texts, labelled, unsup_coef / count)
        self.engine.actor.step()
        return sum_over_ranks([total])[0] / count
