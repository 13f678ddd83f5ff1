"""Runs on disk: what a finished stage leaves, when it need not run again, and how a changed one replaces it.

A stage works in `<run_dir>.partial` and moves it to `<run_dir>` in one rename when everything, `manifest.json` last, is
there. So an existing run folder is always complete, a kill at any moment leaves the earlier product untouched, and the same
command finds its unfinished work again (the partial folder remembers the fingerprint it belongs to).
"""
import datetime
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from reward.folders import inside
from stages.run.config import StageConfig
from stages.run.preemption import settle
from stages.run.redaction import redacted, without_secrets

MANIFEST = "manifest.json"
HASH = re.compile("sha256:[0-9a-f]{64}")  # what `hash_path` gives; a manifest made by hand need not have one
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate", "tokenizers", "numpy", "scipy", "scikit-learn")


def is_main() -> bool:
    """Whether this process writes files. Known before torch is imported: launchers set RANK."""
    return os.environ.get("RANK", "0") == "0"


def write_json(path: Path, data: Any) -> None:
    """Write atomically: a reader sees the old file or the whole new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as f:
        json.dump(data, f, indent=1, allow_nan=False)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def hash_data(data: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(data, sort_keys=True, allow_nan=False).encode()).hexdigest()


def hash_path(path: Path) -> str:
    """Content hash of a file or of a folder (names and contents, in name order)."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return "sha256:" + digest.hexdigest()


def metric(value: float, *, n: int | None = None, ci95: tuple[float, float] | list[float] | None = None) -> dict[str, Any]:
    """A figure as manifests hold it. `n` counts what it was measured on; `ci95` is its 95 % interval."""
    return {"value": value, **({"n": n} if n is not None else {}), **({"ci95": list(ci95)} if ci95 is not None else {})}


def read_state(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON object that a stage wrote. Raises ValueError with the remedy where it is damaged: a kill never leaves half of one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged (no JSON object): {remedy}")
    return data


class Manifest:
    """A finished run, read from its folder.

    Raises ValueError when the run is not there, with the make target that produces it, and when its manifest is not as it was written.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir)
        file = self.path / MANIFEST
        if not file.is_file():
            raise ValueError(f"no finished run in {run_dir}: run `make {self.path.name} RECIPE={self.path.parent.name}` first")
        remedy = f"delete {self.path} and run `make {self.path.name} RECIPE={self.path.parent.name}` again"
        self.data: dict[str, Any] = read_state(file, remedy)
        written = self.data.pop("checksum", None)
        if written is not None and written != hash_data(self.data):
            raise ValueError(f"{file} is damaged or was edited (its checksum is another): {remedy}")
        self._whole: set[str] = set()

    def product(self, name: str) -> Path:
        """Path of a product, which the main process has found to be what was written. Raises ValueError naming those there are, for one
        that is damaged, and for one outside of the run's folder."""
        products = self.data["products"]
        if name not in products:
            raise ValueError(f"{self.path} has no product {name!r}: it has {', '.join(products) or 'none'}")
        path, recorded = inside(self.path, products[name]["path"]), str(products[name].get("sha256", ""))
        if HASH.fullmatch(recorded) and is_main() and name not in self._whole:
            if not path.exists() or hash_path(path) != recorded:
                raise ValueError(f"{path} is {'damaged or was changed' if path.exists() else 'gone'}: its manifest records other content. "
                                 f"Restore it, or delete {self.path} and run `make {self.path.name} RECIPE={self.path.parent.name}` again")
            self._whole.add(name)
        return path

    @property
    def fingerprint(self) -> str:
        return self.data["fingerprint"]

    @property
    def config(self) -> dict[str, Any]:
        return self.data["config"]

    @property
    def counts(self) -> dict[str, Any]:
        return self.data["counts"]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        return self.data["metrics"]


def check_parents(parents: Mapping[str, Manifest]) -> None:
    """Raises ValueError when a parent was made from another run than the one beside it, as when only that one was made again.

    A model and a tokenizer or problems of different runs would train on in silence.
    """
    for parent in parents.values():
        for name, fingerprint in parent.data.get("parents", {}).items():
            if name in parents and parents[name] is not parent and parents[name].fingerprint != fingerprint:  # sft on top of sft
                raise ValueError(f"{parent.path} was made from another {name} than {parents[name].path} now holds: run "
                                 f"`make {parent.path.name} RECIPE={parent.path.parent.name}` again, or set parents.{name} to the run "
                                 "that it was made from")


def provenance(started: float, attempts: int) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    status = git("status", "--porcelain")
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(status) if status is not None else None,
            "versions": versions, "python": platform.python_version(), "hardware": hardware(),
            "wall_s": round(time.time() - started, 1), "attempts": attempts, "peak_rss_bytes": peak,
            "world_size": int(os.environ.get("WORLD_SIZE", "1")), "precision": precision(),
            "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds")}


def precision() -> str:
    """That of the launch config, for what is trained under it: no (float32), bf16 or fp16."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") or "no"


def hardware() -> str:
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    return f"{os.cpu_count()} x {processor}"


_LOCKS: dict[Path, TextIO] = {}


def lock_file(run_dir: Path) -> Path:
    return run_dir.with_name(f".{run_dir.name}.lock")


def lock(run_dir: Path) -> None:
    """Let no other process work on this run folder until this one ends, however it ends.

    POSIX locks, which NFS knows, go with their process. Raises ValueError when another one works there, and OSError where nothing can be
    written.
    """
    path = lock_file(run_dir).resolve()
    while path not in _LOCKS:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise OSError(error.errno, f"{error.strerror}; the file system of run_dir must know POSIX locks (Lustre: mount -o flock)",
                              str(path)) from None
            raise ValueError(f"another run works on {run_dir} ({holder or 'its process is not known'}): wait for it or end it, or give "
                             "this one a run_dir of its own") from None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:  # else its holder has just removed it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n")
            file.flush()
            _LOCKS[path] = file
        else:
            file.close()


def unlock(run_dir: Path) -> None:
    path = lock_file(run_dir).resolve()
    if path in _LOCKS:
        path.unlink(missing_ok=True)
        _LOCKS.pop(path).close()


def forget_unbegun(run_dir: Path) -> None:
    """Remove what this process has opened of a run that was refused before it did anything: it would stand there as an interrupted one.
    Another process's run, which has the lock, stays."""
    partial = run_dir.with_name(run_dir.name + ".partial")
    if lock_file(run_dir).resolve() in _LOCKS and partial.is_dir() and [path.name for path in partial.iterdir()] == ["run.json"]:
        shutil.rmtree(partial)


class Run:
    """The folder a stage works in, from its config to its manifest.

    `inputs` are content hashes of data outside the parents (local files, hub revisions); None is one that cannot be known now
    (the revision of a hub dataset, offline) and counts as that of the finished run. After construction either `finished` is
    true and `manifest` holds the run that is already there, or `directory` is the folder to work in, with whatever an
    interrupted attempt of the same fingerprint left in it. Raises ValueError for parents that do not belong together, while another
    process works on the folder, and where it cannot be written.
    """

    def __init__(self, config: StageConfig, *, inputs: Mapping[str, str | None] | None = None):
        self.config = config
        self.final = Path(config.run_dir)
        self.directory = self.final.with_name(self.final.name + ".partial")
        missing = [name for name, path in config.parents.items() if not (Path(path) / MANIFEST).is_file()]
        if len(missing) > 1:
            wanted = [Path(config.parents[name]) for name in missing if name != "prepare" or "pretrain" not in missing]  # which makes it
            made = {path.parent.name: [p.name for p in wanted if p.parent == path.parent] for path in wanted}
            commands = " and ".join(f"`make {' '.join(names)} RECIPE={recipe}`" for recipe, names in made.items())
            raise ValueError(f"no finished run in {', '.join(config.parents[name] for name in missing)}: run {commands} first")
        self.parents = {name: Manifest(path) for name, path in config.parents.items()}
        if config.STAGE != "report":  # it shows the stages as they are, and says itself which are out of date
            check_parents(self.parents)
        unwritable: OSError | None = None
        if is_main():
            try:
                lock(self.final)
                self._recover()
            except OSError as error:  # a finished run may be on a disk that is read alone
                unwritable = error
        existing = Manifest(self.final) if (self.final / MANIFEST).is_file() else None
        before = existing.data.get("inputs", {}) if existing else {}
        known = {name: before.get(name) if value is None else value for name, value in (inputs or {}).items()}
        self.inputs: dict[str, str] = {name: value for name, value in known.items() if value is not None}
        self.started = time.time()
        self.identity: dict[str, Any] = {"stage": config.STAGE, "config": config.fingerprinted(), "inputs": self.inputs,
                         "parents": {name: parent.fingerprint for name, parent in self.parents.items()}}
        self.fingerprint = hash_data(self.identity)
        self._manifest: Manifest | None = None
        self.attempts = 1
        if existing:
            if existing.fingerprint == self.fingerprint:
                self._manifest = existing
                say(f"{config.STAGE}: {self.final} is finished and nothing it depends on has changed")
                trained = existing.data["provenance"].get("precision", precision())
                if trained != precision() and any(self.final.rglob("checkpoint-*")):
                    say(f"{config.STAGE}: it was trained with mixed_precision {trained!r}, and this launch config has {precision()!r}: "
                        "give --run-dir for a run of its own")
                unlock(self.final)
                return
            say(f"{config.STAGE}: {self.final} is out of date ({self._changes(existing)}); running again")
        if unwritable:
            raise ValueError(f"{self.final.parent} cannot be written ({unwritable}): make it writable, or set run_dir to another folder "
                             "(all runs: PLUMBLINE_RUNS)")
        if is_main():
            self._open()

    @property
    def finished(self) -> bool:
        return self._manifest is not None

    @property
    def manifest(self) -> Manifest:
        assert self._manifest is not None, "the run is not finished"
        return self._manifest

    def _recover(self) -> None:
        """Complete a swap that a kill interrupted between its two renames."""
        old = self.final.with_name(self.final.name + ".old")
        if not self.final.exists() and (self.directory / MANIFEST).is_file():
            self.directory.rename(self.final)
        elif not self.final.exists() and old.exists():
            old.rename(self.final)
        if self.final.exists() and old.exists():
            shutil.rmtree(old)

    def _open(self) -> None:
        state_file = self.directory / "run.json"
        state = read_state(state_file, f"delete {self.directory} to start this run over") if state_file.is_file() else {}
        if self.directory.exists() and state.get("fingerprint") != self.fingerprint:
            if state:
                say(f"{self.config.STAGE}: the unfinished run in {self.directory} was begun with other settings or data, and is removed")
            shutil.rmtree(self.directory)
            state = {}
        before = state.get("precision", precision())
        if before != precision() and any(self.directory.rglob("checkpoint-*")):
            raise ValueError(f"{self.directory} was trained with mixed_precision {before!r}, and this launch config has {precision()!r}: "
                             "launch it as it was begun (ACCELERATE), or delete the folder to start over")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.attempts = state.get("attempts", 0) + 1
        if self.attempts > 1:
            say(f"{self.config.STAGE}: continuing the unfinished run in {self.directory}")
        write_json(state_file, {"fingerprint": self.fingerprint, "attempts": self.attempts, "precision": precision(),
                                "config": without_secrets(vars(self.config))})

    def _changes(self, existing: Manifest) -> str:
        """What differs between the run on disk and the one asked for, in words."""
        changed = []
        before = existing.data.get("identity", {})
        for key, new in without_secrets(self.identity["config"]).items():
            old = before.get("config", {}).get(key)
            if old != new:
                changed.append(f"{key}: {old!r} -> {new!r}")
        for group in ("inputs", "parents"):
            keys = set(self.identity[group]) | set(before.get(group, {}))
            changed += [f"{group[:-1]} {key} changed" for key in sorted(keys)
                        if self.identity[group].get(key) != before.get(group, {}).get(key)]
        return "; ".join(changed) or "the stage itself changed"

    def finish(self, *, metrics: Mapping[str, dict[str, Any]], counts: Mapping[str, int | float] | None = None,
               products: Mapping[str, str] | None = None, notes: Mapping[str, Any] | None = None) -> Manifest:
        """Write the manifest, swap the folder in, and return what a later stage will read.

        `products` maps names to paths inside the run folder. Call on every process; only the main one writes. Raises Preempted where a
        process was told to go before all had come here (stages/run/preemption.py).
        """
        settle(self.directory)
        if is_main():
            hashed = {name: {"path": path, "sha256": hash_path(self.directory / path)} for name, path in (products or {}).items()}
            data = {
                "stage": self.config.STAGE, "recipe": self.config.recipe, "status": "finished", "fingerprint": self.fingerprint,
                "config": without_secrets(vars(self.config)), "parents": self.identity["parents"], "inputs": self.inputs,
                "products": hashed, "seed": self.config.seed, "counts": dict(counts or {}), "metrics": dict(metrics),
                "notes": dict(notes or {}), "identity": without_secrets(self.identity),
                "provenance": provenance(self.started, self.attempts)}
            write_json(self.directory / MANIFEST, data | {"checksum": hash_data(json.loads(json.dumps(data)))})
            old = self.final.with_name(self.final.name + ".old")
            if self.final.exists():
                self.final.rename(old)
            self.directory.rename(self.final)
            shutil.rmtree(old, ignore_errors=True)
            unlock(self.final)
            self._manifest = Manifest(self.final)
            return self._manifest
        manifest = object.__new__(Manifest)  # other processes do not read: the folder may not be visible to them yet
        manifest.path, manifest.data = self.final, {"fingerprint": self.fingerprint, "metrics": dict(metrics), "counts": dict(counts or {})}
        return manifest


def say(text: str) -> None:
    """One line for the person watching, from the main process only."""
    if is_main():
        print(redacted(text), flush=True)
