"""The layers hold: flows > tasks > rlhf_core, Prefect above, torch below, and what must start fast does."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAINING = {"torch", "deepspeed", "transformers", "datasets"}
CONTRACT = (
    "errors canonical sealed specs resources config entries cache artifacts aliases checkpoints layout "
    "verification inventory gc transfer store store_local store_s3 s3_client s3_upload patience credentials "
    "sources job lease preemption plan launch guard doctor cluster ends members starting hosts interfaces room "
    "ssh start_ssh start_slurm start_nodes slurm preflight doctor_hosts failures outcome ranklog joblog link head node "
    "context local_parts reward_code next_attempt gold card tensorboard reward_sources eval.request eval.pairs "
    "eval.peak gates fired sweep branch planner.shapes planner.known planner.hardware planner.work planner.memory "
    "planner.phases planner.estimate planner.fit"
).split()


def modules_loaded_by(statement: str) -> set[str]:
    """Top-level names of all modules that a fresh interpreter has after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def imports_of(file: Path) -> set[str]:
    """Top-level names of everything a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("file", [*files_of("flows"), *files_of("tasks")], ids=lambda f: f"{f.parent.name}/{f.name}")
def test_flows_and_tasks_never_import_the_training_stack(file):
    assert not imports_of(file) & TRAINING


@pytest.mark.parametrize("file", files_of("tasks"), ids=lambda f: f.name)
def test_tasks_never_import_flows(file):
    assert "flows" not in imports_of(file)


@pytest.mark.parametrize("file", files_of("rlhf_core"), ids=lambda f: str(f.relative_to(ROOT / "rlhf_core")))
def test_rlhf_core_never_imports_upward(file):
    assert not imports_of(file) & {"prefect", "flows", "tasks"}


@pytest.mark.parametrize("name", CONTRACT)
def test_each_module_of_the_contract_half_loads_without_torch_and_prefect(name):
    assert not modules_loaded_by(f"import rlhf_core.{name}") & (TRAINING | {"prefect"})


def test_importing_flows_imports_nothing_else_of_ours_and_no_prefect():
    assert not modules_loaded_by("import flows") & (TRAINING | {"prefect", "tasks", "rlhf_core", "pydantic"})


def test_the_flows_load_without_the_training_stack():
    assert not modules_loaded_by("import flows.rlhf, flows.single, flows.cli, flows.session") & TRAINING


def test_the_command_line_loads_without_prefect():
    assert not modules_loaded_by("import flows.cli") & (TRAINING | {"prefect"})


@pytest.mark.parametrize("module", ["flows", "flows.cli"])
def test_what_people_wait_for_imports_in_under_two_seconds(module):
    # -X importtime prints "import time: self [us] | cumulative | name"; its own times, so a busy machine counts less.
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    times = []
    for _ in range(2):
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr.splitlines()
        [line] = [line for line in lines if line.rpartition("|")[2].strip() == module]
        times.append(int(line.split("|")[1]) / 1e6)
    assert min(times) < 2
