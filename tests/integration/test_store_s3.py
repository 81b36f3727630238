"""The store on a real S3 server (SeaweedFS): the same verbs as everywhere, with create-only honoured by the server."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from proxy import FaultProxy
from s3 import free_ports

from rlhf_core.artifacts import Manifest, describe, fetch, make_ref, publish
from rlhf_core.errors import AlreadyExists, StoreError
from rlhf_core.gc import Policy, collect, unfinished_writes
from rlhf_core.inventory import look
from rlhf_core.s3_upload import PART_BYTES
from rlhf_core.store import Store


def test_the_verbs_on_s3(bucket, tmp_path):
    store = Store(f"{bucket}/verbs")
    with pytest.raises(KeyError):
        store.read("a/b")
    assert store.list("a") == {}
    store.write("a/b", b"1", create=True)
    with pytest.raises(AlreadyExists, match="a/b"):
        store.write("a/b", b"2", create=True)
    store.write("a/b", b"22")
    assert store.read("a/b") == b"22" and store.list("") == {"a/b": 2}
    store.delete("a/b")
    store.delete("a/b")
    with pytest.raises(KeyError):
        store.read("a/b")


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 5 * PART_BYTES - 1], ids=str)
def test_objects_of_every_size_come_back_as_they_were(bucket, tmp_path, size):
    store, data = Store(bucket), os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    store.upload(tmp_path / "file", "uploaded")
    store.write("written", data)
    assert store.list("") == {"uploaded": size, "written": size}
    for key in ("uploaded", "written"):
        store.download(key, tmp_path / key)
        assert (tmp_path / key).read_bytes() == data == store.read(key)
        assert store.sha256(key) == hashlib.sha256(data).hexdigest()


def test_a_range_is_what_a_slice_of_the_object_is(bucket):
    store, data = Store(bucket), os.urandom(2 * PART_BYTES + 5)
    store.write("x", data)
    ends = (0, 1, PART_BYTES - 1, PART_BYTES + 1, len(data) - 1, len(data), len(data) + 7)
    for start in ends:
        for stop in (*ends, None):
            assert store.read("x", start, stop) == data[start:stop], (start, stop)
    with pytest.raises(KeyError):
        store.read("y", 5, 5)


def test_a_folder_of_more_objects_than_one_page_is_listed_whole_and_a_name_that_begins_alike_is_not_in_it(bucket):
    store = Store(bucket)
    keys = [f"many/{i:04d}" for i in range(1005)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.write(key, b"x"), [*keys, "many-others/1"]))
    assert list(store.list("many")) == keys


def test_of_many_racing_creates_one_wins_even_where_all_write_the_same(bucket):
    def attempt(key: str, data: bytes) -> bool:
        try:
            Store(bucket).write(key, data, create=True)
            return True
        except AlreadyExists:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda i: attempt("own", str(i).encode()), range(16))) == 1
        assert sum(pool.map(lambda i: attempt("same", b"same"), range(16))) == 1
        assert sum(pool.map(lambda i: attempt("large", b"x" * (2 * PART_BYTES)), range(4))) == 1


def test_an_upload_of_a_killed_process_is_found_and_removed(bucket, tmp_path):
    """Its parts take room, and no listing of objects shows them."""
    store = Store(f"{bucket}/prefix")
    (tmp_path / "file").write_bytes(os.urandom(3 * PART_BYTES))
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from rlhf_core.s3_upload import Upload\n"
        "from rlhf_core.store import Store\n"
        "ask = Upload._ask\n"
        "async def die(self, method, **options):\n"
        "    if method == 'complete_multipart_upload': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return await ask(self, method, **options)\n"
        "Upload._ask = die\n"
        "Store(sys.argv[1]).upload(Path(sys.argv[2]), sys.argv[3])\n"
    )
    ref = make_ref("sft", "demo", {}, {})
    key = f"{ref.id}/attempts/0001/files/w"
    for url, name in ((store.url, key), (store.url, "elsewhere/w"), (f"{bucket}/prefix-of-others", key)):
        argv = [sys.executable, "-c", code, url, str(tmp_path / "file"), name]
        assert subprocess.run(argv, timeout=120).returncode == -signal.SIGKILL
    assert store.list("") == {} == store.unfinished(timedelta(hours=1))
    found = store.unfinished(timedelta(0))
    assert [name.partition("?")[0] for name in found] == ["elsewhere/w", key]
    assert list(found.values()) == [3 * PART_BYTES] * 2
    removals = unfinished_writes(store, look(store), timedelta(0))
    assert [(removal.artifact, removal.bytes) for removal in removals] == [(ref.id, 3 * PART_BYTES)]
    assert collect(store, Policy(), removals) == 3 * PART_BYTES
    store.abort(removals[0].steps[0][0])  # it has gone: no error
    assert [name.partition("?")[0] for name in store.unfinished(timedelta(0))] == ["elsewhere/w"]
    assert len(Store(f"{bucket}/prefix-of-others").unfinished(timedelta(0))) == 1


def test_an_object_that_is_replaced_while_it_is_read_comes_old_or_new_and_never_mixed(
    s3, bucket, tmp_path, monkeypatch
):
    data = {letter: letter * (12 * PART_BYTES) for letter in (b"a", b"b")}
    Store(bucket).write("x", data[b"a"])
    seen = threading.Event()

    def replace(request):
        if request.operation == "read" and request.number >= 6 and not seen.is_set():
            seen.set()
            s3.filesystem().pipe_file(f"{bucket}/x", data[b"b"])

    with FaultProxy(s3.endpoint, replace) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        Store(bucket).download("x", tmp_path / "x")
    assert seen.is_set() and (tmp_path / "x").read_bytes() == data[b"b"]


def test_artifacts_are_published_and_fetched_through_s3(bucket, tmp_path):
    store = Store(f"{bucket}/artifacts")
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "w").write_bytes(b"weights")
    ref = make_ref("sft", "demo", {}, {})
    for entry in describe(tmp_path / "out"):
        store.upload(tmp_path / "out" / entry.path, f"{ref.id}/{entry.path}")
    publish(store, Manifest(ref=ref, spec={}, files=describe(tmp_path / "out")))
    folder, _ = fetch(store, ref, tmp_path / "cache")
    assert (folder / "model" / "w").read_bytes() == b"weights"


def test_refused_credentials_and_a_dead_server_are_errors_not_absence(bucket, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StoreError, match=r"Permission|Forbidden|Access|Signature"):
        Store(f"{bucket}/x").read("a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    for call in (lambda s: s.read("a"), lambda s: s.list("a"), lambda s: s.write("a", b"")):
        with pytest.raises(StoreError, match=r"Could not connect.*tried"):
            call(Store(f"{bucket}/x", patience=0.5))


def test_a_bucket_that_does_not_exist_is_an_error_not_an_empty_store(s3):
    with pytest.raises(StoreError, match="NoSuchBucket"):
        Store("s3://no-such-bucket-here/x").read("a")


def test_what_the_server_keeps_survives_its_death(s3, bucket):
    store = Store(bucket)
    store.write("kept", b"data")
    s3.kill9()
    with pytest.raises(StoreError, match="tried"):
        Store(bucket, patience=0).read("kept")
    s3.start()
    assert store.read("kept") == b"data"
