"""The demo's promises, on the quickstart itself: half an hour on two cores, so marked slow.

All runs share one store, so the data, SFT and reward stages are built once for each seed and reused by the controls.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import guard
from rlhf_core.artifacts import Manifest
from rlhf_core.config import load_config
from rlhf_core.plan import make_plan
from rlhf_core.store import Store

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "deployments" / "configs" / "quickstart.yaml"
PARTS = ("count", "category", "distinct", "polite")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(f"file://{tmp_path_factory.mktemp('store')}")


def command(config: Path, store: Store, *sets: str) -> list[str]:
    options = [word for text in (f"store={store.url}", *sets) for word in ("--set", text)]
    return [str(Path(sys.executable).with_name("rlhf")), "run", str(config), *options]


def run(store: Store, *sets: str, config: Path = QUICKSTART, stage: str | None = None) -> dict[str, Any]:
    """Run the pipeline, or one stage of it; the metrics of the evaluation, or of that stage."""
    only = ["--stage", stage] if stage else []
    done = subprocess.run([*command(config, store, *sets), *only], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    plan = {p.stage: p for p in make_plan(load_config(config, (f"store={store.url}", *sets)), store)}
    assert stage or all(p.action == "reuse" for p in plan.values())
    key = f"{plan[stage or 'evaluate'].ref.id}/manifest.json"
    return Manifest.model_validate_json(store.read(key)).metrics


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_raises_gold_and_every_part_of_it_far_above_sft(store, seed):
    m = run(store, f"seed={seed}")
    assert m["gold_gain"] > 0.15 and m["gold_gain_low"] > 0
    for part in PARTS:
        assert m[f"gold_{part}_ppo"] > m[f"gold_{part}_sft"] + 0.03, part
    assert m["kl_sequence"] < 20 and m["eos_rate_ppo"] > 0.95 and m["eos_rate_sft"] > 0.95


VARIANTS = {
    "dpo": ("method=dpo", "dpo.optim.lr=3e-4", "dpo.batch_size=32"),
    "rloo": ("ppo.advantage=rloo", "ppo.rollout_batch_size=32"),
    "reinforce++": ("ppo.advantage=reinforce++",),
    "grpo": ("ppo.advantage=grpo", "ppo.rollout_batch_size=32"),
    "mixture": ("ppo.ptx.coef=0.5",),
    "lora": ("ppo.actor_lora.rank=8", "ppo.critic_lora.rank=8", "ppo.actor_optim.lr=2e-3", "ppo.critic_optim.lr=2e-3"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_other_way_to_learn_preferences_raises_gold_too(store, variant):
    m = run(store, *VARIANTS[variant])
    shown = ("gold_sft", "gold_gain", "gold_gain_low", "gold_gain_high", "kl_sequence")
    print(variant, {k: round(v, 3) for k, v in m.items() if k in shown or k.startswith("perplexity")})
    assert m["gold_gain"] > 0.15 and m["gold_gain_low"] > 0


def test_the_mixture_loss_keeps_the_perplexity_of_what_was_learned_before(store):
    plain, mixed = run(store), run(store, *VARIANTS["mixture"])
    assert mixed["perplexity_ppo"] < 0.75 * plain["perplexity_ppo"]


def test_a_reward_model_learns_what_the_labels_say_and_nothing_from_random_ones(store):
    def accuracy(*sets: str) -> float:
        return run(store, *sets, stage="reward")["eval_accuracy"]

    random = [accuracy(f"reward.seed={seed}", "reward.flip_labels=0.5") for seed in range(3)]
    found = accuracy(), accuracy("reward.flip_labels=1.0"), random
    print("accuracy of honest, flipped and random labels:", found)
    assert found[0] > 0.75 and found[1] < 0.25 and abs(sum(random) / 3 - 0.5) < 0.05


def test_a_second_run_reuses_everything_quickly_and_a_new_kl_builds_only_ppo_and_evaluate(store):
    run(store)
    began = time.monotonic()
    run(store)
    print(f"all reused: {time.monotonic() - began:.1f} s")
    plan = make_plan(load_config(QUICKSTART, (f"store={store.url}", "ppo.kl_coef=0.3")), store)
    assert [p.stage for p in plan if p.action == "build"] == ["ppo", "evaluate"]


def test_learning_rate_zero_leaves_gold_where_it_was(store):
    m = run(store, "ppo.actor_optim.lr=0", "ppo.steps=10")
    assert m["gold_ppo"] == m["gold_sft"] and m["kl_sequence"] == pytest.approx(0, abs=1e-4)


def test_a_huge_kl_coefficient_keeps_kl_near_zero(store):
    m = run(store, "ppo.kl_coef=10", "ppo.steps=30")
    assert m["kl_sequence"] < 0.5 and abs(m["gold_gain"]) < 0.1


def test_a_reward_model_trained_on_flipped_labels_makes_gold_fall(store):
    m = run(store, "reward.flip_labels=1.0", "ppo.steps=30")
    assert m["gold_gain_high"] < -0.05


def test_another_family_learns_it_too(store):
    m = run(store, "model.family=gpt2")
    assert m["gold_gain"] > 0.1 and m["gold_gain_low"] > 0


def test_kill_9_of_the_process_group_in_the_middle_of_ppo_leaves_nothing_and_the_next_run_goes_on(store):
    sets = ("ppo.steps=25", "ppo.kl_coef=0.07", "resources.checkpoint.every_steps=1")
    process = subprocess.Popen(
        command(QUICKSTART, store, *sets),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    config = load_config(QUICKSTART, (f"store={store.url}", *sets))
    ref = {p.stage: p.ref for p in make_plan(config, store)}["ppo"]
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ppo: train rollout"):
            break
    carriers = [pid for pid in guard.pids() if (guard.variable(pid, "RLHF_JOB_ID") or "").startswith(ref.id)]
    assert carriers
    os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while left := [p for p in carriers if Path(f"/proc/{p}").exists()]:
        assert time.monotonic() < deadline, f"orphans: {left}"
        time.sleep(0.2)
    assert f"{ref.id}/manifest.json" not in store.list("")
    plan = {p.stage: p.action for p in make_plan(config, store)}
    assert plan == {"data": "reuse", "sft": "reuse", "reward": "reuse", "ppo": "resume", "evaluate": "build"}
    run(store, *sets)


def test_stories_of_a_real_model_become_happier_by_somebody_elses_measure(store, shared):
    pytest.importorskip("vaderSentiment")
    m = run(store, config=ROOT / "deployments" / "configs" / "stories.yaml")
    print(json.dumps({k: v for k, v in m.items() if "gold" in k or "perplexity" in k}, indent=1))
    assert m["gold_gain"] > 0.1 and m["gold_gain_low"] > 0
