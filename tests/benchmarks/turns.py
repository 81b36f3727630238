"""Systems that are compared take turns: each turn is a process, or several ranks, of its own; a phase has wall and CPU seconds.

CPU seconds are those of all threads of all ranks, the steadier measure on a machine that others use too. Peak memory is the
largest of the counted iteration alone, not of loading, where the kernel can tell (Linux).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core.launch import CPU_DEFAULTS, free_port

MARK = "RESULT "


class Clock:
    """Wall and CPU seconds of the phases of each iteration, and the iteration's peak of memory."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._row: dict[str, Any] = {}
        self._last = (0.0, 0.0)

    def start(self) -> None:
        """An iteration begins, or goes on after something that does not count."""
        if not self._row:
            _forget_peak()
        self._last = time.perf_counter(), time.process_time()

    def phase(self, name: str) -> None:
        """What has passed since the last call belongs to this phase."""
        now = time.perf_counter(), time.process_time()
        wall, cpu = self._row.get(name, (0.0, 0.0))
        self._row[name] = wall + now[0] - self._last[0], cpu + now[1] - self._last[1]
        self._last = now

    def end(self) -> None:
        """The iteration is over."""
        self.rows.append({"phases": self._row, "peak": _peak()})
        self._row = {}


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak() -> int:
    try:
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def turn(script: str, job: dict[str, Any], processes: int = 1, threads: int = 1) -> list[dict[str, Any]]:
    """Run `script --child JOB` as so many ranks with so many threads each, ours with our launcher's settings; what each said.

    Raises:
        SystemExit: a rank failed; with the end of what it wrote.
    """
    settings = {} if job.get("system") == "trl" else CPU_DEFAULTS  # TRL runs as its users run it
    environment = {
        **os.environ, "DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu"), **settings,
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        files = [(Path(folder, f"{i}.out"), Path(folder, f"{i}.err")) for i in range(processes)]
        started = []
        for rank, (out, err) in enumerate(files):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, script, "--child", json.dumps({**job, "threads": threads})]
            with out.open("w") as stdout, err.open("w") as stderr:
                started.append(subprocess.Popen(command, env=own, stdout=stdout, stderr=stderr))
        codes = [process.wait() for process in started]
        said = [[x for x in out.read_text().splitlines() if x.startswith(MARK)] for out, _ in files]
        for (_, err), code, lines in zip(files, codes, said, strict=True):
            if code or not lines:
                raise SystemExit(f"{job} failed ({code}):\n{err.read_text()[-3000:]}")
        return [json.loads(lines[-1].removeprefix(MARK)) for lines in said]


def job_of_child() -> dict[str, Any] | None:
    """The job that `turn` gave to this process; None: it is the parent."""
    if "--child" not in sys.argv:
        return None
    job = json.loads(sys.argv[sys.argv.index("--child") + 1])
    import torch

    torch.set_num_threads(job["threads"])
    return job


def options(about: str | None, systems: Sequence[str]) -> argparse.ArgumentParser:
    """The options that comparisons with TRL have in common; `about`: the script's docstring."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=("fixed", "varied"), default=["fixed", "varied"])
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--systems", nargs="+", choices=systems, default=list(systems))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--layers", type=int, default=12, help="fewer: quicker")
    parser.add_argument("--out", type=Path, help="JSON with all turns")
    return parser


def say(found: dict[str, Any]) -> None:
    """What a child found."""
    print(MARK + json.dumps(found), flush=True)


def medians(turns: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Of the last iterations of all turns: seconds by phase and whole, CPU of all ranks and wall of the slowest, and its peak."""
    last = [[rank["iterations"][-1] for rank in ranks] for ranks in turns]
    names = list(last[0][0]["phases"])

    def of(chosen: list[str], kind: int) -> float:
        each = [[sum(rank["phases"][name][kind] for name in chosen) for rank in ranks] for ranks in last]
        return statistics.median(max(ranks) if kind == 0 else sum(ranks) for ranks in each)

    row: dict[str, Any] = {name: {"wall": of([name], 0), "cpu": of([name], 1)} for name in names}
    row["whole"] = {"wall": of(names, 0), "cpu": of(names, 1)}
    row["peak"] = statistics.median(max(rank["peak"] for rank in ranks) for ranks in last)
    return row
