"""How memory and speed of a PPO iteration grow, ours and TRL's: with tokens, batch, length, model and processes.

    python tests/benchmarks/bench_curves.py [--curve memory scaling] [--repeats 1] [--out FILE]

`memory`: the peak of an iteration with all its rows in one micro-batch, of a model of 2 layers, for two vocabularies; a system that
keeps logits grows with tokens x vocabulary. `scaling`: useful tokens a second of a model of 4 layers and width 512 (a sixth of
OPT-125m's matrices), from 16 rows of 128 + 128 tokens, one thing changed at a time. bf16, two threads. Every point is a process.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
from bench_ppo import SYSTEMS, compared, job_of  # noqa: E402
from opt_125m import NEW, ROWS, Shape, save_models  # noqa: E402

PROMPT = 128
BATCHES, VOCABULARIES = (4, 8, 16, 32), (12_566, 50_264)
SMALL = Shape(4, 512)
SCALES: dict[str, list[dict[str, Any]]] = {
    "rows": [{"rows": n} for n in (4, 8, 16, 32)],
    "prompt tokens": [{"prompt": n} for n in (64, 128, 256, 512)],
    "parameters": [{"shape": s} for s in (Shape(2, 256), SMALL, Shape(6, 768))],
    "processes": [{"processes": n} for n in (1, 2)],
}


def point(folder: Path, shape: Shape, repeats: int, processes: int = 1, **job: Any) -> dict[str, Any]:
    """One comparison; the models of a shape are made once."""
    place = folder / f"{shape.layers}-{shape.hidden}-{shape.vocabulary}"
    if not place.exists():
        save_models(place, False, shape)
    found = compared(job_of(place, "fixed", "bf16", shape, **job), SYSTEMS, repeats, processes, 2 // processes)
    return {key: value for key, value in found.items() if key != "turns"}


def parameters(shape: Shape) -> int:
    """Of one model."""
    return 12 * shape.layers * shape.hidden**2 + shape.vocabulary * shape.hidden


def memory(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Peaks by vocabulary and tokens."""
    rows = []
    for vocabulary in VOCABULARIES:
        for batch in BATCHES:
            found = point(folder, Shape(2, 768, vocabulary), repeats, rows=batch, micro=batch)
            peaks = {name: row["peak"] for name, row in found["systems"].items()}
            rows.append({"vocabulary": vocabulary, "tokens": batch * (PROMPT + NEW), "peaks": peaks})
            shown = ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in peaks.items())
            print(f"vocabulary {vocabulary:6,}, {rows[-1]['tokens']:5} tokens: peak {shown}", flush=True)
    return rows


def growth(rows: list[dict[str, Any]], vocabulary: int, system: str) -> float:
    """Bytes that a token adds, by least squares."""
    import numpy as np

    chosen = [r for r in rows if r["vocabulary"] == vocabulary]
    return float(np.polyfit([r["tokens"] for r in chosen], [r["peaks"][system] for r in chosen], 1)[0])


def scaling(folder: Path, repeats: int) -> list[dict[str, Any]]:
    """Useful tokens a second, one thing changed at a time."""
    rows = []
    for what, settings in SCALES.items():
        for setting in settings:
            options = {"shape": SMALL, "rows": ROWS, "prompt": PROMPT, **setting}
            found = point(folder, options.pop("shape"), repeats, **options)
            key, value = next(iter(setting.items()))
            at = parameters(value) if key == "shape" else value
            speed = {name: found["tokens"] / row["whole"]["wall"] for name, row in found["systems"].items()}
            rows.append({"what": what, "at": at, "speed": speed})
            shown = ", ".join(f"{name} {tokens:.1f}" for name, tokens in speed.items())
            print(f"{what} {at:,}: useful tokens a second {shown}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", nargs="+", choices=("memory", "scaling"), default=["memory", "scaling"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON with all points")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = {"memory": memory, "scaling": scaling}
        found = {name: curves[name](Path(folder), args.repeats) for name in args.curve}
    for name in SYSTEMS if "memory" in found else ():
        each = {v: growth(found["memory"], v, name) for v in VOCABULARIES}
        print(f"{name}: a token adds " + ", ".join(f"{b / 1e6:.3f} MB at {v:,}" for v, b in each.items()))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
