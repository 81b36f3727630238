"""What the Prefect server does by itself when a run dies: marks it, and starts it again, a bounded number of times.

A run whose machine is gone says nothing more, so its missing heartbeat is what marks it crashed. A crashed run of a deployment
is scheduled again after a pause that grows with the number of its starts (`PAUSES`); after the last, a person has to look.
Prefect's actions can neither count nor wait; so there is one automation for each start, which answers to that run count alone
and fires when the run has not been scheduled again (by a person) within its pause. A run without a deployment has no worker
that would start it. A false alarm does no harm: the second builder of an artifact waits for the first.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.events import AutomationCore, EventTrigger, Posture, ResourceSpecification
from prefect.events.actions import ChangeFlowRunState

from rlhf_core.specs import STAGES

FLOWS = ["rlhf", *(f"rlhf-{stage}" for stage in STAGES)]

SILENCE_SECONDS = 120  # runs of deployments give one every 30 s, so says their deployment: three may be lost
LONG_SILENCE_SECONDS = 600  # any other may have Prefect's default of 180 s
PAUSES = (10, 60, 300)  # seconds before the second, third and fourth start; Prefect's least is 10


def resource(labels: dict[str, Any]) -> ResourceSpecification:
    """What an event's resource must have."""
    return ResourceSpecification.model_validate(labels)


OURS = resource({"prefect.resource.role": "flow", "prefect.resource.name": FLOWS})
DEPLOYED = resource({"prefect.resource.role": "deployment"})


def automations() -> list[AutomationCore]:
    """All of them."""
    silent = _mark_silent(SILENCE_SECONDS, "rlhf-silent-run-crashed", " of a deployment", DEPLOYED)
    others = _mark_silent(LONG_SILENCE_SECONDS, "rlhf-long-silent-run-crashed", "")
    return [silent, others, *(_start_again(count, pause) for count, pause in enumerate(PAUSES, start=1))]


def install(wanted: Sequence[AutomationCore]) -> dict[str, str]:
    """Create automations on the Prefect server, or bring them up to date; returns for each name what was done.

    Whether somebody has switched one off is left as it is.
    """
    done: dict[str, str] = {}
    with get_client(sync_client=True) as client:
        for each in wanted:
            found = next(iter(client.read_automations_by_name(each.name)), None)
            if found is None:
                client.create_automation(each)
                done[each.name] = "created"
            elif _definition(found) == _definition(each):
                done[each.name] = "there already" + ("" if found.enabled else ", switched off")
            else:
                client.update_automation(found.id, each.model_copy(update={"enabled": found.enabled}))
                done[each.name] = "updated"
    return done


def _definition(automation: AutomationCore) -> Any:
    """What it does, in a form that compares: from the server sets come back in another order, and from PostgreSQL keys too."""

    def sort(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: sort(value[key]) for key in sorted(value)}
        return sorted(map(sort, value), key=repr) if isinstance(value, list) else value

    return sort(automation.model_dump(mode="json", include={"description", "trigger", "actions"}))


def _mark_silent(seconds: int, name: str, of: str, *related: ResourceSpecification) -> AutomationCore:
    """For runs that have given a heartbeat and then nothing for some time."""
    return AutomationCore(
        name=name,
        description=f"A run{of} that has said nothing for {seconds} s is marked crashed.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            posture=Posture.Proactive,
            match=resource({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=[OURS, *related],
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=seconds),
        ),
        actions=[_change(StateType.CRASHED, "Crashed", f"No heartbeat for {seconds} s: taken for dead.")],
    )


def _start_again(count: int, pause: int) -> AutomationCore:
    """For a run that crashed in its start number `count`."""
    return AutomationCore(
        name=f"rlhf-crashed-run-again-{count}",
        description=f"A run that crashed in its start {count} of {len(PAUSES) + 1} is started again after {pause} s.",
        trigger=EventTrigger(
            after={"prefect.flow-run.Crashed"},
            expect={"prefect.flow-run.AwaitingRetry", "prefect.flow-run.Scheduled"},
            posture=Posture.Proactive,
            match=resource({"prefect.resource.id": "prefect.flow-run.*", "prefect.run-count": str(count)}),
            match_related=[OURS, DEPLOYED],
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=pause),
        ),
        actions=[_change(StateType.SCHEDULED, "AwaitingRetry", f"Crashed; start {count + 1} after {pause} s.")],
    )


def _change(state: StateType, name: str, message: str) -> Any:
    return ChangeFlowRunState(state=state, name=name, message=message, force=False)
