"""Plain text to token ids, alone or as the continuation of another text: what the data stage and the retokenizer share.

Special tokens written out in a text are encoded as the characters they are unless asked otherwise. Tokenizers of the
llama kind begin any text with a space; a text that continues another one is encoded after an anchor, whose ids are taken
away again, so that it is spared that space. The tokenizers library encodes a batch on all cores by threads, which, unlike
processes, start in no time and report progress.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

ANCHOR = "\n"
CHARACTERS = 1 << 20  # encoded at once: the library takes more than a hundred bytes for each token of a batch
T = TypeVar("T")


class Encoded(NamedTuple):
    """A text's ids, and where in the text each one ends, in characters (empty where that was not asked for)."""

    ids: list[int]
    ends: list[int]


def limited(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in lists of at least one and, if more, of at most `CHARACTERS` characters together."""
    some: list[T] = []
    total = 0
    for item in items:
        if some and total + size(item) > CHARACTERS:
            yield some
            some, total = [], 0
        some.append(item)
        total += size(item)
    if some:
        yield some


def leading_bos(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself."""
    plain = tokenizer.backend_tokenizer.encode("x", add_special_tokens=False).ids
    full = tokenizer.backend_tokenizer.encode("x").ids
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def adds_space(tokenizer: Any) -> bool:
    """Whether the tokenizer begins any text with a space of its own (sentencepiece)."""
    tokens = tokenizer.backend_tokenizer.encode("x", add_special_tokens=False).tokens
    return bool(tokens) and tokens[0].startswith("▁")


class PlainEncoder:
    """Encodes texts with one tokenizer, without its BOS and EOS.

    Attributes:
        adds_space: see the function of that name.
        anchor: ids of `ANCHOR`.
    """

    def __init__(self, tokenizer: Any, ends: bool = False) -> None:
        """`ends`: tell where in the text each token ends, which takes longer."""
        self._backend = tokenizer.backend_tokenizer
        self._ends = ends
        self.adds_space = adds_space(tokenizer)
        self.anchor = self.alone([ANCHOR])[0].ids

    def alone(self, texts: Sequence[str], special: bool = False) -> list[Encoded]:
        """Each text by itself; with `special`, special tokens written out in it count as such."""
        self._backend.no_padding()  # transformers leaves its last call's padding and truncation here
        self._backend.no_truncation()
        self._backend.encode_special_tokens = not special
        encode = self._backend.encode_batch if self._ends else self._backend.encode_batch_fast
        found: list[Encoded] = []
        try:
            for some in limited(texts, len):
                found += [
                    Encoded(e.ids, [end for _, end in e.offsets] if self._ends else [])
                    for e in encode(some, add_special_tokens=False)
                ]
            return found
        finally:
            self._backend.encode_special_tokens = False

    def continued(self, texts: Sequence[str], special: bool = False) -> list[Encoded]:
        """Texts that continue another text."""
        if not self.adds_space:
            return self.alone(texts, special)
        anchored = self.alone([ANCHOR + text for text in texts], special)
        length = len(self.anchor)
        # A token may span the anchor and the text: rare, and then the text by itself is the best there is.
        spanned = [i for i, encoded in enumerate(anchored) if encoded.ids[:length] != self.anchor]
        alone = dict(zip(spanned, self.alone([texts[i] for i in spanned], special), strict=True))
        return [
            alone[i] if i in alone else Encoded(e.ids[length:], [end - len(ANCHOR) for end in e.ends[length:]])
            for i, e in enumerate(anchored)
        ]
