"""Events of stages, for Prefect's event feed and for automations: `rlhf.stage.started`, `completed`, `resumed` and so on, and
`rlhf.gate.fired`.

The payload says which artifact, how it came about and its numbers. An event is queued and sent by a thread of Prefect's:
nothing waits for the server, and an event that cannot be sent is lost, the stage is not. The record of what happened is
the manifest in the store; Prefect keeps events for a week.
"""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from prefect.events import emit_event
from prefect.runtime import flow_run

from rlhf_core.plan import StagePlan

Happened = Literal["started", "resumed", "completed", "failed", "reused", "preempted"]


def emit(
    happened: Happened, planned: StagePlan, log: "logging.Logger | logging.LoggerAdapter[Any]", **payload: Any
) -> None:
    """Emit `rlhf.stage.{happened}`; an error is logged and nothing else.

    Args:
        happened: what.
        planned: of which stage.
        log: told of an error.
        payload: plain JSON besides stage, artifact and fingerprint.
    """
    _emit(f"rlhf.stage.{happened}", planned, log, payload)


def emit_gate(
    planned: StagePlan, log: "logging.Logger | logging.LoggerAdapter[Any]", payload: Mapping[str, Any]
) -> None:
    """Emit `rlhf.gate.fired`; `payload`: gate, metric, value, bound, action, step, and text for people."""
    _emit("rlhf.gate.fired", planned, log, payload)


def _emit(
    name: str, planned: StagePlan, log: "logging.Logger | logging.LoggerAdapter[Any]", payload: Mapping[str, Any]
) -> None:
    try:
        emit_event(
            event=name,
            resource={
                "prefect.resource.id": f"rlhf.stage.{planned.stage}",
                "prefect.resource.name": planned.stage,
                "rlhf.artifact": planned.ref.id,
            },
            related=_flow_run(),
            payload={
                "stage": planned.stage,
                "artifact": planned.ref.id,
                "fingerprint": planned.ref.fingerprint,
                **payload,
            },
        )
    except Exception as error:
        log.warning("event %s could not be emitted: %s: %s", name, type(error).__name__, error)


def _flow_run() -> list[dict[str, str]]:
    if not flow_run.id:
        return []
    return [{"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.role": "flow-run"}]
