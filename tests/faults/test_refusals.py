"""`rlhf run` on hosts that cannot take part: one message that names the host and the remedy, exit code 2, and nothing trains.

Each case is the real command with the real hosts (network namespaces; needs root) and prints how long it took to say no.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hosts import Hosts
from nodes import NodeRun
from pipeline import ROOT, Pipeline, command
from s3 import S3Server

pytestmark = [pytest.mark.faults, pytest.mark.timeout(600)]

FAKE = "mkdir -p fake/deepspeed-0.1.dist-info && echo 'Version: 0.1' > fake/deepspeed-0.1.dist-info/METADATA"
OTHER = f"mkdir other && cp -r {ROOT}/rlhf_core other/ && echo '# changed' >> other/rlhf_core/errors.py"
BARE = f"echo 'exec {sys.executable} -S \"$@\"' > bare && chmod +x bare"  # no installed packages


@dataclass(frozen=True)
class Refusal:
    """One thing that is wrong.

    Attributes:
        said: what the one message must say.
        cluster: changes of `resources.cluster`.
        prepare: run in a shell on node2 before.
        more: other settings.
    """

    said: tuple[str, ...]
    cluster: Callable[[Hosts], dict[str, Any]]
    prepare: str = "true"
    more: tuple[str, ...] = ()


REFUSALS = {
    "wrong host name": Refusal(
        ("nosuchhost: Could not resolve hostname", "correct the name"),
        lambda _: {"hosts": [{"host": "node1"}, {"host": "nosuchhost"}]},
    ),
    "closed port": Refusal(
        ("port 2222: Connection refused", "name its port"),
        lambda hosts: {"ssh": [hosts.ssh[0], "-p", "2222", *hosts.ssh[1:]]},
    ),
    "missing package": Refusal(
        ("the package 'pydantic' is not installed", "pip install -c constraints.txt -e ."),
        lambda _: {"python": "/root/bare"},
        BARE,
    ),
    "another version of deepspeed": Refusal(
        ("node2: deepspeed 0.1, but", "pip install"),
        lambda _: {"hosts": [{"host": "node1"}, {"host": "node2", "env": {"PYTHONPATH": "/root/fake"}}]},
        FAKE,
    ),
    "another version of this package": Refusal(
        ("node2: another source of rlhf_core",),
        lambda _: {"hosts": [{"host": "node1"}, {"host": "node2", "env": {"PYTHONPATH": "/root/other"}}]},
        OTHER,
    ),
    "slots that do not fit": Refusal(
        ("node2 has 1 slots", "resources.processes is 2", "lower"),
        lambda _: {"hosts": [{"host": "node1", "slots": 2}, {"host": "node2", "slots": 1}]},
        more=("resources.processes=2", "resources.stages.sft.processes=2"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_host_that_cannot_take_part_is_one_message_and_exit_code_2(
    name: str, undisturbed: Pipeline, hosts: Hosts, hosts_s3: S3Server, tmp_path: Path
):
    case = REFUSALS[name]
    run = NodeRun(undisturbed, "sft", hosts, hosts_s3, tmp_path)
    hosts.run("node2", ["sh", "-c", case.prepare], check=True)
    hosts.run("node1", ["sh", "-c", case.prepare], check=True)
    cluster = {"hosts": [{"host": "node1"}, {"host": "node2"}], "ssh": list(hosts.ssh), **case.cluster(hosts)}
    sets = (*run.overrides(stall=60), *case.more, f"resources.cluster={json.dumps(cluster)}")
    began = time.monotonic()
    argv = command("sft", run.store, *sets, cli=True)
    done = subprocess.run(argv, cwd=ROOT, env=run.environment, capture_output=True, text=True, timeout=300)
    print(f"{name}: refused after {time.monotonic() - began:.1f} s", flush=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(said) == 1, done.stdout + done.stderr
    assert [part for part in case.said if part not in said[0]] == []
    assert "Traceback" not in done.stderr and not run.living()
