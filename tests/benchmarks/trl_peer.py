"""TRL's trainers as the benchmarks' peer: its PPO (1.9 is among the last releases with one), SFT and reward trainers.

So that every phase has the same work, TRL generates its own answers, which is timed, and then scores and learns the answers that
our engine sampled from the same weights; their logits, which TRL keeps from its generation, are computed with the clock stopped.
Its losses are recorded as sums and counts, as it averages means of micro-batches.
"""

from pathlib import Path
from typing import Any

import torch
from opt_125m import NEW, PAD, ROWS, Shape, pairs, prompts, tokenizer
from turns import Clock

MICRO = 4  # sequences of a micro-batch


def ppo(job: dict[str, Any], answers: list[list[list[int]]]) -> dict[str, Any]:
    """Iterations of PPO on `answers`, a list of rows for each iteration in the order of the prompts."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, ppo_trainer

    folder, iterations, world = Path(job["folder"]), job["iterations"], job["processes"]
    rows, micro, shape = job["rows"], job["micro"] or MICRO, Shape(**job["shape"])
    kind = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    args = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=micro, num_mini_batches=1, num_ppo_epochs=1,
        gradient_accumulation_steps=rows // micro // world, total_episodes=rows * iterations, response_length=NEW,
        stop_token="eos", learning_rate=1e-6, kl_coef=0.05, temperature=1.0, num_sample_generations=0, report_to=[],
        local_rollout_forward_batch_size=rows // world, bf16=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
        seed=1, gradient_checkpointing=False,
    )  # fmt: skip
    actor, reference = (AutoModelForCausalLM.from_pretrained(folder / "actor", dtype=kind) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=kind) for _ in range(2)
    )
    asked = prompts(job["case"] == "varied", iterations, rows, job["prompt"])
    data = Dataset.from_dict({"input_ids": asked})
    words = tokenizer(shape)
    words.padding_side = "left"
    trainer = ppo_trainer.PPOTrainer(
        args=args, processing_class=words, model=actor, ref_model=reference, value_model=value, reward_model=reward,
        train_dataset=data, eval_dataset=data,
    )  # fmt: skip
    loader = DataLoader(data, batch_size=rows // world, collate_fn=trainer.data_collator, drop_last=True)  # pyright: ignore
    trainer.dataloader = trainer.accelerator.prepare(loader)
    made = {tuple(p): a for p, a in zip(asked, (row for each in answers for row in each), strict=True)}
    clock, facts = Clock(), []
    _instrument(ppo_trainer, trainer, made, clock, facts)
    trainer.train()
    return {"iterations": clock.rows, "facts": facts}


def _instrument(module: Any, trainer: Any, made: dict, clock: Clock, facts: list[dict[str, float]]) -> None:
    """Time the phases of TRL's loop, put our answers in the place of its own, and note sums of losses."""
    generate, forward, masked_mean = module.batch_generation, module.forward, module.masked_mean
    step, log = trainer.callback_handler.on_step_end, trainer.log
    state: dict[str, Any] = {"training": False, "sums": []}

    def generation(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
        clock.start()
        generate(model, queries, *rest)
        clock.phase("generate")
        given = [made[tuple(row[row != PAD].tolist())] for row in queries]
        width = max(map(len, given))
        answers = torch.full((len(given), width), PAD)
        for row, answer in zip(answers, given, strict=True):
            row[: len(answer)] = torch.tensor(answer)
        state["padded"] = width - sum(map(len, given)) / len(given)  # it counts -1 nat for each
        both = torch.cat([queries, answers], 1)
        logits = [forward(model, part, PAD).logits[:, queries.shape[1] - 1 : -1] for part in both.split(MICRO)]
        clock.start()
        return both, torch.cat(logits)

    def first_forward(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and not state["training"]:
            state["training"] = True
            clock.phase("score")
        return forward(*arguments, **options)

    def noted_mean(values: torch.Tensor, mask: torch.Tensor, *rest: Any) -> torch.Tensor:
        if torch.is_grad_enabled() and values.requires_grad:  # the value loss, then the policy's
            state["sums"].append((float((values * mask).sum().detach()), float(mask.sum())))
        return masked_mean(values, mask, *rest)

    def noted(metrics: dict[str, float], *rest: Any) -> None:
        sums = state["sums"]
        value, policy = (sum(x for x, _ in part) / sum(n for _, n in part) for part in (sums[::2], sums[1::2]))
        facts.append({
            "tokens": sum(n for _, n in sums[1::2]), "score": metrics["objective/scores"],
            "nats": metrics["objective/entropy"] + state["padded"], "actor_loss": policy, "value_loss_trl": 0.5 * value,
        })  # fmt: skip
        state["sums"] = []
        log(metrics, *rest)

    def ended(*arguments: Any, **options: Any) -> Any:
        clock.phase("train")
        clock.end()
        state["training"] = False
        return step(*arguments, **options)

    module.batch_generation, module.forward, module.masked_mean = generation, first_forward, noted_mean
    trainer.log, trainer.callback_handler.on_step_end = noted, ended


def fit(job: dict[str, Any]) -> dict[str, Any]:
    """Optimizer steps of TRL's SFT trainer, or of its reward trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from rlhf_core.batches import step_rows

    folder, steps = Path(job["folder"]), job["iterations"]
    kind = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    shared: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": MICRO, "max_steps": steps, "use_cpu": True,
        "gradient_accumulation_steps": ROWS // MICRO // job["processes"], "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "no", "report_to": [], "logging_steps": 1, "disable_tqdm": True, "max_length": None,
        "learning_rate": 1e-6, "lr_scheduler_type": "constant", "data_seed": 0,
    }  # fmt: skip
    made = pairs(job["case"] == "varied", ROWS * steps)
    rows = [made[i] for step in range(steps) for i in step_rows(len(made), ROWS, step, 0)]  # as our trainers take them
    if job["stage"] == "sft":
        model = AutoModelForCausalLM.from_pretrained(folder / "actor", dtype=kind)
        columns = {
            "input_ids": [p + c for p, c, _ in rows],
            "labels": [[-100] * len(p) + c for p, c, _ in rows],
        }
        trainer = SFTTrainer(
            model, SFTConfig(**shared), train_dataset=Dataset.from_dict(columns), processing_class=tokenizer()
        )
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=kind, num_labels=1)
        columns = {"chosen_ids": [p + c for p, c, _ in rows], "rejected_ids": [p + r for p, _, r in rows]}
        trainer = RewardTrainer(
            model,
            RewardConfig(**shared, center_rewards_coefficient=None),
            train_dataset=Dataset.from_dict(columns),
            processing_class=tokenizer(),
        )
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    clock, facts = Clock(), []

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.phase("train")
            clock.end()

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                facts.append({"loss": float(logs["loss"])})

    trainer.add_callback(Timed())
    trainer.train()
    return {"iterations": clock.rows, "facts": facts}
