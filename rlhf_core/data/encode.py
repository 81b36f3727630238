"""Encode: token ids of prompts and responses, which are encoded apart and joined, so that every stage sees the same
ids.

A prompt begins with BOS if the tokenizer puts one there by itself; a response ends with EOS, once. Special tokens
written out in the data ("</s>") are encoded as the characters they are, except in what a chat template has written.
What continues another text is spared the space that some tokenizers begin any text with (see `plain`), so that prompt
and response together decode to what they were.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from rlhf_core.data.plain import ANCHOR, PlainEncoder, leading_bos
from rlhf_core.data.template import Turn


class Encoder:
    """Encodes batches of prompts and responses with one tokenizer."""

    def __init__(self, tokenizer: Any, chat: bool) -> None:
        """`chat`: prompts come from a chat template, which writes special tokens and BOS as text."""
        self._tokenizer = tokenizer
        self._text = PlainEncoder(tokenizer)
        self._chat = chat
        self.eos = int(tokenizer.eos_token_id)
        self.bos = [] if chat else leading_bos(tokenizer)

    def _plain(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Ids of each text by itself; with `special`, special tokens written out in it count as such."""
        return [encoded.ids for encoded in self._text.alone(texts, special)]

    def _continued(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Ids of texts that continue another text."""
        return [encoded.ids for encoded in self._text.continued(texts, special)]

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
            [*self._text.anchor, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text).removeprefix(ANCHOR)
