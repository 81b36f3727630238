"""Every shipped configuration parses, and its fingerprints are pinned."""

import json
from pathlib import Path

import pytest

from rlhf_core.config import load_config
from rlhf_core.plan import stage_refs

CONFIGS = sorted((Path(__file__).parents[2] / "deployments" / "configs").glob("*.yaml"))
GOLDEN = Path(__file__).parents[1] / "golden" / "fingerprints.json"


def refs_of(path: Path) -> dict[str, str]:
    """Ids with outside content named by its path, so that they are the same where that content is absent."""
    config = load_config(path)
    return {stage: ref.id for stage, ref in stage_refs(config, of=lambda place, field: f"content of {place}").items()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_parses_and_plans(path):
    assert set(refs_of(path)) == {"data", "sft", "reward", "ppo", "evaluate"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_fingerprints_are_those_on_record(path):
    """A change here rebuilds everybody's artifacts. Meant? Then write the golden file anew: see README, Tests."""
    assert refs_of(path) == json.loads(GOLDEN.read_text())[path.stem]


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({p.stem: refs_of(p) for p in CONFIGS}, indent=1) + "\n")
