"""What is submitted to Slurm, and what its answers mean; the real Slurm is in tests/integration/test_slurm.py."""

import hashlib
import os
import subprocess
import sys

import pytest

from rlhf_core import slurm
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.cluster import Cluster, SlurmPlan
from rlhf_core.errors import ConfigError
from rlhf_core.job import JobSpec
from rlhf_core.resources import CheckpointPlan, Resources
from rlhf_core.slurm import CANNOT_START, Mark, Seen, parse, trouble_of
from rlhf_core.start_nodes import NodesStarter
from rlhf_core.start_slurm import SlurmStarter, digest, environment, job_name, options, script
from rlhf_core.starting import agent_id, seats_of
from rlhf_core.store import Store

STORE = Store("s3://bucket/some place")
FINGERPRINT = hashlib.sha256(b"x").hexdigest()


def job_of(name="test", attempt=1, left_out=(), threads=None, processes=1, grace=20.0, **cluster) -> JobSpec:
    job = JobSpec(
        stage="sft", store=STORE.url, output=ArtifactRef(stage="sft", name=name, fingerprint=FINGERPRINT), attempt=attempt,
        job_id="", spec={}, identity={}, left_out=left_out,
        resources=Resources(
            launcher="slurm", processes=processes, threads=threads, cluster=Cluster(nodes=2, **cluster),
            checkpoint=CheckpointPlan(grace_seconds=grace),
        ),
    )  # fmt: skip
    return job.model_copy(update={"job_id": f"{job.family}{attempt:012x}"})


def given(job: JobSpec) -> dict[str, str]:
    """Options by name; of those that are given twice the last, as sbatch takes them."""
    return {name: value for name, _, value in (option.partition("=") for option in options(job, 2))}


# --- what is submitted -----------------------------------------------------------------------------------------------


def test_all_attempts_at_an_artifact_have_one_name_and_other_artifacts_another():
    names = {job_name(job_of(attempt=n)) for n in (1, 2)}
    assert len(names) == 1
    assert job_name(job_of("other")) not in names
    assert not set("/, %") & set(*names), "squeue takes lists, and sbatch makes files of names"


def test_a_job_asks_for_its_nodes_and_cores_and_time_to_save():
    found = given(job_of(processes=4, threads=3, grace=20, slurm=SlurmPlan(partition="gpu", time_limit="1-00:00:00")))
    assert found["--nodes"] == "2" and found["--ntasks-per-node"] == "1" and found["--cpus-per-task"] == "12"
    assert found["--partition"] == "gpu" and found["--time"] == "1-00:00:00"
    assert found["--signal"] == "TERM@30" and "--requeue" in found and "--account" not in found


def test_what_people_ask_for_comes_last_and_so_counts():
    found = given(job_of(slurm=SlurmPlan(options=("--cpus-per-task=64", "--output=out-%j.txt", "--exclusive"))))
    assert (found["--cpus-per-task"], found["--output"]) == ("64", "out-%j.txt") and "--exclusive" in found


@pytest.mark.parametrize(
    "option", ["--nodes=3", "-N3", "--array=1-2", "-Jname", "--clusters=a", "--wait", "--comment=x"]
)
def test_an_option_by_which_a_job_would_not_be_found_again_is_refused_by_name(option):
    with pytest.raises(ConfigError, match=f"resources.cluster.slurm.options: '{option}'"):
        SlurmStarter(STORE, job_of(slurm=SlurmPlan(options=(option,))), seats_of(["a", "b"], 1))


def test_only_what_belongs_to_the_machine_that_submits_stays_there(monkeypatch):
    own = (
        "RLHF_JOB_ID",
        "RLHF_GUARD_PID",
        "RLHF_RANKS",
        "RANK",
        "CUDA_VISIBLE_DEVICES",
        "SLURM_JOB_ID",
        "PREFECT_API_KEY",
    )
    for name in (*own, "SLURM_CONF", "AWS_PROFILE", "RLHF_NODE_BEAT", "HOME"):
        monkeypatch.setenv(name, "x")
    found = environment(job_of(env={"NCCL_DEBUG": "INFO"}))
    assert not set(own) & found.keys()
    assert {"SLURM_CONF", "AWS_PROFILE", "RLHF_NODE_BEAT", "HOME", "NCCL_DEBUG", "PATH"} <= found.keys()


def test_the_script_holds_no_credential(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-secret")
    job = job_of()
    starter = SlurmStarter(STORE, job, seats_of(["a", "b"], 1))
    assert "canary" not in script(STORE, job, starter._mark) + str(starter._mark) + str(starter._options)


def test_the_digest_is_that_of_the_request_and_not_of_the_attempt(monkeypatch):
    same = digest(STORE, job_of(), 2)
    assert digest(STORE, job_of(attempt=2), 2) == same
    others = [
        digest(STORE, job_of(), 1),
        digest(STORE, job_of(processes=2), 2),
        digest(STORE, job_of(python="/other"), 2),
        digest(STORE, job_of(env={"A": "1"}), 2),
        digest(STORE, job_of(slurm=SlurmPlan(options=("--gres=gpu:8",))), 2),
        digest(STORE, job_of(left_out=("n1",)), 2),
    ]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another, after a rotation")
    others.append(digest(STORE, job_of(), 2))
    assert len({same, *others}) == len(others) + 1


@pytest.fixture
def run_script(tmp_path):
    """Runs a job's script with a srun that runs one node, number 7, here; returns code, output and what was said to Slurm."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nSLURM_NODEID=7 exec "$@"\n')
    (programs / "scontrol").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {tmp_path}/told\n')
    for file in programs.iterdir():
        file.chmod(0o755)

    def run(text: str) -> tuple[int, str, str]:
        env = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "12",
            "SLURMD_NODENAME": "n8",
            "HOME": str(tmp_path),
        }
        done = subprocess.run(["sh"], input=text, env=env, capture_output=True, text=True, timeout=60)
        told = tmp_path / "told"
        return done.returncode, done.stdout + done.stderr, told.read_text() if told.exists() else ""

    return run


def test_a_node_carries_the_id_that_others_look_for(run_script, monkeypatch, tmp_path):
    (tmp_path / "show.py").write_text(
        "import os, sys\nprint([os.environ.get('RLHF_JOB_ID'), *sys.argv[1:]])\nsys.exit(5)\n"
    )
    monkeypatch.setattr(
        "rlhf_core.start_slurm.node_command", lambda store, ref: ["-m", "json.tool", f"{store.url} 'x'"]
    )
    job = job_of(python=str(tmp_path / "python"))
    (tmp_path / "python").write_text(
        f'#!/bin/sh\n[ "$2" = "import json.tool" ] && exit 0\nexec {sys.executable} {tmp_path}/show.py "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    code, output, told = run_script(script(STORE, job, Mark("abc", 0, job.job_id)))
    assert (code, told) == (5, "")
    assert output.strip() == str([agent_id(job, 7), "-u", "-m", "json.tool", f"{STORE.url} 'x'"])


def test_a_node_that_cannot_start_tells_slurm_its_last_words(run_script, monkeypatch):
    monkeypatch.setattr("rlhf_core.start_slurm.node_command", lambda store, ref: ["-m", "no_such_package.node"])
    job = job_of(python=sys.executable)
    mark = Mark("abc", 3, job.job_id)
    code, _, told = run_script(script(STORE, job, mark))
    assert code == CANNOT_START
    assert told.splitlines() == [
        "update",
        "JobId=12",
        f"Comment={mark} n8: ModuleNotFoundError: No module named 'no_such_package'",
    ]
    seen = parse(f"JobId=12 JobState=RUNNING Reason=None {told.splitlines()[2]}  StdErr=/dev/null Power=")
    assert seen.mark == mark
    assert seen.said == "n8: ModuleNotFoundError: No module named 'no_such_package'"


# --- what Slurm says -------------------------------------------------------------------------------------------------

LINE = (
    "JobId=12 JobName=rlhf-sft-test UserId=me(1000) GroupId=me(1000) MCS_label=N/A Priority=42 Nice=0 Account=(null) QOS=(null) "
    "JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=3:0 RunTime=00:01:02 "
    "TimeLimit=1-00:00:00 TimeMin=N/A PreemptEligibleTime=2030-01-01T00:00:00 PreemptTime={preempt} Partition=low NodeList=n[1-2] "
    "Command=(null) WorkDir=/home/me/a Restarts=7 Comment={comment} StdErr=/dev/null StdIn=/dev/null StdOut=/dev/null Power= "
)


def test_a_line_of_scontrol_is_read():
    seen = parse(LINE.format(preempt="None", comment="rlhf:abc:1:sft/test-0@1/x"))
    assert seen == Seen(
        state="RUNNING", reason="None", restarts=2, code=3, ran="00:01:02", limit="1-00:00:00", nodes="n[1-2]",
        mark=Mark("abc", 1, "sft/test-0@1/x"),
    )  # fmt: skip
    assert parse(LINE.format(preempt="2030-01-01T00:00:00", comment="")).preempted
    assert parse(LINE.format(preempt="None", comment="of somebody else")).mark is None


@pytest.mark.parametrize(
    "seen",
    [
        Seen("PENDING", "Resources"),
        Seen("PENDING", "QOSMaxCpuPerUserLimit"),
        Seen("PENDING", "JobHeldUser"),
        Seen("PENDING", "BeginTime", restarts=1),
        Seen("CONFIGURING", "None"),
        Seen("RUNNING", "None", restarts=1),
        Seen("SIGNALING", "None"),
        Seen("COMPLETING", "None"),
    ],
    ids=lambda seen: f"{seen.state}-{seen.reason}",
)
def test_a_job_that_waits_or_runs_or_is_ending_is_no_trouble(seen):
    assert trouble_of("12", seen, max(seen.restarts, 0), "python") is None


@pytest.mark.parametrize(
    ("seen", "kind", "words"),
    [
        (Seen("CANCELLED", "None"), "configuration", "scancel"),
        (Seen("PENDING", "PartitionNodeLimit"), "configuration", "PartitionNodeLimit"),
        (Seen("PENDING", "PartitionTimeLimit"), "configuration", "can never start"),
        (Seen("PENDING", "QOSMaxNodePerJobLimit"), "configuration", "can never start"),
        (Seen("RUNNING", "None", said="n2: no such file"), "configuration", "n2: no such file"),
        (Seen("FAILED", "NonZeroExitCode", code=CANNOT_START), "configuration", "resources.cluster.python"),
        (Seen("TIMEOUT", "TimeLimit", limit="00:10:00"), "timed out", "00:10:00"),
        (Seen("DEADLINE", "None"), "timed out", "time limit"),
        (Seen("PENDING", "BeginTime", restarts=1), "preempted", "queued again"),
        (Seen("COMPLETING", "None", restarts=1), "preempted", "queued again"),
        (Seen("RUNNING", "None", preempted=True), "preempted", "another job"),
        (Seen("PREEMPTED", "None"), "preempted", "another job"),
        (Seen("FAILED", "NonZeroExitCode", code=75, preempted=True), "preempted", "another job"),
        (Seen("FAILED", "NonZeroExitCode", code=75, ran="00:09:30"), "preempted", "00:09:30"),
        (Seen("SUSPENDED", "None"), "preempted", "halted"),
        (Seen("PENDING", "launch_failed_requeued_held", restarts=1), "launcher", "given up"),
        (Seen("OUT_OF_MEMORY", "OutOfMemory"), "launcher", "--mem"),
        (Seen("NODE_FAIL", "NodeDown", nodes="n[1-2]"), "launcher", "NODE_FAIL (NodeDown)"),
        (Seen("BOOT_FAIL", "None"), "launcher", "BOOT_FAIL"),
        (Seen("FAILED", "NonZeroExitCode", code=1), "launcher", "exit code 1"),
        (Seen("COMPLETED", "None"), "launcher", "COMPLETED"),
    ],
    ids=lambda value: f"{value.state}-{value.reason}" if isinstance(value, Seen) else "",
)
def test_each_end_of_a_job_has_its_kind(seen, kind, words):
    trouble = trouble_of("12", seen, 0, "/usr/bin/python3")
    assert trouble is not None and trouble.kind == kind
    assert words in trouble.message


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination", slurm.Refused),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", slurm.NoAnswer),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", slurm.NoAnswer),
        ("sbatch: error: Munge encode failed: Failed to access \"/run/munge/munge.socket\"", slurm.NoAnswer),
    ],
)  # fmt: skip
def test_a_refusal_is_told_from_a_controller_that_is_away(said, error, tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\ncat >&2 <<'E'\n{said}\nE\nexit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(error) as info:
        slurm.ask("sbatch")
    assert str(info.value) == said.removeprefix("sbatch: error: ")


def test_a_machine_without_slurm_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.Refused, match="there is no sbatch on this machine; install"):
        slurm.ask("sbatch")


def test_a_starter_on_a_machine_without_slurm_ends_with_a_clear_word(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    SlurmStarter(STORE, job_of(), seats_of(["a", "b"], 1)).stop()
    starter = SlurmStarter(STORE, job_of(), seats_of(["a", "b"], 1))
    starter.start()
    starter._thread.join(20)
    [trouble] = starter.look()
    assert trouble.kind == "configuration" and "there is no squeue on this machine; install" in trouble.message
    starter.stop()


# --- nodes that somebody else starts ---------------------------------------------------------------------------------


def test_until_the_first_node_comes_people_are_told_what_to_start(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_core.start_nodes.LOOK_SECONDS", 0)
    store, job = Store(str(tmp_path)), job_of("demo")
    starter = NodesStarter(store, job, seats_of(["a", "b"], 1))
    starter.start()
    assert f"with N from 0 to 1: rlhf node demo --store {store.url} --node N" in (starter.waits() or "")
    assert starter.look() == []
    store.write(f"{job.folder}/nodes/0001.json", b"{}")
    assert starter.waits() is None, "from now on the others have resources.cluster.start_seconds"
    starter.stop()
