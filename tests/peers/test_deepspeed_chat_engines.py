"""Faults of DeepSpeed-Chat that concern its engines: ZeRO-3 in training and generation, several ranks, memory, saving.

Each test fails if we have the fault; `test_deepspeed_chat_faults.py` has the table of all faults.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import small_ppo
import torch

from rlhf_core.specs import PPOSpec


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> small_ppo.Folders:
    """Models with weights that ZeRO-3 does divide; those below 10,000 numbers it keeps whole after the first pass."""
    return small_ppo.save(tmp_path_factory.mktemp("wide"), small_ppo.language_model(eos_bias=2.0, width=128))


def test_gradient_checkpointing_recomputes_in_ppo_too(tmp_path):
    folders = small_ppo.save(tmp_path, small_ppo.language_model("llama"))
    trainer = small_ppo.ppo(folders, PPOSpec(max_response_tokens=8, ppo_epochs=1), gradient_checkpointing=True)
    out = trainer.generate_experience(small_ppo.prompts(4))
    passes: list[int] = []
    trainer.engine.actor.module.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    trainer.train_rlhf(out)
    assert len(passes) == 2, "once forward and once more in the backward pass"


def test_zero_3_goes_from_training_to_generation_and_back_with_the_numbers_of_zero_0(wide):
    found = []
    for stage in (0, 3):
        trainer = small_ppo.ppo(wide, PPOSpec(max_response_tokens=8), zero_stage=stage)
        for _ in range(2):
            trainer.train_rlhf(trainer.generate_experience(small_ppo.prompts(8)))
        found.append([trainer.metrics[name] for name in ("score", "kl_sequence", "critic_loss", "response_length")])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)


def test_models_saved_at_zero_3_are_whole(wide, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    trainer = small_ppo.ppo(wide, zero_stage=3)
    trainer.engine.save(tmp_path / "actor", tmp_path / "critic")
    for kind, name, source in (
        (AutoModelForCausalLM, "actor", wide.actor),
        (AutoModelForSequenceClassification, "critic", wide.reward),
    ):
        saved, expected = kind.from_pretrained(tmp_path / name).state_dict(), kind.from_pretrained(source).state_dict()
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[key], expected[key]) for key in expected), name


LOCK_STEP = """
import json, os, sys, small_ppo
folders = small_ppo.Folders(*json.loads(sys.argv[1]), small_ppo.tiny.tokenizer())
trainer = small_ppo.ppo(folders, small_ppo.PPOSpec(max_response_tokens=40), models={"actor": {"zero_stage": 3}})
rank = trainer.ranks.rank
asked = small_ppo.prompts(17)["prompt"]
mine = [0] if rank == 0 else list(range(1, 17))
out = trainer.generate_experience({"prompt": [asked[i] for i in mine], "sample_ids": mine})
print("LENGTHS", json.dumps(out.response_mask.sum(1).tolist()), flush=True)
os._exit(0)
"""


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_ranks_whose_answers_end_at_different_lengths_do_not_wait_for_each_other(wide):
    tests = Path(__file__).parents[1]
    paths = [str(tests.parent), str(tests), str(tests / "peers"), os.environ.get("PYTHONPATH", "")]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOCK_STEP, json.dumps([wide.actor, wide.reward])]
    processes = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **common, "PYTHONPATH": os.pathsep.join(paths), "RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]  # fmt: skip
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [line for text in printed for line in text.splitlines() if line.startswith("LENGTHS")]
    first, others = (json.loads(line.removeprefix("LENGTHS ")) for line in lines)
    assert first[0] < max(others), "the ranks did end at different lengths"
