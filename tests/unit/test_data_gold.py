"""Gold rewards by name."""

import sys

import pytest

from rlhf_core import gold, quickstart
from rlhf_core.errors import ConfigError


def test_quickstart_is_the_definition_of_the_task():
    rows = list(quickstart.generate(seed=0, prompts=5))
    prompts, responses = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    scores = gold.score("quickstart", prompts, responses)
    assert scores == [quickstart.gold(p, r) for p, r in zip(prompts, responses, strict=True)]
    assert all(0 <= score["gold"] <= 1 for score in scores)


def test_vader_is_sentiment_between_zero_and_one():
    pytest.importorskip("vaderSentiment")
    scores = gold.score("vader", ["", "", ""], ["I love this wonderful day!", "", "He died in horrible pain."])
    values = [score["gold"] for score in scores]
    assert 1 >= values[0] > 0.9 and values[1] == 0.5 and 0 <= values[2] < 0.1


def test_without_its_package_vader_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match="pip install vaderSentiment"):
        gold.score("vader", [""], [""])
