"""The planner's memory beside that of real stages: `PYTHONPATH=tests python tests/distributed/planner_cells.py`, some minutes.

Models with random weights, at ZeRO 0 to 3, on one and two ranks, in fp32 and bf16, with and without gradient checkpointing. What
is measured is the peak of anonymous memory, over what a process needs before it has a model, while it takes two steps.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ranks
import tiny

from rlhf_core.config import parse_config
from rlhf_core.planner.estimate import Shapes, estimate
from rlhf_core.planner.hardware import parse_hardware
from rlhf_core.planner.shapes import shape_of

Cell = tuple[str, int, str, dict[str, Any], dict[str, Any]]  # model, ranks, stage, spec, resources

# What is freed goes back at once: else the allocator keeps what it likes.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
VOCABULARY, PROMPT, ANSWER = 16_000, 120, 24
MODELS: dict[str, dict[str, Any]] = {
    "opt-28m": {
        "model_type": "opt", "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "ffn_dim": 2048,
        "word_embed_proj_dim": 512, "max_position_embeddings": 256, "vocab_size": VOCABULARY, "dropout": 0.0,
    },
    "llama-34m": {
        "model_type": "llama", "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 8, "intermediate_size": 1408, "max_position_embeddings": 256,
        "vocab_size": VOCABULARY, "tie_word_embeddings": True,
    },
    "gpt2-81m": {
        "model_type": "gpt2", "n_embd": 768, "n_layer": 9, "n_head": 12, "n_positions": 256, "vocab_size": VOCABULARY,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip


def make_root(root: Path, model: str) -> None:
    """A store of one model's artifacts, all rows as long as allowed."""
    import numpy as np
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from rlhf_core.export import save_causal_lm, save_value_model
    from rlhf_core.models import ValueModel
    from rlhf_core.store import Store

    store, rng = Store(f"file://{root}/store"), np.random.default_rng(0)
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(root / "data" / "tokenizer")

    def some(count: int) -> list[int]:
        return rng.integers(2, VOCABULARY, count).tolist()

    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "reward": [], "ppo": []}
    for _ in range(64):
        prompt, good, bad = some(PROMPT), [*some(ANSWER - 1), 1], [*some(ANSWER - 1), 1]
        rows["sft"].append({"input_ids": prompt + good, "loss_mask": [0] * PROMPT + [1] * ANSWER})
        rows["reward"].append({"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad})
        rows["ppo"].append({"prompt_ids": prompt})
    for share, items in rows.items():
        for split in ("train", "test"):
            Dataset.from_list(items).save_to_disk(str(root / "data" / share / split))
    data = tiny.put(store, "data", root / "data", {})
    fields = dict(MODELS[model])
    torch.manual_seed(0)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    made = AutoModelForCausalLM.from_config(config)
    save_causal_lm(made, tokenizer, root / "sft" / "model")
    save_value_model(ValueModel.from_causal_lm(made, 0), tokenizer, root / "reward" / "model")
    sft = tiny.put(store, "sft", root / "sft", {"data": data})
    reward = tiny.put(store, "reward", root / "reward", {"data": data, "sft": sft})
    refs = {"data": data, "sft": sft, "reward": reward}
    (root / "refs.json").write_text(json.dumps({k: v.model_dump() for k, v in refs.items()}))


CELLS: list[Cell] = [
    ("opt-28m", 1, "sft", {"precision": "fp32"}, {"zero_stage": 0, "micro_batch": 8}),
    ("llama-34m", 2, "sft", {"precision": "bf16"}, {"zero_stage": 3, "micro_batch": 4}),
    ("llama-34m", 1, "ppo", {"precision": "fp32"}, {"zero_stage": 0, "micro_batch": 4}),
    ("opt-28m", 2, "ppo", {"precision": "fp32"}, {"zero_stage": 3, "micro_batch": 4}),
    ("opt-28m", 1, "ppo", {"precision": "bf16"}, {"zero_stage": 1, "micro_batch": 4, "gradient_checkpointing": True}),
    ("llama-34m", 2, "ppo", {"precision": "bf16"}, {"zero_stage": 2, "micro_batch": 4}),
    ("opt-28m", 2, "reward", {"precision": "fp32"}, {"zero_stage": 3, "micro_batch": 4}),
    ("llama-34m", 1, "reward", {"precision": "bf16"}, {"zero_stage": 2, "micro_batch": 4}),
    ("opt-28m", 2, "sft", {"precision": "fp32"}, {"zero_stage": 2, "micro_batch": 4}),
    ("llama-34m", 2, "sft", {"precision": "bf16"}, {"zero_stage": 1, "micro_batch": 4}),
    ("gpt2-81m", 1, "sft", {"precision": "fp32"}, {"zero_stage": 0, "micro_batch": 8}),
    ("gpt2-81m", 1, "sft", {"precision": "bf16"}, {"zero_stage": 2, "micro_batch": 8}),
    ("gpt2-81m", 2, "sft", {"precision": "fp32"}, {"zero_stage": 0, "micro_batch": 4, "gradient_checkpointing": True}),
]


MORE: dict[str, dict[str, Any]] = {
    "sft": {"batch_size": 16, "max_steps": 2},
    "reward": {"batch_size": 16, "max_steps": 2},
    "ppo": {"steps": 2, "rollout_batch_size": 16, "ppo_epochs": 1, "max_response_tokens": ANSWER},
}


@dataclass(frozen=True)
class Figure:
    """Peak of one phase, bytes a rank."""

    name: str
    measured: float
    planned: float

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1

    def __str__(self) -> str:
        both = f"measured {self.measured / 1e6:7,.0f} MB  planned {self.planned / 1e6:7,.0f} MB"
        return f"{self.name:<100} {both}  {self.error:+.1%}"


def measured(root: Path, out: Path, cell: Cell) -> dict[str, int]:
    """Peaks of the phases of a cell's stage, bytes."""
    _, world, stage, spec, resources = cell
    return ranks.run(
        world, "measured", out, script="planner_scenarios.py", variables=EXACT, timeout=1200, root=str(root),
        name=stage, spec={**MORE[stage], **spec}, resources=resources, model=str(root / "sft" / "model"),
    )  # fmt: skip


def planned(cell: Cell) -> dict[str, float]:
    """The same as the planner has it."""
    model, world, stage, spec, resources = cell
    shape = shape_of(MODELS[model])
    raw = {
        "name": "cell",
        "model": {"path": "facebook/opt-125m"},
        "data": {"sources": [{"kind": "quickstart"}], "max_prompt_tokens": PROMPT, "max_response_tokens": ANSWER},
        stage: {**MORE[stage], **spec},
        "resources": {"processes": world, **resources},
    }
    here = parse_hardware(f"cpu:{world},memory=16g,tflops=0.2,bandwidth=20")
    found = estimate(parse_config(raw), stage, here, Shapes(shape, shape))  # pyright: ignore[reportArgumentType]
    return {phase.name: found.kept + phase.added for phase in found.phases}


def figures(work: Path) -> Iterator[Figure]:
    """Every phase of every cell, one after another."""
    for number, cell in enumerate(CELLS):
        model, world, stage, spec, resources = cell
        root = work / model
        if not root.exists():
            make_root(root, model)
        found, wanted = measured(root, work / f"run-{number}", cell), planned(cell)
        said = ", ".join(f"{k} {v}" for k, v in {**spec, **resources}.items())
        for phase, peak in found.items():
            yield Figure(f"{model} {stage} {phase}, {world} ranks, {said}", peak, wanted[phase])


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        errors = []
        for figure in figures(Path(work)):
            errors.append(abs(figure.error))
            print(figure, flush=True)
    print(f"median error {statistics.median(errors):.1%} of {len(errors)} figures")


if __name__ == "__main__":
    main()
