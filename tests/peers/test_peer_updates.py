"""Known faults of other RLHF systems in log-probabilities, losses and metrics, each as a test of ours that fails if we have it.

The names of the systems stand in the tests' comments; `test_peer_faults.py` has the faults in rewards, advantages and elsewhere.
"""

import math
from dataclasses import replace

import pytest
import small_ppo
import torch
from small_ppo import EOS, FAST, PAD, SHORT, made, masked, spec

from rlhf_core import ppo_math as pm
from rlhf_core.errors import NonFiniteError
from rlhf_core.scoring import end_scores, response_scores, response_values
from rlhf_core.specs import OptimSpec, PPOSpec

NAN = float("nan")


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}], ids=str
)
def test_in_the_first_update_the_ratio_is_one_and_kl_is_nothing_whatever_the_sampling(fields, plain):
    # N: temperature everywhere; top-k and top-p without renormalising give a negative KL (TRL#615). N+'s first epoch:
    # approxkl 0.0, pg_loss -1e-8, clipfrac 0.0, ratio 1.0
    trainer = small_ppo.ppo(plain, spec(ppo_epochs=1, **fields))
    trainer.train_rlhf(trainer.generate_experience(small_ppo.prompts(16)))
    m = trainer.metrics
    assert m["ratio_mean"] == pytest.approx(1, abs=1e-5) and m["ratio_first"] < 1e-4
    assert (m["approx_kl"], m["clip_fraction"], m["actor_loss"]) == pytest.approx((0, 0, 0), abs=1e-6)
    assert m["kl_sequence"] == pytest.approx(0, abs=1e-4)


def test_temperature_divides_the_logits_of_reference_and_actor(plain):
    # NeMo-RL left it out in training
    trainer = small_ppo.ppo(plain, spec(temperature=0.5))
    e = trainer.generate_experience(small_ppo.prompts(8))
    with torch.no_grad():
        for row in range(8):
            prompt, answer = (
                x[row][m[row].bool()] for x, m in ((e.prompt_ids, e.prompt_mask), (e.response_ids, e.response_mask))
            )
            logits = trainer.engine.ref.module(input_ids=torch.cat([prompt, answer])[None]).logits[
                0, len(prompt) - 1 : -1
            ]
            expected = (logits / 0.5).log_softmax(-1).gather(1, answer[:, None])[:, 0]
            for found in (e.ref_logprobs, e.logprobs):
                assert torch.allclose(found[row, : len(answer)], expected, atol=1e-4)


@pytest.mark.parametrize("family", ["gptj", "gpt2"])
def test_nothing_depends_on_how_much_a_prompt_is_padded(family, tmp_path):
    # N 3; trlx passed no position ids, so its ratio was not 1 before any update
    trainer = small_ppo.ppo(small_ppo.save(tmp_path, small_ppo.language_model(family)), SHORT)
    asked, answers = [[5, 6], [7, 8, 9, 10, 11, 12]], [[13, 14, EOS], [15, EOS]]
    together = small_ppo.rollout_of(trainer, asked, answers)
    alone = small_ppo.rollout_of(trainer, asked[:1], answers[:1])
    assert together.prompt_ids[0, :4].tolist() == [PAD] * 4
    for name in ("logprobs", "ref_logprobs", "values"):
        assert torch.allclose(getattr(together, name)[:1], getattr(alone, name), atol=1e-4), name
    assert torch.allclose(together.scores[:1], alone.scores, atol=1e-4)


def test_what_stands_after_eos_reaches_neither_the_score_nor_a_log_probability(shared_trainer):
    e = made(shared_trainer)
    junk = e.response_ids.where(e.response_mask.bool(), torch.tensor(29))
    sequence = (e.prompt_ids, e.prompt_mask, junk, e.response_mask)
    with torch.no_grad():
        again = response_scores(shared_trainer.engine.actor, *sequence).logprobs
        ids, mask = torch.cat([e.prompt_ids, junk], 1), torch.cat([e.prompt_mask, e.response_mask], 1)
        assert torch.allclose(end_scores(shared_trainer.engine.reward, ids, mask), e.scores, atol=1e-5)
    assert torch.allclose(masked(again, e), masked(e.logprobs, e), atol=1e-5)


def test_the_tokens_that_are_trained_and_scored_are_those_that_were_sampled(tmp_path):
    # trlx decodes answers and tokenises them anew, which gives other tokens
    from rlhf_core.data.tokenizer import train
    from rlhf_core.specs import TokenizerSpec

    tokenizer = train(["the cat sat on the mat and that was that"] * 20, TokenizerSpec(train_vocab_size=280))
    model = small_ppo.language_model(tokenizer=tokenizer)
    trainer = small_ppo.ppo(small_ppo.save(tmp_path, model, tokenizer), spec(normalize_score=False))
    out = trainer.generate_experience(small_ppo.prompts(8))
    rows = [[row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] for ids, mask in (
        (out.prompt_ids, out.prompt_mask), (out.response_ids, out.response_mask))]  # fmt: skip
    again = [tokenizer(tokenizer.decode(answer), add_special_tokens=False)["input_ids"] for answer in rows[1]]
    assert again != rows[1], "tokenising anew would give other tokens"
    for row, (prompt, answer) in enumerate(zip(*rows, strict=True)):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = trainer.engine.actor.module(input_ids=ids).logits[0, len(prompt) - 1 : -1, : len(tokenizer)]
            score = end_scores(trainer.engine.reward, ids, torch.ones_like(ids)).item()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert torch.allclose(out.logprobs[row, : len(answer)], expected, atol=1e-4)
        assert out.scores[row].item() == pytest.approx(score, abs=1e-4)


def test_log_probabilities_that_were_filled_with_zeros_show_in_the_first_ratio(plain):
    # NeMo-RL put 0.0 (probability 1) where the rollout engine had given none
    trainer = small_ppo.ppo(plain, spec(ppo_epochs=1))
    e = made(trainer)
    lost = e.logprobs.clone()
    lost[2, 3] = 0.0
    trainer.train_rlhf(replace(e, logprobs=lost))
    assert trainer.metrics["ratio_first"] > 0.5


@pytest.mark.parametrize("name", ["logprobs", "ref_logprobs", "values", "scores"])
def test_a_number_that_is_missing_in_an_answer_stops_before_any_weight_changes(name, plain):
    trainer = small_ppo.ppo(plain, SHORT)
    e = made(trainer)
    broken = getattr(e, name).clone()
    broken.view(-1)[0] = NAN
    before = [small_ppo.weights(engine) for engine in (trainer.engine.actor, trainer.engine.critic)]
    with pytest.raises(NonFiniteError):
        trainer.train_rlhf(replace(e, **{name: broken}))
    after = [small_ppo.weights(engine) for engine in (trainer.engine.actor, trainer.engine.critic)]
    assert all(torch.equal(b, a) for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("filler", [NAN, 1.0, -1e4])
def test_what_stands_in_masked_places_changes_no_weight_and_no_metric(filler, plain):
    # OpenRLHF and verl multiply by the mask, and NaN times 0 is NaN; TRL's filler 1.0 enters its metrics
    found = []
    for value in (0.0, filler):
        trainer = small_ppo.ppo(plain, spec(whiten_rewards=True, actor_optim=FAST, critic_optim=FAST))
        e = made(trainer)
        filled = {
            n: getattr(e, n).where(e.response_mask.bool(), torch.tensor(value))
            for n in ("logprobs", "ref_logprobs", "values", "entropy")
        }
        trainer.train_rlhf(replace(e, **filled))
        found.append(
            (
                torch.cat([small_ppo.weights(trainer.engine.actor), small_ppo.weights(trainer.engine.critic)]),
                trainer.metrics,
            )
        )
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_metrics_are_means_over_the_tokens_of_the_answers(plain):
    # TRL's entropy, approxkl and ratio are means over padding too
    trainer = small_ppo.ppo(
        plain, spec(ppo_epochs=1, minibatches=1, actor_optim=OptimSpec(lr=0.0), critic_optim=OptimSpec(lr=0.0))
    )
    e = trainer.generate_experience(small_ppo.prompts(16))
    assert e.response_mask.float().mean() < 0.9
    assert trainer.metrics["entropy"] == pytest.approx(masked(e.entropy, e).mean().item(), rel=1e-4)
    assert trainer.metrics["response_length"] == pytest.approx(e.response_mask.sum(1).float().mean().item())
    shift = 0.1 * torch.randn(e.logprobs.shape, generator=torch.Generator().manual_seed(0))
    old = e.logprobs + shift  # as if the policy had moved since
    trainer.train_rlhf(replace(e, logprobs=old))
    ratio = masked((e.logprobs - old).exp(), e)
    assert trainer.metrics["ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-4)
    assert trainer.metrics["approx_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-3)
    assert trainer.metrics["clip_fraction"] < 0.5


def norm_of(loss: torch.Tensor, model: torch.nn.Module) -> float:
    """Norm of a loss's gradient."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))


def test_the_loss_of_an_update_and_its_gradient_are_one_mean_over_tokens_not_a_mean_of_means(plain):
    # before verl and OpenRLHF corrected it, short micro-batches weighed as much as long ones
    trainer = small_ppo.ppo(plain, spec(ppo_epochs=1, whiten_advantages=False), micro_batch=2)
    e = made(trainer)
    advantages, returns = trainer.advantages(e)
    sequence = (e.prompt_ids, e.prompt_mask, e.response_ids, e.response_mask)
    ratio = (response_scores(trainer.engine.actor.module, *sequence).logprobs - e.logprobs).exp()
    actor = -masked(advantages * ratio, e).mean()  # nothing is clipped: the policy is still the old one
    critic = 0.5 * masked((response_values(trainer.engine.critic.module, *sequence) - returns).square(), e).mean()
    norms = norm_of(actor, trainer.engine.actor.module), norm_of(critic, trainer.engine.critic.module)
    trainer.train_rlhf(e)
    m = trainer.metrics
    assert (m["actor_loss"], m["critic_loss"]) == pytest.approx((actor.item(), critic.item()), rel=1e-4)
    assert (m["actor_grad_norm"], m["critic_grad_norm"]) == pytest.approx(norms, rel=1e-3)


def test_plain_ppo_has_no_dual_clip():
    # verl bounds the loss of negative advantages at 3 unless told otherwise
    assert PPOSpec().dual_clip is None and PPOSpec().clip_high is None
    one = torch.ones(1, 1)
    new, old, gains = math.log(10) * one, 0 * one, -one
    assert pm.policy_terms(new, old, gains, one, 0.2).loss.item() == pytest.approx(10)
    assert pm.policy_terms(new, old, gains, one, 0.2, dual_clip=3.0).loss.item() == pytest.approx(3)
