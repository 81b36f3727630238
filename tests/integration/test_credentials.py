"""No credential in what is stored, said, logged or recorded: real runs on a real S3 server, then a search of everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from s3 import ACCESS_KEY, SECRET_KEY, S3Server

from rlhf_core.store import Store

pytestmark = pytest.mark.slow  # a minute: whole runs, with Prefect
ROOT = Path(__file__).parents[2]
CANARIES = (ACCESS_KEY, SECRET_KEY, "a-secret-that-is-wrong", "AKIAWRONGWRONGWRONG1")


@pytest.fixture
def config(tmp_path) -> Path:
    """A small pipeline, in a folder of its own where Prefect, temporary files and caches are kept, too."""
    content = {
        "name": "small",
        "model": {"family": "llama", "positions": 256},
        "data": {
            "sources": [{"kind": "quickstart", "prompts": 200}],
            "tokenizer": {"train_vocab_size": 400},
            "max_prompt_tokens": 96,
            "max_response_tokens": 96,
        },
        "resources": {"retries": 0, "data_workers": 1},
    }
    for folder in ("tmp", "home", "prefect"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def rlhf(config: Path, *words: str, **environment: str) -> tuple[int, str]:
    """The command in a process of its own: exit code and all it said."""
    folder = config.parent
    places = {"TMPDIR": str(folder / "tmp"), "HOME": str(folder / "home"), "PREFECT_HOME": str(folder / "prefect")}
    log = {"PREFECT_LOGGING_LEVEL": "DEBUG", "RLHF_STORE_PATIENCE": "2"}
    env = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=ROOT, env={**env, **places, **log, **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def leaks(data: bytes) -> list[str]:
    return [canary for canary in CANARIES if canary.encode() in data]


def test_the_search_finds_what_it_looks_for(config):
    (config.parent / "tmp" / "log").write_text(f"key {SECRET_KEY}")
    with pytest.raises(AssertionError):
        assert_clean(config, "", None)


def assert_clean(config: Path, said: str, store: Store | None) -> None:
    """Nothing of what was said, stored, or left on this disk holds a credential."""
    assert leaks(said.encode()) == []
    for file in config.parent.rglob("*"):
        if file.is_file():
            assert leaks(file.read_bytes()) == [], file
    for key in store.list("") if store else ():
        assert leaks(key.encode() + store.read(key)) == [], key


def test_a_job_that_succeeds_and_one_that_fails_leave_no_credential_anywhere(s3: S3Server, bucket, config):
    store = Store(bucket)
    code, said = rlhf(config, "run", str(config), "--stage", "data", "--set", f"store={bucket}")
    assert code == 0, said
    assert any(key.endswith("/manifest.json") for key in store.list("data"))
    assert list((config.parent / "prefect").rglob("*.db")), "Prefect kept no record: there is nothing to search"
    bad = config.parent / "bad.jsonl"
    bad.write_text('{"prompt": "only", "nothing": "else"}\n')
    source = f"data.sources=[{{kind: files, paths: [{bad}]}}]"
    failed, more = rlhf(config, "run", str(config), "--stage", "data", "--set", f"store={bucket}", "--set", source)
    assert failed == 3, more
    assert any(key.endswith("/log.txt") for key in store.list("data"))
    code, listed = rlhf(config, "artifacts", "show", "data/small", "--store", bucket)
    assert code == 0 and "argv" in listed
    assert_clean(config, said + more + listed, store)


@pytest.mark.parametrize("wrong", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "both"])
def test_a_server_that_refuses_the_key_is_told_without_repeating_it(s3: S3Server, bucket, config, wrong):
    keys = {"AWS_SECRET_ACCESS_KEY": "a-secret-that-is-wrong", "AWS_ACCESS_KEY_ID": "AKIAWRONGWRONGWRONG1"}
    chosen = {name: value for name, value in keys.items() if wrong in (name, "both")}
    code, said = rlhf(config, "run", str(config), "--stage", "data", "--set", f"store={bucket}", **chosen)
    assert code == 1 and "error:" in said and "Traceback" not in said, said
    assert_clean(config, said, None)


def test_doctor_tries_the_store_without_showing_a_credential(s3: S3Server, bucket, config):
    _, said = rlhf(config, "doctor", "--store", bucket)
    assert "create-only and delete work" in " ".join(said.split()), said
    _, refused = rlhf(config, "doctor", "--store", bucket, AWS_SECRET_ACCESS_KEY="a-secret-that-is-wrong")
    assert "create-only and delete work" not in " ".join(refused.split())
    assert_clean(config, said + refused, Store(bucket))


def test_a_store_url_with_credentials_is_refused_before_anything_is_written(config):
    url = f"s3://{ACCESS_KEY}:{SECRET_KEY}@rlhf/x"
    for words in (
        ["run", str(config), "--stage", "data", "--set", f"store={url}"],
        ["artifacts", "list", "--store", url],
        ["artifacts", "copy", "sft", "--to", url],
        ["doctor", "--store", url],
        ["chat", "sft", "--store", url],
        ["eval", "sft", "--store", url],
    ):
        code, said = rlhf(config, *words)
        assert code in (1, 2) and "Traceback" not in said and "credentials" in " ".join(said.split()), (words, said)
        assert_clean(config, said, None)
