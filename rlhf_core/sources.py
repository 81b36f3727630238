"""Outside inputs: where they are, whether they are there, and a digest of what they hold.

A spec names outside inputs by place (a path, a hub name); its identity must not depend on places. `identity` is the spec as
plain JSON with each place replaced by the sha256 of its content (files) or by name@revision (hub). Digests of big files are
remembered by path, size and modification time under `~/.cache/rlhf`.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from rlhf_core import quickstart
from rlhf_core.artifacts import sha256_file
from rlhf_core.data import known
from rlhf_core.errors import ConfigError, StoreError
from rlhf_core.specs import (
    DataSpec,
    FileSource,
    FunctionReward,
    HTTPReward,
    HubSource,
    ModelSpec,
    QuickstartSource,
    RewardSource,
    Source,
)

# What defines a model or tokenizer folder; other files (README, optimizer states) do not.
PICKLED = (".bin", ".pt", ".pth")
WEIGHTS = ("*.safetensors", "*.gguf", *(f"*{suffix}" for suffix in PICKLED))
MODEL_FILES = (*WEIGHTS, "*.json", "*.model", "*.txt", "*.jinja")
TRAINING_STATE = ("optimizer", "scheduler", "scaler", "training_args", "rng_state")  # as transformers' Trainer names it


def is_hub_name(path: str) -> bool:
    """Whether a model path can only be a hub name: `owner/name` or `name`, nothing on this disk."""
    return not path.startswith((".", "/", "~", "package:")) and path.count("/") <= 1 and not path.endswith(".gguf")


def local_path(path: str, field: str) -> Path:
    """The place on this disk that `path` names; ConfigError if nothing is there.

    `package:NAME/FILE` is a file inside an installed Python package.
    """
    if path.startswith("package:"):
        package, _, inner = path.removeprefix("package:").partition("/")
        # Found without importing it: only its files are wanted, not what its code needs.
        module = importlib.util.find_spec(package)
        if module is None or not module.submodule_search_locations:
            raise ConfigError(f"{field}: {path!r}: the package {package!r} is not installed; pip install it")
        found = Path(module.submodule_search_locations[0]) / inner
    else:
        found = Path(path).expanduser()
    if not found.exists():
        raise ConfigError(
            f"{field}: {path!r} does not exist (looked for {found.absolute()}); paths are relative to the working directory"
        )
    return found


def resolve_model(path: str, field: str = "model.path") -> str:
    """What transformers can load: a local path, or the hub name as it is."""
    if Path(path).expanduser().exists() or not is_hub_name(path):
        return str(local_path(path, field))
    return path


def digest(path: Path) -> str:
    """sha256 over a file, or over the names and contents of a model folder's defining files."""
    if path.is_file():
        return _file_digest(path)
    text = "".join(f"{f.name}\0{_file_digest(f)}\n" for f in _files(path, MODEL_FILES))
    return hashlib.sha256(text.encode()).hexdigest()


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a model folder by their names' patterns, without the state of an optimizer that made them."""
    found = {f for pattern in patterns for f in folder.glob(pattern) if f.is_file()}
    return sorted(f for f in found if f.suffix not in PICKLED or not f.name.startswith(TRAINING_STATE))


def _require_weights(path: str, field: str) -> None:
    """ConfigError if a model's path is a folder on this disk without weights."""
    if "://" in path or (is_hub_name(path) and not Path(path).expanduser().exists()):
        return
    folder = local_path(path, field)
    if folder.is_dir() and not _files(folder, WEIGHTS):
        raise ConfigError(
            f"{field}: the folder {path!r} holds no model: none of its files is {', '.join(WEIGHTS)}; name the folder that "
            "config.json and the weights are in (a tokenizer's folder belongs in data.tokenizer.path)"
        )


def _file_digest(path: Path) -> str:
    stat = path.stat()
    if stat.st_size < 64 << 20:
        return sha256_file(path)
    return _remembered(f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}", lambda: sha256_file(path))


def _remote_digest(url: str, field: str) -> str:
    """sha256 of an object in object storage: read once, then remembered by URL, size and version."""
    import fsspec

    def read() -> str:
        with files.open(inner, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    try:
        files, inner = fsspec.core.url_to_fs(url)
        info = files.info(inner)
        version = info.get("ETag") or info.get("etag")
        return _remembered(f"{url}:{info['size']}:{version}", read) if version else read()
    except FileNotFoundError:
        raise ConfigError(f"{field}: {url!r} does not exist") from None
    except Exception as error:
        raise StoreError(f"{field}: {url}: {type(error).__name__}: {error}") from error


def _remembered(key: str, compute: Callable[[], str]) -> str:
    memory = Path.home() / ".cache" / "rlhf" / "digests.json"
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = compute()
        try:
            memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = memory.with_name(f"{memory.name}.{os.getpid()}")
            temporary.write_text(json.dumps(known))
            temporary.replace(memory)
        except OSError:
            pass  # a memory that cannot be kept only costs hashing again
    return str(known[key])


Digest = Callable[[str, str], str]


def content_id(path: str, field: str) -> str:
    """Identity of what a path holds: its digest on this disk or in object storage, `hub:NAME` for a hub name."""
    if "://" in path:
        return f"sha256:{_remote_digest(path, field)}"
    if not Path(path).expanduser().exists() and is_hub_name(path):
        return f"hub:{path}"
    return f"sha256:{digest(local_path(path, field))}"


def model_identity(model: ModelSpec, of: Digest = content_id, field: str = "model.path") -> dict[str, Any]:
    """Identity of a model: digest for a pretrained one, family and sizes for a new one.

    Raises:
        ConfigError: nothing is at its path, or a folder without weights.
    """
    if model.path:
        if of is content_id:
            _require_weights(model.path, field)
        return {"content": of(model.path, field), "revision": model.revision}
    return model.model_dump(mode="json", exclude={"path", "revision"})


def data_identity(spec: DataSpec, of: Digest = content_id) -> dict[str, Any]:
    """Identity of a data spec: paths replaced by digests, and nothing of how rows are fetched."""
    dumped = spec.model_dump(mode="json")
    dumped["sources"] = [_source_identity(s, of, f"data.sources[{i}]") for i, s in enumerate(spec.sources)]
    if spec.pretrain is not None:
        dumped["pretrain"] = [_source_identity(s, of, f"data.pretrain[{i}]") for i, s in enumerate(spec.pretrain)]
    if spec.tokenizer.path:
        dumped["tokenizer"]["path"] = of(spec.tokenizer.path, "data.tokenizer.path")
    return dumped


def _source_identity(source: Source, of: Digest, field: str) -> dict[str, Any]:
    identity = source.model_dump(mode="json")
    if isinstance(source, QuickstartSource):
        identity["version"] = quickstart.VERSION
    if isinstance(source, FileSource):
        for name in ("paths", "test_paths"):
            if identity[name] is not None:
                identity[name] = [of(path, f"{field}.{name}") for path in identity[name]]
    if isinstance(source, HubSource):
        identity["streaming"] = None
        # `datasets` prefers a folder of that name in the working directory; then its content counts, and what its name
        # says about its columns, not where it is.
        if Path(source.name).is_dir():
            identity["name"] = f"sha256:{_folder_digest(Path(source.name))}"
            identity["known_as"] = known.key_of(source)
    return identity


def _folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of all files below a folder."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    text = "".join(f"{f.relative_to(folder).as_posix()}\0{_file_digest(f)}\n" for f in files)
    return hashlib.sha256(text.encode()).hexdigest()


def rewards_identity(rewards: Sequence[RewardSource], of: Digest = content_id) -> list[dict[str, Any]]:
    """Identity of reward sources: what a function's code is, and an endpoint's name, not where or how it is asked.

    A function of a `.py` file is identified by the digest of that file alone, one of `module:name` by its name, the digest
    of the module's file and the installed version of the package it belongs to, as far as they are installed here. What
    that code imports is not looked at; raise `ppo.revision` when it has changed.
    """
    identities = []
    for i, source in enumerate(rewards):
        identity = source.model_dump(mode="json")
        if isinstance(source, HTTPReward):
            identity = {k: v for k, v in identity.items() if k in ("kind", "name", "weight", "mean", "std")}
        if isinstance(source, FunctionReward) and ".py:" in source.function:
            path, _, name = source.function.rpartition(":")
            identity["function"] = f"{of(path, f'ppo.rewards[{i}].function')}:{name}"
        elif isinstance(source, FunctionReward):
            identity |= _module_identity(source.function.rpartition(":")[0])
        identities.append(identity)
    return identities


def _module_identity(name: str) -> dict[str, Any]:
    """`version` of the package and `module`, the digest of the file, of an importable module, which is not imported."""
    top, *inner = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for i in range(len(inner)):  # find_spec("a.b") would import a
            where = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(".".join((top, *inner[: i + 1])), where) if where else None
    except (ImportError, ValueError):
        spec = None
    file = Path(spec.origin) if spec and spec.has_location and spec.origin else None
    owners = sorted(set(importlib.metadata.packages_distributions().get(top, ())))
    versions = [f"{owner} {importlib.metadata.version(owner)}" for owner in owners]
    return {
        "version": ", ".join(versions) or None,
        "module": f"sha256:{_file_digest(file)}" if file and file.is_file() else None,
    }


def check_positions(model: ModelSpec, prompt: int, response: int) -> None:
    """ConfigError if a pretrained model on this disk has too few positions for the longest prompt and response.

    Hub names and .gguf files are checked by the job, when it has loaded them.
    """
    if model.path is None or (is_hub_name(model.path) and not Path(model.path).exists()):
        return
    file = local_path(model.path, "model.path") / "config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text())
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    require_positions(limit, prompt, response, model.path)


def require_positions(limit: int | None, prompt: int, response: int, whose: str) -> None:
    """ConfigError if the longest prompt and response exceed `limit` positions; None is no limit."""
    if limit is not None and prompt + response > limit:
        raise ConfigError(
            f"data.max_prompt_tokens {prompt} + max_response_tokens {response} = {prompt + response} exceeds the "
            f"{limit} positions of {whose}; shorten one of them"
        )
