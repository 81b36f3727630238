"""Gates: what may be configured, when they fire, and what is removed when one rolls back. Pure, no job runs here."""

import json
import math
from pathlib import Path

import pytest
import yaml
from commands import rlhf as command_line
from commands import small_pipeline
from stored import begin

from rlhf_core.artifacts import make_ref
from rlhf_core.checkpoints import Checkpoint, Phase, Position
from rlhf_core.config import load_config, parse_config
from rlhf_core.context import JobContext
from rlhf_core.errors import ConfigError, is_transient
from rlhf_core.fired import (
    GateFired,
    LiveGates,
    after_first,
    fired_at_end,
    over_optimised,
    read_fired,
    write_fired,
)
from rlhf_core.gates import FINAL, LIVE, Gate
from rlhf_core.job import parse_progress
from rlhf_core.plan import stage_refs
from rlhf_core.sealed import seal
from rlhf_core.specs import STAGES
from rlhf_core.store import Store

CONFIGS = Path(__file__).parents[2] / "deployments" / "configs"
KL = {"stage": "ppo", "metric": "kl_sequence", "above": 10, "during": True, "action": "stop"}


def gate(**changes) -> Gate:
    """A gate on PPO's KL that stops."""
    return Gate.model_validate({**KL, **changes})


def rows(*values: float, metric: str = "kl_sequence", kind: str = "train", first: int = 1) -> list[dict]:
    """Rows of a metrics.jsonl."""
    return [{"kind": kind, "step": step, "seconds": 1.0, metric: value} for step, value in enumerate(values, first)]


def fired_steps(one: Gate, *values: float) -> list[int | None]:
    return [fired.step for fired in LiveGates([one]).add(rows(*values))]


# --- configuration ---------------------------------------------------------------------------------------------------


def with_gate(**fields):
    raw = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    return parse_config({**raw, "gates": [fields]})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({**KL, "stage": "dpo", "metric": "loss"}, "'dpo' is no stage of this pipeline; its stages are data, sft"),
        ({**KL, "metric": "kl_sequnce"}, "'kl_sequnce' is none that the ppo stage logs while it runs; did you mean 'kl_seq"),
        ({**KL, "during": False}, "with during: true there is one; did you mean 'kl_sequence_last'"),
        ({**KL, "metric": None}, "above needs a metric, e.g. metric: score"),
        ({**KL, "below": 0}, "needs one of below, above, non_finite and rule; given: below and above"),
        ({**KL, "above": None}, "none is given"),
        ({**KL, "above": math.inf}, "finite number"),
        ({**KL, "for_steps": 0}, "greater than or equal to 1"),
        ({**KL, "action": "explode"}, "'warn', 'stop', 'roll_back' or 'wait'"),
        ({**KL, "stage": "evaluate", "metric": "gold_gain"}, "evaluate stage logs no metrics while it runs"),
        ({"stage": "reward", "metric": "eval_accuracy", "below": 0.6, "action": "roll_back"}, "roll_back is for during: true"),
        (
            {"stage": "reward", "metric": "eval_accuracy", "below": 0.6, "action": "stop", "for_steps": 2},
            "for_steps 2 is for during: true",
        ),
        ({"stage": "ppo", "rule": "over_optimised", "action": "warn"}, "set stage: evaluate, and leave out metric"),
    ],
)  # fmt: skip
def test_a_gate_that_cannot_be_meant_is_an_error_that_names_what_to_change(fields, told):
    with pytest.raises(ConfigError) as raised:
        with_gate(**fields)
    assert told in str(raised.value) and "gates.0" in str(raised.value)


def test_a_gate_on_gold_needs_a_gold_and_two_on_the_same_condition_are_one_too_many():
    raw = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    gold = {"stage": "evaluate", "rule": "over_optimised", "action": "warn"}
    with pytest.raises(ConfigError, match=r"measures no gold; set evaluate\.gold"):
        parse_config({**raw, "evaluate": {"prompts": 20}, "gates": [gold]})
    with pytest.raises(ConfigError, match=r"gates\.1: evaluate, over-optimised.* is the condition of gates\.0"):
        parse_config({**raw, "gates": [gold, {**gold, "action": "stop"}]})


def test_a_metric_may_be_written_with_its_stage():
    found = with_gate(stage="reward", metric="reward.eval_accuracy", below=0.6, action="stop")
    assert found.gates[0].metric == "eval_accuracy"


def test_gates_change_no_fingerprint():
    plain = load_config(CONFIGS / "quickstart.yaml")
    assert stage_refs(plain) == stage_refs(with_gate(**KL))


def test_the_plan_shows_the_gates(tmp_path, capfd):
    end = {"stage": "reward", "metric": "eval_accuracy", "below": 0.6, "action": "wait"}
    live = {**KL, "for_steps": 3, "after_step": 5, "action": "roll_back"}
    code, out, _ = command_line(capfd, "plan", small_pipeline(tmp_path, gates=[live, end]))
    assert code == 0
    assert "gate    reward, at its end: eval_accuracy below 0.6: wait" in out
    assert "gate    ppo, while it runs: kl_sequence above 10 for 3 steps after step 5: roll back" in out


# --- while a stage runs ----------------------------------------------------------------------------------------------


def test_it_fires_once_at_the_first_value_beyond_the_bound():
    live = LiveGates([gate()])
    [fired] = live.add(rows(1, 10, 10.5, 11))
    assert fired.sentence == "ppo: kl_sequence 10.5 is above 10 at step 3"
    assert (fired.step, fired.first, fired.value) == (3, 3, 10.5)
    assert live.add(rows(12, first=5)) == [] and live.fired == [fired]


def test_for_steps_counts_reported_values_in_a_row_and_remembers_the_first():
    assert fired_steps(gate(for_steps=3), 11, 11, 1, 11, 11) == []
    live = LiveGates([gate(for_steps=3)])
    [fired] = live.add(rows(11, 1, 11, 12, 13))
    assert (fired.step, fired.first) == (5, 3)
    assert fired.sentence.endswith("at step 5, 3 times in a row")


def test_rows_without_the_metric_neither_count_nor_interrupt():
    mixed = [*rows(11), *rows(0.1, metric="entropy", first=2), *rows(11, first=3)]
    assert [fired.step for fired in LiveGates([gate(for_steps=2)]).add(mixed)] == [3]


def test_steps_up_to_after_step_do_not_count():
    assert fired_steps(gate(after_step=2, for_steps=2), 11, 11, 11, 11) == [4]


def test_steps_trained_again_after_a_resume_count_once():
    live = LiveGates([gate(for_steps=3)])
    assert live.add(rows(1, 11, 11)) == []
    assert live.add(rows(11, first=3)) == []  # step 3 again: still two in a row
    assert [fired.step for fired in live.add(rows(11, first=4))] == [4]


def test_metrics_of_evaluations_within_a_stage_have_a_prefix():
    one = Gate(stage="reward", metric="eval_accuracy", below=0.6, during=True, action="warn")
    live = LiveGates([one])
    assert live.add(rows(0.1, metric="accuracy")) == []
    [fired] = live.add(rows(0.55, metric="accuracy", kind="eval", first=7))
    assert fired.sentence == "reward: eval_accuracy 0.55 is below 0.6 at step 7"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
def test_a_non_finite_value_fires_only_the_gate_on_it_or_an_infinite_bound(value):
    any_metric, this = gate(above=None, non_finite=True, metric=None), gate(above=None, non_finite=True)
    for one in (any_metric, this):
        [fired] = LiveGates([one]).add(rows(1, value, 1))
        assert fired.step == 2 and fired.sentence.startswith("ppo: kl_sequence is ")
        json.dumps(fired.payload, allow_nan=False)
    assert fired_steps(gate(), 1, value, 1) == ([2] if value == math.inf else [])


def test_a_metric_that_no_row_had_is_told():
    live = LiveGates([gate(metric="critic_loss"), gate()])
    live.add(rows(1))
    assert live.unseen() == ["the gate on critic_loss has not been judged: the stage logged no such metric"]


def test_the_job_sends_every_row_that_it_logs_with_its_next_progress(tmp_path, capfd):
    store = Store(f"file://{tmp_path}/store")
    (out := tmp_path / "out").mkdir()
    context = JobContext(job=begin(store, make_ref("sft", "a", {}, {})), store=store, out=out)
    context.log("train", 1, {"loss": math.nan, "lr": 0.1})
    context.log("eval", 1, {"loss": 2.0})
    context.progress(1, 3, "train", {"loss": 2.5})
    context.progress(1, 3, "train", {"loss": 2.5})
    first, again = (parse_progress(line) for line in capfd.readouterr().out.splitlines())
    assert first is not None and again is not None
    told = [(row["kind"], row["step"], row.get("lr")) for row in first["logged"]]
    assert told == [("train", 1, 0.1), ("eval", 1, None)] and math.isnan(first["logged"][0]["loss"])
    assert "logged" not in again


# --- at a stage's end ------------------------------------------------------------------------------------------------


def test_at_the_end_the_numbers_of_the_manifest_are_compared():
    one = Gate(stage="reward", metric="eval_accuracy", below=0.6, action="stop")
    fired = fired_at_end(one, {"eval_accuracy": 0.52, "splits": {}})
    assert fired is not None and fired.sentence == "reward: eval_accuracy 0.52 is below 0.6"
    assert fired_at_end(one, {"eval_accuracy": 0.6}) is None


def samples(*answers: tuple[float, float], reward: bool = True) -> list[dict]:
    """Rows of a samples.jsonl in which SFT has reward 0 and gold 0.5, and PPO as given, each a little apart."""

    def answer(r: float, g: float, i: int) -> dict:
        return {"kl": 1.0, "gold": g + 0.001 * i, **({"reward": r + 0.001 * i} if reward else {})}

    return [
        {"index": i, "answers": {"sft": answer(0, 0.5, -i), "ppo": answer(*after, i)}}
        for i, after in enumerate(answers)
    ]


def test_over_optimised_is_gold_that_fell_while_the_reward_rose():
    one = Gate(stage="evaluate", rule="over_optimised", action="stop")
    fired, trouble = over_optimised(one, samples(*[(2.0, 0.2)] * 20), "ppo")
    assert trouble is None and fired is not None
    assert fired.sentence.startswith("evaluate: over-optimised. Gold peaks at sft") and fired.value == pytest.approx(
        -0.281, abs=0.001
    )
    assert over_optimised(one, samples(*[(2.0, 0.8)] * 20), "ppo") == (None, None)
    assert over_optimised(one, samples(*[(-2.0, 0.2)] * 20), "ppo") == (None, None)
    assert over_optimised(one, samples(*[(2.0, 0.2)] * 20, reward=False), "ppo") == (None, None)
    assert "not been judged" in str(over_optimised(one, [], "ppo")[1])


# --- what follows ----------------------------------------------------------------------------------------------------


def test_a_gates_end_is_an_exit_code_of_its_own_that_no_retry_helps():
    [fired] = LiveGates([gate()]).add(rows(11))
    error = GateFired(fired, "stopped")
    assert error.exit_code == 6 and error.reason == "gate" and not is_transient(error.code)


def test_what_has_fired_is_kept_with_the_answer_and_an_answer_is_to_one_condition(tmp_path):
    store, ref = Store(f"file://{tmp_path}"), make_ref("ppo", "a", {}, {})
    [fired] = LiveGates([gate(action="wait")]).add(rows(math.inf))
    write_fired(store, ref, 2, fired)
    answered = fired.model_copy(update={"answer": "go on"})
    write_fired(store, ref, 2, answered)
    assert read_fired(store, ref) == [answered] and read_fired(store, ref, since=3) == []
    assert answered.line == "ppo: kl_sequence inf is above 10 at step 1 (wait; answered: go on)"
    assert gate(action="wait").digest == gate(wait_hours=1).digest != gate(above=20).digest


def test_before_a_bad_step_is_what_was_saved_at_its_beginning_or_earlier(tmp_path):
    store, ref = Store(f"file://{tmp_path}"), make_ref("ppo", "a", {}, {})

    def save(step: int, phase: Phase, update: int = 0, kept: bool = False) -> str:
        position = Position(step=step, phase=phase, update=update)
        marker = Checkpoint(artifact=ref.id, attempt=2, position=position, kept=kept, world=1, parts=())
        store.write(marker.key, seal(marker))
        return marker.key

    early, begun = save(3, "rollout", kept=True), save(6, "rollout")
    within = [save(6, "score"), save(6, "update"), save(6, "update", update=2)]
    later = [save(7, "rollout"), save(8, "rollout", kept=True)]
    good, bad = after_first(store, ref, 7, since=1)  # rollout 7 begins when 6 are finished
    assert good == [begun, early] and sorted(bad) == sorted([*within, *later])
    assert after_first(store, ref, 7, since=3) == ([], [])


def test_every_stage_has_known_numbers():
    assert set(FINAL) == set(STAGES) and set(LIVE) == {"sft", "reward", "dpo", "ppo"}
