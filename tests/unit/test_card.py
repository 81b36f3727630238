"""Model cards: the hub reads their header, their code runs in plain transformers, and the artifact lists them."""

import json
import re
from pathlib import Path

import pytest
import tiny

from rlhf_core import card
from rlhf_core.artifacts import ArtifactRef, Manifest, publish
from rlhf_core.job import JobResult, JobSpec
from rlhf_core.sealed import unseal
from rlhf_core.specs import ModelSpec
from rlhf_core.store import Store
from rlhf_core.train import upload_result

METRICS = {"eval_accuracy": 0.84, "eval_accuracy_low": 0.81, "eval_accuracy_high": 0.87, "eval_loss": 0.4, "steps": 120}


@pytest.fixture
def uploaded(tiny_root: Path, tmp_path: Path):
    """Upload the result of a stage whose output has these models; gives the context and what the store lists."""
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((tiny_root / "refs.json").read_text()).items()}

    def upload(stage: str, folders: dict[str, str], model: ModelSpec | None = None, **spec):
        from rlhf_core.export import save_causal_lm, save_value_model
        from rlhf_core.models import ValueModel, new_causal_lm

        store = Store(f"file://{tiny_root}/store")
        inputs = {name: refs[name] for name in ("data", "sft", "reward") if name != stage}
        context = tiny.context(store, stage, {"lr": 0.1, **spec}, inputs, tmp_path / stage)
        if model:
            context = type(context)(context.job.model_copy(update={"model": model}), store, context.out)
        for folder, kind in folders.items():
            language = new_causal_lm(tiny.MODEL, tiny.tokenizer(), seed=0)
            if kind == "language":
                save_causal_lm(language, tiny.tokenizer(), context.out / folder)
            else:
                value = ValueModel.from_causal_lm(language, seed=0)
                value.config.score_mean, value.config.score_std = 0.25, 2.0
                save_value_model(value, tiny.tokenizer(), context.out / folder)
        upload_result(context, METRICS)
        job: JobSpec = context.job
        result = unseal(JobResult, store.read(f"{job.folder}/result.json"), "result")
        return context, store, result

    return upload


def code_of(text: str) -> str:
    """The Python example of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return code


def test_every_model_of_a_stage_has_a_card_and_the_artifact_lists_it(uploaded):
    kinds = {"actor": "language", "critic": "value", "actor_ema": "language", "snapshots/step-000010": "language"}
    context, store, result = uploaded("ppo", kinds)
    listed = {entry.path for entry in result.files}
    assert {f"{folder}/README.md" for folder in kinds} <= listed
    job = context.job
    manifest = Manifest(ref=job.output, spec={}, inputs=job.inputs, folder=result.folder, files=result.files)
    assert publish(store, manifest).files == result.files
    texts = {folder: (context.out / folder / "README.md").read_text() for folder in kinds}
    assert "exponential moving average" in texts["actor_ema"]
    assert "no reward model" in texts["critic"]
    assert "policy after 10 rollouts" in texts["snapshots/step-000010"]


def test_the_hub_reads_the_header(uploaded):
    from huggingface_hub import ModelCard

    context, _, _ = uploaded("dpo", {"model": "language"}, ModelSpec(path="some-owner/some-model"))
    found = ModelCard.load(context.out / "model" / "README.md").data
    assert (found.library_name, found.pipeline_tag) == ("transformers", "text-generation")
    assert found.base_model == "some-owner/some-model"
    assert found.tags == ["rlhf", "dpo"]


def test_a_model_from_this_disk_names_no_place_and_no_base_model(uploaded, tmp_path):
    from huggingface_hub import ModelCard

    folder = tmp_path / "secret-project" / "llama-x"
    folder.mkdir(parents=True)
    context, _, _ = uploaded("sft", {"model": "language"}, ModelSpec(path=str(folder)))
    path = context.out / "model" / "README.md"
    assert "base_model" not in ModelCard.load(path).data.to_dict()
    assert "llama-x" in path.read_text() and "secret-project" not in path.read_text()


def test_the_example_of_a_language_model_runs_as_it_is_written(uploaded, monkeypatch):
    context, _, _ = uploaded("sft", {"model": "language"})
    monkeypatch.chdir(context.out)
    names = {"prompt": "w1 w2 w3", "message": "w1 w2 w3"}
    exec(code_of((context.out / "model" / "README.md").read_text()).replace("128", "4"), names)
    assert names["answer"].shape[0] == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_the_example_of_a_reward_model_gives_our_normalised_score(uploaded, monkeypatch):
    import torch

    from rlhf_core.models import ValueModel

    context, _, _ = uploaded("reward", {"model": "value"})
    monkeypatch.chdir(context.out)
    names = {"prompt": "w1 w2 ", "answer": "w3 w4 "}
    text = (context.out / "model" / "README.md").read_text()
    exec(code_of(text), names)
    ids = torch.tensor([[*tiny.tokenizer().encode("w1 w2 w3 w4"), tiny.tokenizer().eos_token_id]])
    model = ValueModel.load(context.out / "model").normalize(True).eval()
    wanted = model(ids, torch.ones_like(ids))[0, -1].item()
    assert names["normalised"].detach().item() == pytest.approx(wanted, abs=1e-5)
    assert "`score_mean` (0.25)" in text and "`score_std` (2)" in text


def test_a_card_tells_metrics_with_intervals_the_spec_and_the_lineage(uploaded):
    context, _, _ = uploaded("reward", {"model": "value"})
    text = (context.out / "model" / "README.md").read_text()
    assert "| eval_accuracy | 0.84 [0.81, 0.87] |" in text
    assert '"lr": 0.1' in text
    assert all(ref.id in text for ref in (context.job.output, *context.job.inputs.values()))


def test_data_counts_come_from_the_data_artifacts_metrics():
    ref = ArtifactRef(stage="data", name="d", fingerprint="0" * 64)
    splits = {"sft/train": {"rows": 1234, "tokens": 56789}}
    spec = {
        "sources": [{"kind": "hub", "name": "o/set"}, {"kind": "files", "paths": ["/home/x.jsonl"]}],
        "template": "chat",
    }
    text = card._data(Manifest(ref=ref, spec=spec, inputs={}, files=(), metrics={"splits": splits}))
    assert "| sft/train | 1,234 | 56,789 |" in text and "`o/set`" in text and "/home" not in text


def test_a_card_that_cannot_be_written_is_one_line_and_the_result_is_uploaded(uploaded, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(card, "card", fail)
    _, _, result = uploaded("dpo", {"model": "language"})
    assert "the model cards could not be written: RuntimeError: no ink" in capsys.readouterr().err
    assert "model/README.md" not in {entry.path for entry in result.files}
