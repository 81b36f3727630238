"""The flow on a real Prefect server, with real processes, guard and store; only what a job runs is quick_stage.py."""

import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from commands import rlhf as command_line
from quick_stage import save

from rlhf_core import launch, lease
from rlhf_core.artifacts import MANIFEST, FileEntry, Manifest, list_manifests, publish, read_manifest
from rlhf_core.branch import branch_of
from rlhf_core.checkpoints import marker_keys
from rlhf_core.config import PipelineConfig, changed, parse_config
from rlhf_core.errors import ConfigError, IntegrityError, JobFailed
from rlhf_core.fired import GateFired, fired_at_end
from rlhf_core.gates import Gate
from rlhf_core.job import JobSpec
from rlhf_core.plan import make_plan, stage_refs
from rlhf_core.sealed import seal, unseal
from rlhf_core.specs import PPOSpec
from rlhf_core.store import Store

STAGES = ("data", "sft", "reward", "ppo", "evaluate")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]

# The command line, with the deepspeed launcher replaced as in this process.
COMMAND_LINE = """
import sys, rlhf_core.launch as launch
launch.command = lambda job, store, module: [sys.executable, "-m", "quick_stage", "--job", launch.job_url(store, job)]
from flows.cli import main
main()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prefect server with a database of its own; yields its URL."""
    from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.settings import get_current_settings as settings
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
            yield settings().api.url


@pytest.fixture(autouse=True)
def orders(tmp_path, monkeypatch) -> Path:
    """A folder: what is written into the file named after a stage, its next job does."""
    folder = tmp_path / "orders"
    folder.mkdir()
    monkeypatch.setenv("QUICK_STAGE_ORDERS", str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))
    monkeypatch.delenv("RLHF_TERMINAL", raising=False)
    monkeypatch.setenv("RLHF_LEASE_BEAT", "0.3")  # of the command lines started here
    monkeypatch.setenv("RLHF_LEASE_TTL", "5")
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "TTL_SECONDS", 5)
    monkeypatch.setattr(
        launch,
        "command",
        lambda job, store, module: [sys.executable, "-m", "quick_stage", "--job", launch.job_url(store, job)],
    )
    return folder


@pytest.fixture
def config(tmp_path) -> PipelineConfig:
    """A pipeline with a name, and so with artifact ids, of its own."""
    return parse_config(
        {
            "name": f"t-{os.getpid()}-{time.monotonic_ns()}",
            "store": f"file://{tmp_path}/store",
            "model": {"family": "opt"},
            "data": {
                "sources": [{"kind": "quickstart", "prompts": 50}],
                "tokenizer": {"train_vocab_size": 300},
                "max_prompt_tokens": 32,
                "max_response_tokens": 32,
            },
            "resources": {"retries": 2, "retry_delay_seconds": 0},
        }
    )


@pytest.fixture
def store(config) -> Store:
    return Store(config.store)


def attempts(store: Store, stage: str) -> int:
    """How many jobs were launched for a stage."""
    return sum(key.endswith("/job.json") for key in store.list(stage))


def run_states(config: PipelineConfig) -> list[dict[str, str]]:
    """For each flow run of this pipeline, oldest first: its tasks' state names by stage, and its own as "flow"."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import FlowRunSort

    ours = FlowRunFilter(name=FlowRunFilterName(any_=[config.name]))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=ours, sort=FlowRunSort.EXPECTED_START_TIME_ASC)
        found = []
        for run in runs:
            tasks = client.read_task_runs(flow_run_filter=FlowRunFilter(id={"any_": [run.id]}))
            found.append({task.name: str(task.state_name) for task in tasks} | {"flow": str(run.state_name)})
        return found


def eventually(check, seconds: float = 20):
    """Task states reach the server as events, a moment later: ask until `check` is true."""
    until = time.monotonic() + seconds
    while not (found := check()) and time.monotonic() < until:
        time.sleep(0.2)
    return found


# --- reuse -----------------------------------------------------------------------------------------------------------


def test_the_first_run_builds_every_stage_and_the_second_reuses_all_as_cached(server, config, store):
    from flows.rlhf import rlhf

    first = rlhf(config)
    assert list(first) == list(STAGES)
    assert {m.ref.id for m in list_manifests(store)} == {ref.id for ref in first.values()}
    second = rlhf(config)
    assert second == first
    assert all(attempts(store, stage) == 1 for stage in STAGES)
    built = dict.fromkeys(STAGES, "Completed") | {"flow": "Completed"}
    reused = dict.fromkeys(STAGES, "Cached") | {"flow": "Completed"}
    assert eventually(lambda: run_states(config) == [built, reused])


def test_status_shows_the_stages_and_beside_them_the_servers_runs(server, config, store, capfd, monkeypatch):
    from flows import status_cli
    from flows.rlhf import rlhf

    rlhf(config)
    monkeypatch.setattr(status_cli, "SECONDS", 60.0)
    monkeypatch.setenv("PREFECT_API_URL", server)
    capfd.readouterr()
    code, out, _ = command_line(capfd, "status", "--store", store.url)
    assert code == 0 and out.count("published") == len(STAGES)
    assert f"  {config.name}  Completed  since 20" in out and "/runs/flow-run/" in out


def test_a_changed_ppo_field_builds_only_ppo_and_what_follows(server, config, store):
    from flows.rlhf import rlhf

    rlhf(config)
    rlhf(config.model_copy(update={"ppo": config.ppo.model_copy(update={"gamma": 0.99})}))
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 1, 2, 2]


def test_with_dpo_the_flow_runs_its_stages_on_the_same_data_and_sft(server, config, store):
    from flows.rlhf import rlhf

    rlhf(config)
    refs = rlhf(config.model_copy(update={"method": "dpo"}))
    assert list(refs) == ["data", "sft", "dpo", "evaluate"]
    assert [attempts(store, stage) for stage in (*STAGES, "dpo")] == [1, 1, 1, 1, 2, 1]
    manifest = read_manifest(store, refs["evaluate"])
    assert manifest is not None
    assert list(manifest.inputs) == ["data", "sft", "dpo"]


def test_without_a_reward_model_ppo_follows_sft(server, config, store):
    from flows.rlhf import rlhf

    rewards = [{"kind": "http", "url": "http://127.0.0.1:9/score", "name": "endpoint-v1"}]
    ppo = PPOSpec.model_validate({**config.ppo.model_dump(), "rewards": rewards})
    refs = rlhf(config.model_copy(update={"ppo": ppo}))
    assert list(refs) == ["data", "sft", "ppo", "evaluate"]
    assert attempts(store, "reward") == 0


def test_a_flow_refuses_python_functions_where_code_is_not_allowed(server, config, store, monkeypatch):
    from flows.rlhf import rlhf

    monkeypatch.delenv("RLHF_ALLOW_CODE", raising=False)
    ppo = PPOSpec.model_validate(
        {**config.ppo.model_dump(), "rewards": [{"kind": "function", "function": "json:loads"}]}
    )
    with pytest.raises(ConfigError, match=r"ppo\.rewards\[0\].*RLHF_ALLOW_CODE=1"):
        rlhf(config.model_copy(update={"ppo": ppo}))
    assert store.list("") == {}


def test_the_manifest_records_who_made_it_but_no_user(server, config, store):
    from flows.rlhf import rlhf

    manifest = read_manifest(store, rlhf(config)["sft"])
    assert manifest is not None
    assert manifest.metrics["eval_loss"] == 1.5
    assert manifest.metrics["seconds"] >= 0
    provenance = manifest.provenance
    assert provenance["flow_run_name"] == config.name
    assert len(provenance["commit"]) == 40
    assert provenance["dirty"] in (True, False)
    assert provenance["job"]["versions"]["deepspeed"]
    assert "user" not in provenance


def test_the_graph_has_an_edge_from_each_input(server, config):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    from flows.rlhf import rlhf

    rlhf(config)
    ours = FlowRunFilter(name=FlowRunFilterName(any_=[config.name]))

    def tasks():
        with get_client(sync_client=True) as client:
            found = client.read_task_runs(flow_run_filter=ours)
        return {task.name: task for task in found} if len(found) == len(STAGES) else None

    found = eventually(tasks)
    names = {task.id: name for name, task in found.items()}
    edges = {
        name: {names[edge.id] for edge in task.task_inputs["inputs"] if hasattr(edge, "id")}
        for name, task in found.items()
    }
    assert edges == {
        "data": set(),
        "sft": {"data"},
        "reward": {"data", "sft"},
        "ppo": {"data", "sft", "reward"},
        "evaluate": {"data", "sft", "reward", "ppo"},
    }


# --- what the UI shows ------------------------------------------------------------------------------------------------


def test_each_stage_that_ran_has_one_progress_and_one_report_and_a_stage_that_resumed_tells_of_it(
    server, config, store, orders
):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    from flows.rlhf import rlhf

    (orders / "sft").write_text("save 10")
    ref = rlhf(config)["sft"]
    ours = FlowRunFilter(name=FlowRunFilterName(any_=[config.name]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(flow_run_filter=ours)
        keys = [str(artifact.key) for artifact in found]
        progress = next(a for a in found if a.key == "rlhf-sft-progress")
        text = str(next(a for a in found if a.key == "rlhf-sft-report").data)
        pipeline = str(next(a for a in found if a.key == "rlhf-report").data)

        def events():
            wanted = {"event": {"prefix": ["rlhf.stage."]}, "any_resource": {"id": [f"prefect.flow-run.{run.id}"]}}
            told = client._client.post("/events/filter", json={"filter": wanted, "limit": 50}).json()["events"]  # pyright: ignore
            of_sft = [event for event in told if event["payload"]["stage"] == "sft"]
            return of_sft if len(told) >= 2 * len(STAGES) + 1 else None

        run = client.read_flow_runs(flow_run_filter=ours)[0]
        told = {event["event"]: event["payload"] for event in eventually(events)}
    assert sorted(keys) == sorted(
        [f"rlhf-{s}-{what}" for s in STAGES for what in ("progress", "report")] + ["rlhf-report"]
    )
    assert progress.data == 100
    assert "process-hours" in str(progress.description)
    assert f"{store.url}/{ref.id}/attempts/0002/log.txt" in text and "**resumed**" in text
    assert text.startswith("# sft\n\n") and pipeline.startswith(f"# {config.name}\n\n"), "markdown, not JSON of it"
    assert "| sft | resumed from step 10 |" in pipeline
    assert list(sorted(told)) == ["rlhf.stage.completed", "rlhf.stage.resumed", "rlhf.stage.started"]
    assert told["rlhf.stage.completed"]["artifact"] == ref.id
    assert told["rlhf.stage.completed"]["metrics"]["eval_loss"] == 1.5
    assert told["rlhf.stage.resumed"]["resumed"] == [{"attempt": 1, "from": "step 10"}]


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failure_worth_retrying_is_retried_in_the_same_run(server, config, store, orders):
    from flows.rlhf import rlhf

    (orders / "reward").write_text("exit 75")
    rlhf(config)
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 2, 1, 1]


@pytest.mark.parametrize("code", [2, 3, 4])
def test_a_failure_that_no_retry_can_help_is_not_retried(server, config, store, orders, code):
    from flows.rlhf import rlhf

    (orders / "sft").write_text(f"exit {code}")
    with pytest.raises(JobFailed, match=f"sft was told to exit {code}") as raised:
        rlhf(config)
    assert raised.value.exit_code == code
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 0, 0, 0]
    failed = {"data": "Completed", "sft": "Failed", "flow": "Failed"}
    assert eventually(lambda: run_states(config) == [failed])


def test_after_a_failure_the_next_run_reuses_what_was_done(server, config, store, orders):
    from flows.rlhf import rlhf

    (orders / "ppo").write_text("exit 3")
    with pytest.raises(JobFailed):
        rlhf(config)
    rlhf(config)
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 1, 2, 1]


def test_a_job_that_finished_but_was_not_published_is_published_without_another_job(server, config, store, orders):
    from flows.rlhf import rlhf

    (orders / "sft").write_text("die after the result")
    refs = rlhf(config)
    assert attempts(store, "sft") == 1
    assert read_manifest(store, refs["sft"]) is not None


def test_a_finished_result_with_a_damaged_file_is_not_published_but_built(config, store, orders):
    from tasks.stage import build_stage

    planned = make_plan(config, store)[0]
    (orders / "data").write_text("die after the result")
    with pytest.raises(JobFailed):
        build_stage(store, config, planned)
    store.write(f"{planned.ref.id}/attempts/0001/files/weights", b"something else")
    built = build_stage(store, config, planned)
    assert built.how == "built"
    assert store.read(built.manifest.key("weights")) == b"data of attempt 2"


def test_a_published_artifact_that_lost_a_file_is_an_error_that_names_the_remedy(config, store):
    from tasks.stage import build_stage

    planned = make_plan(config, store)[0]
    store.delete(build_stage(store, config, planned).manifest.key("weights"))
    with pytest.raises(IntegrityError, match="--force data"):
        build_stage(store, config, planned)
    assert build_stage(store, config, planned, force="run-1").how == "built"


# --- preempted, and gone on -----------------------------------------------------------------------------------------


def test_a_preempted_job_is_started_again_at_once_and_that_counts_as_no_retry(server, config, store, orders):
    from flows.rlhf import rlhf

    patient = config.resources.model_copy(update={"retries": 0})
    (orders / "sft").write_text("save 10\nsave 20\nsave 30\n")
    refs = rlhf(config.model_copy(update={"resources": patient}))
    assert [attempts(store, stage) for stage in STAGES] == [1, 4, 1, 1, 1]
    manifest = read_manifest(store, refs["sft"])
    assert manifest is not None
    assert store.read(manifest.key("weights")) == b"sft of attempt 4 from step 30 (attempt 3)"


def test_preemptions_in_a_row_without_progress_are_a_failure(config, store, orders):
    from tasks.stage import build_stage

    planned = make_plan(config, store)[1]
    (orders / "sft").write_text("save 10\nsave 10\nsave 20\nsave 20\nsave 15\nsave 30\n")
    with pytest.raises(JobFailed, match=r"Preempted 2 times without getting further.*every_minutes") as raised:
        build_stage(store, config, planned)
    assert raised.value.exit_code == 1
    assert attempts(store, "sft") == 5


def test_the_plan_says_from_where_an_unfinished_stage_goes_on(config, store, orders):
    from tasks.stage import build_stage

    planned = make_plan(config, store)[1]
    (orders / "sft").write_text("exit 1\nsave 40\nexit 1\n")
    for _ in range(2):
        with pytest.raises(JobFailed):
            build_stage(store, config, planned)
    again = make_plan(config, store)[1]
    assert (again.action, again.why) == ("resume", "from step 40 (attempt 2)")
    assert make_plan(config, store, force=("sft",))[1].action == "build"
    assert build_stage(store, config, planned).how == "resumed"
    assert make_plan(config, store)[1].action == "reuse"


# --- out of memory, and gone on with less ---------------------------------------------------------------------------


def sizes(store: Store, stage: str) -> list[int]:
    """The micro-batch of each attempt at a stage."""
    keys = [key for key in store.list(stage) if key.endswith("/job.json")]
    return [unseal(JobSpec, store.read(key), key).resources.micro_batch for key in keys]


def test_a_job_that_ran_out_of_memory_is_started_once_more_with_half_the_micro_batch(server, config, store, orders):
    from flows.rlhf import rlhf

    patient = config.resources.model_copy(update={"retries": 0})
    (orders / "sft").write_text("exit 5")
    refs = rlhf(config.model_copy(update={"resources": patient}))
    assert sizes(store, "sft") == [16, 8] and sizes(store, "reward") == [16]
    manifests = [read_manifest(store, refs[stage]) for stage in ("sft", "reward")]
    assert [m and m.provenance.get("halved") for m in manifests] == [
        {"micro_batch": 8, "rollout_micro_batch": 64},
        None,
    ]


def test_a_job_that_runs_out_of_memory_with_half_of_it_too_fails_and_says_what_was_tried(server, config, store, orders):
    from flows.rlhf import rlhf

    (orders / "sft").write_text("exit 5\nexit 5\nexit 5\n")
    with pytest.raises(
        JobFailed, match=r"Out of memory with micro_batch 16, then with micro_batch 8: set a lower"
    ) as raised:
        rlhf(config)
    assert raised.value.exit_code == 5
    assert [attempts(store, stage) for stage in STAGES] == [1, 2, 0, 0, 0], "no retry of Prefect's"
    failed = {"data": "Completed", "sft": "Failed", "flow": "Failed"}
    assert eventually(lambda: run_states(config) == [failed])


def test_a_run_that_finds_an_attempt_out_of_memory_begins_with_half_and_says_so(config, store, orders):
    """The run before was killed right after that attempt. What came of the smaller one may also be published later."""
    from tasks.stage import build_stage, job_of

    planned, told = make_plan(config, store)[1], []
    (orders / "sft").write_text("exit 5\n")
    with lease.acquire(store, job_of(store, config, planned)) as first, pytest.raises(JobFailed):
        launch.run_job(store, first)
    (orders / "sft").write_text("die after the result\n")
    with pytest.raises(JobFailed):
        build_stage(store, config, planned, tell=told.append)
    assert sizes(store, "sft") == [16, 8]
    assert told == [
        "sft: attempt 1 ran out of memory with micro_batch 16; this one has micro_batch 8, which changes no result beyond rounding"
    ]
    published = build_stage(store, config, planned)
    assert published.how == "published" and published.manifest.provenance["halved"]["micro_batch"] == 8


def test_a_smaller_micro_batch_goes_on_from_the_checkpoint_of_the_larger_one(config, store, orders):
    from tasks.stage import build_stage

    planned = make_plan(config, store)[1]
    (orders / "sft").write_text("save 10\nexit 5\n")
    made = build_stage(store, config, planned)
    assert (
        made.how == "resumed"
        and store.read(made.manifest.key("weights")) == b"sft of attempt 3 from step 10 (attempt 1)"
    )


# --- two runs at once ------------------------------------------------------------------------------------------------


def test_who_waits_for_another_run_shows_how_far_it_is_and_not_for_ever(config, store):
    from tasks.stage import build_stage, job_of

    planned = make_plan(config, store)[0]
    short = config.resources.model_copy(update={"timeout_hours": 1 / 3600})
    impatient, events = config.model_copy(update={"resources": short}), []
    with lease.acquire(store, job_of(store, config, planned)) as other:
        other.note({"step": 3, "total": 10, "phase": "train"})
        with pytest.raises(lease.Busy, match="train 3/10"):
            build_stage(store, impatient, planned, on_event=events.append)
    assert {(e["phase"], e["step"], e["total"]) for e in events[1:]} == {("waiting for another run", 3, 10)}
    assert attempts(store, "data") == 1


def test_a_run_that_was_taken_over_waits_for_its_successor_and_reuses_its_artifact(config, store, orders):
    """The job of the first ends when its lease is taken; the successor finishes, and both have the same artifact."""
    from tasks.stage import build_stage, job_of

    planned = make_plan(config, store)[0]
    (orders / "data").write_text("hang\n")
    stages = []
    first = threading.Thread(target=lambda: stages.append(build_stage(store, config, planned)))
    first.start()
    assert eventually(lambda: not (orders / "data").exists())
    with lease.take(store, job_of(store, config, planned), 2) as successor:
        result = launch.run_job(store, successor)
        manifest = publish(store, Manifest(ref=planned.ref, spec={}, folder=result.folder, files=result.files))
    first.join(30)
    assert [(s.how, s.manifest) for s in stages] == [("reused", manifest)]
    assert attempts(store, "data") == 2


# --- force -----------------------------------------------------------------------------------------------------------


def test_forcing_retires_the_manifest_and_builds_once_for_each_run(config, store):
    from tasks.stage import build_stage

    planned = make_plan(config, store)[0]
    first = build_stage(store, config, planned)
    assert build_stage(store, config, planned, force="run-1").how == "built"
    assert build_stage(store, config, planned, force="run-1").how == "reused"
    assert build_stage(store, config, planned, force="run-2").how == "built"
    old = [key for key in store.list(planned.ref.id) if "/superseded/manifest-" in key]
    assert len(old) == 2
    assert seal(first.manifest) in [store.read(key) for key in old]


def test_a_forced_build_that_fails_leaves_nothing_published_and_its_retry_goes_on(config, store, orders):
    """The build begins anew, its retry resumes from what the build itself has saved."""
    from tasks.stage import build_stage, find

    planned = make_plan(config, store)[1]
    (orders / "sft").write_text("save 40\n")
    first = build_stage(store, config, planned)
    assert store.read(first.manifest.key("weights")) == b"sft of attempt 2 from step 40 (attempt 1)"
    (orders / "sft").write_text("save 10\nexit 1\n")
    with pytest.raises(JobFailed):
        build_stage(store, config, planned, force="run-1")
    assert find(store, planned.ref) is None
    assert {key.split("/")[3] for key in store.list(f"{planned.ref.id}/checkpoints")} == {"0003"}
    retried = build_stage(store, config, planned, force="run-1")
    assert retried.how == "resumed"
    assert store.read(retried.manifest.key("weights")) == b"sft of attempt 5 from step 10 (attempt 3)"


def zombie_of(store, config, planned, attempt) -> Manifest:
    """The manifest of a finished attempt at a stage, as its run would publish it."""
    files = tuple(
        FileEntry(path=p, size=len(d), sha256=hashlib.sha256(d).hexdigest()) for p, d in [("weights", b"old")]
    )
    folder = f"attempts/{attempt:04d}/files"
    store.write(f"{planned.ref.id}/{folder}/weights", b"old")
    return Manifest(ref=planned.ref, spec={}, folder=folder, files=files)


def test_a_forced_run_is_not_given_what_a_run_taken_for_dead_publishes_meanwhile(config, store, orders, monkeypatch):
    """That run looked whether it still held the lease right before the forced one took it, and published after."""
    from tasks import stage

    planned = make_plan(config, store)[0]
    old = stage.build_stage(store, config, planned).manifest

    def run_job(store, lease, **options):
        result = launch.run_job(store, lease, **options)
        publish(store, zombie_of(store, config, planned, 1))
        return result

    monkeypatch.setattr(stage, "run_job", run_job)
    made = stage.build_stage(store, config, planned, force="run-1")
    assert (made.how, made.manifest.attempt) == ("built", 2) and read_manifest(store, planned.ref) == made.manifest
    assert store.read(made.manifest.key("weights")) == b"data of attempt 2"
    retired = [store.read(key) for key in store.list(planned.ref.id) if "/superseded/manifest-" in key]
    assert len(retired) == 2 and seal(old) in retired


def test_the_retry_of_a_forced_run_does_not_take_what_was_published_late_for_its_own(config, store, orders):
    from tasks.stage import build_stage

    planned = make_plan(config, store)[0]
    build_stage(store, config, planned)
    (orders / "data").write_text("exit 1\n")
    with pytest.raises(JobFailed):
        build_stage(store, config, planned, force="run-1")
    publish(store, zombie_of(store, config, planned, 1))
    assert make_plan(config, store)[0].action == "build"
    made = build_stage(store, config, planned, force="run-1")
    assert (made.how, made.manifest.attempt) == ("built", 3) and read_manifest(store, planned.ref) == made.manifest


def test_a_run_that_loses_its_lease_while_its_files_are_verified_does_not_publish(config, store, monkeypatch):
    from rlhf_core import artifacts
    from tasks.stage import build_stage, job_of

    planned = make_plan(config, store)[0]
    verify, published = artifacts.verify, []

    def take_over(store, manifest, checksums=True):
        verify(store, manifest, checksums)
        if checksums and not published:
            with lease.take(store, job_of(store, config, planned), 2) as successor:
                published.append(launch.run_job(store, successor))

    monkeypatch.setattr(artifacts, "verify", take_over)
    made = build_stage(store, config, planned)
    assert (made.how, made.manifest.attempt) == ("published", 2)


def test_neither_plan_nor_patience_counts_what_attempts_before_the_forced_one_save(config, store, orders):
    from tasks.stage import build_stage, job_of

    planned = make_plan(config, store)[1]
    build_stage(store, config, planned)
    (orders / "sft").write_text("exit 1\n")
    with pytest.raises(JobFailed):
        build_stage(store, config, planned, force="run-1")
    save(store, job_of(store, config, planned), 40)  # of attempt 1, whose job lived on
    assert make_plan(config, store)[1].action == "build"
    (orders / "sft").write_text("save 10\nsave 20\n")
    assert build_stage(store, config, planned, force="run-1").manifest.attempt == 5


def test_publishing_leaves_no_checkpoints_nor_parts_of_any_attempt(config, store, orders):
    from tasks.stage import build_stage

    planned = make_plan(config, store)[1]
    lost = f"{planned.ref.id}/checkpoints/0001/parts/{'0' * 64}"
    (orders / "sft").write_text("save 10\ndie after the result\n")
    with pytest.raises(JobFailed):
        build_stage(store, config, planned)
    store.write(lost, b"lost")
    assert build_stage(store, config, planned).how == "published"
    assert store.list(f"{planned.ref.id}/checkpoints") == {}


def test_a_forced_run_does_not_resume_from_what_an_ended_run_saves_last(start, config, store, orders):
    """The job of a killed run is still saving when the next one begins."""
    (orders / "sft").write_text("train until told")
    process = start()
    wait_for_line(process, "sft: train")
    process.kill()
    _, err = start("--force", "sft").communicate(timeout=120)
    assert "sft: built" in err
    assert not any("/checkpoints/" in key for key in store.list("sft"))


def test_the_flow_forces_only_what_it_is_told_to(server, config, store):
    from flows.rlhf import rlhf

    rlhf(config)
    rlhf(config, force=("reward",))
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 2, 1, 1]


# --- single stages ---------------------------------------------------------------------------------------------------


def test_a_single_stage_needs_its_inputs_and_builds_nothing_else(server, config, store):
    from flows import single

    with pytest.raises(ConfigError, match="not part of this pipeline"):
        single.dpo(config)
    with pytest.raises(ConfigError, match="--stage data"):
        single.sft(config)
    assert store.list("") == {}
    single.data(config)
    refs = single.sft(config)
    assert list(refs) == ["sft"]
    assert {m.ref.stage for m in list_manifests(store)} == {"data", "sft"}


# --- a server with deployments ---------------------------------------------------------------------------------------


def test_a_flow_takes_its_configuration_from_a_file_with_overrides_and_its_name_from_there(server, config, store):
    from flows.single import data

    store.write("configs/mine.yaml", config.model_dump_json().encode())
    refs = data(config_file=f"{store.url}/configs/mine.yaml", overrides=("seed=5",))
    assert refs["data"] != make_plan(config, store)[0].ref
    assert [run["flow"] for run in run_states(config)] == ["Completed"]


def test_the_automations_are_created_once_and_a_switched_off_one_stays_so(server):
    from prefect.client.orchestration import get_client

    from flows.automations import PAUSES, automations, install

    assert set(install(automations()).values()) == {"created"}
    assert set(install(automations()).values()) == {"there already"}
    [first, *_] = names = [wanted.name for wanted in automations()]
    assert len(names) == 2 + len(PAUSES)
    changed = automations()[0].model_copy(update={"enabled": False, "description": "of last year"})
    with get_client(sync_client=True) as client:
        [found] = client.read_automations_by_name(first)
        client.update_automation(found.id, changed)
        assert install(automations())[first] == "updated"
        assert install(automations())[first] == "there already, switched off"
        assert len(client.read_automations()) == len(names)


def test_a_stage_resumed_on_another_commit_says_so_in_its_provenance(config, store, orders, monkeypatch):
    from tasks import stage

    planned = make_plan(config, store)[0]
    monkeypatch.setattr(stage, "git_state", lambda: {"commit": "a" * 40, "dirty": False})
    (orders / "data").write_text("save 7\nexit 3\n\n")
    with pytest.raises(JobFailed):
        stage.build_stage(store, config, planned)
    monkeypatch.setattr(stage, "git_state", lambda: {"commit": "b" * 40, "dirty": True})
    resumed = stage.build_stage(store, config, planned)
    assert resumed.how == "resumed"
    assert resumed.manifest.provenance["commits"] == {"1": "a" * 40, "3": "b" * 40 + "+"}
    alone = stage.build_stage(store, config, planned, force="again")
    assert "commits" not in alone.manifest.provenance


def test_resume_goes_on_here_with_a_run_that_no_worker_knows(server, config, orders, monkeypatch):
    from prefect.client.orchestration import get_client
    from typer.testing import CliRunner

    from flows.cli import app
    from flows.rlhf import rlhf

    def resume(*words: str):
        return CliRunner().invoke(app, ["resume", *words], catch_exceptions=False)

    monkeypatch.setenv("PREFECT_API_URL", server)
    with pytest.raises(ConfigError, match="knows no run of this name"):
        resume(config.name)
    (orders / "reward").write_text("exit 3")
    with pytest.raises(JobFailed):
        rlhf(config)
    with pytest.raises(ConfigError, match="'nonsense' is no stage"):
        resume(config.name, "--from", "nonsense")
    shown = resume(config.name).output
    assert "Failed, 1 starts" in shown and "goes on here" in shown
    assert shown.count("reuse ") == 2
    failed, finished = run_states(config)
    assert failed["reward"] == "Failed"
    assert eventually(lambda: run_states(config)[1]["sft"] == "Cached") and finished["flow"] == "Completed"
    with get_client(sync_client=True) as client:
        assert all(run.deployment_id is None for run in client.read_flow_runs())


# --- gates -----------------------------------------------------------------------------------------------------------


def gated(config: PipelineConfig, *gates: dict) -> PipelineConfig:
    """The same pipeline with gates."""
    return parse_config({**config.model_dump(), "gates": gates})


def run_sft(config: PipelineConfig) -> Manifest:
    """Run data and sft alone; the manifest of sft."""
    from flows.single import data, sft

    data(config)
    manifest = read_manifest(Store(config.store), sft(config)["sft"])
    assert manifest is not None
    return manifest


def artifact_of(config: PipelineConfig, key: str) -> str:
    """The newest artifact with this key of this pipeline's runs."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
    from prefect.client.schemas.sorting import ArtifactSort

    ours = FlowRunFilter(name=FlowRunFilterName(any_=[config.name]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(flow_run_filter=ours, sort=ArtifactSort.CREATED_DESC)
    return next(str(artifact.data) for artifact in found if artifact.key == key)


def states_of_tasks(config: PipelineConfig, stage: str) -> list[str]:
    """Names of the states of all tasks of a stage, sorted."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    ours = FlowRunFilter(name=FlowRunFilterName(any_=[config.name]))
    with get_client(sync_client=True) as client:
        return sorted(str(t.state_name) for t in client.read_task_runs(flow_run_filter=ours) if t.name == stage)


def answer_when_asked(config: PipelineConfig, told: list[dict], *answers: dict) -> threading.Thread:
    """A person at the UI: waits until the run is paused, reads its form, and sends it as the UI does; again for each answer."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    ours = FlowRunFilter(name=FlowRunFilterName(any_=[config.name]))

    def look(client):
        """The paused run with all that the form is made of; None as long as something of it is missing."""
        for run in client.read_flow_runs(flow_run_filter=ours):
            if run.state and run.state.is_paused():
                keys = run.state.state_details.run_input_keyset
                parts = [client._client.get(f"/flow_runs/{run.id}/input/{keys[k]}") for k in ("schema", "description")]
                if all(part.status_code == 200 for part in parts):
                    return run, parts[0].json(), parts[1].text
        return None

    def answer() -> None:
        left, until = list(answers), time.monotonic() + 120
        while left and time.monotonic() < until:
            with suppress(Exception), get_client(sync_client=True) as client:  # a busy server: once more
                if seen := look(client):
                    run, form, about = seen
                    told.append({"form": form, "about": about})
                    sent = client._client.post(f"/flow_runs/{run.id}/resume", json={"run_input": left[0]})
                    if sent.json()["status"] == "ACCEPT":
                        left.pop(0)
            time.sleep(0.3)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    return thread


def test_a_gate_that_warns_is_told_by_report_log_and_event_and_the_run_goes_on(server, config, store, orders):
    from prefect.client.orchestration import get_client

    (orders / "sft").write_text("log loss 9 2 9 9 9")
    gate = {"stage": "sft", "metric": "loss", "above": 5, "during": True, "for_steps": 2, "after_step": 1}
    config = gated(config, {**gate, "action": "warn"})
    ref = run_sft(config).ref
    assert attempts(store, "sft") == 1
    sentence = "sft: loss 9 is above 5 at step 4, 2 times in a row (warn)"
    for key in ("rlhf-sft-report", "rlhf-report"):
        text = artifact_of(config, key)
        assert text.count(sentence) == 1 and "## Gates that fired" in text
    with get_client(sync_client=True) as client:

        def fired():
            wanted = {"event": {"name": ["rlhf.gate.fired"]}, "any_resource": {"id": ["rlhf.stage.sft"]}}
            found = client._client.post("/events/filter", json={"filter": wanted, "limit": 50}).json()["events"]  # pyright: ignore
            return [e["payload"] for e in found if e["payload"]["artifact"] == ref.id]

        [payload] = eventually(fired)
    wanted = {"stage": "sft", "metric": "loss", "value": 9.0, "bound": 5.0, "action": "warn", "step": 4}
    assert payload.items() >= wanted.items()


def test_a_gate_that_stops_leaves_a_checkpoint_and_with_another_bound_the_stage_goes_on_from_it(
    server, config, store, orders
):
    (orders / "sft").write_text("log loss 2 9 hold\n\n")
    gate = {"stage": "sft", "metric": "loss", "during": True, "action": "stop"}
    with pytest.raises(GateFired, match=r"^sft: loss 9 is above 5 at step 2\nStopped, saved at step 2") as raised:
        run_sft(gated(config, {**gate, "above": 5}))
    assert raised.value.exit_code == 6
    assert attempts(store, "sft") == 1, "a stop is not retried"
    assert eventually(lambda: run_states(config)[1] == {"sft": "Failed", "flow": "Failed"})
    assert "sft: loss 9 is above 5 at step 2 (stop)" in artifact_of(config, "rlhf-report")
    manifest = run_sft(gated(config, {**gate, "above": 10}))
    assert manifest.provenance["job"]["resumed"] == [{"attempt": 1, "from": "step 2"}]


def test_a_gate_that_rolls_back_removes_what_was_saved_since_the_first_bad_step(server, config, store, orders):
    (orders / "sft").write_text("log loss 1 2 9 9 hold\n\n")
    gate = {"stage": "sft", "metric": "loss", "above": 5, "during": True, "for_steps": 2, "action": "roll_back"}
    with pytest.raises(GateFired, match=r"Rolled back to step 2 \(attempt 1\): 2 later checkpoints are removed"):
        run_sft(gated(config, gate))
    ref = make_plan(config, store)[1].ref
    assert [key.split("/")[-1] for key in marker_keys(store, ref)] == [
        "00000002-train-000000.json",
        "00000001-train-000000.json",
    ]
    assert len([key for key in store.list(ref.id) if "/parts/" in key]) == 2
    manifest = run_sft(config)
    assert manifest.provenance["job"]["resumed"] == [{"attempt": 1, "from": "step 2"}]


@pytest.mark.slow
def test_with_nothing_saved_before_the_first_bad_step_nothing_is_rolled_back(server, config, store, orders):
    (orders / "sft").write_text("log loss 9 9 hold")
    gate = {"stage": "sft", "metric": "loss", "above": 5, "during": True, "action": "roll_back"}
    with pytest.raises(GateFired, match="not rolled back: no checkpoint from before step 1 is left"):
        run_sft(gated(config, gate))
    assert len(marker_keys(store, make_plan(config, store)[1].ref)) == 2


@pytest.mark.slow
def test_a_gate_that_came_too_late_to_end_the_job_keeps_the_next_stage_from_beginning(server, config, store, orders):
    from flows.rlhf import rlhf

    (orders / "sft").write_text("log loss 2 9 finish")
    gate = {"stage": "sft", "metric": "loss", "above": 5, "during": True, "action": "stop"}
    with pytest.raises(GateFired, match="saved at step 2"):
        run_sft(gated(config, gate))
    assert [m.ref.stage for m in list_manifests(store)] == ["data"]
    with pytest.raises(GateFired, match="The sft stage is finished and stays"):
        rlhf(gated(config, gate))
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 0, 0, 0]
    run_sft(gated(config, {**gate, "above": 10}))


def test_a_gate_that_waits_goes_on_from_the_checkpoint_when_a_person_says_so(
    server, config, store, orders, monkeypatch
):
    from tasks import gates

    monkeypatch.setattr(gates, "POLL_SECONDS", 0.3)
    (orders / "sft").write_text("log loss 2 9 hold\nlog loss 2 9 9 9")
    config = gated(
        config, {"stage": "sft", "metric": "loss", "above": 5, "during": True, "action": "wait", "wait_hours": 0.05}
    )
    person = answer_when_asked(config, told := [], {"decision": "go on"})
    manifest = run_sft(config)
    person.join()
    assert manifest.provenance["job"]["resumed"] == [{"attempt": 1, "from": "step 2"}]
    assert told[0]["form"]["properties"]["decision"]["enum"] == ["go on", "stop", "change"]
    assert "sft: loss 9 is above 5 at step 2" in told[0]["about"] and "saved at step 2" in told[0]["about"]
    assert "sft: loss 9 is above 5 at step 2 (wait; answered: go on)" in artifact_of(config, "rlhf-report")
    assert eventually(lambda: states_of_tasks(config, "sft") == ["Completed", "Held"])


def test_a_person_may_change_the_configuration_and_what_that_does_not_touch_is_reused(
    server, config, store, orders, monkeypatch
):
    from flows.rlhf import rlhf
    from tasks import gates

    monkeypatch.setattr(gates, "POLL_SECONDS", 0.3)
    (orders / "reward").write_text("log loss 2 9 hold\n\n")
    gate = {"stage": "reward", "metric": "loss", "above": 5, "during": True, "action": "wait", "wait_hours": 0.05}
    config = gated(config, gate)
    change = {"decision": "change", "change": "reward.seed=5 ppo.kl_coef=0.3"}
    person = answer_when_asked(config, told := [], {"decision": "change", "change": "reward.sed=5"}, change)
    refs = rlhf(config)
    person.join()
    assert "Not taken" in told[-1]["about"] and "reward.sed" in told[-1]["about"]
    assert refs == stage_refs(changed(config, ("reward.seed=5", "ppo.kl_coef=0.3")))
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 2, 1, 1]
    assert eventually(lambda: states_of_tasks(config, "reward") == ["Completed", "Held"])
    assert rlhf(config) == refs, "the next run is not asked again"


def test_a_gate_is_answered_from_the_command_line(server, config, store, orders, monkeypatch, capfd):
    from flows.single import data
    from tasks import gates

    monkeypatch.setattr(gates, "POLL_SECONDS", 0.3)
    gate = {"stage": "data", "metric": "seconds", "above": -1, "action": "wait", "wait_hours": 0.05}
    config = gated(config, gate)
    said: list[tuple[int, str, str]] = []

    def answer() -> None:
        def asked() -> bool:
            said.append(command_line(capfd, "resume", config.name))
            return "waits for an answer" in said[-1][2]

        eventually(asked, seconds=90)
        said.append(command_line(capfd, "resume", config.name, "--answer", "go on"))

    monkeypatch.setenv("PREFECT_API_URL", server)
    person = threading.Thread(target=answer, daemon=True)
    person.start()
    data(config)
    person.join()
    assert said[-2][0] == 2 and "data: seconds" in said[-2][2] and "--answer" in said[-2][2]
    assert said[-1][0] == 0 and "answered: it goes on" in said[-1][1]
    assert attempts(store, "data") == 1


def test_a_gate_between_stages_keeps_what_is_finished_and_the_next_stage_from_beginning(server, config, store):
    from flows.rlhf import rlhf

    gate = {"stage": "reward", "metric": "reward.eval_loss", "action": "stop"}
    with pytest.raises(GateFired, match=r"^reward: eval_loss 1.5 is above 1\nThe reward stage is finished and stays"):
        rlhf(gated(config, {**gate, "above": 1}))
    assert {m.ref.stage for m in list_manifests(store)} == {"data", "sft", "reward"}
    built = dict.fromkeys(("data", "sft", "reward"), "Completed")
    assert eventually(lambda: run_states(config) == [{**built, "flow": "Failed"}])
    with pytest.raises(GateFired):
        rlhf(gated(config, {**gate, "above": 1}))  # reused, and judged all the same
    rlhf(gated(config, {**gate, "above": 2}))
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("decision", "told"),
    [("stop", "has answered: stop"), pytest.param(None, "Nobody has answered", marks=pytest.mark.slow)],
)
def test_between_stages_a_person_may_stop_and_so_does_nobodys_answer(
    server, config, store, orders, monkeypatch, decision, told
):
    from flows.single import data
    from tasks import gates

    monkeypatch.setattr(gates, "POLL_SECONDS", 0.3)
    hours = 0.05 if decision else 1 / 3600
    gate = {"stage": "data", "metric": "seconds", "above": -1, "action": "wait", "wait_hours": hours}
    config = gated(config, gate)
    person = answer_when_asked(config, [], {"decision": decision}) if decision else None
    with pytest.raises(GateFired, match=told):
        data(config)
    if person:
        person.join()
    assert attempts(store, "data") == 1
    assert eventually(lambda: [run["flow"] for run in run_states(config)] == ["Failed"])


def test_where_no_server_could_bring_an_answer_a_question_is_a_stop_at_once(config, store):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks import gates

    gate = Gate(stage="sft", metric="eval_loss", above=1, action="wait")
    fired = fired_at_end(gate, {"eval_loss": 2.0})
    assert fired is not None
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        with pytest.raises(GateFired, match="without a Prefect server nobody could answer, so it has stopped"):
            gates._ask(config, store, make_plan(config, store)[1], GateFired(fired, "It is finished."))


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_builds_shared_stages_once_and_a_variant_that_fails_stops_no_other(server, config, store, orders):
    """The comparison is written all the same, and the next time all that is there is reused."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    from flows.sweep import SweepFailed, sweep

    grid = ("ppo.kl_coef=0.05,0.1",)
    (orders / "ppo").write_text("exit 3")
    with pytest.raises(SweepFailed, match=r"1 of 2 variants failed: 1 \(ppo.kl_coef=0.05\): ppo") as failure:
        sweep(config, grid)
    assert failure.value.exit_code == 1
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 1, 2, 1]
    [page] = [key for key in store.list("sweeps") if key.endswith("/report.html")]
    assert "failed: ppo" in store.read(page).decode()
    place = Path(sweep(config, grid))
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 1, 3, 2]
    assert place == store.local_path(page) and "failed: ppo" not in place.read_text()
    made = json.loads((place.parent / "sweep.json").read_text())
    assert [variant["label"] for variant in made["variants"]] == ["ppo.kl_coef=0.05", "ppo.kl_coef=0.1"]
    assert [(stage["stage"], stage["how"], stage["variants"]) for stage in made["stages"]] == [
        *((stage, "reused", [1, 2]) for stage in ("data", "sft", "reward")),
        ("ppo", "built", [1]), ("ppo", "reused", [2]), ("evaluate", "built", [1]), ("evaluate", "reused", [2]),
    ]  # fmt: skip
    shown = ArtifactFilter(key=ArtifactFilterKey(any_=["rlhf-sweep"]))
    with get_client(sync_client=True) as client:
        texts = [str(artifact.data) for artifact in client.read_artifacts(artifact_filter=shown)]
    assert sum(f"`{place}`" in text for text in texts) == 2


def test_when_a_shared_stage_fails_it_is_not_tried_again_for_each_variant(server, config, store, orders):
    from flows.sweep import SweepFailed, sweep

    (orders / "reward").write_text("exit 3")
    with pytest.raises(SweepFailed, match="2 of 3 variants failed: 1 "):
        sweep(config, (), ({"ppo.seed": 1}, {"ppo.seed": 2}, {"method": "dpo"}))
    assert [attempts(store, stage) for stage in (*STAGES, "dpo")] == [1, 1, 1, 0, 1, 1]


# --- branches --------------------------------------------------------------------------------------------------------


def test_a_branch_goes_on_from_a_checkpoint_and_its_result_needs_nothing_of_what_it_left(
    config, store, orders, tmp_path, capfd
):
    from tasks.stage import build_stage

    def build(config: PipelineConfig, stage: str, force: str | None = None):
        for planned in make_plan(config, store):
            made = build_stage(store, config, planned, force if planned.stage == stage else None)
            if planned.stage == stage:
                return made
        raise AssertionError(stage)

    left = next(planned for planned in make_plan(config, store) if planned.stage == "sft")
    (orders / "sft").write_text("save 40\nexit 3\n\n")
    with pytest.raises(JobFailed):
        build(config, "sft")
    file = tmp_path / "pipeline.yaml"
    file.write_text(config.model_dump_json())
    words = ("branch", file, "--stage", "sft", "--set", "sft.optim.lr=1e-4", "--at-step")
    code, _, err = command_line(capfd, *words, 41, "--dry-run")
    assert code == 2 and "no checkpoint at step 41; there are: 40" in err
    code, out, _ = command_line(capfd, *words, 40, "--dry-run")
    assert code == 0 and f"branches off {left.ref.id} at step 40" in out
    made = branch_of(config, "sft", 40, ["sft.optim.lr=1e-4"], store)
    stage = build(made, "sft")
    assert stage.how == "resumed" and stage.manifest.attempt == 1
    assert stage.manifest.provenance["job"]["resumed"] == [{"attempt": 1, "from": "step 40"}]
    assert not any("/checkpoints/" in key for key in store.list(stage.manifest.ref.id))
    for key in store.list(left.ref.id):
        store.delete(key)
    assert build(made, "sft").how == "reused"
    with pytest.raises(ConfigError, match="no checkpoint at step 40; there are: none"):
        build(made, "sft", force="again")


# --- reporting -------------------------------------------------------------------------------------------------------


def test_the_run_ends_with_a_report_that_names_every_artifact(server, config):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    from flows.rlhf import rlhf

    refs = rlhf(config)
    with get_client(sync_client=True) as client:
        reports = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["rlhf-report"])), sort=ArtifactSort.CREATED_DESC
        )
        progress = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["rlhf-sft-progress"])),
            sort=ArtifactSort.CREATED_DESC,
        )
    assert all(ref.id in str(reports[0].data) for ref in refs.values())
    assert "![lineage](data:image/svg+xml;base64," in str(reports[0].data)
    assert "train step 1/2" in str(progress[0].description)


def test_the_report_of_a_run_that_failed_says_what_is_done_what_failed_and_what_never_began(server, config, orders):
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

    from flows.rlhf import rlhf

    (orders / "reward").write_text("exit 3")
    with pytest.raises(JobFailed):
        rlhf(config)
    ours = FlowRunFilter(name=FlowRunFilterName(any_=[config.name]))
    with get_client(sync_client=True) as client:
        [text] = [str(a.data) for a in client.read_artifacts(flow_run_filter=ours) if a.key == "rlhf-report"]
    states = dict(line.strip("| ").split(" | ")[:2] for line in text.splitlines() if line.startswith("| "))
    assert states["sft"] == "built" and states["reward"].startswith("failed: reward was told to exit 3")
    assert states["ppo"] == states["evaluate"] == "waiting"


def test_a_reporting_error_is_one_warning_and_the_stage_goes_on(server, config, store, monkeypatch, caplog):
    from flows.single import data
    from tasks import progress

    def fail(*_, **__):
        raise RuntimeError("the server is on holiday")

    monkeypatch.setattr(progress, "create_progress_artifact", fail)
    monkeypatch.setattr(progress, "ARTIFACT_SECONDS", 0)
    data(config)
    assert attempts(store, "data") == 1
    warnings = [record.getMessage() for record in caplog.records if "cannot be reported" in record.getMessage()]
    assert warnings == ["progress cannot be reported (the stage goes on): RuntimeError: the server is on holiday"]


# --- the command line, killed and interrupted ------------------------------------------------------------------------


def hear_interrupts() -> None:
    """A test run in the background has SIGINT ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start(server, config, tmp_path, monkeypatch):
    """Starts `rlhf run` on the test's server; the process leads a group, as in a terminal."""
    file = tmp_path / "pipeline.yaml"
    file.write_text(config.model_dump_json())
    monkeypatch.setenv("PREFECT_API_URL", server)
    started = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND_LINE, "run", str(file), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=hear_interrupts,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


def processes_of(config: PipelineConfig) -> list[str]:
    """Job processes of this pipeline that are alive."""
    from rlhf_core import guard
    from tasks.stage import job_of

    store = Store(config.store)
    families = [job_of(store, config, planned).family for planned in make_plan(config, store)]
    return [str(pid) for family in families for pid in guard.processes_of(family)]


def _id(config: PipelineConfig, stage: str) -> str:
    return next(p.ref.id for p in make_plan(config, Store(config.store)) if p.stage == stage)


def test_a_run_prints_the_plan_and_the_results(start, config):
    out, err = start().communicate(timeout=120)
    assert "eval loss 1.5" in out
    assert all(_id(config, stage) in out for stage in STAGES)
    assert out.count("built") == len(STAGES)
    assert "sft: built" in err
    assert "| INFO" not in err


def test_a_killed_run_leaves_nothing_running_and_the_next_goes_on(start, config, store, orders):
    (orders / "reward").write_text("hang")
    process = start()
    wait_for_line(process, "reward: train")
    process.kill()
    process.wait()
    assert eventually(lambda: not processes_of(config))
    out, _ = start().communicate(timeout=120)
    assert [attempts(store, stage) for stage in STAGES] == [1, 1, 2, 1, 1]
    assert out.count("reused") == 2


@pytest.mark.parametrize(("signo", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_an_interrupted_run_ends_its_job_and_is_recorded_as_crashed(start, config, store, orders, signo, code):
    (orders / "sft").write_text("hang")
    process = start()
    wait_for_line(process, "sft: train")
    os.killpg(process.pid, signo) if signo == signal.SIGINT else process.send_signal(signo)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert err.count("the same command reuses the finished stages and goes on") == 1
    assert eventually(lambda: not processes_of(config))
    assert not store.list(_id(config, "sft")).get(f"{_id(config, 'sft')}/{MANIFEST}")
    assert eventually(lambda: [run["flow"] for run in run_states(config)] == ["Crashed"])


def test_a_failed_job_is_one_message_and_its_exit_code(start, orders):
    (orders / "data").write_text("exit 3")
    process = start()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.count("data was told to exit 3") == 1
    assert "Traceback" not in err


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_a_run_is_ended_its_job_saves_and_the_next_run_resumes(start, config, store, orders, signo):
    (orders / "sft").write_text("train until told")
    process = start()
    wait_for_line(process, "sft: train")
    process.send_signal(signo)
    process.communicate(timeout=60)
    assert eventually(lambda: not processes_of(config))
    out, err = start().communicate(timeout=120)
    assert "resume" in out and "from step 40 (attempt 1)" in out
    assert "sft: resumed" in err
    assert [attempts(store, stage) for stage in STAGES] == [1, 2, 1, 1, 1]


def test_a_second_run_waits_for_the_first_and_goes_on_where_that_was_killed(start, config, store, orders):
    """Interrupting the waiting leaves the first alone."""
    (orders / "sft").write_text("train until told")
    first, second = start(), None
    wait_for_line(first, "sft: train")
    second, third = start(), start()
    for waiting in (second, third):
        wait_for_line(waiting, f"sft: waiting for another run that builds it (host {platform.node()}, pid {first.pid}")
    third.send_signal(signal.SIGTERM)
    third.communicate(timeout=60)
    assert third.returncode == 75
    assert first.poll() is None and processes_of(config)
    first.kill()
    first.communicate()
    _, err = second.communicate(timeout=120)
    assert second.returncode == 0
    assert "sft: resumed" in err
    assert [attempts(store, stage) for stage in STAGES] == [1, 2, 1, 1, 1]


def test_a_run_that_slept_finds_its_stage_built_by_another(start, config, store, orders):
    """As a laptop that was closed: its lease has run out, its job is ended, and it goes on with the other's artifact."""
    (orders / "sft").write_text("hang")
    first = start()
    wait_for_line(first, "sft: train")
    first.send_signal(signal.SIGSTOP)
    out, _ = start().communicate(timeout=120)
    assert out.count("built") == len(STAGES) - 1
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=120)
    assert first.returncode == 0
    assert "another run has taken over" in err and "sft: reused" in err
    assert [attempts(store, stage) for stage in STAGES] == [1, 2, 1, 1, 1]
