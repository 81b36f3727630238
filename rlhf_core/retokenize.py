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
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from rlhf_core.errors import ConfigError, DataError

ANCHOR = "\n"


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
        self._bytes = token_bytes(source)
        self._source_bos, self._target_bos = leading_bos(source), leading_bos(target)
        self._source_eos, self._target_eos = int(source.eos_token_id), int(target.eos_token_id)
        self._source_space, self._target_space = adds_space(source), adds_space(target)
        self._dropped = {source.pad_token_id, source.bos_token_id} - {self._source_eos}
        self._shared = _shared_specials(source, target)
        self._backend = target.backend_tokenizer
        self._anchor = self._plain(ANCHOR)[0]
        self.same = (
            source.get_vocab() == target.get_vocab()
            and self._source_bos == self._target_bos
            and (self._source_eos, source.pad_token_id) == (self._target_eos, target.pad_token_id)
        )

    def convert(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> list[int]:
        """The target's ids of a prompt and a response.

        Pad and BOS are left out; other special tokens become the target's of the same name, or the characters they are
        written with. The target's BOS stands in front if that tokenizer puts one there by itself.
        """
        ids = list(self._target_bos)
        for pieces, first in ((self._prompt(prompt_ids), True), (self._pieces(response_ids), False)):
            for number, piece in enumerate(pieces):
                ids += (
                    [piece.special] if piece.special is not None else self._encode(piece.text, first and not number)[0]
                )
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
            ends = self._encode(piece.text, False)[1]
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

    def _plain(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of a text by itself and where each ends in it; special tokens written out count as characters."""
        self._backend.no_padding()  # transformers leaves its last call's padding and truncation here
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        try:
            encoding = self._backend.encode(text, add_special_tokens=False)
        finally:
            self._backend.encode_special_tokens = False
        return encoding.ids, [end for _, end in encoding.offsets]

    def _encode(self, text: str, first: bool) -> tuple[list[int], list[int]]:
        """As `_plain`; a text that continues another one is spared the space that the tokenizer would begin it with."""
        if not text:
            return [], []
        if not first and self._target_space:
            ids, ends = self._plain(ANCHOR + text)
            length = len(self._anchor)
            if ids[:length] == self._anchor:
                return ids[length:], [end - len(ANCHOR) for end in ends[length:]]
        return self._plain(text)


def leading_bos(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text by itself."""
    plain = tokenizer.backend_tokenizer.encode("x", add_special_tokens=False).ids
    full = tokenizer.backend_tokenizer.encode("x").ids
    return next((full[:i] for i in range(len(full)) if full[i : i + len(plain)] == plain), [])


def adds_space(tokenizer: Any) -> bool:
    """Whether the tokenizer begins any text with a space of its own (sentencepiece), or writes words without theirs."""
    tokens = tokenizer.backend_tokenizer.encode("x", add_special_tokens=False).tokens
    return tokenizer.backend_tokenizer.decoder is None or tokens[:1] == ["▁x"] or tokens[:1] == ["▁"]


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each id stands for, `[vocabulary]`.

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
