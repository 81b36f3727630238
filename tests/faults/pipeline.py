"""The pipeline of the fault tests (`faults.yaml`): its undisturbed run, its inputs in other stores, and whether two results agree.

A stage is run undisturbed when it is first asked for, in a local store, once a session. A chain of faults works in a store of
its own, with copies of the stage's inputs; so its artifact has the same id as the undisturbed one, and must have the same content.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_core.artifacts import ArtifactRef, Manifest, read_manifest
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.plan import stage_inputs, stage_refs
from rlhf_core.specs import StageName
from rlhf_core.store import Store
from rlhf_core.transfer import closure, copy

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CONFIG = HERE / "faults.yaml"
SAME_BYTES = (".safetensors", ".arrow", "answers.jsonl", "samples.jsonl")
SAME_NUMBERS = ("metrics.jsonl", "evaluation.json")


def overrides(stage: StageName, store: Store) -> tuple[str, ...]:
    """What differs from the file."""
    return (f"store={store.url}", f"method={'dpo' if stage == 'dpo' else 'ppo'}")


def command(stage: StageName, store: Store, *more: str, cli: bool = False) -> list[str]:
    """The command line of one stage: the test's driver, or the real `rlhf run`."""
    words = [*overrides(stage, store), *more]
    if not cli:
        return [sys.executable, str(HERE / "driver.py"), str(CONFIG), stage, *words]
    sets = [part for word in words for part in ("--set", word)]
    return [str(Path(sys.executable).with_name("rlhf")), "run", str(CONFIG), "--stage", stage, *sets]


def environment(temporary: Path, **more: str) -> dict[str, str]:
    """Of a control plane that keeps its local files in `temporary`, and takes over from a dead one quickly."""
    temporary.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    own = {"PYTHONPATH": path, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "RLHF_TERMINAL": "1"}
    return {**os.environ, **own, "RLHF_LEASE_BEAT": "1", "RLHF_LEASE_TTL": "6", **more}


class Pipeline:
    """The undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(f"file://{folder}/undisturbed")
        self.whole = cache(self._whole)

    def config(self, stage: StageName) -> PipelineConfig:
        return load_config(CONFIG, overrides(stage, self.store))

    def ref(self, stage: StageName) -> ArtifactRef:
        return stage_refs(self.config(stage))[stage]

    def manifest(self, stage: StageName) -> Manifest:
        """Of the undisturbed stage, which is built first if need be."""
        if found := read_manifest(self.store, self.ref(stage)):
            return found
        for name in stage_inputs(self.config(stage), stage):
            self.manifest(name)
        log = self.folder / f"undisturbed-{stage}.txt"
        with log.open("ab") as file:
            argv, env = command(stage, self.store), environment(self.folder / "tmp")
            done = subprocess.run(argv, cwd=ROOT, env=env, stdout=file, stderr=file, timeout=400)
        assert done.returncode == 0, log.read_text()[-4000:]
        found = read_manifest(self.store, self.ref(stage))
        assert found
        return found

    def _whole(self, stage: StageName) -> dict[str, Any]:
        """What an undisturbed run of the stage makes."""
        content = content_of(self.store, self.manifest(stage))
        assert len(content) > 1, content
        return content

    def lend_inputs(self, stage: StageName, target: Store) -> None:
        """Publish copies of a stage's inputs in another store."""
        inputs = [self.manifest(name) for name in stage_inputs(self.config(stage), stage)]
        for manifest in closure(self.store, inputs):
            copy(self.store, target, manifest)


def content_of(store: Store, manifest: Manifest) -> dict[str, Any]:
    """What must be the same in every run of a stage: weights, data and answers to the bit, all metrics but times."""
    found: dict[str, Any] = {"metrics": without_times(manifest.metrics)}
    for entry in manifest.files:
        if entry.path.endswith(SAME_BYTES):
            found[entry.path] = entry.sha256
        elif entry.path.endswith(SAME_NUMBERS):
            text = store.read(manifest.key(entry.path)).decode()
            rows = text.splitlines() if entry.path.endswith(".jsonl") else [text]
            found[entry.path] = [without_times(json.loads(row)) for row in rows]
    return found


def without_times(value: Any) -> Any:
    """A record without what is measured: times, rates, and what checkpoints have cost."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if "second" not in k and not k.startswith("checkpoint")}
    return [without_times(v) for v in value] if isinstance(value, list) else value
