"""The runs of a scaling ladder: which there are, what each shares with others, where each goes on from, and several at once."""
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from stages.models.branching import cooldown_start, tied_to_budget, usable_checkpoints
from stages.models.pretraining import PretrainConfig, pretrain
from stages.models.training import barrier
from stages.run.config import build_config, read_yaml
from stages.run.console import clock
from stages.run.entry import cores
from stages.run.manifest import MANIFEST, Manifest, Run, is_main, say

LETTERS = {"hidden_size": "d", "num_layers": "l", "num_heads": "h", "num_kv_heads": "k", "intermediate_size": "f"}  # of a run's name


def main_config(recipe: str, path: str) -> PretrainConfig:
    """The main model's pretraining config, from `path` or the recipe's file; its defaults where the recipe has none."""
    file = Path(path or f"recipes/{recipe}/pretrain.yaml")
    if not file.is_file() and path:
        raise ValueError(f"pretrain_config {file} does not exist: give the pretrain.yaml of the main model")
    return build_config(PretrainConfig, read_yaml(file) if file.is_file() else {}, recipe=recipe, where=str(file))


def ladder_configs(base: PretrainConfig, sizes: Sequence[dict[str, Any]], tokens: Sequence[int],
                   **common: Any) -> dict[str, PretrainConfig]:
    """A pretraining config for each run, by its name: one for each size and budget and, where the schedule allows it, for each size the
    stable run that its budgets branch off, whose name is then their `branch_from`. `common` are settings of all beside the main model's.

    Raises ValueError for a grid that no law can be fitted with, and for a schedule whose budgets cannot begin alike.
    """
    names: dict[str, dict[str, Any]] = {}
    for size in sizes:
        if unknown := sorted(set(size) - set(LETTERS)):
            raise ValueError(f"sizes: unknown key {unknown[0]!r}: choose from {', '.join(LETTERS)}")
        changed = {"hidden_size": base.hidden_size, **size}
        names["-".join(f"{LETTERS[key]}{value}" for key, value in changed.items())] = changed
    budgets = sorted(set(tokens))
    if len(names) < 3 or len(budgets) < 3:
        raise ValueError(f"{len(names)} sizes and {len(budgets)} budgets cannot determine a law: give three of each")
    ladder: dict[str, PretrainConfig] = {}
    for name, changed in names.items():
        own = replace(base, **changed, **common, branch_from=None, keep_at=[])
        runs = {f"{name}-{budget}": replace(own, tokens=budget) for budget in budgets}
        if base.schedule != "linear":
            reason = tied_to_budget(replace(own, tokens=budgets[-1]))
            if reason or not base.cooldown_share:
                raise ValueError("of the main model: " + (reason or "cooldown_share is 0, so that no rate ever falls: set it to 0.2"))
            starts = sorted(cooldown_start(c) * c.batch_tokens for c in runs.values())
            ladder[f"{name}-stable"] = replace(own, tokens=starts[-1], cooldown_share=0.0, keep_at=starts)
            runs = {run: replace(c, branch_from=f"{name}-stable") for run, c in runs.items()}
        ladder |= runs
    return ladder


def shared_tokens(run: PretrainConfig) -> int:
    """Tokens that the stable run of its size sees for a run of the ladder."""
    return cooldown_start(run) * run.batch_tokens if run.branch_from else 0


def schedule_of(base: PretrainConfig) -> str:
    """How the learning rate goes in every run, the main model's too, in words."""
    if base.schedule == "linear":
        return "each run has its own, decayed to zero"
    return (f"{base.schedule}: one run a size at a constant rate, and off it a cooldown over the last {base.cooldown_share:.0%} of each "
            "budget, so that the points of a size share its noise, which a product's intervals do not know of")


def nested(config: PretrainConfig, name: str, run: Run) -> PretrainConfig:
    """A run of the ladder in the ladder's folder. What an earlier ladder in the same place has finished is copied, and run again only if
    its fingerprint is another; a stable run that was shorter there goes on from that one. For every process."""
    earlier, here = run.final / name, run.directory / name
    if is_main() and (earlier / MANIFEST).is_file() and not list(here.parent.glob(here.name + "*")):
        shutil.copytree(earlier, here)
    config = replace(config, run_dir=str(here), branch_from=config.branch_from and str(run.directory / config.branch_from))
    if config.keep_at and (earlier / MANIFEST).is_file():
        try:
            usable_checkpoints(config, Manifest(earlier), run.identity["parents"])
        except ValueError:  # other settings: from its beginning
            return config
        return replace(config, branch_from=str(earlier))
    return config


class Pace:
    """How far a ladder is. `flops`: of each run, what no other run has spent for it."""

    def __init__(self, flops: Mapping[str, float]):
        self.left, self.runs, self.total = dict(flops), len(flops), sum(flops.values())
        self.trained, self.since = 0.0, time.time()

    def begins(self, name: str, beside: Collection[str] = ()) -> None:
        left = sum(self.left.values())
        eta = clock(left / self.trained * (time.time() - self.since)) if self.trained else "after this run"
        say(f"ladder {self.runs - len(self.left) + len(beside) + 1}/{self.runs}: {name}, {1 - left / self.total:.0%} of {self.total:.2g} "
            f"FLOPs done, ETA of the ladder {eta}")

    def ends(self, name: str, *, trained: bool) -> None:
        flops = self.left.pop(name, 0.0)
        self.trained += flops if trained else 0.0


def train_ladder(ladder: dict[str, PretrainConfig], flops: Mapping[str, float], order: Sequence[str], run: Run, jobs: int,
                 ) -> dict[str, Manifest]:
    """Train the runs of a ladder in `order`, or `jobs` at once, and return the manifest of each. For every process."""
    pace, manifests = Pace(flops), {}
    if jobs > 1:
        at_once(ladder, order, run, jobs, pace)
    for name in order:
        settings = nested(ladder[name], name, run)
        barrier()
        if known(settings, run):
            manifests[name] = Manifest(settings.run_dir)
            pace.ends(name, trained=False)
            continue
        pace.begins(name)
        manifests[name] = pretrain(settings)
        barrier()
        pace.ends(name, trained=True)
    return manifests


def known(config: PretrainConfig, run: Run) -> bool:
    """Whether a run of the ladder is there, finished, with these settings. One that was upcycled `pretrain` has to look at."""
    if config.upcycle or not (Path(config.run_dir) / MANIFEST).is_file():
        return False
    identity = Manifest(config.run_dir).data["identity"]
    return (identity["config"], identity["parents"]) == (config.fingerprinted(), run.identity["parents"])


def at_once(ladder: dict[str, PretrainConfig], order: Sequence[str], run: Run, jobs: int, pace: Pace) -> None:
    """Train the runs of a ladder `jobs` at a time, each as a stages.pretrain of its own with its share of the cores.

    The dear ones begin, so that none is left to train alone; a branch waits for the run it goes on from. Raises ValueError when one
    stops, after the others have saved what they had.
    """
    logs = run.directory / "logs"
    logs.mkdir(exist_ok=True)
    say(f"{jobs} runs train at a time, with {max(1, cores() // jobs)} threads each; what they print goes to {logs}")
    waiting, finished = list(reversed(order)), set[str]()
    at_work: dict[str, subprocess.Popen] = {}
    environment = {"ACCELERATE_MIXED_PRECISION": "no", **os.environ, "OMP_NUM_THREADS": str(max(1, cores() // jobs))}  # dies with this one
    try:
        while waiting or at_work:
            ready = [name for name in waiting if ladder[name].branch_from in (None, *finished)]
            for name in ready[:jobs - len(at_work)]:
                waiting.remove(name)
                config = nested(ladder[name], name, run)
                if known(config, run):
                    pace.ends(name, trained=False)
                    finished.add(name)
                    continue
                pace.begins(name, at_work)
                (logs / f"{name}.yaml").write_text(yaml.safe_dump(vars(config)), encoding="utf-8")
                with (logs / f"{name}.txt").open("a", encoding="utf-8") as log:
                    at_work[name] = subprocess.Popen([sys.executable, "-m", "stages.pretrain", "--config", str(logs / f"{name}.yaml")],
                                                     stdout=log, stderr=subprocess.STDOUT, env=environment)
            time.sleep(0.2)
            for name in [name for name, process in at_work.items() if process.poll() is not None]:
                if at_work.pop(name).returncode:
                    lines = (logs / f"{name}.txt").read_text(encoding="utf-8", errors="replace").split("\n")
                    raise ValueError(f"the ladder's run {name} stopped: {next(filter(None, reversed(lines)), 'it said nothing')}")
                pace.ends(name, trained=True)
                say(f"{name} is finished: held-out loss {Manifest(run.directory / name).metrics['heldout_loss']['value']:.4f}")
                finished.add(name)
    finally:
        for process in at_work.values():
            process.terminate()
        for process in at_work.values():
            process.wait()
