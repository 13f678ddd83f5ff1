"""What people see while they wait."""
import resource
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


def progress(items: Iterable[T], what: str, *, total: int | None = None, unit: str = "it") -> Iterable[T]:
    """A bar with ETA on the main process; in a log file, a line every ten seconds at most. `unit` B: bytes."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    pause = 0.5 if terminal else 10.0
    return tqdm(items, desc=what, total=total, unit=unit, unit_scale=unit == "B", disable=not is_main(), mininterval=pause, delay=pause,
                dynamic_ncols=True, leave=False, file=sys.stderr if terminal else _Lines())


class _Lines:
    """Standard error for a bar that cannot be overwritten: with its carriage returns it would run into what is printed next."""

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


class Timer:
    """Wall and processor seconds of named pieces of work, all threads and ended processes together: `with timer("reading"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wall, processor = time.monotonic(), processor_s()
        yield
        self.seconds[name] = {"wall": round(time.monotonic() - wall, 3), "processor": round(processor_s() - processor, 3)}


def processor_s() -> float:
    """Processor seconds of this process and of its children that have ended."""
    each = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in each)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Plain text columns, aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
