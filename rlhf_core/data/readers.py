"""Readers: rows of a source, one at a time, each with its place, so that a mistake in the data is found by its line.

A row is a mapping of column names to values; a source with test rows of its own gives those first, so that their prompts
are held out whatever follows. `check_places` finds a missing file before any work is done. Left out: how files are read
(`files`), what the columns mean (`known`, `formats`).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from rlhf_core.data import known
from rlhf_core.data.files import SUFFIXES, rows_of, stories_of, suffix_of, texts_of
from rlhf_core.data.formats import COLUMNS
from rlhf_core.data.split import Split
from rlhf_core.errors import ConfigError, DataError, StoreError
from rlhf_core.sources import local_path
from rlhf_core.specs import DataSpec, FileSource, HubSource, QuickstartSource

AnySource = QuickstartSource | FileSource | HubSource


@dataclass(frozen=True)
class Read:
    """One row as it was read.

    Attributes:
        source: name of the source in reports and in the rows, e.g. the file's name without its endings.
        where: the row's place for messages, e.g. `pairs.jsonl line 3`.
        values: column names -> values.
        side: train or test where the source says so; None where the hash of the prompt does.
    """

    source: str
    where: str
    values: Mapping[str, Any]
    side: Split | None = None


def check_places(spec: DataSpec) -> None:
    """ConfigError if a file of any source is missing or of a kind that nothing reads."""
    for field, sources in (("sources", spec.sources), ("pretrain", spec.pretrain or ())):
        for i, source in enumerate(sources):
            _check_source(source, f"data.{field}[{i}]", text=field == "pretrain")


def _check_source(source: AnySource, field: str, text: bool) -> None:
    if isinstance(source, QuickstartSource):
        return
    unknown = sorted(set(source.columns) - set(COLUMNS))
    if unknown:
        raise ConfigError(f"{field}.columns: {unknown[0]!r} is none of our columns; use {', '.join(COLUMNS)}")
    if source.format == "text" and not text:
        raise ConfigError(f"{field}.format: text has no prompts; list the source under data.pretrain")
    if isinstance(source, FileSource):
        for path in source.paths:
            _check_file(path, source, f"{field}.paths", text)
        for path in source.test_paths or ():
            _check_file(path, source, f"{field}.test_paths", text)


def _check_file(path: str, source: FileSource, field: str, text: bool) -> None:
    if "://" not in path:
        if local_path(path, field).is_dir():
            raise ConfigError(f"{field}: {path!r} is a folder; list its files")
    elif not _remote_exists(path):
        raise ConfigError(f"{field}: {path!r} does not exist")
    if source.format != "stories" and suffix_of(path) not in (*SUFFIXES, *([".txt"] if text else [])):
        raise ConfigError(
            f"{field}: {path!r} ends with {suffix_of(path)!r}; known are {', '.join(SUFFIXES)}, each also with .gz, and "
            "any text file with format: stories, or a .txt under data.pretrain"
        )
    if source.format == "stories":
        try:
            re.compile(source.story_start)
        except re.error as error:
            raise ConfigError(
                f"{field.rpartition('.')[0]}.story_start: {source.story_start!r} is no regular expression: {error}"
            ) from None


def _remote_exists(path: str) -> bool:
    import fsspec

    try:
        files, inner = fsspec.core.url_to_fs(path)
        return bool(files.exists(inner))
    except Exception as error:
        raise StoreError(f"{path}: {type(error).__name__}: {error}") from error


def read_source(source: AnySource, field: str, seed: int) -> Iterator[Read]:
    """All rows of a source; `field` is its place in the configuration, for messages."""
    if isinstance(source, QuickstartSource):
        return _quickstart(source, field, seed)
    rows = _files(source) if isinstance(source, FileSource) else _hub(source, field)
    return (_renamed(row, source.columns, field) for row in rows)


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
    values = kept | {ours: row.values[theirs] for ours, theirs in columns.items()}
    return Read(row.source, row.where, values, row.side)


def _quickstart(source: QuickstartSource, field: str, seed: int) -> Iterator[Read]:
    from rlhf_core import quickstart

    try:
        for i, row in enumerate(quickstart.generate(seed, source.prompts, source.pairs_per_prompt)):
            yield Read("quickstart", f"quickstart row {i + 1}", row)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None


def _hub(source: HubSource, field: str) -> Iterator[Read]:
    """The rows of the test split, if there is one, and of the split."""
    import datasets

    datasets.disable_progress_bars()
    test = _test_split(source)
    parts: tuple[tuple[str | None, Split], ...] = ((test, "test"), (source.split, "train"))
    for split, side in parts:
        for i, row in enumerate(islice(_load(source, split, field), source.limit) if split else ()):
            yield Read(source.name, f"{source.name} {split} row {i + 1}", dict(row), side if test else None)


def _test_split(source: HubSource) -> str | None:
    """The split to hold out: the one that is named, or a known set's own unless this copy of the set has none."""
    from datasets import get_dataset_split_names

    found = known.find(source)
    own = found.test_split if found else None
    if source.test_split or own is None or own == source.split.partition("[")[0]:
        return source.test_split
    try:
        splits = get_dataset_split_names(known.place_of(source), source.subset, revision=source.revision)
    except (OSError, ValueError):
        return own  # loading it will say what is wrong
    # `datasets` calls the split of a file dev.parquet "validation".
    return next((name for name in (own, "validation") if name in splits and own in (name, "dev")), None)


def _load(source: HubSource, split: str, field: str) -> Any:
    import datasets
    from datasets import config

    try:
        return datasets.load_dataset(
            known.place_of(source),
            source.subset,
            split=split,
            revision=source.revision,
            streaming=bool(source.streaming),
        )
    except (OSError, ValueError, RuntimeError) as error:
        # Without a network every retry would end the same way; a network that fails may be back for the next one.
        kind = StoreError if isinstance(error, ConnectionError) and not config.HF_HUB_OFFLINE else DataError
        offline = " (HF_HUB_OFFLINE is set)" if config.HF_HUB_OFFLINE else ""
        reason = str(error).strip().partition("\n")[0]
        remedy = "check the name, or download it and use `kind: files`"
        if "scripts are no longer supported" in reason:
            remedy = "set `revision: refs/convert/parquet`, where the hub keeps such sets as parquet"
        raise kind(
            f"{field}.name: the data set {source.name!r} (subset {source.subset}, split {split!r}) cannot be "
            f"loaded{offline}: {reason}; {remedy}"
        ) from error


def _files(source: FileSource) -> Iterator[Read]:
    """The rows of the test files, if there are any, and of the others."""
    names = _names((*source.paths, *(source.test_paths or ())))
    parts: tuple[tuple[tuple[str, ...], Split], ...] = ((source.test_paths or (), "test"), (source.paths, "train"))
    for paths, side in parts:
        rows = ((path, where, values) for path in paths for where, values in _rows(path, source))
        for path, where, values in islice(rows, source.limit):
            if not isinstance(values, dict):
                raise DataError(f"{where}: a row must be an object with named columns, not {type(values).__name__}")
            yield Read(names[path], where, values, side if source.test_paths else None)


def _rows(path: str, source: FileSource) -> Iterator[tuple[str, Any]]:
    if source.format == "stories":
        return stories_of(path, source.story_start)
    return texts_of(path) if suffix_of(path) == ".txt" else rows_of(path)


def _names(paths: tuple[str, ...]) -> dict[str, str]:
    """A short name for each file; the whole path where two files share a name."""
    short = {path: PurePosixPath(path.removesuffix(".gz")).stem for path in paths}
    return {path: name if list(short.values()).count(name) == 1 else path for path, name in short.items()}
