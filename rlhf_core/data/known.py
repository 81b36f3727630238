"""Known data sets: what the columns of the sets that DeepSpeed-Chat trains on mean, by their `datasets` names.

One function a shape and one row of `KNOWN` a set. A function makes a row of our columns of theirs: the prompt as messages
or as a dialogue text (so that any `data.template` renders it), the answers as texts that begin with a space, like those
of hh-rlhf. Where a set has no second answer the row has none and feeds SFT and PPO only; where it has no answer, PPO
only. A name is known too as the end of a path (`/data/Dahoas/rm-static`). `columns` or `format` in the source switch
this off. DeepSpeed-Chat's `local/jsonfile` is a source of `kind: files` with `paths` and `test_paths`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.data.formats import Row, RowFormat
from rlhf_core.data.template import ASSISTANT, HUMAN, Dropped, Reason
from rlhf_core.errors import DataError
from rlhf_core.specs import HubSource

ROLE = re.compile(r"(?:^|(?<=\s)|(?<=</s>))(USER|ASSISTANT):")
# Citations of webgpt: [1] or [2, 3], with the space before them. Other brackets belong to the text.
CITATION = re.compile(r"\s*\[\d+(?:\s*,\s*\d+)*\]")


@dataclass(frozen=True)
class Known:
    """How one data set is read.

    Attributes:
        convert: a row of theirs -> a row of our columns; raises Dropped for a row of no use.
        columns: theirs that `convert` needs.
        format: what `convert` returns, in the words of `formats`.
        test_split: the set's own split for tests; None where the hash of the prompt divides `train` (theirs: 9 to 1).
        load_as: the name to load where it differs from the known one.
    """

    convert: Callable[[Row], Row]
    columns: tuple[str, ...]
    format: RowFormat = "pairs"
    test_split: str | None = None
    load_as: str | None = None

    def parse(self, row: Row, where: str) -> Row:
        """Our columns of a row. DataError: one of theirs is missing; `where` names the row."""
        missing = [column for column in self.columns if column not in row]
        if missing:
            raise DataError(
                f"{where}: no column {missing[0]!r}, which this data set is known to have; there are "
                f"{', '.join(sorted(row)) or '(none)'}. If it has changed, map its columns: columns: "
                "{prompt: …, chosen: …, rejected: …}"
            )
        return self.convert(row)


def key_of(source: HubSource) -> str | None:
    """The name in `KNOWN` of a source; None for any other, or if the source says itself what its columns mean."""
    if source.columns or source.format != "auto":
        return None
    name = source.name.rstrip("/")
    return next((key for key in KNOWN if name == key or name.endswith(f"/{key}")), None)


def find(source: HubSource) -> Known | None:
    """The known data set of a source, if it is one: see `key_of`."""
    key = key_of(source)
    return None if key is None else KNOWN[key]


def place_of(source: HubSource) -> str:
    """What to load: the source's name, or where that is only ours, the set's."""
    known = find(source)
    return known.load_as if known and known.load_as and not Path(source.name).exists() else source.name


def _asked(question: Any, answers: Mapping[str, Any]) -> Row:
    """A question and its answers by column; those that are None are left out."""
    if not isinstance(question, str):
        raise Dropped(Reason.EMPTY_PROMPT if question is None else Reason.NOT_TEXT)
    if not all(isinstance(text, str) for text in answers.values() if text is not None):
        raise Dropped(Reason.NOT_TEXT)
    prompt = [{"role": "user", "content": question}]
    return {"prompt": prompt} | {name: f" {text.strip()}" for name, text in answers.items() if text is not None}


def _columns(prompt: str, **answers: str) -> Callable[[Row], Row]:
    """Columns under other names."""
    return lambda row: _asked(row[prompt], {ours: row[theirs] for ours, theirs in answers.items()})


def _as_they_are(row: Row) -> Row:
    """The prompt is a dialogue text up to 'Assistant:'; the answers follow it."""
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


def _reward_datasets(row: Row) -> Row:
    """The answers may begin with 'Assistant:', which belongs to the prompt; the prompt may lack its marks."""
    texts = [row[name] for name in ("prompt", "chosen", "rejected")]
    if not all(isinstance(text, str) for text in texts):
        raise Dropped(Reason.NOT_TEXT)
    prompt, *answers = texts
    prompt = re.sub(r"\s*Assistant:\s*$", "", prompt).rstrip()
    prompt = re.sub(r"^\s*Human:", HUMAN, prompt)
    if not prompt.strip():
        raise Dropped(Reason.EMPTY_PROMPT)
    prompt = prompt if HUMAN in prompt else f"{HUMAN} {prompt.strip()}"
    # Only the mark at the beginning: an answer may itself say "Assistant:".
    better, worse = (" " + re.sub(r"^\s*Assistant:", "", text).strip() for text in answers)
    return {"prompt": prompt + ASSISTANT, "chosen": better, "rejected": worse}


def _webgpt(row: Row) -> Row:
    """The answer with the higher score is chosen; equal scores say nothing."""
    scores = float(row["score_0"]), float(row["score_1"])
    if scores[0] == scores[1]:
        raise Dropped(Reason.EQUAL)
    answers = [CITATION.sub("", row[name] or "") for name in ("answer_0", "answer_1")]
    better, worse = answers if scores[0] > scores[1] else reversed(answers)
    return _asked(row["question"]["full_text"], {"chosen": better, "rejected": worse})


def _shp(row: Row) -> Row:
    """`labels` is 1 if people preferred A and 0 if they preferred B; anything else is no preference."""
    label = str(row["labels"])
    if label not in ("0", "1"):
        raise Dropped(Reason.LABEL)
    better, worse = ("human_ref_A", "human_ref_B") if label == "1" else ("human_ref_B", "human_ref_A")
    return _asked(row["history"], {"chosen": row[better], "rejected": row[worse]})


def _vicuna(row: Row) -> Row:
    """'USER: … ASSISTANT: …</s>USER: … ASSISTANT:' -> messages; only a role's mark is one, not the word in a text."""
    if not isinstance(row["prompt"], str):
        raise Dropped(Reason.EMPTY_PROMPT)
    opening, *parts = ROLE.split(row["prompt"])
    names = {"USER": "user", "ASSISTANT": "assistant"}
    messages = [
        {"role": names[role], "content": text.strip().removesuffix("</s>").strip()}
        for role, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    if opening.strip():
        messages.insert(0, {"role": "system" if messages else "user", "content": opening.strip()})
    label = row["label"]
    return {"prompt": messages, "answer": f" {label.strip()}" if isinstance(label, str) else label}


def _passages(row: Row) -> Row:
    """The first passage that answers the query and the first that does not, where there are any."""
    first = {
        name: next((passage["text"] for passage in row[column] or ()), None)
        for name, column in (("chosen", "positive_passages"), ("rejected", "negative_passages"))
    }
    return _asked(row["query"], first if first["chosen"] is not None else {})


def _first_of_list(question: str, answers: str) -> Callable[[Row], Row]:
    """The first answer of a list that says anything."""
    return lambda row: _asked(row[question], {"answer": next((text for text in row[answers] or () if text), None)})


def _mkqa(language: str) -> Callable[[Row], Row]:
    """One language of a set of many; an answer without text is none."""

    def convert(row: Row) -> Row:
        answers = (row["answers"] or {}).get(language) or ()
        answer = next((answer["text"] for answer in answers if answer.get("text")), None)
        return _asked((row["queries"] or {}).get(language), {"answer": answer})

    return convert


def _questions(row: Row) -> Row:
    """The first of the questions that a paragraph answers."""
    return _asked(next(iter(row["questions"] or ()), None), {"answer": row["paragraph"]})


_PAIR = ("prompt", "chosen", "rejected")
_PASSAGES = ("query", "positive_passages", "negative_passages")
_WEBGPT = ("question", "answer_0", "answer_1", "score_0", "score_1")
_SHP = ("history", "human_ref_A", "human_ref_B", "labels")
KNOWN: dict[str, Known] = {
    "Dahoas/rm-static": Known(_as_they_are, _PAIR, "dialogue", "test"),
    "Dahoas/full-hh-rlhf": Known(_as_they_are, _PAIR, "dialogue", "test"),
    "Dahoas/synthetic-instruct-gptj-pairwise": Known(_columns("prompt", chosen="chosen", rejected="rejected"), _PAIR),
    "yitingxie/rlhf-reward-datasets": Known(_reward_datasets, _PAIR, "dialogue", "test"),
    "openai/webgpt_comparisons": Known(_webgpt, _WEBGPT),
    "stanfordnlp/SHP": Known(_shp, _SHP, test_split="validation"),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": Known(_vicuna, ("prompt", "label"), test_split="test"),
    "wangrui6/Zhihu-KOL": Known(_columns("INSTRUCTION", answer="RESPONSE"), ("INSTRUCTION", "RESPONSE")),
    "Hello-SimpleAI/HC3-Chinese": Known(_first_of_list("question", "human_answers"), ("question", "human_answers")),
    "mkqa-Chinese": Known(_mkqa("zh_cn"), ("queries", "answers"), load_as="mkqa"),
    "mkqa-Japanese": Known(_mkqa("ja"), ("queries", "answers"), load_as="mkqa"),
    "Cohere/miracl-zh-queries-22-12": Known(_passages, _PASSAGES, test_split="dev"),
    "Cohere/miracl-ja-queries-22-12": Known(_passages, _PASSAGES, test_split="dev"),
    "lmqg/qg_jaquad": Known(_columns("question", answer="sentence"), ("question", "sentence"), test_split="validation"),
    "lmqg/qag_jaquad": Known(_questions, ("questions", "paragraph"), test_split="validation"),
}
