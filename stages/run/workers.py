"""Work on many items by several processes, its results in the order of the items."""
import ctypes
import itertools
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from stages.run.entry import cores

T = TypeVar("T")
R = TypeVar("R")
ALONE_S = 1.0  # less work than this is not worth processes
AHEAD = 3  # items for each worker on their way: enough that none waits, few enough for memory

_work: Any = None  # in a worker, what it does


def spread(work: Callable[[T], R], items: Iterable[T], workers: int | None) -> Iterator[tuple[T, R]]:
    """Each item with `work(item)`, in order. After the first second's worth `workers` processes do it (None: one a core), if more than one.

    They are forked, so `work` may be anything and begins with what it has learned in that second; items and results are pickled.
    Raises ValueError when a worker is killed. A worker goes with this process, however that ends.
    """
    items, began = iter(items), time.monotonic()
    count = cores() if workers is None else workers
    for item in items:
        yield item, work(item)
        if count > 1 and time.monotonic() - began > ALONE_S:
            break
    for first in items:
        yield from _forked(work, itertools.chain([first], items), count)


def _forked(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[tuple[T, R]]:
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin, (work, os.getpid()))
    waiting: deque[tuple[T, Future]] = deque()
    threads = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    try:
        for item in items:
            waiting.append((item, pool.submit(_call, item)))  # the first one forks
            if len(waiting) > AHEAD * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, perhaps for want of memory: give fewer with --workers (1: none)") from None
    finally:
        pool.shutdown(cancel_futures=True)
        del os.environ["TOKENIZERS_PARALLELISM"]
        if threads is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = threads


def _begin(work: Callable, parent: int) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, too, which ends its workers
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _call(item: Any) -> Any:
    return _work(item)
