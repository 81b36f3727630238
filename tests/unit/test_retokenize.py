"""Ids of one tokenizer become those of another, EOS stays where it stood, and a critic never reads the token to be chosen."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import tiny

from rlhf_core import retokenize
from rlhf_core.data.encode import Encoder
from rlhf_core.data.template import Turn
from rlhf_core.data.tokenizer import configured, load
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.retokenize import Retokenizer, token_bytes
from rlhf_core.specs import TokenizerSpec

NAMES = ("gpt2-tokenizer", "opt-tokenizer", "neox-tokenizer", "stories260k")
PAIRS = list(product(NAMES, NAMES))
TURNS = [
    Turn("Human: Tell me  a story 😀 of naïve café</s>\n\nAssistant:", False),
    Turn(" Once 👩‍👩‍👧‍👦 upon\n\ta time <|endoftext|> 12345", True),
    Turn("\n\nHuman: More!\n\nAssistant:", False),
]
ANSWER = " They lived happily, über 𝄞 all </s> mountains;  and 你好 <s>."


@pytest.fixture(scope="module")
def tokenizers(shared) -> dict[str, Any]:
    """The real tokenizers, pad and EOS settled as in the data stage."""
    return {n: configured(load(str(shared / "models" / n), None, "model.path"), TokenizerSpec()) for n in NAMES}


def row(tokenizer: Any, turns: list[Turn] = TURNS, answer: str = ANSWER) -> tuple[list[int], list[int]]:
    """Prompt and response as the data stage encodes them."""
    encoder = Encoder(tokenizer, chat=False)
    return encoder.prompts([turns])[0][0], encoder.responses([answer])[0]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_converted_row_is_the_row_that_the_data_stage_makes_with_the_other_tokenizer(source, target, tokenizers):
    prompt, response = row(tokenizers[target])
    for turns, answer in ((TURNS, ANSWER), ([Turn(" Hi", False)], "there"), ([Turn("Hi", False)], "")):
        prompt, response = row(tokenizers[target], turns, answer)
        given = row(tokenizers[source], turns, answer)
        assert Retokenizer(tokenizers[source], tokenizers[target]).convert(*given) == prompt + response


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_text_is_the_same_in_both(source, target, tokenizers):
    converted = Retokenizer(tokenizers[source], tokenizers[target]).convert(*row(tokenizers[source]))
    text = tokenizers[target].decode(converted, clean_up_tokenization_spaces=False)
    leading = tokenizers[target].eos_token if target == "opt-tokenizer" else "<s>" if target == "stories260k" else ""
    eos = tokenizers[target].eos_token
    told = f"{TURNS[0].text}{TURNS[1].text}{eos}{TURNS[2].text}{ANSWER}{eos}"
    # transformers writes a space after the <s> of a sentencepiece tokenizer
    assert text.removeprefix(leading).removeprefix(" " if leading == "<s>" else "") == told


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_last_token_is_eos_exactly_if_the_answer_ended(source, target, tokenizers):
    convert = Retokenizer(tokenizers[source], tokenizers[target]).convert
    eos = tokenizers[target].eos_token_id
    prompt, response = row(tokenizers[source])
    assert convert(prompt, response)[-1] == eos
    assert convert(prompt, response[:-1])[-1] != eos
    assert convert(prompt, response[:-1]) == convert(prompt, response)[:-1]
    assert convert(prompt, response).count(eos) - convert([], []).count(eos) == 2, "one of the turn, one of the answer"


def test_pad_and_bos_are_left_out_wherever_they_stand(tokenizers):
    source, target = tokenizers["opt-tokenizer"], tokenizers["gpt2-tokenizer"]
    convert = Retokenizer(source, target).convert
    (prompt, response), pad = row(source), [source.pad_token_id] * 3
    assert prompt[0] == source.bos_token_id == source.eos_token_id
    wanted = convert(prompt, response)
    assert convert(pad + prompt, response + pad) == wanted
    target(["a", "b c d"], padding=True, truncation=True, max_length=5)  # which transformers remembers in the tokenizer
    assert convert(prompt, response) == wanted


def test_an_answer_cut_inside_an_emoji_converts_to_what_there_is_of_it(tokenizers):
    source, target = tokenizers["gpt2-tokenizer"], tokenizers["stories260k"]
    prompt, response = row(source, answer=" so 👩‍👩")
    converted = Retokenizer(source, target).convert(prompt, response[:-2])
    assert target.decode(converted).endswith(" so 👩‍\ufffd")


def special(token: str) -> Any:
    """The tiny tokenizer with one more special token."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    return tokenizer


def test_a_special_token_of_the_same_name_becomes_the_others_and_one_without_becomes_its_characters(tokenizers):
    source = special("<|im_start|>")
    number = source.convert_tokens_to_ids("<|im_start|>")
    assert Retokenizer(source, special("<|im_start|>")).convert([number, 3], [4, 1]) == [number, 3, 4, 1]
    target = tokenizers["gpt2-tokenizer"]
    converted = Retokenizer(source, target).convert([3, number, 3], [4, 1])
    assert target.decode(converted) == "w1 <|im_start|> w1 w2<|endoftext|>"


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_value_is_that_of_the_last_token_whose_text_ends_before_the_action(source, target, tokenizers):
    retokenizer = Retokenizer(tokenizers[source], tokenizers[target])
    prompt, response = row(tokenizers[source])
    index, converted = retokenizer.align(prompt, response), retokenizer.convert(prompt, response)
    first = len(retokenizer.convert(prompt, []))
    texts, theirs = token_bytes(tokenizers[source]), token_bytes(tokenizers[target])
    told = np.cumsum([0] + [len(texts[i]) for i in response[:-1]])
    read = np.cumsum([0] + [len(theirs[i]) for i in converted[first:-1]])
    assert len(index) == len(response) and index == sorted(index)
    assert index[0] == first - 1 and index[-1] == len(converted) - 2, "all of the prompt; all but the EOS"
    for place, known in zip(index, told, strict=True):
        assert read[place - first + 1] <= known, "causal"
    # and it is the last such token, except inside a character, where nothing of the character counts as read
    whole = b"".join(texts[i] for i in response[:-1])
    for place, known in zip(index[:-1], told[:-1], strict=True):
        boundary = whole[known : known + 1].decode("latin-1") < "\x80" or whole[known] >= 0xC0
        if boundary:
            assert read[place - first + 2] > known, "no later token ends before the action"


def test_tokenizers_that_are_the_same_need_nothing_and_the_others_something(tokenizers):
    for source, target in PAIRS:
        retokenizer = Retokenizer(tokenizers[source], tokenizers[target])
        assert retokenizer.same == (source == target)
        if source == target:
            prompt, response = row(tokenizers[source])
            assert retokenizer.convert(prompt, response) == prompt + response
            places = retokenizer.align(prompt, response)
            assert places[0] == len(prompt) - 1 and places[-1] == len(prompt + response) - 2


def test_tables_are_made_only_for_tokenizers_that_differ(tokenizers, monkeypatch):
    made = []
    monkeypatch.setattr(retokenize, "token_bytes", lambda tokenizer: made.append(tokenizer) or token_bytes(tokenizer))
    monkeypatch.setattr(retokenize, "_shared_specials", lambda *both: made.append(both) or {})
    assert Retokenizer(tokenizers["opt-tokenizer"], tokenizers["opt-tokenizer"]).same and not made
    other = Retokenizer(tokenizers["opt-tokenizer"], tokenizers["gpt2-tokenizer"])
    assert not made
    for _ in range(2):
        other.convert([5], [6])
    assert len(made) == 2


def test_two_tokenizers_of_a_kind_that_cannot_be_told_apart_into_bytes_are_the_same_if_they_are():
    from tokenizers import decoders

    pair = [tiny.tokenizer(), tiny.tokenizer()]
    for tokenizer in pair:
        tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    assert Retokenizer(*pair).same


def test_words_convert_too_and_an_answer_aligns_after_its_end(tokenizers):
    source, target = tiny.tokenizer(), tokenizers["stories260k"]
    retokenizer = Retokenizer(source, target)
    converted = retokenizer.convert([2, 3], [4, 5, 1, 0])
    assert target.decode(converted, skip_special_tokens=True) == "w0 w1 w2 w3"
    places = retokenizer.align([2, 3], [4, 5, 1, 0])
    assert places[0] == len(retokenizer.convert([2, 3], [])) - 1 and places[-1] == len(converted) - 1


def test_a_tokenizer_whose_text_is_not_that_of_its_tokens_is_refused(tokenizers):
    from tokenizers import decoders

    source = tiny.tokenizer()
    source.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match=r"WordPiece.*byte-level or sentencepiece"):
        Retokenizer(source, tokenizers["gpt2-tokenizer"])


def test_an_answer_to_nothing_has_no_value_before_it(tokenizers):
    with pytest.raises(DataError, match="prompt is empty"):
        Retokenizer(tokenizers["neox-tokenizer"], tokenizers["gpt2-tokenizer"]).align([], [5])


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_what_a_value_has_read_does_not_depend_on_the_word_that_follows(source, target, tokenizers):
    retokenizer = Retokenizer(tokenizers[source], tokenizers[target])
    read = []
    for answer in (" They lived happily", " They lived in", " They lived 😀!"):
        prompt, response = row(tokenizers[source], answer=answer)
        shared = len(Encoder(tokenizers[source], chat=False).responses([" They lived"])[0]) - 1
        place = retokenizer.align(prompt, response)[shared]
        read.append(retokenizer.convert(prompt, response)[: place + 1])
    assert read[0] == read[1] == read[2]
    assert tokenizers[target].decode(read[0]).endswith(" They lived")


def test_text_that_the_target_writes_shorter_stays_causal(tokenizers):
    source, target = tokenizers["gpt2-tokenizer"], tokenizers["neox-tokenizer"]  # GPT-NeoX composes e + accent
    retokenizer = Retokenizer(source, target)
    start = " e\u0301" * 6
    prompt, response = row(source, answer=start + " end")
    before = retokenizer.convert(prompt, row(source, answer=start)[1][:-1])
    assert retokenizer.convert(prompt, response)[: len(before)] == before
    assert retokenizer.align(prompt, response)[len(row(source, answer=start)[1]) - 1] == len(before) - 1
