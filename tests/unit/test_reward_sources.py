"""Python functions and HTTP endpoints as rewards: a real server, real files, every way it can go wrong."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from rlhf_core import reward_sources
from rlhf_core.errors import ConfigError, NonFiniteError
from rlhf_core.reward_sources import EndpointError, check_code, judge_of
from rlhf_core.sources import rewards_identity
from rlhf_core.specs import FunctionReward, HTTPReward

PROMPTS, ANSWERS = ["a", "b", "c", "d", "e"], ["x", "xx", "xxx", "xxxx", "xxxxx"]


@pytest.fixture
def serve(monkeypatch):
    """Start an endpoint that answers what `respond(number of the request, body)` gives: (status, text)."""
    monkeypatch.setattr(reward_sources, "FIRST_PAUSE", 0.01)
    servers = []

    def start(respond: Callable[[int, dict[str, Any]], tuple[int, str]]) -> tuple[str, list[dict[str, Any]]]:
        seen: list[dict[str, Any]] = []

        class Endpoint(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen.append({**body, "authorization": self.headers["Authorization"]})
                status, text = respond(len(seen), body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/score", seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def lengths(_: int, body: dict[str, Any]) -> tuple[int, str]:
    return 200, json.dumps({"rewards": [len(text) for text in body["responses"]]})


def http(url: str, **fields: Any) -> HTTPReward:
    return HTTPReward(url=url, name="length-v1", **fields)


def test_an_endpoint_is_asked_in_batches_and_its_rewards_are_normalised(serve):
    url, seen = serve(lengths)
    judge = judge_of(http(url, batch_size=2, mean=3.0, std=2.0), "ppo.rewards[0]")
    assert judge(PROMPTS, ANSWERS) == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert [body["responses"] for body in seen] == [["x", "xx"], ["xxx", "xxxx"], ["xxxxx"]]
    assert seen[0]["prompts"] == ["a", "b"]


def test_what_may_pass_is_tried_again(serve):
    url, seen = serve(lambda n, body: lengths(n, body) if n > 2 else ((503, "starting"), (429, "slow down"))[n - 1])
    assert judge_of(http(url), "ppo.rewards[0]")(["a"], ["xx"]) == [2.0]
    assert len(seen) == 3


def test_an_endpoint_that_stays_away_is_named_with_its_last_words(serve):
    url, seen = serve(lambda n, body: (500, "CUDA error"))
    with pytest.raises(EndpointError, match=r"ppo.rewards\[1\].*3 tries.*CUDA error") as caught:
        judge_of(http(url, retries=2), "ppo.rewards[1]")(["a"], ["x"])
    assert len(seen) == 3 and caught.value.exit_code == 1, "a later attempt of the stage may find it"


def test_a_closed_port_and_a_time_out_are_endpoint_errors(serve):
    with pytest.raises(EndpointError, match="ConnectError"):
        judge_of(http("http://127.0.0.1:9", retries=0), "ppo.rewards[0]")(["a"], ["x"])
    gate = threading.Event()
    url, _ = serve(lambda n, body: (gate.wait(5), lengths(n, body))[1])
    with pytest.raises(EndpointError, match="Timeout"):
        judge_of(http(url, retries=1, timeout_seconds=0.1), "ppo.rewards[0]")(["a"], ["x"])
    gate.set()


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (404, "no such path", "HTTP 404"),
        (200, "<html>", "JSON"),
        (200, '{"scores": [1]}', "rewards"),
        (200, '{"rewards": [1]}', "1 rewards for 2 answers"),
        (200, '{"rewards": ["good", 1]}', "list of numbers"),
    ],
)
def test_a_wrong_answer_ends_the_stage_at_once(serve, status, text, words):
    url, seen = serve(lambda n, body: (status, text))
    with pytest.raises(ConfigError, match=words):
        judge_of(http(url), "ppo.rewards[0]")(["a", "b"], ["x", "y"])
    assert len(seen) == 1


def test_a_reward_that_is_not_finite_is_never_used(serve):
    url, _ = serve(lambda n, body: (200, '{"rewards": [NaN]}'))
    with pytest.raises(NonFiniteError, match="nan"):
        judge_of(http(url), "ppo.rewards[0]")(["a"], ["x"])


@pytest.fixture
def function(tmp_path) -> str:
    file = tmp_path / "rewards.py"
    file.write_text("def brevity(prompts, responses):\n    return [-len(r) for r in responses]\nnumber = 3\n")
    return f"{file}:brevity"


def test_a_python_function_scores_where_code_is_allowed(function, monkeypatch):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")
    assert judge_of(FunctionReward(function=function, std=2.0), "ppo.rewards[0]")(["a"], ["xxxx"]) == [-2.0]


def test_a_configuration_alone_runs_no_code(function, monkeypatch):
    monkeypatch.delenv("RLHF_ALLOW_CODE", raising=False)
    source = FunctionReward(function=function)
    for refuse in (lambda: check_code([source]), lambda: judge_of(source, "ppo.rewards[0]")):
        with pytest.raises(ConfigError, match="--allow-code"):
            refuse()


@pytest.mark.parametrize("wrong", ["missing.py:f", "rewards", "no_such_package:f"])
def test_a_function_that_is_not_there_is_named(wrong, monkeypatch):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")
    with pytest.raises(ConfigError, match=r"ppo.rewards\[0\].function"):
        judge_of(FunctionReward(function=wrong), "ppo.rewards[0]")


def test_a_function_that_fails_ends_the_stage_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")
    (tmp_path / "bad.py").write_text("def f(prompts, responses):\n    return [1 / 0]\n")
    with pytest.raises(ConfigError, match=r"(?s)bad.py:f failed:.*ZeroDivisionError"):
        judge_of(FunctionReward(function=f"{tmp_path}/bad.py:f"), "ppo.rewards[0]")(["a"], ["x"])


def test_credentials_come_from_the_environment_and_are_refused_in_the_url(serve, monkeypatch):
    url, seen = serve(lengths)
    monkeypatch.setenv("JUDGE_TOKEN", "secret")
    assert judge_of(http(url, token_env="JUDGE_TOKEN"), "ppo.rewards[0]")(["a"], ["xx"]) == [2.0]
    assert seen[0]["authorization"] == "Bearer secret"
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(ConfigError, match=r"token_env: JUDGE_TOKEN is not set"):
        judge_of(http(url, token_env="JUDGE_TOKEN"), "ppo.rewards[0]")
    for wrong in ("http://user:secret@host/score", "http://host/score?key=secret"):
        with pytest.raises(ValidationError, match="url"):
            http(wrong)


def test_a_name_that_is_no_function_is_refused(function, monkeypatch):
    monkeypatch.setenv("RLHF_ALLOW_CODE", "1")
    with pytest.raises(ConfigError, match="no function 'number'"):
        judge_of(FunctionReward(function=function.replace("brevity", "number")), "ppo.rewards[0]")


def test_identity_is_what_a_source_computes_not_where_it_is(function, tmp_path):
    one, other = http("http://a/score"), http("https://b/other", retries=9)
    assert rewards_identity([one]) == rewards_identity([other])
    assert rewards_identity([one]) != rewards_identity([HTTPReward(url="http://a/score", name="length-v2")])
    before = rewards_identity([FunctionReward(function=function)])
    moved = tmp_path / "moved.py"
    moved.write_text((tmp_path / "rewards.py").read_text())
    assert rewards_identity([FunctionReward(function=f"{moved}:brevity")]) == before
    moved.write_text(moved.read_text() + "# changed\n")
    assert rewards_identity([FunctionReward(function=f"{moved}:brevity")]) != before
