"""Tables: Arrow files of the data stage. Drafts (text, temporary) while reading, rows (token ids) for the trainers.

Both are written batch by batch; drafts are read so too, rows memory-mapped, so memory does not grow with the data. Rows
are stored as `datasets.Dataset.save_to_disk` writes them, with a fingerprint made of the content: the same input gives
the same bytes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from datasets.table import MemoryMappedTable

from rlhf_core.artifacts import sha256_file
from rlhf_core.data.formats import Example
from rlhf_core.data.split import Share
from rlhf_core.data.template import Turn

BATCH = 1000

Table = Literal[Share, "ptx"]
_TEXT, _IDS = Value("string"), List(Value("int32"))
_LEARNED = {"input_ids": _IDS, "loss_mask": List(Value("int8"))}
FEATURES: dict[Table, Features] = {
    "sft": Features(_LEARNED | {"prompt": _TEXT, "response": _TEXT, "source": _TEXT}),
    "reward": Features(
        {"prompt_ids": _IDS, "chosen_ids": _IDS, "rejected_ids": _IDS}
        | {"prompt": _TEXT, "chosen": _TEXT, "rejected": _TEXT, "source": _TEXT}
    ),
    "ppo": Features({"prompt_ids": _IDS, "prompt": _TEXT, "response_ids": _IDS, "response": _TEXT, "source": _TEXT}),
    "ptx": Features(_LEARNED),
}
ID_COLUMNS: dict[Table, tuple[str, ...]] = {
    "sft": ("input_ids",),
    "reward": ("prompt_ids", "chosen_ids", "rejected_ids"),
    "ppo": ("prompt_ids", "response_ids"),
    "ptx": ("input_ids",),
}
_DRAFT = pa.schema(
    {
        "source": pa.string(),
        "turns": pa.list_(pa.string()),
        "answers": pa.list_(pa.bool_()),
        "answer": pa.string(),
        "chosen": pa.string(),
        "rejected": pa.string(),
    }
)


@dataclass(frozen=True)
class Draft:
    """An example on its way to its share."""

    source: str
    example: Example


class ArrowFile:
    """Rows appended to one Arrow file in batches."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.rows = 0
        self._pending: list[dict[str, Any]] = []
        self._writer = pa.ipc.new_stream(str(path), schema)

    def add(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self.rows += 1
        self._pending.append(row)
        if len(self._pending) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=self.schema))
            self._pending = []

    def close(self) -> None:
        """Write what is left; call before reading."""
        self._flush()
        self._writer.close()


class DraftFile(ArrowFile):
    """The drafts of one share and split."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _DRAFT)

    def add_draft(self, draft: Draft) -> None:
        """Append one draft."""
        example = draft.example
        self.add(
            {
                "source": draft.source,
                "turns": [turn.text for turn in example.prompt],
                "answers": [turn.is_answer for turn in example.prompt],
                "answer": example.answer,
                "chosen": example.chosen,
                "rejected": example.rejected,
            }
        )

    def batches(self) -> Iterator[list[Draft]]:
        """All drafts, a batch at a time."""
        # Read, not mapped: each draft is needed once, and mapped pages would count as memory of the process.
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                yield [_draft(row) for row in batch.to_pylist()]


def _draft(row: dict[str, Any]) -> Draft:
    prompt = tuple(Turn(text, answer) for text, answer in zip(row["turns"], row["answers"], strict=True))
    return Draft(row["source"], Example(prompt, row["answer"], row["chosen"], row["rejected"]))


class RowFile(ArrowFile):
    """The finished rows of one share (or `ptx`) and split, with their token counts."""

    def __init__(self, path: Path, table: Table) -> None:
        super().__init__(path, FEATURES[table].arrow_schema)
        self._table: Table = table
        self._tokens = dict.fromkeys(ID_COLUMNS[table], 0)
        self._longest = dict.fromkeys(ID_COLUMNS[table], 0)

    def add_rows(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and count their tokens."""
        for row in rows:
            self.add(row)
            for column in self._tokens:
                self._tokens[column] += len(row[column])
                self._longest[column] = max(self._longest[column], len(row[column]))

    def save(self, folder: Path) -> dict[str, Any]:
        """Store the rows as a data set; returns rows, tokens, and mean and maximum per column of ids.

        Without rows there is no folder: `datasets` writes an empty set that it cannot read.
        """
        self.close()
        if self.rows:
            fingerprint = hashlib.sha256(f"{self._table} {sha256_file(self.path)}".encode()).hexdigest()[:16]
            table = MemoryMappedTable.from_file(str(self.path))
            datasets.disable_progress_bars()
            Dataset(table, fingerprint=fingerprint).save_to_disk(str(folder))
        columns = {
            column: {"mean": round(tokens / max(self.rows, 1), 2), "max": self._longest[column]}
            for column, tokens in self._tokens.items()
        }
        return {"rows": self.rows, "tokens": sum(self._tokens.values()), "columns": columns}
