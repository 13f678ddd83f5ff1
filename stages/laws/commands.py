"""`python -m stages.scaling fit | predict | plan | holdout`: the law on runs that somebody else trained."""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from stages.laws.fit import fit_law, holdout, predict, read_points
from stages.laws.planner import plan
from stages.run.manifest import write_json

COMMANDS = ("fit", "predict", "plan", "holdout")


def command(arguments: list[str], description: str | None = None) -> int:
    """Run a subcommand and return its exit code: 0 with one JSON object on stdout, 2 with one line on bad input."""
    parser = argparse.ArgumentParser(prog="python -m stages.scaling", description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("file", help="csv or jsonl of runs; predict and plan also read fit.json")
    parser.add_argument("--columns", default="N,D,loss", help="names of the three columns")
    parser.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="use only rows with this value")
    parser.add_argument("--draws", type=int, default=300, help="bootstrap draws")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="fit: also write fit.json here")
    parser.add_argument("--N", type=float, help="predict: parameters, in the convention of the fit")
    parser.add_argument("--D", type=float, help="predict: training tokens")
    parser.add_argument("--flops", type=float, help="plan: budget, as 6 N D")
    parser.add_argument("--fraction", type=float, default=0.25, help="holdout: share of the runs, the dearest, to predict")
    a = parser.parse_args(arguments)
    try:
        print(json.dumps(answer(a), indent=1, allow_nan=False))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def answer(a: argparse.Namespace) -> dict[str, Any]:
    """What a subcommand prints. Raises ValueError for arguments or files it cannot use."""
    def points() -> np.ndarray:
        columns = a.columns.split(",")
        if len(columns) != 3 or any("=" not in w for w in a.where):
            raise ValueError("give --columns as three names such as N,D,loss and --where as COLUMN=VALUE")
        return read_points(a.file, columns=columns, where=dict(w.split("=", 1) for w in a.where))

    if a.command == "holdout":
        return holdout(*points().T, fraction=a.fraction, num_draws=a.draws, seed=a.seed)
    if a.file.endswith(".json") and a.command != "fit":
        fit = json.loads(Path(a.file).read_text(encoding="utf-8"))
    else:
        fit = fit_law(*points().T, num_draws=a.draws, seed=a.seed,
                      conventions={"source": Path(a.file).name, "columns": a.columns})
    if a.command == "fit":
        if a.output:
            write_json(Path(a.output), fit)
        return {key: value for key, value in fit.items() if key not in ("draws", "residuals")}
    if a.command == "plan":
        if a.flops is None:
            raise ValueError("plan needs --flops, for example 1e21")
        return plan(fit, a.flops)
    if a.N is None or a.D is None:
        raise ValueError("predict needs --N and --D, for example --N 1e9 --D 2e10")
    value, interval = predict(fit, a.N, a.D)
    return {"N": a.N, "D": a.D, "loss": {"value": value, "interval": list(interval)}}
