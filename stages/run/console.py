"""What people see while they wait."""
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from stages.run.manifest import is_main

T = TypeVar("T")


def clock(seconds: float) -> str:
    """`75` as `1m15s`."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{secs:02d}s" if minutes else f"{secs}s"


def progress(items: Iterable[T], what: str, *, total: int | None = None) -> Iterable[T]:
    """A bar with ETA on the main process; in a log file, a line every ten seconds at most."""
    from tqdm import tqdm

    pause = 0.5 if sys.stderr.isatty() else 10.0
    return tqdm(items, desc=what, total=total, disable=not is_main(), mininterval=pause, delay=pause, dynamic_ncols=True, leave=False)


class Timer:
    """Wall and processor seconds of named pieces of work, all threads together: `with timer("reading"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, processor = time.monotonic(), time.process_time()
        yield
        self.seconds[name] = {"wall": round(time.monotonic() - wall, 3), "processor": round(time.process_time() - processor, 3)}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Plain text columns, aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
