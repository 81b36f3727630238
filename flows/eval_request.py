"""From the targets of `rlhf eval` to one request: which mode, which folders, which defaults.

What is evaluated follows from the target's stage: a reward model by its held-out pairs, a language model by the perplexity
of held-out responses, two targets side by side, a PPO run by its snapshots. Data, SFT and reward model are found through the
artifact's manifest and fetched as `rlhf chat` does.
"""

import re
from pathlib import Path
from typing import Any

from flows.targets import CACHE, Target, model_folder
from rlhf_core.artifacts import ArtifactRef, Manifest, fetch, read_manifest
from rlhf_core.errors import ConfigError
from rlhf_core.eval.request import EvalRequest, NamedModel
from rlhf_core.gold import gold_reward
from rlhf_core.specs import GoldName

SAMPLING = {  # fields that say how answers are made, and their options
    "prompts": "--prompt",
    "raw": "--raw",
    "greedy": "--greedy",
    "gold": "--gold",
    "temperature": "--temperature",
    "max_new_tokens": "--max-new-tokens",
    "seed": "--seed",
}
ROWS = {"compare": 50, "frontier": 200}  # prompts unless --limit says otherwise
SNAPSHOT = re.compile(r"snapshots/step-(\d+)/config\.json")


def request_of(targets: list[Target], options: dict[str, Any], *, frontier: bool, reward: Target | None) -> EvalRequest:
    """The request of a command line; artifacts are fetched.

    Args:
        targets: one or two.
        options: fields of `EvalRequest` that were given; None is not given.
        frontier: whether snapshots are asked for.
        reward: another reward model than the lineage's.

    Raises:
        ConfigError: the targets do not go together with what is asked.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if given.get("gold"):
        gold_reward(given["gold"])
    if len(targets) > 2:
        raise ConfigError(f"rlhf eval takes one target or two to compare, not {len(targets)}")
    if frontier:
        return _frontier(targets, given, reward)
    if len(targets) == 2:
        return _compare(targets, given, reward)
    return _single(targets[0], given, reward)


def _single(target: Target, given: dict[str, Any], reward: Target | None) -> EvalRequest:
    if target.manifest is None:
        raise ConfigError(
            f"{target.text}: has no held-out data of its own; name an artifact, or two models to compare them"
        )
    unused = [option for name, option in SAMPLING.items() if name in given] + (["--reward"] if reward else [])
    if unused:
        raise ConfigError(
            f"{unused[0]}: is for models that answer prompts, and one target alone answers none; name a second target "
            "to compare it with, or leave the option out"
        )
    if target.stage == "reward":
        folder = target.folder or "model"
        path, mode = str(_fetched(target, target.manifest.ref) / folder), "reward"
    else:
        path, mode = target.model(), "language"
    models = (NamedModel(name=target.name, path=path),)
    return EvalRequest(mode=mode, models=models, data=str(_input(target, "data")), **given)


def _compare(targets: list[Target], given: dict[str, Any], reward: Target | None) -> EvalRequest:
    lineage = next((t for t in targets if t.input("data")), None)
    if lineage is None and not given.get("prompts"):
        raise ConfigError("neither target is an artifact with data; give --prompt or --prompts")
    data = _manifest(lineage, "data") if lineage else None
    paths = [target.model() for target in targets]
    names = [target.name for target in targets]
    scorer = reward or next((t for t in targets if t.input("reward")), None)
    defaults: dict[str, Any] = {"limit": ROWS["compare"], "gold": _gold(targets, data)}
    if data is not None:
        defaults["max_new_tokens"] = _answer_limit(data)
    return EvalRequest(
        mode="compare",
        models=tuple(NamedModel(name=n, path=p) for n, p in zip(names, paths, strict=True)),
        data=str(_input(lineage, "data")) if lineage else None,
        reward=_reward_folder(scorer),
        **{**defaults, **given},
    )


def _frontier(targets: list[Target], given: dict[str, Any], reward: Target | None) -> EvalRequest:
    target = targets[0]
    if len(targets) > 1 or target.stage != "ppo" or target.manifest is None:
        raise ConfigError("--frontier: needs one target, an artifact of ppo or a configuration with PPO")
    if given.get("greedy") or given.get("prompts"):
        raise ConfigError("--frontier: measures KL on held-out prompts, sampled; leave out --greedy and --prompt")
    manifest = target.manifest
    steps = sorted(int(m[1]) for entry in manifest.files if (m := SNAPSHOT.fullmatch(entry.path)))
    if not steps:
        raise ConfigError(
            f"{manifest.ref.id} has no snapshots; set ppo.snapshot_every, e.g. --set ppo.snapshot_every=10, and run PPO"
        )
    local = _fetched(target, manifest.ref)
    folders = {p.parent.name: p.parent for p in sorted(local.glob("snapshots/step-*/config.json"))}
    models = [NamedModel(name=f"step {int(name[5:])}", path=str(folder)) for name, folder in folders.items()]
    last = manifest.metrics.get("steps") or manifest.spec.get("steps")
    if last != steps[-1]:  # else the last snapshot is the final actor
        models.append(NamedModel(name=f"step {last}" if last else "final", path=str(local / model_folder(manifest))))
    sft = _input(target, "sft") / "model"
    data = _manifest(target, "data")
    scorer = reward or (target if target.input("reward") else None)
    defaults = {
        "limit": ROWS["frontier"],
        "gold": _gold(targets, data),
        "max_new_tokens": manifest.spec.get("max_response_tokens") or _answer_limit(data),
    }
    chosen = {**defaults, **given}
    if scorer is None and not chosen["gold"]:
        raise ConfigError(
            f"{manifest.ref.id}: there is neither a reward model nor gold to measure; give --gold or --reward"
        )
    return EvalRequest(
        mode="frontier",
        models=tuple(models),
        data=str(_input(target, "data")),
        sft=str(sft),
        reward=_reward_folder(scorer),
        **chosen,
    )


# --- lineage ---------------------------------------------------------------------------------------------------------


def _fetched(target: Target, ref: ArtifactRef) -> Path:
    return fetch(target.store, ref, CACHE)[0]


def _input(target: Target, stage: str) -> Path:
    ref = target.input(stage)
    if ref is None:
        raise ConfigError(f"{target.name}: has no {stage} artifact among its inputs")
    return _fetched(target, ref)


def _manifest(target: Target, stage: str) -> Manifest | None:
    ref = target.input(stage)
    return read_manifest(target.store, ref) if ref else None


def _reward_folder(target: Target | None) -> str | None:
    """The reward model of a target: its own, or the one in its lineage."""
    if target is None:
        return None
    if target.stage == "reward" and target.manifest:
        return str(_fetched(target, target.manifest.ref) / "model")
    if target.manifest is None:
        return target.path
    return str(_input(target, "reward") / "model")


def _answer_limit(data: Manifest | None) -> int:
    return int((data.spec if data else {}).get("max_response_tokens") or 128)


def _gold(targets: list[Target], data: Manifest | None) -> GoldName | None:
    """Gold of the task: the evaluate spec's, else what labelled the data, else the generated task's own."""
    for target in targets:
        if target.config and target.config.evaluate.gold:
            return target.config.evaluate.gold
    spec = data.spec if data else {}
    if sampled := spec.get("sampled_pairs"):
        return sampled["gold"]
    sources = spec.get("sources") or [{}]
    return "quickstart" if all(source.get("kind") == "quickstart" for source in sources) else None
