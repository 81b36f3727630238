"""How a job ended, for those who wait for it: its result, or a `JobFailed` that says why there is none.

What its processes have left on this machine is gathered before its local files go (`failure_of`), and judged by `failures`. The
failure is also stored as the attempt's failure.json, from which later attempts learn. Its message begins with the cause and the
traceback of the rank that began it; the end of the log comes last.
"""

import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from rlhf_core.ends import Failure, Kind, NodeEnd
from rlhf_core.errors import IntegrityError, JobFailed, StoreError
from rlhf_core.failures import RULES, conclude
from rlhf_core.job import JobResult, JobSpec
from rlhf_core.joblog import JobLog
from rlhf_core.lease import superseded
from rlhf_core.ranklog import ends_of, ranks_folder
from rlhf_core.sealed import seal, unseal
from rlhf_core.store import Store

TAIL_LINES = 30
STACK_LINES = 120  # after a limit, when the log ends with stacks
RANKS_TOLD = 16


def failure_of(job: JobSpec, log: JobLog, code: int, limit: Kind | None, kills: int, ranks: int) -> Failure | None:
    """Why the job has failed, from what its processes have left; None: it has not, as far as they can tell.

    Args:
        job: that has ended.
        log: of it; its local files are still there.
        code: of its guard.
        limit: the limit it had passed.
        kills: processes that the kernel killed meanwhile for want of memory.
        ranks: how many were started here.
    """
    if code == 0 and limit is None:
        return None
    if limit is None and (told := _told_by_head(log.folder)):
        return told
    ends, silent = ends_of(log.folder, 0, ranks)
    if job.stage == "data" and code > 128:
        code = 256 - (code - 128)  # the command is itself what a rank is elsewhere: as launch.py would tell it
    end = NodeEnd(code=code, oom_kills=kills, ranks=ends, silent=silent, tail=tuple(log.tail))
    return conclude([(None, end)], code, limit)


def _told_by_head(folder: Path) -> Failure | None:
    try:
        return Failure.model_validate_json((ranks_folder(folder) / "failure.json").read_bytes())
    except (OSError, ValidationError):
        return None


def outcome(
    store: Store, job: JobSpec, code: int, failure: Failure | None, log: JobLog, place: str, hints: Sequence[str] = ()
) -> JobResult:
    """The job's result; JobFailed says why there is none.

    Args:
        store: of the job.
        job: that has ended.
        code: of its guard.
        failure: what `failure_of` has found.
        log: closed by now.
        place: where it is.
        hints: further lines for people.
    """
    failure = failure or conclude([], code)
    if code == 0 and failure.kind == "no result":
        try:
            result = unseal(JobResult, store.read(key := f"{job.folder}/result.json"), f"{store.url}/{key}")
        except KeyError:
            pass
        except IntegrityError as error:
            failure = failure.model_copy(update={"detail": f"unreadable result.json ({error})"})
        else:
            if result.job_id == job.job_id:
                return result
            failure = failure.model_copy(update={"detail": f"result.json is of another job, {result.job_id}"})
    with suppress(StoreError):  # for those who come later; this caller is told in any case
        store.write(f"{job.folder}/failure.json", seal(failure))
    raise failed(job, failure, log, place, hints)


def failed(job: JobSpec, failure: Failure, log: JobLog, place: str, hints: Sequence[str] = ()) -> JobFailed:
    """The error of a failed job: its own one line if the user is to act on it, else all that helps to find out."""
    if failure.kind in ("configuration", "data") and failure.detail != f"exit code {failure.code}":
        return JobFailed(failure.detail, code=failure.code, reason=failure.kind, failure=failure)
    if failure.kind == "superseded":
        return superseded(job)
    parts = [f"{job.output.id}, attempt {job.attempt}: {failure.kind}: {failure.detail}{_where(job, failure)}"]
    if failure.trace:
        parts.append(textwrap.indent(failure.trace.rstrip(), "    "))
    if remedy := RULES[failure.kind].remedy:
        parts.append(remedy)
    if failure.kind == "stalled":
        parts += _last_heard(log)
    lines = list(log.tail)[-(STACK_LINES if failure.kind in ("stalled", "timed out") else TAIL_LINES) :]
    parts += [*hints, f"Log: {place}", *(f"  | {line}" for line in lines)]
    return JobFailed("\n".join(parts), code=failure.code, reason=failure.kind, failure=failure)


def _where(job: JobSpec, failure: Failure) -> str:
    """Rank and node, where there are several."""
    several = failure.host or job.resources.processes > 1
    rank = f"rank {failure.rank}" if failure.rank is not None and several else ""
    host = f"on {failure.host}" if failure.host else ""
    return f" ({' '.join(filter(None, (rank, host)))})" if rank or host else ""


def _last_heard(log: JobLog) -> list[str]:
    """How far each rank was, and how long ago it said so."""
    now = time.time()
    told = [
        f"rank {rank}: {event.get('phase')} {event.get('step')}/{event.get('total')}, {now - when:.0f} s ago"
        for rank, (when, event) in sorted(log.ranks.items())[:RANKS_TOLD]
    ]
    return [f"Last heard of {'; '.join(told)}"] if told else []
