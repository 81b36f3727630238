"""What scores an answer: the reward stage's model, a Python function, an HTTP endpoint, or a weighted sum of them.

Functions and endpoints see texts without special tokens. A function runs only where code is allowed (see `reward_code`, which also
brings its file to the ranks of a job); it gets all answers of this rank's rollout at once and must score each by itself. An
endpoint is asked in batches; what may pass (time-outs, refused connections, 429, 5xx) is tried again with growing pauses, anything
else ends the stage at once with the endpoint's own words. A score that is not a finite number is never used.
"""

import importlib
import importlib.util
import math
import os
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from rlhf_core.errors import ConfigError, NonFiniteError, RlhfError
from rlhf_core.reward_code import check_function
from rlhf_core.specs import FunctionReward, HTTPReward, RewardSource

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between two tries, doubled each time
Judge = Callable[[Sequence[str], Sequence[str]], list[float]]


class EndpointError(RlhfError):
    """A reward endpoint stayed out of reach; starting the stage again may help."""


def check_code(sources: Sequence[RewardSource] | None) -> None:
    """ConfigError if a source is a Python function and code is not allowed, or the function is not there."""
    for i, source in enumerate(sources or ()):
        if isinstance(source, FunctionReward):
            check_function(source, f"ppo.rewards[{i}]")


def judge_of(source: FunctionReward | HTTPReward, field: str) -> Judge:
    """The function that scores texts for a source, normalised by its mean and std; `field` names it in messages."""
    ask = _function(source, field) if isinstance(source, FunctionReward) else _endpoint(source, field)

    def judge(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        values = _checked(ask(list(prompts), list(responses)), len(responses), field)
        return [(value - source.mean) / source.std for value in values]

    return judge


def _checked(values: Any, count: int, field: str) -> list[float]:
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError):
        raise ConfigError(f"{field}: must give a list of numbers, gave {str(values)[:80]!r}") from None
    if len(numbers) != count:
        raise ConfigError(f"{field}: gave {len(numbers)} rewards for {count} answers; it must give one for each")
    if bad := [v for v in numbers if not math.isfinite(v)]:
        raise NonFiniteError(f"{field}: {len(bad)} of {count} rewards are {bad[0]}; nothing was updated with them")
    return numbers


def _function(source: FunctionReward, field: str) -> Callable[[list[str], list[str]], Any]:
    check_function(source, field)
    place, _, name = source.function.rpartition(":")
    try:
        module = _module_of_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    except ImportError as error:
        raise ConfigError(f"{field}.function: {place!r} cannot be imported: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{field}.function: {place} has no function {name!r}")

    def call(prompts: list[str], responses: list[str]) -> Any:
        try:
            return function(prompts, responses)
        except Exception as error:
            trace = "".join(traceback.format_exception(error)[-3:]).rstrip()
            raise ConfigError(f"{field}.function: {source.function} failed: {trace}") from error

    return call


def _module_of_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"rlhf_reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _endpoint(source: HTTPReward, field: str) -> Callable[[list[str], list[str]], list[Any]]:
    client = httpx.Client(timeout=source.timeout_seconds, headers=_authorization(source, field))

    def ask(prompts: list[str], responses: list[str]) -> list[Any]:
        rewards: list[Any] = []
        for first in range(0, len(prompts), source.batch_size):
            part = slice(first, first + source.batch_size)
            body = {"prompts": prompts[part], "responses": responses[part]}
            answer = _post(client, source, body, field)
            if not isinstance(answer, dict) or not isinstance(answer.get("rewards"), list):
                raise ConfigError(
                    f'{field}: {source.url} must answer {{"rewards": [...]}}, answered {str(answer)[:80]!r}'
                )
            rewards += _checked(answer["rewards"], len(responses[part]), field)
        return rewards

    return ask


def _authorization(source: HTTPReward, field: str) -> dict[str, str]:
    if source.token_env is None:
        return {}
    token = os.environ.get(source.token_env)
    if not token:
        raise ConfigError(f"{field}.token_env: {source.token_env} is not set in the job's environment; export it there")
    return {"Authorization": f"Bearer {token}"}


def _post(client: httpx.Client, source: HTTPReward, body: dict[str, Any], field: str) -> Any:
    """The endpoint's JSON answer; tried again where that can help."""
    pause, trouble = FIRST_PAUSE, ""
    for attempt in range(source.retries + 1):
        if attempt:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        try:
            response = client.post(source.url, json=body)
        except httpx.TransportError as error:
            trouble = f"{type(error).__name__}: {error}"
            continue
        if response.status_code == 429 or response.status_code >= 500:
            trouble = f"HTTP {response.status_code}: {response.text[:200]}"
            continue
        if response.status_code != 200:
            raise ConfigError(f"{field}: {source.url} answered HTTP {response.status_code}: {response.text[:200]}")
        try:
            return response.json()
        except ValueError:
            raise ConfigError(f"{field}: {source.url} did not answer JSON: {response.text[:80]!r}") from None
    raise EndpointError(f"{field}: {source.url} gave no answer in {source.retries + 1} tries; last: {trouble}")
