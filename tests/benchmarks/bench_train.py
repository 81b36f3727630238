"""Steps of supervised fine-tuning and of the reward model beside TRL's trainers, on the same weights and rows.

    python tests/benchmarks/bench_train.py [--stage sft reward] [--case fixed varied] [--precision bf16 fp32] [--out FILE]

OPT-125m's shape, 16 rows or pairs a step. `fixed`: 128 + 128 tokens each. `varied`: prompts and answers as long as hh-rlhf's. SFT
learns the answers. Each system runs in a process of its own, in turn with the other and with a measurement of the machine, three
steps a turn of which the last counts; figures are medians over the turns. Losses of the first step show that the work is the same.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from machine import rounds  # noqa: E402
from opt_125m import ROWS, Shape, pairs, save_models, tokenizer  # noqa: E402
from roofline import Limits, fitting  # noqa: E402
from turns import Clock, job_of_child, medians, options, say, turn  # noqa: E402

SYSTEMS = ("ours", "trl")
STEPS = 3


def save_data(folder: Path, case: str) -> None:
    """The rows as the data stage would leave them."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    rows = pairs(case == "varied", ROWS * STEPS)
    sft = [{"input_ids": p + c, "loss_mask": [0] * len(p) + [1] * len(c)} for p, c, _ in rows]
    reward = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in rows]
    for share, table in (("sft", sft), ("reward", reward)):
        Dataset.from_list(table).save_to_disk(str(folder / "data" / share / "train"))
        Dataset.from_list(table[:1]).save_to_disk(str(folder / "data" / share / "test"))
    tokenizer().save_pretrained(folder / "data" / "tokenizer")


def run_ours(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of our trainer."""
    import tiny

    from rlhf_core.context import JobContext
    from rlhf_core.reward import RewardTrainer
    from rlhf_core.sft import SFTTrainer
    from rlhf_core.specs import ModelSpec
    from rlhf_core.store import Store

    folder, stage = Path(job["folder"]), job["stage"]
    store = Store(f"file://{folder}/store")
    inputs = {"data": tiny.put(store, "data", folder / "data", {})}
    spec = {"batch_size": ROWS, "max_steps": STEPS, "precision": job["precision"], "optim": {"lr": 1e-6}}
    model = {"path": str(folder / "actor")}
    if stage == "reward":
        spec["model"] = model
    context = tiny.context(
        store, stage, spec, inputs, folder / "out", micro_batch=ROWS, micro_tokens=job["micro_tokens"]
    )
    started = context.job.model_copy(update={"model": ModelSpec.model_validate(model)})
    context = JobContext(started, store, folder / "out")
    trainer, clock, facts = {"sft": SFTTrainer, "reward": RewardTrainer}[stage](context), Clock(), []
    for step in range(STEPS):
        clock.start()
        metrics = trainer.step(step)
        clock.phase("train")
        clock.end()
        facts.append({"loss": metrics["loss"]})
    return {"iterations": clock.rows, "facts": facts}


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of TRL's trainer."""
    from trl_peer import fit

    return fit({**job, "iterations": STEPS})


def compared(args: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """One stage, case and precision: medians and roofline of all systems, all turns beside them."""
    from rlhf_core.batches import step_rows

    limits, turns = rounds(
        args.systems,
        args.repeats,
        args.threads,
        lambda name: turn(__file__, {**job, "system": name, "processes": 1}, 1, args.threads),
    )
    rows = pairs(job["case"] == "varied", ROWS * STEPS)
    last = [rows[i] for i in step_rows(len(rows), ROWS, STEPS - 1, 0)]
    sizes = [(len(p), len(a)) for p, *answers in last for a in answers[: 1 if job["stage"] == "sft" else 2]]
    at = Limits(limits[job["precision"]], limits["bytes"])
    return {
        **{k: job[k] for k in ("stage", "case", "precision")},
        "threads": args.threads,
        "layers": args.layers,
        "tokens": sum(p + a for p, a in sizes),
        "machine": limits,
        "least": fitting(sizes, job["precision"], at, job["stage"] == "sft", Shape(args.layers)),
        "systems": {name: medians(each) for name, each in turns.items()},
        "first": {name: each[0][0]["facts"][0] for name, each in turns.items()},
        "turns": turns,
    }


def show(found: dict[str, Any]) -> None:
    """A line for each system."""
    print(
        f"{found['stage']} {found['case']} {found['precision']}: {found['tokens']} tokens, least {found['least']:.1f} s"
    )
    systems = found["systems"]
    for name, row in systems.items():
        seconds, ratio = row["whole"]["wall"], systems["trl"]["whole"]["wall"] if "trl" in systems else float("nan")
        print(
            f"  {name:5} {seconds:5.1f} s ({100 * found['least'] / seconds:2.0f} %)  CPU {row['whole']['cpu']:5.1f} s  "
            f"peak {row['peak'] / 1e9:4.1f} GB  x{ratio / seconds:.2f}  first loss {found['first'][name]['loss']:.6g}",
            flush=True,
        )


def main() -> None:
    if job := job_of_child():
        return say({"ours": run_ours, "trl": run_trl}[job["system"]](job))
    parser = options(__doc__, SYSTEMS)
    parser.add_argument("--stage", nargs="+", choices=("sft", "reward"), default=["sft", "reward"])
    parser.add_argument("--micro-tokens", type=int, default=2048, help="of ours")
    args = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in args.case:
            save_models(folder := Path(temporary, case), False, Shape(args.layers))
            save_data(folder, case)
            for stage in args.stage:
                for precision in args.precision:
                    job = {"folder": str(folder), "stage": stage, "case": case, "precision": precision}
                    found.append(compared(args, {**job, "micro_tokens": args.micro_tokens}))
                    show(found[-1])
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
