"""What a flow is given: the configuration itself, which is a form in Prefect's UI, or the place of a file with one.

A form of all fields suits small changes; a schedule or a large configuration is better kept in a file: a path, relative to the
working directory of the run, or a URL of the store's kinds (`s3://…/x.yaml`, `file://…`). The file is read when the run begins,
and again at each retry.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from prefect.runtime import flow_run
from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from rlhf_core.config import PipelineConfig, config_of, load_config
from rlhf_core.errors import ConfigError
from rlhf_core.store import Store


class OneForm:
    """Not "this or nothing": a form says what is wrong with a field, a choice of forms only that none of them fits."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema of what may be given."""
        return handler(schema)["anyOf"][0]


ConfigForm = Annotated[PipelineConfig | None, OneForm()]


def chosen(config: PipelineConfig | None, config_file: str | None, overrides: Iterable[str] = ()) -> PipelineConfig:
    """The configuration that a flow was given.

    Args:
        config: the configuration itself.
        config_file: path or URL of its YAML.
        overrides: `field=value`, as after `--set`; of a file only.

    Raises:
        ConfigError: none or both were given, or what the file holds is wrong.
        StoreError: the URL could not be read.
    """
    if (config is None) == (config_file is None):
        given = "none of them" if config is None else "both"
        raise ConfigError(f"config, config_file: give one of the two, the configuration or its file; given: {given}")
    if config is not None:
        if overrides := tuple(overrides):
            raise ConfigError(f"overrides: {overrides[0]!r} is for a config_file; change the field in config itself")
        return config
    assert config_file is not None
    if "://" not in config_file:
        return load_config(config_file, overrides)
    folder, _, name = config_file.rpartition("/")
    try:
        text = Store(folder).read(name)
    except KeyError:
        raise ConfigError(f"config_file: {config_file}: no such object") from None
    return config_of(text, config_file, overrides)


def run_name() -> str:
    """The name of a flow run: its configuration's, or until that can be read its file's."""
    given = flow_run.parameters
    config = given.get("config")
    if isinstance(config, PipelineConfig):
        return config.name
    if isinstance(config, dict):
        return str(config.get("name"))
    file = given.get("config_file")
    try:
        return chosen(None, file, given.get("overrides") or ()).name
    except Exception:  # the flow itself says what is wrong
        return Path(str(file)).stem
