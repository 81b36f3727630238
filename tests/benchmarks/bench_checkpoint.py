"""What checkpoints cost training: the quickstart's PPO with and without them, interleaved, medians of some rounds.

    python tests/benchmarks/bench_checkpoint.py [--rounds 3] [--store file|s3] [--out FILE.json]

Data, SFT and reward model are built once; then each round runs PPO without checkpoints, with one a minute, and with one after
every rollout and every scoring. Time is that of the training loop, start-up and export left out, from the rows of
metrics.jsonl. One a minute is too rare in a run of a minute or two to be told from noise, so the price of one checkpoint is
also derived from the run that makes many of them, and told as a share of a minute.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rlhf_core.artifacts import make_ref  # noqa: E402
from rlhf_core.config import PipelineConfig, load_config  # noqa: E402
from rlhf_core.launch import run_job  # noqa: E402
from rlhf_core.lease import acquire  # noqa: E402
from rlhf_core.plan import StagePlan, make_plan  # noqa: E402
from rlhf_core.store import Store  # noqa: E402
from tasks.stage import build_stage, job_of  # noqa: E402

VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"every_minutes": None},
    "one a minute": {"every_minutes": 1},
    "every rollout": {"every_minutes": None, "every_steps": 1},
}


def loop_seconds(store: Store, place: str) -> tuple[float, int]:
    """Seconds of the training loop from the end of the first rollout to the end of the last, and rollouts in it."""
    rows = [json.loads(line) for line in store.read(f"{place}/metrics.jsonl").splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    return train[-1]["seconds"] - train[0]["seconds"], len(train) - 1


def one_run(store: Store, config: PipelineConfig, planned: StagePlan, variant: str, number: int) -> dict[str, float]:
    """PPO once, under a name of its own."""
    ref = make_ref("ppo", f"bench-{number}", {"variant": variant, "number": number}, planned.inputs)
    table = config.resources.model_dump()
    table["checkpoint"] = VARIANTS[variant]
    resources = type(config.resources).model_validate(table)
    changed = config.model_copy(update={"resources": resources})
    job = job_of(store, changed, planned.model_copy(update={"ref": ref}))
    with acquire(store, job) as lease:
        result = run_job(store, lease)
    seconds, rollouts = loop_seconds(store, f"{ref.id}/{result.folder}")
    told = {k: float(result.metrics[k]) for k in ("checkpoints", "checkpoint_seconds", "checkpoint_bytes")}
    return {"seconds": seconds, "rollouts": rollouts, **told}


def measure(store: Store, rounds: int, sets: list[str]) -> dict[str, Any]:
    """All runs, interleaved; the table's numbers."""
    config = load_config(ROOT / "deployments/configs/quickstart.yaml", [f"store={store.url}", *sets])
    plan = {planned.stage: planned for planned in make_plan(config, store)}
    for stage in ("data", "sft", "reward"):
        print(f"building {stage}", file=sys.stderr, flush=True)
        build_stage(store, config, plan[stage])
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for round_ in range(rounds):
        order = list(VARIANTS) if round_ % 2 == 0 else list(VARIANTS)[::-1]
        for variant in order:
            number = round_ * len(VARIANTS) + list(VARIANTS).index(variant)
            runs[variant].append(found := one_run(store, config, plan["ppo"], variant, number))
            print(f"{variant}: {found['seconds']:.1f} s, {found['checkpoints']:.0f} saved", file=sys.stderr, flush=True)
    middle = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    often = runs["every rollout"]
    saves = statistics.median(run["checkpoints"] for run in often)
    waited = statistics.median(run["checkpoint_seconds"] / run["checkpoints"] for run in often)
    each = (middle["every rollout"] - middle["none"]) / saves
    return {
        "rounds": rounds,
        "store": store.scheme,
        "seconds": middle,
        "saves": {name: statistics.median(run["checkpoints"] for run in found) for name, found in runs.items()},
        "megabytes_uploaded_by_rank_0": statistics.median(run["checkpoint_bytes"] for run in often) / 1e6,
        "one_a_minute_against_none": middle["one a minute"] / middle["none"] - 1,
        "seconds_a_checkpoint": each,
        "seconds_training_waits_a_checkpoint": waited,
        "share_at_one_a_minute": each / 60,
        "runs": runs,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", choices=["file", "s3"], default="s3", help="s3: a SeaweedFS on this machine")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration")
    parser.add_argument("--out", type=Path, help="also write the numbers as JSON")
    args = parser.parse_args()
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as folder:
        if args.store == "file":
            found = measure(Store(f"file://{folder}/store"), args.rounds, args.set)
        else:
            from s3 import S3Server

            server = S3Server(Path(folder, "s3")).start()
            try:
                os.environ.update(server.environment)
                server.make_bucket("bench")
                found = measure(Store("s3://bench/checkpoints"), args.rounds, args.set)
            finally:
                server.stop()
    print(f"quickstart's PPO on {os.cpu_count()} cores, store {found['store']}, medians of {args.rounds}:")
    for name, seconds in found["seconds"].items():
        ratio = seconds / found["seconds"]["none"]
        print(f"  {name:<14} {seconds:7.1f} s   {ratio:5.3f}   {found['saves'][name]:4.0f} checkpoints")
    print(f"  a checkpoint costs {found['seconds_a_checkpoint'] * 1e3:.0f} ms, of which training waits "
          f"{found['seconds_training_waits_a_checkpoint'] * 1e3:.0f} ms: "
          f"{found['share_at_one_a_minute']:.2%} of the time at one a minute")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
