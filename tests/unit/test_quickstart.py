"""The quickstart task's ground truth and its generator."""

import statistics
from itertools import islice

import pytest

from rlhf_core.quickstart import PARTS, TEMPERATURE, distinct_prompts, generate, gold

PROMPT = "Human: Name three fruits for my friend Ann.\n\nAssistant:"


@pytest.mark.parametrize(
    ("response", "count", "category", "distinct", "polite"),
    [
        (" Gladly: plum, fig and kiwi.", 1, 1, 1, 1),
        (" plum, fig and kiwi.", 1, 1, 1, 0),
        (" Whatever: plum, fig and kiwi.", 1, 1, 1, 0),
        (" Sure: plum.", 0, 1 / 3, 1, 1),
        (" Sure: plum plum, fig and kiwi.", 1, 1, 2 / 3, 1),
        (" Sure: plum, cat and saw.", 1, 1 / 3, 1, 1),
        (" Sure: plum, fig, kiwi and pear.", 1 / 3, 1, 1, 1),
        (" Sure: plum, plum and plum.", 0, 1 / 3, 0, 1),
        (" Sure: plum, fig and xyzzy.", 1, 2 / 3, 1, 1),
    ],
)
def test_each_part_of_gold_has_its_value(response, count, category, distinct, polite):
    parts = gold(PROMPT, response)
    assert [parts[p] for p in PARTS] == pytest.approx([count, category, distinct, polite])
    assert parts["gold"] == pytest.approx((count + category + distinct + polite) / 4)


@pytest.mark.parametrize(
    "response", ["", " ", " Gladly:", " and and and", " xyzzy", "\x00\u2028" * 9, " Gladly: ." * 50]
)
def test_an_answer_without_a_known_item_is_worth_nothing_however_polite(response):
    assert set(gold(PROMPT, response).values()) == {0.0}


@pytest.mark.parametrize("prompt", ["", "Human: hello", "nonsense"])
def test_any_text_has_a_value(prompt):
    assert all(0 <= value <= 1 for value in gold(prompt, " plum and cat").values())


def test_generation_is_a_function_of_the_seed_with_distinct_prompts_and_prefixes():
    rows = list(generate(0, 300))
    assert rows == list(generate(0, 300)) and rows[:50] == list(generate(0, 50)) != list(generate(1, 50))
    assert len({row["prompt"] for row in rows}) == 300
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert len(list(generate(0, 10, pairs_per_prompt=3))) == 30
    with pytest.raises(ValueError, match="prompts must be in"):
        next(generate(0, distinct_prompts() + 1))


def test_labels_follow_gold_with_noise_and_demonstrations_do_not():
    rows = list(islice(generate(0, 3000), 3000))

    def mean(key: str) -> float:
        return statistics.mean(gold(r["prompt"], r[key])["gold"] for r in rows)

    margins = [gold(r["prompt"], r["chosen"])["gold"] - gold(r["prompt"], r["rejected"])["gold"] for r in rows]
    right = statistics.mean(m > 0 for m in margins)
    assert 0.75 < right < 0.95, "Bradley-Terry noise: mostly right, never always"
    assert min(margins) < -TEMPERATURE
    assert mean("rejected") < mean("answer") < mean("chosen")


def test_the_demonstrator_leaves_room_in_every_part():
    rows = list(generate(0, 1000))
    for part in PARTS:
        assert 0.3 < statistics.mean(gold(r["prompt"], r["answer"])[part] for r in rows) < 0.8
