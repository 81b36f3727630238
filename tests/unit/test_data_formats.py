"""What the columns of a row mean, how messages become text, and which rows of hh-rlhf are of no use."""

from collections import Counter

import pytest

from rlhf_core.data.formats import detect, parse
from rlhf_core.data.readers import read_source
from rlhf_core.data.template import Dropped, Message, Reason, Template, Turn
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.specs import FileSource

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HUMAN_ASSISTANT = Template("human_assistant", None)
NONE = Template("none", None)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def pairs(**row):
    return parse(row, "pairs", HUMAN_ASSISTANT, "file row 1")


def reason(row, row_format="pairs"):
    with pytest.raises(Dropped) as dropped:
        parse(row, row_format, HUMAN_ASSISTANT, "file row 1")
    return dropped.value.reason


@pytest.fixture
def chat(shared):
    from rlhf_core.data.tokenizer import load

    tokenizer = load(str(shared / "models" / "stories260k"), None, "model.path")
    tokenizer.chat_template = CHAT
    return Template("chat", tokenizer)


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs"),
        ({"prompt": "a", "response": "b"}, "pairs"),
        ({"prompt": "a"}, "pairs"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")], "messages": []}, "pairs"),
        ({"messages": [user("a"), assistant("b")]}, "messages"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "dialogue"),
    ],
)
def test_the_format_follows_from_the_columns(row, row_format):
    assert detect([row], "data.sources[0]") == row_format


def test_columns_that_are_empty_in_the_first_row_still_count():
    assert detect([{"prompt": None, "messages": None}, {"prompt": "a", "messages": None}], "f") == "pairs"


def test_unknown_columns_are_an_error_that_lists_them():
    with pytest.raises(DataError, match=r"data\.sources\[1\]\.format is auto, but the columns question, reply"):
        detect([{"question": "a", "reply": "b"}], "data.sources[1]")


def test_two_texts_without_a_prompt_that_are_no_dialogues_are_an_error():
    with pytest.raises(DataError, match="chosen, rejected are no known format"):
        detect([{"chosen": "good", "rejected": "bad"}], "data.sources[0]")


def test_text_prompts_and_responses_are_kept_as_they_are():
    example = pairs(prompt="Q: ", chosen=" yes ", rejected="no\n")
    assert example.prompt == (Turn("Q: "),)
    assert (example.chosen, example.rejected, example.answer) == (" yes ", "no\n", None)


def test_the_answer_column_wins_over_response():
    assert pairs(prompt="Q", answer="a", response="b").answer == "a"
    assert pairs(prompt="Q", response="b").answer == "b"


def test_a_chosen_text_without_a_rejected_one_is_an_answer():
    example = pairs(prompt="Q", chosen="a", rejected=None)
    assert (example.answer, example.chosen, example.rejected) == ("a", None, None)


def test_a_prompt_alone_is_an_example():
    example = pairs(prompt="Q")
    assert (example.answer, example.chosen, example.rejected) == (None, None, None)


def test_a_conversational_prompt_with_answers_is_rendered():
    example = pairs(prompt=[user("Hi. ")], chosen=[assistant("Yes.")], rejected=[assistant(" No.")])
    assert example.prompt_text == "\n\nHuman: Hi.\n\nAssistant:"
    assert (example.chosen, example.rejected) == (" Yes.", " No.")


def test_whole_dialogues_in_chosen_and_rejected_share_their_prompt():
    example = pairs(prompt="ignored", chosen=[user("Hi."), assistant("Yes.")], rejected=[user("Hi."), assistant("No.")])
    assert example.prompt_text == "\n\nHuman: Hi.\n\nAssistant:"
    assert (example.chosen, example.rejected) == (" Yes.", " No.")


def test_earlier_answers_are_turns_of_their_own():
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    example = parse(row, "messages", HUMAN_ASSISTANT, "row")
    assert example.prompt == (
        Turn("\n\nHuman: a\n\nAssistant:"),
        Turn(" b", is_answer=True),
        Turn("\n\nHuman: c\n\nAssistant:"),
    )
    assert example.answer == " d"


def test_a_system_message_comes_before_the_first_human():
    prompt = HUMAN_ASSISTANT.prompt([Message("system", "Be kind."), Message("user", "Hi.")])
    assert prompt == (Turn("Be kind.\n\nHuman: Hi.\n\nAssistant:"),)


def test_messages_may_have_sharegpt_names_and_content_in_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": parts}]}
    assert parse(row, "messages", HUMAN_ASSISTANT, "row").answer == " ab"


def test_the_template_none_puts_texts_together_as_they_are():
    row = {"messages": [user("Once "), assistant(" upon ")]}
    example = parse(row, "messages", NONE, "row")
    assert (example.prompt_text, example.answer) == ("Once ", " upon ")


def test_a_dialogue_is_cut_before_its_last_answer():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    example = parse({"chosen": start + " d", "rejected": start + " e"}, "dialogue", HUMAN_ASSISTANT, "row")
    assert (example.prompt_text, example.chosen, example.rejected) == (start, " d", " e")


def test_a_chat_template_is_cut_at_its_earlier_answers(chat):
    turns = chat.prompt([Message("user", "a"), Message("assistant", "b"), Message("user", "c")])
    # The template's own </s> after "b" is left out: the encoder puts EOS after every answer.
    assert turns == (
        Turn("<|user|>\na</s>\n<|assistant|>\n"),
        Turn("b", True),
        Turn("\n<|user|>\nc</s>\n<|assistant|>\n"),
    )


def test_a_dialogue_becomes_messages_of_the_chat_template(chat):
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    example = parse({"chosen": start + " d", "rejected": start + " e"}, "dialogue", chat, "row")
    assert example.prompt_text == "<|user|>\na</s>\n<|assistant|>\nb\n<|user|>\nc</s>\n<|assistant|>\n"
    assert (example.chosen, example.rejected) == ("d", "e")


def test_a_chat_template_that_rewrites_earlier_answers_gives_one_turn(chat):
    chat._tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert chat.prompt([Message("user", "a"), Message("assistant", "b"), Message("user", "c")]) == (Turn("ABC"),)


def test_roles_that_a_chat_template_refuses_drop_the_row(chat):
    chat._tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}x"
    with pytest.raises(Dropped) as dropped:
        chat.prompt([Message("system", "a"), Message("user", "b")])
    assert dropped.value.reason is Reason.REFUSED


def test_a_missing_chat_template_names_the_field(chat):
    chat._tokenizer.chat_template = None
    with pytest.raises(ConfigError, match=r"set data\.tokenizer\.chat_template"):
        Template("chat", chat._tokenizer)


def test_a_broken_chat_template_names_the_field(chat):
    chat._tokenizer.chat_template = "{% for"
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.chat_template cannot render"):
        Template("chat", chat._tokenizer)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, Reason.EMPTY_PROMPT),
        ({"prompt": [], "response": "a"}, Reason.EMPTY_PROMPT),
        ({"prompt": "q", "chosen": "a", "rejected": "\n"}, Reason.EMPTY_REPLY),
        ({"prompt": "q", "response": ""}, Reason.EMPTY_REPLY),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, Reason.SAME),
        ({"prompt": "q", "chosen": 3, "rejected": "a"}, Reason.NOT_TEXT),
        ({"prompt": "q", "response": "half \ud83d"}, Reason.NOT_TEXT),
        ({"prompt": [{"role": "user"}], "response": "a"}, Reason.NOT_TEXT),
        ({"prompt": [user("q"), assistant("a")], "response": "b"}, Reason.ANSWERED),
        ({"prompt": [user("q")], "response": [assistant("a"), user("b"), assistant("c")]}, Reason.SEVERAL),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]}, Reason.DIVERGE),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("q")]}, Reason.DIVERGE),
        ({"chosen": [user("q")], "rejected": [user("p")]}, Reason.HUMAN_LAST),
    ],
)
def test_a_row_of_no_use_is_dropped_with_its_reason(row, why):
    assert reason(row) is why


def test_a_dialogue_that_ends_with_a_human_turn_is_dropped():
    start = "\n\nHuman: a\n\nAssistant: b"
    assert reason({"chosen": start, "rejected": start + "\n\nHuman: c"}, "dialogue") is Reason.HUMAN_LAST
    assert reason({"messages": [user("a")]}, "messages") is Reason.HUMAN_LAST


def test_a_missing_column_is_an_error_with_the_columns_there_are():
    with pytest.raises(DataError, match=r"file row 1: no column 'prompt'; there are chosen, rejected, title"):
        pairs(chosen="a", rejected="b", title="c")


@pytest.mark.parametrize(
    ("file", "same", "diverge", "empty", "human_last"),
    [
        ("harmless-base", 0, 5, 4, 0),
        ("helpful-base", 2, 9, 4, 0),
        ("helpful-online", 2, 0, 3, 2),
        ("helpful-rejection-sampled", 32, 3, 0, 0),
    ],
)
def test_the_odd_rows_of_hh_rlhf_are_found(shared, file, same, diverge, empty, human_last):
    path = str(shared / "data" / "hh-rlhf" / f"{file}.test.jsonl.gz")
    dropped = Counter()
    for row in read_source(FileSource(paths=(path,)), "data.sources[0]", seed=0):
        try:
            parse(row.values, "dialogue", HUMAN_ASSISTANT, row.where)
        except Dropped as drop:
            dropped[drop.reason] += 1
    expected = {Reason.SAME: same, Reason.DIVERGE: diverge, Reason.EMPTY_REPLY: empty, Reason.HUMAN_LAST: human_last}
    assert dropped == {why: count for why, count in expected.items() if count}
