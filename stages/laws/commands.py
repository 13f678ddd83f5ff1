"""`python -m stages.scaling fit | predict | plan | holdout | isoflop | emergence`: laws on runs that somebody else trained."""
import argparse
import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from stages.laws.emergence import emergence, summary
from stages.laws.fit import PARAMETERS, cross_check, fit_law, formula, predict, refuse_far
from stages.laws.holdout import holdout, rolling, widened
from stages.laws.isoflop import METHODS, approach_2, vertex_bias
from stages.laws.objective import DELTA
from stages.laws.planner import plan
from stages.laws.points import read_columns
from stages.laws.variants import (
    EXPERT_POWERS,
    effective_parameters,
    effective_tokens,
    fit_overtraining,
    profile,
    supported,
    wear,
    without_excess,
)
from stages.run.manifest import write_json

COMMANDS = ("fit", "predict", "plan", "holdout", "isoflop", "emergence")
UNSTATED = "its convention not stated"
MAX_RATIO = 1000.0  # published ladders were extrapolated 200 (Bhagia et al. 2024) to 390 times (Gadre et al. 2024) in FLOPs


def parser_of(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages.scaling", description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, file: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("file", help=file, nargs="+" if name == "emergence" else None)
        return one

    fit = add("fit", "fit E + A / N^alpha + B / D^beta to runs", "csv or jsonl of runs")
    hold = add("holdout", "fit the cheap runs, predict the dear ones", "csv or jsonl of runs")
    iso = add("isoflop", "compute-optimal sizes by approach 2", "csv or jsonl of runs, several sizes at each of several budgets")
    for one in (fit, hold, iso):
        one.add_argument("--n-column", default="N", help="column of the parameters (of experts, those a token visits)")
        one.add_argument("--c-column", help="column of the training FLOPs; without --d-column D = C / 6 N")
        one.add_argument("--loss-column", default="loss", help="column of the loss, nats a token")
        one.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE", help="use only rows with this value")
        one.add_argument("--seed", type=int, default=0)
    for one in (fit, hold):
        one.add_argument("--d-column", help="column of the training tokens (default D)")
        one.add_argument("--run-column", help="column that names the training run, of several rows each")
        one.add_argument("--weight-column", help="column of weights of the objective's terms")
        one.add_argument("--floor", type=float, help="E where it is known (default: fitted)")
        one.add_argument("--delta", type=float, default=DELTA, help="Huber's threshold on log loss")
        one.add_argument("--draws", type=int, default=300, help="bootstrap draws")
    fit.add_argument("--drop-worst", type=int, default=0, metavar="K", help="leave out the K rows farthest from a first fit")
    fit.add_argument("--n-convention", default=UNSTATED, help="what N counts: total, non_embedding, matmul or your words")
    fit.add_argument("--unique-column", help="column of the distinct tokens of runs that repeat data: a profile of how fast they wear out")
    fit.add_argument("--total-column", help="column of all parameters of models with experts: a profile of what idle ones are worth")
    fit.add_argument("--out", help="also write fit.json here")
    hold.add_argument("--train-below-flops", type=float, help="fit the runs below, predict the others")
    hold.add_argument("--fraction", type=float, default=0.25, help="without it: share of the runs, the dearest, to predict")
    iso.add_argument("--method", choices=METHODS, default="parabola")
    iso.add_argument("--window", type=float, default=8.0, help="a parabola goes through sizes within this factor of the best one")

    ask = add("predict", "the loss of a run, with its interval", "fit.json")
    ask.add_argument("--params", type=float, required=True, help="N, in the convention of the fit")
    ask.add_argument("--tokens", type=float, required=True, help="D, training tokens")
    ask.add_argument("--unique-tokens", type=float, help="distinct ones among them, for a fit with --unique-column")
    ask.add_argument("--total-params", type=float, help="all parameters of a model with experts, for a fit with --total-column")
    spend = add("plan", "best N and D for a budget or a loss", "fit.json")
    goal = spend.add_mutually_exclusive_group(required=True)
    goal.add_argument("--flops", type=float, help="budget; with --inference-tokens that of training and serving together")
    goal.add_argument("--loss", type=float, help="loss to reach at the least cost")
    spend.add_argument("--inference-tokens", type=float, default=0.0, help="tokens that the model will read and write when used")
    spend.add_argument("--price-ratio", type=float, default=1.0, help="price of an inference FLOP over that of a training FLOP")
    for one in (ask, spend):
        one.add_argument("--max-ratio", type=float, default=MAX_RATIO,
                         help="refuse to go farther than this factor beyond the runs in N, D or their product")

    jump = add("emergence", "accuracy and a smooth score over compute, task by task", "one csv or jsonl a task, one model a row")
    jump.add_argument("--flops-column", default="flops")
    jump.add_argument("--accuracy-column", default="accuracy")
    jump.add_argument("--smooth-column", default="brier")
    jump.add_argument("--without", action="append", default=[], metavar="COLUMN=VALUE", help="leave out rows with this value")
    jump.add_argument("--out", help="also write the table with each task's rows here")
    return parser


def command(arguments: list[str], description: str | None = None) -> int:
    """Run a subcommand and return its exit code: 0 with one JSON object on stdout and, for people, its figures in one line on stderr; 2
    with one line on bad input and nothing written."""
    if not arguments or (arguments[0] not in COMMANDS and not arguments[0].startswith("-")):
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1) if arguments else []
        remedy = f"did you mean {near[0]!r}?" if near else (
            f"give {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]} with a table or fit.json, or --config recipes/<recipe>/scaling.yaml to "
            "train a ladder")
        print(f"error: {f'unknown command {arguments[0]!r}' if arguments else 'no command and no --config'}: {remedy}", file=sys.stderr)
        return 2
    a = parser_of(description).parse_args(arguments)
    try:
        result = {"fit": fit, "holdout": hold_out, "isoflop": isoflop, "predict": ask, "plan": spend, "emergence": jumps}[a.command](a)
        text = json.dumps(result, indent=1, allow_nan=False)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in [*filter(None, [brief(result)]), *(f"warning: {each}" for each in result.get("warnings", ()))]:
        print(line, file=sys.stderr)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def brief(result: dict[str, Any]) -> str:
    """The figures of `predict` and `plan` in one line; empty for what has none."""
    named = {name: part for name, part in result.items() if isinstance(part, dict) and "value" in part}
    parts = [f"{name} {part['value']:.4g}" + (" [{:.4g}, {:.4g}]".format(*part["interval"]) if part.get("interval") else "")
             for name, part in named.items()]
    return ", ".join(parts + [f"{name} {result[name]:.4g}" for name in ("N", "D") if "loss" in named and name not in named])


def runs(a: argparse.Namespace) -> dict[str, np.ndarray]:
    """The columns of the runs, with D and FLOPs filled in. Raises ValueError for tables that cannot be used."""
    columns = {"N": a.n_column, "loss": a.loss_column}
    if a.c_column:
        columns["C"] = a.c_column
    if getattr(a, "d_column", None) or not a.c_column:
        columns["D"] = getattr(a, "d_column", None) or "D"
    columns |= {what: name for what in ("run", "weight", "unique", "total") if (name := getattr(a, f"{what}_column", None))}
    table = read_columns(a.file, columns, where=a.where, labels=("run",))
    for what in columns:
        if what != "run" and not (table[what] > 0).all():
            raise ValueError(f"{a.file}: {columns[what]} is {table[what].min():g} in some row: it must be positive; leave such rows out "
                             "with --where")
    if "D" not in table:
        table["D"] = table["C"] / (6 * table["N"])
    if len(table["D"]) > 1 and np.ptp(table["D"]) == 0:
        raise ValueError(f"{a.file}: D is {table['D'][0]:g} in every row, so nothing tells its term from E: give runs of three budgets or "
                         "more")
    return table | {"flops": table["C"] if "C" in table else 6 * table["N"] * table["D"]}


def conventions_of(a: argparse.Namespace, table: dict[str, np.ndarray]) -> dict[str, Any]:
    """How N, D and FLOPs were counted; travels in fit.json."""
    exact = "C" in table and a.d_column is not None
    k = table["flops"] / (table["N"] * table["D"])
    flops = f"column {a.c_column}: {k.min():.4g} to {k.max():.4g} times N D, median {np.median(k):.4g}" if exact else "6 N D"
    return {"source": Path(a.file).name, "where": a.where, "N": f"column {a.n_column}, {a.n_convention}",
            "D": f"column {a.d_column or 'D'}" if exact or not a.c_column else f"column {a.c_column} / 6 N", "flops": flops,
            "flops_per_unit": float(np.median(k)), "loss": f"column {a.loss_column}"}


def fit(a: argparse.Namespace) -> dict[str, Any]:
    table = runs(a)
    N, D, loss = table["N"], table["D"], table["loss"]
    if a.drop_worst < 0 or a.draws < 0 or not a.delta > 0:
        raise ValueError(f"--drop-worst {a.drop_worst} and --draws {a.draws} must not be negative, --delta {a.delta:g} must be positive")
    if a.out and not Path(a.out).parent.is_dir():
        raise ValueError(f"--out {a.out}: there is no folder {Path(a.out).parent}: make it first")
    settings = {"floor": a.floor, "delta": a.delta, "weights": table.get("weight")}
    conventions, extra = conventions_of(a, table), {}
    if "unique" in table and "total" in table:
        raise ValueError("one profile at a time: give --unique-column or --total-column")
    if "total" in table and (table["total"] == N).all():
        raise ValueError(f"--total-column {a.total_column} equals --n-column {a.n_column} in every row, so that no parameter is idle and "
                         "nothing can be said of idle ones: give the column of all parameters, or leave --total-column out")
    if "unique" in table:
        extra = wear(N, D, loss, table["unique"], **settings)
        D = effective_tokens(D, table["unique"], extra["repetition"]["best"])
        conventions["D"] += f", repeated tokens worn out at R* = {extra['repetition']['best']:.3g}"
        if "excess" in extra:
            N = without_excess(N, supported(extra["excess"]["law"], table["unique"]), extra["excess"]["best"])
            conventions["N"] += f", those in excess of the text worn out at R* = {extra['excess']['best']:.3g}"
    if "total" in table:
        extra["experts"] = profile(EXPERT_POWERS, lambda power: (effective_parameters(N, table["total"], power), D), loss, **settings)
        N = effective_parameters(N, table["total"], extra["experts"]["best"])
        conventions["N"] += f", made effective with g = {extra['experts']['best']:.3g}"
    law = fit_law(N, D, loss, runs=table.get("run"), drop_worst=a.drop_worst, num_draws=a.draws, seed=a.seed, conventions=conventions,
                  **settings)
    law["projection"] = cross_check(law, N, D, loss, **settings)
    kept = np.setdiff1d(np.arange(len(N)), law["dropped"])
    part = {name: values[kept] for name, values in {**table, "N": N, "D": D}.items()}
    law["coverage"] = rolling(part["N"], part["D"], part["loss"], flops=part["flops"], runs=part.get("run"), weights=part.get("weight"),
                              floor=a.floor, delta=a.delta, seed=a.seed)
    law |= extra
    if a.floor is None:
        law["overtraining"] = fit_overtraining(part["N"], part["D"], part["loss"])
    if law["projection"]["excess"] > 1e-6:
        law["warnings"].append(f"variable projection found an objective {law['projection']['excess']:.2g} lower: the minimum is not sure")
    if a.n_convention == UNSTATED:
        law["warnings"].append("what N counts is not stated (--n-convention): conventions move its exponent by as much as .15")
    law["warnings"] += [f"the {name} profile is open: the runs do not bound it"
                        for name, found in extra.items() if None in found["interval"]]
    if a.out:
        write_json(Path(a.out), law)
    return {"law": formula(law)} | {key: value for key, value in law.items() if key not in ("draws", "residuals")}


def hold_out(a: argparse.Namespace) -> dict[str, Any]:
    table = runs(a)
    settings = {"flops": table["flops"], "runs": table.get("run"), "weights": table.get("weight"), "floor": a.floor, "delta": a.delta,
                "seed": a.seed}
    report = holdout(table["N"], table["D"], table["loss"], fraction=a.fraction, below=a.train_below_flops, num_draws=a.draws, **settings)
    return report | {"rolling": rolling(table["N"], table["D"], table["loss"], **settings)}


def isoflop(a: argparse.Namespace) -> dict[str, Any]:
    if not a.c_column:
        raise ValueError("isoflop needs --c-column, the budget of each row")
    table = runs(a)
    found = approach_2(table["C"], table["N"], table["loss"], method=a.method, window=a.window)
    if repeated := len(table["N"]) - len({*zip(table["C"], table["N"], strict=True)}):
        found["warnings"] = [f"{repeated} rows repeat a size of their budget, of which the lowest loss counts: if they are of several "
                             "experiments, select one with --where"]
    if a.method == "parabola":
        law = fit_law(table["N"], table["D"], table["loss"], num_draws=0)
        found["bias"] = {"alpha": law["alpha"], "beta": law["beta"], "factor_on_N": vertex_bias(law["alpha"], law["beta"], a.window),
                         "a_by_the_sum": law["beta"] / (law["alpha"] + law["beta"])}
    return found


def read_fit(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist: give the fit.json that fit --out wrote")
    try:
        law = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not JSON: give the fit.json that fit --out wrote") from None
    if not isinstance(law, dict) or not all(isinstance(law.get(name), int | float) for name in PARAMETERS):
        raise ValueError(f"{path} does not hold the numbers {', '.join(PARAMETERS)}: give the fit.json that fit --out wrote")
    return law


def bounded(law: dict[str, Any]) -> bool:
    """Whether a fit has what intervals are made of."""
    return bool(law.get("draws") or law.get("product"))


def trust(law: dict[str, Any]) -> dict[str, Any]:
    """What stands beside each prediction: how often such intervals held what was measured, and the fit's own warnings."""
    return {"coverage": law.get("coverage"), "conventions": law.get("conventions"), "warnings": law.get("warnings", [])}


def ask(a: argparse.Namespace) -> dict[str, Any]:
    law, N, D = read_fit(a.file), a.params, a.tokens
    if not (N > 0 and D > 0):
        raise ValueError(f"--params {N:g} and --tokens {D:g} must be positive")
    for value, key, option in ((a.unique_tokens, "repetition", "unique"), (a.total_params, "experts", "total")):
        if (value is None) == (key in law):
            raise ValueError(f"{a.file} was fitted {'with' if key in law else 'without'} --{option}-column: "
                             f"{'give' if key in law else 'leave out'} --{'unique-tokens' if option == 'unique' else 'total-params'}")
    if a.unique_tokens is not None:
        D = float(effective_tokens(D, a.unique_tokens, law["repetition"]["best"]))
        if "excess" in law:
            N = float(without_excess(N, supported(law["excess"]["law"], a.unique_tokens), law["excess"]["best"]))
    if a.total_params is not None:
        N = float(effective_parameters(N, a.total_params, law["experts"]["best"]))
    refuse_far(law, N, D, a.max_ratio)
    value, interval = predict(law, N, D)
    found = {"N": a.params, "D": a.tokens, "loss": {"value": value, "interval": list(interval) if bounded(law) else None}}
    if bounded(law) and law.get("coverage", {}).get("by_reach"):
        found["loss"]["widened"] = widened(law["coverage"], N * D / law["range"]["ND"][1], value, interval)
    return found | trust(law)


def spend(a: argparse.Namespace) -> dict[str, Any]:
    law = read_fit(a.file)
    figures = plan(law, a.flops, loss=a.loss, inference_tokens=a.inference_tokens, price_ratio=a.price_ratio)
    refuse_far(law, figures["N"]["value"], figures["D"]["value"], a.max_ratio)
    return figures | trust(law)


def jumps(a: argparse.Namespace) -> dict[str, Any]:
    columns, tasks = {"flops": a.flops_column, "accuracy": a.accuracy_column, "smooth": a.smooth_column}, {}
    tables = {file: read_columns(file, columns, without=a.without, skip_missing=True) for file in a.file}
    if idle := set(a.without).intersection(*(table["idle"].tolist() for table in tables.values())):
        raise ValueError(f"--without {min(idle)} leaves out nothing: no row of {', '.join(a.file)} has that value; look for a misspelling")
    for file, table in tables.items():
        if not (table["flops"] > 0).all():
            raise ValueError(f"{file}: {a.flops_column} must be positive in every row")
        try:
            tasks[Path(file).stem] = emergence(table["flops"], table["accuracy"], table["smooth"]) | {"skipped": int(table["skipped"])}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    if a.out:
        write_json(Path(a.out), tasks)
    return summary(tasks)
