"""Files: rows of .jsonl, .json, .parquet and plain text, each with its place, without holding a file in memory.

Any of them may be .gz and in object storage (through fsspec). A .json file that is a list is decoded element by element,
a text is cut as it arrives, parquet comes by row groups. Held in memory as a whole are only a .json object around a list
(its keys may come in any order) and a .parquet.gz (parquet begins at its end). Left out: what the columns mean.
"""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, Any
from zlib import error as ZlibError

from rlhf_core.errors import DataError, StoreError
from rlhf_core.sources import local_path

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
PARQUET_ROWS = 1024
CHUNK = 1 << 20  # bytes read at once
MARGIN = 4096  # characters at the end of a chunk in which no story begins: what follows may yet change that
# A first sentence: up to a full stop, with what may close a quotation, before white space.
FIRST_SENTENCE = re.compile(r"(.+?[.!?][\"'”’)]*)(?=\s)(.*)", re.DOTALL)
SPACE = re.compile(r"[\s,]*")
Rows = Iterator[tuple[str, Any]]


def suffix_of(path: str) -> str:
    """The ending that says what a file is, without .gz."""
    return PurePosixPath(path.removesuffix(".gz")).suffix.lower()


def rows_of(path: str) -> Rows:
    """Place and value of each row of a .jsonl, .json or .parquet file. DataError: the file is damaged."""
    return {".json": _json, ".parquet": _parquet}.get(suffix_of(path), _jsonl)(path)


@contextmanager
def open_file(path: str) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked if it is .gz; damage is a DataError that names the file."""
    import fsspec

    remote = "://" in path
    try:
        with fsspec.open(path if remote else str(local_path(path, "data.sources")), "rb", compression="infer") as file:
            yield file  # type: ignore[misc]
    except (EOFError, ZlibError) as error:
        raise DataError(f"{path}: the compressed file is damaged: {error}; make it anew") from None
    except OSError as error:
        kind = StoreError if remote else DataError
        raise kind(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _jsonl(path: str) -> Rows:
    with open_file(path) as file:
        yield from _lines(path, file)


def _lines(path: str, lines: IO[bytes]) -> Rows:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}; every line must be one JSON object in UTF-8") from None


def _json(path: str) -> Rows:
    """A list of rows, an object whose only list is one, or, as such files often are, one object a line."""
    with open_file(path) as file:
        begin = file.read(CHUNK)
        encoding = json.detect_encoding(begin)
        if begin.decode(encoding, errors="ignore").lstrip().startswith("["):
            yield from _elements(path, _decoded(path, file, encoding, begin))
            return
    if _is_lines(path):
        yield from _jsonl(path)
        return
    with open_file(path) as file:
        data = file.read()
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    lists = [v for v in content.values() if isinstance(v, list)] if isinstance(content, dict) else []
    if len(lists) != 1:
        raise DataError(f"{path}: must hold a list of rows, or an object with one list; found {type(content).__name__}")
    for i, row in enumerate(lists[0]):
        yield f"{path} row {i + 1}", row


def _is_lines(path: str) -> bool:
    """Whether the first line is an object by itself and more follows."""
    with open_file(path) as file:
        lines = (line for line in file if line.strip())
        try:
            return isinstance(json.loads(next(lines, b"")), dict) and next(lines, None) is not None
        except ValueError:
            return False


def _decoded(path: str, file: IO[bytes], encoding: str = "utf-8", begin: bytes = b"") -> Iterator[str]:
    """The text of a file in pieces, the first one made of `begin`; the last one is empty."""
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass" if encoding.startswith("utf") else "strict")
    data = begin or file.read(CHUNK)
    try:
        while data:
            yield decoder.decode(data)
            data = file.read(CHUNK)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from None


def _elements(path: str, pieces: Iterator[str]) -> Rows:
    """The elements of one JSON list, each decoded as soon as it is complete."""
    decoder, number = json.JSONDecoder(), 0
    text, at = next(pieces).lstrip(), 1
    while True:
        space = SPACE.match(text, at)
        assert space is not None
        at = space.end()
        if text[at : at + 1] == "]":
            rest = text[at + 1 :] + "".join(pieces)
            if rest.strip():
                raise DataError(f"{path}: not JSON: more text after the list that ends after row {number}")
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError as error:
            # Incomplete, or wrong: only more text tells. Twice as much each time, so that long rows cost no more.
            more = "".join(islice(pieces, 1 + (len(text) - at) // CHUNK))
            if not more:
                raise DataError(f"{path}: not JSON: row {number + 1}: {error.args[0].partition(':')[0]}") from None
            text, at = text[at:] + more, 0
            continue
        number += 1
        yield f"{path} row {number}", value


def _parquet(path: str) -> Rows:
    import pyarrow
    from pyarrow import parquet

    with open_file(path) as file:
        try:
            # A .gz file cannot be read from its end, where parquet begins.
            table = parquet.ParquetFile(BytesIO(file.read()) if path.endswith(".gz") else file)
            number = 0
            for batch in table.iter_batches(PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{path}: not a parquet file: {error}") from None


def stories_of(path: str, start: str) -> Rows:
    """Stories of a plain text: the first sentence is the prompt, the rest the response."""
    number = 0
    for piece in _cut(path, re.compile(start, re.MULTILINE)):
        story = tidy(piece)
        if story:
            number += 1
            found = FIRST_SENTENCE.fullmatch(story)
            prompt, response = found.groups() if found else (story, "")
            yield f"{path} story {number}", {"prompt": prompt, "response": response}


def _cut(path: str, start: re.Pattern[str]) -> Iterator[str]:
    """The text between the places that a pattern matches, as `re.split` gives it for the whole text."""
    with open_file(path) as file:
        text, begin = "", 0
        pieces = _decoded(path, file)
        for piece in pieces:
            # What is before `begin` stays for a while, for patterns that look back.
            keep = max(0, begin - MARGIN)
            text, begin = text[keep:] + piece, begin - keep
            for found in start.finditer(text, begin):
                if piece and found.end() > len(text) - MARGIN:
                    break
                yield text[begin : found.start()]
                begin = found.end()
        yield text[begin:]


def texts_of(path: str) -> Rows:
    """A plain text in pieces that end with a line; `more` says that the text goes on after this one."""
    with open_file(path) as file:
        number, text = 0, ""
        for piece in _decoded(path, file):
            text += piece
            end = text.rfind("\n") + 1 if piece else 0
            if end and len(text) >= CHUNK // 16:
                number += 1
                yield f"{path} part {number}", {"text": text[:end], "more": True}
                text = text[end:]
        if text or number:
            yield f"{path} part {number + 1}", {"text": text, "more": False}


def tidy(text: str) -> str:
    """Text with one space between words and at most one empty line between paragraphs."""
    text = re.sub(r"[^\S\n]+", " ", text.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()
