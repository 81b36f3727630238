"""Formats: what the columns of a row mean. Any row becomes one `Example`: a prompt, maybe an answer, maybe a pair.

Three formats of rows: `pairs` (prompt, chosen, rejected, answer or response; each a text or a list of messages),
`messages` (whole dialogues, the last answer is what SFT learns) and `dialogue` (hh-rlhf: two whole dialogues as text
that differ in the last answer; or, as rm-static, their common beginning as `prompt` and what follows it). `detect` tells
them apart by the columns of the first rows. A row that cannot be used raises `Dropped`, which the caller counts; a
column that is not there is a `DataError`. Left out: token lengths (`encode`), rows of text without prompts (`pretrain`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf_core.data.template import ASSISTANT, HUMAN, Dropped, Message, Reason, Template, Turn, parse_messages
from rlhf_core.errors import DataError

COLUMNS = ("prompt", "chosen", "rejected", "answer", "response", "messages", "text")
SURROGATE = re.compile("[\ud800-\udfff]")
Row = Mapping[str, Any]
RowFormat = Literal["pairs", "messages", "dialogue"]


@dataclass(frozen=True)
class Example:
    """What one row says, as text.

    Attributes:
        prompt: the prompt as turns, in order.
        answer: what SFT learns and PPO compares with; None if the row has no answer of that kind.
        chosen: the better answer of a pair, None without a pair.
        rejected: the worse answer of a pair, None without a pair.
    """

    prompt: tuple[Turn, ...]
    answer: str | None = None
    chosen: str | None = None
    rejected: str | None = None

    @property
    def prompt_text(self) -> str:
        """The whole prompt."""
        return "".join(turn.text for turn in self.prompt)


def detect(rows: Sequence[Row], field: str) -> RowFormat:
    """The format of a source from the columns that are filled in its first rows."""
    filled: dict[str, Any] = {}
    for row in rows:
        filled |= {key: value for key, value in row.items() if value is not None and key not in filled}
    if "chosen" in filled and "rejected" in filled:
        texts = (filled["chosen"], filled["rejected"])
        if "prompt" in filled or not all(isinstance(text, str) for text in texts):
            return "pairs"
        if all(HUMAN.strip() in text and ASSISTANT.strip() in text for text in texts):
            return "dialogue"
    elif "prompt" in filled:
        return "pairs"
    elif "messages" in filled:
        return "messages"
    raise DataError(
        f"{field}.format is auto, but the columns {_listed(filled)} are no known format; needed: prompt (with chosen "
        "and rejected, answer or response), or messages, or chosen and rejected as whole dialogues. Map the names with "
        f"{field}.columns, e.g. {{prompt: question}}"
    )


def parse(row: Row, row_format: RowFormat, template: Template, where: str) -> Example:
    """The example of a row. Dropped: the row is of no use. DataError: a column is missing; `where` names the row."""
    if row_format == "dialogue":
        example = _dialogue(row, template, where)
    elif row_format == "messages":
        prompt, answer = _whole(parse_messages(need(row, "messages", where)), template)
        example = Example(prompt, answer=answer)
    else:
        example = _pair(row, template, where)
    return _checked(example)


def _checked(example: Example) -> Example:
    replies = [text for text in (example.answer, example.chosen, example.rejected) if text is not None]
    if not example.prompt_text.strip():
        raise Dropped(Reason.EMPTY_PROMPT)
    if not all(text.strip() for text in replies):
        raise Dropped(Reason.EMPTY_REPLY)
    if not all(is_unicode(text) for text in (example.prompt_text, *replies)):
        raise Dropped(Reason.NOT_TEXT)
    if example.chosen is not None and example.chosen == example.rejected:
        raise Dropped(Reason.SAME)
    if example.rejected is None and example.chosen is not None:
        return replace(example, answer=example.answer or example.chosen, chosen=None)
    return replace(example, rejected=None) if example.chosen is None else example


def _dialogue(row: Row, template: Template, where: str) -> Example:
    chosen, rejected = _text(need(row, "chosen", where)), _text(need(row, "rejected", where))
    if row.get("prompt") is not None and not chosen.lstrip().startswith(HUMAN.strip()):
        prompt, better, worse = _text(row["prompt"]), chosen, rejected
    else:
        (prompt, better), (other, worse) = _last_answer(chosen), _last_answer(rejected)
        if prompt != other:
            raise Dropped(Reason.DIVERGE)
    if template.name != "chat":
        return Example((Turn(prompt),), chosen=better, rejected=worse)
    turns = template.prompt(_dialogue_messages(prompt))
    return Example(turns, chosen=template.reply(better), rejected=template.reply(worse))


def _last_answer(dialogue: str) -> tuple[str, str]:
    """The dialogue up to and including the last 'Assistant:', and what follows."""
    before, mark, answer = dialogue.rpartition(ASSISTANT)
    if not mark or HUMAN in answer:
        raise Dropped(Reason.HUMAN_LAST)
    return before + mark, answer


def _dialogue_messages(prompt: str) -> list[Message]:
    """The messages in a text of Human and Assistant turns that ends with 'Assistant:'."""
    messages: list[Message] = []
    opening, *humans = prompt.split(HUMAN)
    if opening.strip():
        messages.append(Message("system", opening))
    for part in humans:
        human, *answers = part.split(ASSISTANT)
        messages += [Message("user", human), *(Message("assistant", answer) for answer in answers)]
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def _pair(row: Row, template: Template, where: str) -> Example:
    replies = {key: row[key] for key in ("answer", "response", "chosen", "rejected") if row.get(key) is not None}
    if "answer" not in replies and "response" in replies:
        replies["answer"] = replies["response"]
    replies.pop("response", None)
    dialogues = {key: parse_messages(value) for key, value in replies.items() if not isinstance(value, str)}
    # A list that does not begin with an answer is a whole dialogue (TRL's "implicit prompt"), and so has the prompt.
    whole = {key: value for key, value in dialogues.items() if not value or value[0].role != "assistant"}
    texts = {key: _text(value) for key, value in replies.items() if key not in dialogues}
    if whole:
        return _implicit_prompt(whole, len(replies), template)
    prompt = need(row, "prompt", where)
    if isinstance(prompt, str) and not dialogues:
        return Example((Turn(prompt),), **texts)
    messages = [Message("user", prompt)] if isinstance(prompt, str) else parse_messages(prompt)
    if not messages or messages[-1].role == "assistant":
        raise Dropped(Reason.ANSWERED if messages else Reason.EMPTY_PROMPT)
    if any(len(value) > 1 for value in dialogues.values()):
        raise Dropped(Reason.SEVERAL)
    answers = texts | {key: value[0].content for key, value in dialogues.items()}
    return Example(template.prompt(messages), **{key: template.reply(text) for key, text in answers.items()})


def _implicit_prompt(whole: dict[str, list[Message]], expected: int, template: Template) -> Example:
    """The example of whole dialogues, which must be the same up to their last answer."""
    if len(whole) != expected or any(messages[:-1] != next(iter(whole.values()))[:-1] for messages in whole.values()):
        raise Dropped(Reason.DIVERGE)
    parts = {key: _whole(messages, template) for key, messages in whole.items()}
    prompt = next(iter(parts.values()))[0]
    return Example(prompt, **{key: answer for key, (_, answer) in parts.items()})


def _whole(messages: list[Message], template: Template) -> tuple[tuple[Turn, ...], str]:
    """Prompt and last answer of a dialogue."""
    if not messages or messages[-1].role != "assistant":
        raise Dropped(Reason.HUMAN_LAST if messages else Reason.EMPTY_PROMPT)
    if len(messages) == 1:
        raise Dropped(Reason.EMPTY_PROMPT)
    return template.prompt(messages[:-1]), template.reply(messages[-1].content)


def need(row: Row, column: str, where: str) -> Any:
    """The value of a column; DataError if there is no such column."""
    if column not in row:
        raise DataError(
            f"{where}: no column {column!r}; there are {_listed(row)}. Map its name with `columns` of the source, "
            f"e.g. {{{column}: the_name_in_the_file}}"
        )
    return row[column]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Dropped(Reason.NOT_TEXT)
    return value


def is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON allows and no tokenizer or Arrow file takes."""
    return text.isascii() or not SURROGATE.search(text)


def _listed(columns: Mapping[str, Any]) -> str:
    return ", ".join(sorted(columns)) or "(none)"
