"""The store when the storage fails: what it outlives, what it says, what it leaves. A real server and a harmful proxy."""

import hashlib
import os
import random
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import proxy as faults
import pytest
from proxy import FaultProxy, Rule, Script, Storm

from rlhf_core import s3_client
from rlhf_core.errors import AlreadyExists, ConfigError, StoreError
from rlhf_core.s3_upload import PART_BYTES
from rlhf_core.store import Store

LARGE = 2 * PART_BYTES + 5


@pytest.fixture
def harm(s3, bucket, monkeypatch):
    """A proxy before the server, in the environment; its plan is set by the test."""
    with FaultProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def short_limits(monkeypatch):
    """Time-outs of a second, and a new connection pool that has them."""
    for name in ("CONNECT_SECONDS", "READ_SECONDS", "REQUEST_SECONDS"):
        monkeypatch.setattr(s3_client, name, 1)
    monkeypatch.setattr(s3_client, "SLOWEST_BYTES_PER_SECOND", 1 << 40)
    s3_client._connect.cache_clear()
    yield
    s3_client._connect.cache_clear()


def first_time(fault: faults.Fault):
    """Each request fails once, and goes well when it is sent again."""
    return lambda request: None if request.nth else fault


def every_verb(store: Store, folder) -> None:
    """All verbs, small and large, with what they must give."""
    large = os.urandom(LARGE)
    (folder / "large").write_bytes(large)
    store.upload(folder / "large", "large")
    store.write("small", b"0123456789" * 100)
    store.write("once", b"first", create=True)
    with pytest.raises(AlreadyExists):
        store.write("once", b"second", create=True)
    assert store.list("") == {"large": LARGE, "small": 1000, "once": 5}
    assert store.read("once") == b"first" and store.read("small", 5, 9) == b"5678"
    store.download("large", folder / "back")
    assert (folder / "back").read_bytes() == large
    assert store.sha256("large") == hashlib.sha256(large).hexdigest()
    store.delete("small")
    with pytest.raises(KeyError):
        store.read("small")


FAULTS = {
    "a 500": faults.INTERNAL,
    "SlowDown": faults.SLOW_DOWN,
    "a full disk at the server": faults.NO_SPACE,
    "a connection reset at once": faults.refuse(),
    "an upload cut under way": faults.cut_request(3),
    "a download cut under way": faults.cut_response(2),
    "a lost answer": faults.drop_answer(),
    "a damaged body": faults.flip(2),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_verb_outlives(harm, bucket, tmp_path, s3, name):
    harm.plan = first_time(FAULTS[name])
    every_verb(Store(bucket, patience=30), tmp_path)
    assert harm.injected.total() > 5 and s3.unfinished_uploads(bucket) == []


def test_every_verb_works_in_a_storm_of_all_faults(harm, bucket, tmp_path, s3):
    harm.plan = Storm(seed=1, rates=[(fault, 0.05) for fault in FAULTS.values()])
    every_verb(Store(bucket, patience=60), tmp_path)
    assert harm.injected.total() > 3 and s3.unfinished_uploads(bucket) == []


def test_a_server_that_is_away_for_a_while_is_waited_for_and_said_once(harm, bucket, capfd):
    store = Store(bucket, patience=30)
    store.write("x", b"data")
    harm.down()
    back = threading.Timer(1.5, harm.up)
    back.start()
    assert store.read("x") == b"data"
    back.join()
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "trying again, up to 30 s" in lines[0] and "answers again, after" in lines[1]


def test_the_server_may_die_and_come_back_under_an_upload(s3, harm, bucket, tmp_path):
    (tmp_path / "large").write_bytes(os.urandom(6 * PART_BYTES))
    struck = threading.Event()
    harm.plan = lambda request: struck.set() if request.operation == "part" and request.number > 4 else None
    store = Store(bucket, patience=60)
    with ThreadPoolExecutor(1) as pool:
        uploading = pool.submit(store.upload, tmp_path / "large", "large")
        assert struck.wait(30)
        s3.restart()
        uploading.result(120)
    assert store.read("large") == (tmp_path / "large").read_bytes()


def test_when_patience_ends_the_error_says_how_long_it_tried(harm, bucket):
    harm.plan = Script(Rule(faults.SLOW_DOWN, times=None))
    with pytest.raises(StoreError, match=r"SlowDown.*tried [3-9] times in [12]\.\d s"):
        Store(bucket, patience=1).read("x")
    harm.down()
    with pytest.raises(StoreError, match=r"Could not connect.*tried \d times"):
        Store(bucket, patience=0.5).write("x", b"")


def test_patience_of_nothing_asks_once(harm, bucket, monkeypatch):
    harm.plan = Script(Rule(faults.INTERNAL, times=None))
    with pytest.raises(StoreError, match="tried once"):
        Store(bucket, patience=0).read("x")
    monkeypatch.setenv("RLHF_STORE_PATIENCE", "0")
    with pytest.raises(StoreError, match="tried once"):
        Store(bucket, patience=50).list("")
    assert harm.requests.total() == 2
    monkeypatch.setenv("RLHF_STORE_PATIENCE", "soon")
    with pytest.raises(ConfigError, match=r"RLHF_STORE_PATIENCE='soon'.*number of seconds"):
        Store(bucket)


def test_what_cannot_get_better_is_not_tried_again(harm, bucket, monkeypatch):
    with pytest.raises(KeyError):
        Store(bucket).read("absent")
    with pytest.raises(StoreError, match="NoSuchBucket"):
        Store("s3://no-such-bucket-here/x").read("absent")
    harm.plan = Script(Rule(faults.answer(403, "AccessDenied")))
    with pytest.raises(StoreError, match="AccessDenied"):
        Store(bucket).write("x", b"")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StoreError, match="SignatureDoesNotMatch"):
        Store(bucket).write("x", b"")
    assert harm.requests.total() == 4


def test_a_create_whose_answer_was_lost_has_succeeded_and_another_writers_has_not(harm, bucket):
    harm.plan = Script(Rule(faults.drop_answer(), "write", times=2))
    store = Store(bucket, patience=10)
    store.write("x", b"mine", create=True)
    with pytest.raises(AlreadyExists):
        store.write("x", b"mine", create=True)  # the same bytes, but another write
    harm.plan = Script(Rule(faults.drop_answer(), "write"))
    with pytest.raises(AlreadyExists):
        store.write("x", b"other", create=True)
    assert store.read("x") == b"mine" and harm.injected["drop-answer"] == 3


def test_only_the_part_that_failed_is_sent_again(harm, bucket, s3, tmp_path):
    harm.plan = Script(Rule(faults.cut_request(1 << 20), "part", skip=1))
    data = os.urandom(LARGE)
    Store(bucket, patience=10).write("large", data)
    assert harm.requests["part"] == 4 and harm.requests["begin-upload"] == 1
    assert Store(bucket).read("large") == data and s3.unfinished_uploads(bucket) == []


@pytest.mark.parametrize("operation", ["begin-upload", "complete-upload"])
def test_an_upload_whose_first_or_last_answer_was_lost_is_not_sent_twice(harm, bucket, s3, operation):
    harm.plan = Script(Rule(faults.drop_answer(), operation))
    data = os.urandom(LARGE)
    Store(bucket, patience=10).write("large", data)
    assert harm.injected["drop-answer"] == 1 and harm.requests["part"] == 3
    assert Store(bucket).read("large") == data and s3.unfinished_uploads(bucket) == []


def test_an_upload_that_fails_for_good_leaves_no_parts(harm, bucket, s3):
    harm.plan = Script(Rule(faults.INTERNAL, "part", times=None, skip=2))
    with pytest.raises(StoreError, match="tried"):
        Store(bucket, patience=0.3).write("large", b"x" * LARGE)
    assert s3.unfinished_uploads(bucket) == [] and Store(bucket).list("") == {}


@pytest.mark.parametrize("size", [1000, LARGE])
def test_the_server_refuses_what_was_damaged_under_way(harm, bucket, size):
    harm.plan = Script(Rule(faults.flip(500), "part" if size > PART_BYTES else "write", times=None))
    with pytest.raises(StoreError, match="BadDigest"):
        Store(bucket, patience=0.2).write("x", b"x" * size)
    assert Store(bucket).list("") == {}


@pytest.mark.parametrize("verb", ["read", "write", "upload"])
def test_a_server_that_stalls_is_noticed(harm, bucket, short_limits, tmp_path, verb):
    (tmp_path / "large").write_bytes(bytes(LARGE))
    store = Store(bucket, patience=20)
    store.write("x", b"data")
    harm.plan = Script(Rule(faults.stall(), {"upload": "part"}.get(verb, verb), times=2))
    calls = {
        "read": lambda: store.read("x"),
        "write": lambda: store.write("y", bytes(PART_BYTES)),
        "upload": lambda: store.upload(tmp_path / "large", "y"),
    }
    calls[verb]()
    assert harm.injected["stall"] == 2


def test_an_answer_that_only_trickles_has_a_limit(harm, bucket, short_limits):
    store = Store(bucket, patience=20)
    store.write("x", bytes(1000))
    harm.plan = Script(Rule(faults.trickle(0.2), "read"))
    assert store.read("x") == bytes(1000) and harm.requests["read"] == 2


def test_a_download_that_fails_leaves_no_file(harm, bucket, tmp_path):
    Store(bucket).write("large", bytes(LARGE))
    harm.plan = Script(Rule(faults.cut_response(1 << 20), "read", times=None, skip=1))
    with pytest.raises(StoreError):
        Store(bucket, patience=0.2).download("large", tmp_path / "folder" / "file")
    assert list((tmp_path / "folder").iterdir()) == []


def test_eight_threads_share_the_store_in_a_storm(harm, bucket, tmp_path):
    harm.plan = Storm(seed=2, rates=[(fault, 0.02) for fault in FAULTS.values()])

    def work(thread: int) -> None:
        store, dice = Store(f"{bucket}/{thread}", patience=60), random.Random(thread)
        for turn in range(6):
            data = dice.randbytes(dice.choice([10, 1000, PART_BYTES + 3]))
            store.write(f"w{turn}", data)
            assert store.read(f"w{turn}") == data and store.sha256(f"w{turn}") == hashlib.sha256(data).hexdigest()
            store.download(f"w{turn}", tmp_path / f"{thread}-{turn}")
            store.upload(tmp_path / f"{thread}-{turn}", f"u{turn}")
            assert store.list("")[f"u{turn}"] == len(data)
            store.delete(f"w{turn}")
        assert list(store.list("")) == [f"u{turn}" for turn in range(6)]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert harm.injected.total() > 10


def test_a_forked_process_has_a_connection_of_its_own(bucket):
    store = Store(bucket)
    store.write("x", b"data")
    child = os.fork()
    if not child:
        os._exit(0 if store.read("x") == b"data" else 1)
    end = time.monotonic() + 30
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    if not done[0]:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done == (child, 0)


def test_a_full_disk_is_an_error_with_the_systems_words_and_leaves_nothing(tmp_path, bucket):
    (tmp_path / "source").write_bytes(bytes(3 << 20))
    Store(bucket).write("large", bytes(3 << 20))
    place = Store(f"file://{tmp_path}/store")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # stands for a disk with that much room
    try:
        for call in (
            lambda: place.write("x", bytes(3 << 20)),
            lambda: place.upload(tmp_path / "source", "x"),
            lambda: Store(bucket).download("large", tmp_path / "store" / "x"),
        ):
            with pytest.raises(StoreError, match="File too large"):
                call()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize("url", ["s3://AKIAKEY:sec/ret@bucket/x", "s3://key:hidden@bucket", "https://me:hidden@host/b"])
def test_credentials_in_a_stores_url_are_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as caught:
        Store(url)
    assert not any(word in str(caught.value) for word in ("AKIAKEY", "ret@", "hidden", "me:"))


def test_no_message_holds_a_credential(harm, bucket, monkeypatch, capfd):
    words = ("rlhf-access-key", "rlhf-secret-key", "a-session-token")
    said = " ".join(["Credential=AKIAABCDEFGHIJKLMNOP/x", "Signature=0badc0de", *words])
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-session-token")
    harm.plan = Script(Rule(faults.answer(500, said), times=None))
    with pytest.raises(StoreError) as caught:
        Store(bucket, patience=0.2).read("x")
    text = f"{caught.value} {caught.value.__cause__} {caught.value.__context__} {capfd.readouterr().err}"
    assert "(AWS_SECRET_ACCESS_KEY)" in text
    assert not any(word in text for word in (*words, "AKIAABCDEFGHIJKLMNOP", "0badc0de"))
