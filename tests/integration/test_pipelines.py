"""Pipelines other than the demo's, whole and tiny, through the real launcher: DPO, and PPO on a Python function's reward."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import tiny
from huggingface_hub import ModelCard

from rlhf_core.artifacts import Manifest
from rlhf_core.config import PipelineConfig, parse_config
from rlhf_core.fired import values_of
from rlhf_core.gates import FINAL, LIVE
from rlhf_core.plan import make_plan
from rlhf_core.store import Store
from tasks.stage import build_stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pipelines")


def pipeline(folder: Path, **changes) -> PipelineConfig:
    """A pipeline of seconds; all share a store, so data and SFT are built once."""
    content = {
        **tiny.pipeline(folder),
        "sft": {"max_steps": 4},
        "dpo": {"max_steps": 4, "optim": {"lr": 1e-3}},
        "ppo": {"steps": 3, "rollout_batch_size": 8, "max_response_tokens": 8},
        "evaluate": {"prompts": 8, "gold": "quickstart", "max_response_tokens": 8},
        "resources": {"threads": 1},
    }
    return parse_config({**content, **changes})


def run(config: PipelineConfig) -> dict[str, Manifest]:
    """Every stage in order, as the flow runs them; the manifests."""
    store = Store(config.store)
    return {planned.stage: build_stage(store, config, planned).manifest for planned in make_plan(config, store)}


def unknown_to_gates(config: PipelineConfig, made: dict[str, Manifest]) -> list[str]:
    """Numbers of these stages, logged or final, on which no gate could be set."""
    found: list[str] = []
    for stage, manifest in made.items():
        final = [name for name, value in manifest.metrics.items() if isinstance(value, int | float)]
        found += [f"{stage} {name}" for name in final if not is_known(FINAL[stage], name)]
        rows = Store(config.store).read(manifest.key("metrics.jsonl")).splitlines() if stage in LIVE else []
        logged = {name for row in rows for name in values_of(json.loads(row))}
        found += [f"{stage} logs {name}" for name in sorted(logged) if not is_known(LIVE[stage], name)]
    return found


def is_known(names: str, name: str) -> bool:
    return any(fnmatchcase(name, known) for known in names.split())


def files(manifest: Manifest) -> set[str]:
    return {entry.path for entry in manifest.files}


def test_dpo_learns_from_the_pairs_and_is_evaluated_and_carded(folder):
    made = run(config := pipeline(folder, method="dpo"))
    assert unknown_to_gates(config, made) == []
    assert list(made) == ["data", "sft", "dpo", "evaluate"]
    assert {"model/config.json", "model/README.md", "metrics.jsonl"} <= files(made["dpo"])
    metrics = made["evaluate"].metrics
    assert metrics["prompts"] == 8 and {"gold_sft", "gold_dpo", "gold_gain", "kl_sequence"} <= set(metrics)
    assert "report.html" in files(made["evaluate"])
    place = Store(pipeline(folder).store).local_path(made["dpo"].key("model/README.md"))
    assert place is not None
    assert ModelCard.load(place).data.tags == ["rlhf", "dpo"]


def test_ppo_on_a_function_needs_no_reward_model_and_its_average_is_evaluated(folder, monkeypatch):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")
    judge = folder / "judge.py"
    judge.write_text(
        f"assert not __file__.startswith({str(folder)!r}), 'ranks take the copy that came with the job'\n"
        "def brief(prompts, responses):\n    return [-0.1 * len(text) for text in responses]\n"
    )
    rewards = [{"kind": "function", "function": f"{judge}:brief"}]
    ppo = {"steps": 3, "rollout_batch_size": 8, "rewards": rewards, "ema": {"decay": 0.5}, "snapshot_every": 2}
    config = pipeline(folder, ppo={**ppo, "max_response_tokens": 8})
    made = run(config)
    assert unknown_to_gates(config, made) == []
    assert list(made) == ["data", "sft", "ppo", "evaluate"]
    assert Store(config.store).read(f"{made['ppo'].ref.id}/attempts/0001/code/00-judge.py") == judge.read_bytes()
    models = {"actor", "actor_ema", "snapshots/step-000002"}
    assert {f"{name}/{file}" for name in models for file in ("config.json", "README.md")} <= files(made["ppo"])
    metrics = made["evaluate"].metrics
    assert {"gold_ppo", "gold_ppo_ema", "kl_sequence", "kl_sequence_ppo_ema"} <= set(metrics)
    assert not [name for name in metrics if name.startswith("reward")]
