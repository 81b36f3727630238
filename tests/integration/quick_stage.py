"""A stage that makes a small artifact in a blink, or does what a file named after it in QUICK_STAGE_ORDERS says, once.

Stands where the deepspeed launcher and rlhf_core.train stand in a real job; job.json, progress lines, uploads and
result.json are the real ones.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from rlhf_core.context import JobContext
from rlhf_core.job import read_job
from rlhf_core.train import end_with_guard, upload_result


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", required=True)
    store, job = read_job(parser.parse_args().job)
    end_with_guard()
    context = JobContext(job=job, store=store, out=Path(tempfile.mkdtemp()))
    order = Path(os.environ["QUICK_STAGE_ORDERS"]) / job.stage
    told = order.read_text() if order.exists() else ""
    order.unlink(missing_ok=True)
    context.progress(1, 2, "train", {"loss": 2.5})
    if told == "hang":
        time.sleep(1000)
    if told.startswith("exit"):
        print(f"error: {job.stage} was told to {told}", file=sys.stderr)
        return int(told.split()[1])
    (context.out / "weights").write_text(f"{job.stage} of attempt {job.attempt}")
    upload_result(context, {"tokens_per_second": 1000.0, "eval_loss": 1.5})
    return 1 if told == "die after the result" else 0


if __name__ == "__main__":
    sys.exit(main())
