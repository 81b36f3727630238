"""Known faults of DeepSpeed-Chat's PPO, each as a test of ours that fails if we have the fault; and the table of all of them.

`PITFALLS` are what its code does wrong by reading, `COMPLAINTS` what its users reported (DSE = DeepSpeedExamples threads).
`CAUGHT_BY` names for each the test that would catch it, here, in the two files beside this one or elsewhere, and the last test
checks that they exist. What concerns no training code has its reason in `NOT_HERE`.
"""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import small_ppo
import torch
from small_ppo import EOS, FAST

from rlhf_core.scoring import response_scores, response_values
from rlhf_core.specs import OptimSpec, PPOSpec

# Only the score moves anything, and only at the last token: gamma 0, no KL, no whitening, values 0.
SCORE_ONLY = PPOSpec(
    max_response_tokens=8, ppo_epochs=1, gamma=0.0, lam=0.0, kl_coef=0.0, whiten_advantages=False, normalize_score=False,
    score_clip=None, missing_eos_penalty=None, value_clip=None, actor_optim=FAST, critic_optim=FAST,
)  # fmt: skip
PITFALLS = {
    1: "EOS is masked out of PPO's losses where pad is EOS (DSE#888, #672, #490)",
    2: "greedy rollouts",
    3: "old log-probabilities and values with dropout",
    4: "the reward loss is on every token and on padding",
    5: "SFT, reward and PPO end their texts differently",
    6: "step 3 has no seed, so its prompts overlap with SFT's",
    7: "rows are dropped but their prompts stay",
    8: "stale caches: neither content nor EOS is in their key",
    9: "micro-batches weigh alike whatever their tokens",
    10: "PPO's constants are in the code",
    11: "one tokenizer for actor and reward model",
    12: "the schedule counts minibatches and ignores the rest",
    13: "models without `.model` crash (DSE#924)",
    14: "a LoRA critic freezes its head",
    15: "merging LoRA changes the model in training",
}
COMPLAINTS = {
    1: "repeated tokens with the hybrid engine (DSE#503)",
    2: "gibberish with ZeRO-3 (DSE#821)",
    3: "prompts are gathered over ranks without their masks (DSE#628)",
    4: "GPT-NeoX is wrong (DSE#335)",
    5: "the cache of newer transformers (DeepSpeed#6522)",
    6: "parameters in flight between training and generation (DSE#591)",
    7: "ranks that stop at different lengths hang (DSE#636)",
    8: "flat reward: the reward model's head was not loaded (DSE#489, #883)",
    9: "infinite losses from log(sigmoid) (DSE#423, #444)",
    10: "loss scale at its minimum (DSE#418)",
    11: "nonsense after the three steps (DSE#297)",
    12: "answers forced to the greatest length (DSE#539)",
    13: "one update a rollout (DSE#533)",
    14: "EOS is not trained (DSE#888)",
    15: "the reward loss is on all tokens (DSE#316, #693)",
    16: "reward metrics are divided inside the loop (DSE#334, #425)",
    17: "Bloom's reward model fails without BOS (DSE#479)",
    18: "SFT loss on prompt and padding (DSE#301, #793)",
    19: "no saving in between, no resume (DSE#434, #850)",
    20: "ZeRO-3 saves empty shapes (DSE#429, #820)",
    21: "the saved tokenizer does not load (DSE#511)",
    22: "padded data in memory (DSE#450, #849)",
    23: "damaged caches (DSE#437)",
    24: "every rank loads the whole model (DSE#498)",
    25: "actor and reward model share a tokenizer (DSE#276)",
    26: "published times cannot be reproduced (DSE#361)",
    27: "evaluation without numbers (DSE#308)",
    28: "LoRA with gradient checkpointing (DSE#386)",
    29: "wishes that were not answered",
}
UNIT, ACROSS, SLOW = "tests/unit/", "tests/distributed/", "tests/slow/"
PPO, ENGINES, STAGES = (f"tests/peers/test_deepspeed_chat_{name}.py::" for name in ("faults", "engines", "stages"))
ROLLOUT = UNIT + "test_rollout.py::"
CAUGHT_BY = {
    "pitfall 1": PPO + "test_eos_is_trained_in_ppo_when_pad_equals_eos",
    "pitfall 2": PPO + "test_rollouts_are_sampled_not_greedy",
    "pitfall 3": PPO + "test_old_logprobs_and_values_are_without_dropout_whatever_the_saved_configuration",
    "pitfall 4": STAGES + "test_the_reward_loss_reads_the_last_token_and_no_padding",
    "pitfall 5": STAGES + "test_one_eos_ends_the_answers_of_sft_reward_and_ppo",
    "pitfall 6": STAGES + "test_every_stage_has_the_pipelines_seed_and_no_prompt_is_in_two_stages",
    "pitfall 7": PPO + "test_answers_that_are_only_eos_keep_their_rows_and_train",
    "pitfall 8": STAGES + "test_data_of_other_content_or_with_another_eos_is_another_artifact",
    "pitfall 9": PPO + "test_an_update_does_not_depend_on_how_rows_fall_into_micro_batches",
    "pitfall 10": PPO + "test_every_constant_of_ppo_is_a_setting_that_changes_the_update",
    "pitfall 11": PPO + "test_a_reward_model_may_read_tokens_of_its_own",
    "pitfall 12": PPO + "test_the_schedule_ends_with_the_last_update",
    "pitfall 13": STAGES + "test_every_family_goes_through_sft_and_ppo",
    "pitfall 14": STAGES + "test_a_critic_with_adapters_trains_its_head_and_the_reward_model_stays",
    "pitfall 15": STAGES + "test_saving_with_adapters_leaves_the_model_in_training_as_it_was",
    "complaint 1": ROLLOUT + "test_rollout_logprobs_of_left_padded_prompts_equal_a_plain_forward_of_each_row_alone",
    "complaint 2": ENGINES + "test_zero_3_goes_from_training_to_generation_and_back_with_the_numbers_of_zero_0",
    "complaint 3": ROLLOUT + "test_answers_do_not_depend_on_batch_size_or_order",
    "complaint 4": ROLLOUT + "test_training_forward_gives_the_rollout_logprobs_so_the_first_ratio_is_one",
    "complaint 5": ROLLOUT + "test_rollout_logprobs_of_left_padded_prompts_equal_a_plain_forward_of_each_row_alone",
    "complaint 6": ENGINES + "test_zero_3_goes_from_training_to_generation_and_back_with_the_numbers_of_zero_0",
    "complaint 7": ENGINES + "test_ranks_whose_answers_end_at_different_lengths_do_not_wait_for_each_other",
    "complaint 8": STAGES + "test_a_reward_model_without_its_head_is_refused",
    "complaint 9": STAGES + "test_losses_of_pairs_stay_finite_at_any_margin",
    "complaint 11": SLOW + "test_promises.py::test_ppo_raises_gold_and_every_part_of_it_far_above_sft",
    "complaint 12": PPO + "test_answers_end_at_eos_and_have_lengths_of_their_own",
    "complaint 13": PPO + "test_several_updates_on_a_rollout_move_the_ratio",
    "complaint 14": PPO + "test_eos_is_trained_in_ppo_when_pad_equals_eos",
    "complaint 15": STAGES + "test_the_reward_loss_reads_the_last_token_and_no_padding",
    "complaint 16": STAGES + "test_reward_accuracy_is_the_count_over_all_held_out_pairs",
    "complaint 17": STAGES + "test_a_bloom_reward_model_takes_pairs_that_differ_from_the_first_token",
    "complaint 18": STAGES + "test_sft_loss_is_on_the_response_and_its_eos_alone",
    "complaint 19": "tests/peers/test_checkpoint_faults.py::test_a_rollout_is_not_thrown_away",
    "complaint 20": ENGINES + "test_models_saved_at_zero_3_are_whole",
    "complaint 21": STAGES + "test_a_saved_model_brings_its_tokenizer_without_a_hub",
    "complaint 22": STAGES + "test_data_on_disk_is_not_padded_and_is_read_through_a_memory_map",
    "complaint 23": UNIT + "test_contract.py::test_damage_is_detected_before_publishing_and_before_reading",
    "complaint 25": PPO + "test_a_reward_model_may_read_tokens_of_its_own",
    "complaint 27": ACROSS + "test_evaluate.py::test_perplexity_is_over_the_response_tokens_of_the_held_out_rows",
    "complaint 28": STAGES + "test_adapters_get_gradients_under_gradient_checkpointing",
}
NOT_HERE = {
    "complaint 10": "a matter of fp16 on accelerators",
    "complaint 24": "a matter of memory, which needs models of some size",
    "complaint 26": "no fault of code",
    "complaint 29": "no fault of code",
}


def logprob(trainer, e, row: int, place: int) -> float:
    with torch.no_grad():
        scores = response_scores(trainer.engine.actor, e.prompt_ids, e.prompt_mask, e.response_ids, e.response_mask)
    return float(scores.logprobs[row, place])


def values(trainer, e) -> torch.Tensor:
    with torch.no_grad():
        return response_values(trainer.engine.critic, e.prompt_ids, e.prompt_mask, e.response_ids, e.response_mask)


@pytest.mark.parametrize("same_token", [True, False])
def test_eos_is_trained_in_ppo_when_pad_equals_eos(same_token, tmp_path):
    tokenizer = small_ppo.tiny.tokenizer()
    if same_token:
        tokenizer.pad_token = tokenizer.eos_token
    trainer = small_ppo.ppo(small_ppo.save(tmp_path, small_ppo.language_model(), tokenizer), SCORE_ONLY)
    asked = small_ppo.prompts(4)["prompt"]
    out = small_ppo.rollout_of(trainer, asked, [[5, 6, EOS], [EOS], [7, EOS], [8, 9, 10, 11]])
    out = replace(out, scores=torch.tensor([3.0, 3.0, 3.0, 0.0]), values=torch.zeros_like(out.values))
    eos_at = ((0, 2), (1, 0), (2, 1))
    before = [logprob(trainer, out, row, place) for row, place in eos_at]
    trainer.train_rlhf(out)
    after = [logprob(trainer, out, row, place) for row, place in eos_at]
    assert all(a > b for b, a in zip(before, after, strict=True)), "the score, paid at EOS, makes EOS likelier"

    empty = small_ppo.rollout_of(trainer, asked, [[EOS]] * 4)
    empty = replace(empty, scores=empty.values[:, 0] + 1)
    trainer.train_rlhf(empty)
    assert (values(trainer, empty)[:, 0] > empty.values[:, 0]).all(), "and the value before EOS is learned"


def test_rollouts_are_sampled_not_greedy(plain):
    trainer = small_ppo.ppo(plain)
    out = trainer.generate_experience({"prompt": [[5, 6, 7]] * 16})
    assert len({tuple(row.tolist()) for row in out.response_ids}) > 12
    again = trainer.generate_experience({"prompt": [[5, 6, 7]] * 16})
    assert out.response_ids.shape != again.response_ids.shape or not torch.equal(out.response_ids, again.response_ids)


def test_old_logprobs_and_values_are_without_dropout_whatever_the_saved_configuration(tmp_path):
    strong = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    folders = small_ppo.save(tmp_path, small_ppo.language_model("gpt2"), **strong)
    assert json.loads((tmp_path / "actor" / "config.json").read_text())["resid_pdrop"] == 0.5
    trainer = small_ppo.ppo(folders, PPOSpec(max_response_tokens=8, ppo_epochs=1))
    out = trainer.generate_experience(small_ppo.prompts(8))
    for engine in (trainer.engine.actor, trainer.engine.critic):
        engine.train()  # as DeepSpeed-Chat does before it scores
    mask = out.response_mask.bool()
    assert torch.allclose(values(trainer, out)[mask], out.values[mask], atol=1e-5)
    trainer.train_rlhf(out)
    assert trainer.metrics["ratio_first"] < 1e-4 and trainer.metrics["kl_sequence"] == pytest.approx(0, abs=1e-4)


def test_answers_that_are_only_eos_keep_their_rows_and_train(tmp_path):
    folders = small_ppo.save(tmp_path, small_ppo.language_model(eos_bias=60.0))
    trainer = small_ppo.ppo(folders, PPOSpec(max_response_tokens=8))
    batch = small_ppo.prompts(6)
    out = trainer.generate_experience(batch)
    assert out.response_ids.tolist() == [[EOS]] * 6
    rows = [row[keep.bool()].tolist() for row, keep in zip(out.prompt_ids, out.prompt_mask, strict=True)]
    assert rows == batch["prompt"]
    assert all(torch.isfinite(torch.tensor(trainer.train_rlhf(out))))


def test_an_update_does_not_depend_on_how_rows_fall_into_micro_batches(plain):
    found = []
    for micro_batch in (16, 1):
        trainer = small_ppo.ppo(plain, PPOSpec(max_response_tokens=8, ppo_epochs=1), micro_batch=micro_batch)
        out = trainer.generate_experience(small_ppo.prompts(16))
        assert len(set(out.response_mask.sum(1).tolist())) > 3
        trainer.train_rlhf(out)
        found.append({k: v for k, v in trainer.metrics.items() if "ratio" not in k})
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-5)


SETTINGS = {
    "kl_coef": 0.5, "kl_estimator": "k3", "score_clip": 0.01, "gamma": 0.5, "lam": 0.5, "missing_eos_penalty": 9.0,
    "missing_eos": "subtract", "whiten_rewards": True, "whiten_advantages": False, "clip": 0.01, "clip_high": 0.01,
    "dual_clip": 1.01, "value_clip": 0.01, "entropy_coef": 5.0, "ppo_epochs": 1, "minibatches": 2, "kl_in": "loss",
}  # fmt: skip


@pytest.fixture(scope="module")
def update(plain):
    """Weights after the second of two rollouts that are the same for all settings."""

    def of(**changed) -> torch.Tensor:
        base = {"max_response_tokens": 8, "ppo_epochs": 3, "actor_optim": FAST, "critic_optim": FAST}
        trainer = small_ppo.ppo(plain, PPOSpec.model_validate({**base, "temperature": 1.0, **changed}))
        asked = small_ppo.prompts(8)["prompt"]
        answers = [[5 + i, 6, 7, 8][: 2 + i % 3] + [EOS] * (i % 2) for i in range(8)]
        out = small_ppo.rollout_of(trainer, asked, answers)
        out = replace(out, ref_logprobs=out.ref_logprobs - 0.3 * out.response_mask)
        trainer.train_rlhf(out)
        return torch.cat([small_ppo.weights(trainer.engine.actor), small_ppo.weights(trainer.engine.critic)])

    return of


@pytest.fixture(scope="module")
def usual(update) -> torch.Tensor:
    weights = update()
    assert torch.equal(weights, update()), "the same settings give the same weights"
    return weights


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_constant_of_ppo_is_a_setting_that_changes_the_update(name, update, usual):
    assert not torch.equal(update(**{name: SETTINGS[name]}), usual)


def test_a_reward_model_may_read_tokens_of_its_own(tmp_path):
    from rlhf_core.scoring import end_scores

    other = small_ppo.tiny.tokenizer()
    words = {**{f"w{i}": 31 - i for i in range(30)}, "<pad>": 0, "<eos>": 1}  # the same words, numbered backwards
    other._tokenizer.model = type(other._tokenizer.model)(vocab=words, unk_token="<pad>")
    folders = small_ppo.save(tmp_path / "a", small_ppo.language_model())
    judge = small_ppo.save(tmp_path / "b", small_ppo.language_model("llama"), other)
    trainer = small_ppo.ppo(
        replace(folders, reward=judge.reward), PPOSpec(max_response_tokens=8, normalize_score=False)
    )
    out = trainer.generate_experience(small_ppo.prompts(8))
    for row in range(8):
        ids = out.prompt_ids[row][out.prompt_mask[row].bool()].tolist()
        ids += out.response_ids[row][out.response_mask[row].bool()].tolist()
        theirs = torch.tensor([[i if i < 2 else 33 - i for i in ids]])
        score = end_scores(trainer.engine.reward, theirs, torch.ones_like(theirs))
        assert out.scores[row] == pytest.approx(score.item(), abs=1e-4)
    assert all(torch.isfinite(torch.tensor(trainer.train_rlhf(out))))


def test_the_schedule_ends_with_the_last_update(plain):
    optim = OptimSpec(lr=1e-3, schedule="linear")
    spec = PPOSpec(max_response_tokens=8, ppo_epochs=2, minibatches=2, actor_optim=optim, critic_optim=optim)
    trainer = small_ppo.ppo(plain, spec, iterations=2)
    for _ in range(2):
        trainer.train_rlhf(trainer.generate_experience(small_ppo.prompts(8)))
    for engine in (trainer.engine.actor, trainer.engine.critic):
        rates = [group["lr"] for group in engine.optimizer.param_groups]
        assert rates == pytest.approx([1e-3 / 8] * len(rates)), "the eighth of eight updates"


def test_answers_end_at_eos_and_have_lengths_of_their_own(plain):
    out = small_ppo.ppo(plain).generate_experience(small_ppo.prompts(32))
    lengths = out.response_mask.sum(1)
    assert len(set(lengths.tolist())) > 4 and 0.1 < out.ended.float().mean() < 0.99
    for row in range(32):
        answer = out.response_ids[row][out.response_mask[row].bool()].tolist()
        assert EOS not in answer[:-1] and (answer[-1] == EOS) == bool(out.ended[row])


def test_several_updates_on_a_rollout_move_the_ratio(plain):
    trainer = small_ppo.ppo(plain, PPOSpec(max_response_tokens=8, actor_optim=OptimSpec(lr=1e-3)))
    trainer.train_rlhf(trainer.generate_experience(small_ppo.prompts(16)))
    m = trainer.metrics
    assert m["updates"] == 4 and m["ratio_first"] < 1e-4
    assert m["ratio_deviation"] > 1e-3 and 0 < m["approx_kl"] < 0.1


def _exists(test: str) -> bool:
    file, _, name = test.partition("::")
    path = Path(__file__).parents[2] / file
    tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def test_every_fault_is_caught_by_a_test_that_exists_or_has_its_reason():
    faults = [f"pitfall {n}" for n in PITFALLS] + [f"complaint {n}" for n in COMPLAINTS]
    assert sorted([*CAUGHT_BY, *NOT_HERE]) == sorted(faults)
    assert {fault: test for fault, test in CAUGHT_BY.items() if not _exists(test)} == {}
