"""Fixtures of all tests: settings that keep everything on this machine, tiny artifacts, and the shared real data if it is there."""

import json
import os
from pathlib import Path

import pytest
from hosts import hosts, hosts_s3, network, network_s3  # noqa: F401  (fixtures)
from s3 import bucket, s3, s3_server  # noqa: F401  (fixtures)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository; skips where there is none."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory) -> Path:
    """A folder with a store of tiny data, SFT and reward artifacts; refs.json names them."""
    import tiny

    from rlhf_core.store import Store

    root = tmp_path_factory.mktemp("tiny")
    store = Store(f"file://{root}/store")
    data = tiny.make_data(store, root)
    sft, reward = tiny.make_models(store, root, data)
    refs = {"data": data, "sft": sft, "reward": reward}
    (root / "refs.json").write_text(json.dumps({k: v.model_dump() for k, v in refs.items()}))
    return root


@pytest.fixture(scope="session")
def folders(tiny_root) -> dict[str, str]:
    """Folders of the tiny tokenizer, SFT model ("actor") and reward model ("critic")."""
    from rlhf_core.artifacts import ArtifactRef

    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((tiny_root / "refs.json").read_text()).items()}
    store = tiny_root / "store"
    return {
        "tokenizer": str(store / refs["data"].id / "tokenizer"),
        "actor": str(store / refs["sft"].id / "model"),
        "critic": str(store / refs["reward"].id / "model"),
    }
