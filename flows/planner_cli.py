"""`rlhf plan --hardware …`: whether a pipeline fits devices, how long it takes and what it costs, before any of them is rented."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

from flows.show import out, table
from rlhf_core.config import PipelineConfig
from rlhf_core.errors import ConfigError
from rlhf_core.planner.estimate import PLANNED, Shapes, StageEstimate, estimate
from rlhf_core.planner.fit import Change, smallest_change
from rlhf_core.planner.hardware import Hardware, parse_hardware
from rlhf_core.planner.known import fields_of
from rlhf_core.planner.shapes import Shape, new_fields, shape_of
from rlhf_core.specs import ModelSpec, StageName
from tasks.headline import duration

HardwareOption = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="DEVICE:N",
        help="show instead what the stages need on these devices, e.g. a100-80g:8, a100-80g:2x8 (nodes x devices), or "
        "mine:8,memory=24g,tflops=70,bandwidth=900",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="with --hardware: another base model, e.g. facebook/opt-13b"),
]
PriceOption = Annotated[
    float | None, typer.Option("--price", min=0, metavar="PRICE", help="with --hardware: of one device for an hour")
]
RowsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--rows",
        metavar="STAGE=N",
        help="with --hardware: training rows of sft, reward or dpo, for their time; repeatable",
    ),
]
Changes = Mapping[StageName, Change | None]
JsonOption = Annotated[bool, typer.Option("--json", help="with --hardware: as JSON")]


def show_needs(
    config: PipelineConfig, hardware: str, model: str | None, price: float | None, rows: Sequence[str], as_json: bool
) -> bool:
    """Print what each stage needs; whether all fit.

    Raises:
        ConfigError: the hardware or a model is not known, or a stage cannot be planned.
    """
    devices, counts = parse_hardware(hardware), dict(_rows(text) for text in rows)
    shapes = _shapes(config, model)
    stages: list[StageName] = [stage for stage in config.stages if stage in PLANNED]
    found = [estimate(config, stage, devices, shapes, counts.get(stage)) for stage in stages]
    changes: Changes = {e.stage: smallest_change(config, e.stage, devices, shapes, counts.get(e.stage)) for e in found}
    if as_json:
        out.print_json(data=_as_json(devices, found, changes, price))
    else:
        _print(devices, found, changes, price)
        if config.resources.processes != devices.devices:
            out.print(f"planned with one rank a device: --set resources.processes={devices.devices}", highlight=False)
    return all(e.fits for e in found)


def _rows(text: str) -> tuple[str, int]:
    stage, _, count = text.partition("=")
    if stage not in PLANNED or not count.isdigit() or not int(count):
        raise ConfigError(f"--rows {text!r}: write STAGE=N with a stage of {', '.join(PLANNED)}, e.g. --rows sft=50000")
    return stage, int(count)


def _shapes(config: PipelineConfig, model: str | None) -> Shapes:
    base = shape_of(fields_of(model, "--model"), model) if model else _shape(config, config.model, "model")
    reward = config.reward.model
    return Shapes(base, _shape(config, reward, "reward.model") if reward else base)


def _shape(config: PipelineConfig, spec: ModelSpec, field: str) -> Shape:
    if spec.path:
        return shape_of(fields_of(spec.path, f"{field}.path"), spec.path)
    vocabulary = config.data.tokenizer.train_vocab_size
    if vocabulary is None:
        raise ConfigError(
            f"{field}: the vocabulary of a new model is that of data.tokenizer.path, which is not read here; "
            "plan with --set data.tokenizer.path= --set data.tokenizer.train_vocab_size=N"
        )
    assert spec.family
    return shape_of(new_fields(spec.family, spec.hidden_size, spec.layers, spec.heads, spec.positions, vocabulary))


def _print(devices: Hardware, found: Sequence[StageEstimate], changes: Changes, price: float | None) -> None:
    nodes = f"{devices.nodes} nodes of " if devices.nodes > 1 else ""
    out.print(
        f"[bold]{escape(devices.name)}[/]: {nodes}{devices.devices} devices of {_gb(devices.memory)}, "
        f"{_gb(devices.usable)} of it usable; one rank each",
        soft_wrap=True,
    )
    for e in found:
        _print_memory(e)
    rows = table("stage", "phase", "TFLOP a rank", "time a step", "steps", "time", "cost")
    for e in found:
        for phase in e.phases:
            rows.add_row(e.stage, phase.name, f"{phase.operations / 1e12:,.1f}", _time(phase.seconds))
        cost = "" if price is None or e.seconds is None else f"{e.cost(price):,.2f}"
        steps = "?" if e.steps is None else f"{e.steps:,}"
        rows.add_row(e.stage, "all", f"{sum(p.operations for p in e.phases) / 1e12:,.1f}", _time(e.step_seconds), steps,
                     _time(e.seconds), cost)  # fmt: skip
    out.print()
    out.print(rows)
    if any(e.steps is None for e in found):
        out.print("steps ?: the number of rows is not known before the data stage; give it with --rows STAGE=N")
    for e in found:
        _print_verdict(e, changes[e.stage])


def _print_memory(e: StageEstimate) -> None:
    parts = sorted({part for kept in e.models.values() for part in kept})
    rows = table(f"{e.stage}: bytes a rank", *parts)
    for role, kept in e.models.items():
        rows.add_row(role, *(_gb(kept[part]) if part in kept else "" for part in parts))
    out.print()
    out.print(rows)
    for phase in e.phases:
        added = ", ".join(f"{part} {_gb(count)}" for part, count in phase.memory.items() if count)
        out.print(f"  {phase.name:<11}{_gb(e.kept + phase.added):>9}  with {added}", soft_wrap=True, highlight=False)


def _print_verdict(e: StageEstimate, change: Change | None) -> None:
    mark = "[green]fits[/]" if e.fits else "[red]does not fit[/]"
    out.print(f"{e.stage:<7} {mark}: peak {_gb(e.peak)} of {_gb(e.hardware.usable)}", highlight=False)
    if e.fits:
        return
    if change is None:
        out.print("        no change of this search makes it fit: take more or larger devices")
        return
    words = " ".join(f"--set {word}" for word in change.sets)
    note = "; adapters train instead of all weights: another result" if change.identity else ""
    note += "; what offload takes is not in the time" if "offload" in words else ""
    peak, step = _gb(change.estimate.peak), _time(change.estimate.step_seconds)
    out.print(f"        smallest change: {words}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"        then peak {peak}, {step} a step{note}", soft_wrap=True, highlight=False)


def _as_json(
    devices: Hardware, found: Sequence[StageEstimate], changes: Changes, price: float | None
) -> dict[str, Any]:
    def one(e: StageEstimate) -> dict[str, Any]:
        change = changes[e.stage]
        return {
            "fits": e.fits,
            "peak_bytes": round(e.peak),
            "models": {role: {part: round(n) for part, n in kept.items()} for role, kept in e.models.items()},
            "phases": {
                p.name: {
                    "memory": {part: round(n) for part, n in p.memory.items()},
                    "operations": p.operations,
                    "seconds": p.seconds,
                }
                for p in e.phases
            },
            "step_seconds": e.step_seconds,
            "steps": e.steps,
            "seconds": e.seconds,
            "cost": None if price is None else e.cost(price),
            "change": None if e.fits or change is None else list(change.sets),
        }

    named = {"name": devices.name, "nodes": devices.nodes, "devices": devices.devices}
    return {"hardware": {**named, "usable_bytes": round(devices.usable)}, "stages": {e.stage: one(e) for e in found}}


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return duration(seconds) if seconds < 86400 else f"{seconds / 86400:.1f} d"
