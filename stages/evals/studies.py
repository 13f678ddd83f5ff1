"""What studies and benchmarks share: a stage run once, variants in rounds, means over seeds, tables."""
import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prompts.intervals import mean_interval
from stages.run.config import runs_of
from stages.run.manifest import Manifest, say

# Problems for studies of PPO at width 64: easy ones, of which such a base gets most right when it decodes greedily and half when it
# samples, so that PPO has much to win and much to lose. At the tiny recipe's 3 to 5 steps it solves an eighth, and nothing that PPO
# did could be told from nothing (LOG.md).
EASY: dict[str, Any] = {"difficulties": [1, 2]}
EASY_RANKED: dict[str, Any] = EASY | {"responses_per_prompt": 8, "temperature": 1.0}
UNTAXED: dict[str, Any] = {"probe_prompts": 0, "forgetting_rows": 0}  # what PPO does to other skills is not their question
# Reward models made good and bad on purpose: what of a model is trained.
CAPACITIES: dict[str, dict[str, Any]] = {"full": {}, "rank 1": {
    "method": "lora", "lora_rank": 1, "lora_alpha": 2, "optimizer": "adamw", "learning_rate": 1e-3}}


def places(parser: argparse.ArgumentParser, study: str, line: str = "a run", *, base: tuple[int, int] | None = None) -> None:
    """What studies ask alike: width and tokens of the `base` that they train, where text and problems come from, where they write."""
    if base:
        parser.add_argument("--hidden-size", type=int, default=base[0], help="width of the base")
        parser.add_argument("--train-tokens", type=int, default=base[1], help="tokens that the base is pretrained on")
    parser.add_argument("--prepare", default=f"{runs_of()}/tiny/prepare", help="finished prepare run that text and problems come from")
    parser.add_argument("--runs", type=Path, default=Path(runs_of()) / study, help="a folder a run in here")
    parser.add_argument("--out", type=Path, help=f"one JSON line {line} (default: {study}.jsonl in --runs)")


def stage(name: str, folder: Path, **settings: Any) -> Manifest:
    """A finished run of a stage with the tiny recipe's settings but those given. Raises ValueError when it stops."""
    flags = [part for key, value in {**settings, "run_dir": str(folder)}.items()
             for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))]
    if subprocess.run([sys.executable, "-m", f"stages.{name}", "--config", f"recipes/tiny/{name}.yaml", *flags], check=False).returncode:
        raise ValueError(f"{folder} stopped, see above; the same command continues there")
    return Manifest(folder)


def measured(what: str, *command: str, python: str = sys.executable, launch: Sequence[str] = (), **environment: str) -> dict[str, Any]:
    """The last line of JSON that a module prints in a process of its own, or in several that `launch` starts. Raises ValueError with the
    end of its errors when it stops."""
    done = subprocess.run([python, *launch, "-m", *command], capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise ValueError(f"{what} stopped: {done.stderr[-1000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def in_rounds(given: Any, sizes: Sequence[Any], run: Callable[[str, Any], dict[str, Any]],
              summary: Callable[[Sequence[dict[str, Any]], Any], str]) -> None:
    """`run` every variant at every size once a round, so that what slows the machine slows all: a line each, then a table a size."""
    runs = []
    for number, size, name in itertools.product(range(given.rounds), sizes, given.variants):
        runs.append({"round": number + 1, **run(name, size)})
        say(json.dumps(runs[-1]))
    for size in sizes:
        say("\n" + summary(runs, size))


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Mean over seeds with its 95 % interval by Student's t; the value alone where seeds do not differ."""
    if len(set(values)) == 1:
        return f"{values[0]:.{digits}f}"
    centre, low, high = mean_interval(values)
    return f"{centre:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
