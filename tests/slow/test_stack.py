"""The local stack with real training: a schedule, a failure and its retry, and every way in which something dies. Prints a table.

One stack for all tests, in order; each disturbed run has a PPO stage of its own (its seed) and shares the stages before it.
"""

import signal
import time
import urllib.error
from datetime import UTC, datetime, timedelta

import pytest
from stacked import CONFIG, Stacked, free_port, kill, wait

from rlhf_core.artifacts import Manifest
from rlhf_core.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GONE_SECONDS = 30  # what the design promises of a cancelled run's ranks
LONG = "ppo.steps=40"
AWAY, AWAY_SECONDS = "ppo.steps=1000", 120  # a quiet machine takes four a second


class Table(list[tuple[str, ...]]):
    """What was measured."""

    def add(self, what: str, marked: str, after: str, again: str, on: str) -> None:
        self.append((what, marked, after, again, on))

    def text(self) -> str:
        head = ("what was done", "the run is then", "after", "training again after", "went on from")
        lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *self)]
        return "\n".join(lines)


@pytest.fixture(scope="module")
def table(pytestconfig):
    rows = Table()
    yield rows
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{rows.text()}\n")


@pytest.fixture(scope="module")
def stacked(tmp_path_factory):
    found = Stacked(tmp_path_factory.mktemp("stack"))
    try:
        found.rlhf("up", str(CONFIG), "--port", str(free_port()))
        yield found
    finally:
        found.rlhf("down")
        left = found.stack.processes()
        kill(*left)
        assert not left, "rlhf down has left processes"


def seconds(value: float) -> str:
    return f"{value:.1f} s"


def start_ppo(stacked: Stacked, seed: int) -> tuple[str, tuple[str, str]]:
    """A run that has come to the middle of its PPO stage."""
    sets = (LONG, f"ppo.seed={seed}")
    run = stacked.start(*sets)
    stacked.wait_for_step(3, "ppo", *sets)
    return run, sets


def goes_on(stacked: Stacked, run: str, since: float) -> float:
    """The seconds from `since` until ranks train again."""
    wait(lambda: bool(stacked.ranks()), lambda: stacked.state(run))
    return time.monotonic() - since


# --- schedule, failure, retry ----------------------------------------------------------------------------------------


def test_an_interval_starts_a_run_by_itself_and_retry_finishes_it_after_its_reward_stage_has_failed(stacked, table):
    pipeline = stacked.deployment("rlhf/pipeline")
    every = {"schedule": {"interval": 20, "anchor_date": "2026-01-01T00:00:00+00:00"}, "active": True}
    [schedule] = stacked.call("POST", f"/deployments/{pipeline}/schedules", [every])
    began = time.monotonic()
    wait(lambda: bool(stacked.stack.runs()), lambda: "no run has begun")
    stacked.call("PATCH", f"/deployments/{pipeline}/schedules/{schedule['id']}", {"active": False})
    scheduled = time.monotonic() - began
    started = {
        "flow_runs": {"deployment_id": {"any_": [pipeline]}, "state": {"type": {"any_": ["RUNNING", "PENDING"]}}}
    }
    [run] = stacked.call("POST", "/flow_runs/filter", started)
    assert run["auto_scheduled"]
    table.add("an interval of 20 s is set", "started by the schedule", seconds(scheduled), "", "")

    stacked.wait_for_step(5, "reward")
    kill(*stacked.ranks())
    failed = stacked.wait_for_state(run["id"], "Failed")
    assert stacked.tasks(run["id"]) == {"data": "Completed", "sft": "Completed", "reward": "Failed"}
    step = stacked.step("reward")
    pressed = time.monotonic()
    stacked.set_state(run["id"], "SCHEDULED", "AwaitingRetry")
    again = goes_on(stacked, run["id"], pressed)
    stacked.wait_for_state(run["id"], "Completed")
    whole = {"data": "Cached", "sft": "Cached", "reward": "Completed", "ppo": "Completed", "evaluate": "Completed"}
    wait(lambda: stacked.tasks(run["id"]) == whole, lambda: str(stacked.tasks(run["id"])))
    assert stacked.resumed("reward") == [f"step {step}"]
    assert stacked.resumed("sft") == stacked.resumed("ppo") == []
    assert stacked.call("GET", f"/flow_runs/{run['id']}")["name"] == "stack"
    row = (
        "kill -9 of a rank, retries 0; *Retry*",
        "Failed, by the flow",
        seconds(failed),
        seconds(again),
        f"step {step}",
    )
    table.add(*row)


def test_up_again_leaves_all_as_it_is_schedules_too(stacked):
    pipeline = stacked.deployment("rlhf/pipeline")
    known = {each["slug"]: each for each in stacked.call("GET", f"/deployments/{pipeline}/schedules")}
    stacked.call("PATCH", f"/deployments/{pipeline}/schedules/{known['nightly']['id']}", {"active": True})
    before = stacked.part("server"), stacked.part("worker")
    said = stacked.rlhf("up", str(CONFIG))
    assert (stacked.part("server"), stacked.part("worker")) == before
    assert "starting" not in said
    after = {each["slug"]: each["active"] for each in stacked.call("GET", f"/deployments/{pipeline}/schedules")}
    assert after == {"nightly": True, "hourly": False, None: False}


def test_a_parameter_that_the_form_would_refuse_is_refused_by_the_server(stacked):
    pipeline = stacked.deployment("rlhf/pipeline")
    config = stacked.config().model_dump(mode="json")
    config["ppo"]["kl_cof"] = 1
    with pytest.raises(urllib.error.HTTPError) as refused:
        stacked.call("POST", f"/deployments/{pipeline}/create_flow_run", {"parameters": {"config": config}})
    assert "kl_cof" in refused.value.read().decode()


# --- what dies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signo", "seed", "what"),
    [(signal.SIGKILL, 1, "kill -9 of the flow's process"), (signal.SIGTERM, 2, "SIGTERM to the flow's process")],
)
def test_a_run_whose_process_dies_is_marked_and_started_again_by_the_server(stacked, table, signo, seed, what):
    run, sets = start_ppo(stacked, seed)
    killed = time.monotonic()
    kill(*stacked.stack.runs(), signo=signo)
    marked = stacked.wait_for_state(run, "Crashed", "AwaitingRetry", "Pending")
    wait(lambda: not stacked.jobs(), lambda: "the job lives")
    again = goes_on(stacked, run, killed)
    stacked.wait_for_state(run, "Completed")
    assert stacked.starts(run) == 2
    [step] = stacked.resumed("ppo", *sets)
    table.add(
        what, "Crashed, by the worker" if seed == 1 else "Crashed, by the run", seconds(marked), seconds(again), step
    )


def test_a_run_outlives_its_worker(stacked, table):
    run, sets = start_ppo(stacked, 3)
    kill(stacked.part("worker"))
    stacked.wait_for_state(run, "Completed")
    assert stacked.resumed("ppo", *sets) == []
    status = stacked.rlhf("up", "--status", code=1)
    assert "has died" in status
    assert "worker: had died" in stacked.rlhf("up", str(CONFIG))
    table.add("kill -9 of the worker", "Completed, by itself", "", "undisturbed; `rlhf up` starts a worker again", "")


def test_when_the_machine_is_lost_the_next_up_finds_and_finishes_the_run(stacked, table):
    run, sets = start_ppo(stacked, 4)
    kill(*stacked.stack.processes())
    wait(lambda: not stacked.stack.processes(), lambda: "something lives")
    killed = time.monotonic()
    said = stacked.rlhf("up", str(CONFIG))
    assert "server: had died" in said and "worker: had died" in said
    assert "run stack: has lost its process; it goes on" in said
    marked = time.monotonic() - killed
    again = goes_on(stacked, run, killed)
    stacked.wait_for_state(run, "Completed")
    [step] = stacked.resumed("ppo", *sets)
    table.add("kill -9 of everything; `rlhf up`", "AwaitingRetry, by `rlhf up`", seconds(marked), seconds(again), step)


def test_when_only_the_machine_of_the_worker_is_lost_its_silence_is_noticed(stacked, table):
    run, sets = start_ppo(stacked, 9)
    kill(*stacked.stack.processes() - {stacked.part("server")})
    marked = stacked.wait_for_state(run, "Crashed")
    scheduled = stacked.wait_for_state(run, "AwaitingRetry")
    assert "worker: had died" in stacked.rlhf("up", str(CONFIG))
    stacked.wait_for_state(run, "Completed")
    [step] = stacked.resumed("ppo", *sets)
    what = "kill -9 of worker, run and ranks"
    table.add(
        what, "Crashed, by its missing heartbeat", seconds(marked), f"{marked + scheduled:.1f} s: scheduled", step
    )


def test_down_saves_and_the_next_up_goes_on(stacked, table):
    run, sets = start_ppo(stacked, 5)
    began = time.monotonic()
    said = stacked.rlhf("down")
    ended = time.monotonic() - began
    assert "runs: 1 told to save and end" in said
    assert not stacked.stack.processes()
    upped = time.monotonic()
    stacked.rlhf("up", str(CONFIG))
    again = goes_on(stacked, run, upped)
    stacked.wait_for_state(run, "Completed")
    [step] = stacked.resumed("ppo", *sets)
    table.add("`rlhf down`, then `rlhf up`", "Crashed, by the run", seconds(ended), seconds(again), step)


@pytest.mark.timeout(1800)
def test_training_goes_on_while_the_server_is_away_and_ends_with_the_same_bits_and_a_whole_report(stacked, table):
    sets = (AWAY, "ppo.seed=10")
    run = stacked.start(*sets)
    stacked.wait_for_step(3, "ppo", *sets)
    kill(stacked.part("server"))
    began = stacked.step("ppo", *sets)
    time.sleep(AWAY_SECONDS)
    ended = stacked.step("ppo", *sets)
    said = stacked.rlhf("up", str(CONFIG))
    assert ended > began and not stacked.manifest("ppo", *sets), "PPO is too short for this test"
    assert "server: had died" in said and "has lost its process" not in said
    stacked.wait_for_state(run, "Completed", seconds=900)
    assert stacked.starts(run) == 1
    reports = {each["key"]: each for each in stacked.artifacts(run)}
    assert reports["rlhf-ppo-progress"]["data"] == 100
    assert "**built**" in reports["rlhf-ppo-report"]["data"]
    assert "![score]" in reports["rlhf-ppo-report"]["data"]
    assert (
        "| ppo | built |" in reports["rlhf-report"]["data"] and "| evaluate | built |" in reports["rlhf-report"]["data"]
    )

    elsewhere = Store(f"file://{stacked.folder}/undisturbed")
    again = stacked.start(*sets, f"store={elsewhere.url}")
    stacked.wait_for_state(again, "Completed", seconds=900)
    disturbed, undisturbed = stacked.manifest("ppo", *sets), stacked.manifest("ppo", *sets, store=elsewhere)
    assert disturbed and undisturbed
    assert weights(disturbed) == weights(undisturbed)
    what = f"kill -9 of the server, `rlhf up` {AWAY_SECONDS} s later"
    on = f"undisturbed, the same bits (steps {began} to {ended} without a server)"
    table.add(what, "Completed, by itself", "", on, "")


def weights(manifest: Manifest) -> dict[str, str]:
    """The digests of a stage's weights."""
    return {entry.path: entry.sha256 for entry in manifest.files if entry.path.endswith(".safetensors")}


# --- what a person asks for ------------------------------------------------------------------------------------------


def test_cancel_ends_every_rank_saves_and_resume_goes_on(stacked, table):
    run, sets = start_ppo(stacked, 6)
    began = time.monotonic()
    stacked.set_state(run, "CANCELLING", "Cancelling")
    gone = wait(lambda: not stacked.jobs(), lambda: "ranks live")
    assert gone < GONE_SECONDS
    stacked.wait_for_state(run, "Cancelled")
    cancelled = time.monotonic() - began
    place = stacked.place("ppo", *sets)
    pressed = time.monotonic()
    said = stacked.rlhf("resume", run)
    assert "resume" in said and f"from {place}" in said and "scheduled again" in said
    again = goes_on(stacked, run, pressed)
    stacked.wait_for_state(run, "Completed")
    assert stacked.resumed("ppo", *sets) == [place]
    what = f"*Cancel*, no rank left after {gone:.1f} s; `rlhf resume`"
    table.add(what, "Cancelled, by the worker", seconds(cancelled), seconds(again), place)


def test_suspend_stops_after_the_stage_and_resume_goes_on_with_the_next(stacked, table):
    run, sets = start_ppo(stacked, 7)
    later = datetime.now(UTC) + timedelta(hours=1)
    stacked.set_state(run, "PAUSED", "Suspended", pause_timeout=later.isoformat(), pause_reschedule=True)
    took = wait(lambda: not stacked.stack.runs(), lambda: "the run lives")
    assert stacked.manifest("ppo", *sets) and not stacked.manifest("evaluate", *sets)
    assert stacked.state(run) == "Suspended"
    pressed = time.monotonic()
    stacked.rlhf("resume", run)
    again = goes_on(stacked, run, pressed)
    stacked.wait_for_state(run, "Completed")
    assert stacked.tasks(run)["ppo"] == "Cached"
    table.add("*Suspend*; `rlhf resume`", "Suspended, after the stage", seconds(took), seconds(again), "the next stage")


def test_resume_from_a_stage_is_a_new_run_that_builds_it_and_what_follows_anew(stacked):
    said = stacked.rlhf("resume", "stack", "--from", "evaluate")
    [new] = [line.split()[2].rstrip(":") for line in said.splitlines() if line.startswith("new run")]
    stacked.wait_for_state(new, "Completed")
    wait(lambda: stacked.tasks(new).get("evaluate") == "Completed", lambda: str(stacked.tasks(new)))
    assert {name for name, state in stacked.tasks(new).items() if state != "Cached"} == {"evaluate"}


def test_a_run_without_a_deployment_goes_on_where_it_is_resumed(stacked):
    said = stacked.rlhf("run", str(CONFIG), "--set", "ppo.seed=8")
    assert stacked.stack.api().removesuffix("/api") in said, "recorded on the stack of its folder"
    runs = {"flow_runs": {"name": {"any_": ["stack"]}}, "sort": "START_TIME_DESC", "limit": 1}
    [run] = stacked.call("POST", "/flow_runs/filter", runs)
    assert run["deployment_id"] is None
    said = stacked.rlhf("resume", run["id"], "--from", "evaluate")
    assert "goes on here" in said and "done" in said
