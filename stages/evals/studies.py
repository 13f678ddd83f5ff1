"""What studies share: a stage run once, means over seeds, tables."""
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prompts.intervals import mean_interval
from stages.run.manifest import Manifest

# Problems for studies of PPO at width 64: easy ones, of which such a base gets most right when it decodes greedily and half when it
# samples, so that PPO has much to win and much to lose. At the tiny recipe's 3 to 5 steps it solves an eighth, and nothing that PPO
# did could be told from nothing (LOG.md).
EASY: dict[str, Any] = {"difficulties": [1, 2]}
EASY_RANKED: dict[str, Any] = EASY | {"responses_per_prompt": 8, "temperature": 1.0}
UNTAXED: dict[str, Any] = {"probe_prompts": 0, "forgetting_rows": 0}  # what PPO does to other skills is not their question
# Reward models made good and bad on purpose: what of a model is trained.
CAPACITIES: dict[str, dict[str, Any]] = {"full": {}, "rank 1": {
    "method": "lora", "lora_rank": 1, "lora_alpha": 2, "optimizer": "adamw", "learning_rate": 1e-3}}


def stage(name: str, folder: Path, **settings: Any) -> Manifest:
    """A finished run of a stage with the tiny recipe's settings but those given. Raises ValueError when it stops."""
    flags = [part for key, value in {**settings, "run_dir": str(folder)}.items()
             for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))]
    if subprocess.run([sys.executable, "-m", f"stages.{name}", "--config", f"recipes/tiny/{name}.yaml", *flags], check=False).returncode:
        raise ValueError(f"{folder} stopped, see above; the same command continues there")
    return Manifest(folder)


def mean(values: Sequence[float], digits: int = 3) -> str:
    """Mean over seeds with its 95 % interval by Student's t; the value alone where seeds do not differ."""
    if len(set(values)) == 1:
        return f"{values[0]:.{digits}f}"
    centre, low, high = mean_interval(values)
    return f"{centre:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
