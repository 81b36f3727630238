"""The tokenizer of all stages: loaded, or trained on the data, with an EOS and a pad that is another token.

Pad must differ from EOS because EOS is learned and pad never is (DESIGN: rule 10). The order: what the configuration
says, the tokenizer's own pad, an existing token that no text produces (`<|endoftext|>` beside a chat EOS, `<unk>` of
a byte-level vocabulary), a new `<pad>`, for which the trainers enlarge the embedding. transformers' AutoTokenizer
takes seconds and imports torch, so the classes that read tokenizer.json are used directly.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_core.errors import ConfigError
from rlhf_core.sources import resolve_model
from rlhf_core.specs import DataSpec, ModelSpec, TokenizerSpec

PAD, EOS = "<pad>", "<eos>"
# Tokens that exist in common vocabularies and can pad, if they are not EOS and no text produces them.
SPARE_TOKENS = (PAD, "[PAD]", "<|padding|>", "<|pad|>", "<|endoftext|>", "<unk>")
PROBE = "Ab 9\n\té☃𝄞"  # letters, digits, space and characters that are in no small vocabulary
# Classes that do what AutoTokenizer would do with them.
DIRECT = {
    "TokenizersBackend": "TokenizersBackend",
    "PreTrainedTokenizer": "TokenizersBackend",
    "GPT2Tokenizer": "GPT2Tokenizer",
    "GPTNeoXTokenizer": "GPTNeoXTokenizer",
}


def make_tokenizer(spec: DataSpec, model: ModelSpec | None) -> Any:
    """The tokenizer that the specs ask for, pad and EOS settled; without a vocabulary yet if it is to be trained."""
    choice = spec.tokenizer
    if choice.train_vocab_size is not None:
        if choice.path:
            raise ConfigError(
                f"data.tokenizer: path {choice.path!r} and train_vocab_size {choice.train_vocab_size} exclude each "
                "other; keep one"
            )
        return configured(_new_tokenizer(), choice)
    if choice.path:
        return configured(load(choice.path, None, "data.tokenizer.path"), choice)
    if model is None or model.path is None:
        raise ConfigError(
            "data.tokenizer: a new model (model.family) brings no tokenizer; set data.tokenizer.path, or "
            "data.tokenizer.train_vocab_size to train one on the data"
        )
    return configured(load(model.path, model.revision, "model.path"), choice)


def load(path: str, revision: str | None, field: str) -> Any:
    """A tokenizer from a folder, a .gguf file or the hub; ConfigError naming `field` if there is none."""
    import transformers

    place = resolve_model(path, field)
    folder, options = place, {"revision": revision} if revision else {}
    if place.endswith(".gguf"):
        folder, options = str(Path(place).parent), {"gguf_file": Path(place).name}
    name = None if options else _direct_class(Path(folder))
    try:
        # Left open, transformers asks on a terminal whether to run code that a tokenizer brings.
        return getattr(transformers, name or "AutoTokenizer").from_pretrained(
            folder, trust_remote_code=False, **options
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{field}: no tokenizer can be loaded from {path!r}: {reason}; set "
            f"{'reward' if field.startswith('reward') else 'data'}.tokenizer.path to a folder with tokenizer.json and "
            "tokenizer_config.json"
        ) from error


def _direct_class(folder: Path) -> str | None:
    """Name of the transformers class that reads this folder's tokenizer.json, None if only AutoTokenizer knows."""
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not (folder / "tokenizer.json").is_file():
        return None
    try:
        content = json.loads(config.read_text())
    except ValueError:
        return None
    return None if "auto_map" in content else DIRECT.get(str(content.get("tokenizer_class")).removesuffix("Fast"))


def configured(tokenizer: Any, choice: TokenizerSpec, field: str = "data.tokenizer") -> Any:
    """The tokenizer with template, EOS and pad as chosen, or settled; ConfigError naming `field` if that cannot be."""
    if choice.chat_template is not None:
        tokenizer.chat_template = choice.chat_template
    if choice.eos_token is not None:
        _require(tokenizer, choice.eos_token, f"{field}.eos_token")
        tokenizer.eos_token = choice.eos_token
    if tokenizer.eos_token is None or tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{field}.eos_token: the tokenizer has no end-of-sequence token, so that no response could end; name one of "
            "its tokens here"
        )
    _set_pad(tokenizer, choice.pad_token, field)
    return tokenizer


def _set_pad(tokenizer: Any, wanted: str | None, field: str) -> None:
    if wanted is not None:
        _require(tokenizer, wanted, f"{field}.pad_token")
        if wanted == tokenizer.eos_token:
            raise ConfigError(
                f"{field}.pad_token: {wanted!r} is the end-of-sequence token, which responses learn and padding "
                "must not; name another token or leave it out"
            )
        tokenizer.pad_token = wanted
    elif tokenizer.pad_token is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = _spare_token(tokenizer)
    assert tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id


def _spare_token(tokenizer: Any) -> str:
    """An existing token that no text produces, or a new one."""
    vocabulary = tokenizer.get_vocab()
    used = {tokenizer.eos_token_id, *tokenizer(PROBE)["input_ids"]}
    for token in SPARE_TOKENS:
        if token in vocabulary and vocabulary[token] not in used:
            return token
    tokenizer.add_special_tokens({"pad_token": PAD})
    return PAD


def _require(tokenizer: Any, token: str, field: str) -> None:
    if token not in tokenizer.get_vocab():
        special = ", ".join(repr(t) for t in tokenizer.all_special_tokens) or "none"
        raise ConfigError(
            f"{field}: {token!r} is not in the vocabulary of {len(tokenizer)} tokens; name a token that "
            f"is, e.g. a special one: {special}"
        )


def _new_tokenizer() -> Any:
    """A byte-level BPE without merges: any text can be encoded, two special tokens."""
    return _wrapped(_backend([PAD, EOS]))


def train(texts: Iterable[str], choice: TokenizerSpec) -> Any:
    """A byte-level BPE trained on `texts`; the same texts in the same order give the same tokenizer."""
    from tokenizers import pre_tokenizers, trainers

    backend = _backend([])
    assert choice.train_vocab_size is not None
    trainer = trainers.BpeTrainer(
        vocab_size=choice.train_vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return configured(_wrapped(backend), choice)


def _backend(tokens: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = [*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())] if tokens else []
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend


def _wrapped(backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
