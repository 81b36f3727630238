"""At ZeRO-3 a rollout on weights gathered once is the rollout on weights gathered layer by layer, and leaves nothing behind."""

import pytest
import ranks
import torch

LORA = {"rank": 4, "alpha": 8.0}
CASES = {"lora": {"actor_lora": LORA, "critic_lora": LORA}, "whole": {}}


@pytest.fixture(scope="module", params=["lora", pytest.param("whole", marks=pytest.mark.slow)])
def both(request, tmp_path_factory, folders):
    """What each of two ranks found."""
    out, spec = tmp_path_factory.mktemp("gathered"), CASES[request.param]
    return ranks.run(2, "gathered", out, timeout=900, script="rollout_scenarios.py", folders=folders, spec=spec)


def test_answers_and_what_is_learned_from_them_are_the_same(both):
    assert len({len(answer) for rank in both for answer in rank["once"]["answers"]}) > 1
    for rank in both:
        layers, once = rank["layers"], rank["once"]
        assert once["answers"] == layers["answers"]
        for name in ("logprobs", "reference", "losses"):
            assert torch.allclose(torch.tensor(once[name]), torch.tensor(layers[name]), atol=3e-4), name


def test_only_layer_by_layer_ranks_go_in_step(both):
    assert all(rank["layers"]["lock_step"] and not rank["once"]["lock_step"] for rank in both)
    assert all(rank["layers"]["twins"] == 0 and rank["once"]["twins"] == 2 for rank in both)
    one, other = (rank["once"]["passes"] for rank in both)
    assert one != other, "a rank whose answers have ended makes no more passes"


def test_the_divided_weights_keep_their_bits_and_the_whole_ones_are_freed(both):
    assert all(rank["layers"]["kept"] and rank["once"]["kept"] and rank["once"]["gone"] for rank in both)


def test_a_rollout_that_one_rank_gives_up_leaves_all_as_it_was(both):
    assert [rank["once"]["given_up"] for rank in both] == [False, True]
    assert all(rank["once"]["kept_after"] for rank in both)
