"""Readers: rows of a source, one at a time, each with its place, so that a mistake in a file is found by its line.

Files are .jsonl, .json, .parquet (each also .gz) or, for stories, plain text; they may be in object storage
(`s3://…`, through fsspec). A row is a mapping of our column names to values. `check_places` finds a missing file
before any work is done. Left out: what the columns mean (`formats`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, Any
from zlib import error as ZlibError

from rlhf_core.data.formats import COLUMNS
from rlhf_core.errors import ConfigError, DataError, StoreError
from rlhf_core.sources import local_path
from rlhf_core.specs import DataSpec, FileSource, HubSource, QuickstartSource

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
PARQUET_ROWS = 1024
# A first sentence: up to a full stop, with what may close a quotation, before white space.
FIRST_SENTENCE = re.compile(r"(.+?[.!?][\"'”’)]*)(?=\s)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Read:
    """One row as it was read.

    Attributes:
        source: name of the source in reports and in the reward rows, e.g. the file's name without its endings.
        where: the row's place for messages, e.g. `pairs.jsonl line 3`.
        values: our column names -> values.
    """

    source: str
    where: str
    values: Mapping[str, Any]


def check_places(spec: DataSpec) -> None:
    """ConfigError if a file of any source is missing or of a kind that nothing reads."""
    for i, source in enumerate(spec.sources):
        field = f"data.sources[{i}]"
        if isinstance(source, QuickstartSource):
            continue
        unknown = sorted(set(source.columns) - set(COLUMNS))
        if unknown:
            raise ConfigError(f"{field}.columns: {unknown[0]!r} is none of our columns; use {', '.join(COLUMNS)}")
        if isinstance(source, FileSource):
            for path in source.paths:
                _check_file(path, source, f"{field}.paths")


def _check_file(path: str, source: FileSource, field: str) -> None:
    if "://" not in path:
        if local_path(path, field).is_dir():
            raise ConfigError(f"{field}: {path!r} is a folder; list its files")
    elif not _remote_exists(path):
        raise ConfigError(f"{field}: {path!r} does not exist")
    if source.format != "stories" and _suffix(path) not in SUFFIXES:
        raise ConfigError(
            f"{field}: {path!r} ends with {_suffix(path)!r}; known are {', '.join(SUFFIXES)}, each also with .gz, and "
            "any text file with format: stories"
        )
    if source.format == "stories":
        try:
            re.compile(source.story_start)
        except re.error as error:
            raise ConfigError(
                f"{field.removesuffix('paths')}story_start: {source.story_start!r} is no regular expression: {error}"
            ) from None


def _remote_exists(path: str) -> bool:
    import fsspec

    try:
        files, inner = fsspec.core.url_to_fs(path)
        return bool(files.exists(inner))
    except Exception as error:
        raise StoreError(f"{path}: {type(error).__name__}: {error}") from error


def _suffix(path: str) -> str:
    return PurePosixPath(path.removesuffix(".gz")).suffix.lower()


def read_source(source: QuickstartSource | FileSource | HubSource, field: str, seed: int) -> Iterator[Read]:
    """All rows of a source; `field` is its place in the configuration, for messages."""
    if isinstance(source, QuickstartSource):
        return _quickstart(source, field, seed)
    rows = _files(source) if isinstance(source, FileSource) else _hub(source, field)
    return (_renamed(row, source.columns, field) for row in islice(rows, source.limit))


def _renamed(row: Read, columns: Mapping[str, str], field: str) -> Read:
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row.values:
            raise DataError(
                f"{row.where}: no column {theirs!r}, which {field}.columns.{ours} names; there are "
                f"{', '.join(sorted(row.values)) or '(none)'}"
            )
    kept = {key: value for key, value in row.values.items() if key not in columns.values()}
    return Read(row.source, row.where, kept | {ours: row.values[theirs] for ours, theirs in columns.items()})


def _quickstart(source: QuickstartSource, field: str, seed: int) -> Iterator[Read]:
    from rlhf_core import quickstart

    try:
        for i, row in enumerate(quickstart.generate(seed, source.prompts, source.pairs_per_prompt)):
            yield Read("quickstart", f"quickstart row {i + 1}", row)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None


def _hub(source: HubSource, field: str) -> Iterator[Read]:
    import datasets
    from datasets import config

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
    except (OSError, ValueError) as error:
        # Without a network every retry would end the same way; a network that fails may be back for the next one.
        kind = StoreError if isinstance(error, ConnectionError) and not config.HF_HUB_OFFLINE else DataError
        offline = " (HF_HUB_OFFLINE is set)" if config.HF_HUB_OFFLINE else ""
        reason = str(error).strip().partition("\n")[0]
        raise kind(
            f"{field}.name: the data set {source.name!r} (subset {source.subset}, split {source.split!r}) cannot be "
            f"loaded{offline}: {reason}; check the name, or download it and use `kind: files`"
        ) from error
    for i, row in enumerate(rows):
        yield Read(source.name, f"{source.name} {source.split} row {i + 1}", dict(row))


def _files(source: FileSource) -> Iterator[Read]:
    names = _names(source.paths)
    for path in source.paths:
        if source.format == "stories":
            rows = _stories(path, source.story_start)
        else:
            rows = {".json": _json, ".parquet": _parquet}.get(_suffix(path), _jsonl)(path)
        for where, values in rows:
            if not isinstance(values, dict):
                raise DataError(f"{where}: a row must be an object with named columns, not {type(values).__name__}")
            yield Read(names[path], where, values)


def _names(paths: tuple[str, ...]) -> dict[str, str]:
    """A short name for each file; the whole path where two files share a name."""
    short = {path: PurePosixPath(path.removesuffix(".gz")).stem for path in paths}
    return {path: name if list(short.values()).count(name) == 1 else path for path, name in short.items()}


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
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


def _jsonl(path: str) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        yield from _lines(path, file)


def _lines(path: str, lines: IO[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}; every line must be one JSON object in UTF-8") from None


def _json(path: str) -> Iterator[tuple[str, Any]]:
    """A list of rows, an object whose only list is one, or, as such files often are, one object a line."""
    with _open(path) as file:
        data = file.read()
    try:
        content = json.loads(data)
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data":
            yield from _lines(path, BytesIO(data))
            return
        raise DataError(f"{path}: not JSON: {error}") from None
    lists = [v for v in content.values() if isinstance(v, list)] if isinstance(content, dict) else [content]
    if len(lists) != 1 or not isinstance(lists[0], list):
        raise DataError(f"{path}: must hold a list of rows, or an object with one list; found {type(content).__name__}")
    for i, row in enumerate(lists[0]):
        yield f"{path} row {i + 1}", row


def _parquet(path: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    with _open(path) as file:
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


def _stories(path: str, start: str) -> Iterator[tuple[str, Any]]:
    """Stories of a plain text: the first sentence is the prompt, the rest the response."""
    with _open(path) as file:
        try:
            text = file.read().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text: {error}") from None
    number = 0
    for piece in re.split(start, text, flags=re.MULTILINE):
        story = tidy(piece or "")
        if story:
            number += 1
            found = FIRST_SENTENCE.fullmatch(story)
            prompt, response = found.groups() if found else (story, "")
            yield f"{path} story {number}", {"prompt": prompt, "response": response}


def tidy(text: str) -> str:
    """Text with one space between words and at most one empty line between paragraphs."""
    text = re.sub(r"[^\S\n]+", " ", text.replace("\r\n", "\n"))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()
