"""Sequences that share a row do not see each other: losses and gradients are those they have alone, or the family is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from plain import target_logprobs

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.batches import deal, deal_packed, pack, right_pad
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.models import forward_inputs, new_causal_lm
from rlhf_core.packing import packed_inputs, require_packing
from rlhf_core.sft import SFTTrainer
from rlhf_core.specs import ModelSpec
from rlhf_core.store import Store

CPU = torch.device("cpu")
ROWS = [[[5, 6, 7, 8, 9, 10, 11], [4], [12, 13, 14, 3, 2]], [[20, 21, 22, 23, 24, 25, 26, 27, 28], [6, 5]]]
FAMILIES = ("opt", "gpt_neox", "gptj", "gpt_neo", "gpt2", "codegen", "llama", "qwen2", "qwen3", "mistral", "gemma3")


def model(family: Any, window: bool = False) -> Any:
    """A small model of a family; with `window`, every other layer sees only the last four tokens."""
    made = new_causal_lm(ModelSpec(family=family, hidden_size=64, layers=2, heads=4, positions=32), tiny.tokenizer(), 0)
    if not window:
        return made
    config: Any = made.config
    if family == "gpt_neo":
        config.attention_types, config.attention_layers, config.window_size = (
            [[["global", "local"], 1]],
            ["global", "local"],
            4,
        )
    else:
        config.sliding_window, config.use_sliding_window = 4, True
        config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    return type(made)(config)


def nats(made: Any, inputs: dict[str, Any], rows: list[list[list[int]]]) -> torch.Tensor:
    """Sum of -log p of every token that has one before it in its sequence."""
    labels = right_pad([[int(i > 0) for ids in row for i in range(len(ids))] for row in rows], 0, CPU)[:, 1:].bool()
    logits = made(**inputs, use_cache=False).logits
    return -target_logprobs(logits[:, :-1][labels], inputs["input_ids"][:, 1:][labels]).sum()


def gradients(made: Any, loss: torch.Tensor) -> torch.Tensor:
    made.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("family", "window"),
    [
        *((family, False) for family in FAMILIES),
        *((f, True) for f in ("gpt_neo", "qwen2", "qwen3", "mistral", "gemma3")),
    ],
)
def test_packed_sequences_have_the_loss_and_the_gradients_that_they_have_alone(family, window):
    made = model(family, window)
    require_packing(made.config, 16)
    alone = [[ids] for row in ROWS for ids in row]
    ids = right_pad([row[0] for row in alone], 0, CPU)
    mask = right_pad([[1] * len(row[0]) for row in alone], 0, CPU)
    plain = nats(made, forward_inputs(made, ids, mask), alone)
    packed = nats(made, packed_inputs(made, ROWS, 0, CPU), ROWS)
    assert packed.item() == pytest.approx(plain.item(), rel=1e-5)
    wanted, found = gradients(made, plain), gradients(made, packed)
    assert torch.allclose(found, wanted, atol=1e-5 * wanted.norm().item())
    mixed = {"input_ids": packed_inputs(made, ROWS, 0, CPU)["input_ids"]}
    assert abs(nats(made, mixed, ROWS).item() - plain.item()) > 1e-3, "the sequences would see each other otherwise"


def test_families_that_cannot_be_packed_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"resources.pack_tokens 64: .*family bloom"):
        require_packing(model("bloom").config, 64)
    with pytest.raises(ConfigError, match=r"pack_tokens 64: gpt_neo.* 32 positions"):
        require_packing(model("gpt_neo").config, 64)


def test_each_sequence_goes_into_the_first_row_that_has_room():
    lengths = [9, 7, 5, 3, 3, 1]
    assert pack(lengths, range(6), 10) == [[0, 5], [1, 3], [2, 4]]
    with pytest.raises(DataError, match=r"resources.pack_tokens 8 is less than a row of 9"):
        pack(lengths, range(6), 8)


def test_every_rank_has_as_many_micro_batches_and_every_sequence_is_in_one():
    lengths = np.random.default_rng(0).integers(1, 60, 37).tolist()
    parts = [deal_packed(lengths, rank, 3, 2, 64) for rank in range(3)]
    assert len({len(rank) for rank in parts}) == 1 and all(len(part) <= 2 for rank in parts for part in rank)
    rows = [row for rank in parts for part in rank for row in part]
    assert sorted(i for row in rows for i in row) == list(range(37))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 64 and len(rows) < 25


def losses(root: Path, out: Path, **resources: Any) -> list[dict]:
    """Rows of metrics.jsonl of an SFT stage."""
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((root / "refs.json").read_text()).items()}
    spec = {"batch_size": 8, "max_steps": 4, "loss_on": "all", "optim": {"lr": 3e-3}}
    context = tiny.context(Store(f"file://{root}/store"), "sft", spec, {"data": refs["data"]}, out, **resources)
    SFTTrainer(context).run()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_stage_has_the_same_losses_with_packing(tiny_root, tmp_path):
    plain = losses(tiny_root, tmp_path / "plain")
    packed = losses(tiny_root, tmp_path / "packed", pack_tokens=32, micro_batch=2)
    assert [row["tokens"] for row in packed if "tokens" in row] == [row["tokens"] for row in plain if "tokens" in row]
    for found, wanted in zip(packed, plain, strict=True):
        for name in {"loss", "grad_norm", "perplexity"} & wanted.keys():
            assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5)


def test_without_packing_too_every_rank_has_as_many_micro_batches():
    parts = [deal([3, 1, 2, 5, 4], rank, 2, 1) for rank in range(2)]
    assert parts == [[[3], [0], [1]], [[4], [2], []]]
