"""Who is told when a run fails, crashes or completes, or a gate fires: blocks and automations on the Prefect server.

A file says it (`deployments/notifications.yaml` is one to start from): channels, each a webhook or an address for messages, and
which of them each kind of news goes to. Addresses with secrets are taken from the environment and live in Prefect's blocks,
encrypted; the file has none. Installing again brings the server up to date and removes what the file no longer names.

A message goes through Prefect's `Slack Webhook` block whatever it is for: that block takes any Apprise URL, so e-mail by SMTP
(`mailtos://…`) needs no other package on the server.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal, Self
from uuid import UUID

import yaml
from prefect.blocks.notifications import SlackWebhook
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.events import AutomationCore, EventTrigger, Posture
from prefect.events.actions import CallWebhook, SendNotification
from prefect.types import SecretDict
from pydantic import SecretStr, ValidationError, model_validator

from flows import automations
from rlhf_core.errors import ConfigError
from rlhf_core.specs import Frozen

News = Literal["failed", "crashed", "gate", "completed"]
PREFIX = "rlhf-notify-"
NAME = re.compile(r"[a-z0-9-]+")
VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)\}")
EVENTS: dict[News, str] = {
    "failed": "prefect.flow-run.Failed",
    "crashed": "prefect.flow-run.Crashed",
    "gate": "rlhf.gate.fired",
    "completed": "prefect.flow-run.Completed",
}
SUBJECT = {
    **{news: f"rlhf: {{{{ flow_run.name }}}} {news}" for news in EVENTS},
    "gate": "rlhf: a gate has fired in {{ flow_run.name }}",
}
BODY = {
    **dict.fromkeys(EVENTS, "{{ flow_run.state.message }}\n\n{{ flow_run | ui_url }}"),
    "gate": "{{ event.payload.text }}\n\n{{ flow_run | ui_url }}",
}


class Channel(Frozen):
    """Where news goes: one of the two, `$NAME` in it being a variable of the environment."""

    webhook: str | None = None
    message: str | None = None
    headers: dict[str, str] = {}

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.webhook is None) == (self.message is None):
            raise ValueError("give either webhook (a URL) or message (an Apprise URL, as mailtos:// or slack://)")
        return self


class Notifications(Frozen):
    """The file.

    Attributes:
        channels: by name, of lower-case letters, digits and dashes.
        tell: which channels each kind of news goes to.
    """

    channels: dict[str, Channel]
    tell: dict[News, list[str]]

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name in self.channels:
            if not NAME.fullmatch(name):
                raise ValueError(f"channels: {name!r} has other characters than a-z, 0-9 and -")
        for news, names in self.tell.items():
            for name in names:
                if name not in self.channels:
                    raise ValueError(f"tell.{news}: there is no channel {name!r}; there are {', '.join(self.channels)}")
        return self


def load_notifications(path: Path) -> Notifications:
    """Read the file; ConfigError names what is wrong in it."""
    try:
        return Notifications.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None


def install(wanted: Notifications) -> dict[str, str]:
    """Put blocks and automations on the server of the environment; for each automation what was done.

    ConfigError: a variable that a channel names is not set; nothing was changed then.
    """
    blocks = {name: _block(name, channel) for name, channel in wanted.channels.items()}
    ids: dict[str, tuple[Channel, UUID]] = {}
    for name, block in blocks.items():
        saved = block.save(f"{PREFIX}{name}", overwrite=True, _sync=True)  # pyright: ignore
        ids[name] = wanted.channels[name], saved if isinstance(saved, UUID) else UUID(str(saved))
    automated = [_automation(news, name, *ids[name]) for news, names in wanted.tell.items() for name in names]
    done = automations.install(automated)
    return {**done, **_remove_others({automation.name for automation in automated})}


def _block(name: str, channel: Channel) -> Webhook | SlackWebhook:
    if channel.webhook is not None:
        headers = {key: _filled(text, f"channels.{name}.headers.{key}") for key, text in channel.headers.items()}
        url = SecretStr(_filled(channel.webhook, f"channels.{name}.webhook"))
        return Webhook(url=url, headers=SecretDict({"Content-Type": "application/json", **headers}))
    assert channel.message is not None
    return SlackWebhook(url=SecretStr(_filled(channel.message, f"channels.{name}.message")))


def _filled(text: str, field: str) -> str:
    """`text` with variables of the environment put in."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise ConfigError(f"{field}: ${name} is not set; export {name}=… before installing")
        return os.environ[name]

    return VARIABLE.sub(value, text)


def _automation(news: News, channel: str, how: Channel, block: UUID) -> AutomationCore:
    action: Any
    if how.webhook is not None:
        action = CallWebhook(block_document_id=block, payload=_payload(news))
    else:
        action = SendNotification(block_document_id=block, subject=SUBJECT[news], body=BODY[news])
    resource = "rlhf.stage.*" if news == "gate" else "prefect.flow-run.*"
    return AutomationCore(
        name=f"{PREFIX}{news}-{channel}",
        description=f"Tells {channel} of a run that {'has a gate fire' if news == 'gate' else f'has {news}'}.",
        trigger=EventTrigger(
            expect={EVENTS[news]},
            posture=Posture.Reactive,
            match=automations.resource({"prefect.resource.id": resource}),
            match_related=[] if news == "gate" else [automations.OURS],
            threshold=1,
        ),
        actions=[action],
    )


def _payload(news: News) -> str:
    """A webhook's JSON as a template of Prefect's."""
    fields = {
        "event": json.dumps(news),
        "run": "{{ flow_run.name | tojson }}",
        "run_id": "{{ flow_run.id | string | tojson }}",
        "state": "{{ flow_run.state.name | tojson }}",
        "text": "{{ event.payload.text | tojson }}" if news == "gate" else "{{ flow_run.state.message | tojson }}",
        "url": "{{ flow_run | ui_url | tojson }}",
    }
    if news == "gate":
        fields["gate"] = "{{ event.payload | tojson }}"
    return "{" + ", ".join(f"{json.dumps(name)}: {template}" for name, template in fields.items()) + "}"


def _remove_others(kept: set[str]) -> dict[str, str]:
    removed: dict[str, str] = {}
    with get_client(sync_client=True) as client:
        for automation in client.read_automations():
            if automation.name.startswith(PREFIX) and automation.name not in kept:
                client.delete_automation(automation.id)
                removed[automation.name] = "removed"
    return removed
