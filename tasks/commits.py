"""Which commits of this code have had a part in an artifact: every attempt's request names the one that asked for it.

A stage that is resumed goes on with whatever code is installed then. That is right for a repaired bug, and worth knowing of a
result that cannot be had again: so the provenance of an artifact whose attempts differ lists them.
"""

from typing import Any

from rlhf_core.errors import IntegrityError
from rlhf_core.job import JobSpec
from rlhf_core.sealed import unseal
from rlhf_core.store import Store

UNKNOWN = "unknown"


def commit_text(state: dict[str, Any]) -> str | None:
    """A commit, with `+` if the tree differs from it; None outside a repository."""
    return f"{state['commit']}{'+' if state['dirty'] else ''}" if state["commit"] else None


def other_commits(store: Store, job: JobSpec, resumed: list[dict[str, Any]]) -> dict[str, str]:
    """By attempt number, the commits of the attempts that a job has gone on from, and its own last; empty if all are one.

    Args:
        store: where the attempts are.
        job: the attempt that has finished, or is about to begin.
        resumed: the attempts that it went on from, each with its number as "attempt".
    """
    found: dict[str, str] = {}
    for entry in resumed:
        key = f"{job.output.id}/attempts/{entry['attempt']:04d}/job.json"
        try:
            before = unseal(JobSpec, store.read(key), key).commit
        except (KeyError, IntegrityError):
            before = None
        found[str(entry["attempt"])] = before or UNKNOWN
    found[str(job.attempt)] = job.commit or UNKNOWN
    return found if len(set(found.values())) > 1 else {}
