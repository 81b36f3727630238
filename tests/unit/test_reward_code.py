"""The file of a Python reward function goes with the job and comes out as it went in, or not at all."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import reward_code
from rlhf_core.artifacts import make_ref
from rlhf_core.errors import ConfigError, IntegrityError
from rlhf_core.job import JobSpec, job_url, read_job
from rlhf_core.reward_sources import judge_of
from rlhf_core.sealed import seal
from rlhf_core.sources import rewards_identity
from rlhf_core.specs import FunctionReward, PPOSpec
from rlhf_core.store import Store


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two files of one name that score differently."""
    made = []
    for n, folder in enumerate(("long", "short")):
        (file := tmp_path / folder / "judge.py").parent.mkdir()
        file.write_text(f"def score(prompts, responses):\n    return [{1 - 2 * n} * len(r) for r in responses]\n")
        made.append(file)
    return made


def job_of(tmp_path: Path, functions: list[str]) -> tuple[Store, JobSpec]:
    """A PPO job as the control plane makes it."""
    rewards: list[dict[str, Any]] = [{"kind": "function", "function": function} for function in functions]
    spec = PPOSpec.model_validate({"rewards": [{"kind": "http", "url": "http://a/b", "name": "a"}, *rewards]})
    identity = {"rewards": rewards_identity(spec.rewards or ())}
    plain = spec.model_dump(mode="json")
    store = Store(f"file://{tmp_path}/store")
    job = JobSpec(
        stage="ppo", store=store.url, output=make_ref("ppo", "demo", {}, {}), attempt=3, job_id="", spec=plain,
        identity=identity, code=reward_code.pack(plain, identity),
    )  # fmt: skip
    store.write(f"{job.folder}/job.json", seal(job))
    return store, job


def test_files_come_from_the_attempts_folder_wherever_the_ranks_run(tmp_path, files, monkeypatch):
    store, job = job_of(tmp_path, [f"{file}:score" for file in files])
    reward_code.upload(store, job)
    assert sorted(store.list(f"{job.folder}/code")) == [f"{job.folder}/code/0{n}-judge.py" for n in (1, 2)]
    for file in files:
        file.unlink()
    there, received = read_job(job_url(store, job))
    spec = reward_code.unpack(there, received, tmp_path / "scratch")
    sources = PPOSpec.model_validate(spec).rewards or ()
    scores = [judge_of(s, "ppo.rewards")(["a"], ["xxx"]) for s in sources if isinstance(s, FunctionReward)]
    assert scores == [[3.0], [-3.0]]
    assert {**spec, "rewards": None} == {**job.spec, "rewards": None} and spec["rewards"][0] == job.spec["rewards"][0]


def test_a_spec_without_files_takes_nothing_along_and_stays_as_it_is(tmp_path):
    store, job = job_of(tmp_path, ["json:loads"])
    reward_code.upload(store, job)
    assert job.code == () and store.list(f"{job.folder}/code") == {}
    assert reward_code.unpack(store, job, tmp_path / "scratch") == job.spec and not (tmp_path / "scratch").exists()
    sft = job.model_copy(update={"spec": {"seed": 1}})
    assert reward_code.unpack(store, sft, tmp_path / "scratch") == {"seed": 1}


def test_a_file_that_changes_after_the_plan_is_refused_before_anything_runs(tmp_path, files):
    store, job = job_of(tmp_path, [f"{files[0]}:score"])
    files[0].write_text("def score(prompts, responses): return [0] * len(responses)\n")
    for act in (lambda: reward_code.pack(job.spec, job.identity), lambda: reward_code.upload(store, job)):
        with pytest.raises(
            ConfigError, match=r"ppo\.rewards\[1\]\.function: .*judge.py' has changed since the stage was planned"
        ):
            act()
    assert store.list(f"{job.folder}/code") == {}


def test_code_that_is_not_allowed_is_not_even_taken_along(tmp_path, files, monkeypatch):
    monkeypatch.delenv("RLHF_ALLOW_CODE")
    with pytest.raises(ConfigError, match="--allow-code"):
        job_of(tmp_path, [f"{files[0]}:score"])


@pytest.mark.parametrize("harm", ["another file", "no file", "not in the request"])
def test_ranks_import_nothing_but_what_the_request_says(tmp_path, files, harm):
    store, job = job_of(tmp_path, [f"{files[0]}:score"])
    if harm != "no file":
        reward_code.upload(store, job)
    if harm == "another file":
        store.write(f"{job.folder}/code/01-judge.py", b"raise SystemExit('boo')")
    if harm == "not in the request":
        job = job.model_copy(update={"code": ()})
    with pytest.raises(IntegrityError, match=r"01-judge\.py: missing, or not the file that came with the job"):
        reward_code.unpack(store, job, tmp_path / "scratch")
    assert not (tmp_path / "scratch").exists()


def test_the_identity_of_a_function_is_its_content_as_ever(tmp_path, files):
    _, job = job_of(tmp_path, [f"{files[0]}:score"])
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    assert job.identity["rewards"][1]["function"] == f"sha256:{digest}:score" and job.code[0].sha256 == digest
