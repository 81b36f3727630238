"""The memory of the data stage does not grow with the text, only by a few bytes a row."""

import hashlib
import json
import os
import random
import subprocess
import sys
import tracemalloc

import pytest
import tiny

from rlhf_core.data.digests import DigestTable

BUILD = """
import pathlib, sys, threading, time
from test_data_build import FileSource, Shares, TokenizerSpec, build
from rlhf_core.data import files, plain, tables

# What is in hand at a time is made small, so that the smaller data set fills it too.
tables.BATCH, plain.CHARACTERS, files.CHUNK = 50, 1 << 16, 1 << 16
out, path, peak, done = pathlib.Path(sys.argv[1]), sys.argv[2], 0, False

def held():  # memory of the process itself, not pages of files that the system may drop
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while not done:
        peak = max(peak, held())
        time.sleep(0.005)

watcher = threading.Thread(target=watch)
watcher.start()
text = FileSource(paths=(path,), columns={"text": "prompt"}, format="text")
build(out, sources=(FileSource(paths=(path,)),), pretrain=(text,), shares=Shares(sft=1, reward=0, ppo=1),
      tokenizer=TokenizerSpec(path=sys.argv[3]), max_prompt_tokens=600)
done = True
watcher.join()
print("PEAK", peak)
"""


def digests(n, seed=0):
    return [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(n)]


def test_a_digest_table_is_a_dict_of_digests():
    table, plain = DigestTable(), {}
    rng = random.Random(0)
    for digest in digests(20_000):
        assert table.get(digest) == 0
        plain[digest] = rng.randint(1, 7)
        table.put(digest, plain[digest])
    assert len(table) == 20_000
    assert all(table.get(digest) == value for digest, value in plain.items())
    assert not any(table.get(digest) for digest in digests(20_000, seed=1))


def test_a_digest_takes_at_most_22_bytes_of_memory():
    table = DigestTable()
    many = iter(digests(3073))  # the table has just grown, so it is as empty as it ever is
    tracemalloc.start()
    for digest in many:
        table.put(digest, 1)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / len(table) < 22


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's accounting of memory")
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_eight_times_the_rows_take_hardly_more_memory(ending, tmp_path):
    """No padded copies, no cache of tensors: DeepSpeed-Chat needs 8 KB of memory a row and rank (its fault 22)."""
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    peaks, sizes = [], []
    for rows in (1500, 8000):
        rng = random.Random(rows)
        path = tmp_path / f"{rows}.{ending}"
        texts = (" ".join(rng.choices(tiny.WORDS, k=600)) for _ in range(rows))
        lines = [json.dumps({"prompt": text, "response": "w1"}) for text in texts]
        path.write_text("\n".join(lines) if ending == "jsonl" else f"[{', '.join(lines)}]")
        environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__), "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-c", BUILD, str(tmp_path / f"out{rows}"), str(path), str(tmp_path / "tokenizer")]
        found = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
        peaks.append(int(found.stdout.rsplit("PEAK", 1)[1]) * 1024)
        sizes.append(path.stat().st_size)
    growth, text = peaks[1] - peaks[0], sizes[1] - sizes[0]
    assert growth < text / 2, f"{growth / 2**20:.1f} MB more memory for {text / 2**20:.1f} MB more text"
