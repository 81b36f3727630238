"""transformers' own `generate`, as a rollout engine: the answers of the plain loop, with the log-probabilities PPO needs."""

import pytest
import torch
from test_rollout import FAMILIES, tiny
from test_rollout_slots import PROMPTS, often_ending
from transformers import GenerationConfig

from rlhf_core.rollout import Sampling, generate
from rlhf_core.scoring import response_scores

OPTIONS = {"seed": 7, "eos": 1, "pad": 0}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_plain_loop_and_log_probabilities_those_of_a_plain_forward_pass(family):
    model = often_ending(family)
    plain = generate(model, PROMPTS, range(9), Sampling(14), batch_size=64, engine="plain", **OPTIONS)
    done = []
    native = generate(
        model, PROMPTS, range(9), Sampling(14), batch_size=4, engine="generate", on_batch=done.append, **OPTIONS
    )
    assert native.responses() == plain.responses() and len({len(a) for a in plain.responses()}) > 3
    assert torch.equal(native.prompt_ids, plain.prompt_ids) and torch.equal(native.prompt_mask, plain.prompt_mask)
    assert torch.allclose(native.logprobs, plain.logprobs, atol=1e-4)
    assert torch.allclose(native.entropy, plain.entropy, atol=1e-4)
    assert done == [4, 8, 9]


@pytest.mark.parametrize("sampling", [Sampling(9, 0.7, top_k=3), Sampling(9, 1.3, top_p=0.5, vocabulary=30)])
def test_filters_and_temperature_are_ours_and_a_models_own_settings_are_out_of_force(sampling):
    model = tiny("llama")
    plain = generate(model, PROMPTS, range(9), sampling, engine="plain", **OPTIONS)
    own = GenerationConfig(repetition_penalty=5.0, temperature=0.1, do_sample=True, min_new_tokens=9, num_beams=3)
    model.generation_config = own
    native = generate(model, PROMPTS, range(9), sampling, engine="generate", **OPTIONS)
    assert native.responses() == plain.responses() and model.generation_config is own
    mask = plain.response_mask.bool()
    assert native.support is not None and torch.equal(native.support[mask], plain.support[mask])
    r = native
    again = response_scores(
        model, r.prompt_ids, r.prompt_mask, r.response_ids, r.response_mask, sampling.temperature, r.support,
        vocabulary=sampling.vocabulary,
    )  # fmt: skip
    assert torch.allclose(again.logprobs[mask], r.logprobs[mask], atol=1e-4)


def test_what_on_token_raises_gives_the_rollout_up_and_leaves_the_models_settings():
    model, calls = tiny("opt"), []
    own = model.generation_config

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        generate(model, PROMPTS, range(9), Sampling(6), engine="generate", on_token=stop, **OPTIONS)
    assert len(calls) == 3 and model.generation_config is own
