"""Finished questions on disk as they finish: a file of JSON lines for each process, put together in the questions' order at the end."""
import json
import os
import time
from collections.abc import Generator, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, TypeVar

from prompts.records import Result

T = TypeVar("T")

SYNC_S = 5.0  # seconds of work that a power cut may cost; a killed process loses nothing that was appended


class Journal:
    """Appends records, one line each, to `<folder>/<process>.jsonl`; opened by the first record, so that none means no file."""

    def __init__(self, folder: Path, process: int):
        self.path, self.synced = folder / f"{process}.jsonl", time.monotonic()
        self.file: TextIO | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """The line is with the system when this returns, and on the disk `SYNC_S` later at the latest while records come."""
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if time.monotonic() - self.synced > SYNC_S:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()

    def close(self) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())
            self.file.close()
            self.file = None


def remembered(strategy: Generator[Any, Any, T], folder: Path) -> Generator[Any, Any, T]:
    """The strategy, with every result it was given appended to a file in `folder` and not asked for again when it is run anew.

    For a strategy over many questions, which has nothing finished to show until its end. One process at a time may run it.
    """
    path = folder / "0.jsonl"
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    known = {(line.pop("key"), line.pop("number")): Result(**line) for line in lines}
    journal = Journal(folder, 0)
    try:
        asked = next(strategy)
        while True:
            new = [request for request in asked if (request.key, request.sample) not in known]
            for request, result in zip(new, (yield new), strict=True):
                known[request.key, request.sample] = result
                journal.append({"key": request.key, "number": request.sample, **asdict(result)})
            asked = strategy.send([known[request.key, request.sample] for request in asked])
    except StopIteration as finished:
        return finished.value
    finally:
        journal.close()


def repair(folder: Path) -> None:
    """Drop a last line that a kill has cut. For one process, before any of them reads or appends."""
    for path in folder.glob("*.jsonl"):
        with path.open("rb+") as file:
            end = size = file.seek(0, os.SEEK_END)
            while end and not _ends_line(file, end):
                end -= 1
            if end < size:
                file.truncate(end)


def _ends_line(file: Any, end: int) -> bool:
    file.seek(end - 1)
    return file.read(1) == b"\n"


def places(folder: Path) -> dict[str, tuple[Path, int]]:
    """Where the record of each id is, over all processes' files: (file, byte offset). Raises ValueError naming a line that is no record."""
    found: dict[str, tuple[Path, int]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    found.setdefault(str(json.loads(line)["id"]), (path, offset))
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{path}, line {number} is not a record: delete the line, and its question is asked again") from None
                offset += len(line)
    return found


def merge(folder: Path, target: Path, ids: Iterable[str]) -> None:
    """Write `target` with the records of these ids in this order, whole or not at all, and remove the folder.

    One record is in memory at a time. Raises ValueError when some are not there.
    """
    where, ids = places(folder), list(ids)
    if missing := [id for id in ids if id not in where]:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(ids)} questions, {missing[0]!r} for one: every process must write to "
                         "the same disk; the same command asks those that are missing")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    files = {path: path.open("rb") for path in {path for path, _ in where.values()}}
    with temporary.open("wb") as out:
        for id in ids:
            path, offset = where[id]
            files[path].seek(offset)
            out.write(files[path].readline())
        out.flush()
        os.fsync(out.fileno())
    for file in files.values():
        file.close()
    temporary.replace(target)
    for path in folder.glob("*.jsonl"):
        path.unlink()
    if folder.is_dir():
        folder.rmdir()
