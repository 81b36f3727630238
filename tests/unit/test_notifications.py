"""The file of notifications: what it may say, and that no secret is in it."""

import re
from pathlib import Path
from uuid import uuid4

import pytest

from flows.notifications import EVENTS, Channel, Notifications, _automation, _filled, load_notifications
from rlhf_core.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "deployments" / "notifications.yaml"


def test_the_example_is_valid_and_holds_no_address_only_names_of_variables():
    wanted = load_notifications(EXAMPLE)
    assert set(wanted.tell) == {"failed", "crashed", "gate"}
    for channel in wanted.channels.values():
        assert re.fullmatch(r"\$\w+", channel.webhook or channel.message or "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("channels: {a: {webhook: x, message: y}}\ntell: {}", "channels.a: give either webhook"),
        ("channels: {a: {}}\ntell: {}", "channels.a: give either webhook"),
        ("channels: {a: {webhook: x}}\ntell: {failed: [b]}", "tell.failed: there is no channel 'b'; there are a"),
        ("channels: {a: {webhook: x}}\ntell: {late: [a]}", "tell.late"),
        ("channels: {A_: {webhook: x}}\ntell: {}", "'A_' has other characters"),
        ("channels: {a: {webhok: x}}\ntell: {}", "channels.a.webhok"),
        ("channels: [", "cannot be read"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path, text, said):
    path = tmp_path / "notifications.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as raised:
        load_notifications(path)
    assert str(raised.value).startswith(str(path))


def test_a_variable_that_is_not_set_is_named_with_its_field(monkeypatch):
    monkeypatch.setenv("RLHF_TEST_HOOK", "secret")
    monkeypatch.delenv("RLHF_TEST_GONE", raising=False)
    assert _filled("https://host/$RLHF_TEST_HOOK?a=${RLHF_TEST_HOOK}", "x") == "https://host/secret?a=secret"
    with pytest.raises(ConfigError, match=r"channels.a.webhook: \$RLHF_TEST_GONE is not set"):
        _filled("$RLHF_TEST_GONE", "channels.a.webhook")


def test_kinds_of_news_are_few_and_each_has_an_automation_of_its_own():
    names = {"hook": Channel(webhook="http://x"), "mail": Channel(message="mailto://x")}
    wanted = Notifications(channels=names, tell={news: list(names) for news in EVENTS})
    made = [_automation(n, c, wanted.channels[c], uuid4()) for n, cs in wanted.tell.items() for c in cs]
    assert len({automation.name for automation in made}) == 2 * len(EVENTS)
