"""The nodes of one attempt and what they tell each other, through the store alone.

Each node writes its `NodeBeat` every `BEAT_SECONDS` to `{attempt}/nodes/NNNN.json`, the head its `Orders` to
`{attempt}/orders.json`; each reads the other's. A beat that stands still for `LOST_SECONDS` on the reader's own clock, while
the store answers the reader, is a lost member's. An attempt goes through four orders:

    report   every node checks itself, ends what earlier attempts left on it and says what it has found      -> ready
    meet     every node tries to reach node 0 at the addresses and the port that it has named                -> met
    go       every node starts its ranks under a guard                                                      -> running
    end      every node ends them, which lets them save first if there is a grace                            -> ended

A node whose head falls silent ends by itself; so does one that reaches neither the store nor any other node for
`LOST_SECONDS`. Progress and lines of ranks travel with the beats for people to look at; whole logs are stored by the nodes.
"""

import json
import os
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_core.ends import NodeEnd
from rlhf_core.store import Store

BEAT_SECONDS = float(os.environ.get("RLHF_NODE_BEAT", "2"))
LOST_SECONDS = float(os.environ.get("RLHF_NODE_LOST", "15"))
LINES = 400  # of its ranks that a beat carries; those that came before are in the stored logs

Order = Literal["report", "meet", "go", "end"]
State = Literal["checking", "ready", "met", "running", "ended"]
M = TypeVar("M", bound="Message")


class Message(BaseModel):
    """Read by nodes of other versions too, before they are refused: what they do not know they ignore."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Facts(Message):
    """What a node found out about itself; compared with the head's own and with what the job needs (`preflight`)."""

    host: str
    addresses: tuple[str, ...] = ()
    python: str
    versions: dict[str, str] = Field(
        description="torch, deepspeed, transformers, … and code: the digest of our own source"
    )
    accelerator: str = Field(description="what deepspeed computes on")
    devices: int = Field(description="GPUs; 0 on CPUs")
    cores: int
    memory_free: int = Field(description="bytes")
    disk_free: int = Field(description="bytes where a job's local files go")
    clock: float = Field(description="seconds since the epoch")
    ended: tuple[int, ...] = Field(default=(), description="processes of earlier attempts that were ended here")
    problems: tuple[str, ...] = Field(default=(), description="what would make the job fail here, each with its remedy")


class Seat(Message):
    """A node's place among the ranks."""

    node: int
    host: str
    processes: int
    first_rank: int
    devices: tuple[int, ...] = Field(default=(), description="GPUs to show its ranks; empty: the first ones")
    env: dict[str, str] = {}


class Orders(Message):
    """What the head wants of all nodes; also the sign that it lives."""

    job_id: str
    beat: int
    order: Order
    seats: tuple[Seat, ...] = ()
    module: str = Field(default="rlhf_core.train", description="what every rank runs")
    master_addr: str = ""
    master_port: int = 0
    candidates: tuple[str, ...] = Field(default=(), description="meet: addresses of node 0")
    probe_port: int = Field(default=0, description="meet: where node 0 listens for as long as it lives")
    peers: dict[int, tuple[tuple[str, ...], int]] = Field(
        default={}, description="go: addresses and probe port of every node, by which the others see that it lives"
    )
    stacks: int = Field(default=0, description="when it grows, every rank dumps the stacks of its threads")
    reason: str = ""
    grace: float | None = Field(
        default=None, description="end: seconds for ranks to save; 0: kill them; None: the plan's"
    )


class RankState(Message):
    """A rank as its node sees it."""

    step: int | None = None
    total: int | None = None
    phase: str | None = None
    age: float = Field(default=0.0, description="seconds since it last told of progress")
    memory: int = Field(default=0, description="bytes resident")
    stopped: bool = Field(default=False, description="halted by a signal (SIGSTOP)")


class NodeBeat(Message):
    """What a node says of itself."""

    node: int
    incarnation: str = Field(description="another one under the same number is a node that was started anew")
    beat: int
    state: State
    facts: Facts | None = None
    probe_port: int = 0
    master_port: int = Field(default=0, description="free on this node; held until `go`")
    reached: tuple[str, ...] = Field(default=(), description="met: the candidates it could reach")
    ranks: dict[int, RankState] = {}
    events: tuple[tuple[int, dict[str, Any]], ...] = Field(
        default=(), description="(number, event) of rank 0, newest last"
    )
    lines: tuple[tuple[int, float, int | None, str], ...] = Field(
        default=(), description="(number, time, rank or None for the launcher, text), newest last"
    )
    end: NodeEnd | None = None


def beat_key(folder: str, node: int) -> str:
    """Where a node's beat lies; `folder` is the attempt's in the store."""
    return f"{folder}/nodes/{node:04d}.json"


def orders_key(folder: str) -> str:
    """Where the head's orders lie."""
    return f"{folder}/orders.json"


def write(store: Store, key: str, message: Message) -> None:
    """Store a message, over the one before."""
    store.write(key, message.model_dump_json().encode())


def read_beat(store: Store, folder: str, node: int) -> NodeBeat | None:
    """The node's last beat; None if there is none, or none that can be read."""
    return _read(NodeBeat, store, beat_key(folder, node))


def read_orders(store: Store, folder: str) -> Orders | None:
    """The head's last orders; None if there are none, or none that can be read."""
    return _read(Orders, store, orders_key(folder))


def call(store: Store, name: str, folder: str) -> None:
    """Call the nodes that wait for jobs of pipelines with this name to an attempt."""
    store.write(f"calls/{name}.json", json.dumps({"attempt": folder}).encode())


def called(store: Store, name: str) -> str | None:
    """The folder of the attempt that nodes were last called to; None if they were to none."""
    try:
        return json.loads(store.read(f"calls/{name}.json"))["attempt"]
    except (KeyError, ValueError):
        return None


def newest_attempt(store: Store, artifact: str) -> str | None:
    """The folder of the newest attempt at the artifact of this id that has a job.json; None if there is none."""
    keys = store.list(f"{artifact}/attempts")
    return max((key.removesuffix("/job.json") for key in keys if key.endswith("/job.json")), default=None)


def _read(kind: type[M], store: Store, key: str) -> M | None:
    try:
        return kind.model_validate_json(store.read(key))
    except (KeyError, ValidationError):
        return None
