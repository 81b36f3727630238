"""PPO's variants on real process groups: adapters on shared weights, average, mixture loss, no critic, settings per model."""

import pytest
import ranks
from test_same_losses import same_weights

OPTIM = {"lr": 3e-3, "schedule": "constant"}
COMMON = {"steps": 5, "rollout_batch_size": 8, "ppo_epochs": 2, "max_response_tokens": 8, "actor_optim": OPTIM}
LORA = {"rank": 4, "alpha": 8.0}
SPECS = {
    "lora": {
        **COMMON, "critic_optim": OPTIM, "actor_lora": LORA, "critic_lora": LORA, "ema": {"decay": 0.9},
        "ptx": {"coef": 0.5, "batch_size": 5}, "kl_controller": "adaptive",
    },
    "grpo": {**COMMON, "advantage": "grpo", "samples_per_prompt": 2, "minibatches": 2},
}  # fmt: skip
NAMES = ("actor_loss", "critic_loss", "score", "kl_sequence", "approx_kl", "entropy", "kl_coef", "ptx_loss", "kl_loss")


def run(root, out, spec: str, world: int = 1, **resources) -> list[dict]:
    rows = ranks.run(world, "stage", out, root=str(root), name="ppo", spec=SPECS[spec], resources=resources)
    return [row for row in rows if row["kind"] == "train"]


@pytest.fixture(scope="module")
def plain(tiny_root, tmp_path_factory):
    """One process, everything whole; made once for each spec."""
    made: dict[str, tuple] = {}

    def get(spec: str):
        if spec not in made:
            out = tmp_path_factory.mktemp(spec)
            made[spec] = run(tiny_root, out, spec), out / "out-0"
        return made[spec]

    return get


@pytest.mark.parametrize(
    ("spec", "world", "resources"),
    [
        ("lora", 1, {"micro_batch": 3}),
        pytest.param("lora", 2, {"zero_stage": 2, "micro_batch": 2}, marks=pytest.mark.slow),
        ("lora", 2, {"zero_stage": 3, "micro_batch": 2}),
        ("lora", 2, {"models": {"actor": {"zero_stage": 3}, "critic": {"zero_stage": 1}}}),
        ("grpo", 2, {"micro_batch": 3}),
        ("grpo", 2, {"zero_stage": 3, "models": {"reward": {"zero_stage": 0}}}),
    ],
    ids=["lora-accumulate", "lora-zero-2", "lora-zero-3", "lora-mixed", "grpo-2-processes", "grpo-zero-3-mixed"],
)
def test_every_variant_gives_the_losses_of_the_plain_process(spec, world, resources, tiny_root, plain, tmp_path):
    rows = run(tiny_root, tmp_path, spec, world, **resources)
    expected, folder = plain(spec)
    assert len(rows) == len(expected) == 5
    for row, wanted in zip(rows, expected, strict=True):
        for name in NAMES:
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], rel=3e-4, abs=3e-4), (row["step"], name)
    same_weights(tmp_path / "out-0", folder)


def test_everything_that_was_asked_for_is_saved(plain):
    _, folder = plain("lora")
    assert {p.parent.name for p in folder.rglob("*.safetensors")} == {
        "actor", "critic", "actor_ema", "actor_adapter", "critic_adapter"
    }  # fmt: skip
    _, folder = plain("grpo")
    assert {p.parent.name for p in folder.rglob("*.safetensors")} == {"actor"}
