"""What earlier attempts at an artifact change about the next one: a smaller micro-batch, and hosts that sit out.

Attempts that fail leave `attempts/NNNN/failure.json` beside their `job.json`; everything is concluded from these, so that it
survives the control plane, and another run on another machine concludes the same. An attempt that ran out of memory is followed by
one with half the micro-batch, which changes no loss beyond rounding, and by no further: unless the configuration says otherwise,
later attempts begin with that half. A host on which two attempts failed, for reasons that speak against it, is left out where
enough others remain; which those are says `hosts.seats`. A record that cannot be read counts for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_core import hosts
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.ends import Failure
from rlhf_core.errors import IntegrityError
from rlhf_core.failures import RULES
from rlhf_core.job import JobSpec
from rlhf_core.sealed import unseal
from rlhf_core.specs import StageName
from rlhf_core.store import Store

STRIKES = 2  # failures that speak against a host, until it is left out
USES: dict[StageName, tuple[str, ...]] = {  # what of a stage's resources is halved
    "sft": ("micro_batch", "micro_tokens"),
    "reward": ("micro_batch", "micro_tokens"),
    "dpo": ("micro_batch", "micro_tokens"),
    "ppo": ("micro_batch", "micro_tokens", "rollout_micro_batch"),
    "evaluate": ("micro_batch", "rollout_micro_batch"),
}


@dataclass(frozen=True)
class Past:
    """A failed attempt."""

    job: JobSpec
    failure: Failure

    @property
    def out_of_memory(self) -> bool:
        """Whether half the micro-batch might have done."""
        return self.failure.kind == "out of memory"


def past(store: Store, ref: ArtifactRef, since: int) -> list[Past]:
    """The attempts from `since` on that have failed and said how, in their order."""
    found = []
    for key in sorted(store.list(f"{ref.id}/attempts")):
        folder, _, name = key.rpartition("/")
        if name != "failure.json" or not folder.rpartition("/")[2].isdigit():
            continue
        try:
            failure = unseal(Failure, store.read(key), key)
            job = unseal(JobSpec, store.read(f"{folder}/job.json"), f"{folder}/job.json")
        except (KeyError, IntegrityError):
            continue
        found += [Past(job, failure)] if job.attempt >= since else []
    return found


def adapt(store: Store, job: JobSpec) -> tuple[JobSpec, list[str]]:
    """The job as it is to be started after what has happened, and what people are told of that."""
    before = past(store, job.output, job.since)
    job, told = _halve(job, before)
    out, more = _leave_out(job, before)
    return job.model_copy(update={"left_out": out}), told + more


def worth_halving(store: Store, ref: ArtifactRef, since: int) -> bool:
    """Whether the newest attempt ran out of memory and another one with less could do: it was not halved itself."""
    before = past(store, ref, since)
    return bool(before) and before[-1].out_of_memory and not before[-1].job.halved and bool(_half(before[-1].job))


def tried(store: Store, ref: ArtifactRef, since: int) -> str:
    """With what micro-batches attempts ran out of memory, and what to do, for people; empty if none did so halved."""
    short = [one.job for one in past(store, ref, since) if one.out_of_memory]
    if not any(job.halved for job in short):
        return ""
    sizes = dict.fromkeys(_sizes(job) for job in short)
    return (
        f"Out of memory with {', then with '.join(sizes)}: set a lower resources.micro_batch, or see resources.zero_stage, "
        "offload_optimizer and gradient_checkpointing"
    )


def _halve(job: JobSpec, before: Sequence[Past]) -> tuple[JobSpec, list[str]]:
    short = [one.job for one in before if one.out_of_memory and _sizes(one.job) == _sizes(job)]
    half = _half(job)
    if not short or not half:
        return job, []
    smaller = job.model_copy(update={"resources": job.resources.model_copy(update=half), "halved": True})
    return smaller, [
        f"attempt {short[-1].attempt} ran out of memory with {_sizes(job)}; this one has {_sizes(smaller)}, which changes "
        "no result beyond rounding"
    ]


def _half(job: JobSpec) -> dict[str, int]:
    """The fields of its resources that can be halved, halved; none if nothing would get smaller."""
    fields = _used(job)
    return {name: max(1, size // 2) for name, size in fields.items()} if any(s > 1 for s in fields.values()) else {}


def _sizes(job: JobSpec) -> str:
    return " and ".join(f"{name} {size}" for name, size in _used(job).items())


def _used(job: JobSpec) -> dict[str, int]:
    """The limits of its stage that are set."""
    fields = {name: getattr(job.resources, name) for name in USES.get(job.stage, ())}
    return {name: size for name, size in fields.items() if size is not None}


def _leave_out(job: JobSpec, before: Sequence[Past]) -> tuple[tuple[str, ...], list[str]]:
    """Hosts that more than one failure speaks against."""
    if job.resources.launcher not in ("hostfile", "slurm"):  # else nodes are not ours to choose
        return (), []
    against: dict[str, list[Failure]] = {}
    for failure in (one.failure for one in before):
        # Whoever told a job to end has chosen the nodes, if anything.
        if failure.host and failure.kind != "preempted" and not RULES[failure.kind].same_nodes:
            against.setdefault(failure.host, []).append(failure)
    out = tuple(sorted(host for host, failures in against.items() if len(failures) >= STRIKES))
    if not out:
        return (), []
    taken = {seat.host for seat in hosts.seats(job.resources, hosts.batch_of(job.stage, job.spec), out)}
    return out, [_told(host, against[host], host not in taken) for host in out]


def _told(host: str, failures: Sequence[Failure], goes: bool) -> str:
    why = f"{host} has failed {len(failures)} times, last: {failures[-1].detail}"
    if goes:
        return f"{why}; it is left out until this artifact is made"
    return f"{why}; it stays all the same, as not enough others remain (resources.cluster.min_nodes)"
