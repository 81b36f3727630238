"""The examples in deployments/clusters: every one is accepted as it is, and those that belong together agree."""

from pathlib import Path

import pytest
import typer
import yaml

from flows.cli import app
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.guard import KILL_SECONDS
from rlhf_core.hosts import seats
from rlhf_core.node import LAST_WORDS_SECONDS

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "deployments" / "clusters"
CONFIGS = tuple(ROOT / "deployments" / "configs" / f"{name}.yaml" for name in ("quickstart", "opt-1.3b"))
RESOURCES = ("hostfile", "slurm", "kubernetes")


def config_with(example: str, config: Path = CONFIGS[0]) -> PipelineConfig:
    """A shipped configuration with an example's resources, as its README says to give them."""
    return load_config(config, [f"resources={(EXAMPLES / f'{example}.yaml').read_text()}"])


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("example", RESOURCES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_example_goes_with_a_small_and_a_large_configuration(example, config):
    resources = config_with(example, config).resources.of("sft")
    assert resources.launcher == {"kubernetes": "nodes"}.get(example, example)
    assert len(seats(resources)) == 2


def test_the_example_hostfile_is_the_one_that_its_example_names():
    assert [seat.host for seat in seats(config_with("hostfile").resources.of("sft"))] == ["node1", "node2"]


def manifest(kind: str) -> dict:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes-job.yaml").read_text()))
    assert [d["kind"] for d in documents] == ["Service", "Job"]
    return next(d for d in documents if d["kind"] == kind)


def test_each_pod_has_a_number_and_all_run_at_once():
    job, resources = manifest("Job")["spec"], config_with("kubernetes").resources.of("sft")
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == resources.cluster.nodes
    [container] = job["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == resources.processes


def test_pods_have_names_by_the_service():
    job, service = manifest("Job"), manifest("Service")
    pod = job["spec"]["template"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert len(f"{job['metadata']['name']}-{job['spec']['completions'] - 1}") < 64, "it is the pod's host name"


def test_a_pod_that_is_ended_has_time_to_save_and_one_that_failed_starts_again():
    spec = manifest("Job")["spec"]["template"]["spec"]
    grace = config_with("kubernetes").resources.of("sft").checkpoint.grace_seconds
    assert spec["terminationGracePeriodSeconds"] >= grace + KILL_SECONDS + LAST_WORDS_SECONDS
    assert spec["restartPolicy"] == "OnFailure"


def test_the_pods_command_is_one_that_there_is():
    [container] = manifest("Job")["spec"]["template"]["spec"]["containers"]
    program, command, *arguments = container["command"]
    group = typer.main.get_command(app)
    assert program == "rlhf"
    found = group.commands[command].make_context(command, list(arguments))  # pyright: ignore[reportAttributeAccessIssue]
    assert found.params["store"].startswith("s3://") and found.params["number"] is None
    assert found.params["name"] == "quickstart"


def test_the_readme_names_every_file_and_no_other():
    text = (EXAMPLES / "README.md").read_text()
    linked = {part.partition(")")[0] for part in text.split("](")[1:]}
    assert linked <= {file.name for file in EXAMPLES.iterdir()}
    for file in EXAMPLES.iterdir():
        assert file.name == "README.md" or file.name in text or file.stem in RESOURCES
