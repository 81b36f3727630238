"""Follow the log of a stage in the store: lines as they come, through attempts, until it is published or has failed for good.

The end is told by the store alone. An attempt that failed of what another one may not suffer from is waited after: for as long as
its run would wait before a retry, and some time more. An artifact that nobody has begun is waited for without end.
"""

import time
from collections.abc import Callable, Iterable

from rich.markup import escape

from flows.show import err
from rlhf_core.errors import ConfigError, ExitCode, StoreError
from rlhf_core.failures import RULES
from rlhf_core.follow import Attempt, is_published
from rlhf_core.ranklog import Line
from rlhf_core.sight import failure_line
from rlhf_core.store import Store

LOCAL_SECONDS, REMOTE_SECONDS = 1.0, 10.0  # between two looks; elsewhere each is paid for, and logs come every minute


def follow(
    store: Store, id: str, show: Callable[[Iterable[Line]], object], tail: int | None = None, only: int | None = None
) -> int:
    """Follow until the end; returns the exit code that tells it.

    Args:
        store: of the artifact.
        id: of it.
        show: is given the lines as they come.
        tail: of the lines that are there at first, how many to show; None: all.
        only: end with this attempt; None: go on with those after it.

    Raises:
        ConfigError: there is no such attempt, though there are later ones.
    """
    following = _Following(store, id, show, tail, only)
    while True:
        try:
            if (code := following.step()) is not None:
                return code
        except StoreError as error:
            err.print(f"[yellow]{escape(str(error))}; going on[/]", soft_wrap=True)
        time.sleep(LOCAL_SECONDS if store.scheme == "file" else REMOTE_SECONDS)


class _Following:
    """What is followed now, and what has been told of it."""

    def __init__(
        self, store: Store, id: str, show: Callable[[Iterable[Line]], object], tail: int | None, only: int | None
    ) -> None:
        self.store, self.id, self.show, self.tail, self.only = store, id, show, tail, only
        self.attempt: Attempt | None = None
        self.told = ""  # how this attempt ended, or that there is none

    def step(self) -> int | None:
        """Look once and show what is new; returns the exit code at the end."""
        listed = self.store.list(f"{self.id}/attempts")
        newest = self._newest(listed)
        folder = newest if self.only is None else f"{self.id}/attempts/{self.only:04d}"
        if folder is None or f"{folder}/job.json" not in listed:
            if folder and newest and newest > folder:
                raise ConfigError(f"{self.id}: there is no attempt {self.only} in {self.store.url}")
            if newest is None and is_published(self.store, self.id):  # made elsewhere, and copied without its logs
                return self._published()
            self._tell(f"{escape(self.id)}: waiting for {f'attempt {self.only}' if self.only else 'its first attempt'}")
            return None
        if self.attempt is None or self.attempt.folder != folder:
            if self.attempt:
                self._show_new(listed)
            self.attempt = Attempt(self.store, folder)
            self._tell(f"[bold]--- {escape(self.id)}, attempt {self.attempt.number} ---[/]")
        self.attempt.look(listed)
        if self.attempt.over:  # what it leaves is stored before its end is told: from now on the log is whole
            listed = self.store.list(f"{self.id}/attempts")
        self._show_new(listed)
        return self._end(self.attempt) if self.attempt.over else None

    def _show_new(self, listed: dict[str, int]) -> None:
        assert self.attempt is not None
        lines = self.attempt.new_lines(listed)
        if lines:
            self.show(lines if self.tail is None else lines[max(0, len(lines) - self.tail) :])
            self.tail = None

    def _end(self, attempt: Attempt) -> int | None:
        failure, last = attempt.failure, self.only is not None
        if not (last and failure) and is_published(self.store, self.id):
            return self._published()
        how = f"[red]attempt {attempt.number}:[/] {escape(failure_line(failure) if failure else f'ended {attempt.ended}')}"
        patience = 0.0 if last or (failure and not RULES[failure.kind].retry) else attempt.patience()
        left = patience - attempt.age()
        if left > 0:
            self._tell(f"{how}; waiting for another attempt")
            return None
        self._tell(how)
        if patience:
            self._tell(f"no other attempt has begun for {patience:.0f} s")
        code = failure.code if failure else ExitCode.PREEMPTED if attempt.stopped else 1
        return code if 0 < code < 256 else 1

    def _published(self) -> int:
        self._tell(f"[green]published[/] {self.store.url}/{escape(self.id)}")
        return 0

    def _tell(self, line: str) -> None:
        """A line of ours, once."""
        if line != self.told and not self.told.startswith(f"{line};"):
            err.print(line, soft_wrap=True)
        self.told = line

    def _newest(self, listed: dict[str, int]) -> str | None:
        folders = [key.removesuffix("/job.json") for key in listed if key.endswith("/job.json")]
        return max(folders, key=lambda folder: int(folder.rpartition("/")[2]), default=None)
