"""All speed benchmarks one after the other: one table, one JSON, one picture.

    python tests/benchmarks/bench.py [--out build/bench] [--repeats 3]

Writes OUT.md, OUT.json and OUT.png. PPO in one process of two threads and in two of one, fine-tuning and the reward model, rollouts
alone, and the curves of memory and scaling; each beside its peers, in turn. About two hours with three repeats on two cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
sys.path[:0] = [str(ROOT)]
from bench_curves import VOCABULARIES, growth  # noqa: E402

PARTS: dict[str, list[str]] = {
    "ppo": ["bench_ppo.py"],
    "ppo, 2 processes": ["bench_ppo.py", "--processes", "2", "--threads", "1"],
    "train": ["bench_train.py"],
    "rollout": ["bench_rollout.py", "--threads", "2"],
    "curves": ["bench_curves.py"],
}
PHASES = ("generate", "score", "train", "whole")
COLOURS = {"ours": "#2F6FDE", "trl": "#B4B9C2"}


def run(part: str, repeats: int) -> Any:
    """What one benchmark found."""
    script, *options = PARTS[part]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        times = [] if part == "curves" else ["--repeats", str(repeats)]
        subprocess.run([sys.executable, str(HERE / script), *options, *times, "--out", str(out)], check=True)
        return json.loads(out.read_text())


def table(found: dict[str, Any]) -> str:
    """All comparisons, a line for each system, in Markdown."""
    lines = [
        "| work | precision | system | generate s | score s | train s | whole s | CPU s | peak GB | faster than TRL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part in ("ppo", "ppo, 2 processes"):
        for run in found.get(part, []):
            least = run["least"]
            for name, row in run["systems"].items():
                times = " | ".join(f"{row[p]['wall']:.1f} ({100 * least[p] / row[p]['wall']:.0f} %)" for p in PHASES)
                work = f"PPO {run['case']}, {run['processes']} x {run['threads']}"
                lines.append(f"| {work} | {run['precision']} | {name} | {times} | {_rest(run, row)} |")
    for run in found.get("train", []):
        for name, row in run["systems"].items():
            share = f"{row['whole']['wall']:.1f} ({100 * run['least'] / row['whole']['wall']:.0f} %)"
            lines.append(
                f"| {run['stage']} {run['case']} | {run['precision']} | {name} |  |  | {share} | {share} | {_rest(run, row)} |"
            )
    lines += ["", "In brackets the share of what the machine allows for the needed work (roofline).", ""]
    if rollout := found.get("rollout"):
        lines += ["| rollout | precision | engine | s | useful tokens a CPU second |", "|---|---|---|---|---|"]
        for run in rollout["runs"]:
            for name, row in run["systems"].items():
                figures = f"{row['wall']:.1f} | {row['tokens_per_cpu_second']:.0f}"
                lines.append(f"| {run['case']} | {run['precision']} | {name} | {figures} |")
    return "\n".join(lines) + "\n"


def _rest(run: dict[str, Any], row: dict[str, Any]) -> str:
    ratio = run["systems"]["trl"]["whole"]["wall"] / row["whole"]["wall"]
    return f"{row['whole']['cpu']:.1f} | {row['peak'] / 1e9:.1f} | {ratio:.2f}"


def picture(found: dict[str, Any], path: Path) -> None:
    """Phases as bars, memory by tokens, and speed as things grow."""
    from matplotlib.figure import Figure

    from rlhf_core.plots import save, style

    figure = Figure(figsize=(11, 8), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for ax in axes:
        style(ax)
    _bars(axes[0], found["ppo"])
    _memory(axes[1], found["curves"]["memory"])
    scaling = found["curves"]["scaling"]
    for ax, what in zip(axes[2:], dict.fromkeys(row["what"] for row in scaling), strict=False):
        rows = [row for row in scaling if row["what"] == what]
        for name, colour in COLOURS.items():
            at = [row["at"] for row in rows]
            ax.plot(
                at, [row["speed"][name] for row in rows], "o-", color=colour, label=name, linewidth=1.6, markersize=4
            )
        ax.set(title=f"Useful tokens a second by {what}", ylim=(0, None))
    for ax in axes:
        ax.title.set(fontsize=10)
        ax.legend(frameon=False, fontsize=8)
    save(figure, path)


def _bars(ax: Any, runs: Sequence[dict[str, Any]]) -> None:
    shades = {"generate": 1.0, "score": 0.7, "train": 0.45}
    for i, run in enumerate(runs):
        for j, (name, colour) in enumerate(COLOURS.items()):
            below = 0.0
            for phase, alpha in shades.items():
                seconds = run["systems"][name][phase]["wall"]
                label = f"{name}: {phase}" if not i else None
                ax.bar(i + 0.4 * j, seconds, 0.36, below, color=colour, alpha=alpha, label=label)
                below += seconds
    ax.set_xticks([i + 0.2 for i in range(len(runs))], [f"{run['case']}\n{run['precision']}" for run in runs])
    ax.set(title="Seconds of a PPO iteration")


def _memory(ax: Any, rows: Sequence[dict[str, Any]]) -> None:
    for name, colour in COLOURS.items():
        for vocabulary, line in zip(VOCABULARIES, ("--", "-"), strict=True):
            chosen = [row for row in rows if row["vocabulary"] == vocabulary]
            label = f"{name}, vocabulary {vocabulary:,} ({growth(list(rows), vocabulary, name) / 1e6:.2f} MB a token)"
            at, peaks = [row["tokens"] for row in chosen], [row["peaks"][name] / 1e9 for row in chosen]
            ax.plot(at, peaks, line, marker="o", color=colour, label=label, linewidth=1.6, markersize=4)
    ax.set(title="Peak of a PPO iteration, GB, by tokens of its micro-batch", ylim=(0, None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="without a suffix")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    data = args.out.with_suffix(".json")
    found = json.loads(data.read_text()) if data.exists() else {}
    for part in args.part:
        print(f"\n{part}", flush=True)
        found[part] = run(part, args.repeats)
        data.write_text(json.dumps(found, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(table(found))
    if {"ppo", "curves"} <= set(found):
        picture(found, args.out.with_suffix(".png"))
    print(f"\n{table(found)}\nwritten: {data}, {args.out.with_suffix('.md')}, {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
