"""What a stage's report and its progress line say, made from a store with real checkpoints and from progress events."""

import base64
import hashlib
import io
import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from rlhf_core.artifacts import ArtifactRef
from rlhf_core.checkpoints import Checkpoint, Part, Position
from rlhf_core.resources import Resources
from rlhf_core.sealed import seal
from rlhf_core.store import Store
from tasks.pace import Pace
from tasks.stage_report import MOST_BYTES, EventRows, Stored, read_stored, stage_text

REF = ArtifactRef(stage="ppo", name="t", fingerprint="ab" * 32)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(f"file://{tmp_path}/store")


def save(store: Store, step: int, files: dict[str, list[dict]]) -> None:
    """A checkpoint with some files of JSON lines."""
    parts: list[Part] = []
    contents: list[bytes] = []
    for name, rows in files.items():
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        parts.append(Part(name=f"files/{name}", size=len(data), sha256=hashlib.sha256(data).hexdigest()))
        contents.append(data)
    found = Checkpoint(artifact=REF.id, attempt=1, position=Position(step=step), world=1, parts=tuple(parts))
    for part, data in zip(parts, contents, strict=True):
        store.write(found.part_key(part), data)
    store.write(found.key, seal(found))


def rows_of(steps: int, names: tuple[str, ...] = ("score", "kl_sequence")) -> list[dict]:
    return [{"kind": "train", "step": i, **{n: i * 0.1 + k for k, n in enumerate(names)}} for i in range(1, steps + 1)]


def text_of(rows, stored=None, **more) -> str:
    return stage_text(
        "ppo", "s3://b/ppo/t", "train rollout 3/9", rows, stored or Stored(), "s3://b/ppo/t/log.txt", **more
    )


def test_curves_reach_back_to_the_checkpoint_and_on_with_the_events(store):
    save(store, 3, {"metrics.jsonl": rows_of(3)})
    events = EventRows()
    for step in (2, 3, 4, 5):
        events.add({"step": step, "total": 9, "phase": "train", "metrics": {"score": float(step)}})
    events.add({"step": 0, "total": 1, "phase": "upload", "metrics": {}})
    rows = events.after(read_stored(store, REF, None).rows)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert "kl_sequence" in rows[2] and rows[4]["score"] == 5.0


def test_steps_that_are_trained_again_after_a_resume_replace_those_before():
    events = EventRows()
    for step, score in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 9.0)):
        events.add({"step": step, "total": 9, "phase": "train", "metrics": {"score": score}})
    assert [(row["step"], row["score"]) for row in events.after([])] == [(1, 1.0), (2, 9.0)]


def test_the_plots_are_opaque_pngs_in_the_text(store):
    images = re.findall(r"!\[(\w+)\]\(data:image/png;base64,([^)]+)\)", text_of(rows_of(30)))
    assert [name for name, _ in images] == ["score", "kl_sequence"]
    for _, data in images:
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.convert("RGBA").getchannel("A").getextrema() == (255, 255), "readable on a dark page"
        assert image.convert("L").histogram()[:100] != [0] * 100, "something is drawn"


def test_however_many_metrics_the_report_stays_small_and_names_what_it_leaves_out():
    names = tuple(f"metric_{i}" for i in range(40))
    text = text_of(rows_of(500, names))
    assert len(text.encode()) <= MOST_BYTES
    assert "Not drawn here:" in text and "metric_39" in text


def test_a_metric_with_one_value_draws_nothing():
    assert "## Curves" not in text_of(rows_of(1))


def test_answers_of_the_last_rollout_are_shown_and_nothing_in_them_is_markup(store):
    answers = [
        {"step": 1, "prompt": "old", "answer": "old", "score": 0},
        {"step": 2, "prompt": "a | b\n\nAssistant:", "answer": "<script>x</script> ![i](http://x)\x1b", "score": 1.25},
    ]
    save(store, 2, {"metrics.jsonl": rows_of(2), "answers.jsonl": answers})
    text = text_of([], read_stored(store, REF, None))
    assert "Answers of rollout 2" in text and "old" not in text
    row = next(line for line in text.splitlines() if "Assistant:" in line)
    assert row.count("|") == 4 and row.endswith("| 1.25 |")
    assert "<script>" not in text and "![i]" not in text and "\x1b" not in text


def test_the_checkpoints_stand_in_a_table_newest_first(store):
    for step in (10, 20):
        save(store, step, {"metrics.jsonl": rows_of(2)})
    lines = [line for line in text_of([], read_stored(store, REF, None)).splitlines() if line.startswith("| step")]
    assert [line.split(" | ")[0] for line in lines] == ["| step 20", "| step 10"]
    assert all(re.search(r"\d+ B \|$", line) for line in lines)


def test_gates_are_listed_if_any_fired_and_the_log_is_named():
    assert "Gates" not in text_of([])
    assert "Gates that fired\n\n- KL above 8 at rollout 12" in text_of([], gates=["KL above 8 at rollout 12"])
    assert "s3://b/ppo/t/log.txt" in text_of([])


# --- how far, how long, how dear ------------------------------------------------------------------------------------


def at(pace: Pace, now: float, step: int, total: int, phase: str = "train") -> float:
    pace.add({"step": step, "total": total, "phase": phase}, now)
    return round(pace.share, 4)


def test_the_share_is_of_the_whole_stage_and_an_evaluation_does_not_move_it_back():
    pace = Pace("sft", Resources())
    course = [
        (0, 1, "start"),
        (5, 10, "tokenise"),
        (0, 100),
        (50, 100),
        (1, 4, "evaluate"),
        (100, 100),
        (1, 2, "evaluate"),
    ]
    assert [at(pace, float(i), *event) for i, event in enumerate(course)] == [0, 0.025, 0.05, 0.5, 0.5, 0.95, 0.975]


def test_a_resumed_stage_reckons_its_time_from_the_step_where_it_went_on():
    pace = Pace("sft", Resources())
    at(pace, 0, 80, 100)
    at(pace, 10, 90, 100)
    assert pace.seconds_left == 10


def test_cost_is_shown_only_with_a_price_and_waiting_for_another_run_costs_nothing():
    free, priced = (Pace("sft", Resources(processes=4, price_per_process_hour=price)) for price in (None, 2.5))
    for pace in (free, priced):
        at(pace, 0, 0, 0, "waiting for another run")
        at(pace, 3600, 0, 10)
        at(pace, 7200, 5, 10)
    assert free.describe() == "1 h 00 min left  4 process-hours"
    assert priced.describe() == "1 h 00 min left  4 process-hours  cost 10.00"
    assert priced.describe(ended=True) == "4 process-hours  cost 10.00"


DRAWS = """
import threading, time
from tasks.stage_report import Stored, stage_text
rows = [{"kind": "train", "step": i, "loss": float(i % 7), "score": float(i % 5)} for i in range(200)]
drawn = threading.Event()
def draw():
    while True:
        stage_text("ppo", "", "", rows, Stored(), "")
        drawn.set()
threading.Thread(target=draw, daemon=True).start()
drawn.wait()
"""


@pytest.mark.parametrize("late", [0.0, 0.07, 0.13])
def test_a_process_that_ends_while_a_thread_draws_is_not_aborted(late):
    done = subprocess.run([sys.executable, "-c", f"{DRAWS}\ntime.sleep({late})"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
