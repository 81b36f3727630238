"""Pad and EOS are settled once; prompt and response are encoded apart and decode to what they were."""

import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from rlhf_core.data.encode import Encoder
from rlhf_core.data.template import Turn
from rlhf_core.data.tokenizer import make_tokenizer, train
from rlhf_core.errors import ConfigError
from rlhf_core.specs import DataSpec, ModelSpec, QuickstartSource, TokenizerSpec

FAMILIES = ["stories260k", "gpt2-tokenizer", "opt-tokenizer", "neox-tokenizer"]
TEXTS = [
    "a",
    " a",
    " She said hi.",
    "\n\nThen he left.",
    "  two spaces",
    "\u00e9t\u00e9 \u2603",
    "x</s><|endoftext|>y",
    "",
]


def spec(**tokenizer):
    return DataSpec(sources=(QuickstartSource(),), tokenizer=TokenizerSpec(**tokenizer))


def make(folder, **tokenizer):
    return make_tokenizer(spec(**tokenizer), ModelSpec(path=str(folder)))


@pytest.fixture
def folder(shared, request):
    return shared / "models" / request.param


def trained(size=300, texts=("the cat sat on the mat", " the dog")):
    return train(texts * 50, TokenizerSpec(train_vocab_size=size))


@pytest.mark.parametrize(
    ("folder", "pad", "eos"),
    [
        ("stories260k", ("<unk>", 0), ("</s>", 2)),
        ("gpt2-tokenizer", ("<pad>", 50257), ("<|endoftext|>", 50256)),
        ("opt-tokenizer", ("<pad>", 1), ("</s>", 2)),
        ("neox-tokenizer", ("<|padding|>", 1), ("<|endoftext|>", 0)),
    ],
    indirect=["folder"],
)
def test_pad_is_a_token_that_is_not_eos(folder, pad, eos, tmp_path):
    tokenizer = make(folder)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert (one.pad_token, one.pad_token_id) == pad
        assert (one.eos_token, one.eos_token_id) == eos


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_the_direct_way_loads_what_auto_tokenizer_loads(folder):
    direct, auto = make(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert direct(text)["input_ids"] == auto(text)["input_ids"]


@pytest.mark.parametrize("folder", ["stories260k"], indirect=True)
def test_pad_equal_to_eos_gives_way_to_a_spare_token(folder, tmp_path):
    # As SmolLM2 has it: pad is the chat EOS and another token is free.
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    tokenizer.save_pretrained(tmp_path)
    assert make(tmp_path).pad_token == "<|endoftext|>"


@pytest.mark.parametrize("folder", ["stories260k"], indirect=True)
def test_pad_and_eos_can_be_chosen(folder):
    tokenizer = make(folder, pad_token="</s>", eos_token="<s>")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (2, 1)


@pytest.mark.parametrize("folder", ["stories260k"], indirect=True)
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"pad_token": "</s>"}, r"data\.tokenizer\.pad_token: '</s>' is the end-of-sequence token"),
        ({"pad_token": "<nope>"}, r"data\.tokenizer\.pad_token: '<nope>' is not in the vocabulary of 512 tokens"),
        ({"eos_token": "<nope>"}, r"data\.tokenizer\.eos_token: '<nope>' is not in the vocabulary"),
        ({"path": "x/", "train_vocab_size": 300}, "exclude each other"),
        ({"path": "/no/such/folder"}, r"data\.tokenizer\.path: '/no/such/folder' does not exist"),
    ],
)
def test_a_wrong_choice_names_its_field(folder, choice, message):
    with pytest.raises(ConfigError, match=message):
        make(folder, **choice)


def test_a_tokenizer_without_eos_names_the_field(tmp_path):
    tokenizer = trained()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.eos_token: the tokenizer has no end-of-sequence token"):
        make(tmp_path)
    assert make(tmp_path, eos_token="<eos>").eos_token_id == 1


def test_a_new_model_needs_a_tokenizer():
    with pytest.raises(ConfigError, match=r"set data\.tokenizer\.path, or data\.tokenizer\.train_vocab_size"):
        make_tokenizer(spec(), ModelSpec(family="llama"))


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path: no tokenizer can be loaded"):
        make(tmp_path)


def test_the_chat_template_can_be_given(tmp_path):
    template = "{{ messages[0].content }}"
    trained().save_pretrained(tmp_path / "a")
    make(tmp_path / "a", chat_template=template).save_pretrained(tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b").chat_template == template


def test_training_gives_pad_eos_and_any_byte(tmp_path):
    trained(size=270).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (270, 0, 1)
    text = "the cat \u2603 \U0001d11e\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" the cat")["input_ids"]) < 8


def test_training_twice_in_two_processes_gives_the_same_tokenizer(tmp_path):
    script = (
        "import sys; from rlhf_core import quickstart; from rlhf_core.data.tokenizer import train\n"
        "from rlhf_core.specs import TokenizerSpec\n"
        "texts = [row[k] for row in quickstart.generate(0, 500) for k in ('prompt', 'chosen')]\n"
        "train(texts, TokenizerSpec(train_vocab_size=400)).save_pretrained(sys.argv[1])\n"
    )
    for name in ("a", "b"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_prompt_and_response_decode_to_what_they_were(folder):
    tokenizer = make(folder)
    encoder = Encoder(tokenizer, chat=False)
    for prompt in ("Once upon a time,", "\n\nHuman: Hi.\n\nAssistant:"):
        [(ids, _)] = encoder.prompts([[Turn(prompt)]])
        for text, response in zip(TEXTS, encoder.responses(TEXTS), strict=True):
            body = [*ids[len(encoder.bos) :], *response[:-1]]
            assert tokenizer.decode(body, clean_up_tokenization_spaces=False).removeprefix(" ") == prompt + text
            assert encoder.decode(response) == text


@pytest.mark.parametrize("folder", FAMILIES, indirect=True)
def test_a_response_ends_with_eos_once_even_if_the_text_spells_it(folder):
    tokenizer = make(folder)
    for ids in Encoder(tokenizer, chat=False).responses(TEXTS):
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


@pytest.mark.parametrize(
    ("folder", "bos"), [("stories260k", [1]), ("opt-tokenizer", [2]), ("gpt2-tokenizer", [])], indirect=["folder"]
)
def test_only_the_prompt_begins_with_bos_and_only_if_the_tokenizer_puts_it_there(folder, bos):
    tokenizer = make(folder, **({"eos_token": "</s>"} if bos == [1] else {}))
    encoder = Encoder(tokenizer, chat=False)
    [(ids, mask)] = encoder.prompts([[Turn("a"), Turn(" b", is_answer=True), Turn(" c")]])
    assert ids[: len(bos)] == bos
    assert mask[: len(bos)] == [0] * len(bos)
    assert ids[len(bos) :].count(tokenizer.eos_token_id) == 1
    assert bos == [2] or not set(bos) & set(ids[len(bos) :])


@pytest.mark.parametrize("folder", ["stories260k"], indirect=True)
def test_earlier_answers_are_learned_with_their_eos(folder):
    tokenizer = make(folder)
    encoder = Encoder(tokenizer, chat=False)
    [(ids, mask)] = encoder.prompts([[Turn("a"), Turn(" big dog", is_answer=True), Turn(" c")]])
    learned = [i for i, m in zip(ids, mask, strict=True) if m]
    assert learned == encoder.responses([" big dog"])[0]
    assert learned[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("folder", ["stories260k"], indirect=True)
def test_special_tokens_count_only_where_a_chat_template_wrote_them(folder):
    tokenizer = make(folder)
    [(chat, _)] = Encoder(tokenizer, chat=True).prompts([[Turn("</s>")]])
    [(plain, _)] = Encoder(tokenizer, chat=False).prompts([[Turn("</s>")]])
    assert chat == [2]
    assert 2 not in plain and len(plain) > 2


@pytest.mark.parametrize("folder", ["stories260k"], indirect=True)
def test_a_response_has_the_tokens_it_has_after_its_prompt(folder):
    # The llama way of putting a space before every text must not add one in the middle.
    tokenizer = make(folder)
    whole = tokenizer("Once upon a time, there was a cat.", add_special_tokens=False)["input_ids"]
    encoder = Encoder(tokenizer, chat=False)
    [(prompt, _)] = encoder.prompts([[Turn("Once upon a time,")]])
    [response] = encoder.responses([" there was a cat."])
    assert prompt[1:] + response[:-1] == whole
