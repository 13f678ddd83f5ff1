"""Where a recipe stands: what is finished, running, interrupted, out of date and why, or missing, with time, memory and disk.

    python -m stages.run.status tiny

It looks at run folders and recipes alone and imports no stage, whose torch takes seconds: settings and their defaults are read from
the stages' source. What a run has read from outside the run folders (a user's own files) is not hashed again; the stage itself does.
"""
import ast
import fcntl
import functools
import json
import os
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.run import preemption
from stages.run.checkpoint import PROGRESS, is_complete, read_metrics, step_of
from stages.run.config import no_recipe, parent_folders, read_yaml, runs_of
from stages.run.console import clock, table
from stages.run.manifest import MANIFEST, Manifest, lock_file

ORDER = ("prepare", "scaling", "pretrain", "sft", "preferences", "reward_model", "ppo", "rejection_sampling", "evaluation", "report")
STAGES = Path(__file__).resolve().parent.parent
UNKNOWN = object()  # a default that is no literal


class Setting(NamedTuple):
    default: Any
    recorded_only: bool
    added: bool


class Declared(NamedTuple):
    """A stage's config class as its source has it."""

    parents: tuple[str, ...]
    settings: dict[str, Setting]


class Row(NamedTuple):
    """A stage: its state, what that means, seconds, bytes of memory and of disk (None where there is nothing to say)."""

    stage: str
    state: str
    why: str
    seconds: float | None = None
    memory: int | None = None
    disk: int = 0


@functools.cache
def module(name: str) -> ast.Module:
    return ast.parse((STAGES.parent / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))


def class_of(name: str, where: str) -> tuple[ast.ClassDef, str] | None:
    """A class by its name in a module of ours, or in the one that it is imported from; with the module that holds it."""
    for node in module(where).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, where
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stages.") and name in [a.name for a in node.names]:
            return class_of(name, str(node.module))
    return None


def lineage(name: str, where: str) -> Iterator[ast.ClassDef]:
    """The class's bases among ours in the order of Python's resolution read backwards, then itself."""
    if found := class_of(name, where):
        node, home = found
        for base in reversed(node.bases):
            yield from lineage(ast.unparse(base), home)
        yield node


@functools.cache
def declared(stage: str) -> Declared:
    where = f"stages.{stage}"
    names = [name for node in module(where).body for name in (
        [node.name] if isinstance(node, ast.ClassDef) else [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else [])]
    for name in names:
        classes = list(lineage(name, where)) if name.endswith("Config") else []
        constants = {target.id: node.value for cls in classes for node in cls.body if isinstance(node, ast.Assign)
                     for target in node.targets if isinstance(target, ast.Name)}
        if "STAGE" in constants and ast.literal_eval(constants["STAGE"]) == stage:
            settings = {node.target.id: setting(node.value) for cls in classes for node in cls.body
                        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id.islower()}
            return Declared(ast.literal_eval(constants["PARENTS"]) if "PARENTS" in constants else (), settings)
    raise AssertionError(f"stages/{stage}.py has no config class")


def setting(value: ast.expr | None) -> Setting:
    """`option(default, help, recorded_only=..., added=...)`, or a plain default."""
    flags: dict[str, Any] = {"recorded_only": False, "added": False}
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "option":
        flags |= {k.arg: ast.literal_eval(k.value) for k in value.keywords if k.arg in flags}
        value = value.args[0] if value.args else None
    try:
        default = UNKNOWN if value is None else ast.literal_eval(value)
    except ValueError:
        default = UNKNOWN
    return Setting(default, flags["recorded_only"], flags["added"])


def same(recorded: Any, asked: Any) -> bool:
    """Whether a setting of a manifest is what a recipe asks for, which YAML may have read as 1e-3 (a text), 8 or off (false)."""
    if isinstance(asked, str) and isinstance(recorded, int | float) and not isinstance(recorded, bool):
        try:
            asked = float(asked)
        except ValueError:
            return False
    return recorded == asked or (recorded == "off" and asked is False)


def changes(recorded: Mapping[str, Any], stage: str, recipe: Mapping[str, Any]) -> list[str]:
    """Settings in which a run is not what its recipe (with the defaults of today) would make."""
    found = []
    for name, (default, recorded_only, added) in declared(stage).settings.items():
        asked = recipe.get(name, default)
        if recorded_only or asked is UNKNOWN or (name not in recorded and added and same(asked, default)):
            continue
        if name not in recorded:
            found.append(f"{name} is new")
        elif not same(recorded[name], asked):
            found.append(f"{name}: {recorded[name]!r} -> {asked!r}")
    return found


def holder(run_dir: Path) -> str | None:
    """The process that works on a run folder, None if there is none. A look takes no lock, so that no stage is turned away by it."""
    path = lock_file(run_dir)
    try:
        with path.open("r+", encoding="utf-8") as file:
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
            kind, *_ = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, asked))
            return None if kind == fcntl.F_UNLCK else file.read().strip() or "a process"
    except OSError:
        return None


def size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()) if folder.exists() else 0


def trainings(partial: Path) -> list[Path]:
    """The progress of each training of an unfinished run, the newest last: several in a ladder or an ensemble."""
    return sorted(partial.rglob(PROGRESS), key=lambda file: file.stat().st_mtime)


def progress(partial: Path, now: float) -> str:
    """How far an unfinished run is by its newest training: "step 40/160, ETA 3m00s"; nothing where none has begun."""
    files = trainings(partial)
    if not files:
        return ""
    at = json.loads(files[-1].read_text(encoding="utf-8"))
    rows = read_metrics(files[-1].with_name("metrics.jsonl"))
    step = rows[-1]["step"] if rows else at["step"]
    inside = files[-1].parent.relative_to(partial)  # a rung of the ladder, or a member of an ensemble
    text = f"{'' if str(inside) == '.' else str(inside.parts[0]).removesuffix('.partial') + ' '}step {step}/{at['steps']}"
    began, first = at["since"]
    if at["step"] > first:
        logged = files[-1].stat().st_mtime
        left = (logged - began) / (at["step"] - first) * (at["steps"] - at["step"]) - (now - logged)
        text += f", ETA {clock(left)}"
    return text


def look(recipe: str, *, now: float | None = None) -> list[Row]:
    """Every stage that the recipe has settings for or a run of, in the order of the Makefile.

    Raises ValueError where there is neither.
    """
    now, recipes, home = now or time.time(), Path("recipes") / recipe, Path(runs_of()) / recipe
    given = {stage: read_yaml(file) for stage in ORDER if (file := recipes / f"{stage}.yaml").is_file()}
    folders = {stage: Path(given.get(stage, {}).get("run_dir") or home / stage) for stage in ORDER}
    ours = [stage for stage in ORDER if stage in given or folders[stage].exists() or partial_of(folders[stage]).exists()]
    if not ours:
        raise no_recipe(recipe)
    rows: dict[str, Row] = {}
    for stage in ours:
        rows[stage] = stand(stage, folders[stage], given.get(stage), rows, ours, recipe, now)
    return list(rows.values())


def saved(partial: Path) -> str:
    """The checkpoint from which the newest training goes on: " from checkpoint-40"; nothing where there is none that counts."""
    files = trainings(partial)
    found = [folder for folder in files[-1].parent.glob("checkpoints/checkpoint-*") if is_complete(folder)] if files else []
    return f" from {max(found, key=step_of).name}" if found else ""


def partial_of(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def stand(stage: str, folder: Path, settings: Mapping[str, Any] | None, before: Mapping[str, Row], ours: list[str], recipe: str,
          now: float) -> Row:
    """Where one stage stands; `settings` are its recipe's (None: it has none), `before` the stages ahead of it."""
    partial, finished = partial_of(folder), (folder / MANIFEST).is_file()
    disk = size(folder) + size(partial)
    parents = {name: Path(path) for name, path in parent_folders(
        declared(stage).parents, (settings or {}).get("parents", {}), runs_of(), recipe).items()}
    made: Mapping[str, Any] = {}
    old: list[str] = []
    if finished:
        run = Manifest(folder)
        made = run.data["provenance"]
        old = outdated(run, stage, settings, parents, before)
    kept = f"; the run before, {'out of date' if old else 'complete'}, stays until then" if finished else ""
    if worker := holder(folder):
        began = partial / "run.json"
        return Row(stage, "running", "; ".join(filter(None, (progress(partial, now), worker))) + kept,
                   now - began.stat().st_mtime if began.is_file() else None, disk=disk)
    if partial.exists():
        mark = partial / preemption.MARK
        said = json.loads(mark.read_text(encoding="utf-8")).get("saved", "") if mark.is_file() else ""
        begun = partial / "run.json"
        other = [] if settings is None or not begun.is_file() else changes(json.loads(begun.read_text(encoding="utf-8"))["config"], stage,
                                                                           settings)
        goes_on = (f"the command that began it continues it{saved(partial)}; `make {stage} RECIPE={recipe}` alone would begin anew "
                   f"({'; '.join(other)})" if other else f"`make {stage} RECIPE={recipe}` continues{saved(partial)}")
        return Row(stage, "preempted" if mark.is_file() else "interrupted", "; ".join(filter(None, (
            progress(partial, now).partition(", ETA")[0], said, goes_on))) + kept, disk=disk)
    if finished:
        again = "adopted" if adopted(run) else f"the last of {made['attempts']} attempts" if made.get("attempts", 1) > 1 else ""
        return Row(stage, "stale" if old else "finished", "; ".join(old) or again, made["wall_s"], made["peak_rss_bytes"], disk)
    needed = ("pretrain",) if stage == "report" else parents
    waits = [name for name in needed if name in ours and not (parents[name] / MANIFEST).is_file()]
    makes = f"{'optional: ' if stage == 'rejection_sampling' else ''}`make {stage} RECIPE={recipe}` makes it"
    return Row(stage, "missing", f"waits for {', '.join(waits)}" if waits else makes, disk=disk)


def adopted(run: Manifest) -> bool:
    """Whether the model was trained elsewhere, so that the recipe's settings of this stage say nothing of it."""
    return bool(run.data.get("notes", {}).get("adopted"))


def outdated(run: Manifest, stage: str, settings: Mapping[str, Any] | None, parents: Mapping[str, Path],
             before: Mapping[str, Row]) -> list[str]:
    """Why a finished run is not what the same command would make now."""
    old = changes(run.data.get("identity", {}).get("config", run.config), stage, settings) if settings is not None and not adopted(run) \
        else []
    for name, fingerprint in run.data.get("parents", {}).items():
        there = name in parents and (parents[name] / MANIFEST).is_file()
        if there and Manifest(parents[name]).fingerprint != fingerprint:
            old.append(f"{name} was made again")
        elif not there:
            old.append(f"{name}, which it was made from, is gone")
        elif name in before and before[name].state == "stale":
            old.append(f"{name} is stale")
    if stage == "report":
        old += [f"{name} has finished since" for name, path in parents.items()
                if name not in run.data.get("parents", {}) and (path / MANIFEST).is_file()]
    return old


def as_table(rows: list[Row]) -> str:
    def cells(row: Row) -> list[str]:
        return [row.stage, row.state, "" if row.seconds is None else clock(row.seconds),
                "" if row.memory is None else f"{row.memory / 2**30:.2f} GiB", f"{row.disk / 2**20:,.1f} MiB" if row.disk else "", row.why]

    done = [row.seconds or 0.0 for row in rows if row.state in ("finished", "stale")]
    total = ["sum", "", clock(sum(done)), "", f"{sum(row.disk for row in rows) / 2**20:,.1f} MiB", "time of what is finished"]
    return table(["stage", "state", "time", "peak memory", "disk", ""], [*map(cells, rows), total])


if __name__ == "__main__":
    try:
        print(as_table(look(sys.argv[1] if len(sys.argv) > 1 else "tiny")))
    except ValueError as error:
        sys.exit(f"error: {error}")
