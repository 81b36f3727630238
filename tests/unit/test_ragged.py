"""Rows side by side without padding give what padded rows give: scores, values and gradients of every family that can."""

from typing import Any

import pytest
import torch
from test_packing import gradients, model
from torch import Tensor

from rlhf_core import ragged
from rlhf_core.models import ValueModel, forward_inputs
from rlhf_core.ragged import needs_padding, side_by_side
from rlhf_core.scoring import sequence_scores

FAMILIES = sorted(family.removesuffix("_text") for family in ragged.FAMILIES)
LENGTHS = (14, 3, 1, 9)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask, and the tokens that count, of rows padded on the left or on the right: `[4, 14]` each."""
    ids = torch.randint(2, 32, (4, 14), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 14, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(0, length) if row % 2 else slice(14 - length, 14)] = 1
    counted = mask.bool() & (mask.cumsum(1) > 1)
    return ids, mask, counted


def scored(made: Any) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies, their gradient, values and theirs."""
    ids, mask, counted = batch()
    logprobs, entropies = sequence_scores(made, forward_inputs(made, ids, mask), counted, entropy=True)
    first = gradients(made, logprobs.sum() + (entropies**2).sum())
    critic = ValueModel.from_causal_lm(made, seed=0)
    values = critic(ids, mask)[mask.bool()]
    return logprobs, entropies, first, values, gradients(critic, (values**2).sum())


def grouped(family: str) -> Any:
    """A model whose keys have half as many heads, where the family knows that."""
    made = model(family)
    if getattr(made.config, "num_key_value_heads", None):
        made.config.num_key_value_heads = 2
        torch.manual_seed(0)
        made = type(made)(made.config)
    return made


@pytest.mark.parametrize(("checkpointing", "kernels"), [(False, True), (True, True), (False, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_values_and_gradients_are_those_of_padded_rows(family, checkpointing, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(ragged, "can_attend", lambda *_: False)
    made = grouped(family)
    if checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made.train()
    ids, mask, _ = batch()
    joined = side_by_side(made, ids, mask)
    assert joined and joined["input_ids"].shape == (1, sum(LENGTHS))
    found = scored(made)
    monkeypatch.setattr(ragged, "FAMILIES", frozenset())
    assert side_by_side(made, ids, mask) is None
    for ours, padded in zip(found, scored(made), strict=True):
        largest = float(padded.abs().max())
        assert largest > 0
        torch.testing.assert_close(ours, padded, atol=3e-6 * largest, rtol=1e-4)


def test_a_row_does_not_see_the_others():
    made = model("opt")
    ids, mask, counted = batch()
    before, _ = sequence_scores(made, forward_inputs(made, ids, mask), counted)
    ids[0] = (ids[0] + 7) % 30 + 2
    after, _ = sequence_scores(made, forward_inputs(made, ids, mask), counted)
    others = LENGTHS[0] - 1
    assert torch.equal(before[others:], after[others:]) and not torch.equal(before[:others], after[:others])


@pytest.mark.parametrize("family", ["bloom", "gptj", "gpt_neo", "codegen"])
def test_families_that_do_not_hand_lengths_on_keep_their_padding(family):
    made = model(family)
    assert side_by_side(made, *batch()[:2]) is None and needs_padding(made)


def test_rows_longer_than_a_window_keep_their_padding():
    made = model("mistral", window=True)
    ids, mask, _ = batch()
    assert side_by_side(made, ids, mask) is None and needs_padding(made)
    assert side_by_side(made, ids[1:2, :3], mask[1:2, :3]) is not None
    assert not needs_padding(model("opt"), model("llama")) and needs_padding(model("opt"), model("bloom"))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_that_does_not_know_the_lengths_is_not_taken_for_right(family):
    made = model(family)
    ids, mask, _ = batch()
    joined = side_by_side(made, ids, mask)
    assert joined
    del joined[ragged.LENGTHS]
    assert made(**joined).logits.isnan().any()


def test_dropout_is_applied():
    made = model("opt")
    made.train()
    for layer in made.model.decoder.layers:
        layer.self_attn.dropout = 0.5
    ids, mask, counted = batch()
    first, second = (sequence_scores(made, forward_inputs(made, ids, mask), counted)[0] for _ in range(2))
    assert not torch.equal(first, second)
