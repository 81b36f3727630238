"""A stage that makes a small artifact in a blink, or does what a file named after it in QUICK_STAGE_ORDERS says.

Each job takes the first line of that file. Stands where the deepspeed launcher and rlhf_core.train stand in a real job;
job.json, progress lines, markers of checkpoints, uploads and result.json are the real ones.
"""

import argparse
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path

from rlhf_core import preemption
from rlhf_core.checkpoints import Checkpoint, Part, Position, newest
from rlhf_core.context import JobContext
from rlhf_core.job import JobSpec, read_job
from rlhf_core.sealed import seal
from rlhf_core.store import Store
from rlhf_core.train import end_with_guard, upload_result


def next_order(stage: str) -> str:
    """The first line of the stage's orders, which is taken out of them."""
    file = Path(os.environ["QUICK_STAGE_ORDERS"]) / stage
    lines = file.read_text().splitlines() if file.exists() else []
    if lines[1:]:
        file.write_text("\n".join(lines[1:]))
    else:
        file.unlink(missing_ok=True)
    return lines[0] if lines else ""


def save(store: Store, job: JobSpec, step: int) -> None:
    """A checkpoint with one part."""
    data = f"state of attempt {job.attempt} at step {step}".encode()
    part = Part(name="state/rank-000.json", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    checkpoint = Checkpoint(
        artifact=job.output.id, attempt=job.attempt, position=Position(step=step), world=1, parts=(part,)
    )
    store.write(checkpoint.part_key(part), data)
    store.write(checkpoint.key, seal(checkpoint))


def log_and_save(context: JobContext, first: int, words: list[str]) -> bool:
    """Log a metric's value for each step, `kl_sequence 1 2 30`, and save after it; whether the job is to end then.

    With `hold` or `finish` at the end it waits until it is told to, and then ends or finishes all the same.
    """
    preemption.install()
    name, *values = words
    last = values.pop() if values[-1] in ("hold", "finish") else ""
    for step, value in enumerate(values, 1):
        if step > first:
            context.log("train", step, {name: float(value)})
            context.progress(step, len(values), "train", {"loss": 2.5})
            save(context.store, context.job, step)
    while last and not preemption.requested():
        time.sleep(0.05)
    return last == "hold"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", required=True)
    parser.add_argument("--local_rank")
    store, job = read_job(parser.parse_args().job)
    end_with_guard()
    context = JobContext(job=job, store=store, out=Path(tempfile.mkdtemp(dir=os.environ["RLHF_SCRATCH"])))
    told = next_order(job.stage)
    began = newest(store, job.output, since=job.since)
    if began:
        context.resumed = [{"attempt": began.attempt, "from": str(began.position)}]
    if told == "train until told":
        preemption.install()
    context.progress(1, 2, "train", {"loss": 2.5})
    if told.startswith("log") and log_and_save(context, began.position.step if began else 0, told.split()[1:]):
        return 75
    if told == "hang":
        time.sleep(1000)
    if told == "train until told":
        while not preemption.requested():
            time.sleep(0.05)
        time.sleep(0.5)
        save(store, job, 40)
        return 75
    if told.startswith("save"):
        save(store, job, int(told.split()[1]))
        return 75
    if told.startswith("exit"):
        print(f"error: {job.stage} was told to {told}", file=sys.stderr)
        return int(told.split()[1])
    (context.out / "weights").write_text(f"{job.stage} of attempt {job.attempt}" + (f" from {began}" if began else ""))
    upload_result(context, {"tokens_per_second": 1000.0, "eval_loss": 1.5})
    return 1 if told == "die after the result" else 0


if __name__ == "__main__":
    sys.exit(main())
