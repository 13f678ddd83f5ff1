"""Runs on disk: what a finished stage leaves, when it need not run again, and how a changed one replaces it.

A stage works in `<run_dir>.partial` and moves it to `<run_dir>` in one rename when everything, `manifest.json` last, is
there. So an existing run folder is always complete, a kill at any moment leaves the earlier product untouched, and the same
command finds its unfinished work again (the partial folder remembers the fingerprint it belongs to).
"""
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reward.folders import inside
from stages.run.config import StageConfig
from stages.run.redaction import redacted, without_secrets

MANIFEST = "manifest.json"
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


class Manifest:
    """A finished run, read from its folder.

    Raises ValueError when the run is not there, with the make target that produces it.
    """

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir)
        file = self.path / MANIFEST
        if not file.is_file():
            raise ValueError(f"no finished run in {run_dir}: run `make {self.path.name} RECIPE={self.path.parent.name}` first")
        self.data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))

    def product(self, name: str) -> Path:
        """Path of a product. Raises ValueError naming those there are, and for one outside of the run's folder."""
        products = self.data["products"]
        if name not in products:
            raise ValueError(f"{self.path} has no product {name!r}: it has {', '.join(products) or 'none'}")
        return inside(self.path, products[name]["path"])

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
            "world_size": int(os.environ.get("WORLD_SIZE", "1")),
            "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds")}


def hardware() -> str:
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    except OSError:
        pass
    return f"{os.cpu_count()} x {processor}"


class Run:
    """The folder a stage works in, from its config to its manifest.

    `inputs` are content hashes of data outside the parents (local files, hub revisions); None is one that cannot be known now
    (the revision of a hub dataset, offline) and counts as that of the finished run. After construction either `finished` is
    true and `manifest` holds the run that is already there, or `directory` is the folder to work in, with whatever an
    interrupted attempt of the same fingerprint left in it. Raises ValueError for parents that do not belong together.
    """

    def __init__(self, config: StageConfig, *, inputs: Mapping[str, str | None] | None = None):
        self.config = config
        self.final = Path(config.run_dir)
        self.directory = self.final.with_name(self.final.name + ".partial")
        self.parents = {name: Manifest(path) for name, path in config.parents.items()}
        if config.STAGE != "report":  # it shows the stages as they are, and says itself which are out of date
            check_parents(self.parents)
        if is_main():
            self._recover()
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
                return
            say(f"{config.STAGE}: {self.final} is out of date ({self._changes(existing)}); running again")
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
        state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8")) if state_file.is_file() else {}
        if self.directory.exists() and state.get("fingerprint") != self.fingerprint:
            shutil.rmtree(self.directory)
            state = {}
        self.directory.mkdir(parents=True, exist_ok=True)
        self.attempts = state.get("attempts", 0) + 1
        if self.attempts > 1:
            say(f"{self.config.STAGE}: continuing the unfinished run in {self.directory}")
        write_json(state_file, {"fingerprint": self.fingerprint, "attempts": self.attempts, "config": without_secrets(vars(self.config))})

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

        `products` maps names to paths inside the run folder. Call on every process; only the main one writes.
        """
        if is_main():
            hashed = {name: {"path": path, "sha256": hash_path(self.directory / path)} for name, path in (products or {}).items()}
            write_json(self.directory / MANIFEST, {
                "stage": self.config.STAGE, "recipe": self.config.recipe, "status": "finished", "fingerprint": self.fingerprint,
                "config": without_secrets(vars(self.config)), "parents": self.identity["parents"], "inputs": self.inputs,
                "products": hashed, "seed": self.config.seed, "counts": dict(counts or {}), "metrics": dict(metrics),
                "notes": dict(notes or {}), "identity": without_secrets(self.identity),
                "provenance": provenance(self.started, self.attempts)})
            old = self.final.with_name(self.final.name + ".old")
            if self.final.exists():
                self.final.rename(old)
            self.directory.rename(self.final)
            shutil.rmtree(old, ignore_errors=True)
            self._manifest = Manifest(self.final)
            return self._manifest
        manifest = object.__new__(Manifest)  # other processes do not read: the folder may not be visible to them yet
        manifest.path, manifest.data = self.final, {"fingerprint": self.fingerprint, "metrics": dict(metrics), "counts": dict(counts or {})}
        return manifest


def say(text: str) -> None:
    """One line for the person watching, from the main process only."""
    if is_main():
        print(redacted(text), flush=True)
