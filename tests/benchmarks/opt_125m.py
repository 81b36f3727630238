"""What the speed benchmarks work on: models of OPT-125m's shape with weights from a seed, and rows as long as people's.

Lengths are those of hh-rlhf's helpful-base dialogues in tokens of OPT, of prompts that have at most 256: seventeen quantiles of
each are kept here, so that nothing must be downloaded. Words are drawn at random, as only their number costs time.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAD, EOS = 1, 2
ROWS, NEW = 16, 128  # sequences of a rollout, and most tokens of an answer
PROMPTS = (10, 17, 19, 21, 24, 34, 52, 65, 80, 96, 112, 128, 147, 170, 195, 224, 256)
ANSWERS = (4, 10, 16, 19, 24, 28, 33, 38, 44, 50, 57, 65, 76, 90, 110, 128, 128)
MEAN_ANSWER = 53  # of them


@dataclass(frozen=True)
class Shape:
    """Of a model; heads have 64 numbers whatever the width."""

    layers: int = 12
    hidden: int = 768
    vocabulary: int = 50_264


OPT_125M = Shape()


def config(shape: Shape = OPT_125M) -> Any:
    """What transformers makes a model of."""
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, ffn_dim=4 * shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64, max_position_embeddings=1024, word_embed_proj_dim=shape.hidden,
        dropout=0.0, attention_dropout=0.0, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip


def tokenizer(shape: Shape = OPT_125M) -> Any:
    """One word a token."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(3, shape.vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>")


def save_models(folder: Path, varied: bool, shape: Shape = OPT_125M) -> None:
    """An actor and a reward model in fp32; the actor ends its answers at random, or never."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf_core.export import save_causal_lm, save_value_model
    from rlhf_core.models import ValueModel

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(shape))
    with torch.no_grad():  # what comes before the head has a part along one direction, and EOS its row there
        along = torch.full((shape.hidden,), shape.hidden**-0.5)
        model.model.decoder.final_layer_norm.bias += 5 * along
        # some answers are cut, which makes them shorter on average
        nats = math.log(shape.vocabulary / MEAN_ANSWER) + 0.1 if varied else -60.0
        model.lm_head.weight[EOS] = nats / 5 * along
        model.lm_head.weight[PAD] = -12 * along
    save_causal_lm(model, tokenizer(shape), folder / "actor")
    save_value_model(ValueModel.from_causal_lm(model, 0), tokenizer(shape), folder / "reward")


def lengths(quantiles: tuple[int, ...], count: int, random: np.random.Generator) -> list[int]:
    """`count` lengths of such a distribution, one of each equal part of it, in random order."""
    places = (random.permutation(count) + random.random(count)) / count
    return np.interp(places, np.linspace(0, 1, len(quantiles)), quantiles).round().astype(int).tolist()


def words(count: int, random: np.random.Generator) -> list[int]:
    """That many token ids that every vocabulary here has, none of them special."""
    return random.integers(3, 10_000, count).tolist()


def prompts(varied: bool, iterations: int, rows: int = ROWS, fixed: int = 128) -> list[list[int]]:
    """Prompts of all iterations; each iteration has short and long ones."""
    random = np.random.default_rng(0)
    sizes = [n for _ in range(iterations) for n in (lengths(PROMPTS, rows, random) if varied else [fixed] * rows)]
    return [words(n, random) for n in sizes]


def pairs(varied: bool, count: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected answer, each ending by EOS; 128 + 128 tokens where lengths are fixed."""
    random = np.random.default_rng(1)
    made = []
    for start in range(0, count, ROWS):
        n = min(ROWS, count - start)
        sizes = [lengths(q, n, random) if varied else [128] * n for q in (PROMPTS, ANSWERS, ANSWERS)]
        made += [
            (words(p, random), [*words(c - 1, random), EOS], [*words(r - 1, random), EOS])
            for p, c, r in zip(*sizes, strict=True)
        ]
    return made
