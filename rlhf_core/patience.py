"""Try again what a storage refused for now: exponential back-off with jitter, for a limited time, said once on stderr.

Each request has its own time, counted from its first failure, so that a long transfer outlives many short outages. What is worth
another try the caller decides. Runs on one event loop; what is said is counted over all requests of one store.
"""

import asyncio
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rlhf_core.credentials import scrub
from rlhf_core.errors import ConfigError

T = TypeVar("T")
DEFAULT_SECONDS = 120.0
VARIABLE = "RLHF_STORE_PATIENCE"
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0
SAY_EVERY_SECONDS = 30.0
LONGEST_REASON = 300  # characters: an answer that is no XML is in the error whole


class GaveUp(Exception):
    """The last failure, after `tries` in `seconds`."""

    def __init__(self, error: Exception, tries: int, seconds: float) -> None:
        super().__init__(str(error))
        self.error, self.tries, self.seconds = error, tries, seconds


def patience_seconds(given: float | None) -> float:
    """How long to try: RLHF_STORE_PATIENCE, else `given`, else 120 s. ConfigError: not a number of seconds."""
    text = os.environ.get(VARIABLE)
    try:
        seconds = float(text) if text else DEFAULT_SECONDS if given is None else given
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"{VARIABLE}={text or given!r}: must be a number of seconds, 0 to try once only")
    return seconds


class Patience:
    """Tries of all requests to one place.

    Attributes:
        seconds: how long each request is tried again after its first failure; 0: once only.
        place: for what is said.
    """

    def __init__(self, seconds: float, place: str) -> None:
        self.seconds, self.place = seconds, place
        self._waiting = 0
        self._since = 0.0
        self._said: float | None = None
        self._open = False

    async def keep(
        self,
        what: str,
        call: Callable[[int], Awaitable[T]],
        passes: Callable[[Exception], bool],
        seconds: float | None = None,
    ) -> T:
        """The result of `call(tries so far)`; while it fails with what `passes`, again.

        Args:
            what: the request, for what is said.
            call: makes the request.
            passes: whether a failure is worth another try.
            seconds: instead of the patience of all.

        Raises:
            GaveUp: it failed to the end. What does not pass is raised as it is.
        """
        limit = self.seconds if seconds is None else seconds
        began, failed, tries = time.monotonic(), None, 0
        answered = False
        try:
            while True:
                try:
                    result = await call(tries)
                    answered = True
                    return result
                except Exception as error:
                    if not passes(error):
                        raise
                    tries, now = tries + 1, time.monotonic()
                    left = limit - (now - (failed or now))
                    if left <= 0:
                        raise GaveUp(error, tries, now - began) from None
                    if failed is None:
                        failed = now
                        self._begin(what, error, limit)
                pause = min(FIRST_PAUSE_SECONDS * 2 ** min(tries - 1, 10), LONGEST_PAUSE_SECONDS)
                await asyncio.sleep(min(pause * random.uniform(0.5, 1.0), left))
        finally:
            if failed is not None:
                self._end(answered)

    def _begin(self, what: str, error: Exception, limit: float) -> None:
        self._waiting += 1
        now = time.monotonic()
        if self._waiting > 1 or (self._said is not None and now - self._said < SAY_EVERY_SECONDS):
            return
        self._said, self._since, self._open = now, now, True
        reason = " ".join(scrub(f"{type(error).__name__}: {error}").split())[:LONGEST_REASON]
        print(
            f"store {self.place}: {what} failed ({reason}); trying again, up to {limit:g} s",
            file=sys.stderr,
            flush=True,
        )

    def _end(self, answered: bool) -> None:
        self._waiting -= 1
        if self._open and not self._waiting:
            self._open = False
            spent = time.monotonic() - self._since
            if answered:  # else the error says it
                print(f"store {self.place}: answers again, after {spent:.1f} s", file=sys.stderr, flush=True)
