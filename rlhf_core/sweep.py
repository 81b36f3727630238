"""Sweeps: the variants of one configuration, and which stages they share.

A variant is the configuration with some more overrides: a point of a grid (`ppo.kl_coef=0.02,0.05` and `ppo.seed=0,1` are four),
an entry of a list, or an entry of a list at a point of a grid. Stages with one fingerprint are one stage: that is all there is to
sharing, as a pipeline reuses what is published. Known before anything runs, so a dry run tells it. Neither torch nor Prefect.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.canonical import fingerprint
from rlhf_core.config import PipelineConfig, changed
from rlhf_core.errors import ConfigError
from rlhf_core.plan import StagePlan
from rlhf_core.specs import STAGES, StageName

MOST = 24  # variants: as many lines as one drawing can tell apart
COMMON = ("name", "store")  # what all variants share, as they share artifacts
FOLDER = "sweeps"  # in the store


@dataclass(frozen=True)
class Variant:
    """One pipeline of a sweep.

    Attributes:
        number: from 1.
        overrides: what makes it differ from the others.
    """

    number: int
    overrides: tuple[str, ...]
    config: PipelineConfig

    @property
    def label(self) -> str:
        """Its overrides as one text; "as it is" for a variant without any."""
        return "  ".join(self.overrides) or "as it is"


@dataclass
class SharedStage:
    """One artifact that variants need.

    Attributes:
        planned: what will happen to it, as the first of them sees it.
        variants: numbers of the variants that it belongs to.
    """

    planned: StagePlan
    variants: list[int] = field(default_factory=list)


def variants_of(
    config: PipelineConfig, grid: Iterable[str] = (), listed: Sequence[Mapping[str, Any]] = ()
) -> list[Variant]:
    """All variants, in the order in which the last field of the grid changes fastest.

    Args:
        config: what they have in common.
        grid: `field=value,value`, each a field of the grid.
        listed: entries of a list, each the values by dotted field; each entry is tried at every point of the grid.

    Raises:
        ConfigError: an override is wrong, or there are none, too many, or two variants that are the same pipeline.
    """
    axes = [axis_of(text) for text in grid]
    entries = [tuple(f"{name}={_text(value)}" for name, value in entry.items()) for entry in listed]
    if not axes and not entries:
        raise ConfigError("a sweep needs variants: --grid ppo.kl_coef=0.05,0.1 (repeatable), or --list FILE")
    fields = [axis[0].partition("=")[0] for axis in axes]
    fields += sorted({override.partition("=")[0] for entry in entries for override in entry})
    for name in fields:
        if name in COMMON:
            raise ConfigError(f"{name}: all variants of a sweep share it; set it once, with --set {name}=…")
        if fields.count(name) > 1:
            raise ConfigError(f"{name}: given twice; a field is in the grid once, or in the list")
    points = [
        (*entry, *point) for entry in entries or [()] for point in itertools.product(*axes)
    ]  # the list outside, the grid inside
    if len(points) > MOST:
        raise ConfigError(
            f"a sweep of {len(points)} variants; at most {MOST} can be told apart in one report: split it"
        )
    return [
        Variant(number, point, changed(config, point, f"variant {number} ({'  '.join(point)})"))
        for number, point in enumerate(points, 1)
    ]


def axis_of(text: str) -> tuple[str, ...]:
    """The overrides of one field of a grid: `ppo.seed=0,1` is ("ppo.seed=0", "ppo.seed=1").

    Commas within brackets, braces and quotes belong to a value.
    """
    name, equals, values = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--grid {text!r}: write field=value,value, e.g. --grid ppo.kl_coef=0.05,0.1")
    found = [value.strip() for value in _split(values)]
    if "" in found:
        raise ConfigError(f"--grid {text!r}: a value is empty; write null for none")
    if len(set(found)) < len(found):
        raise ConfigError(f"--grid {text!r}: a value is given twice")
    return tuple(f"{name}={value}" for value in found)


def read_list(path: Path) -> list[dict[str, Any]]:
    """The variants in a YAML file, a list of mappings from dotted fields to values; ConfigError if it is none."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--list {path}: cannot be read: {error}") from None
    wrong = not isinstance(raw, list) or not all(isinstance(entry, dict) for entry in raw)
    if wrong or not raw or not all(isinstance(name, str) for entry in raw for name in entry):
        raise ConfigError(
            f"--list {path}: must be a list of mappings from fields to values, e.g. `- {{ppo.kl_coef: 0.1, ppo.seed: 1}}`"
        )
    return raw


def shared_stages(plans: Mapping[int, Sequence[StagePlan]]) -> list[SharedStage]:
    """Each distinct stage once, in the order of the pipeline; `plans`: those of the variants, by number.

    Raises:
        ConfigError: two variants are the same pipeline.
    """
    stages: dict[str, SharedStage] = {}
    same: dict[tuple[str, ...], int] = {}
    for number, plan in plans.items():
        first = same.setdefault(tuple(planned.ref.id for planned in plan), number)
        if first != number:
            raise ConfigError(
                f"variants {first} and {number} are the same pipeline: what differs between them is no part of a stage's "
                "definition, or is not read by this method; remove one"
            )
        for planned in plan:
            stages.setdefault(planned.ref.id, SharedStage(planned)).variants.append(number)
    return sorted(stages.values(), key=lambda stage: STAGES.index(stage.planned.stage))


def sweep_id(name: str, refs: Iterable[Mapping[StageName, ArtifactRef]]) -> str:
    """The folder of a sweep's report below the store: the same variants have the same."""
    ids = sorted([stage, ref.fingerprint] for each in refs for stage, ref in each.items())
    return f"{FOLDER}/{name}-{fingerprint(ids)[:12]}"


def _split(text: str) -> list[str]:
    parts, depth, quote, start = [], 0, "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _text(value: Any) -> str:
    """A value as an override has it, so that reading it gives the value again."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if yaml.safe_load(text) == value else json.dumps(value)
