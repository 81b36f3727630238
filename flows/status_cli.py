"""`rlhf status`: what runs and what there is, from the store alone, with the runs of a Prefect server below if one answers.

Once, or again and again: in place on a terminal, else one line for each artifact that has changed. Nothing here starts, stops or
writes anything. A store that cannot be reached ends a single look, and a watch goes on and says so.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from flows.evaluation import Set, StoreOption
from flows.prefect_runs import SECONDS, Asking, Runs
from flows.prefect_runs import as_json as runs_as_json
from flows.show import err, out
from flows.show_status import as_json, clock, plain_line, run_lines, status_lines
from flows.targets import DEFAULT_STORE
from rlhf_core.artifacts import ArtifactRef
from rlhf_core.config import PipelineConfig, load_config
from rlhf_core.errors import StoreError
from rlhf_core.lease import BEAT_SECONDS
from rlhf_core.plan import stage_inputs, stage_refs
from rlhf_core.sight import Sight
from rlhf_core.status import Status
from rlhf_core.store import Store

MOST = 20  # artifacts of a whole store, unless all are asked for
LOCAL_SECONDS = (
    2.0  # between two looks at a local folder; elsewhere a look is paid for, and there is nothing new between beats
)
WATCH_PATIENCE = 10.0  # seconds for which a watch's request to S3 is tried again


def status(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="a pipeline YAML: only its stages, also those not begun")
    ] = None,
    store: StoreOption = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="again and again, until Ctrl-C")] = False,
    every: Annotated[
        float | None,
        typer.Option(
            "--every", min=0.2, metavar="SECONDS", help="with --watch; default 2, or 10 where the store is S3"
        ),
    ] = None,
    all_of_it: Annotated[bool, typer.Option("--all", help=f"also more than the {MOST} artifacts touched last")] = False,
    as_data: Annotated[bool, typer.Option("--json", help="as JSON; with --watch one document a line")] = False,
    sets: Set = None,
) -> None:
    """Show what runs, how far it is, and what there is. Read from the store, wherever jobs run.

    [bold]States[/]

      running        a job gives signs of life (column seen: how long ago)
      waiting        for a stage before it, which runs
      resumable      nothing runs; the next `rlhf run` goes on from this checkpoint
      failed         the line below says why
      stopped        nothing runs, and nothing was saved; the next run begins anew
      stale lease    who built it fell silent; the next run takes over
      published      finished; later runs reuse it

    Runs of the Prefect server that PREFECT_API_URL or the active profile names are listed
    below, if it answers within a few seconds.
    """
    loaded = load_config(config, sets or ()) if config else None
    place = Store(store or (loaded.store if loaded else DEFAULT_STORE), WATCH_PATIENCE if watch else None)
    seen = Status(place, _scope(loaded) if loaded else None)
    with Asking() as asking:
        view = _View(seen, asking, None if all_of_it or loaded else MOST)
        if watch:
            _watch(view, every or (LOCAL_SECONDS if place.scheme == "file" else BEAT_SECONDS), as_data)
        else:
            _once(view, as_data)


def _watch(view: "_View", seconds: float, as_data: bool) -> None:
    """Look again and again until Ctrl-C."""
    try:
        if as_data:
            _repeat(view, seconds, lambda: print(json.dumps(view.data()), flush=True))
        elif out.is_terminal:
            _live(view, seconds)
        else:
            _repeat(view, seconds, view.tell_changes)
    except KeyboardInterrupt:
        err.print("no longer watching; what runs goes on")


def _scope(config: PipelineConfig) -> dict[ArtifactRef, Sequence[ArtifactRef]]:
    refs = stage_refs(config)
    return {ref: [refs[name] for name in stage_inputs(config, stage)] for stage, ref in refs.items()}


class _View:
    """What is shown, as it was at the last look."""

    def __init__(self, status: Status, asking: Asking, most: int | None) -> None:
        self.status, self.asking, self.most = status, asking, most
        self.sights: list[Sight] = []
        self.runs: Runs | None = None
        self.trouble = ""
        self._told: dict[str, str] = {}

    def look(self, wait: float = 0.0) -> None:
        """Look at the store and ask the server, which is waited for at most so many seconds."""
        self.asking.ask()
        self.sights = self.status.look()
        self.runs = self.asking.answer(wait)

    def try_to_look(self) -> None:
        """Look, and note why if that is not possible: what was seen before stands."""
        try:
            self.look()
            self.trouble = ""
        except StoreError as error:
            self.trouble = f"{clock()} the store cannot be reached: {error}"

    def data(self) -> dict[str, Any]:
        """All of it as plain data."""
        asked = {"lists": self.status.lists, "reads": self.status.reads}
        stages = [as_json(sight) for sight in self.sights]
        return {
            "store": self.status.store.url,
            "stages": stages,
            "prefect": runs_as_json(self.runs),
            "requests": asked,
            "trouble": self.trouble or None,
        }

    def lines(self, width: int, most: int | None = None) -> list[Text]:
        """The table with what belongs below it, of at most so many artifacts, the last ones."""
        counts = [count for count in (self.most, most) if count is not None]
        shown = self.sights[-max(1, min(counts)) :] if counts else self.sights
        hidden = len(self.sights) - len(shown)
        found = status_lines(shown, width) if shown else [Text(f"nothing in {self.status.store.url}")]
        if hidden:
            found.insert(0, Text(f"({hidden} that were touched earlier are not shown: --all)", style="dim"))
        found += run_lines(self.runs, width)
        if self.trouble:
            found.append(Text(self.trouble, style="bold red", overflow="fold"))
        return found

    def tell_changes(self) -> None:
        """One line for each artifact that looks otherwise than before."""
        for sight in self.sights:
            line = plain_line(sight)
            if self._told.get(sight.id) != line:
                self._told[sight.id] = line
                print(f"{clock()} {line}", flush=True)
        if self.trouble and self._told.get("") != self.trouble:
            print(self.trouble, flush=True)
        self._told[""] = self.trouble


def _once(view: _View, as_data: bool) -> None:
    view.look(SECONDS)
    if as_data:
        print(json.dumps(view.data(), indent=1))
        return
    for line in view.lines(out.width):
        out.print(line, soft_wrap=True)


def _repeat(view: _View, seconds: float, show: Callable[[], object]) -> None:
    while True:
        view.try_to_look()
        show()
        time.sleep(seconds)


def _live(view: _View, seconds: float) -> None:
    """In place; of more artifacts than the terminal has room for, the last ones."""
    with Live(console=out, auto_refresh=False, transient=False) as live:

        def show() -> None:
            requests = f"{view.status.lists} listings, {view.status.reads} reads of {view.status.store.url}"
            foot = Text(
                f"{clock()} UTC, every {seconds:g} s, Ctrl-C ends; {requests}", style="dim", overflow="ellipsis"
            )
            foot.no_wrap = True
            lines, most = view.lines(out.width), len(view.sights)
            while len(lines) + 2 > out.height and most > 1:
                lines = view.lines(out.width, most := most - 1)
            live.update(Group(*lines, Text(), foot), refresh=True)

        _repeat(view, seconds, show)
