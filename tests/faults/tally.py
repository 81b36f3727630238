"""What became of every fault that was injected: counted over the session, shown as a table at its end.

Rows are kinds of faults. "Survived": the same command went on to the result; "after rerun": it had to be started again. Steps
done again are those that were told as done and were not in the newest checkpoint (optimizer steps; PPO: rollouts); data, evaluate
have none. "Gone" is the time from the fault until the job's last process had ended. Bytes lost are of what had been acknowledged
(files of published artifacts, parts of complete checkpoints) and was missing or damaged afterwards.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

COLUMNS = (
    "fault", "injected", "survived without rerun", "after rerun", "steps done again (sum, worst)", "worst seconds until gone",
    "bytes lost",
)  # fmt: skip


@dataclass
class Row:
    """One kind of fault."""

    storage: bool
    injected: int = 0
    survived: int = 0
    rerun: int = 0
    again: int = 0
    again_worst: int = 0
    gone_worst: float | None = None
    lost: int = 0


@dataclass
class Tally:
    """All kinds."""

    rows: dict[str, Row] = field(default_factory=dict)
    requests_hit: int = 0

    def row(self, kind: str, storage: bool) -> Row:
        return self.rows.setdefault(kind, Row(storage))

    def damage(self, kind: str, storage: bool, again: int, gone: float | None, lost: int) -> None:
        """What one fault has cost."""
        row = self.row(kind, storage)
        row.again, row.again_worst, row.lost = row.again + again, max(row.again_worst, again), row.lost + lost
        if gone is not None:
            row.gone_worst = max(row.gone_worst or 0.0, gone)

    @property
    def sum(self) -> Row:
        rows = self.rows.values()
        total = Row(False, again_worst=max((r.again_worst for r in rows), default=0))
        for name in ("injected", "survived", "rerun", "again", "lost"):
            setattr(total, name, sum(getattr(row, name) for row in rows))
        total.gone_worst = max((r.gone_worst for r in rows if r.gone_worst is not None), default=None)
        return total

    def cells(self) -> list[tuple[str, ...]]:
        """The table, kills first, and its sum."""
        named = sorted(self.rows.items(), key=lambda item: (item[1].storage, item[0]))
        return [_cells(name, row) for name, row in [*named, ("all", self.sum)]]

    def markdown(self) -> str:
        lines = [COLUMNS, tuple("---" for _ in COLUMNS), *self.cells()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def text(self) -> list[str]:
        """The table in columns, for the terminal."""
        table = [COLUMNS, *self.cells()]
        widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table
        ]

    def write(self, folder: Path, seconds: float) -> None:
        """faults.json and faults.md."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = {name: asdict(row) for name, row in self.rows.items()}
        record = {"seconds": round(seconds), "requests_hit": self.requests_hit, "faults": rows, "all": asdict(self.sum)}
        (folder / "faults.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "faults.md").write_text(self.markdown())


def _cells(name: str, row: Row) -> tuple[str, ...]:
    gone = "" if row.gone_worst is None else f"{row.gone_worst:.1f}"
    counts = (str(row.injected), str(row.survived), str(row.rerun), f"{row.again}, {row.again_worst}")
    return (name, *counts, gone, str(row.lost))
