"""Which checkpoints can be trusted after a kill, and the metrics file that continues with them.

A checkpoint counts once `complete.json`, listing every file with its size and hash, has been written after all of them were flushed.
A kill inside a save, or a full disk, leaves a folder without a valid list; it is removed and the one before is used, as where a disk has
changed what was written.
"""
import json
import os
import shutil
from pathlib import Path
from typing import Any

from stages.run.manifest import hash_path, say, write_json

MARK = "complete.json"
PROGRESS = "progress.json"  # beside metrics.jsonl: step of how many, and since when and which step, for who looks from outside


def mark_complete(folder: Path, *, world_size: int, engine: str = "NO") -> None:
    """Flush every file to disk, then write the list that makes the checkpoint count. `engine`, by Accelerate's name, held the weights."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARK)
    for file in files:
        with file.open("rb") as f:
            os.fsync(f.fileno())
    names = {str(f.relative_to(folder)): f for f in files}
    write_json(folder / MARK, {"world_size": world_size, "engine": engine, "files": {name: f.stat().st_size for name, f in names.items()},
                               "sha256": {name: hash_path(f) for name, f in names.items()}})


def is_complete(folder: Path) -> bool:
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        return mark["world_size"] > 0 and all((folder / name).stat().st_size == size for name, size in mark["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def damaged(folder: Path) -> list[str]:
    """Files of a complete checkpoint that are not what was written; reads all of it."""
    listed = json.loads((folder / MARK).read_text(encoding="utf-8")).get("sha256", {})  # none in those of earlier versions
    return [name for name, recorded in listed.items() if hash_path(folder / name) != recorded]


def step_of(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def newest_complete(checkpoints: Path, *, world_size: int, engine: str = "NO") -> Path | None:
    """The newest checkpoint that can be trusted.

    Raises ValueError when this launch cannot continue it: it holds weights in the parts of another engine, or an optimizer in as many
    parts as there were processes. Whole weights go on anywhere (`elastic`), though random states of another number of processes do not fit.
    """
    folders = sorted((p for p in checkpoints.glob("checkpoint-*") if is_complete(p)), key=step_of)
    if not folders:
        return None
    mark = json.loads((folders[-1] / MARK).read_text(encoding="utf-8"))
    before, by = mark["world_size"], mark.get("engine", engine)
    if elastic(by) and elastic(engine):
        if before != world_size:
            say(f"{folders[-1]} was written by {before} processes and goes on with {world_size}: the same batches, equal within rounding")
    elif (by, before) != (engine, world_size):
        raise ValueError(f"{folders[-1]} was written by {before} processes under {by}, this launch has {world_size} under {engine}, and "
                         f"cannot read it: launch as before, or delete {checkpoints} to start over")
    return folders[-1]


def elastic(engine: str) -> bool:
    """Whether each process holds whole weights and a whole optimizer, so that any number of processes can go on from a checkpoint."""
    return engine not in ("FSDP", "DEEPSPEED")


def remove_untrusted(checkpoints: Path) -> None:
    """Remove what a kill has cut and, aloud, what was damaged later."""
    for folder in checkpoints.glob("checkpoint-*"):
        if not is_complete(folder):
            shutil.rmtree(folder)
        elif changed := damaged(folder):
            say(f"{folder} is damaged ({', '.join(changed)}): removed; the run goes on from an earlier one, or from its start")
            shutil.rmtree(folder)


class MetricsLog:
    """`metrics.jsonl`: one object a log step. After a resume the lines beyond the checkpoint's step are dropped, so none is there twice."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> None:
        """Keep lines up to and including `step`; a line cut off by a kill goes too."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        self._replace(kept)

    def append(self, row: dict[str, Any]) -> None:
        """Add a step, or what was measured later at the step of the last line to that line."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        if lines and (last := json.loads(lines[-1]))["step"] == row["step"]:
            self._replace([*lines[:-1], json.dumps(last | row)])
            return
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def _replace(self, lines: list[str]) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        temporary.replace(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
