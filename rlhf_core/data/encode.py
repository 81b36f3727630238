"""Encode: token ids of prompts and responses, which are encoded apart and joined, so that every stage sees the same
ids.

A prompt begins with BOS if the tokenizer puts one there by itself; a response ends with EOS, once. Special tokens
written out in the data ("</s>") are encoded as the characters they are, except in what a chat template has written.
Tokenizers of the llama kind begin any text with a space; for a text that continues another that space is taken away
again, so that prompt and response together decode to what they were. The tokenizers library encodes a batch on all
cores by threads, which, unlike processes, start in no time and report progress.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

from rlhf_core.data.template import Turn

ANCHOR = "\n"
CHARACTERS = 1 << 20  # encoded at once: the library takes more than a hundred bytes for each token of a batch
T = TypeVar("T")


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


class Encoder:
    """Encodes batches of prompts and responses with one tokenizer."""

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        """`chat`: prompts come from a chat template, which writes special tokens and BOS as text."""
        self._backend = tokenizer.backend_tokenizer
        self._tokenizer = tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._chat = chat
        self.eos = int(tokenizer.eos_token_id)
        self.bos = [] if chat else self._bos()
        tokens = self._backend.encode("x", add_special_tokens=False).tokens
        self._adds_space = bool(tokens) and tokens[0].startswith("▁")
        self._anchor = self._plain([ANCHOR])[0]

    def _bos(self) -> list[int]:
        """What the tokenizer puts before a text by itself."""
        plain = self._backend.encode("x", add_special_tokens=False).ids
        full = self._backend.encode("x").ids
        return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])

    def _plain(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Ids of each text by itself; with `special`, special tokens written out in it count as such."""
        self._backend.encode_special_tokens = not special
        ids: list[list[int]] = []
        try:
            for some in limited(texts, len):
                ids += [e.ids for e in self._backend.encode_batch_fast(some, add_special_tokens=False)]
            return ids
        finally:
            self._backend.encode_special_tokens = False

    def _continued(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Ids of texts that continue another text."""
        if not self._adds_space:
            return self._plain(texts, special)
        length = len(self._anchor)
        anchored = self._plain([ANCHOR + text for text in texts], special)
        if all(ids[:length] == self._anchor for ids in anchored):
            return [ids[length:] for ids in anchored]
        # A token that spans the anchor and the text: rare, and then the text by itself is the best there is.
        alone = self._plain(texts, special)
        return [a[length:] if a[:length] == self._anchor else b for a, b in zip(anchored, alone, strict=True)]

    def prompts(self, prompts: Sequence[Sequence[Turn]]) -> list[tuple[list[int], list[int]]]:
        """Ids and loss mask (1 on earlier answers and their EOS) of each prompt."""
        first = self._plain([turns[0].text for turns in prompts], special=self._chat)
        later = [turn for turns in prompts for turn in turns[1:]]
        contexts = iter(self._continued([turn.text for turn in later if not turn.is_answer], special=self._chat))
        answers = iter(self.responses([turn.text for turn in later if turn.is_answer]))
        encoded = []
        for turns, ids in zip(prompts, first, strict=True):
            opening = [*ids, self.eos] if turns[0].is_answer else ids
            parts = [(self.bos, 0), (opening, int(turns[0].is_answer))]
            parts += [(next(answers), 1) if turn.is_answer else (next(contexts), 0) for turn in turns[1:]]
            mask = [[learned] * len(part) for part, learned in parts]
            encoded.append((list(chain.from_iterable(p for p, _ in parts)), list(chain.from_iterable(mask))))
        return encoded

    def responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each response, EOS at the end."""
        return [[*ids, self.eos] for ids in self._continued(texts)]

    def texts(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of plain texts without BOS and EOS; each comes with whether it continues the text before it."""
        begun = iter(self._plain([text for text, continues in texts if not continues]))
        continued = iter(self._continued([text for text, continues in texts if continues]))
        return [next(continued) if continues else next(begun) for _, continues in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response without EOS and pad, with the space it may begin with."""
        text = self._tokenizer.decode(
            [*self._anchor, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).removeprefix(ANCHOR)
