"""Known faults of other RLHF systems, and details of PPO that they got wrong, each as a test of ours that fails if we have it.

Systems: TRL, trlx, torchtune, ColossalChat, OpenRLHF, verl, NeMo-RL, AReaL; "N" is "The N implementation details of RLHF with
PPO", "N+" arXiv 2403.17031. The names of the systems stand in the tests' comments. What concerns checkpoints is in
`test_checkpoint_faults`.
"""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import small_ppo
import tiny
import torch
from small_ppo import ANSWERS, EOS, FAST, SHORT, made, masked, spec, with_spec

from rlhf_core import ppo_math as pm
from rlhf_core.specs import PPOSpec

ROOT = Path(__file__).parents[2]
NAN = float("nan")


# Rewards and advantages


def test_whitened_advantages_have_mean_zero_over_all_answers(shared_trainer):
    # torchtune's whiten(shift_mean=True) adds the mean back; ColossalChat does not whiten at all
    e = made(shared_trainer)
    advantages, _ = shared_trainer.advantages(e)
    assert masked(advantages, e).mean().item() == pytest.approx(0, abs=1e-6)
    assert masked(advantages, e).std(correction=0).item() == pytest.approx(1, abs=1e-4)
    plain, _ = with_spec(shared_trainer, whiten_advantages=False).advantages(e)
    assert abs(masked(plain, e).mean().item()) > 0.05, "before it was elsewhere"


def test_whitening_does_not_see_padding():
    # trlx whitens over padding too
    x, mask = (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1] * n + [0] * (6 - n) for n in (6, 1, 3, 2)]),
    )
    expected = pm.whiten(x, mask)
    for filler in (1e6, NAN):
        assert torch.equal(pm.whiten(x.where(mask.bool(), torch.tensor(filler)), mask), expected)


def test_the_score_is_paid_once_and_at_the_last_token(shared_trainer):
    # ColossalChat pays it on every token; TRL one place after EOS
    e = replace(made(shared_trainer), scores=torch.arange(1.0, 7.0))
    alone = with_spec(
        shared_trainer,
        gamma=0.0,
        lam=0.0,
        kl_coef=0.0,
        whiten_advantages=False,
        missing_eos_penalty=None,
        score_clip=None,
    )
    rewards = alone.advantages(replace(e, values=torch.zeros_like(e.values)))[0]
    for row, answer in enumerate(ANSWERS):
        paid = [0.0] * 6
        paid[len(answer) - 1] = row + 1.0
        assert rewards[row].tolist() == paid


def test_the_price_of_kl_is_paid_on_every_token_of_the_answer(shared_trainer):
    e = made(shared_trainer)
    alone = with_spec(
        shared_trainer, gamma=0.0, lam=0.0, kl_coef=0.5, whiten_advantages=False, missing_eos_penalty=None
    )
    rewards = alone.advantages(replace(e, values=torch.zeros_like(e.values), scores=torch.zeros(6)))[0]
    assert torch.allclose(rewards, -0.5 * (e.logprobs - e.ref_logprobs) * e.response_mask)


def test_returns_are_the_advantages_before_whitening_plus_the_values(shared_trainer):
    e = made(shared_trainer)
    whitened, returns = shared_trainer.advantages(e)
    plain, same_returns = with_spec(shared_trainer, whiten_advantages=False).advantages(e)
    assert torch.equal(returns, same_returns) and not torch.allclose(whitened, plain)
    assert torch.allclose(masked(returns, e), masked(plain + e.values, e))


def test_kl_is_paid_in_the_reward_or_in_the_loss_and_never_in_both(plain):
    # NeMo-RL counted it twice
    trainer = small_ppo.ppo(plain, spec(kl_coef=0.0))
    e = made(trainer)
    free = trainer.advantages(e)[0]
    in_loss, in_reward = (with_spec(trainer, kl_coef=3.0, kl_in=place) for place in ("loss", "reward"))
    assert torch.equal(in_loss.advantages(e)[0], free) and not torch.equal(in_reward.advantages(e)[0], free)

    def gradient(**fields) -> torch.Tensor:
        """Weights after one update in which all advantages are 0."""
        other = small_ppo.ppo(
            plain, spec(ppo_epochs=1, actor_optim=FAST, whiten_advantages=False, gamma=0.0, lam=0.0, **fields)
        )
        still = made(other)
        free_of_score = replace(still, scores=torch.zeros(6), values=torch.zeros_like(still.values))
        before = small_ppo.weights(other.engine.actor)
        other.train_rlhf(free_of_score)
        return (small_ppo.weights(other.engine.actor) - before).abs().max()

    silent = {"missing_eos_penalty": None}
    assert gradient(kl_coef=0.0, **silent) == 0
    assert gradient(kl_coef=3.0, kl_in="loss", **silent) > 0
    assert gradient(kl_coef=3.0, kl_in="reward", **silent) > 0


def test_the_adaptive_coefficient_compares_nats_a_sequence_with_its_target(plain):
    # verl and OpenRLHF feed it a mean over tokens, which is smaller by the length of an answer
    trainer = small_ppo.ppo(plain, spec(kl_controller="adaptive", kl_coef=0.1, kl_horizon=100, actor_optim=FAST))
    trainer.train_rlhf(trainer.generate_experience(small_ppo.prompts(16)))  # so that actor and reference differ
    e = trainer.generate_experience(small_ppo.prompts(16))
    per_sequence = float(((e.logprobs - e.ref_logprobs) * e.response_mask).sum(1).mean())
    assert trainer.metrics["kl_sequence"] == pytest.approx(per_sequence, rel=1e-4)
    assert trainer.metrics["kl_token"] == pytest.approx(per_sequence * 16 / float(e.response_mask.sum()), rel=1e-4)
    assert per_sequence > 1.5 * trainer.metrics["kl_token"] > 0
    before, trainer.spec = trainer.kl_coef, trainer.spec.model_copy(update={"kl_target": per_sequence})
    trainer.train_rlhf(e)
    assert trainer.kl_coef == pytest.approx(before, rel=1e-6), "on target it stays"


@pytest.mark.parametrize("how", ["replace", "subtract"])
def test_only_answers_without_the_tokenizers_eos_are_punished(how, shared_trainer):
    e = made(shared_trainer)
    assert e.ended.tolist() == [True, True, False, True, False, True]
    quiet = {
        "gamma": 0.0,
        "lam": 0.0,
        "kl_coef": 0.0,
        "whiten_advantages": False,
        "score_clip": None,
        "missing_eos": how,
    }
    e = replace(e, values=torch.zeros_like(e.values), scores=torch.full((6,), 2.0))
    paid = with_spec(shared_trainer, missing_eos_penalty=1.0, **quiet).advantages(e)[0].sum(1)
    unended = {"replace": -1.0, "subtract": 1.0}[how]
    assert paid.tolist() == [2.0, 2.0, unended, 2.0, unended, 2.0]


def test_an_eos_of_ones_own_ends_answers_and_is_what_the_penalty_looks_for(tmp_path):
    # TRL looks for the tokenizer's first EOS although another stop token was asked for
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "w7"
    model = small_ppo.language_model(tokenizer=tokenizer)
    stop = tokenizer.eos_token_id
    with torch.no_grad():
        model.get_output_embeddings().bias[stop] += 3.0
    out = small_ppo.ppo(small_ppo.save(tmp_path, model, tokenizer), SHORT).generate_experience(small_ppo.prompts(16))
    assert 0 < out.ended.sum() and stop != EOS
    for row in range(16):
        answer = out.response_ids[row][out.response_mask[row].bool()].tolist()
        assert (answer[-1] == stop) == bool(out.ended[row]) and stop not in answer[:-1]


def test_a_score_does_not_depend_on_the_other_answers_of_its_batch(shared_trainer):
    # AReaL let unfinished answers into the statistics that normalise the others' scores
    asked = small_ppo.prompts(6)["prompt"]
    together = small_ppo.rollout_of(shared_trainer, asked, ANSWERS).scores
    alone = [small_ppo.rollout_of(shared_trainer, [p], [a]).scores.item() for p, a in zip(asked, ANSWERS, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_baselines_of_a_group_are_its_own_answers_scores_alone():
    # OpenRLHF counted answers without a token; ours have at least EOS, and every group has its own baseline
    scores = torch.tensor([1.0, 2.0, 3.0, 6.0, 10.0, 10.0, 10.0, 10.0])
    assert pm.leave_one_out(scores, 4).tolist() == pytest.approx([-8 / 3, -4 / 3, 0.0, 4.0, 0, 0, 0, 0], abs=1e-6)
    grpo = pm.group_normalized(scores, 4)
    deviation = torch.tensor([1.0, 2.0, 3.0, 6.0]).std().item()
    assert grpo.tolist() == pytest.approx([v / (deviation + 1e-4) for v in (-2, -1, 0, 3)] + [0.0] * 4, abs=1e-6)


# Sampling, saving, documents


def test_by_default_the_whole_distribution_is_sampled():
    # N 4: with top-k or top-p the recorded log-probability is not that of the sampling
    defaults = PPOSpec()
    assert (defaults.top_k, defaults.top_p, defaults.temperature) == (0, 1.0, 1.0)


def test_rollouts_take_no_seed_from_the_process_and_leave_its_generators_alone(plain):
    # ColossalChat sets the same seed in every rollout
    answers = []
    for seed in (41, 42):
        trainer = small_ppo.ppo(plain)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        answers.append([trainer.generate_experience(small_ppo.prompts(8)).response_ids for _ in range(2)])
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(answers[0][0], answers[1][0]), "the trainer's own seed decides"
    assert answers[0][0].shape != answers[0][1].shape or not torch.equal(*answers[0]), "and every rollout is another"


def test_the_critic_is_saved_as_it_was_trained(plain, tmp_path):
    # TRL saves the policy alone
    from transformers import AutoModelForSequenceClassification

    trainer = small_ppo.ppo(plain, spec(critic_optim=FAST, normalize_score=False))
    e = trainer.generate_experience(small_ppo.prompts(8))
    trainer.train_rlhf(e)
    trainer.engine.save(tmp_path / "actor", tmp_path / "critic")
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic").eval()
    first = AutoModelForSequenceClassification.from_pretrained(plain.reward).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        value = trainer.engine.critic.module(ids, torch.ones_like(ids))[0, -1].item()
        assert saved(input_ids=ids).logits.item() == pytest.approx(value, abs=1e-5)
        assert first(input_ids=ids).logits.item() != pytest.approx(value, abs=1e-3)


def test_every_command_of_the_readme_is_one_that_the_command_line_takes():
    # OpenRLHF's README has flags that its parser refuses
    from typer.main import get_command

    from flows.cli import app
    from rlhf_core.config import load_config

    text = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL))
    lines = [line.strip().removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith(("rlhf ", "$ rlhf "))]
    assert len(commands) > 5
    for words in commands:
        command, rest = cast(Any, get_command(app)), words[1:]
        while hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        context = command.make_context("rlhf", list(rest), resilient_parsing=False)
        configs = [word for word in rest if word.endswith(".yaml") and (ROOT / word).exists()]
        overrides = [rest[i + 1] for i, word in enumerate(rest) if word == "--set"]
        if configs:
            load_config(ROOT / configs[0], overrides)
        context.close()
