"""PPO's models in their variants: LoRA with shared weights, no critic, other tokenizers, EMA, the mixture loss."""

from pathlib import Path

import pytest
import tiny
import torch

from rlhf_core import answer_sampler
from rlhf_core.errors import ConfigError
from rlhf_core.export import save_value_model
from rlhf_core.lora import WithoutAdapters
from rlhf_core.models import ValueModel, load_tokenizer, new_causal_lm
from rlhf_core.ppo_args import PPOArgs
from rlhf_core.ppo_trainer import DeepSpeedPPOTrainer, DeepSpeedPPOTrainerUnsupervised
from rlhf_core.resources import Resources
from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine
from rlhf_core.rollout.twin import twin_bytes
from rlhf_core.scoring import end_scores, response_scores
from rlhf_core.specs import EMASpec, LoRASpec, ModelReward, ModelSpec, OptimSpec, PPOSpec, PTXSpec

OPTIM = OptimSpec(lr=1e-2, schedule="constant")
FAST = {"actor_optim": OPTIM, "critic_optim": OPTIM, "max_response_tokens": 6}
LORA = LoRASpec(rank=4, alpha=8.0)


def trainer_of(folders, spec: PPOSpec, critic: str | None = "critic", **resources) -> DeepSpeedPPOTrainer:
    args = PPOArgs(spec, Resources(**resources), 0)
    place = folders[critic] if critic in folders else critic
    engine = DeepSpeedRLHFEngine(folders["actor"], place, load_tokenizer(folders["tokenizer"]), 3, args)
    return DeepSpeedPPOTrainer(engine=engine)


def prompts(batch: int = 8) -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return {"prompt": [torch.randint(2, 32, (3 + i % 3,), generator=generator).tolist() for i in range(batch)]}


def learn(trainer: DeepSpeedPPOTrainer, rounds: int = 3, **options) -> list[dict[str, float]]:
    history = []
    for _ in range(rounds):
        trainer.train_rlhf(trainer.generate_experience(prompts()), **options)
        history.append(dict(trainer.metrics))
    return history


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def names_moved(trainer: DeepSpeedPPOTrainer, role: str) -> set[str]:
    module = getattr(trainer.engine, role).module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    learn(trainer, 1)
    return {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def test_with_adapters_the_reference_is_the_actor_without_them_and_the_reward_model_the_critic(folders):
    trainer = trainer_of(folders, PPOSpec(actor_lora=LORA, critic_lora=LORA, **FAST))
    engine = trainer.engine
    assert isinstance(engine.ref, WithoutAdapters) and isinstance(engine.reward, WithoutAdapters)
    assert engine.ref.module is engine.actor.module and set(engine.models) == {"actor", "critic"}


def test_shared_weights_give_the_losses_of_frozen_copies(folders):
    shared = learn(trainer_of(folders, PPOSpec(actor_lora=LORA, critic_lora=LORA, **FAST)))
    apart = trainer_of(folders, PPOSpec(actor_lora=LORA, critic_lora=LORA, **FAST))
    plain = trainer_of(folders, PPOSpec(**FAST))
    apart.engine.ref, apart.engine.reward = plain.engine.ref, plain.engine.reward
    for one, other in zip(shared, learn(apart), strict=True):
        for name in ("actor_loss", "critic_loss", "kl_sequence", "score", "approx_kl"):
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("engine", ["slots", "plain", "generate"])
def test_with_each_rollout_engine_log_probabilities_are_those_of_a_plain_forward_pass(engine, folders):
    trainer = trainer_of(folders, PPOSpec(actor_lora=LORA, **FAST), rollout_engine=engine)
    learn(trainer, 1)  # so that the adapters do something
    a = trainer.sample(prompts())
    plain = response_scores(trainer.engine.actor, a.prompt_ids, a.prompt_mask, a.response_ids, a.response_mask)
    assert torch.allclose(plain.logprobs, a.logprobs, atol=1e-4)
    scored = trainer.score(a)
    assert not torch.allclose(scored.ref_logprobs, a.logprobs, atol=1e-3), "the reference has no adapters"
    trainer.measure(scored)
    trainer.train_rlhf(scored)
    assert trainer.metrics["ratio_first"] < 1e-4
    assert trainer.sampler.decided == {"merged": True}


def test_rollouts_of_merged_and_of_applied_adapters_lead_to_the_same_losses(folders):
    spec = PPOSpec(actor_lora=LORA, **FAST)
    merged, applied = (learn(trainer_of(folders, spec, rollout_lora=how)) for how in ("merged", "applied"))
    for one, other in zip(merged, applied, strict=True):
        for name in ("actor_loss", "critic_loss", "kl_sequence", "score", "approx_kl"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_where_memory_is_short_adapters_stay_applied_and_a_checkpoint_keeps_what_was_decided(folders, monkeypatch):
    spec, free = PPOSpec(actor_lora=LORA, **FAST), [0]
    monkeypatch.setattr(answer_sampler, "free_bytes", lambda: free[0])
    short = trainer_of(folders, spec)
    short.sample(prompts())
    need = twin_bytes(short.engine.actor.module, merge=True)
    assert short.sampler.weights == "as they are" and short.record()["rollout_weights"] == {"merged": False}

    def resumed(record: dict, bytes_free: int) -> str:
        free[0] = bytes_free
        trainer = trainer_of(folders, spec)
        trainer.resume(record)
        return trainer.sampler.weights

    assert resumed(short.record(), 100 * need) == "as they are"
    short.sampler.decided = {"merged": True}
    assert resumed(short.record(), need) == "merged"
    assert resumed(short.record(), need - 1) == "as they are", "on a smaller machine"
    short.sampler.decided = {}
    assert resumed(short.record(), 2 * need) == "merged" and resumed(short.record(), 2 * need - 1) == "as they are"


def test_vllm_is_refused_where_there_is_no_gpu_before_anything_is_sampled(folders):
    with pytest.raises(ConfigError, match=r"resources.rollout_engine 'vllm': needs a GPU.*slots"):
        trainer_of(folders, PPOSpec(**FAST), rollout_engine="vllm")


def test_the_reward_model_reads_rows_without_the_padding_between_prompt_and_answer_and_scores_alike(folders):
    trainer, widths = trainer_of(folders, PPOSpec(**FAST)), []
    batch = {"prompt": [[5, 6, 7, 8, 9, 10, 11, 12], [3], [9, 4]]}
    answers = trainer.sample(batch)
    answers.response_mask[0, 1:] = 0  # the longest prompt with the shortest answer
    reward = trainer.engine.reward
    reward.module.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))
    scored = trainer.score(answers)
    assert widths == [max(9, 1 + int(answers.response_mask[1].sum()), 2 + int(answers.response_mask[2].sum()))]
    ids = torch.cat([answers.prompt_ids, answers.response_ids], 1)
    mask = torch.cat([answers.prompt_mask, answers.response_mask], 1)
    assert widths[0] < ids.shape[1]
    assert torch.allclose(scored.scores, end_scores(reward, ids, mask), atol=1e-5)


def test_only_adapters_move_and_a_critics_head(folders):
    assert all(".lora_" in n for n in names_moved(trainer_of(folders, PPOSpec(actor_lora=LORA, **FAST)), "actor"))
    moved = names_moved(trainer_of(folders, PPOSpec(critic_lora=LORA, **FAST)), "critic")
    assert "score.weight" in moved and all(".lora_" in n or n == "score.weight" for n in moved)


def test_what_is_trained_besides_the_adapters_makes_the_reference_a_copy(folders):
    lora = LoRASpec(rank=4, also_train=("norms", "embeddings"))
    trainer = trainer_of(folders, PPOSpec(actor_lora=lora, **FAST))
    assert not isinstance(trainer.engine.ref, WithoutAdapters)
    moved = names_moved(trainer, "actor")
    assert any("norm" in n for n in moved) and any("embed" in n for n in moved)


def test_scores_of_the_shared_reward_model_do_not_move_with_the_critic(folders):
    trainer = trainer_of(folders, PPOSpec(critic_lora=LORA, **FAST))
    ids = torch.tensor([[5, 6, 7, 1]])
    before = trainer.engine.reward(ids, torch.ones_like(ids)).detach().clone()
    valued = trainer.engine.critic(ids, torch.ones_like(ids)).detach().clone()
    assert torch.equal(before, valued)
    learn(trainer, 2)
    assert torch.equal(before, trainer.engine.reward(ids, torch.ones_like(ids)))
    assert not torch.allclose(valued, trainer.engine.critic(ids, torch.ones_like(ids)), atol=1e-4)


def test_saved_models_are_merged_and_the_adapters_load_in_peft(folders, tmp_path: Path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = trainer_of(folders, PPOSpec(actor_lora=LORA, critic_lora=LORA, **FAST))
    learn(trainer, 1)
    trainer.engine.save(tmp_path / "actor", tmp_path / "critic")
    trainer.engine.save_adapters(tmp_path, folders["actor"], folders["critic"])
    ids = torch.tensor([[5, 6, 7, 1]])
    mine = trainer.engine.actor.module(input_ids=ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "actor")(input_ids=ids).logits
    base = AutoModelForCausalLM.from_pretrained(folders["actor"])
    adapted = PeftModel.from_pretrained(base, tmp_path / "actor_adapter").eval()(input_ids=ids).logits
    assert torch.allclose(merged, mine, atol=1e-5) and torch.allclose(adapted, mine, atol=1e-5)
    critic = ValueModel.load(tmp_path / "critic").eval()
    assert torch.allclose(
        critic(ids, torch.ones_like(ids)), trainer.engine.critic.module(ids, torch.ones_like(ids)), atol=1e-5
    )


@pytest.mark.parametrize("advantage", ["rloo", "reinforce++", "grpo"])
def test_without_a_critic_the_actor_learns_what_a_function_rewards(folders, advantage, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")
    (tmp_path / "r.py").write_text("def f(prompts, responses):\n    return [r.count('w5') for r in responses]\n")
    rewards = [{"kind": "function", "function": f"{tmp_path}/r.py:f"}]
    spec = PPOSpec(
        advantage=advantage, samples_per_prompt=4, rewards=rewards, kl_coef=0.0, missing_eos_penalty=None, **FAST
    )
    trainer = trainer_of(folders, spec, critic=None)
    assert trainer.engine.critic is None
    experience = trainer.generate_experience(prompts())
    assert len(experience) == 8 * spec.answers
    same = experience.prompt_ids.view(8, spec.answers, -1)
    assert torch.equal(same, same[:, :1].expand_as(same)), "the answers to one prompt stand side by side"
    assert len({tuple(row.tolist()) for row in experience.response_ids}) > 8, "and differ"
    history = learn(trainer, 10)
    assert history[-1]["score"] > history[0]["score"] + 0.3 and "critic_loss" not in history[0]
    assert history[0]["ratio_first"] < 1e-4
    trainer.engine.save(tmp_path / "actor", tmp_path / "critic")
    assert (tmp_path / "actor").is_dir() and not (tmp_path / "critic").exists()


def test_advantages_of_an_answer_are_one_number_and_of_a_prompt_sum_to_nothing(folders):
    trainer = trainer_of(folders, PPOSpec(advantage="rloo", samples_per_prompt=3, **FAST))
    e = trainer.generate_experience(prompts())
    advantages, _ = trainer.advantages(e)
    first = advantages[:, 0]
    assert torch.equal(advantages, torch.where(e.response_mask.bool(), first.unsqueeze(1), 0.0))
    assert torch.allclose(first.view(8, 3).sum(1), torch.zeros(8), atol=1e-4)


def test_kl_in_the_loss_pulls_the_actor_back_to_the_reference(folders):
    free = learn(trainer_of(folders, PPOSpec(advantage="grpo", kl_coef=0.0, **FAST)), 5)[-1]
    held = learn(trainer_of(folders, PPOSpec(advantage="grpo", kl_coef=5.0, **FAST)), 5)[-1]
    assert held["kl_sequence"] < 0.5 * free["kl_sequence"]


def test_without_a_reward_model_the_critic_starts_at_zero(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")
    (tmp_path / "r.py").write_text(
        "def f(prompts, responses):\n    return [float(len(r.split())) for r in responses]\n"
    )
    spec = PPOSpec(rewards=[{"kind": "function", "function": f"{tmp_path}/r.py:f", "weight": 0.5}], **FAST)
    trainer = trainer_of(folders, spec, critic=None)
    assert trainer.engine.reward is None
    experience = trainer.generate_experience(prompts())
    assert torch.count_nonzero(experience.values) == 0
    tokenizer = trainer.tokenizer
    texts = [
        tokenizer.decode(row[mask.bool()], skip_special_tokens=True)
        for row, mask in zip(experience.response_ids, experience.response_mask, strict=True)
    ]
    assert experience.scores.tolist() == [0.5 * len(text.split()) for text in texts]
    trainer.train_rlhf(experience)
    with pytest.raises(ConfigError, match="rewards"):
        trainer_of(folders, PPOSpec(**FAST), critic=None)


def test_a_functions_scores_are_not_clipped_to_the_reward_models_range(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")
    (tmp_path / "r.py").write_text("def f(prompts, responses):\n    return [float(len(r)) for r in responses]\n")
    rewards = [{"kind": "function", "function": f"{tmp_path}/r.py:f"}]
    spec = PPOSpec(advantage="rloo", rewards=rewards, missing_eos_penalty=None, kl_coef=0.0, **FAST)
    trainer = trainer_of(folders, spec, critic=None)
    e = trainer.generate_experience(prompts())
    assert float(e.scores.max()) > 5
    gains = trainer.advantages(e)[0][:, 0].view(8, 4)
    assert torch.allclose(gains, (e.scores.view(8, 4) * 4 - e.scores.view(8, 4).sum(1, keepdim=True)) / 3, atol=1e-4)


def test_the_actors_schedule_begins_with_its_first_update(folders):
    optim = OptimSpec(lr=1.0e-3, warmup_steps=4)
    spec = PPOSpec(critic_warmup=1, ppo_epochs=2, actor_optim=optim, max_response_tokens=6, steps=3)
    trainer = trainer_of(folders, spec)
    learn(trainer, 1)
    history = learn(trainer, 1)
    assert history[0]["lr_actor"] == pytest.approx(1e-3 * (0.25 + 0.5) / 2)


def test_long_work_gives_signs_of_life_within_a_rollout(folders):
    trainer = trainer_of(folders, PPOSpec(ppo_epochs=2, **FAST), micro_batch=4, rollout_micro_batch=4)
    signs: list[int] = []
    trainer.on_life = lambda: signs.append(1)
    answers = trainer.sample(prompts())
    rows, while_sampling = len(answers), len(signs)
    assert 2 <= while_sampling <= rows, "whenever answers have ended, some of them together"
    trainer.train_rlhf(trainer.score(answers))
    assert len(signs) - while_sampling == 2 + 2 * 2, "batches of scores, and of each update"


def test_a_weighted_sum_of_sources_is_told_by_its_parts(folders, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")
    (tmp_path / "r.py").write_text("def f(prompts, responses):\n    return [1.0] * len(responses)\n")
    function = {"kind": "function", "function": f"{tmp_path}/r.py:f", "weight": 3.0}
    alone = trainer_of(folders, PPOSpec(**FAST)).generate_experience(prompts()).scores
    trainer = trainer_of(folders, PPOSpec(rewards=[ModelReward(weight=2.0), function], **FAST))
    together = trainer.generate_experience(prompts()).scores
    assert torch.allclose(together, 2 * alone + 3, atol=1e-5)
    assert trainer.metrics["score_1_function"] == 1.0
    assert trainer.metrics["score_model"] == pytest.approx(float(alone.mean()), abs=1e-5)


class TestAnotherTokenizer:
    """The reward model reads characters where the actor reads words."""

    @pytest.fixture
    def other(self, tmp_path) -> str:
        from rlhf_core.data.tokenizer import train
        from rlhf_core.specs import TokenizerSpec

        tokenizer = train([" ".join(tiny.WORDS)], TokenizerSpec(train_vocab_size=260))
        spec = ModelSpec(family="gpt2", hidden_size=16, layers=1, heads=2, positions=64)
        model = ValueModel.from_causal_lm(new_causal_lm(spec, tokenizer, 3), 3)
        save_value_model(model, tokenizer, tmp_path / "reward")
        return str(tmp_path / "reward")

    def test_scores_are_those_of_the_text_in_the_reward_models_own_tokens(self, folders, other):
        trainer = trainer_of(folders, PPOSpec(normalize_score=False, **FAST), critic=other)
        e = trainer.generate_experience(prompts())
        judge, tokenizer = ValueModel.load(other).eval(), load_tokenizer(other)
        for row in range(len(e)):
            prompt = trainer.tokenizer.decode(e.prompt_ids[row][e.prompt_mask[row].bool()])
            answer = trainer.tokenizer.decode(
                e.response_ids[row][e.response_mask[row].bool()], skip_special_tokens=True
            )
            ids = tokenizer(prompt)["input_ids"] + tokenizer(f" {answer}" if answer else "")["input_ids"]
            ids += [tokenizer.eos_token_id] if e.ended[row] else []
            score = judge(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0, -1].item()
            assert float(e.scores[row]) == pytest.approx(score, abs=1e-5)

    def test_what_exceeds_that_models_positions_loses_its_beginning_and_is_counted(self, folders, tmp_path):
        from rlhf_core.data.tokenizer import train
        from rlhf_core.specs import TokenizerSpec

        tokenizer = train([" ".join(tiny.WORDS)], TokenizerSpec(train_vocab_size=260))
        spec = ModelSpec(family="gpt2", hidden_size=16, layers=1, heads=2, positions=10)
        save_value_model(ValueModel.from_causal_lm(new_causal_lm(spec, tokenizer, 3), 3), tokenizer, tmp_path / "short")
        trainer = trainer_of(folders, PPOSpec(**FAST), critic=str(tmp_path / "short"))
        history = learn(trainer, 1)
        assert 0 < history[0]["answers_cut"] <= 1

    def test_a_critic_with_other_tokens_learns(self, folders, other, tmp_path):
        trainer = trainer_of(folders, PPOSpec(value_clip=None, **FAST), critic=other)
        assert trainer.engine.critic.module.config.model_type == "gpt2"
        history = learn(trainer, 6)
        assert history[-1]["critic_loss"] < history[0]["critic_loss"]
        trainer.engine.save(tmp_path / "actor", tmp_path / "critic")
        assert len(load_tokenizer(tmp_path / "critic")) == 260


def test_ema_is_the_average_of_the_actors_weights_and_is_saved_as_a_model(folders, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    trainer = trainer_of(folders, PPOSpec(ema=EMASpec(decay=0.5), ppo_epochs=1, **FAST))
    expected = weights(trainer.engine.actor.module)
    for _ in range(3):
        learn(trainer, 1)
        expected = 0.5 * expected + 0.5 * weights(trainer.engine.actor.module)
    own = weights(trainer.engine.actor.module)
    trainer.engine.save_ema(tmp_path / "ema")
    assert torch.equal(own, weights(trainer.engine.actor.module)), "saving leaves the actor as it was"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
    assert torch.allclose(weights(saved), expected, atol=1e-6)


def test_ema_is_the_actor_until_it_starts(folders):
    trainer = trainer_of(folders, PPOSpec(ema=EMASpec(decay=0.9, start_step=2), ppo_epochs=1, **FAST))
    learn(trainer, 2)
    with trainer.engine.actor_ema.in_place():
        averaged = weights(trainer.engine.actor.module)
    assert torch.equal(averaged, weights(trainer.engine.actor.module))
    learn(trainer, 1)
    with trainer.engine.actor_ema.in_place():
        assert not torch.equal(averaged, weights(trainer.engine.actor.module))


def test_the_mixture_loss_lowers_the_loss_of_the_pretraining_text_and_off_it_rises(folders):
    text = [{"input_ids": [2 + i, 3 + i, 4 + i, 1], "loss_mask": [1, 1, 1, 1]} for i in range(8)]
    mixed = trainer_of(folders, PPOSpec(ptx=PTXSpec(coef=1.0), **FAST))
    history = learn(mixed, 4, ptx=lambda update: text)
    assert history[-1]["ptx_loss"] < history[0]["ptx_loss"] - 0.5
    plain = trainer_of(folders, PPOSpec(**FAST))
    learn(plain, 4)
    ids = torch.tensor([row["input_ids"] for row in text])

    def loss(trainer) -> float:
        return float(trainer.engine.actor.module(input_ids=ids, labels=ids).loss)

    assert loss(mixed) < loss(plain)


def test_tokens_that_only_pad_the_embedding_are_never_sampled(folders, tmp_path):
    from rlhf_core.export import save_causal_lm

    tokenizer = load_tokenizer(folders["tokenizer"])
    model = new_causal_lm(tiny.MODEL, tokenizer, 0)
    model.resize_token_embeddings(64)
    save_causal_lm(model, tokenizer, tmp_path / "padded")
    trainer = trainer_of({**folders, "actor": str(tmp_path / "padded")}, PPOSpec(**FAST))
    e = trainer.generate_experience(prompts(64))
    assert int(e.response_ids.max()) < len(tokenizer)
    trainer.train_rlhf(e)
    assert trainer.metrics["ratio_first"] < 1e-4


def test_deepspeed_chats_unsupervised_step_lowers_the_loss_of_its_text(folders):
    args = PPOArgs(PPOSpec(**FAST))
    tokenizer = load_tokenizer(folders["tokenizer"])
    engine = DeepSpeedRLHFEngine(folders["actor"], folders["critic"], tokenizer, 3, args)
    trainer = DeepSpeedPPOTrainerUnsupervised(engine=engine, args=args)
    ids = torch.tensor([[2, 3, 4, 1], [7, 8, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    losses = [trainer.train_unsupervised(batch, unsup_coef=27.8) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.5
