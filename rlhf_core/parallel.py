"""Several calls at once in threads: reading, hashing and sending wait for disks and servers, not for Python.

One function, so that all who use it end in the same way: the results in order, or the first error, with nothing still running.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
THREADS = 8


def in_threads(call: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> list[R]:
    """`call` of every item, in the items' order. The first error is raised, after what has begun has ended."""
    pool = ThreadPoolExecutor(threads)
    try:
        return list(pool.map(call, items))
    finally:
        pool.shutdown(cancel_futures=True)
