"""What a stage sees of the job it runs in: its spec, its inputs on local disk, its output folder, and a way to report.

One `JobContext` a rank. Rank 0 alone writes `metrics.jsonl`; all ranks may read inputs and tell how far they are. Nothing here
imports torch, so that the data stage starts fast.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.artifacts import Manifest, fetch, job_cache, require_manifest
from rlhf_core.job import JobSpec, progress_line
from rlhf_core.ranklog import redirected
from rlhf_core.store import Store

ALIVE_SECONDS = 10.0  # between signs of life


@dataclass
class JobContext:
    """One rank's view of a running job.

    Attributes:
        job: the launch request.
        store: where inputs come from and the result goes.
        out: local folder; what rank 0 leaves here becomes the artifact's files.
        rank: 0 to world - 1.
        world: number of ranks.
        started: on the monotonic clock; a resumed stage began as much earlier as it had run before.
        resumed: the attempts before, and where each was taken up.
    """

    job: JobSpec
    store: Store
    out: Path
    rank: int = 0
    world: int = 1
    started: float = field(default_factory=time.monotonic)
    resumed: list[dict[str, Any]] = field(default_factory=list)
    _last: dict[str, Any] = field(default_factory=lambda: {"step": 0, "total": 1, "phase": "start"})
    _told: float = 0.0
    _logged: list[dict[str, Any]] = field(default_factory=list)
    _fetched: dict[tuple[str, str], Path] = field(default_factory=dict)
    _manifests: dict[str, Manifest] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """The stage's seed."""
        return int(self.job.spec["seed"])

    @property
    def scratch(self) -> Path:
        """Local folder, beside `out`, for what lives no longer than the job."""
        return self.out.parent

    @property
    def is_main(self) -> bool:
        """Whether this rank reports and writes."""
        return self.rank == 0

    def input(self, name: str, part: str) -> Path:
        """Local path of a file or folder of an input artifact, verified, e.g. input("sft", "model"); nothing else is fetched.

        If there is no such part of it, there is nothing at that path.
        """
        if (name, part) not in self._fetched:
            folder, self._manifests[name] = fetch(self.store, self.job.inputs[name], job_cache(), part)
            self._fetched[name, part] = folder / part
        return self._fetched[name, part]

    def has_input(self, name: str, part: str) -> bool:
        """Whether an input artifact has such a file or folder."""
        return bool(self.input_manifest(name).files_of(part))

    def input_manifest(self, name: str) -> Manifest:
        """Manifest of an input artifact."""
        if name not in self._manifests:
            self._manifests[name] = require_manifest(self.store, self.job.inputs[name])
        return self._manifests[name]

    def progress(
        self, step: int, total: int, phase: str, metrics: dict[str, float] | None = None, unit: str = "step"
    ) -> None:
        """Tell the control plane how far this rank is; rank 0's word is also what keeps a stage from being ended as hung.

        What was logged since the last time goes along, for gates.

        Ranks that share one output leave it to rank 0, whose progress theirs would be taken for.
        """
        event = {"step": step, "total": total, "unit": unit, "phase": phase, "metrics": metrics or {}}
        self._last, self._told = event, time.monotonic()
        rows, self._logged = self._logged, []
        if self.is_main or redirected():
            print(progress_line({**event, "logged": rows} if rows else event), flush=True)

    def alive(self) -> None:
        """Repeat the last progress, at most every few seconds.

        For who waits for other ranks in a loop and asks them each time: if one of them hangs, this is not called any more.
        """
        if time.monotonic() - self._told > ALIVE_SECONDS:
            self.progress(**self._last)

    @contextmanager
    def transferring(self, phase: str) -> Iterator[None]:
        """Give signs of life while data go to or come from the store, whose every request has a time limit of its own."""
        over = threading.Event()

        def tell() -> None:
            while not over.wait(ALIVE_SECONDS):
                self.progress(0, 1, phase)

        thread = threading.Thread(target=tell, daemon=True, name="signs of life")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def log(self, kind: str, step: int, metrics: dict[str, Any]) -> None:
        """Append one line to the artifact's metrics.jsonl: {"kind": "train"|"eval", "step", "seconds", ...}."""
        if self.is_main:
            row = {"kind": kind, "step": step, "seconds": round(time.monotonic() - self.started, 3), **metrics}
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._logged.append(row)

    def say(self, message: str) -> None:
        """One line for the job's log, from rank 0."""
        if self.is_main:
            print(f"[{self.job.stage}] {message}", file=sys.stderr, flush=True)
