"""What can be checked before anything trains and is not in the configuration alone: code, machine, folders.

No Prefect and no torch here. `check_functions` looks at the Python functions that `ppo.rewards` names without running
them; `check_machine` at what the stages that will be built need of this machine.
"""

import ast
import importlib.util
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from rlhf_core import hosts, launch
from rlhf_core.config import PipelineConfig
from rlhf_core.errors import ConfigError
from rlhf_core.resources import Resources
from rlhf_core.sources import local_path
from rlhf_core.specs import FunctionReward, LoRASpec, StageName
from rlhf_core.ssh import require_ssh


def check_functions(config: PipelineConfig) -> None:
    """ConfigError if `ppo.rewards` names a Python function that may not run here, or that is not there.

    Nothing is imported: the file of `path/to/file.py:name` is parsed, of `module:name` only the package is looked up.
    """
    functions = [(i, s) for i, s in enumerate(config.ppo.rewards or ()) if isinstance(s, FunctionReward)]
    if not functions:
        return
    from rlhf_core.reward_sources import check_code  # brings an HTTP client, which few pipelines need

    check_code(config.ppo.rewards)
    for i, source in functions:
        field = f"ppo.rewards[{i}].function"
        place, _, name = source.function.rpartition(":")
        if place.endswith(".py"):
            _require_function(local_path(place, field), name, field)
        elif importlib.util.find_spec(place.partition(".")[0]) is None:
            raise ConfigError(f"{field}: {source.function!r}: the package {place!r} is not installed; pip install it")


def _require_function(file: Path, name: str, field: str) -> None:
    try:
        tree = ast.parse(file.read_text())
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{field}: {str(file)!r} cannot be read as Python: {error}") from None
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    if name not in names and "*" not in names:
        raise ConfigError(f"{field}: {str(file)!r} defines no {name!r}; it has {', '.join(sorted(names)) or 'nothing'}")


def check_machine(config: PipelineConfig, stages: Iterable[StageName]) -> None:
    """ConfigError if a stage cannot run as its resources say: GPUs, precision, folders, packed rows, nodes.

    Of other machines only what is written down is looked at; what they have they say themselves before the ranks start.
    """
    for stage in stages:
        try:
            resources = config.resources.of(stage)
        except ValidationError as error:
            raise ConfigError(f"resources.stages.{stage}: {error.errors()[0]['msg']}") from None
        if resources.launcher == "local":
            _check_devices(config, stage, resources)
        else:
            _check_nodes(config, stage, resources)
        if stage == "ppo":
            _check_shared(config, resources)
        if (
            resources.launcher == "local"
            and resources.nvme_path
            and not os.access(Path(resources.nvme_path).expanduser(), os.W_OK)
        ):
            raise ConfigError(
                f"resources.nvme_path: {resources.nvme_path!r} is not a folder this process may write to; make it"
            )
        longest = config.data.max_prompt_tokens + config.data.max_response_tokens
        if stage == "sft" and resources.pack_tokens and resources.pack_tokens < longest:
            raise ConfigError(
                f"resources.pack_tokens: {resources.pack_tokens} is less than the longest row, data.max_prompt_tokens "
                f"+ max_response_tokens = {longest}; raise it"
            )


def _check_nodes(config: PipelineConfig, stage: StageName, resources: Resources) -> None:
    """ConfigError if the hostfile, the slots or the batch do not fit, or what starts the nodes is not here."""
    hosts.seats(
        resources, hosts.batch_of(stage, getattr(config, stage).model_dump()), field=hosts.BATCHES.get(stage, stage)
    )
    if resources.launcher == "hostfile":
        require_ssh(resources.cluster)
    if resources.launcher == "slurm" and not shutil.which("sbatch"):
        raise ConfigError(
            "resources.launcher: slurm needs sbatch on this machine; run it on a login node of the cluster"
        )
    if config.store.startswith("memory://"):
        raise ConfigError(f"store: {config.store} lives in this process alone, and nodes are others; use s3://")


def _check_shared(config: PipelineConfig, resources: Resources) -> None:
    """ConfigError for memory settings of a model of PPO that is another one seen without its adapters."""
    ppo = config.ppo
    for lora, role, owner in ((ppo.actor_lora, "reference", "actor"), (ppo.critic_lora, "reward", "critic")):
        if lora and not lora.also_train and role in resources.models:
            raise ConfigError(
                f"resources.stages.ppo.models.{role}: with ppo.{owner}_lora it is the {owner} without its adapters and lies "
                f"where the {owner} lies; set models.{owner} instead"
            )


def _check_devices(config: PipelineConfig, stage: StageName, resources: Resources) -> None:
    spec = getattr(config, stage)
    on_cpu = launch.accelerator() == "cpu"
    if on_cpu and getattr(spec, "precision", "") == "fp16":
        raise ConfigError(f"{stage}.precision: fp16 needs a GPU and this machine shows none; use bf16 or fp32")
    for name in ("lora", "actor_lora", "critic_lora"):
        lora: LoRASpec | None = getattr(spec, name, None)
        if lora and lora.quantize and on_cpu:
            raise ConfigError(f"{stage}.{name}.quantize: {lora.quantize} needs a GPU and this machine shows none")
    if stage != "data":
        launch.devices(resources.processes)  # the launcher's own rule, before the stages that come first
