"""Examples of a source: its rows opened, its format found, its known shape applied.

A `SourceReader` joins `readers` (rows), `known` (sets whose columns are known by name) and `formats` (what our columns
mean), for the shares and for pretraining text alike. Left out: where an example goes.
"""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Literal

from rlhf_core.data import known
from rlhf_core.data.formats import Example, RowFormat, detect, parse
from rlhf_core.data.readers import AnySource, Read, read_source
from rlhf_core.data.template import Template
from rlhf_core.errors import DataError
from rlhf_core.specs import FileSource, HubSource, QuickstartSource

PEEK = 20  # rows that decide the format of a source


class SourceReader:
    """The rows of one source and what they say."""

    def __init__(self, source: AnySource, field: str, seed: int, template: Template, text: bool = False) -> None:
        """`text`: rows may be plain text in a column `text`. DataError: there are no rows, or of no known format."""
        rows = read_source(source, field, seed)
        first = list(islice(rows, PEEK))
        if not first:
            raise DataError(f"{field}: has no rows ({_described(source)}); remove it or give it data")
        self.rows: Iterator[Read] = chain(first, rows)
        self._template = template
        self._known = known.find(source) if isinstance(source, HubSource) else None
        self.format: RowFormat | Literal["text"] = (
            self._known.format if self._known else _format(source, first, field, text)
        )

    def example(self, row: Read) -> Example:
        """What a row says. Dropped: it is of no use. DataError: a column is missing."""
        assert self.format != "text"
        values = self._known.parse(row.values, row.where) if self._known else row.values
        return parse(values, self.format, self._template, row.where)


def _format(source: AnySource, first: list[Read], field: str, text: bool) -> RowFormat | Literal["text"]:
    if isinstance(source, QuickstartSource) or source.format == "stories":
        return "pairs"
    if source.format != "auto":
        return source.format
    if text and any(isinstance(row.values.get("text"), str) for row in first):
        return "text"
    return detect([row.values for row in first], field)


def _described(source: AnySource) -> str:
    if isinstance(source, FileSource):
        return ", ".join(source.paths)
    return f"{source.name} {source.split}" if isinstance(source, HubSource) else source.kind
