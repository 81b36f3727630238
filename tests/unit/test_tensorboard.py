"""Event files hold what metrics.jsonl holds."""

import json
import struct
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from flows.cli import app
from rlhf_core.store import Store

ROWS = [
    {"kind": "train", "step": 1, "seconds": 0.5, "loss": 2.0},
    {"kind": "train", "step": 2, "seconds": 1.0, "loss": 1.5},
    {"kind": "eval", "step": 2, "seconds": 1.5, "loss": 1.75},
]


def scalars(folder: Path) -> list[tuple[str, int, float, float]]:
    """(tag, step, value, wall time) of every scalar, read from the record format itself."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    [file] = folder.iterdir()
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        found += [(v.tag, event.step, v.simple_value, event.wall_time) for v in event.summary.value]
        at += 12 + length + 4
    return found


def test_every_metric_of_an_artifact_becomes_a_scalar_at_its_step(tmp_path):
    pytest.importorskip("tensorboardX")
    store = Store(f"file://{tmp_path}/store")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "report.json").write_text("{}")
    data = tiny.put(store, "data", tmp_path / "data", {})
    sft = tiny.put(store, "sft", tmp_path / "sft", {"data": data})
    command = ["artifacts", "tensorboard", "--store", store.url, "--out", str(tmp_path / "events")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert scalars(tmp_path / "events" / sft.id) == [
        ("train/loss", 1, 2.0, 0.5),
        ("train/loss", 2, 1.5, 1.0),
        ("eval/loss", 2, 1.75, 1.5),
    ]
    assert not (tmp_path / "events" / data.id).exists(), "nothing was measured over steps"
