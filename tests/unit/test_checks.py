"""What is refused before anything trains although every field by itself is right."""

from pathlib import Path

import pytest

from flows.checks import check_machine
from rlhf_core.config import load_config
from rlhf_core.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "deployments" / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(("lora", "role"), [("actor_lora", "reference"), ("critic_lora", "reward")])
def test_a_model_that_is_another_one_without_adapters_has_no_memory_settings_of_its_own(lora, role):
    memory = f"resources.stages.ppo={{models: {{{role}: {{zero_stage: 3}}}}}}"
    with pytest.raises(ConfigError, match=f"models.{role}"):
        check_machine(load_config(QUICKSTART, (f"ppo.{lora}.rank=4", memory)), ["ppo"])
    check_machine(load_config(QUICKSTART, (f"ppo.{lora}={{also_train: [norms]}}", memory)), ["ppo"])
