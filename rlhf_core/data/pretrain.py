"""Pretraining text for PPO's mixture loss (ptx): any text, tokenised, joined by EOS and cut to blocks of one length.

A row is a text (column `text`; a .txt file is one text), or a prompt with its answer, encoded as SFT encodes it. Blocks
have max_prompt_tokens + max_response_tokens tokens; what is left at the end is counted and dropped. Rows whose prompt is
held out for the tests of a share are left out. A source of weight w is read floor(w) times, and once more for a part of
its rows. Left out: BOS, which only begins prompts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from rlhf_core.data.encode import Encoder
from rlhf_core.data.examples import SourceReader
from rlhf_core.data.formats import Example, is_unicode, need
from rlhf_core.data.plain import limited
from rlhf_core.data.readers import AnySource, Read
from rlhf_core.data.rows import REPEATED, Tally
from rlhf_core.data.split import Splitter, copies
from rlhf_core.data.tables import RowFile
from rlhf_core.data.template import Dropped, Reason, Template
from rlhf_core.errors import DataError
from rlhf_core.specs import DataSpec


@dataclass(frozen=True)
class Piece:
    """A text or a piece of one: whether it continues the piece before it, and whether more of it follows."""

    text: str
    continues: bool
    more: bool


class PretrainText:
    """Reads `data.pretrain` and writes its blocks."""

    def __init__(self, spec: DataSpec, seed: int, template: Template, encoder: Encoder, splitter: Splitter) -> None:
        self.spec = spec
        self.tally = Tally()
        self.block = spec.max_prompt_tokens + spec.max_response_tokens
        self.left = 0
        self._seed = seed
        self._template = template
        self._encoder = encoder
        self._splitter = splitter

    def write(self, file: RowFile, progress: Callable[[int], None]) -> None:
        """All blocks to `file`; `progress` is told the rows read so far. DataError: not one block of text."""
        buffer: list[int] = []
        for i, source in enumerate(self.spec.pretrain or ()):
            for ids in self._source(source, f"data.pretrain[{i}]"):
                buffer += ids
                whole = len(buffer) // self.block * self.block
                blocks = [buffer[at : at + self.block] for at in range(0, whole, self.block)]
                file.add_rows([{"input_ids": block, "loss_mask": [1] * self.block} for block in blocks])
                del buffer[:whole]
                progress(self.tally.read.total())
        self.left = len(buffer)
        if not file.rows:
            raise DataError(
                f"data.pretrain: {self.left} tokens are less than one block of max_prompt_tokens + max_response_tokens = "
                f"{self.block}; give more text"
            )

    def report(self) -> dict[str, Any]:
        """What report.json says of it."""
        return {"sources": self.tally.by_source(), "block": self.block, "tokens_after_the_last_block": self.left}

    def _source(self, source: AnySource, field: str) -> Iterator[list[int]]:
        """Ids of one source, a batch of rows at a time."""
        weight = 1.0 if source.weight is None else source.weight
        for again in range(math.ceil(weight)):
            reader = SourceReader(source, field, self._seed, self._template, text=True)
            items = self._items(reader, min(weight - again, 1.0), again > 0)
            for batch in limited(items, _characters):
                yield self._encoded(batch)

    def _items(self, reader: SourceReader, part: float, again: bool) -> Iterator[Example | Piece]:
        """What is kept of the rows, counted; `part` is the part of them that is wanted."""
        goes_on = False
        for row in reader.rows:
            self.tally.read[row.source] += not again
            try:
                item = self._item(reader, row, goes_on)
                # A file that is one text is taken or left as a whole.
                key = row.source if "more" in row.values else item.text if isinstance(item, Piece) else item.prompt_text
                if part < 1 and not copies(self._seed, key, part):
                    raise Dropped(Reason.WEIGHT)
            except Dropped as drop:
                if not again:
                    self.tally.drop(row.source, drop.reason)
                continue
            goes_on = isinstance(item, Piece) and item.more
            if again:
                self.tally.notes[row.source, REPEATED] += 1
            yield item

    def _item(self, reader: SourceReader, row: Read, continues: bool) -> Example | Piece:
        if reader.format != "text":
            example = reader.example(row)
            if self._splitter.holds_out(example.prompt_text):
                raise Dropped(Reason.HELD_OUT)
            return example
        text, more = need(row.values, "text", row.where), bool(row.values.get("more"))
        if not isinstance(text, str) or not is_unicode(text):
            raise Dropped(Reason.NOT_TEXT)
        if not text.strip() and "more" not in row.values:
            raise Dropped(Reason.EMPTY_TEXT)
        return Piece(text, continues, more)

    def _encoded(self, items: Sequence[Example | Piece]) -> list[int]:
        """Ids of items one after the other, EOS after each text; a batch has items of one kind."""
        pieces = [item for item in items if isinstance(item, Piece)]
        examples = [item for item in items if isinstance(item, Example)]
        end = [self._encoder.eos]
        texts = self._encoder.texts([(piece.text, piece.continues) for piece in pieces])
        ids = [text if piece.more else text + end for piece, text in zip(pieces, texts, strict=True)]
        prompts = self._encoder.prompts([example.prompt for example in examples])
        answers = self._encoder.responses([example.answer or example.chosen or "" for example in examples])
        bos = len(self._encoder.bos)
        ids += [prompt[bos:] + answer for (prompt, _), answer in zip(prompts, answers, strict=True)]
        return list(chain.from_iterable(ids))


def _characters(item: Example | Piece) -> int:
    """The length of what is encoded."""
    return len(item.text if isinstance(item, Piece) else item.prompt_text + (item.answer or item.chosen or ""))
