"""What the saved tokenizer's chat template renders is what the model was trained on, and only answers are learned."""

import pytest
from test_data_build import build, context_for, files, open_all
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_core import chat
from rlhf_core.data.build import run
from rlhf_core.specs import DataSpec, FileSource, ModelSpec, QuickstartSource, Shares, TokenizerSpec

# Tokenizers of the llama kind put a space after any special token, so after the EOS of an earlier answer, too.
FAMILIES = [("stories260k", 1), ("gpt2-tokenizer", 3), ("opt-tokenizer", 3), ("neox-tokenizer", 3)]
GENERATION = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TRAINED = TokenizerSpec(train_vocab_size=320)
SHARES = Shares(sft=1, reward=0, ppo=1)


def dialogue(number, turns=3):
    """A system message and several turns, with white space that templates strip."""
    messages = [{"role": "system", "content": f" Be kind {number}.\n"}]
    for i in range(turns):
        messages.append({"role": "user", "content": f"Question {number}, part {i}? "})
        messages.append({"role": "assistant", "content": f" Answer {number}.{i}:\nso."})
    return messages


def built(folder, rows, model=None, **fields):
    """The data set of the rows, and its tokenizer as plain transformers loads it."""
    fields = {"tokenizer": TRAINED if model is None else TokenizerSpec(), "shares": SHARES} | fields
    build(folder / "out", sources=(files(folder / "rows.jsonl", rows),), model=model, **fields)
    return open_all(folder / "out"), AutoTokenizer.from_pretrained(folder / "out" / "tokenizer")


def ids_of(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)


def by_number(rows, column="prompt"):
    """Rows by the number of their dialogue."""
    return {int(row[column].split("Be kind ")[1].split(".")[0]): row for row in rows}


@pytest.mark.parametrize(("family", "turns"), FAMILIES)
def test_the_chat_template_gives_the_very_tokens_of_the_training_prompts(family, turns, shared, tmp_path):
    model = ModelSpec(path=str(shared / "models" / family))
    data, tokenizer = built(tmp_path, [{"messages": dialogue(i, turns)} for i in range(60)], model)
    for number, row in by_number(data["ppo/train"]).items():
        prompt = ids_of(tokenizer, dialogue(number, turns)[:-1], add_generation_prompt=True)
        assert prompt["input_ids"] == row["prompt_ids"]
        assert chat.encode(dialogue(number, turns)[:-1], tokenizer) == row["prompt_ids"]
    for number, row in by_number(data["sft/train"]).items():
        assert ids_of(tokenizer, dialogue(number, turns))["input_ids"] == row["input_ids"]


@pytest.mark.parametrize("family", ["gpt2-tokenizer", "opt-tokenizer"])
def test_the_chat_template_renders_the_training_prompt_byte_for_byte(family, shared, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f" What is {i}?\n"}], "response": "x"} for i in range(80)]
    data, tokenizer = built(tmp_path, rows, ModelSpec(path=str(shared / "models" / family)))
    bos = "</s>" if family == "opt-tokenizer" else ""
    for row in data["ppo/train"]:
        asked = [{"role": "user", "content": row["prompt"].split("Human: ")[1].removesuffix("\n\nAssistant:")}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert text == bos + row["prompt"] == bos + chat.render(asked, tokenizer).removeprefix(bos)


def test_the_mask_of_assistant_tokens_is_the_loss_mask(shared, tmp_path):
    model = ModelSpec(path=str(shared / "models" / "opt-tokenizer"))
    data, tokenizer = built(tmp_path, [{"messages": dialogue(i)} for i in range(60)], model)
    for number, row in by_number(data["sft/train"]).items():
        theirs = ids_of(tokenizer, dialogue(number), return_assistant_tokens_mask=True)
        assert theirs["input_ids"] == row["input_ids"]
        # The space before an answer is a byte of its first token, which transformers counts as the answer's, as we do.
        assert theirs["assistant_masks"] == row["loss_mask"]


def test_with_a_chat_template_of_several_turns_exactly_the_answers_and_their_eos_are_learned(shared, tmp_path):
    model = ModelSpec(path=str(shared / "models" / "gpt2-tokenizer"))
    choice = TokenizerSpec(chat_template=GENERATION)
    rows = [{"messages": [m | {"content": m["content"].strip()} for m in dialogue(i)]} for i in range(60)]
    data, tokenizer = built(tmp_path, rows, model, template="chat", tokenizer=choice)
    for number, row in by_number(data["sft/train"]).items():
        theirs = ids_of(tokenizer, rows[number]["messages"], return_assistant_tokens_mask=True)
        length = len(row["input_ids"])  # theirs goes on after the last EOS with the template's line break
        assert theirs["input_ids"][:length] == row["input_ids"]
        assert theirs["assistant_masks"][:length] == row["loss_mask"] and not any(theirs["assistant_masks"][length:])
        learned = [i for i, m in zip(row["input_ids"], row["loss_mask"], strict=True) if m]
        assert tokenizer.decode(learned) == "".join(f"Answer {number}.{i}:\nso.<|endoftext|>" for i in range(3))
    prompts = by_number(data["ppo/train"])
    assert prompts and all(
        ids_of(tokenizer, rows[number]["messages"][:-1], add_generation_prompt=True)["input_ids"] == row["prompt_ids"]
        for number, row in prompts.items()
    )


def test_a_template_of_the_tokenizer_that_was_not_used_gives_way_to_the_one_that_was(tmp_path):
    base = tmp_path / "base"
    build(base, sources=(QuickstartSource(prompts=200),))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base / "tokenizer")
    tokenizer.chat_template = GENERATION
    tokenizer.save_pretrained(base / "tokenizer")
    choice = TokenizerSpec(path=str(base / "tokenizer"))
    rows = [{"prompt": [{"role": "user", "content": f"Q{i}"}], "response": "x"} for i in range(60)]
    _, used = built(tmp_path, rows, tokenizer=choice)
    assert chat.render([{"role": "user", "content": "Hi"}], used) == "\n\nHuman: Hi\n\nAssistant:"
    _, same = built(tmp_path, rows, tokenizer=choice, template="chat")
    assert same.chat_template == GENERATION
    given = choice.model_copy(update={"chat_template": "{{ messages[0].content }}"})
    assert built(tmp_path, rows, tokenizer=given)[1].chat_template == "{{ messages[0].content }}"


def test_without_a_template_in_the_data_there_is_none_in_the_tokenizer_and_chat_takes_texts_as_they_are(tmp_path):
    rows = [{"prompt": f"Q{i}", "response": " x"} for i in range(60)]
    _, tokenizer = built(tmp_path, rows, template="none")
    assert tokenizer.chat_template is None
    assert chat.render([{"role": "user", "content": "Once upon"}], tokenizer) == "Once upon"


def test_prompts_that_are_text_already_decide_how_the_template_begins(tmp_path):
    # Those of the quickstart begin without line breaks.
    run(context_for(tmp_path, DataSpec(sources=(QuickstartSource(prompts=200),), tokenizer=TRAINED)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    for row in open_all(tmp_path)["ppo/test"]:
        asked = row["prompt"].removeprefix("Human: ").removesuffix("\n\nAssistant:")
        assert chat.render([{"role": "user", "content": asked}], tokenizer) == row["prompt"]
        assert chat.encode([{"role": "user", "content": asked}], tokenizer) == row["prompt_ids"]


def test_dialogues_that_came_as_text_are_asked_as_they_were_trained_without_eos_inside(shared, tmp_path):
    source = FileSource(paths=(str(shared / "data" / "hh-rlhf" / "harmless-base.test.jsonl.gz"),), limit=300)
    model = ModelSpec(path=str(shared / "models" / "opt-tokenizer"))
    build(tmp_path, sources=(source,), model=model, tokenizer=TokenizerSpec(), max_prompt_tokens=500)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    messages = [{"role": r, "content": c} for r, c in (("user", "Who?"), ("assistant", "Me."), ("user", "Why?"))]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "</s>\n\nHuman: Who?\n\nAssistant: Me.\n\nHuman: Why?\n\nAssistant:"
