"""Our formulas against TRL 1.9's own code, run here on tiny models. TRL is called, never copied.

TRL's PPO formulas stand inside `PPOTrainer.train`, so two tiny trainings are run and the local variables of `train` are read at
every backward pass. DPO is `DPOTrainer.compute_loss` on one batch. Where the two differ on purpose (the score's place, the
variance of whitening, metrics over padding, label smoothing) the exact difference is the test. TRL removed PPO after 1.9, hence
the pinned version; without it these tests are skipped.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_ppo
import torch
from plain import target_logprobs
from torch import Tensor

from rlhf_core import ppo_math as pm
from rlhf_core.dpo import dpo_loss
from rlhf_core.models import ValueModel, load_causal_lm
from rlhf_core.scoring import end_scores, response_scores, response_values

WHY = "needs TRL's PPO: pip install trl==1.9.0"
RUNS = {  # with the family of the models
    "gptj-k1": {"kl_estimator": "k1", "temperature": 0.7, "missing_eos_penalty": 1.0},
    "gpt2-k3-whitened": {"kl_estimator": "k3", "temperature": 1.0, "whiten_rewards": True, "gamma": 0.98, "lam": 0.9},
}
ROWS, TOKENS, CLIP = 24, 8, 0.2


@dataclass(frozen=True)
class Run:
    """One TRL training: `train`'s variables at each backward pass, and the models it started from."""

    frames: list[dict[str, Any]]
    folders: small_ppo.Folders
    args: Any

    @property
    def first(self) -> dict[str, Any]:
        """At the first backward pass: weights are still those that sampled."""
        return self.frames[0]

    @property
    def mask(self) -> Tensor:
        """True on the tokens of the answers through EOS."""
        return ~self.first["padding_mask"]


@pytest.fixture(scope="module")
def trl() -> Any:
    """TRL's PPO module."""
    return pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason=WHY, exc_type=ImportError)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """No launcher's variables, which accelerate would take for a distributed job."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module", params=list(RUNS))
def run(request: Any, trl: Any, alone: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three epochs on one rollout of TRL's PPOTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig

    work: Path = tmp_path_factory.mktemp("trl")
    folders = small_ppo.save(work, small_ppo.language_model(request.param.partition("-")[0], eos_bias=2.0))
    folders.tokenizer.padding_side = "left"
    args = PPOConfig(
        output_dir=str(work / "out"), per_device_train_batch_size=ROWS, gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=3, total_episodes=ROWS, response_length=TOKENS, stop_token="eos", learning_rate=1e-2, kl_coef=0.3,
        cliprange=CLIP, num_sample_generations=0, local_rollout_forward_batch_size=ROWS, report_to=[], bf16=False,
        use_cpu=True, save_strategy="no", disable_tqdm=True, seed=1, **RUNS[request.param],
    )  # fmt: skip
    causal = [AutoModelForCausalLM.from_pretrained(folders.actor) for _ in range(2)]
    scalar = [AutoModelForSequenceClassification.from_pretrained(folders.reward) for _ in range(2)]
    for reference in (causal[1], scalar[0].base_model):  # else KL and value error begin at 0
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter *= 1.05
    data = Dataset.from_dict({"input_ids": small_ppo.prompts(ROWS)["prompt"]})
    trainer = trl.PPOTrainer(
        args=args, processing_class=folders.tokenizer, model=causal[0], ref_model=causal[1], value_model=scalar[0],
        reward_model=scalar[1], train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    causal[1].save_pretrained(work / "reference")
    frames: list[dict[str, Any]] = []
    backward = trainer.accelerator.backward

    def recorded(loss: Tensor, **options: Any) -> None:
        frames.append(dict(sys._getframe(1).f_locals))
        backward(loss, **options)

    trainer.accelerator.backward = recorded
    trainer.train()
    assert len(frames) == 3 and 3 < int(frames[0]["contain_eos_token"].sum()) < ROWS - 3
    return Run(frames, folders, args)


def same(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    """Equal where the mask is true, to rounding."""
    if mask is not None:
        found, expected = found[mask], expected[mask]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=2e-5)


def sequence(run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TRL's rollout in our layout."""
    queries = run.first["queries"]
    return queries, (queries != small_ppo.PAD).long(), run.first["responses"], run.mask.long()


@torch.no_grad()
def test_logprobs_of_trls_left_padded_rollout_are_those_of_our_forward_pass_and_so_are_the_references(run):
    temperature = run.args.temperature
    for folder, name in (
        (run.folders.actor, "logprobs"),
        (str(Path(run.folders.actor).parent / "reference"), "ref_logprobs"),
    ):
        model = load_causal_lm(folder, dropout=0.0).eval()
        same(response_scores(model, *sequence(run), temperature).logprobs, run.first[name], run.mask)
    same(run.first["new_logprobs"], run.first["mb_logprobs"], run.mask[run.first["micro_batch_inds"]])


@torch.no_grad()
def test_entropy_is_trls(run):
    model = load_causal_lm(run.folders.actor, dropout=0.0).eval()
    mine = response_scores(model, *sequence(run), run.args.temperature, entropy=True).entropy
    from trl.trainer.utils import entropy_from_logits

    rows = run.first["micro_batch_inds"]
    same(mine[rows], entropy_from_logits(run.first["logits"].detach()), run.mask[rows])


@torch.no_grad()
def test_scores_and_the_penalty_for_a_missing_eos_are_trls(run):
    prompt_ids, prompt_mask, response_ids, response_mask = sequence(run)
    ids, mask = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1)
    raw = end_scores(ValueModel.load(run.folders.reward).eval(), ids, mask)
    ended = ((response_ids == small_ppo.EOS) & run.mask).any(1)
    assert torch.equal(ended, run.first["contain_eos_token"])
    same(pm.shaped_scores(raw, ended, None, run.args.missing_eos_penalty, "subtract"), run.first["scores"])


def test_kl_is_trls(run):
    f = run.first
    assert f["kl"][run.mask].abs().max() > 0.01
    same(pm.kl_estimate(f["logprobs"], f["ref_logprobs"], run.args.kl_estimator), f["kl"], run.mask)


def test_rewards_are_trls_but_the_score_is_paid_at_eos_and_not_one_place_after_it(run):
    f = run.first
    mine = pm.token_rewards(f["scores"], f["kl"], run.mask, run.args.kl_coef)
    theirs = f["non_score_reward"].clone()  # `rewards` itself is whitened in one of the runs
    theirs[f["actual_start"], f["actual_end"]] += f["scores"]
    same(mine.sum(1), theirs.sum(1))
    length = run.mask.sum(1)
    for row in range(ROWS):
        last = int(length[row]) - 1
        same(mine[row, :last], theirs[row, :last])
        later = int(f["contain_eos_token"][row] and length[row] < TOKENS)
        same(mine[row, last], theirs[row, last] + later * f["scores"][row])
        assert int(f["actual_end"][row]) == last + later


def test_whitening_is_trls_with_the_biased_variance_of_openais_code(trl):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 2
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    n, mean = int(mask.sum()), pm.masked_mean(x, mask)
    shrink = math.sqrt((n - 1) / n)
    same(pm.whiten(x, mask) * shrink, trl.masked_whiten(x, mask), mask)
    same(
        (pm.whiten(x, mask, shift_mean=False) - mean) * shrink + mean,
        trl.masked_whiten(x, mask, shift_mean=False),
        mask,
    )


def test_advantages_and_returns_are_trls(run):
    f, mask = run.first, ~run.first["padding_mask_p1"]
    advantages, returns = pm.gae(f["rewards"], f["values"], mask, run.args.gamma, run.args.lam)
    same(returns, f["returns"], mask)
    n = int(run.mask.sum())
    same(pm.whiten(advantages, run.mask) * math.sqrt((n - 1) / n), f["advantages"], run.mask)


@torch.no_grad()
def test_values_are_trls(run):
    critic = ValueModel.load(run.folders.reward).eval()
    for parameter in critic.trunk.parameters():
        parameter *= 1.05
    same(response_values(critic, *sequence(run)), run.first["values"], run.mask)


def test_policy_loss_and_clip_fraction_are_trls_in_every_epoch(run):
    for epoch, f in enumerate(run.frames):
        mask = run.mask[f["micro_batch_inds"]]
        terms = pm.policy_terms(f["new_logprobs"], f["mb_logprobs"], f["mb_advantage"], mask, CLIP)
        same(pm.masked_mean(terms.loss, mask), f["pg_loss"])
        same(terms.ratio, f["ratio"], mask)
        same(pm.masked_mean(terms.clipped.float(), mask), f["pg_clipfrac_stats"][epoch].squeeze())
    assert run.first["pg_clipfrac_stats"][-1] > 0.05, "the last epoch clips"


def test_approximate_kl_and_ratio_are_means_over_tokens_where_trl_counts_padding_as_zero_and_one(run):
    for epoch, f in enumerate(run.frames):
        mask = run.mask[f["micro_batch_inds"]]
        share = mask.float().mean()
        assert share < 0.95
        k2 = pm.kl_estimate(f["new_logprobs"], f["mb_logprobs"], "k2")
        same(pm.masked_mean(k2, mask) * share, f["approxkl_stats"][epoch].squeeze())
        same(pm.masked_mean(f["ratio"], mask) * share + (1 - share), f["ratio_stats"][epoch].squeeze())


def test_value_loss_is_trls_in_every_epoch(run):
    for f in run.frames:
        mask = ~f["padding_mask_p1"][f["micro_batch_inds"]]
        loss = pm.value_terms(f["vpred"], f["mb_values"], f["mb_return"], mask, run.args.cliprange_value)
        same(pm.masked_mean(loss, mask), f["vf_loss"])
        assert f["vf_loss"] > 1e-3


@dataclass(frozen=True)
class Pairs:
    """TRL's DPOTrainer and one of its batches; per pair `[pairs]` sums and lengths of log p - log p_ref."""

    trainer: Any
    batch: dict[str, Tensor]
    sums: list[Tensor]
    lengths: list[Tensor]

    def loss(self, kind: str, beta: float, smoothing: float = 0.0, rows: slice = slice(None)) -> Tensor:
        """TRL's loss, a mean over the pairs `rows` of the batch."""
        self.trainer.loss_types, self.trainer.beta, self.trainer.label_smoothing = [kind], beta, smoothing
        size = len(self.sums[0])
        index = torch.arange(2 * size).view(2, size)[:, rows].flatten()
        return self.trainer.compute_loss(self.trainer.model, {k: v[index] for k, v in self.batch.items()}).detach()


@pytest.fixture(scope="module")
def pairs(trl: Any, alone: None, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Six pairs of unequal lengths."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    work = tmp_path_factory.mktemp("dpo")
    folders = small_ppo.save(work, small_ppo.language_model())
    policy, reference = (AutoModelForCausalLM.from_pretrained(folders.actor) for _ in range(2))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 1.1
    texts = [" ".join(f"w{i - 2}" for i in ids) for ids in small_ppo.prompts(18)["prompt"]]
    columns = {"prompt": texts[:6], "chosen": [" " + t for t in texts[6:12]], "rejected": [" " + t for t in texts[12:]]}
    args = DPOConfig(
        output_dir=str(work), per_device_train_batch_size=6, use_cpu=True, bf16=False, report_to=[], loss_type=["sigmoid"],
        disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=policy, ref_model=reference, args=args, processing_class=folders.tokenizer, train_dataset=Dataset.from_dict(columns)
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    mask = batch["completion_mask"][:, 1:].bool()
    ratios = []
    with torch.no_grad():
        for model in (policy.eval(), reference.eval()):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            ratios.append(target_logprobs(logits, batch["input_ids"][:, 1:]))
    sums = pm.select(ratios[0] - ratios[1], mask).sum(1)
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 2 and sums.abs().min() > 1e-3
    return Pairs(trainer, batch, list(sums.chunk(2)), list(lengths.chunk(2)))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_loss_is_trls(pairs, beta):
    chosen, rejected = pairs.sums
    same(dpo_loss(chosen, rejected, beta, "sigmoid").mean(), pairs.loss("sigmoid", beta))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_ipo_loss_on_token_means_is_trls(pairs, beta):
    chosen, rejected = (s / n for s, n in zip(pairs.sums, pairs.lengths, strict=True))
    same(dpo_loss(chosen, rejected, beta, "ipo").mean(), pairs.loss("ipo", beta))


def test_label_smoothing_is_that_of_cdpo_which_trl_has_in_its_aot_loss_where_one_pair_needs_no_sorting(pairs):
    for row in range(6):
        chosen, rejected = (s[row : row + 1] for s in pairs.sums)
        same(dpo_loss(chosen, rejected, 0.5, "sigmoid", 0.2).mean(), pairs.loss("aot", 0.5, 0.2, slice(row, row + 1)))


def test_trls_robust_loss_differs_from_our_smoothing_by_a_known_term(pairs):
    # robust (Chowdhury et al. 2024): ((1-s) l(h) - s l(-h)) / (1-2s); cDPO: (1-s) l(h) + s l(-h)
    (chosen, rejected), s = pairs.sums, 0.2
    flipped = dpo_loss(rejected, chosen, 0.5, "sigmoid").mean()
    mine = dpo_loss(chosen, rejected, 0.5, "sigmoid", s).mean()
    same((mine - 2 * s * flipped) / (1 - 2 * s), pairs.loss("robust", 0.5, s))
