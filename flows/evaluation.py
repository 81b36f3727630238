"""`rlhf eval`: the command. It asks one plain process, without Prefect, and shows what that answers.

The process (`python -m rlhf_core.eval`) reads the request on stdin and writes the result as JSON on stdout, so the same
numbers are printed as tables, with `--json` as they are, and with `--out` lie in files.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from flows.eval_request import request_of
from flows.show import out
from flows.show_eval import show_eval
from flows.targets import DEFAULT_STORE, resolve
from rlhf_core.errors import ConfigError, RlhfError
from rlhf_core.eval.request import EvalRequest
from rlhf_core.launch import accelerator
from rlhf_core.specs import GoldName

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="change a field, e.g. ppo.kl_coef=0.2; repeatable"),
]
StoreOption = Annotated[str | None, typer.Option("--store", metavar="URL", help=f"store; default {DEFAULT_STORE}")]


def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET [TARGET]", help="CONFIG:STAGE, ARTIFACT, ARTIFACT:FOLDER, a model's folder, or hub:NAME"
        ),
    ],
    stage: Annotated[str | None, typer.Option("--stage", metavar="STAGE", help="with CONFIG: whose artifact")] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="reward and gold against KL, by PPO's snapshots")
    ] = False,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="instead of held-out prompts; repeatable")
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="file with a prompt a line, or .jsonl")] = None,
    raw: Annotated[bool | None, typer.Option("--raw", help="take prompts as they are, without turn markers")] = None,
    greedy: Annotated[bool | None, typer.Option("--greedy", help="likeliest tokens instead of sampling")] = None,
    gold: Annotated[str | None, typer.Option("--gold", help="ground truth: quickstart or vader")] = None,
    reward: Annotated[str | None, typer.Option("--reward", metavar="TARGET", help="another reward model")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="so many held-out rows, of all sources")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.01)] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1)] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
    micro_batch: Annotated[int | None, typer.Option("--micro-batch", min=1, help="sequences at once")] = None,
    out_folder: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="write JSON, plots, pages")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
    sets: Set = None,
    store: StoreOption = None,
) -> None:
    """Measure a trained model, or put two side by side.

    [bold]Examples[/]

      rlhf eval quickstart.yaml:reward                accuracy, calibration, length bias on held-out pairs
      rlhf eval quickstart.yaml:sft                   perplexity of held-out responses, for each source
      rlhf eval quickstart.yaml:sft quickstart.yaml:ppo --out compared
      rlhf eval ppo/quickstart-2bb7 hub:gpt2 --prompt "Name two fruits." --greedy
      rlhf eval quickstart.yaml:ppo --frontier        needs ppo.snapshot_every
    """
    found = [resolve(text, stage=stage, sets=sets or (), store=store) for text in targets]
    scorer = resolve(reward, sets=sets or (), store=store) if reward else None
    options = {
        "prompts": prompts_of(prompt, prompts),
        "raw": raw,
        "greedy": greedy,
        "gold": gold_name(gold) if gold else None,
        "limit": limit,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "micro_batch": micro_batch,
        "out": str(out_folder.absolute()) if out_folder else None,
    }
    result = answer(request_of(found, options, frontier=frontier, reward=scorer))
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    show_eval(result)
    if out_folder:
        out.print(f"files   {out_folder}", soft_wrap=True)


class EvalFailed(RlhfError):
    """The process ended with an error that it has told already."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the evaluation ended with exit code {code}")
        self.exit_code = code


def answer(request: EvalRequest) -> dict[str, Any]:
    """The result of a request; its process tells progress and errors on stderr. EvalFailed if it gives none."""
    command = [sys.executable, "-m", "rlhf_core.eval"]
    cpu = {"DS_ACCELERATOR": "cpu"} if accelerator() == "cpu" else {}  # else deepspeed says that it looked for more
    environment = {**os.environ, **cpu, "TOKENIZERS_PARALLELISM": "false"}
    text = request.model_dump_json()
    done = subprocess.run(command, input=text, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise EvalFailed(done.returncode)
    return json.loads(done.stdout)


def gold_name(text: str) -> GoldName:
    """The gold reward of that name; ConfigError if there is none."""
    for name in get_args(GoldName):
        if text == name:
            return name
    raise ConfigError(f"--gold {text!r} is not known; use {' or '.join(get_args(GoldName))}")


def prompts_of(texts: list[str] | None, file: Path | None) -> tuple[str, ...] | None:
    """Prompts of `--prompt` and `--prompts`: a text file has one a line, a .jsonl file one in each row's `prompt`."""
    found = list(texts or ())
    if file is not None:
        try:
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {file}: cannot be read: {error}") from None
        found += [_prompt(line, file, i) for i, line in enumerate(lines)] if file.suffix == ".jsonl" else lines
    if file is not None and not found:
        raise ConfigError(f"--prompts {file}: is empty; write one prompt a line")
    return tuple(found) or None


def _prompt(line: str, file: Path, number: int) -> str:
    try:
        return str(json.loads(line)["prompt"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"--prompts {file}: line {number + 1} is no JSON object with a 'prompt'") from None
