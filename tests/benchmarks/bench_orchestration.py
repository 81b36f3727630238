"""What Prefect costs: the smallest pipeline by a server and a worker, and the same stages bare, interleaved, medians.

    python tests/benchmarks/bench_orchestration.py [--rounds 3] [--out FILE.json]

Both build every stage anew by real `deepspeed` jobs (`tests/slow/stack.yaml`). Bare: one process that calls `build_stage` for
each stage. By Prefect: a run of the deployment `rlhf/pipeline` on a local stack, from its state Running to Completed, as the
server records them. Start-up is told apart: imports of the bare process, and from the request until the run is Running.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "slow")]

from stacked import CONFIG, Stacked, free_port, kill  # noqa: E402

from rlhf_core.config import load_config  # noqa: E402

BARE = """
import sys, time
began = time.monotonic()
from rlhf_core.config import load_config
from rlhf_core.plan import make_plan
from rlhf_core.store import Store
from tasks.stage import build_stage
config = load_config(sys.argv[1], sys.argv[2:])
store = Store(config.store)
started = time.monotonic()
for planned in make_plan(config, store):
    assert build_stage(store, config, planned).how == "built"
print(started - began, time.monotonic() - started)
"""


def bare(stacked: Stacked, sets: list[str]) -> dict[str, float]:
    """Seconds of start-up and of the stages."""
    command = [sys.executable, "-c", BARE, str(CONFIG), *sets]
    done = subprocess.run(command, cwd=stacked.folder, env=stacked.env, capture_output=True, text=True, check=True)
    start, stages = map(float, done.stdout.split()[-2:])
    return {"start": start, "stages": stages}


def by_prefect(stacked: Stacked, sets: list[str]) -> dict[str, float]:
    """The same of a run by the worker."""
    asked = time.time()
    run = stacked.start(*sets)
    stacked.wait_for_state(run, "Completed", seconds=900)
    states = stacked.call("GET", f"/flow_run_states/?flow_run_id={run}")
    at = {state["name"]: datetime.fromisoformat(state["timestamp"]).timestamp() for state in states}
    return {"start": at["Running"] - asked, "stages": at["Completed"] - at["Running"]}


def measure(rounds: int) -> dict[str, Any]:
    """All rounds and the medians."""
    found: dict[str, list[dict[str, float]]] = {"bare": [], "prefect": []}
    with tempfile.TemporaryDirectory() as folder:
        stacked = Stacked(Path(folder))
        try:
            stacked.rlhf("up", str(CONFIG), "--port", str(free_port()))
            for number in range(rounds):
                for name, way in (("bare", bare), ("prefect", by_prefect)):
                    row = way(stacked, [f"store=file://{folder}/{name}-{number}"])
                    print(
                        f"round {number + 1} {name:8} start {row['start']:.1f} s, stages {row['stages']:.1f} s",
                        flush=True,
                    )
                    found[name].append(row)
        finally:
            stacked.rlhf("down")
            kill(*stacked.stack.processes())
    stages = len(load_config(CONFIG).stages)
    median = {name: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for name, rows in found.items()}
    over = (median["prefect"]["stages"] - median["bare"]["stages"]) / stages
    return {"rounds": found, "median": median, "stages": stages, "seconds_a_stage": over, "cores": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    result = measure(asked.rounds)
    median = result["median"]
    print(
        f"median: bare {median['bare']['stages']:.1f} s, by Prefect {median['prefect']['stages']:.1f} s for "
        f"{result['stages']} stages: {result['seconds_a_stage']:+.2f} s a stage; "
        f"from the request to Running {median['prefect']['start']:.1f} s"
    )
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
