"""How far a law can be trusted beyond its runs, measured: fitted on the cheap ones, asked for the dear ones."""
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stages.laws.fit import PARAMETERS, Form, fit_law, predict
from stages.laws.objective import DELTA, Array

LEVEL = 0.95
STEPS = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares of the runs that a rolling hold-out fits, each asked for the next tenth


def cost_of_runs(N: Array, D: Array, flops: ArrayLike | None, runs: ArrayLike | None) -> Array:
    """(n,) FLOPs of the whole run that each measurement belongs to: a run is never both fitted and held out."""
    flops = 6 * N * D if flops is None else np.asarray(flops, dtype=np.float64).ravel()
    if runs is None:
        return flops
    _, index = np.unique(np.asarray(runs), return_inverse=True)
    dearest = np.zeros(index.max() + 1)
    np.maximum.at(dearest, index, flops)
    return dearest[index]


def holdout(N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, fraction: float = 0.25, below: float | None = None,
            flops: ArrayLike | None = None, weights: ArrayLike | None = None, runs: ArrayLike | None = None, floor: float | None = None,
            delta: float = DELTA, num_draws: int = 300, seed: int = 0, form: Form = "sum",
            conventions: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fit on the cheap runs, predict the dear ones: relative error and the share of losses inside their 95 % interval.

    `flops` (n,) orders the runs (default 6 N D). Fitted are those under `below` FLOPs, or all but the dearest `fraction`; the rest as
    in `fit_law`. Returns num_fitted, num_heldout, error_mean, error_max (absolute relative errors), error_signed, coverage, level, and
    each held-out run's row. Raises ValueError when nothing is left to fit or to predict.
    """
    N, D, loss = (np.asarray(values, dtype=np.float64).ravel() for values in (N, D, loss))
    cost = cost_of_runs(N, D, flops, runs)
    order = np.argsort(cost, kind="stable")
    if below is None:
        below = float(cost[order[-max(1, round(fraction * len(order)))]])
        if cost[order[0]] == below:
            raise ValueError("all runs cost the same FLOPs, so none is cheaper than those held out: give runs of several budgets")
    small, large = order[cost[order] < below], order[cost[order] >= below]
    if not len(small) or not len(large):
        raise ValueError(f"{len(small)} runs lie below {below:.4g} FLOPs and {len(large)} above: the runs cost {cost.min():.4g} to "
                         f"{cost.max():.4g}")
    fit = fit_law(N[small], D[small], loss[small], floor=floor, form=form, delta=delta, num_draws=num_draws, seed=seed,
                  conventions=conventions, weights=None if weights is None else np.asarray(weights)[small],
                  runs=None if runs is None else np.asarray(runs)[small])
    rows = []
    for i in large:
        value, interval = predict(fit, N[i], D[i], level=LEVEL)
        rows.append({"N": N[i], "D": D[i], "loss": loss[i], "value": value, "interval": list(interval)})
    errors = np.array([row["value"] / row["loss"] - 1 for row in rows])
    covered = [row["interval"][0] <= row["loss"] <= row["interval"][1] for row in rows]
    return {"num_fitted": len(small), "num_heldout": len(large), "level": LEVEL, "coverage": float(np.mean(covered)),
            "error_mean": float(np.abs(errors).mean()), "error_max": float(np.abs(errors).max()),
            "error_signed": float(errors.mean()), "runs": rows,
            "fit": {key: fit[key] for key in (*PARAMETERS, "intervals", "conventions", "form", "warnings")}}


def rolling(N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, flops: ArrayLike | None = None, runs: ArrayLike | None = None,
            weights: ArrayLike | None = None, num_draws: int = 100, **settings: Any) -> dict[str, Any]:
    """Coverage of the 95 % intervals on rolling hold-outs: the cheapest half of the runs predicts the next tenth, then 60 %, and so on.

    Returns nominal, measured (None where no step leaves enough to fit), num_heldout, error_mean, error_signed (relative, over all held-out
    measurements). `settings` are those of `holdout`.
    """
    N, D, loss = (np.asarray(values, dtype=np.float64).ravel() for values in (N, D, loss))
    cost = cost_of_runs(N, D, flops, runs)
    inside, errors = 0, []
    ends = np.quantile(cost, (*STEPS, 1.0), method="higher")
    for low, high in pairwise(ends):
        part = cost <= high
        try:
            report = holdout(N[part], D[part], loss[part], below=np.nextafter(low, np.inf), flops=cost[part], num_draws=num_draws,
                             weights=None if weights is None else np.asarray(weights)[part],
                             runs=None if runs is None else np.asarray(runs)[part], **settings)
        except ValueError:  # too few to fit, or no run in this step: later steps have more
            continue
        inside += round(report["coverage"] * report["num_heldout"])
        errors += [row["value"] / row["loss"] - 1 for row in report["runs"]]
    if not errors:
        return {"nominal": LEVEL, "measured": None, "num_heldout": 0}
    return {"nominal": LEVEL, "measured": inside / len(errors), "num_heldout": len(errors),
            "error_mean": float(np.abs(errors).mean()), "error_signed": float(np.mean(errors))}
