"""The quickstart task: preference data from a seed, with a known gold reward.

A person asks for a number of things of one kind ("Name three fruits for my friend Ann."); a sloppy demonstrator answers
with an opening phrase and a list ("Gladly: plum, fig and kiwi."). What makes an answer good is defined in four parts, each
in [0, 1]: the asked `count`, the asked `category`, `distinct` items, a `polite` opening; `gold` is their mean. Stages see
demonstrations and noisy preferences and never a gold value, so gold measures whether RLHF found what the labels only hint
at. Carefulness varies by answer, not by item: a good answer is thus a mode that the demonstrator has, not a miracle to be
sampled. Standard library only. Left out: tokenization and the split by prompt, which belong to the data stage.
"""

import math
import random
import re
from collections.abc import Iterator

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animals": ("dog", "cat", "cow", "pig", "fox", "hen", "goat", "bear", "wolf", "lion"),
    "fruits": ("plum", "pear", "fig", "kiwi", "peach", "grape", "apple", "mango", "lemon", "melon"),
    "colors": ("red", "blue", "green", "pink", "black", "white", "gray", "brown", "teal", "beige"),
    "tools": ("saw", "axe", "drill", "hammer", "rake", "spade", "wrench", "chisel", "pliers", "file"),
    "drinks": ("tea", "milk", "wine", "beer", "cola", "water", "juice", "cocoa", "rum", "cider"),
    "clothes": ("hat", "coat", "sock", "shirt", "vest", "scarf", "boot", "glove", "belt", "dress"),
    "trees": ("oak", "elm", "ash", "pine", "birch", "fir", "cedar", "maple", "yew", "willow"),
    "instruments": ("harp", "flute", "drum", "horn", "lute", "piano", "cello", "viola", "tuba", "bell"),
}
NUMBERS: dict[str, int] = {"two": 2, "three": 3, "four": 4, "five": 5}
PHRASINGS: tuple[str, ...] = (
    "Name {number} {category} {context}.",
    "List {number} {category} {context}.",
    "Please give me {number} {category} {context}.",
    "I need {number} {category} {context}.",
    "Can you name {number} {category} {context}?",
    "Do you know {number} {category} {context}?",
)
RELATIONS: tuple[str, ...] = ("my friend", "my cousin", "my teacher", "our guest", "our neighbor", "the poster of")
NAMES: tuple[str, ...] = (
    "Ann", "Ben", "Sam", "Tom", "Eve", "Max", "Joe", "Kim", "Lea", "Ida", "Leo", "Mia", "Amy", "Tim", "Zoe", "Ray",
)  # fmt: skip
POLITE_OPENINGS: tuple[str, ...] = ("Sure:", "Gladly:", "Of course:", "With pleasure:")
CURT_OPENINGS: tuple[str, ...] = ("", "Well:", "Whatever:", "If I must:")
VERSION = 1  # raise it with any change below: data of another version is built anew
PARTS: tuple[str, ...] = ("count", "category", "distinct", "polite")

# The demonstrator. Every answer is careful or careless in each respect by itself.
CAREFUL_COUNT = 0.25  # probability of the asked count; otherwise any of 1..MOST_ITEMS
MOST_ITEMS = 6
CAREFUL_CATEGORY = 0.5  # probability of an answer that keeps to the category ...
IN_CATEGORY = (0.1, 0.97)  # ... and, per item, of an item of the category in a careless and in a careful answer
CAREFUL_DISTINCT = 0.5
STUTTER = (0.6, 0.03)  # per item, probability of saying it twice
POLITE = 0.4

# Bradley-Terry: P(a preferred to b) = sigmoid((gold(a) - gold(b)) / TEMPERATURE).
TEMPERATURE = 0.08

_CATEGORY_OF = {item: category for category, items in CATEGORIES.items() for item in items}
_ITEMS = tuple(_CATEGORY_OF)


def generate(seed: int, prompts: int, pairs_per_prompt: int = 1) -> Iterator[dict[str, str]]:
    """Yields preference rows with `prompt`, `chosen`, `rejected` and `answer`, in a stable order.

    A smaller `prompts` gives a prefix of a larger one.

    Args:
        seed: Decides everything.
        prompts: Number of distinct prompts, at most `distinct_prompts()`.
        pairs_per_prompt: Rows per prompt; they follow one another.

    Yields:
        `chosen` and `rejected` are two different answers of the demonstrator, labelled by Bradley-Terry noise on their
        gold difference (Bradley and Terry, 1952). `answer` is a third one, independent of the label: imitating it is
        imitating the demonstrator, not the preference.

    Raises:
        ValueError: If there are not that many distinct prompts, or a number is not positive.
    """
    if not 1 <= prompts <= distinct_prompts():
        raise ValueError(f"prompts must be in 1..{distinct_prompts()}, not {prompts}")
    if pairs_per_prompt < 1:
        raise ValueError(f"pairs_per_prompt must be at least 1, not {pairs_per_prompt}")
    order = list(range(distinct_prompts()))
    random.Random(f"{seed}:prompts").shuffle(order)
    for index in order[:prompts]:
        # One generator per prompt: a prompt's rows do not depend on the prompts before it.
        rng = random.Random(f"{seed}:{index}")
        prompt, number, category = _prompt(index)
        for _ in range(pairs_per_prompt):
            answer, first = _demonstrate(rng, number, category), _demonstrate(rng, number, category)
            second = first
            while second == first:
                second = _demonstrate(rng, number, category)
            margin = (gold(prompt, first)["gold"] - gold(prompt, second)["gold"]) / TEMPERATURE
            if rng.random() >= 1 / (1 + math.exp(-margin)):
                first, second = second, first
            yield {"prompt": prompt, "chosen": first, "rejected": second, "answer": answer}


def distinct_prompts() -> int:
    """Returns the number of different prompts that the task has."""
    return len(PHRASINGS) * len(NUMBERS) * len(CATEGORIES) * len(RELATIONS) * len(NAMES)


def gold(prompt: str, response: str) -> dict[str, float]:
    """Scores a response by the task's definition, which no stage sees as a label.

    Every word after the opening phrase, save "and", is an entry of the list, so that unknown words cost as much as wrong
    items. A response without any known item scores 0 in every part.

    Args:
        prompt: Any text; what it does not ask for (number, category) scores 0.
        response: Any text.

    Returns:
        The parts, each in [0, 1], and `gold`, their mean:
        `count` = max(0, 1 - 2 |different entries - asked| / asked); `category` = different entries of the asked category
        over the asked number, or over all different entries if those are more; `distinct` = max(0, 1 - repeated entries /
        different ones); `polite` = 1 for a polite opening.
    """
    number, category = _asked(prompt)
    body, polite = _split_opening(response)
    entries = [word for word in re.findall(r"\w+", body.lower()) if word != "and"]
    parts = dict.fromkeys(PARTS, 0.0)
    if any(entry in _CATEGORY_OF for entry in entries):
        different = set(entries)
        if number is not None:
            parts["count"] = max(0.0, 1 - 2 * abs(len(different) - number) / number)
        if number is not None and category is not None:
            right = sum(_CATEGORY_OF.get(entry) == category for entry in different)
            parts["category"] = right / max(len(different), number)
        parts["distinct"] = max(0.0, 1 - (len(entries) - len(different)) / len(different))
        parts["polite"] = float(polite)
    return parts | {"gold": sum(parts.values()) / len(PARTS)}


def _prompt(index: int) -> tuple[str, int, str]:
    """Returns prompt `index` of `distinct_prompts()` with the number and the category that it asks for."""
    index, phrasing = divmod(index, len(PHRASINGS))
    index, number = divmod(index, len(NUMBERS))
    index, category = divmod(index, len(CATEGORIES))
    index, relation = divmod(index, len(RELATIONS))
    words = {
        "number": list(NUMBERS)[number],
        "category": list(CATEGORIES)[category],
        "context": f"for {RELATIONS[relation]} {NAMES[index]}",
    }
    request = PHRASINGS[phrasing].format(**words)
    return f"Human: {request}\n\nAssistant:", NUMBERS[words["number"]], words["category"]


def _asked(prompt: str) -> tuple[int | None, str | None]:
    words = re.findall(r"\w+", prompt.lower())
    number = next((NUMBERS[word] for word in words if word in NUMBERS), None)
    return number, next((word for word in words if word in CATEGORIES), None)


def _split_opening(response: str) -> tuple[str, bool]:
    """Returns the response without its opening phrase, and whether that phrase is a polite one."""
    text = response.strip()
    for opening in POLITE_OPENINGS + CURT_OPENINGS:
        if opening and text.startswith(opening):
            return text[len(opening) :], opening in POLITE_OPENINGS
    return text, False


def _demonstrate(rng: random.Random, number: int, category: str) -> str:
    """Returns one answer of the sloppy demonstrator, with a leading space."""
    length = number if rng.random() < CAREFUL_COUNT else rng.randint(1, MOST_ITEMS)
    in_category = IN_CATEGORY[rng.random() < CAREFUL_CATEGORY]
    stutter = STUTTER[rng.random() < CAREFUL_DISTINCT]
    items: list[str] = []
    while len(items) < length:
        item = rng.choice(CATEGORIES[category] if rng.random() < in_category else _ITEMS)
        if item not in items:
            items.append(item)
    items = [f"{item} {item}" if rng.random() < stutter else item for item in sorted(items)]
    opening = rng.choice(POLITE_OPENINGS if rng.random() < POLITE else CURT_OPENINGS)
    listing = items[0] if length == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    return f" {opening} {listing}." if opening else f" {listing}."
