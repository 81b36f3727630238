"""Templates: how a list of messages becomes text, cut into turns that are learned and turns that are not.

`human_assistant` is the convention of hh-rlhf and DeepSpeed-Chat ("\\n\\nHuman: …\\n\\nAssistant:", an answer begins
with a space); `chat` is the tokenizer's Jinja template; `none` puts the texts one after the other as they are. An
earlier answer of a dialogue is a turn of its own, so that it is followed by EOS in every stage, like the last one
(DESIGN: rule 10). Left out: texts that are prompts already; they never come here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from rlhf_core.errors import ConfigError

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
ROLES = {"human": "user", "gpt": "assistant"}  # names of roles in ShareGPT files -> ours
TemplateName = Literal["human_assistant", "chat", "none"]


class Reason(StrEnum):
    """Why a row is left out; the keys of the counts in report.json."""

    EMPTY_PROMPT = "empty prompt"
    EMPTY_REPLY = "empty reply"
    EMPTY_TEXT = "empty text"
    SAME = "chosen equals rejected"
    DIVERGE = "prompts diverge"
    HUMAN_LAST = "ends with human turn"
    ANSWERED = "prompt ends with an answer"
    SEVERAL = "answer of several messages"
    NOT_TEXT = "not text"
    REFUSED = "chat template refuses the roles"
    DUPLICATE = "duplicate"
    OTHER_SHARE = "prompt is in a share this row cannot feed"
    NO_SHARE = "no share takes it"
    UNSAMPLED = "over sampled_pairs.max_prompts"
    LONG_PROMPT = "prompt over max_prompt_tokens"
    LONG_RESPONSE = "response over max_response_tokens"
    TIE = "all sampled answers have the same gold"
    EQUAL = "both answers have the same score"
    LABEL = "label says neither answer is better"
    WEIGHT = "left out by weight"
    HELD_OUT = "prompt is held out for tests"


class Dropped(Exception):
    """A row that is left out and counted; never leaves the data stage."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True)
class Turn:
    """A piece of a prompt. An answer is learned in SFT and gets EOS; anything else is context."""

    text: str
    is_answer: bool = False


@dataclass(frozen=True)
class Message:
    """One message of a dialogue; `role` is user, assistant, system or what the file says."""

    role: str
    content: str


def parse_messages(value: Any) -> list[Message]:
    """Messages of a row: dicts of role and content (or ShareGPT's from and value); Dropped if they are not texts."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise Dropped(Reason.NOT_TEXT)
    return [_parse_message(item) for item in value]


def _parse_message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise Dropped(Reason.NOT_TEXT)
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if isinstance(content, list):
        # Content in parts: only text has a meaning here.
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise Dropped(Reason.NOT_TEXT)
    return Message(ROLES.get(role, role), content)


class Template:
    """Renders messages by one of the three templates."""

    def __init__(self, name: TemplateName, tokenizer: Any) -> None:
        """`tokenizer` is asked only for its chat template; ConfigError if it has none or one that does not work."""
        self.name = name
        self._tokenizer = tokenizer
        if name == "chat":
            self._check()

    def _check(self) -> None:
        if not self._tokenizer.chat_template:
            raise ConfigError(
                "data.template is chat, but the tokenizer has no chat template; set data.tokenizer.chat_template or "
                "use data.template: human_assistant"
            )
        try:
            self._apply([Message("user", "Hello.")])
        except Exception as error:  # a template is a program: whatever it raises is a fault of its own
            raise ConfigError(
                f"data.tokenizer.chat_template cannot render one user message: {type(error).__name__}: {error}; it "
                "must be a Jinja template over `messages` and `add_generation_prompt`"
            ) from None

    def prompt(self, messages: Sequence[Message]) -> tuple[Turn, ...]:
        """The text up to where the next answer begins, as turns; Dropped if the chat template refuses the roles."""
        if self.name == "none":
            return tuple(Turn(m.content, m.role == "assistant") for m in messages)
        messages = [Message(m.role, m.content.strip()) for m in messages]
        return self._chat(messages) if self.name == "chat" else _human_assistant(messages)

    def reply(self, content: str) -> str:
        """The text of an answer; the EOS token is not part of it."""
        if self.name == "none":
            return content
        text = content.strip()
        return f" {text}" if text and self.name == "human_assistant" else text

    def _chat(self, messages: Sequence[Message]) -> tuple[Turn, ...]:
        """Cut the rendered dialogue at its earlier answers; one turn if the template rewrites them."""
        full = self._render(messages)
        eos = self._tokenizer.eos_token or ""
        turns: list[Turn] = []
        end = 0
        for i, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._render(messages[:i])
            if len(before) < end or not full.startswith(before + message.content):
                return (Turn(full),)
            turns += [_after_answer(full[end : len(before)], turns, eos), Turn(message.content, is_answer=True)]
            end = len(before) + len(message.content)
        return (*turns, _after_answer(full[end:], turns, eos))

    def _render(self, messages: Sequence[Message]) -> str:
        from jinja2 import TemplateError

        try:
            return self._apply(messages)
        except TemplateError:
            raise Dropped(Reason.REFUSED) from None

    def _apply(self, messages: Sequence[Message]) -> str:
        dicts = [{"role": m.role, "content": m.content} for m in messages]
        return str(self._tokenizer.apply_chat_template(dicts, tokenize=False, add_generation_prompt=True))


def _after_answer(text: str, turns: Sequence[Turn], eos: str) -> Turn:
    """A piece of context; without the EOS that the template writes after an answer, which the encoder adds itself."""
    return Turn(text.removeprefix(eos) if turns and eos else text)


def _human_assistant(messages: Sequence[Message]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    context = ""
    for message in messages:
        if message.role == "assistant":
            turns += [Turn(context + ASSISTANT), Turn(f" {message.content}", is_answer=True)]
            context = ""
        else:
            mark = f"{HUMAN} " if message.role == "user" else "\n\n" if turns or context else ""
            context += mark + message.content
    return (*turns, Turn(context + ASSISTANT))
