"""Run a scenario in N real processes joined by gloo, as the launcher would start them, without the launcher's cost."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(
    world: int,
    function: str,
    out: Path,
    timeout: float = 240,
    script: str = "scenarios.py",
    codes: list[int] | None = None,
    variables: dict[str, str] | None = None,
    **arguments: Any,
) -> Any:
    """`function(**arguments)` of `script` on `world` ranks that end with `codes` (default 0); what rank 0 returned.

    `variables` are set in the environment of the ranks besides.
    """
    out.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    processes = []
    for rank in range(world):
        environment = {
            **os.environ,
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "RANKS_OUT": str(out),
            "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
            **(variables or {}),
        }  # fmt: skip
        log = (out / f"rank-{rank}.log").open("w")
        command = [sys.executable, str(HERE / script), function, json.dumps(arguments)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        ended = [p.wait(timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    logs = "\n".join((out / f"rank-{r}.log").read_text()[-3000:] for r in range(world))
    assert ended == (codes or [0] * world), logs
    return json.loads((out / "result.json").read_text())
