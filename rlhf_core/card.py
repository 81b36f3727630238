"""Model cards: a README.md beside the weights of every model that a stage leaves, with a header that the hub reads.

A card says what the model is, how to load it in plain transformers, what it was trained on and with, how good it was found
to be, what it was made of, and what it is not good for. Everything comes from the job, its inputs' manifests and the stage's
metrics, so a card is a view of the record and never the record. No torch. Left out: cards for the hub's model index.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf_core.artifacts import Manifest, read_manifest
from rlhf_core.job import JobSpec
from rlhf_core.sources import is_hub_name
from rlhf_core.specs import ModelSpec
from rlhf_core.store import Store

CARD = "README.md"
MAKERS = {
    "sft": "supervised fine-tuning",
    "reward": "reward-model training",
    "ppo": "PPO against a reward",
    "dpo": "direct preference optimisation (DPO)",
}
# stage -> metrics of the card, in order, those that there are
METRICS = {
    "sft": ("eval_loss", "eval_perplexity", "steps", "tokens"),
    "reward": ("eval_accuracy", "eval_loss", "eval_margin", "steps", "tokens"),
    "ppo": ("score_first", "score_last", "kl_sequence_last", "steps"),
    "dpo": ("eval_accuracy", "eval_loss", "eval_margin", "steps", "tokens"),
}
TAGS = {"sft": "sft", "reward": "reward-model", "ppo": "ppo", "dpo": "dpo"}


def write_cards(out: Path, store: Store, job: JobSpec, metrics: Mapping[str, Any]) -> list[str]:
    """Write a card into every folder below `out` that holds a model; returns the folders.

    Args:
        out: the stage's output, as it will be uploaded.
        store: where the manifests of the inputs are.
        job: what made the models.
        metrics: the stage's metrics.
    """
    folders = sorted(file.parent for file in out.rglob("config.json"))
    inputs = {name: read_manifest(store, ref) for name, ref in job.inputs.items()} if folders else {}
    for folder in folders:
        name = folder.relative_to(out).as_posix()
        config = json.loads((folder / "config.json").read_text())
        dialogue = (folder / "chat_template.jinja").exists()
        (folder / CARD).write_text(card(job, name, config, metrics, inputs, dialogue), encoding="utf-8")
    return [folder.relative_to(out).as_posix() for folder in folders]


def card(
    job: JobSpec,
    folder: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    inputs: Mapping[str, Manifest | None],
    dialogue: bool = False,
) -> str:
    """The text of one card.

    Args:
        job: what made the model.
        folder: of the model inside the artifact, e.g. "actor".
        config: its config.json.
        metrics: the stage's metrics.
        inputs: manifests of the inputs, by stage.
        dialogue: whether the tokenizer has a chat template.
    """
    value = is_value_model(config)
    parts = [
        f"---\n{yaml.safe_dump(header(job, value), sort_keys=False)}---",
        f"# {job.output.name}: {_title(job.stage, folder, value)}",
        _what(job, folder, config, value),
        "## Use\n\n" + _use(folder, config, value, dialogue),
        "## Measured\n\n" + _measured(job.stage, folder, metrics),
        "## Data\n\n" + _data(inputs.get("data")),
        f"## Specification\n\n```json\n{json.dumps(_present(job.identity or job.spec), indent=1, ensure_ascii=False)}\n```",
        "## Lineage\n\n" + _lineage(job, folder),
        "## Limits\n\n" + _limits(job.stage, folder, value),
    ]
    return "\n\n".join(parts) + "\n"


def is_value_model(config: Mapping[str, Any]) -> bool:
    """Whether the weights end in one score, not in a vocabulary."""
    names = config.get("architectures") or []
    return config.get("num_labels") == 1 or "score_mean" in config or any("Sequence" in str(n) for n in names)


def header(job: JobSpec, value: bool) -> dict[str, Any]:
    """The YAML header: what the hub shows and filters by. `base_model` only where it is a hub name."""
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if value else "text-generation",
        "tags": ["rlhf", TAGS.get(job.stage, job.stage)],
    }
    origin = _origin(job)
    if origin and origin.path and _on_hub(origin.path):
        fields["base_model"] = origin.path
    return fields


def _origin(job: JobSpec) -> ModelSpec | None:
    """The model that training began with, long ago: the reward stage may have one of its own."""
    own = job.spec.get("model") if job.stage == "reward" else None
    return ModelSpec.model_validate(own) if own else job.model


def _on_hub(path: str) -> bool:
    return is_hub_name(path) and not Path(path).exists()


def _title(stage: str, folder: str, value: bool) -> str:
    named = {"actor": "policy", "actor_ema": "policy, averaged weights", "critic": "critic", "model": "model"}
    if folder.startswith("snapshots/"):
        return f"policy after {int(folder.rpartition('-')[2])} rollouts"
    if stage == "reward":
        return "reward model"
    return f"{TAGS.get(stage, stage).upper()} {named.get(folder, 'value model' if value else 'model')}"


def _what(job: JobSpec, folder: str, config: Mapping[str, Any], value: bool) -> str:
    origin, base = "a new model, started from random weights", _origin(job)
    if base and base.path:  # where it lay on somebody's disk is nobody's business
        origin = f"`{base.path if _on_hub(base.path) else Path(base.path).name}`"
        origin += f" at revision `{base.revision}`" if base.revision else ""
    kind = "A scalar model (one score a token; the last token's counts)" if value else "A causal language model"
    made = f"{kind} of type `{config.get('model_type')}`, made by {MAKERS.get(job.stage, job.stage)}. It goes back to {origin}."
    if folder == "actor_ema":
        made += " Its weights are the exponential moving average of the policy's during training."
    if folder == "critic":
        made += " It predicts the return of unfinished answers in PPO; it is no reward model."
    return made


def _use(folder: str, config: Mapping[str, Any], value: bool, dialogue: bool) -> str:
    if not value:
        # A template writes its own BOS, so the text must not be tokenised as any other.
        chat = (
            '[{"role": "user", "content": message}], add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        )
        inputs = f"tokenizer.apply_chat_template({chat})" if dialogue else 'tokenizer(prompt, return_tensors="pt")'
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
            f'model = AutoModelForCausalLM.from_pretrained("{folder}")\n'
            f"inputs = {inputs}\n"
            "answer = model.generate(**inputs, do_sample=True, max_new_tokens=128)\n```"
        )
    if not config.get("architectures"):
        return (
            "transformers has no sequence classifier for this family; load it with `rlhf_core.models.ValueModel.load`."
        )
    code = (
        "```python\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
        f'model = AutoModelForSequenceClassification.from_pretrained("{folder}")\n'
        'score = model(**tokenizer(prompt + answer + tokenizer.eos_token, return_tensors="pt")).logits[0, 0]\n'
    )
    if "score_mean" in config:
        code += "normalised = (score - model.config.score_mean) / model.config.score_std\n"
    note = "\n```\n\nThe score is that of the last token, which is the end-of-sequence token of a finished answer."
    if "score_mean" in config:
        note += (
            f" `score_mean` ({config['score_mean']:.4g}) and `score_std` ({config.get('score_std', 1.0):.4g}) are its mean and "
            "deviation on training pairs; PPO uses the normalised score. Only differences of scores have a meaning."
        )
    return code.rstrip("\n") + note


def _measured(stage: str, folder: str, metrics: Mapping[str, Any]) -> str:
    if folder.startswith("snapshots/"):
        return "A state on the way, not measured by itself; `rlhf eval --frontier` compares all of a run's."
    numbers = _numbers(stage, metrics) or "Nothing was measured on held-out data."
    return f"Of the policy in training, on its own rollouts:\n\n{numbers}" if stage == "ppo" else numbers


def _numbers(stage: str, metrics: Mapping[str, Any]) -> str:
    rows = [name for name in METRICS.get(stage, ()) if _is_number(metrics.get(name))]
    rows += sorted(
        n
        for n in metrics
        if n.startswith("eval_accuracy_") and not n.endswith(("_low", "_high")) and _is_number(metrics[n])
    )
    if not rows:
        return ""
    lines = [f"| {name} | {_shown(metrics, name)} |" for name in rows]
    return "| metric | value [95 % interval] |\n|---|---|\n" + "\n".join(lines)


def _shown(metrics: Mapping[str, Any], name: str) -> str:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    ends = f" [{low:.4g}, {high:.4g}]" if _is_number(low) and _is_number(high) else ""
    value = metrics[name]
    return (f"{value:,}" if isinstance(value, int) else f"{value:.4g}") + ends


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _data(manifest: Manifest | None) -> str:
    if manifest is None:
        return "Not recorded."
    spec, splits = manifest.spec, manifest.metrics.get("splits") or {}
    sources = ", ".join(f"`{_source(source)}`" for source in spec.get("sources", ())) or "not recorded"
    text = f"Sources: {sources}. Template of dialogues: `{spec.get('template')}`."
    if splits:
        rows = [f"| {name} | {part.get('rows', 0):,} | {part.get('tokens', 0):,} |" for name, part in splits.items()]
        text += "\n\n| share | rows | tokens |\n|---|---|---|\n" + "\n".join(rows)
        text += "\n\nA hash of the prompt decides on the share, so no prompt is in two of them."
    return text


def _source(source: Mapping[str, Any]) -> str:
    kind = source.get("kind", "?")
    if kind == "hub":
        return "/".join(filter(None, (source.get("name"), source.get("subset"))))
    if kind == "files":
        return f"{len(source.get('paths') or ())} file(s)"
    return f"{kind}, generated"


def _lineage(job: JobSpec, folder: str) -> str:
    rows = [f"- {name}: `{ref.id}`" for name, ref in job.inputs.items()]
    return "\n".join([f"- this: `{job.output.id}`, folder `{folder}`", *rows])


def _limits(stage: str, folder: str, value: bool) -> str:
    if folder == "critic":
        return "Of use only to go on with PPO from the policy beside it."
    if value:
        return (
            "It knows answers like those it was trained on. A policy that is optimised against it will find where it is wrong: "
            "watch a second judge, and the KL to the start. Longer answers may score higher for their length alone; "
            "`rlhf eval` measures that, and the calibration of its margins."
        )
    text = "It has the knowledge, the errors and the biases of its base model and data; nothing here makes it truthful or safe."
    if stage == "ppo":
        text += " It was optimised against a score: what the score does not see may have become worse. See the evaluate artifact."
    if stage == "dpo":
        text += " It learned from pairs of answers that it did not write itself. See the evaluate artifact."
    return text


def _present(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if value is not None}
