"""A prompt belongs to one stage and to one side of train and test, whatever else is in the data."""

import random

import pytest

from rlhf_core.data.split import Splitter, prompt_digest
from rlhf_core.data.template import Dropped, Reason
from rlhf_core.specs import Shares

DEFAULT = Shares()
ALL = ("sft", "reward", "ppo")
PROMPTS = [f"prompt {i}" for i in range(4000)]


def places(prompts, seed=0, shares=DEFAULT, feeds=ALL):
    splitter = Splitter(seed, shares)
    return {prompt: splitter.assign(prompt, feeds) for prompt in prompts}


def test_the_place_of_a_prompt_does_not_depend_on_the_others():
    shuffled = random.Random(0).sample(PROMPTS, 1000)
    everything = places(PROMPTS)
    assert places(shuffled) == {prompt: everything[prompt] for prompt in shuffled}


def test_prompts_that_differ_in_case_and_space_go_together():
    assert prompt_digest(0, " Who  is\nthere?") == prompt_digest(0, "who is there?")
    assert prompt_digest(0, "é") == prompt_digest(0, "e\u0301")
    assert prompt_digest(0, "a b") != prompt_digest(0, "ab")


def test_another_seed_gives_another_split():
    assert places(PROMPTS, seed=0) != places(PROMPTS, seed=1)


def test_the_shares_have_the_sizes_asked_for():
    found = list(places(PROMPTS, shares=Shares(sft=2, reward=4, ppo=4, test=0.1)).values())
    for share, part in (("sft", 0.2), ("reward", 0.4), ("ppo", 0.4)):
        assert sum(place[0] == share for place in found) / len(found) == pytest.approx(part, abs=0.03)
        tests = [split == "test" for name, split in found if name == share]
        assert sum(tests) / len(tests) == pytest.approx(0.1, abs=0.03)


def test_a_share_of_weight_zero_gets_nothing():
    assert {place[0] for place in places(PROMPTS, shares=Shares(sft=0, reward=1, ppo=1)).values()} == {"reward", "ppo"}


def test_what_a_row_cannot_feed_is_divided_among_what_it_can():
    found = list(places(PROMPTS, shares=Shares(sft=1, reward=8, ppo=1), feeds=("sft", "ppo")).values())
    assert sum(place[0] == "sft" for place in found) / len(found) == pytest.approx(0.5, abs=0.03)


def test_more_shares_to_feed_never_move_a_prompt_that_is_where_it_wants_to_be():
    all_places, some = places(PROMPTS), places(PROMPTS, feeds=("sft", "ppo"))
    assert all(some[prompt] == place for prompt, place in all_places.items() if place[0] != "reward")


def test_a_later_row_that_cannot_follow_its_prompt_is_dropped():
    splitter = Splitter(0, Shares(sft=0, reward=1, ppo=1))
    prompt = next(p for p in PROMPTS if splitter.assign(p, ALL)[0] == "reward")
    with pytest.raises(Dropped) as dropped:
        splitter.assign(prompt, ("ppo",))
    assert dropped.value.reason is Reason.OTHER_SHARE


def test_a_row_that_no_share_takes_is_dropped():
    with pytest.raises(Dropped) as dropped:
        Splitter(0, Shares(sft=0, reward=1, ppo=0)).assign("a", ("sft", "ppo"))
    assert dropped.value.reason is Reason.NO_SHARE
