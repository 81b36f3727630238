"""A stage whose ranks behave as `job.spec["behave"]` says; stands where rlhf_core.train stands in a real job."""

import argparse
import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import time

from rlhf_core import preemption
from rlhf_core.job import JobResult, JobSpec, progress_line, read_job
from rlhf_core.store import Store
from rlhf_core.train import end_with_guard

RANK = int(os.environ.get("RANK", "0"))


def stuck_in_this_function():
    while True:
        time.sleep(1)


def write_result(store: Store, job: JobSpec, job_id: str | None = None):
    files = f"{job.attempt_folder}/files"
    result = JobResult(job_id=job_id or job.job_id, folder=files, files=(), metrics={"loss": 1.5}, seconds=0.1)
    store.write(f"{job.folder}/result.json", result.model_dump_json().encode())


def save_when_told(store: Store, job: JobSpec):
    """Saves as a checkpointer does: when told, for a while, with the help of a process of its own; rank 0 is the slowest."""
    local = tempfile.mkdtemp(dir=os.environ["RLHF_SCRATCH"])
    helping = subprocess.Popen(["sleep", "1000"])
    preemption.install(job.resources.checkpoint.notice)
    # A real checkpointer tells the other ranks of a notice, which only the first one watches; here each goes on alone.
    while not (reason := preemption.requested()):
        time.sleep(0.05)
    time.sleep(0.3)
    assert helping.poll() is None, "what a rank needs in order to save was ended"
    helping.kill()
    time.sleep(1 if RANK else 2.5)  # the launcher ends rank 0 as soon as it sees that rank 1 has ended
    store.write(f"{job.folder}/saved-{RANK}", f"{reason}, local files in {local}".encode())
    print(f"error: {reason}; saved at step 1", file=sys.stderr, flush=True)
    sys.exit(75)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", required=True)
    parser.add_argument("--local_rank", type=int, default=0)
    store, job = read_job(parser.parse_args().job)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    end_with_guard()
    behave = job.spec["behave"]
    if RANK == 0:
        print(progress_line({"step": 1, "total": 2, "unit": "step", "phase": "train", "metrics": {"loss": 2.0}}))
    print(f"rank {RANK} of {os.environ.get('WORLD_SIZE', '1')} here at {time.time()}", flush=True)
    if behave == "succeed":
        if RANK == 0:
            sys.stdout.write("".join(f"\r{n:3d}%" for n in range(101)) + " done\n")
            sys.stdout.write("a warning without a newline" + progress_line({"step": 2, "total": 2}) + "and another\n")
            write_result(store, job)
    elif behave == "say nothing of a result":
        pass
    elif behave == "result of another job":
        write_result(store, job, "sft/other/1")
    elif behave == "wrong configuration":
        print("Traceback that the user must not see", file=sys.stderr)
        if RANK == 0:
            print("error: optim.lr: 0 must be positive; e.g. 1e-5", file=sys.stderr)
        else:
            time.sleep(1)
        sys.exit(2)
    elif behave == "raise":
        for n in range(100):
            print(f"line {n}")
        raise RuntimeError("the loss went for a walk")
    elif behave == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif behave == "hang":
        stuck_in_this_function()
    elif behave == "hang and ignore SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stuck_in_this_function()
    elif behave == "save when told":
        save_when_told(store, job)
    elif behave == "leave grandchildren":
        # One carries no RLHF_JOB_ID, one is in a session of its own; both ignore SIGTERM and are orphans at once.
        script = 'trap "" TERM; sleep 1000 & sleep 1001 & wait'
        subprocess.Popen(["sh", "-c", script], env={"PATH": os.environ["PATH"], "MARK": job.job_id})
        subprocess.Popen(["sh", "-c", script], start_new_session=True)
        write_result(store, job)
    elif behave == "progress for ever":
        step = 0
        while True:
            print(progress_line({"step": (step := step + 1), "total": 10**6}), flush=True)
            time.sleep(0.1)
    elif behave == "chat for ever":
        while True:
            print("still here", flush=True)
            time.sleep(0.1)
    else:
        raise ValueError(behave)


if __name__ == "__main__":
    main()
