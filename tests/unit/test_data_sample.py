"""Answers for sampled pairs come from the model that SFT starts from, with the data's tokenizer, batch by batch."""

from typing import Any

import pytest
import tiny
import torch

from rlhf_core.models import new_causal_lm
from rlhf_core.rollout import sample_texts
from rlhf_core.specs import ModelSpec

PROMPTS = [[5, 6, 7], [9], [8, 7, 6, 5, 4, 3, 10], [11, 12]]


def saved(folder, rows, seed=0):
    """A model with so many rows of the vocabulary; those beyond the tokenizer's 32 tokens are likely where there are any."""
    tokenizer = tiny.tokenizer()
    model = new_causal_lm(tiny.MODEL, tokenizer, seed)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        weight: Any = model.get_input_embeddings().weight
        weight[len(tokenizer) :] *= 50
    model.save_pretrained(folder)
    return ModelSpec(path=str(folder))


def sample(spec, tokenizer, batch_size=4, samples=3, on_batch=None, prompts=PROMPTS):
    return sample_texts(
        spec,
        tokenizer,
        prompts,
        max_new_tokens=8,
        temperature=1.0,
        samples=samples,
        seed=1,
        batch_size=batch_size,
        on_batch=on_batch,
    )


def test_rows_of_the_vocabulary_that_are_no_token_are_never_sampled(tmp_path):
    answers = sample(saved(tmp_path, rows=64), tiny.tokenizer())
    assert max(token for some in answers for answer in some for token in answer) < 32


def test_a_tokenizer_with_more_tokens_than_the_model_reads_and_writes_them(tmp_path):
    spec, tokenizer = saved(tmp_path, rows=32), tiny.tokenizer()
    tokenizer.add_tokens(["more", "most"])
    answers = sample(spec, tokenizer, prompts=[[32, 33]], samples=2)
    assert [len(answers), len(answers[0])] == [1, 2] and all(answers[0])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_answers_do_not_depend_on_how_many_are_sampled_at_once_and_differ_from_each_other(batch_size, tmp_path):
    spec, seen = saved(tmp_path, rows=32), []
    answers = sample(spec, tiny.tokenizer(), batch_size, on_batch=seen.append)
    assert answers == sample(spec, tiny.tokenizer(), 4)
    assert len({str(answer) for answer in answers[0]}) > 1
    assert seen[-1] == 12 and len(seen) == -(-12 // batch_size)
