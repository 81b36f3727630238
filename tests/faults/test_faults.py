"""A stage that is killed, or whose storage fails, at any moment ends with the same bits as one that was never disturbed.

`pytest tests/faults -m faults`, or `make faults`: more than 60 kills and 35 storage faults in up to an hour on two cores. A chain
strikes one stage at one seeded moment after the other and starts it again where it ended; see `chain.py` for what must hold then.
`--faults-seed N` draws other moments, `--faults-report DIR` keeps the table. The ordinary suite has `test_some_faults.py`.
"""

import random
from collections.abc import Iterable

import pytest
from blows import KILLS, STORAGE, Blow
from runs import Moment

from rlhf_core.specs import StageName

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

# What is hit while the stage runs; "/": what is hit at its end, in the phase that is named.
CHAINS: dict[str, tuple[StageName, bool, tuple[str, ...]]] = {
    "data": ("data", False, (
        "kill -9 of rank 0", "kill -9 of the flow", "kill -9 of the guard", "SIGTERM to the flow", "SIGTERM to the job",
        "kill -9 of everything", "kill -9 of the flow / upload",
    )),
    "sft": ("sft", False, (
        "kill -9 of rank 0", "kill -9 of rank 1", "kill -9 of the launcher", "kill -9 of the launcher",
        "kill -9 of the guard", "kill -9 of the flow", "kill -9 of the flow, storage away", "kill -9 of rank 1 / evaluate",
        "kill -9 of the flow / upload",
    )),
    "sft-local": ("sft", True, (
        "kill -9 of everything", "SIGTERM to the flow", "SIGTERM to the job", "kill -9 of rank 0", "kill -9 of the guard",
        "SIGTERM to the flow / evaluate", "kill -9 of everything / evaluate",
    )),
    "reward": ("reward", False, (
        "kill -9 of rank 1", "kill -9 of the guard", "kill -9 of the flow", "SIGTERM to the flow", "kill -9 of the launcher",
        "kill -9 of rank 0 / moments", "kill -9 of the flow / upload",
    )),
    "ppo": ("ppo", False, (
        "kill -9 of rank 0", "kill -9 of rank 1", "kill -9 of the launcher", "kill -9 of the guard",
        "kill -9 of the flow", "SIGTERM to the flow", "SIGTERM to the job", "kill -9 of the launcher",
        "kill -9 of rank 0 / upload",
    )),
    "ppo-again": ("ppo", False, (
        "kill -9 of everything", "kill -9 of the flow", "kill -9 of rank 0", "SIGTERM to the job", "SIGTERM to the flow",
        "kill -9 of rank 1", "kill -9 of the guard", "kill -9 of the flow, storage away", "kill -9 of the flow / upload",
    )),
    "dpo-local": ("dpo", True, (
        "kill -9 of rank 0", "kill -9 of the flow", "SIGTERM to the job", "kill -9 of the launcher",
        "kill -9 of the guard", "kill -9 of rank 1 / evaluate",
    )),
    "evaluate": ("evaluate", False, (
        "kill -9 of rank 0 / sample", "kill -9 of the flow / perplexity", "SIGTERM to the flow / KL",
        "kill -9 of the guard / judge", "kill -9 of the launcher / report", "kill -9 of the flow / upload",
    )),
}  # fmt: skip

DURING: dict[StageName, tuple[str, ...]] = {
    "data": ("train tokenizer", "tokenise"),
    "ppo": ("rollout", "score", "update"),
    "evaluate": ("sample", "perplexity", "KL", "judge"),
}
START_SECONDS = 7.0  # in which a job imports, joins, and reads its inputs
START_SHARE = 0.25


def moments(stage: StageName, names: Iterable[str], dice: random.Random) -> list[Blow]:
    """Blows by their names, in a drawn order but those at the end, at drawn moments."""
    during = [name for name in names if " / " not in name]
    last = [name.split(" / ") for name in names if " / " in name]
    dice.shuffle(during)
    return [
        *[Blow(KILLS.get(name) or STORAGE[name], moment(stage, dice)) for name in during],
        *[Blow(KILLS[name], Moment(phase, 1, dice.uniform(0, 0.5))) for name, phase in last],
    ]


def moment(stage: StageName, dice: random.Random) -> Moment:
    """In start-up, or after some steps, rollouts or batches."""
    if dice.random() < START_SHARE:
        return Moment("start", 1, dice.uniform(0, START_SECONDS if stage != "data" else 3.0))
    phase = dice.choice(DURING.get(stage, ("train",)))
    count = dice.randrange(1, 8) if phase == "train" else 1 if stage == "data" else dice.randrange(1, 4)
    return Moment(phase, count, dice.uniform(0, 0.5))


@pytest.mark.parametrize("name", CHAINS)
def test_a_stage_that_is_killed_again_and_again_ends_with_the_same_bits(chain, name):
    stage, local, kinds = CHAINS[name]
    made = chain(stage, local=local)
    if local:  # more steps between checkpoints, so that some must be done again
        made.overrides = ("resources.checkpoint.every_steps=4",)
    made.strike(moments(stage, kinds, made.world.dice))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_of_the_command_line_that_is_killed_goes_on_when_it_is_given_again(chain, stage):
    made = chain(stage, cli=True)
    dice = made.world.dice
    kinds = ("kill -9 of the flow", "SIGTERM to the flow", "kill -9 of rank 0", "SIGTERM to the job")
    made.strike(Blow(KILLS[kind], Moment("saved", dice.randrange(1, 8), dice.uniform(0, 0.5))) for kind in kinds)


OUTLIVED = tuple(name for name in STORAGE if name not in ("storage away for longer than patience", "local disk full"))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_training_outlives_every_fault_of_its_storage(chain, tally, stage):
    before = tally.sum.rerun
    made = chain(stage)
    dice = made.world.dice
    # The first falls while the inputs come: later there is nothing to download.
    first, others = "downloads cut under way", [name for name in OUTLIVED if name != "downloads cut under way"]
    dice.shuffle(others)
    blows = [Blow(STORAGE[name], Moment("train", dice.randrange(1, 4), dice.uniform(0, 0.5))) for name in others]
    made.strike([Blow(STORAGE[first], Moment("start")), *blows])
    assert tally.sum.rerun == before, "it had to be started again"


SHORT: dict[StageName, tuple[tuple[str, str], ...]] = {
    "data": (("500 to every request", "start"), ("lost answers", "upload")),
    "reward": (
        ("refused connections", "start"),
        ("kill -9 of the server", "train"),
        ("uploads cut under way", "moments"),
    ),
    "dpo": (("SlowDown", "start"), ("all of these at random", "train"), ("lost answers", "upload")),
    "evaluate": (
        ("requests that stall", "start"),
        ("kill -9 of the server", "sample"),
        ("500 to every request", "upload"),
    ),
}


@pytest.mark.parametrize("stage", SHORT)
def test_start_and_end_of_a_stage_outlive_faults_of_its_storage(chain, tally, stage):
    before = tally.sum.rerun
    made = chain(stage)
    made.strike(Blow(STORAGE[kind], Moment(phase)) for kind, phase in SHORT[stage])
    assert tally.sum.rerun == before, "it had to be started again"


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_storage_that_is_away_for_too_long_ends_the_stage_and_costs_no_result(chain, stage):
    made = chain(stage)
    made.more["RLHF_STORE_PATIENCE"] = "2"
    made.strike([Blow(STORAGE["storage away for longer than patience"], moment(stage, made.world.dice))])


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_full_local_disk_costs_no_result(chain, small_disk, stage):
    made = chain(stage, temporary=small_disk)
    made.strike([Blow(STORAGE["local disk full"], Moment("train", 5, 0.2))])
