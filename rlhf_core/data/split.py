"""Which stage a prompt belongs to, and whether it is for training or test: by a hash of the prompt, and of nothing
else.

Hence the order of rows, the number of sources and the number of processes do not matter, more data never moves a
prompt, and no prompt is in two stages or on both sides of train/test. A row that has nothing for the stage of its
prompt (say, no pair where the hash says reward) goes by a second hash to one of the stages it can feed. A source with
test rows of its own decides the side for its prompts. Either way the first row of a prompt decides, later ones follow,
and one that cannot follow is left out and counted.
"""

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Collection
from typing import Literal

from rlhf_core.data.digests import DigestTable
from rlhf_core.data.template import Dropped, Reason
from rlhf_core.specs import Shares

Share = Literal["sft", "reward", "ppo"]
Split = Literal["train", "test"]
SHARES: tuple[Share, ...] = ("sft", "reward", "ppo")
SPLITS: tuple[Split, ...] = ("train", "test")
PLACES: tuple[tuple[Share, Split], ...] = tuple((share, split) for share in SHARES for split in SPLITS)


def prompt_digest(seed: int, prompt: str) -> bytes:
    """sha256 of the seed and the prompt without regard to case, white space and Unicode composition."""
    plain = unicodedata.normalize("NFC", " ".join(prompt.split())).casefold()
    return hashlib.sha256(f"{seed}\0{plain}".encode(errors="surrogatepass")).digest()


def copies(seed: int, prompt: str, weight: float | None) -> int:
    """How often a training row counts: floor(weight), and once more for the fractional part of the prompts."""
    if weight is None:
        return 1
    whole = math.floor(weight)
    return whole + (_uniform(prompt_digest(seed, prompt)[24:32]) < weight - whole)


class Splitter:
    """Assigns prompts to shares and splits; remembers where each prompt went."""

    def __init__(self, seed: int, shares: Shares) -> None:
        self.seed = seed
        self.weights: dict[Share, float] = {"sft": shares.sft, "reward": shares.reward, "ppo": shares.ppo}
        self.test = shares.test
        self._placed = DigestTable()
        self._prompts: Counter[Share] = Counter()

    def assign(self, prompt: str, feeds: Collection[Share], side: Split | None = None) -> tuple[Share, Split]:
        """The place of a row with this prompt that has something for the shares `feeds`; Dropped if there is none.

        `side` is what a source with test rows of its own says; by default the hash decides.
        """
        digest = prompt_digest(self.seed, prompt)
        known = self._placed.get(digest)
        if known:
            share, split = PLACES[known - 1]
            if share not in feeds:
                raise Dropped(Reason.OTHER_SHARE)
            return share, split
        place = self._choose(digest, feeds), side or ("test" if _uniform(digest[8:16]) < self.test else "train")
        self._placed.put(digest, PLACES.index(place) + 1)
        self._prompts[place[0]] += 1
        return place

    def holds_out(self, prompt: str) -> bool:
        """Whether a prompt was assigned to the tests of a share."""
        known = self._placed.get(prompt_digest(self.seed, prompt))
        return known > 0 and PLACES[known - 1][1] == "test"

    def _choose(self, digest: bytes, feeds: Collection[Share]) -> Share:
        possible: dict[Share, float] = {
            share: weight for share, weight in self.weights.items() if weight > 0 and share in feeds
        }
        if not possible:
            raise Dropped(Reason.NO_SHARE)
        wanted = _pick(_uniform(digest[:8]), self.weights)
        return wanted if wanted in possible else _pick(_uniform(digest[16:24]), possible)

    def prompts(self) -> dict[Share, int]:
        """How many different prompts each share was given."""
        return {share: self._prompts[share] for share in SHARES}


def _uniform(data: bytes) -> float:
    """A number in [0, 1) from 8 bytes."""
    return int.from_bytes(data, "big") / 2**64


def _pick(u: float, weights: dict[Share, float]) -> Share:
    """The share in whose part of the line of all weights `u` falls."""
    point = u * sum(weights.values())
    for share, weight in weights.items():
        point -= weight
        if point < 0:
            return share
    return max(weights, key=lambda share: weights[share])  # only by rounding at the very end of the line
