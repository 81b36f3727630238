"""A node fetches those parts of a stage's inputs that its ranks read, each once, and nothing else."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import ranks
import tiny

from rlhf_core.artifacts import ArtifactRef, require_manifest
from rlhf_core.store import Store

SMALL = {"max_steps": 1, "batch_size": 12}
PPO = {"steps": 1, "rollout_batch_size": 8, "minibatches": 1, "max_response_tokens": 4}
SPECS = {
    "sft": SMALL,
    "reward": SMALL,
    "dpo": SMALL,
    "ppo": PPO,
    "evaluate": {"prompts": 4, "max_response_tokens": 4, "perplexity": False},
}
READ = {
    "sft": ["data/tokenizer/*", "data/sft/*"],
    "reward": ["data/tokenizer/*", "data/reward/*", "sft/model/*"],
    "dpo": ["data/tokenizer/*", "data/reward/*", "sft/model/*"],
    "ppo": ["data/tokenizer/*", "data/ppo/train/*", "sft/model/*", "reward/model/*"],
    "evaluate": [
        "data/tokenizer/*", "data/ppo/test/*", "sft/model/*", "reward/model/*", "ppo/actor/*", "ppo/actor_ema/*", "*/metrics.jsonl",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory) -> Path:
    """A store whose artifacts hold all that stages leave; refs.json names them."""
    root = tmp_path_factory.mktemp("inputs")
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((tiny_root / "refs.json").read_text()).items()}
    old, store = tiny_root / "store", Store(f"file://{root}/store")
    shutil.copytree(old / refs["data"].id, root / "store" / refs["data"].id)
    sft, reward = old / refs["sft"].id / "model", old / refs["reward"].id / "model"
    parts = {
        "sft": {"model": sft, "adapter": sft},
        "reward": {"model": reward, "adapter": reward},
        "ppo": {"actor": sft, "actor_ema": sft, "critic": reward, "snapshots/step-000001": sft},
    }
    made = {"data": refs["data"]}
    for stage, folders in parts.items():
        for name, folder in folders.items():
            shutil.copytree(folder, root / stage / name)
        (root / stage / "metrics.jsonl").write_text("")
        (root / stage / "answers.jsonl").write_text("{}\n")
        made[stage] = tiny.put(store, stage, root / stage, dict(made))
    (root / "refs.json").write_text(json.dumps({k: ref.model_dump() for k, ref in made.items()}))
    return root


@pytest.fixture(scope="module")
def fetched(root, tmp_path_factory) -> dict[str, list[str]]:
    out = tmp_path_factory.mktemp("fetched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(out))
        return ranks.run(2, "fetched", out, 200, root=str(root), specs=SPECS)


@pytest.mark.parametrize("stage", SPECS)
def test_two_ranks_fetch_every_file_that_they_read_once_and_no_other(root, fetched, stage):
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((root / "refs.json").read_text()).items()}
    store = Store(f"file://{root}/store")
    files = [f"{name}/{entry.path}" for name, ref in refs.items() for entry in require_manifest(store, ref).files]
    assert fetched[stage] == sorted(file for file in files if any(fnmatch(file, pattern) for pattern in READ[stage]))
