"""The command line: what it shows, what it refuses and how it ends. Real files, a real store, no training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import rlhf, small_pipeline

from flows import cli
from rlhf_core.artifacts import Manifest, describe, publish
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.plan import make_plan
from rlhf_core.store import Store

PPO = ["data", "sft", "reward", "ppo", "evaluate"]
DPO = ["data", "sft", "dpo", "evaluate"]
METRICS = {
    "rows_kept": 4000,
    "eval_accuracy": 0.84,
    "eval_accuracy_low": 0.81,
    "eval_accuracy_high": 0.87,
    "seconds": 61,
}


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """A small pipeline with a store of its own."""
    for name in ("PREFECT_API_URL", "RLHF_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.chdir(tmp_path)
    return small_pipeline(tmp_path)


@pytest.fixture
def published(file, tmp_path) -> tuple[Store, dict[str, Manifest]]:
    """Every stage of the pipeline, published with a file each."""
    config: PipelineConfig = load_config(file)
    store = Store(config.store)
    manifests = {}
    for stage in make_plan(config, store):
        folder = tmp_path / "made" / stage.stage
        names = {"ppo": "actor/weights", "evaluate": "report.html"}
        path = folder / names.get(stage.stage, "model/weights")
        path.parent.mkdir(parents=True)
        path.write_text(stage.stage)
        for entry in describe(folder):
            store.upload(folder / entry.path, f"{stage.ref.id}/{entry.path}")
        made = Manifest(
            ref=stage.ref, spec=stage.identity, inputs=stage.inputs, files=describe(folder), metrics=dict(METRICS)
        )
        manifests[stage.stage] = publish(store, made)
    return store, manifests


# --- plan ------------------------------------------------------------------------------------------------------------


def test_plan_says_for_each_stage_what_will_happen_and_why(file, capfd):
    code, out, _ = rlhf(capfd, "plan", file)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [[stage, "build"] for stage in PPO]
    assert "first of its kind" in out


def test_plan_names_the_field_that_makes_a_stage_build_anew(file, published, capfd):
    _, out, _ = rlhf(capfd, "plan", file, "--set", "ppo.kl_coef=0.2")
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert [stage for stage in PPO if " reuse " in rows[stage]] == ["data", "sft", "reward"]
    assert "kl_coef: 0.05 -> 0.2" in rows["ppo"]
    assert "input ppo changed" in rows["evaluate"]


def test_from_forces_a_stage_and_all_that_follow(file, published, capfd):
    _, out, _ = rlhf(capfd, "plan", file, "--from", "reward", "--force", "data")
    forced = [line.split()[0] for line in out.splitlines() if line.endswith("forced") or "forced" in line]
    assert forced == ["data", "reward", "ppo", "evaluate"]


def test_with_dpo_the_pipeline_has_neither_a_reward_model_nor_ppo(file, published, capfd):
    _, out, _ = rlhf(capfd, "plan", file, "--set", "method=dpo")
    rows = [line.split()[:2] for line in out.splitlines()[1:]]
    assert rows == [["data", "reuse"], ["sft", "reuse"], ["dpo", "build"], ["evaluate", "build"]]
    _, out, _ = rlhf(capfd, "plan", file, "--set", "method=dpo", "--from", "dpo")
    assert [line.split()[0] for line in out.splitlines() if "forced" in line] == ["dpo", "evaluate"]


def test_dry_run_shows_the_plan_and_writes_nothing(file, capfd, tmp_path):
    code, out, _ = rlhf(capfd, "run", file, "--dry-run")
    assert code == 0
    assert "build" in out
    assert not (tmp_path / "store").exists()


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "nowhere.yaml"], "no such file; there are: small.yaml"),
        (["plan", "small.yaml", "--set", "ppo.kl_coeff=1"], "did you mean 'kl_coef'?"),
        (["plan", "small.yaml", "--set", "sft.batch_size"], "write key=value"),
        (["plan", "small.yaml", "--force", "rm"], "the stages are data, sft, reward, ppo, dpo, evaluate"),
        (["run", "small.yaml", "--stage", "rm"], "is no stage"),
        (["run", "small.yaml", "--stage", "dpo"], "not part of this pipeline (method is ppo)"),
        (["run", "small.yaml", "--from", "dpo"], "its stages are data, sft, reward, ppo, evaluate"),
        (["plan", "small.yaml", "--set", "method=dpo", "--force", "reward"], "its stages are data, sft, dpo, evaluate"),
        (["chat", "small.yaml", "--stage", "dpo"], "not part of this pipeline"),
        (["run", "small.yaml", "--set", "sft.precision=fp16"], "sft.precision: fp16 needs a GPU"),
        (["run", "small.yaml", "--set", "resources.pack_tokens=8"], "less than the longest row"),
        (["run", "small.yaml", "--set", "resources.stages={data: {gpus: 1}}"], "resources.stages.data"),
        (["run", "small.yaml", "--set", "resources={zero_stage: 3, offload_parameters: nvme, nvme_path: /no}"], "/no"),
        (["run", "small.yaml", "--set", "model.path=./missing"], "'./missing' does not exist"),
        (["run", "small.yaml", "--set", "sft.batch_size=3", "--set", "resources.processes=2"], "multiple of 2"),
        (["run", "small.yaml", "--set", "store=gs://bucket"], "use file://, s3:// or memory://"),
        (["run", "small.yaml", "--stage", "ppo"], "make it with `rlhf run CONFIG --stage data`"),
        (["artifacts", "show", "sft/none"], "no artifact begins with 'sft/none'"),
        (["chat", "small.yaml"], "is not published"),
        (["chat", "small.yaml", "--stage", "reward"], "choose sft or ppo or dpo"),
    ],
)
def test_a_mistake_is_one_message_with_a_remedy_and_exit_code_2(file, capfd, words, message):
    code, _, err = rlhf(capfd, *words)
    assert code == 2
    assert message in err.replace("\n", " ")
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_a_server_that_does_not_answer_is_named_with_a_remedy(file, capfd, monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        code, _, err = rlhf(capfd, "run", file)
    assert code == 1
    assert "http://127.0.0.1:9/api does not answer" in err
    assert "prefect server start" in err
    assert "Traceback" not in err


def test_a_server_that_cannot_start_is_told_with_what_it_said(file, tmp_path):
    bad = {"PREFECT_API_DATABASE_CONNECTION_URL": "sqlite+aiosqlite:////nonexistent/prefect.db"}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(file)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **bad},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "the temporary Prefect server ended with code" in done.stderr
    assert "unable to open database file" in done.stderr
    assert not (tmp_path / "store").exists()


# --- Python functions as rewards -------------------------------------------------------------------------------------


@pytest.fixture
def function(file, monkeypatch) -> list[str]:
    """Options that make a Python function the reward; importing its file would be noticed."""
    monkeypatch.setenv("RLHF_ALLOW_CODE", "0")  # set, so that what the flag changes is undone
    Path("judge.py").write_text("raise SystemExit('imported')\ndef score(prompts, responses):\n    return [0.0]\n")
    return ["--set", "ppo.rewards=[{kind: function, function: 'judge.py:score'}]"]


@pytest.mark.parametrize("command", ["plan", "run"])
def test_a_python_function_needs_the_flag_before_anything_runs(file, function, capfd, tmp_path, command):
    code, _, err = rlhf(capfd, command, file, *function)
    assert code == 2
    assert "ppo.rewards[0].function" in err and "--allow-code" in err and "RLHF_ALLOW_CODE=1" in err
    assert not (tmp_path / "store").exists()


def test_with_the_flag_the_plan_has_no_reward_model_and_the_job_may_run_the_function(file, function, capfd):
    code, out, _ = rlhf(capfd, "plan", file, *function, "--allow-code")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["data", "sft", "ppo", "evaluate"]
    assert os.environ["RLHF_ALLOW_CODE"] == "1"


@pytest.mark.parametrize(
    ("function_name", "message"),
    [
        ("judge.py:scores", "defines no 'scores'; it has score"),
        ("gone.py:score", "'gone.py' does not exist"),
        ("no_such_package.x:f", "the package 'no_such_package.x' is not installed"),
        ("score", "module:name"),
    ],
)
def test_a_function_that_is_not_there_is_told_before_anything_runs(file, function, capfd, function_name, message):
    rewards = f"ppo.rewards=[{{kind: function, function: '{function_name}'}}]"
    code, _, err = rlhf(capfd, "plan", file, "--set", rewards, "--allow-code")
    assert code == 2
    assert message in err.replace("\n", " ")


# --- run with nothing to do ------------------------------------------------------------------------------------------


def test_a_run_with_everything_published_ends_at_once_and_shows_the_results(file, published, capfd):
    code, out, err = rlhf(capfd, "run", file)
    assert code == 0
    assert out.count("reused") == len(PPO)
    assert "0.84 [0.81, 0.87]" in out
    assert "1 min 01 s" in out
    assert "report.html" in out
    assert "Prefect" not in err


def test_a_published_artifact_that_lost_a_file_is_refused_with_the_remedy(file, published, capfd):
    store, manifests = published
    store.delete(f"{manifests['sft'].ref.id}/model/weights")
    code, _, err = rlhf(capfd, "run", file)
    assert code == 3
    assert "missing" in err
    assert "--force sft" in err


# --- artifacts -------------------------------------------------------------------------------------------------------


def test_list_shows_published_artifacts_with_their_headline(file, published, capfd):
    store, manifests = published
    _, out, _ = rlhf(capfd, "artifacts", "list", "--config", file)
    assert all(manifest.ref.id in out for manifest in manifests.values())
    assert "accuracy 0.84 [0.81, 0.87]" in out
    _, out, _ = rlhf(capfd, "artifacts", "list", "reward", "--store", store.url)
    assert len(out.splitlines()) == 2


def test_an_empty_store_lists_nothing_and_says_so(file, capfd):
    code, out, err = rlhf(capfd, "artifacts", "list", "--config", file)
    assert (code, out) == (0, "")
    assert "no artifacts in" in err


@pytest.mark.parametrize("begin", ["id", "stage and a part", "fingerprint"])
def test_show_takes_the_beginning_of_an_id(file, published, capfd, begin):
    _, manifests = published
    ref = manifests["reward"].ref
    words = {"id": ref.id, "stage and a part": ref.id[:-6], "fingerprint": ref.fingerprint[:8]}
    code, out, _ = rlhf(capfd, "artifacts", "show", words[begin], "--config", file)
    assert code == 0
    assert ref.fingerprint in out
    assert "center_coef" in out


def test_the_beginning_of_several_ids_is_refused_with_their_names(file, published, capfd):
    code, _, err = rlhf(capfd, "artifacts", "show", "small", "--config", file)
    assert code == 2
    assert "beginning of 5 ids" in err


def test_lineage_goes_back_to_the_data(file, published, capfd):
    _, manifests = published
    _, out, _ = rlhf(capfd, "artifacts", "lineage", "ppo", "--config", file)
    lines = out.splitlines()
    assert lines[0].startswith(manifests["ppo"].ref.id)
    assert [line for line in lines if manifests["data"].ref.id in line]
    assert any(line.startswith("└──") and manifests["reward"].ref.id in line for line in lines)


# --- chat and the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "folder"), [("ppo", "actor"), ("sft", "model")])
def test_chat_starts_on_the_stages_model_with_the_given_options(file, published, capfd, monkeypatch, stage, folder):
    store, manifests = published
    started = []
    monkeypatch.setattr(cli.subprocess, "run", lambda c: started.append(c) or subprocess.CompletedProcess(c, 7))
    code, _, _ = rlhf(capfd, "chat", file, "--stage", stage, "--prompt", "Hello there", "--top-p", "0.9")
    assert code == 7
    model = store.local_path(f"{manifests[stage].ref.id}/{folder}")
    assert started == [
        [sys.executable, "-m", "rlhf_core.chat", "--model", str(model), "--prompt", "Hello there", "--top-p", "0.9"]
    ]


def test_chat_takes_an_artifact(file, published, capfd, monkeypatch):
    store, manifests = published
    monkeypatch.setattr(cli.subprocess, "run", lambda c: subprocess.CompletedProcess(c, 0))
    assert rlhf(capfd, "chat", manifests["sft"].ref.id, "--store", store.url)[0] == 0
    code, _, err = rlhf(capfd, "chat", manifests["data"].ref.id, "--store", store.url)
    assert code == 2
    assert "holds no language model" in err


def test_chat_without_a_stage_talks_to_the_last_model_and_model_names_another(file, published, capfd, monkeypatch):
    store, manifests = published
    started = []
    monkeypatch.setattr(cli.subprocess, "run", lambda c: started.append(c[-1]) or subprocess.CompletedProcess(c, 0))
    rlhf(capfd, "chat", file)
    rlhf(capfd, "chat", f"{file}:sft")
    assert [Path(path).relative_to(store.root).parts[0::2] for path in started] == [("ppo", "actor"), ("sft", "model")]
    code, _, err = rlhf(capfd, "chat", file, "--model", "actor_ema")
    assert code == 2
    assert f"{manifests['ppo'].ref.id} has no folder 'actor_ema'; it has actor" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ppo", "--frontier"], "has no snapshots; set ppo.snapshot_every"),
        (["sft", "--frontier"], "needs one target, an artifact of ppo"),
        (["data"], "holds no language model"),
        (["sft", "ppo", "reward"], "one target or two"),
        (["sft", "--greedy"], "--greedy: is for models that answer prompts"),
        (["reward", "--seed", "0"], "--seed: is for models that answer prompts"),
        (["sft", "--raw"], "--raw: is for models that answer prompts"),
        (["sft", "--temperature", "0.5"], "--temperature: is for models that answer prompts"),
        (["sft", "--max-new-tokens", "5"], "--max-new-tokens: is for models that answer prompts"),
        (["sft", "--reward", "reward"], "--reward: is for models that answer prompts"),
        (["sft", "ppo", "--gold", "silver"], "use quickstart or vader"),
        (["sft", "ppo", "--prompts", "empty.txt"], "write one prompt a line"),
        (["sft", "ppo", "--prompts", "bad.jsonl"], "line 1 is no JSON object with a 'prompt'"),
        (["sft/none"], "no artifact begins with"),
        (["small.yaml:dpo"], "not part of this pipeline"),
    ],
)
def test_eval_refuses_what_does_not_go_together(file, published, capfd, words, message):
    Path("empty.txt").write_text("\n")
    Path("bad.jsonl").write_text('{"text": "x"}\n')
    code, _, err = rlhf(capfd, "eval", *words, "--store", published[0].url)
    assert code == 2
    assert message in err.replace("\n", " ")


def test_the_help_says_what_becomes_of_stages_that_finished_and_of_one_that_was_cut_off(file, capfd):
    said = " ".join(rlhf(capfd, "run", "--help")[1].replace("│", " ").split())
    assert "reuse the stages that have finished" in said and "resume one that was cut off" in said


def test_version_and_help(capfd, tmp_path):
    assert rlhf(capfd, "--version")[1].startswith("rlhf 0.")
    assert "rlhf run quickstart.yaml" in rlhf(capfd, "--help")[1]
