"""Tiny real artifacts for tests: a store with data, and jobs of every stage on it, without the data stage's cost."""

from pathlib import Path
from typing import Any

import numpy as np

from rlhf_core.artifacts import ArtifactRef, Manifest, describe, make_ref, publish
from rlhf_core.context import JobContext
from rlhf_core.job import JobSpec
from rlhf_core.resources import Resources
from rlhf_core.specs import ModelSpec
from rlhf_core.store import Store

WORDS = [f"w{i}" for i in range(30)]
# Wide enough that ZeRO-3 divides its matrices: weights below 10,000 numbers stay whole on every rank.
MODEL = ModelSpec(family="llama", hidden_size=128, layers=2, heads=4, positions=64)


def pipeline(folder: Path) -> dict[str, Any]:
    """The beginning of a configuration whose stages take seconds, with a store in `folder`."""
    return {
        "name": "tiny",
        "store": f"file://{folder}/store",
        "model": {"family": "llama", "hidden_size": 32, "layers": 1, "heads": 2, "positions": 64},
        "data": {
            "sources": [{"kind": "quickstart", "prompts": 400}],
            "tokenizer": {"train_vocab_size": 300},
            "max_prompt_tokens": 48,
            "max_response_tokens": 16,
            "truncate_responses": True,
        },
    }


def tokenizer() -> Any:
    """Word-level tokenizer of 32 tokens: <pad>=0, <eos>=1, w0 … w29."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


def put(store: Store, stage: str, folder: Path, inputs: dict[str, ArtifactRef], mark: str = "") -> ArtifactRef:
    """Publish a local folder as an artifact."""
    ref = make_ref(stage, "tiny", {"mark": mark}, inputs)
    for entry in describe(folder):
        store.upload(folder / entry.path, f"{ref.id}/{entry.path}")
    publish(store, Manifest(ref=ref, spec={"mark": mark}, inputs=inputs, files=describe(folder)))
    return ref


def make_data(store: Store, work: Path, rows: int = 96) -> ArtifactRef:
    """Answers repeat the prompt's first word; the preferred answer does it more often. Lengths vary."""
    from datasets import Dataset

    rng = np.random.default_rng(0)
    out = work / "data"
    tokenizer().save_pretrained(out / "tokenizer")
    table: dict[str, list[dict[str, Any]]] = {"sft": [], "reward": [], "ppo": []}
    for _ in range(rows):
        prompt = rng.integers(2, 32, rng.integers(2, 7)).tolist()
        good = [prompt[0]] * int(rng.integers(2, 7)) + [1]
        bad = [*rng.integers(2, 32, rng.integers(1, 8)).tolist(), 1]
        text = " ".join(WORDS[i - 2] for i in prompt)
        table["sft"].append(
            {
                "input_ids": prompt + good,
                "loss_mask": [0] * len(prompt) + [1] * len(good),
                "prompt": text,
                "response": "",
            }
        )
        pair = {"prompt_ids": prompt, "chosen_ids": good, "rejected_ids": bad, "prompt": text}
        table["reward"].append({**pair, "chosen": "", "rejected": "", "source": "tiny"})
        table["ppo"].append({"prompt_ids": prompt, "prompt": text, "response_ids": good, "response": ""})
    for name, items in table.items():
        Dataset.from_list(items[: rows * 3 // 4]).save_to_disk(str(out / name / "train"))
        Dataset.from_list(items[rows * 3 // 4 :]).save_to_disk(str(out / name / "test"))
    return put(store, "data", out, {})


def make_models(store: Store, work: Path, data: ArtifactRef) -> tuple[ArtifactRef, ArtifactRef]:
    """An untrained SFT model and reward model."""
    from rlhf_core.export import save_causal_lm, save_value_model
    from rlhf_core.models import ValueModel, new_causal_lm

    tok = tokenizer()
    model = new_causal_lm(MODEL, tok, seed=0)
    save_causal_lm(model, tok, work / "sft" / "model")
    value = ValueModel.from_causal_lm(model, seed=0)
    save_value_model(value, tok, work / "reward" / "model")
    sft = put(store, "sft", work / "sft", {"data": data})
    return sft, put(store, "reward", work / "reward", {"data": data, "sft": sft})


def context(
    store: Store,
    stage: str,
    spec: dict[str, Any],
    inputs: dict[str, ArtifactRef],
    out: Path,
    rank: int = 0,
    world: int = 1,
    **resources: Any,
) -> JobContext:
    """A job context as the launcher would give it to rank `rank`."""
    out.mkdir(parents=True, exist_ok=True)
    job = JobSpec(
        stage=stage,
        store=store.url,
        output=make_ref(stage, "tiny-out", {"spec": str(spec)}, inputs),
        attempt=1,
        job_id="tiny",
        spec={"seed": 0, **spec},
        identity={},
        inputs=inputs,
        model=MODEL,
        resources=Resources(**resources),
    )
    return JobContext(job=job, store=store, out=out, rank=rank, world=world)
