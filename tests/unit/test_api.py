"""The library API of DeepSpeed-Chat runs as its users know it."""

import argparse
import math
from pathlib import Path

import pytest
import torch

from rlhf_core.errors import ConfigError, NonFiniteError
from rlhf_core.models import load_tokenizer
from rlhf_core.ppo_trainer import DeepSpeedPPOTrainer
from rlhf_core.rlhf_engine import DeepSpeedRLHFEngine, PPOArgs, ppo_args
from rlhf_core.specs import OptimSpec, PPOSpec


def prompts(batch: int = 8) -> dict[str, torch.Tensor]:
    """As DeepSpeed-Chat's loader yields them: left-padded ids and their mask."""
    ids = torch.randint(2, 32, (batch, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[::2, :3], mask[::2, :3] = 0, 0
    return {"prompt": ids, "prompt_att_mask": mask}


def engine_of(folders, args, n: int = 2) -> DeepSpeedRLHFEngine:
    return DeepSpeedRLHFEngine(
        actor_model_name_or_path=folders["actor"],
        critic_model_name_or_path=folders["critic"],
        tokenizer=load_tokenizer(folders["tokenizer"]),
        num_total_iters=n,
        args=args,
    )


def weights(engine) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in engine.module.parameters()])


def test_the_documented_loop_runs_and_trains_actor_and_critic_but_not_reference_and_reward(folders):
    tokenizer, n = load_tokenizer(folders["tokenizer"]), 2
    args = argparse.Namespace(
        max_answer_seq_len=8, actor_learning_rate=1e-3, critic_learning_rate=1e-3, num_warmup_steps=0
    )
    prompt_train_dataloader = [prompts(), prompts()]

    engine = DeepSpeedRLHFEngine(
        actor_model_name_or_path=folders["actor"],
        critic_model_name_or_path=folders["critic"],
        tokenizer=tokenizer,
        num_total_iters=n,
        args=args,
    )
    before = {name: weights(getattr(engine, name)) for name in ("actor", "ref", "critic", "reward")}
    trainer = DeepSpeedPPOTrainer(engine=engine, args=args)
    for prompt_batch in prompt_train_dataloader:
        out = trainer.generate_experience(prompt_batch)
        actor_loss, critic_loss = trainer.train_rlhf(out)
        assert math.isfinite(actor_loss) and math.isfinite(critic_loss)

    moved = {name: not torch.equal(before[name], weights(getattr(engine, name))) for name in before}
    assert moved == {"actor": True, "ref": False, "critic": True, "reward": False}
    assert trainer.metrics["kl_sequence"] != 0  # the actor has left the reference by the second rollout


def test_experience_rows_stand_in_the_order_of_the_prompts(folders):
    engine = engine_of(folders, PPOSpec(max_response_tokens=6))
    trainer = DeepSpeedPPOTrainer(engine=engine)
    batch = prompts()
    out = trainer.generate_experience(batch)
    for row in range(8):
        mine = out.prompt_ids[row][out.prompt_mask[row].bool()]
        assert torch.equal(mine, batch["prompt"][row][batch["prompt_att_mask"][row].bool()])


def test_critic_starts_as_the_reward_model_so_the_last_value_is_the_score(folders):
    trainer = DeepSpeedPPOTrainer(engine=engine_of(folders, PPOSpec(max_response_tokens=6)))
    assert torch.equal(weights(trainer.engine.critic), weights(trainer.engine.reward))


def test_critic_warmup_leaves_the_actor_alone(folders):
    spec = PPOSpec(
        max_response_tokens=6, critic_warmup=1, actor_optim=OptimSpec(lr=1e-2), critic_optim=OptimSpec(lr=1e-2)
    )
    engine = engine_of(folders, spec)
    trainer = DeepSpeedPPOTrainer(engine=engine)
    actor, critic = weights(engine.actor), weights(engine.critic)
    trainer.train_rlhf(trainer.generate_experience(prompts()))
    assert torch.equal(actor, weights(engine.actor)) and not torch.equal(critic, weights(engine.critic))
    trainer.train_rlhf(trainer.generate_experience(prompts()))
    assert not torch.equal(actor, weights(engine.actor))


def test_kl_stop_ends_the_updates_on_a_rollout(folders):
    spec = PPOSpec(max_response_tokens=6, ppo_epochs=4, minibatches=2, kl_stop=1e-6, actor_optim=OptimSpec(lr=1e-2))
    trainer = DeepSpeedPPOTrainer(engine=engine_of(folders, spec))
    trainer.train_rlhf(trainer.generate_experience(prompts()))
    assert trainer.metrics["kl_stopped"] == 1 and trainer.metrics["updates"] < 8
    assert trainer.optimizer_step == 8  # the schedule goes on as if all had run


def test_a_loss_that_is_not_finite_stops_before_any_weight_changes(folders):
    engine = engine_of(folders, PPOSpec(max_response_tokens=6))
    trainer = DeepSpeedPPOTrainer(engine=engine)
    out = trainer.generate_experience(prompts())
    actor, critic = weights(engine.actor), weights(engine.critic)
    out.scores[0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        trainer.train_rlhf(out)
    assert torch.equal(actor, weights(engine.actor)) and torch.equal(critic, weights(engine.critic))


def test_entropy_bonus_raises_entropy(folders):
    spec = PPOSpec(
        max_response_tokens=6, ppo_epochs=8, entropy_coef=10.0, actor_optim=OptimSpec(lr=1e-2), normalize_score=False
    )
    trainer = DeepSpeedPPOTrainer(engine=engine_of(folders, spec, 3))
    entropies = []
    for _ in range(3):
        trainer.train_rlhf(trainer.generate_experience(prompts()))
        entropies.append(trainer.metrics["entropy"])
    assert entropies[-1] > entropies[0]


def test_args_may_be_nothing_a_spec_a_mapping_or_a_namespace_with_deepspeed_chats_names():
    assert ppo_args() == PPOArgs()
    assert ppo_args(PPOSpec(clip=0.3)).spec.clip == 0.3
    args = ppo_args({"clip": 0.3, "micro_batch": 2, "seed": 5})
    assert (args.spec.clip, args.resources.micro_batch, args.seed) == (0.3, 2, 5)
    chat = argparse.Namespace(
        actor_learning_rate=1e-4, lr_scheduler_type="polynomial", per_device_training_batch_size=2, data_path=["x"]
    )
    resolved = ppo_args(chat)
    assert resolved.spec.actor_optim.lr == 1e-4 and resolved.spec.actor_optim.schedule == "linear"
    assert resolved.spec.critic_optim.lr == PPOSpec().critic_optim.lr and resolved.resources.micro_batch == 2
    with pytest.raises(ConfigError, match="clip"):
        ppo_args({"clip": -1})


def test_deepspeed_chats_flags_for_lora_ema_mixture_loss_and_memory_are_understood():
    chat = argparse.Namespace(
        actor_lora_dim=128, only_optimize_lora=True, actor_lora_learning_rate=5e-4, critic_lora_dim=0, enable_ema=True,
        unsupervised_dataset_name="wikitext", unsup_coef=27.8, actor_zero_stage=3, critic_zero_stage=2, offload=True,
        offload_reference_model=True, clip_reward_value=5, kl_ctl=0.1, cliprange=0.2, enable_hybrid_engine=True,
    )  # fmt: skip
    args = ppo_args(chat)
    assert args.spec.actor_lora is not None and args.spec.critic_lora is None
    assert (args.spec.actor_lora.rank, args.spec.actor_lora.alpha, args.spec.actor_lora.lr) == (128, 1.0, 5e-4)
    assert args.spec.actor_lora.also_train == ()
    assert args.spec.ema.decay == 0.992 and args.spec.ptx.coef == 27.8
    resources = {role: args.resources.of_model(role) for role in ("actor", "critic", "reference", "reward")}
    assert {role: r.zero_stage for role, r in resources.items()} == {
        "actor": 3, "critic": 2, "reference": 3, "reward": 0
    }  # fmt: skip
    assert resources["actor"].offload_parameters == resources["reference"].offload_parameters == "cpu"
    assert resources["critic"].offload_optimizer == "cpu" and resources["critic"].offload_parameters == "none"


def test_a_tokenizer_without_eos_is_refused_by_name(folders):
    tokenizer = load_tokenizer(folders["tokenizer"])
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="EOS"):
        DeepSpeedRLHFEngine(folders["actor"], folders["critic"], tokenizer, 1)


def test_saved_actor_and_critic_load_in_plain_transformers_with_the_same_outputs(folders, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    engine = engine_of(folders, PPOSpec(max_response_tokens=6))
    engine.save(tmp_path / "actor", tmp_path / "critic")
    ids = torch.tensor([[5, 6, 7, 1]])
    mine = engine.actor.module(input_ids=ids).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "actor")(input_ids=ids).logits, mine)
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    value = engine.critic.module(ids, torch.ones_like(ids))[0, -1]
    assert critic(input_ids=ids).logits.item() == pytest.approx(value.item(), abs=1e-5)
