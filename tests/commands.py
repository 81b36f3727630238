"""The command line run in this process, for tests."""

import sys
from pathlib import Path
from typing import Any

import yaml

from flows import cli


def rlhf(capfd, *words: object) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, stdout, stderr."""
    before, sys.argv = sys.argv, ["rlhf", *map(str, words)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = before
    said = capfd.readouterr()
    return code, said.out, said.err


def small_pipeline(folder: Path, **more: Any) -> Path:
    """A configuration file of a small pipeline with a store of its own beside it; `more`: fields besides."""
    content = {
        "name": "small",
        "store": f"file://{folder}/store",
        "model": {"family": "opt"},
        "data": {
            "sources": [{"kind": "quickstart", "prompts": 50}],
            "tokenizer": {"train_vocab_size": 300},
            "max_prompt_tokens": 32,
            "max_response_tokens": 32,
        },
        **more,
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
