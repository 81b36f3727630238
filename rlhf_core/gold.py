"""Gold rewards: the ground truth of a task, by name. It labels sampled pairs and judges models; no stage trains on
it.

`quickstart` is the definition of the generated task; `vader` is the sentiment of a text by the VADER lexicon (Hutto
and Gilbert, 2014), for stories that should end well. Left out: learned judges.
"""

from collections.abc import Callable, Sequence

from rlhf_core.errors import ConfigError
from rlhf_core.specs import GoldName

Gold = Callable[[str, str], dict[str, float]]


def score(name: GoldName, prompts: Sequence[str], responses: Sequence[str]) -> list[dict[str, float]]:
    """Gold of each response to its prompt, in [0, 1] under the key "gold"; parts of it, if any, under their names."""
    judge = gold_reward(name)
    return [judge(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def gold_reward(name: GoldName) -> Gold:
    """The function behind a name; ConfigError if it needs a package that is not installed."""
    if name == "quickstart":
        from rlhf_core.quickstart import gold

        return gold
    if name == "vader":
        return _vader()
    raise ConfigError(f"gold: {name!r} is not known; use quickstart or vader")


def _vader() -> Gold:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError(
            "gold: vader needs the package vaderSentiment, which is not installed: pip install vaderSentiment"
        ) from None
    analyzer = SentimentIntensityAnalyzer()

    def gold(prompt: str, response: str) -> dict[str, float]:
        # VADER's compound lies in [-1, 1]; 0 is neutral.
        return {"gold": (float(analyzer.polarity_scores(response)["compound"]) + 1) / 2}

    return gold
