"""Retokenizer: the ids of one tokenizer to those of another, for a reward model or critic with a vocabulary of its own.

Prompt and response are decoded and encoded apart, as the data stage does, so a row converted is the row that the data stage
would have made with the other tokenizer. EOS is a place, not text: where the source's stands, the target's is put, and an
answer that did not end has none after it, so the last token says the same in both. What a token stands for is known in bytes
(half an emoji is no text), so an incomplete character at a cut becomes U+FFFD. Tokenizers are byte-level, of the sentencepiece
kind, or of whole words; others are refused.
"""

import codecs
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from rlhf_core.data.plain import Encoded, PlainEncoder, adds_space, leading_bos
from rlhf_core.errors import ConfigError, DataError


@dataclass(frozen=True)
class _Piece:
    """A run of text between special tokens, or one of those.

    Attributes:
        text: of the run; "" for a special token.
        special: the target's id of a special token, None for text.
        before: per source token of the piece, the characters of `text` that are complete before it.
    """

    text: str
    special: int | None
    before: list[int]


class Retokenizer:
    """Converts ids of `source` (the data's and actor's tokenizer) to ids of `target`.

    Attributes:
        same: both have one vocabulary and the same special tokens, so ids need no conversion.
    """

    def __init__(self, source: Any, target: Any) -> None:
        self._source, self._target = source, target
        self._source_bos, self._target_bos = leading_bos(source), leading_bos(target)
        self._source_eos, self._target_eos = int(source.eos_token_id), int(target.eos_token_id)
        self.same: bool = (
            source.get_vocab() == target.get_vocab()
            and self._source_bos == self._target_bos
            and (self._source_eos, source.pad_token_id) == (self._target_eos, target.pad_token_id)
        )
        if not self.same:
            _decoder(source)  # refused now, not when the first row is converted
        self._dropped = {source.pad_token_id, source.bos_token_id} - {self._source_eos}

    # Built when the first row is converted: never, where ids need no conversion.

    @cached_property
    def _bytes(self) -> list[bytes]:
        return token_bytes(self._source)

    @cached_property
    def _shared(self) -> dict[int, int]:
        return _shared_specials(self._source, self._target)

    @cached_property
    def _text(self) -> PlainEncoder:
        return PlainEncoder(self._target, ends=True)

    @cached_property
    def _source_space(self) -> bool:
        """Whether the text of the source's tokens begins with a space that was not in the text: words are told with one."""
        return adds_space(self._source) or not _decoder(self._source)

    def convert(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[int]:
        """The target's ids of a prompt and a response.

        Pad and BOS are left out; other special tokens become the target's of the same name, or the characters they are
        written with. The target's BOS stands in front if that tokenizer puts one there by itself.
        """
        ids = list(self._target_bos)
        for pieces, first in ((self._prompt(prompt_ids), True), (self._pieces(response_ids), False)):
            for number, piece in enumerate(pieces):
                at_start = first and not number
                ids += [piece.special] if piece.special is not None else self._encode(piece.text, at_start).ids
        return ids

    def align(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[int]:
        """For each response token, the index in `convert`'s result of the last token that lies entirely before it.

        A critic's value there has read nothing of the token about to be chosen. (How the target cuts the word before it may
        still depend on what follows.) Indices never fall from one token to the next.

        Raises:
            DataError: nothing stands before the response.
        """
        position = len(self.convert(prompt_ids, [])) - 1
        if position < 0:
            raise DataError("a prompt is empty, so no value stands before its answer; drop rows without a prompt")
        places: list[int] = []
        for piece in self._pieces(response_ids):
            if piece.special is not None:
                places += [position] * len(piece.before)
                position += 1
                continue
            ends = self._encode(piece.text, False).ends
            done = 0
            for known in piece.before:
                while done < len(ends) and ends[done] <= known:
                    done += 1
                places.append(position + done)
            position += len(ends)
        return places

    def _prompt(self, ids: Sequence[int]) -> list[_Piece]:
        """Pieces of a prompt without the BOS and the space that the source puts in front by itself."""
        kept, bos = [token for token in map(int, ids) if token not in self._dropped], self._source_bos
        pieces = self._pieces(kept[len(bos) :] if kept[: len(bos)] == bos else kept)
        if self._source_space and pieces and pieces[0].special is None:
            pieces[0] = _Piece(pieces[0].text.removeprefix(" "), None, pieces[0].before)
        return pieces

    def _pieces(self, ids: Sequence[int]) -> list[_Piece]:
        """Cut at EOS and at special tokens that the target has too, and decode what is between them."""
        pieces: list[_Piece] = []
        run: list[int] = []
        for token in map(int, ids):
            special = self._target_eos if token == self._source_eos else self._shared.get(token)
            if special is None:
                run.append(token)
                continue
            pieces += [self._decode(run), _Piece("", special, [0])] if run else [_Piece("", special, [0])]
            run = []
        return [*pieces, self._decode(run)] if run else pieces

    def _decode(self, ids: Sequence[int]) -> _Piece:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, before = "", []
        for token in ids:
            before.append(len(text))
            text += decoder.decode(b"" if token in self._dropped else self._bytes[token])
        return _Piece(text + decoder.decode(b"", final=True), None, before)

    def _encode(self, text: str, first: bool) -> Encoded:
        """A text and where its tokens end; one that continues another is spared the space that it would begin with."""
        if not text:
            return Encoded([], [])
        return (self._text.alone([text]) if first else self._text.continued([text]))[0]


def _decoder(tokenizer: Any) -> str:
    """What the tokenizer's decoder is, as JSON; "" if it has none.

    Raises:
        ConfigError: the tokenizer's text is not that of its tokens, one after the other.
    """
    decoder = tokenizer.backend_tokenizer.decoder
    kind = json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False) if decoder else ""
    if kind and "ByteLevel" not in kind and "▁" not in kind:
        raise ConfigError(
            f"reward.tokenizer: texts of a tokenizer with the decoder {kind[:80]} cannot be told token by token; use a "
            "byte-level or sentencepiece tokenizer"
        )
    return kind


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each id stands for, `[vocabulary]`.

    Raises:
        ConfigError: the tokenizer's text is not that of its tokens, one after the other.
    """
    kind = _decoder(tokenizer)
    alphabet = _byte_alphabet() if "ByteLevel" in kind else {}

    def write(token: str) -> bytes:
        if alphabet:
            return b"".join(alphabet.get(character, character.encode()) for character in token)
        return _sentencepiece_bytes(token) if kind else b" " + token.encode()  # words are joined by a space

    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    vocabulary = tokenizer.get_vocab()
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, i in vocabulary.items():
        table[i] = added[i].encode() if i in added and kind else write(token)
    return table


def _byte_alphabet() -> dict[str, bytes]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): bytes([byte]) for byte in plain} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}
    assert table.keys() == set(ByteLevel.alphabet())
    return table


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _shared_specials(source: Any, target: Any) -> dict[int, int]:
    """Ids of the source's special tokens that the target has under the same name, but for BOS, EOS and pad."""
    own = {source.eos_token_id, source.bos_token_id, source.pad_token_id}
    other = {target.eos_token_id, target.bos_token_id, target.pad_token_id}
    theirs = {str(t): i for i, t in target.added_tokens_decoder.items() if t.special and i not in other}
    return {
        i: theirs[str(t)]
        for i, t in source.added_tokens_decoder.items()
        if t.special and i not in own and str(t) in theirs
    }
