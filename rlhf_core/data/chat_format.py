"""The chat template that says in Jinja what the data stage did in Python, so that what talks to the model later asks as
it was trained.

With `template: human_assistant` the saved tokenizer gets a template that renders messages as the training prompts were:
"\\n\\nHuman: …\\n\\nAssistant:", BOS where the tokenizer begins prompts with it, EOS after every answer. Prompts that were
text already are kept as they are, so two things are looked up in the data: whether they begin with the two line breaks,
and whether their earlier answers are followed by EOS (in dialogues that came as text they are not). Answers are inside
`{% generation %}`, for transformers' mask of assistant tokens. Tokenizers of the llama kind put a space after the EOS
inside a dialogue, which training does not have; no template can take it away. Left out: `chat` (the tokenizer's own
template is the one that was used) and `none` (there is no convention to write down).
"""

from collections import Counter
from typing import Any

from rlhf_core.data.encode import Encoder
from rlhf_core.data.formats import Example
from rlhf_core.data.template import ASSISTANT, HUMAN
from rlhf_core.specs import DataSpec


class ChatFormat:
    """Looks at examples and writes the chat template of a human_assistant data set."""

    def __init__(self) -> None:
        self._openings: Counter[bool] = Counter()
        self._ends: Counter[bool] = Counter()

    def observe(self, example: Example) -> None:
        """Count how a prompt begins and what follows its earlier answers."""
        text = example.prompt[0].text
        if text.startswith((HUMAN, HUMAN.lstrip())):
            self._openings[text.startswith(HUMAN)] += 1
        if any(turn.is_answer for turn in example.prompt):
            self._ends[True] += 1
        elif text.count(ASSISTANT) > 1:
            self._ends[False] += 1

    def jinja(self, bos: bool) -> str:
        """The template; `bos`: the tokenizer begins a text with its BOS."""
        opening = self._openings[True] >= self._openings[False]
        eos = " ~ eos_token" if self._ends[True] >= self._ends[False] else ""
        unless_first = "('' if loop.first else '\\n\\n')"
        return (
            ("{{- bos_token }}" if bos else "")
            + "{%- for message in messages %}"
            + "{%- set content = message['content'] | trim %}"
            + "{%- if message['role'] == 'assistant' %}"
            + "{{- '\\n\\nAssistant:' }}{% generation %}{{- ' ' ~ content"
            + eos
            + " }}{% endgeneration %}"
            + "{%- elif message['role'] == 'user' %}"
            + "{{- "
            + ("'\\n\\n'" if opening else unless_first)
            + " ~ 'Human: ' ~ content }}"
            + "{%- else %}{{- "
            + unless_first
            + " ~ content }}{%- endif %}"
            + "{%- endfor %}"
            + "{%- if add_generation_prompt %}{{- '\\n\\nAssistant:' }}{%- endif %}"
        )


def write_chat_template(tokenizer: Any, spec: DataSpec, seen: ChatFormat, encoder: Encoder) -> None:
    """Give the tokenizer the template of its training prompts, where that is neither its own nor the configuration's."""
    if spec.template == "human_assistant" and spec.tokenizer.chat_template is None:
        tokenizer.chat_template = seen.jinja(bos=bool(encoder.bos) and encoder.bos == [tokenizer.bos_token_id])
