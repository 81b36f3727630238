"""Entry point of every rank: DeepSpeed's launch.py starts `-m rlhf_core.train --job URL` (the data stage: plain `python -m`).

Reads job.json, runs the stage on this rank, and on rank 0 uploads the result's files and then result.json. Errors with a
meaning end as one line and their exit code; anything else as a traceback and exit code 1. However a rank ends, it first writes
down why (`ranklog`), so that of many the one is found that began it. SIGUSR1 dumps all stacks. A rank ends itself when the guard
that owns the job is gone, so that nothing outlives the control plane.
"""

import argparse
import faulthandler
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rlhf_core import preemption
from rlhf_core.artifacts import describe
from rlhf_core.card import write_cards
from rlhf_core.context import JobContext
from rlhf_core.errors import ExitCode, Preempted, RlhfError
from rlhf_core.job import JobResult, JobSpec, read_job
from rlhf_core.ranklog import last_words, redirect
from rlhf_core.sealed import seal
from rlhf_core.store import Store

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "rlhf")
DEVICE_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # errors that are no OutOfMemoryError, as those of NCCL
HOST_FULL = ("can't allocate memory", "Cannot allocate memory")


def stage_runner(stage: str) -> Callable[[JobContext], dict[str, Any]]:
    """The function that runs a stage; imports only what that stage needs."""
    if stage == "data":
        from rlhf_core.data.build import run
    elif stage == "sft":
        from rlhf_core.sft import run
    elif stage == "reward":
        from rlhf_core.reward import run
    elif stage == "ppo":
        from rlhf_core.ppo import run
    elif stage == "dpo":
        from rlhf_core.dpo import run
    elif stage == "evaluate":
        from rlhf_core.evaluate import run
    else:
        raise ValueError(f"no stage {stage!r}")
    return run


def main(argv: list[str] | None = None) -> int:
    """Run one rank; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlhf_core.train", description="Run one rank of a stage job.")
    parser.add_argument("--job", required=True, help="URL of job.json: STORE_ROOT#KEY")
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    begin()
    args = parser.parse_args(argv)

    def work() -> None:
        store, job = read_job(args.job)
        run_rank(store, job)

    return run_to_end(work, args.job)


def begin() -> None:
    """What every rank does first: its own log, stacks on demand and after a crash, and an ear for who ends it."""
    redirect()
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    end_with_guard()
    preemption.listen()


def run_to_end(work: Callable[[], None], url: str) -> int:
    """Do a rank's work and say how it ended, in the log and in its last words; returns the exit code.

    Args:
        work: all that this rank does.
        url: of its job.json, for messages.
    """
    try:
        work()
    except BaseException as error:
        code, message, memory = meaning(error, url)
        trace = ""
        if not message:
            with suppress(MemoryError):  # a second one
                trace = traceback.format_exc()
        told = isinstance(error, Preempted | KeyboardInterrupt)
        last_words(code, message or f"{type(error).__name__}: {error}", trace, memory, told=told)
        # Said by every rank: whichever leaves first, the launcher ends the others.
        print(f"error: {message}" if message else trace or repr(error), file=sys.stderr, flush=True)
        return code
    last_words(ExitCode.DONE)
    return ExitCode.DONE


def meaning(error: BaseException, url: str) -> tuple[int, str | None, Literal["", "device", "host"]]:
    """What an exception means: the exit code, the line for the user if a traceback tells him nothing, what memory was full."""
    if isinstance(error, RlhfError):
        return int(error.exit_code), str(error), ""
    if isinstance(error, ValidationError):
        return ExitCode.CONFIG, f"{url}: {error}", ""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        return code, None, ""
    said = str(error)
    if isinstance(error, MemoryError) or any(words in said for words in HOST_FULL):
        return ExitCode.OUT_OF_MEMORY, None, "host"
    if type(error).__name__ == "OutOfMemoryError" or any(words in said for words in DEVICE_FULL):
        return ExitCode.OUT_OF_MEMORY, None, "device"
    return 1, None, ""


def run_rank(store: Store, job: JobSpec) -> None:
    """Run the stage on this rank; rank 0 uploads the result."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    # The guard removes the job's scratch folder, also when this process is killed.
    folder = Path(tempfile.mkdtemp(prefix=f"rlhf-{job.stage}-", dir=os.environ.get("RLHF_SCRATCH")))
    (out := folder / "files").mkdir()
    context = JobContext(job=job, store=store, out=out, rank=rank, world=world)
    try:
        context.progress(0, 1, "start")  # a sign of life before the imports, which take a busy machine long
        metrics = stage_runner(job.stage)(context)
        if context.is_main:
            context.progress(0, 1, "upload")
            upload_result(context, metrics)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def upload_result(context: JobContext, metrics: dict[str, Any]) -> None:
    """Upload what the stage left in its output folder, then result.json, which lists it."""
    job, store = context.job, context.store
    add_cards(context, metrics)
    files = describe(context.out)
    with context.transferring("upload"):
        for entry in files:
            store.upload(context.out / entry.path, f"{job.folder}/files/{entry.path}")
    result = JobResult(
        job_id=job.job_id,
        folder=f"{job.attempt_folder}/files",
        files=files,
        metrics=metrics,
        seconds=time.monotonic() - context.started,
        provenance={
            "host": platform.node(),
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in PACKAGES},
            "processes": context.world,
            "resumed": context.resumed,
        },
    )
    store.write(f"{job.folder}/result.json", seal(result))


def add_cards(context: JobContext, metrics: dict[str, Any]) -> None:
    """A model card beside every model; whatever goes wrong is a line in the log and costs no trained model."""
    try:
        write_cards(context.out, context.store, context.job, metrics)
    except Exception as error:
        context.say(f"the model cards could not be written: {type(error).__name__}: {error}")


def end_with_guard() -> None:
    """Watch the guard process (RLHF_GUARD_PID) and end this rank at once when it is gone."""
    guard = int(os.environ.get("RLHF_GUARD_PID", "0"))
    if not guard:
        return

    def watch() -> None:
        while True:
            try:
                os.kill(guard, 0)
            except ProcessLookupError:
                last_words(1, "the guard is gone", told=True)
                os._exit(1)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True, name="guard-watch").start()


if __name__ == "__main__":
    # Threads of a library must not keep a finished rank alive.
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
