"""Training scenarios that run on every rank of a small process group; started by `ranks.run`."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import tiny

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.store import Store

INPUTS = {"sft": ("data",), "reward": ("data", "sft"), "dpo": ("data", "sft"), "ppo": ("data", "sft", "reward")}


def stage(
    root: str, name: str, spec: dict[str, Any], resources: dict[str, Any], folder: str = ""
) -> list[dict[str, Any]]:
    """Run one stage on the tiny store at `root`; rank 0 returns the rows of metrics.jsonl.

    What rank r writes is in `out-r` below the run's folder, or in `out-r/{folder}`.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((Path(root) / "refs.json").read_text()).items()}
    out = Path(os.environ["RANKS_OUT"]) / f"out-{rank}" / folder
    inputs = {k: refs[k] for k in INPUTS[name]}
    context = tiny.context(Store(f"file://{root}/store"), name, spec, inputs, out, rank, world, **resources)
    from rlhf_core.train import stage_runner

    stage_runner(name)(context)
    if rank:
        return []
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def stages(root: str, jobs: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Run several stages one after the other in the same processes: by label, {"name", "spec", "resources"}."""
    return {label: stage(root, **job, folder=label) for label, job in jobs.items()}


def fetched(root: str, specs: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """By stage, what all ranks together fetch of its inputs from a store elsewhere: `{input}/{file}`, as often as it was."""
    from rlhf_core.distributed import gather
    from rlhf_core.train import stage_runner

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    refs = {k: ArtifactRef.model_validate(v) for k, v in json.loads((Path(root) / "refs.json").read_text()).items()}
    plain, seen = Store.download, []

    def download(self: Store, key: str, local: Path) -> None:
        seen.append(key)
        plain(self, key, local)

    Store.download, Store.local_path = download, lambda self, key: None
    home, found = tempfile.gettempdir(), {}
    for name, spec in specs.items():
        tempfile.tempdir = f"{home}/{name}"  # a machine that has nothing yet
        Path(tempfile.tempdir).mkdir(exist_ok=True)
        inputs = {k: ref for k, ref in refs.items() if k in {**INPUTS, "evaluate": tuple(refs)}[name]}
        out = Path(os.environ["RANKS_OUT"]) / f"out-{rank}" / name
        context = tiny.context(Store(f"file://{root}/store"), name, spec, inputs, out, rank, world)
        seen.clear()
        stage_runner(name)(context)
        keys = [key for keys in gather(list(seen)) for key in keys]
        found[name] = sorted(
            f"{k}/{key.removeprefix(f'{ref.id}/')}" for k, ref in inputs.items() for key in keys if ref.id in key
        )
    return found


def main(functions: dict[str, Any]) -> NoReturn:
    """Run the function that the command line names; rank 0 leaves what it returned."""
    function, arguments = sys.argv[1], json.loads(sys.argv[2])
    result = functions[function](**arguments)
    if os.environ["RANK"] == "0":
        (Path(os.environ["RANKS_OUT"]) / "result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(globals())
