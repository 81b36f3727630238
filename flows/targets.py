"""What a word on the command line stands for: a stage, a store, an artifact, a model in one, or a model elsewhere.

A target is `CONFIG[:STAGE[/FOLDER]]`, `ARTIFACT[:FOLDER]` (an artifact by the beginning of its id, name or fingerprint, or by
an alias, `@NAME` or `@NAME~1`), a model's folder or .gguf file, or `hub:NAME`. Nothing is fetched before the target is known to
exist. No Prefect, no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flows.selection import require_stage
from rlhf_core.aliases import resolve_alias
from rlhf_core.artifacts import ArtifactRef, Manifest, fetch, read_manifest, survey
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.errors import ConfigError
from rlhf_core.plan import stage_refs
from rlhf_core.specs import STAGES, StageName
from rlhf_core.store import Store

DEFAULT_STORE = PipelineConfig.model_fields["store"].default
MODEL_FOLDERS: dict[StageName, str] = {"sft": "model", "ppo": "actor", "dpo": "model"}  # language models
CACHE = Path.home() / ".cache" / "rlhf" / "artifacts"  # of what is not on this disk already


@dataclass(frozen=True)
class Target:
    """What a target stands for: an artifact in its store, or a model outside of any.

    Attributes:
        text: as it was written.
        store: where the artifact is.
        manifest: of the artifact; None for a model elsewhere.
        folder: of the model inside the artifact, if one was named.
        path: of the model elsewhere, or a hub name.
        config: the pipeline, if the target was one.
    """

    text: str
    store: Store
    manifest: Manifest | None = None
    folder: str | None = None
    path: str | None = None
    config: PipelineConfig | None = None

    @property
    def stage(self) -> StageName | None:
        """The artifact's stage."""
        return self.manifest.ref.stage if self.manifest else None

    @property
    def name(self) -> str:
        """What the model is called in tables, e.g. ppo/quickstart-2bb704f4ed5d:actor_ema."""
        if self.manifest is None:
            return self.text
        return f"{self.manifest.ref.id}:{self.folder}" if self.folder else self.manifest.ref.id

    def model(self) -> str:
        """A local folder with the language model (fetched if need be), or a hub name; ConfigError if it has none."""
        if self.manifest is None:
            assert self.path
            return self.path
        folder = model_folder(self.manifest, self.folder)
        return str(fetch(self.store, self.manifest.ref, CACHE)[0] / folder)

    def input(self, stage: str) -> ArtifactRef | None:
        """An input of the artifact."""
        return self.manifest.inputs.get(stage) if self.manifest else None


def resolve(text: str, *, stage: str | None = None, sets: Iterable[str] = (), store: str | None = None) -> Target:
    """What `text` stands for.

    Args:
        text: see the module.
        stage: with a configuration that names none: whose artifact; default the last stage that trains a model.
        sets: overrides of a configuration.
        store: another store than the configuration's, or than the default one.

    Raises:
        ConfigError: there is no such thing, or it is not published.
    """
    if text.startswith("hub:"):
        return Target(text, Store(store or DEFAULT_STORE), path=text.removeprefix("hub:"))
    base, colon, part = text.rpartition(":")
    base, part = (base, part) if colon and not part.startswith("//") and not Path(text).exists() else (text, "")
    if base.endswith((".yaml", ".yml")):
        named, _, folder = part.partition("/")
        return _of_config(text, base, named or stage, folder or None, sets, store)
    if (Path(base) / "config.json").is_file() or (base.endswith(".gguf") and Path(base).is_file()):
        return Target(text, Store(store or DEFAULT_STORE), path=base)
    place = Store(store or DEFAULT_STORE)
    return Target(text, place, find_artifact(place, base), part or None)


def _of_config(
    text: str, file: str, stage: str | None, folder: str | None, sets: Iterable[str], store: str | None
) -> Target:
    config = load_config(file, sets)
    wanted = stage_name(stage) if stage else config.method
    require_stage(config, wanted)
    place = Store(store or config.store)
    ref = stage_refs(config)[wanted]
    manifest = read_manifest(place, ref)
    if manifest is None:
        raise ConfigError(f"{ref.id} is not published in {place.url}; make it with `rlhf run {file}`")
    return Target(text, place, manifest, folder, config=config)


def stage_name(text: str) -> StageName:
    """The stage of that name; ConfigError if there is none."""
    for stage in STAGES:
        if text == stage:
            return stage
    raise ConfigError(f"{text!r} is no stage; the stages are {', '.join(STAGES)}")


def store_of(url: str | None, config: Path | None) -> Store:
    """The store of `--store` or of a configuration; ConfigError for both."""
    if url and config:
        raise ConfigError("--store and --config exclude each other; keep one")
    return Store(load_config(config).store if config else url or DEFAULT_STORE)


def find_artifact(store: Store, id: str) -> Manifest:
    """The one artifact whose id, name or fingerprint begins with `id`, or that `@NAME` or `@NAME~1` stands for.

    Raises:
        ConfigError: there is none, or there are several.
        IntegrityError: its manifest, or the alias, is damaged.
    """
    if id.startswith("@"):
        return _of_alias(store, id)
    wanted = id.removeprefix(f"{store.url}/").rstrip("/")
    manifests, damaged = survey(store)
    exact = [m for m in manifests if m.ref.id == wanted]
    names = ((m, (m.ref.id, m.ref.id.partition("/")[2], m.ref.fingerprint)) for m in manifests)
    found = exact or [m for m, keys in names if any(key.startswith(wanted) for key in keys)]
    if len(found) == 1:
        return found[0]
    if not found:
        for other, error in damaged.items():
            if other.startswith(wanted) or other.partition("/")[2].startswith(wanted):
                raise error
        raise ConfigError(
            f"no artifact begins with {id!r} in {store.url}; see `rlhf artifacts list --store {store.url}`"
        )
    raise ConfigError(f"{id!r} is the beginning of {len(found)} ids: {', '.join(m.ref.id for m in found)}")


def _of_alias(store: Store, text: str) -> Manifest:
    ref = resolve_alias(store, text)
    manifest = read_manifest(store, ref)
    if manifest is None:
        raise ConfigError(f"{text} stands for {ref.id}, which is not published in {store.url} any more")
    return manifest


def model_folder(manifest: Manifest, name: str | None = None) -> str:
    """The folder of an artifact that holds its language model, or the one named; ConfigError if there is none."""
    ref = manifest.ref
    if ref.stage not in MODEL_FOLDERS:
        raise ConfigError(f"{ref.id} holds no language model; choose an artifact of {' or '.join(MODEL_FOLDERS)}")
    folders = sorted({entry.path.rpartition("/")[0] for entry in manifest.files} - {""})
    wanted = (name or MODEL_FOLDERS[ref.stage]).strip("/")
    if wanted not in folders:
        raise ConfigError(f"{ref.id} has no folder {wanted!r}; it has {', '.join(folders)}")
    return wanted
