"""What is refused before anything trains although every field by itself is right."""

from pathlib import Path

import pytest

from flows.checks import check_machine
from flows.show import show_nodes
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.errors import ConfigError

QUICKSTART = Path(__file__).parents[2] / "deployments" / "configs" / "quickstart.yaml"


@pytest.mark.parametrize(("lora", "role"), [("actor_lora", "reference"), ("critic_lora", "reward")])
def test_a_model_that_is_another_one_without_adapters_has_no_memory_settings_of_its_own(lora, role):
    memory = f"resources.stages.ppo={{models: {{{role}: {{zero_stage: 3}}}}}}"
    with pytest.raises(ConfigError, match=f"models.{role}"):
        check_machine(load_config(QUICKSTART, (f"ppo.{lora}.rank=4", memory)), ["ppo"])
    check_machine(load_config(QUICKSTART, (f"ppo.{lora}={{also_train: [norms]}}", memory)), ["ppo"])


# --- nodes -----------------------------------------------------------------------------------------------------------


def nodes(launcher: str, cluster: str, *sets: str) -> PipelineConfig:
    common = (
        f"resources.launcher={launcher}",
        f"resources.cluster={{{cluster}}}",
        "resources.stages={}",
        "store=s3://b/x",
    )
    return load_config(QUICKSTART, (*common, *sets))


def test_a_hostfile_is_read_before_anything_trains(tmp_path):
    (file := tmp_path / "hostfile").write_text("a slots=2\nb slots=2\nc slots=2\n")
    check_machine(nodes("hostfile", f"hosts: {file}, nodes: 2"), ["sft"])
    with pytest.raises(ConfigError, match=r"sft.batch_size = \d+ cannot be divided among 3 nodes"):
        check_machine(nodes("hostfile", f"hosts: {file}"), ["sft"])
    check_machine(nodes("hostfile", f"hosts: {file}"), ["evaluate"])
    with pytest.raises(ConfigError, match=r"a has 2 slots, and resources.processes is 4"):
        check_machine(nodes("hostfile", f"hosts: {file}, nodes: 2", "resources.processes=4"), ["evaluate"])
    file.write_text("a slots=2\nb\n")
    with pytest.raises(ConfigError, match=f"{file}:2: 'b': write NAME slots=N"):
        check_machine(nodes("hostfile", f"hosts: {file}"), ["sft"])


def test_what_this_machine_lacks_is_no_matter_when_others_compute(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_machine(nodes("hostfile", "hosts: [a, b]", "sft.precision=fp16"), ["sft"])
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        check_machine(load_config(QUICKSTART, ("sft.precision=fp16",)), ["sft"])


def test_what_starts_the_nodes_must_be_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="slurm needs sbatch"):
        check_machine(nodes("slurm", "nodes: 2"), ["sft"])
    with pytest.raises(ConfigError, match=r"resources.cluster.ssh: 'ssh' is no command here"):
        check_machine(nodes("hostfile", "hosts: [a, b]"), ["sft"])
    check_machine(nodes("nodes", "nodes: 2"), ["sft"])


def test_a_store_in_this_process_s_memory_is_none_for_nodes():
    with pytest.raises(ConfigError, match="memory://x"):
        check_machine(nodes("nodes", "nodes: 2", "store=memory://x"), ["sft"])


def test_the_plan_names_the_nodes_of_each_stage_and_says_that_a_folder_must_be_shared(tmp_path, capfd):
    (file := tmp_path / "hostfile").write_text("a slots=2\nme@b slots=2\n")
    config = nodes("hostfile", f"hosts: {file}", "resources.processes=2", f"store=file://{tmp_path}")
    show_nodes(config, ["data", "sft", "evaluate"])
    assert capfd.readouterr().out.splitlines() == [
        "nodes   sft, evaluate: 2 x 2 processes over ssh: a, me@b",
        f"store   file://{tmp_path}: all nodes must see it, on a file system that they share",
    ]
    show_nodes(nodes("slurm", "nodes: 4", "resources.processes=1"), ["sft"])
    assert capfd.readouterr().out == "nodes   sft: 4 x 1 processes by Slurm\n"
    show_nodes(load_config(QUICKSTART), ["data", "sft"])
    assert capfd.readouterr().out == ""
