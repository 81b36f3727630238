"""`DeepSpeedPPOTrainer`: rollouts and PPO updates on the engines of `DeepSpeedRLHFEngine`.

    for prompt_batch in prompt_train_dataloader:
        out = trainer.generate_experience(prompt_batch)
        actor_loss, critic_loss = trainer.train_rlhf(out)

Per rollout: sample answers (their log-probabilities are the old ones: same weights, same distribution), score them with
reference, critic and reward model, then `ppo_epochs` passes of `minibatches` optimizer steps over the global batch. Dropout
is off in all models. `trainer.metrics` holds the health metrics of the last call. The PPO stage runs on these two classes.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core import ppo_math as pm
from rlhf_core.batches import deal
from rlhf_core.distributed import sum_over_ranks
from rlhf_core.engine import check_finite, grad_norm, set_lr
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.experience import Experience, concatenate, gather_experience
from rlhf_core.models import check_positions
from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine, PPOArgs, ppo_args
from rlhf_core.rollout import Rollout, Sampling, generate
from rlhf_core.scoring import end_scores, response_scores, response_values


class DeepSpeedPPOTrainer:
    """PPO on one `DeepSpeedRLHFEngine`.

    Attributes:
        metrics: of the last `generate_experience` and `train_rlhf`, names as in the README.
        kl_coef: the current KL coefficient (moves with the adaptive controller).
        iteration: finished `train_rlhf` calls.
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
        self.total_steps = engine.num_total_iters * self.spec.ppo_epochs * self.spec.minibatches
        self.sampling = Sampling(self.args.max_response_tokens, self.spec.temperature, self.spec.top_k, self.spec.top_p)

    def generate_experience(self, prompt_batch: Mapping[str, Any]) -> Experience:
        """Sample an answer to each prompt of this rank and score it.

        Args:
            prompt_batch: "prompt" `[batch, tokens]` left-padded ids with "prompt_att_mask" of the same shape (as
                DeepSpeed-Chat's loader yields; without a mask, pad tokens are masked), or "prompt" as lists of ids;
                optionally "sample_ids" `[batch]`, unique names of the answers for the noise, default: a running number.

        Returns:
            This rank's rows.
        """
        prompts = self._prompt_lists(prompt_batch)
        ids = prompt_batch.get("sample_ids")
        names = self._next_names(len(prompts)) if ids is None else [int(i) for i in ids]
        self.engine.actor.eval()
        self.engine.critic.eval()
        zero3 = self.engine.actor.zero_optimization_stage() == 3
        rollout = generate(
            self.engine.actor.module,
            prompts,
            names,
            self.sampling,
            seed=self.args.seed,
            eos=self.tokenizer.eos_token_id,
            pad=self.tokenizer.pad_token_id,
            batch_size=self.resources.rollout_micro_batch,
            lock_step=zero3,
        )
        experience = self.score(rollout, names)
        self.metrics = self._rollout_metrics(experience)
        return experience

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
        check_positions(self.engine.actor.module.config, max(map(len, rows)), self.args.max_response_tokens)
        return rows

    @torch.no_grad()
    def score(self, rollout: Rollout, names: list[int]) -> Experience:
        """Reference log-probabilities, values and reward scores of a rollout, by micro-batches."""
        eos = self.tokenizer.eos_token_id
        ended = ((rollout.response_ids == eos) & rollout.response_mask.bool()).any(1)
        lengths = (rollout.prompt_mask.sum(1) + rollout.response_mask.sum(1)).tolist()
        blank = torch.zeros_like(rollout.logprobs)
        whole = Experience(
            sample_ids=torch.tensor(names, device=blank.device),
            prompt_ids=rollout.prompt_ids,
            prompt_mask=rollout.prompt_mask,
            response_ids=rollout.response_ids,
            response_mask=rollout.response_mask,
            logprobs=rollout.logprobs,
            entropy=rollout.entropy,
            ref_logprobs=blank,
            values=blank,
            scores=torch.zeros(len(names), device=blank.device),
            ended=ended,
            support=rollout.support,
        )
        parts = [self._score_part(whole.rows(torch.tensor(i))) for i in deal(lengths, 0, 1, self.resources.micro_batch)]
        merged = concatenate(parts, self.tokenizer.pad_token_id)
        return merged.rows(torch.argsort(merged.sample_ids))

    def _score_part(self, rows: Experience) -> Experience:
        sequence = (rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.response_mask)
        reference = response_scores(self.engine.ref, *sequence, self.spec.temperature, rows.support).logprobs
        values = response_values(self.engine.critic, *sequence)
        ids = torch.cat([rows.prompt_ids, rows.response_ids], 1)
        mask = torch.cat([rows.prompt_mask, rows.response_mask], 1)
        scores = end_scores(self.engine.reward, ids, mask)
        return Experience(
            **{
                **vars(rows),
                "ref_logprobs": pm.select(reference, rows.response_mask),
                "values": pm.select(values, rows.response_mask),
                "scores": scores,
            }
        )

    def _rollout_metrics(self, e: Experience) -> dict[str, float]:
        """Masked statistics of this rollout over all ranks."""
        mask = e.response_mask
        kl = pm.select(e.logprobs - e.ref_logprobs, mask)
        sums = [
            len(e),
            mask.sum(),
            kl.sum(),
            pm.select(e.entropy, mask).sum(),
            e.scores.sum(),
            e.scores.double().square().sum(),
            e.ended.sum(),
            (mask.sum(1) ** 2).sum(),
            e.prompt_mask.sum(),
        ]
        rows, tokens, kl_sum, entropy, score, score2, ended, squares, prompt = sum_over_ranks([float(v) for v in sums])
        mean, length = score / rows, tokens / rows
        return {
            "score": mean,
            "score_std": max(score2 / rows - mean**2, 0.0) ** 0.5,
            "kl_sequence": kl_sum / rows,
            "kl_token": kl_sum / tokens,
            "entropy": entropy / tokens,
            "response_length": length,
            "response_length_std": max(squares / rows - length**2, 0.0) ** 0.5,
            "eos_rate": ended / rows,
            "kl_coef": self.kl_coef,
            "rollout_tokens": tokens,
            "prompt_tokens": prompt,
        }

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """All updates on one rollout: `ppo_epochs` passes of `minibatches` optimizer steps of actor and critic.

        Args:
            experience: this rank's rows, as `generate_experience` returned them.

        Returns:
            Mean actor and critic loss over the updates; `metrics` has the rest.

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
        sums: dict[str, float] = defaultdict(float)
        actor_on = self.iteration >= self.spec.critic_warmup
        updates, stopped = 0, False
        for epoch in range(self.spec.ppo_epochs):
            order = np.random.default_rng((self.args.seed, self.iteration, epoch)).permutation(len(everything))
            for k in range(self.spec.minibatches):
                chosen = torch.from_numpy(order[k * minibatch : (k + 1) * minibatch])
                stats = self._update(everything, advantages, returns, chosen, actor_on)
                if not updates:
                    self.metrics["ratio_first"] = stats["ratio_deviation"]
                updates += 1
                for name, value in stats.items():
                    sums[name] += value
                limit = self.spec.kl_stop
                if limit is not None and stats["approx_kl"] > limit:
                    stopped = True
                    break
            if stopped:
                break
        # A stopped rollout uses up its share of the schedule, so the schedule ends where it should.
        self.optimizer_step += self.spec.ppo_epochs * self.spec.minibatches - updates
        self.metrics.update({name: value / updates for name, value in sums.items()})
        self.metrics.update(updates=updates, kl_stopped=float(stopped))
        values, mask = everything.values, everything.response_mask
        self.metrics["explained_variance"] = float(pm.explained_variance(values, returns, mask))
        self.metrics["return_mean"] = float(pm.masked_mean(returns, mask))
        self._adapt_kl(len(everything))
        self.iteration += 1
        return self.metrics["actor_loss"], self.metrics["critic_loss"]

    def advantages(self, e: Experience) -> tuple[Tensor, Tensor]:
        """Advantages (whitened if the spec says so) and returns of the global batch, `[batch, response]` each."""
        spec, mask = self.spec, e.response_mask
        scores = pm.shaped_scores(e.scores, e.ended, spec.score_clip, spec.missing_eos_penalty, spec.missing_eos)
        kl = pm.kl_estimate(e.logprobs, e.ref_logprobs, spec.kl_estimator)
        rewards = pm.token_rewards(scores, kl, mask, self.kl_coef)
        if spec.whiten_rewards:
            rewards = pm.whiten(rewards, mask, shift_mean=False)
        advantages, returns = pm.gae(rewards, e.values, mask, spec.gamma, spec.lam)
        if spec.whiten_advantages:
            advantages = pm.whiten(advantages, mask)
        return advantages, returns

    def _adapt_kl(self, episodes: int) -> None:
        spec = self.spec
        if spec.kl_controller == "adaptive" and "kl_sequence" in self.metrics:
            observed = self.metrics["kl_sequence"]
            self.kl_coef = pm.adapt_kl_coef(self.kl_coef, observed, spec.kl_target, episodes, spec.kl_horizon)

    def _update(
        self, e: Experience, advantages: Tensor, returns: Tensor, chosen: Tensor, actor_on: bool
    ) -> dict[str, float]:
        """One optimizer step of the critic and, unless it warms up, of the actor, on the rows `chosen`."""
        spec, engine = self.spec, self.engine
        count = float(e.response_mask[chosen].sum())
        scale = self.ranks.world / count
        lengths = (e.prompt_mask[chosen].sum(1) + e.response_mask[chosen].sum(1)).tolist()
        lr = set_lr(engine.actor, self.optimizer_step, spec.actor_optim, self.total_steps)
        critic_lr = set_lr(engine.critic, self.optimizer_step, spec.critic_optim, self.total_steps)
        sums, largest = np.zeros(6), 0.0
        for part in deal(lengths, self.ranks.rank, self.ranks.world, self.resources.micro_batch):
            index = chosen[torch.tensor(part)]
            rows = e.rows(index)
            width = rows.response_ids.shape[1]
            gains, targets = advantages[index][:, :width], returns[index][:, :width]
            stats, deviation = self._actor_part(rows, gains, scale, actor_on)
            sums[:5] += stats
            largest = max(largest, deviation)
            sums[5] += self._critic_part(rows, targets, scale)
        if actor_on:
            engine.actor.step()
        engine.critic.step()
        self.optimizer_step += 1
        totals = sum_over_ranks(sums.tolist())
        names = ("actor_loss", "approx_kl", "clip_fraction", "entropy_update", "ratio_mean", "critic_loss")
        return {
            **{name: value / count for name, value in zip(names, totals, strict=True)},
            "ratio_deviation": largest,
            "lr_actor": lr,
            "lr_critic": critic_lr,
            "actor_grad_norm": grad_norm(engine.actor) if actor_on else 0.0,
            "critic_grad_norm": grad_norm(engine.critic),
        }

    def _actor_part(self, rows: Experience, gains: Tensor, scale: float, train: bool) -> tuple[np.ndarray, float]:
        """Forward and backward of the actor on one micro-batch; sums of its statistics and the largest |ratio - 1|."""
        spec, mask = self.spec, rows.response_mask
        with torch.set_grad_enabled(train):
            scores = response_scores(
                self.engine.actor,
                rows.prompt_ids,
                rows.prompt_mask,
                rows.response_ids,
                mask,
                spec.temperature,
                rows.support,
                entropy=True,
            )
            terms = pm.policy_terms(scores.logprobs, rows.logprobs, gains, mask, spec.clip)
            entropy = pm.select(scores.entropy, mask)
            loss = terms.loss.sum() - spec.entropy_coef * entropy.sum() if spec.entropy_coef else terms.loss.sum()
        check_finite("actor loss", loss)
        if train:
            self.engine.actor.backward(loss * scale)
        ratio = pm.select(terms.ratio.detach(), mask)
        sums = [terms.loss.sum(), terms.approx_kl.sum(), terms.clipped.sum(), entropy.sum(), ratio.sum()]
        deviation = pm.select((terms.ratio.detach() - 1).abs(), mask).max().item()
        return np.array([float(v.detach()) for v in sums]), deviation

    def _critic_part(self, rows: Experience, targets: Tensor, scale: float) -> float:
        """Forward and backward of the critic on one micro-batch; the sum of its loss."""
        values = response_values(
            self.engine.critic, rows.prompt_ids, rows.prompt_mask, rows.response_ids, rows.response_mask
        )
        loss = pm.value_terms(values, rows.values, targets, rows.response_mask, self.spec.value_clip).sum()
        check_finite("critic loss", loss)
        self.engine.critic.backward(loss * scale)
        return loss.item()
