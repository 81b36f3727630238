"""The rank's side of being told to end: a flag instead of a sudden death, so that the stage can save where it is.

Before `install` SIGTERM ends a rank at once; between `install` and `uninstall` it only sets what `requested` returns, and the
checkpointer looks there at every point from which the stage can be resumed. A thread also watches the notice that a cloud gives
before it takes a machine away: a file, or a URL of the metadata service. Under a guard, SIGTERM that does not come from it comes
from the launcher, because another rank has died: there is nothing to wait for then, and the rank ends at once, wherever it is,
saying that it was told (`listen`). Which ranks were told is theirs to agree on (`checkpointing`); what ends those that take too
long is the guard. No torch here.
"""

import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from rlhf_core.guard import TOLD
from rlhf_core.ranklog import last_words

FILE_SECONDS = 1.0  # between looks at a file
URL_SECONDS = 5.0  # between questions; clouds give 30 s (Google) to 120 s (Amazon)
TIMEOUT_SECONDS = 3.0
GUARD_SECONDS = 1.0  # who signals everything at once may reach a rank before the guard has left it
NOT_YET = ("FALSE", "NONE", "")  # what Google's metadata service answers while nothing is planned
SIGNALS = (signal.SIGTERM, signal.SIGINT)

_reason: str | None = None
_before: dict[int, Any] = {}  # what the signals did before `install`
_held = threading.local()  # the signals that a thread had blocked before it forked
_installed = False
_listening = False
_watch: threading.Event | None = None  # set: the thread that watches the notice is to end


def install(notice: str | None = None) -> None:
    """From now on SIGTERM and SIGINT, or the notice, only set what `requested` returns; nothing in another than the main thread.

    Args:
        notice: a file that appears, or an http(s) URL that answers 200, when this machine is about to be taken away.
    """
    global _watch, _installed
    if threading.current_thread() is not threading.main_thread():
        return  # of a library's user: signals are his business
    listen()
    _installed = True
    for signo in SIGNALS:
        before = signal.signal(signo, _told)
        if before is not _told:
            _before[signo] = before
    if notice and _watch is None:
        _watch = threading.Event()
        threading.Thread(target=_watch_notice, args=(notice, _watch), daemon=True, name="notice").start()


def uninstall() -> None:
    """SIGTERM and SIGINT mean again what they did before; the notice is no longer watched, and what was requested forgotten."""
    global _watch, _reason, _installed
    _installed = False
    for signo, before in _before.items():
        signal.signal(signo, before)
    _before.clear()
    _reason = None
    if _watch is not None:
        _watch.set()
        _watch = None


def requested() -> str | None:
    """Why this job is to end, e.g. "received SIGTERM"; None: go on."""
    return _reason


def _told(signo: int, _: Any) -> None:
    _set(f"received {signal.Signals(signo).name}")


def _set(reason: str) -> None:
    global _reason
    _reason = _reason or reason  # told twice is told once: the launcher passes on what the guard has sent already


def listen() -> None:
    """Under a guard, notice SIGTERM also while the main thread is inside a call that never returns, as a collective without one
    rank; and say, when it ends this rank, that it was told to end.
    """
    global _listening
    guard, folder = os.environ.get("RLHF_GUARD_PID"), os.environ.get("RLHF_SCRATCH")
    if _listening or not (guard and folder):
        return
    _listening = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, _told)
    os.register_at_fork(before=_hold, after_in_parent=_release, after_in_child=_forget)

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] != signal.SIGTERM or (_installed and _appears(Path(folder, TOLD), GUARD_SECONDS)):
                continue
            last_words(128 + signal.SIGTERM, "received SIGTERM", told=True)
            os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True, name="signals").start()


def _hold() -> None:
    """Before a fork: until the child has its own signals, one that is sent to it must not come out at this rank's pipe."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _release() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


def _forget() -> None:
    """In a child that was forked without exec: its signals are not this rank's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _release()


def _appears(file: Path, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


# --- the notice ------------------------------------------------------------------------------------------------------


def _watch_notice(notice: str, over: threading.Event) -> None:
    remote = notice.startswith(("http://", "https://"))
    troubled = False
    while not over.wait(URL_SECONDS if remote else FILE_SECONDS):
        try:
            given = answers(notice) if remote else Path(notice.removeprefix("file://")).exists()
        except (OSError, HTTPException) as error:
            if not troubled:
                print(f"the notice {notice} cannot be asked for: {error}; asking on", file=sys.stderr, flush=True)
            troubled = True
            continue
        if given:
            _set(f"notice at {notice}")
            return


def answers(url: str) -> bool:
    """Whether the metadata service says that this machine is about to be taken away.

    Amazon's answers 404 until then, and may want a token first; Google's always answers, with FALSE or NONE until then.

    Raises:
        OSError: it cannot be reached, or answers neither 200, 401 nor 404.
    """
    try:
        return _ask(url, {})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        if error.code != 401:
            raise
    token = _get(urljoin(url, "/latest/api/token"), {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
    try:
        return _ask(url, {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return False
        raise


def _ask(url: str, headers: dict[str, str]) -> bool:
    return _get(url, {"Metadata-Flavor": "Google", **headers}).strip().upper() not in NOT_YET


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    # The metadata service is of this machine: no proxy reaches it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=headers, method=method)
    with opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
        return answer.read(4096).decode(errors="replace")
