"""Faults from inside a rank, for tests: found on PYTHONPATH by its interpreter, it waits for a file that names what is to happen.

`~/fault-N`, for rank N, with one word: "raise", "eat" (memory, until it is killed) or "segfault".
"""

import ctypes
import os
import threading
import time
from pathlib import Path


def _wait(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)
    what = file.read_text().strip()
    file.unlink()
    if what == "raise":
        main = threading.main_thread().ident
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main or 0), ctypes.py_object(MemoryCorrupted))
    elif what == "eat":
        eaten = []
        while True:
            eaten.append(bytearray(os.urandom(1 << 20)) * 16)
    elif what == "segfault":
        ctypes.string_at(0)


class MemoryCorrupted(RuntimeError):
    """What a rank raises that was told to."""


if rank := os.environ.get("RANK"):
    threading.Thread(target=_wait, args=(Path.home() / f"fault-{rank}",), daemon=True).start()
