"""Which gates have fired, by what, and the record of it in the store.

`LiveGates` takes the rows that a running job logs, `fired_at_end` the numbers of a manifest. A gate fires once for each run of a
stage. It is kept beside the attempt, `attempts/NNNN/gates/…`, with the answer of the person who was asked: who has said "go on"
is not asked again, whoever runs the stage next, until the condition changes. No Prefect, no torch.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from pydantic import ConfigDict, Field

from rlhf_core.artifacts import ArtifactRef, Manifest
from rlhf_core.checkpoints import Position, marker_keys, order_of
from rlhf_core.errors import ExitCode, IntegrityError, JobFailed
from rlhf_core.gates import Action, Gate
from rlhf_core.sealed import seal, unseal
from rlhf_core.spec_base import Frozen
from rlhf_core.store import Store

Row = Mapping[str, Any]
HARDEST: tuple[Action, ...] = ("roll_back", "stop", "wait", "warn")  # of several that fire at once the first is done


class Fired(Frozen):
    """A gate that has fired."""

    model_config = ConfigDict(ser_json_inf_nan="constants", allow_inf_nan=True)

    gate: Gate
    sentence: str = Field(description="for people, e.g. `reward: eval_accuracy 0.52 is below 0.6`")
    metric: str | None = None
    value: float | None = None
    step: int | None = Field(default=None, description="during: of the last value")
    first: int | None = Field(default=None, description="during: of the first of the values in a row that breached it")
    answer: Literal["go on", "stop", "change"] | None = Field(default=None, description="of the person who was asked")
    change: tuple[str, ...] = Field(default=(), description="answer change: overrides of the configuration")

    @property
    def line(self) -> str:
        """What has fired as one line of a report."""
        answer = f"; answered: {' '.join((self.answer, *self.change))}" if self.answer else ""
        return f"{self.sentence} ({self.gate.action.replace('_', ' ')}{answer})"

    @property
    def payload(self) -> dict[str, Any]:
        """For an event: what fired, plain JSON."""
        value = self.value if self.value is None or math.isfinite(self.value) else str(self.value)
        return {
            "stage": self.gate.stage,
            "gate": self.gate.condition,
            "metric": self.metric,
            "value": value,
            "bound": self.gate.bound,
            "action": self.gate.action,
            "step": self.step,
            "text": self.sentence,
        }


class GateFired(JobFailed):
    """A gate ends the stage, or keeps the next one from beginning; trying again gives the same.

    Attributes:
        fired: which, and by what.
        more: what becomes of the run, and what one can do.
        attempt: that it ended, or whose result it is about; 0: not known.
    """

    def __init__(self, fired: Fired, more: str, attempt: int = 0) -> None:
        super().__init__(f"{fired.sentence}\n{more}", code=ExitCode.GATE, reason="gate")
        self.fired, self.more, self.attempt = fired, more, attempt

    @property
    def asks(self) -> bool:
        """Whether a person is to say what follows."""
        return self.fired.gate.action == "wait"


class ChangeAsked(GateFired):
    """The answer to a gate's question is to go on with another configuration.

    Attributes:
        overrides: of it, as after `--set`.
    """

    def __init__(self, fired: Fired, overrides: tuple[str, ...]) -> None:
        super().__init__(fired, f"The pipeline goes on with {' '.join(overrides)}.")
        self.overrides = overrides


class LiveGates:
    """The gates that watch a running stage, and what each has seen; fires each at most once.

    Attributes:
        fired: what has, in order.
    """

    def __init__(self, gates: Iterable[Gate]) -> None:
        """`gates`: those of the stage with during: true."""
        self.gates = tuple(gates)
        self.fired: list[Fired] = []
        self._streaks: list[list[int]] = [
            [] for _ in self.gates
        ]  # steps whose values breached it, without another between
        self._seen: set[str] = set()

    def add(self, rows: Iterable[Row]) -> list[Fired]:
        """Look at rows of a metrics.jsonl, in the order in which they were logged; what fires by them.

        Steps that are trained again after a resume replace what was seen of them.
        """
        new: list[Fired] = []
        for row in rows:
            values, step = values_of(row), int(row.get("step", 0))
            self._seen |= values.keys()
            for gate, streak in zip(self.gates, self._streaks, strict=True):
                if fired := _look(gate, streak, values, step):
                    if gate not in (one.gate for one in self.fired):
                        self.fired.append(fired)
                        new.append(fired)
        return new

    def unseen(self) -> list[str]:
        """A sentence for each gate whose metric no row had."""
        names = [gate.metric for gate in self.gates if gate.metric and gate.metric not in self._seen]
        return [f"the gate on {name} has not been judged: the stage logged no such metric" for name in names]


def values_of(row: Row) -> dict[str, Any]:
    """The metrics of a row under the names that gates use: those of an evaluation begin with eval_."""
    prefix = "eval_" if row.get("kind") == "eval" else ""
    return {f"{prefix}{k}": v for k, v in row.items() if k not in ("kind", "step", "seconds", "epoch")}


def _look(gate: Gate, streak: list[int], values: Mapping[str, Any], step: int) -> Fired | None:
    """Take a row into a gate's streak; what fires when it is long enough."""
    streak[:] = [one for one in streak if one < step]
    if step <= gate.after_step or (gate.metric and gate.metric not in values):
        return None
    if not (found := gate.breached_by(values)):
        streak.clear()
        return None
    streak.append(step)
    if len(streak) < gate.for_steps:
        return None
    where = f" at step {step}" + (f", {len(streak)} times in a row" if gate.for_steps > 1 else "")
    return _fired(gate, *found, where, step=step, first=streak[0])


def fired_at_end(gate: Gate, metrics: Mapping[str, Any]) -> Fired | None:
    """What a gate with a metric says of a manifest's numbers."""
    found = gate.breached_by(metrics)
    return _fired(gate, *found) if found else None


def over_optimised(gate: Gate, rows: Sequence[Mapping[str, Any]], aligned: str) -> tuple[Fired | None, str | None]:
    """What the rule of `eval.peak` says of SFT and the model that was made of it; else why it cannot be judged.

    Args:
        gate: with that rule.
        rows: of the evaluate stage's samples.jsonl: the answers of all models to each prompt.
        aligned: "ppo" or "dpo".
    """
    from rlhf_core.eval.peak import Point, over_optimisation  # numpy

    def point(name: str) -> Point:
        answers = [row["answers"][name] for row in rows]
        reward, gold = ([a[k] for a in answers if k in a] or None for k in ("reward", "gold"))
        return Point(name, [a["kl"] for a in answers], reward, gold)

    if not rows:
        return None, "the gate on over-optimisation has not been judged: the artifact has no samples.jsonl"
    found = over_optimisation([point("sft"), point(aligned)])
    if found["verdict"] != "over-optimised":
        return None, None
    value = found["gold_after_peak"]["value"]
    sentence = f"evaluate: over-optimised. {found['sentence']}"
    return Fired(gate=gate, sentence=sentence, metric="gold", value=value), None


def _fired(
    gate: Gate, name: str, value: Any, where: str = "", step: int | None = None, first: int | None = None
) -> Fired:
    number = math.nan if value is None else float(value)
    if gate.non_finite:
        told = f"{name} is {number:g}"
    else:
        told = f"{name} {number:.4g} is {'below' if gate.below is not None else 'above'} {gate.bound:g}"
    return Fired(gate=gate, sentence=f"{gate.stage}: {told}{where}", metric=name, value=number, step=step, first=first)


# --- in the store ----------------------------------------------------------------------------------------------------


def write_fired(store: Store, ref: ArtifactRef, attempt: int, fired: Fired) -> None:
    """Keep what has fired, or the answer to it, beside the attempt."""
    store.write(f"{ref.id}/attempts/{attempt:04d}/gates/{fired.gate.digest}.json", seal(fired))


def read_fired(store: Store, ref: ArtifactRef, since: int = 1) -> list[Fired]:
    """What has fired in attempts from `since` on, oldest first; a record that cannot be read is left out."""
    found: list[Fired] = []
    for key in sorted(store.list(f"{ref.id}/attempts")):
        *_, attempt, folder, _ = ("", "", *key.split("/"))
        if folder == "gates" and attempt.isdigit() and int(attempt) >= since:
            with suppress(KeyError, IntegrityError):
                found.append(unseal(Fired, store.read(key), f"{store.url}/{key}"))
    return found


def after_first(store: Store, ref: ArtifactRef, first: int, since: int) -> tuple[list[str], list[str]]:
    """Markers of checkpoints from before a step, and of those that have some of it; most progress first.

    A step's row is logged at its end, so what was saved at its beginning or before is from before it.

    Args:
        store: where they are.
        ref: whose.
        first: the step.
        since: attempts before this one do not count.
    """
    limit = Position(step=max(0, first - 1), phase="rollout").order
    keys = marker_keys(store, ref, since)
    good = [key for key in keys if order_of(key) <= limit]
    return good, [key for key in keys if key not in good]


def samples_of(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """Rows of an evaluate artifact's samples.jsonl; none if it has no such file."""
    if not manifest.files_of("samples.jsonl"):
        return []
    return [json.loads(line) for line in store.read(manifest.key("samples.jsonl")).splitlines() if line.strip()]
