"""`rlhf node`: serve as a node of jobs with launcher `nodes`, attempt after attempt, until none has come for a while.

For Kubernetes and other systems that start the same command on every machine. The control plane says in the store which
attempt nodes are wanted for; a node that is started anew joins the next one.
"""

import os
import signal
import threading
import time
from typing import Annotated

import typer

from flows.show import err
from flows.targets import DEFAULT_STORE
from rlhf_core.errors import ConfigError
from rlhf_core.members import called, read_orders
from rlhf_core.store import Store

LOOK_SECONDS = 2.0
NUMBERS = ("JOB_COMPLETION_INDEX", "SLURM_NODEID", "NODE_RANK")


def node(
    name: Annotated[str, typer.Argument(metavar="NAME", help="the pipeline's name, as in its configuration")],
    store: Annotated[str, typer.Option("--store", metavar="URL", help="the pipeline's store")] = DEFAULT_STORE,
    number: Annotated[
        int | None,
        typer.Option("--node", metavar="N", min=0, help=f"number of this node; default: from {', '.join(NUMBERS)}"),
    ] = None,
    idle_minutes: Annotated[
        float, typer.Option("--idle-minutes", min=0.1, help="end when no job has come for so long")
    ] = 30,
) -> None:
    """Run this machine's part of every job of a pipeline whose launcher is [bold]nodes[/]."""
    from rlhf_core.node import SIGNALS, serve

    place, mine = Store(store), number if number is not None else _number()
    err.print(f"node {mine} of {name}: waiting for jobs in {place.url}")
    over: str | None = None
    last = time.monotonic()
    told = threading.Event()
    for signo in SIGNALS:
        signal.signal(signo, lambda *_: told.set())
    while not told.is_set() and time.monotonic() - last < idle_minutes * 60:
        folder = called(place, name)
        orders = read_orders(place, folder) if folder and folder != over else None
        if folder is None or orders is None or orders.order == "end" or mine >= len(orders.seats):
            told.wait(LOOK_SECONDS)
            continue
        err.print(f"node {mine}: {folder}")
        code = serve(place, folder, mine, attached=False)
        err.print(f"node {mine}: {folder} ended here with code {code}")
        over, last = folder, time.monotonic()
    err.print(f"node {mine}: {'told to end' if told.is_set() else f'no job for {idle_minutes:g} minutes'}; ending")


def _number() -> int:
    for variable in NUMBERS:
        if (text := os.environ.get(variable, "")).isdigit():
            return int(text)
    raise ConfigError(f"--node: give this node's number; none of {', '.join(NUMBERS)} holds one")
