"""PipelineConfig: one YAML file, checked by pydantic, with `key=value` overrides.

People write YAML, machines resolved JSON. Every mistake becomes one `ConfigError` that names the field, the value, the rule
and, for an unknown key, the nearest known one. The same model is the parameter of the Prefect flow.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from rlhf_core.credentials import FIELD, KEY_ID, USER_INFO
from rlhf_core.errors import ConfigError
from rlhf_core.gates import Gate, check_gates
from rlhf_core.hosts import BATCHES, batch_of, is_known, seats
from rlhf_core.resources import ResourceTable
from rlhf_core.specs import (
    DataSpec,
    DPOSpec,
    EvaluateSpec,
    Frozen,
    ModelSpec,
    PPOSpec,
    RewardSpec,
    SFTSpec,
    StageName,
)

_SECRETS = (
    "the URL holds credentials (a user part, a key id or a signature), which would be written into records and logs; "
    "give the place alone, and credentials by the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the variable "
    "that token_env names)"
)


class PipelineConfig(Frozen):
    """The whole pipeline: data -> sft -> reward -> ppo -> evaluate, or data -> sft -> dpo -> evaluate."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="part of every artifact's id")
    store: str = Field(
        default="file://./.rlhf/store", description="root URL of the artifacts: file://, s3:// or memory://"
    )
    seed: int = Field(default=0, description="of every stage that sets none")
    method: Literal["ppo", "dpo"] = Field(
        default="ppo", description="how preferences are learned: reward model and PPO, or DPO on the same pairs"
    )
    model: ModelSpec
    data: DataSpec
    sft: SFTSpec = SFTSpec()
    reward: RewardSpec = RewardSpec()
    ppo: PPOSpec = PPOSpec()
    dpo: DPOSpec = DPOSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    resources: ResourceTable = ResourceTable()
    gates: tuple[Gate, ...] = Field(
        default=(), description="conditions on metrics that warn, stop, roll back or wait for a person; never identity"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_credentials(cls, raw: Any) -> Any:
        refuse_credentials_in(raw)
        return raw

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        for stage, field in BATCHES.items():
            resources, size = self.resources.of(stage), batch_of(stage, getattr(self, stage).model_dump())
            if is_known(resources):  # else the hostfile says, when a run begins
                seats(resources, size, field=field)
        return self

    @model_validator(mode="after")
    def _gates_have_stages(self) -> Self:
        check_gates(self.gates, self.stages, gold=self.evaluate.gold is not None)
        return self

    @model_validator(mode="after")
    def _fits_positions(self) -> Self:
        answers = self.answer_limits
        stage = max(answers, key=lambda name: answers[name])
        longest = self.data.max_prompt_tokens + answers[stage]
        models = {"model": self.model}
        # With a tokenizer of its own a reward model reads other numbers of tokens; the job counts those.
        if "reward" in self.stages and self.reward.model and not (self.reward.tokenizer and self.reward.tokenizer.path):
            models["reward.model"] = self.reward.model
        for field, model in models.items():
            if model.family and longest > model.positions:
                raise ValueError(
                    f"data.max_prompt_tokens {self.data.max_prompt_tokens} + {stage}.max_response_tokens {answers[stage]} "
                    f"= {longest} exceeds {field}.positions {model.positions}; shorten one or raise {field}.positions"
                )
        return self

    @model_validator(mode="after")
    def _shares_are_read(self) -> Self:
        readers: dict[str, tuple[StageName, ...]] = {
            "sft": ("sft",), "ppo": ("ppo", "evaluate"), "reward": ("reward", "dpo")
        }  # fmt: skip
        for share, stages in readers.items():
            reader = next((stage for stage in stages if stage in self.stages), None)
            if reader and getattr(self.data.shares, share) == 0:
                raise ValueError(
                    f"data.shares.{share} is 0, but the {reader} stage of this pipeline reads that share; "
                    "make it greater than 0"
                )
        return self

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages of this pipeline, in order; the reward stage only where something uses its model."""
        if self.method == "dpo":
            return ("data", "sft", "dpo", "evaluate")
        reward: tuple[StageName, ...] = ("reward",) if self.ppo.uses_reward_model else ()
        return ("data", "sft", *reward, "ppo", "evaluate")

    @property
    def answer_limits(self) -> dict[StageName, int]:
        """The longest answers, tokens, of the stages of this pipeline that set a limit of their own (0: none)."""
        limits: dict[StageName, int] = {
            "data": self.data.max_response_tokens,
            "evaluate": self.evaluate.max_response_tokens or 0,
            "ppo": self.ppo.max_response_tokens or 0,
        }
        return {stage: limit for stage, limit in limits.items() if stage in self.stages}


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> PipelineConfig:
    """Read a YAML file and apply overrides like `ppo.kl_coef=0.1`; ConfigError on anything wrong."""
    file = Path(path)
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        near = sorted(p.name for p in file.parent.glob("*.yaml")) if file.parent.is_dir() else []
        raise ConfigError(f"{file}: no such file" + (f"; there are: {', '.join(near)}" if near else "")) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    return config_of(text, str(file), overrides)


def config_of(text: bytes, where: str, overrides: Iterable[str] = ()) -> PipelineConfig:
    """The configuration in the text of a YAML file; ConfigError, which names `where`, on anything wrong."""
    try:
        raw = yaml.safe_load(text.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: must be a mapping of fields, is a {type(raw).__name__}")
    return _overridden(raw, where, overrides)


def changed(config: PipelineConfig, overrides: Iterable[str], where: str = "configuration") -> PipelineConfig:
    """A configuration with overrides like `ppo.kl_coef=0.1` on top of it, checked anew; ConfigError on anything wrong."""
    return _overridden(config.model_dump(mode="json", exclude_unset=True), where, overrides)


def _overridden(raw: dict[str, Any], where: str, overrides: Iterable[str]) -> PipelineConfig:
    for override in overrides:
        refuse_credentials_in({f"--set {override.partition('=')[0]}": override.partition("=")[2]})
        _apply(raw, override)
    return parse_config(raw, where)


def parse_config(raw: Mapping[str, Any], where: str = "configuration") -> PipelineConfig:
    """Check a mapping; ConfigError lists every mistake, one a line."""
    try:
        return PipelineConfig.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(dict(e), raw) for e in error.errors()]
        raise ConfigError(f"{where}: " + ("\n  " if len(lines) > 1 else "") + "\n  ".join(lines)) from None


def refuse_credentials_in(value: Any, where: str = "") -> None:
    """ConfigError, which does not repeat them, if a URL anywhere in a configuration holds credentials.

    Configurations are written into requests, manifests and the records of Prefect, so nothing secret may be in one.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            refuse_credentials_in(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            refuse_credentials_in(item, f"{where}.{i}")
    elif isinstance(value, str) and any(found.search(value) for found in (USER_INFO, KEY_ID)):
        raise ConfigError(f"{where}: {_SECRETS}")
    elif isinstance(value, str) and "://" in value and FIELD.search(value):
        raise ConfigError(f"{where}: {_SECRETS}")


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r}: write key=value, e.g. --set ppo.kl_coef=0.1")
    *parents, last = path.split(".")
    node: Any = raw
    for i, key in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, key, override)
            continue
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override!r}: {'.'.join(parents[: i + 1])} is a value, it has no field {last!r}")
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from None
    if isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value
        _exclude_rival(node, parents, last, value)


def _exclude_rival(node: dict[str, Any], parents: list[str], last: str, value: Any) -> None:
    """Setting model.family on a file with model.path (or the reverse) replaces the other."""
    rival = {"family": "path", "path": "family"}.get(last)
    if parents == ["model"] and rival and value is not None:
        node.pop(rival, None)


def _item(node: list[Any], key: str, override: str) -> Any:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"--set {override!r}: {key!r} is no index of a list of {len(node)}; use 0 to {len(node) - 1}")
    return node[int(key)]


def _explain(error: dict[str, Any], raw: Mapping[str, Any]) -> str:
    where = "".join(f"{part}." for part in error["loc"]).rstrip(".")
    if error["type"] == "extra_forbidden":
        known = _fields_at([p for p in error["loc"][:-1]])
        near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}" if known else "remove it"
        return f"{where}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    value = error.get("input")
    shown = f" (is {value!r})" if not isinstance(value, dict | BaseModel) and error["type"] != "missing" else ""
    return (f"{where}: " if where else "") + message + shown


def _fields_at(loc: list[Any]) -> list[str]:
    """Field names of the model found by walking `loc` through the annotations; best effort, for hints."""
    models: list[type[BaseModel]] = [PipelineConfig]
    for part in loc:
        found: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                found += _models_in(model.model_fields[part].annotation)
        models = found or models
    return sorted({name for model in models for name in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]
