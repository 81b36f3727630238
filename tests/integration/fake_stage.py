"""A stage whose ranks behave as `job.spec["behave"]` says; stands where rlhf_core.train stands in a real job."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from rlhf_core import preemption
from rlhf_core.errors import ConfigError, NonFiniteError, Preempted
from rlhf_core.job import JobResult, JobSpec, progress_line, read_job
from rlhf_core.store import Store
from rlhf_core.train import begin, run_to_end

RANK = int(os.environ.get("RANK", "0"))


def arrived():
    """Lets the test know that this rank is where it wants it."""
    Path(os.environ["RLHF_SCRATCH"], f"arrived-{RANK}").touch()


def stuck_in_this_function():
    arrived()
    while True:
        time.sleep(1)


def write_result(store: Store, job: JobSpec, job_id: str | None = None):
    files = f"{job.attempt_folder}/files"
    result = JobResult(job_id=job_id or job.job_id, folder=files, files=(), metrics={"loss": 1.5}, seconds=0.1)
    store.write(f"{job.folder}/result.json", result.model_dump_json().encode())


def meet_the_others():
    """Train as ranks do: bound to each other by collectives. Returns what they do next, which ends when one is gone."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    dist.all_reduce(torch.ones(1))
    arrived()
    return lambda: dist.all_reduce(torch.ones(1))


def save_when_told(store: Store, job: JobSpec):
    """Saves as a checkpointer does: when told, for a while, with the help of a process of its own; rank 0 is the slowest."""
    local = tempfile.mkdtemp(dir=os.environ["RLHF_SCRATCH"])
    helping = subprocess.Popen(["sleep", "1000"])
    preemption.install(job.resources.checkpoint.notice)
    # A real checkpointer tells the other ranks of a notice, which only the first one watches; here each goes on alone.
    arrived()
    while not (reason := preemption.requested()):
        time.sleep(0.05)
    time.sleep(0.3)
    assert helping.poll() is None, "what a rank needs in order to save was ended"
    helping.kill()
    time.sleep(1 if RANK else 2.5)  # the launcher ends rank 0 as soon as it sees that rank 1 has ended
    store.write(f"{job.folder}/saved-{RANK}", f"{reason}, local files in {local}".encode())
    raise Preempted(f"{reason}; saved at step 1")


def behave_as_told(store: Store, job: JobSpec):
    behave = job.spec["behave"]
    print(progress_line({"step": 1, "total": 2, "unit": "step", "phase": "train", "metrics": {"loss": 2.0 + RANK}}))
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
        if RANK:
            time.sleep(1)
        raise ConfigError("optim.lr: 0 must be positive; e.g. 1e-5")
    elif behave == "raise":
        for n in range(100):
            print(f"line {n}")
        raise RuntimeError("the loss went for a walk")
    elif behave == "rank 1 raises, the others wait for it":
        collective = meet_the_others()
        if RANK == 1:
            raise RuntimeError("the loss went for a walk")
        collective()
    elif behave == "wait for each other":
        collective = meet_the_others()
        if RANK == 1:
            time.sleep(1000)
        collective()
    elif behave == "rank 1 finds no number, the others wait for it":
        collective = meet_the_others()
        if RANK == 1:
            raise NonFiniteError("step 7: the loss is nan")
        collective()
    elif behave == "eat memory":
        arrived()
        eaten = []
        while True:
            eaten.append(b"x" * (8 << 20))
    elif behave == "talk in turns":
        for n in range(4):
            word = Path(os.environ["RLHF_SCRATCH"], f"word-{n}")
            if n % 2 == RANK:
                time.sleep(1)
                print(word.name, flush=True)
                word.touch()
            while not word.exists():
                time.sleep(0.05)
        if RANK == 0:
            write_result(store, job)
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
    elif behave == "rank 1 tells of progress for ever":
        while True:
            if RANK == 1:
                print(progress_line({"step": 5, "total": 10, "phase": "train"}), flush=True)
            time.sleep(0.1)
    elif behave == "chat for ever":
        while True:
            print("still here", flush=True)
            time.sleep(0.1)
    else:
        raise ValueError(behave)


def main() -> int:
    begin()
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", required=True)
    parser.add_argument("--local_rank", type=int, default=0)
    url = parser.parse_args().job
    return run_to_end(lambda: behave_as_told(*read_job(url)), url)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
