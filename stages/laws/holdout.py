"""How far a law can be trusted beyond its runs, measured: fitted on the cheap ones, asked for the dear ones."""
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stages.laws.fit import PARAMETERS, Form, fit_law, predict
from stages.laws.objective import DELTA, Array

LEVEL = 0.95
STEPS = (0.3, 0.45, 0.6, 0.75, 0.9)  # shares of the runs that a rolling hold-out fits
REACHES = (1.0, 3.0, 10.0, 30.0, np.inf)  # how many times dearer a predicted run is than the dearest fitted one


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
            reach: float = 1.0, flops: ArrayLike | None = None, weights: ArrayLike | None = None, runs: ArrayLike | None = None,
            floor: float | None = None, delta: float = DELTA, num_draws: int = 300, seed: int = 0, form: Form = "sum",
            conventions: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fit on the cheap runs, predict the dear ones: relative error and the share of losses inside their 95 % interval.

    `flops` (n,) orders the runs (default 6 N D). Fitted are those under `below` FLOPs, or all but the dearest `fraction`; predicted those
    above that cost at least `reach` times the dearest fitted one; the rest as in `fit_law`. Returns num_fitted, num_heldout, error_mean,
    error_max (absolute relative errors), error_signed, coverage, level, and each held-out run's row. Raises ValueError when nothing is
    left to fit or to predict.
    """
    N, D, loss = (np.asarray(values, dtype=np.float64).ravel() for values in (N, D, loss))
    cost = cost_of_runs(N, D, flops, runs)
    order = np.argsort(cost, kind="stable")
    if below is None:
        below = float(cost[order[-max(1, round(fraction * len(order)))]])
        if cost[order[0]] == below:
            raise ValueError("all runs cost the same FLOPs, so none is cheaper than those held out: give runs of several budgets")
    small = order[cost[order] < below]
    large = order[(cost[order] >= below) & (cost[order] >= reach * cost[small].max(initial=0.0))]
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
            num_draws: int = 100, **settings: Any) -> dict[str, Any]:
    """Coverage of the 95 % intervals on rolling hold-outs: the cheapest 30 % of the runs predict all dearer ones, then 45 %, and so on.

    Returns nominal, measured (None where no step leaves enough to fit), num_heldout (predictions: a dear run is predicted at each step),
    error_mean and error_signed (relative), widening (how many times longer in log loss the intervals needed to be to hold 95 %), and
    by_reach: the same apart for predictions up to 3, 10, 30 and more times the FLOPs of the dearest run fitted. `settings` are those of
    `holdout`.
    """
    N, D, loss = (np.asarray(values, dtype=np.float64).ravel() for values in (N, D, loss))
    cost = cost_of_runs(N, D, flops, runs)
    rows = []
    for step in np.unique(np.quantile(cost, STEPS, method="higher")):
        try:
            report = holdout(N, D, loss, below=float(np.nextafter(step, np.inf)), flops=cost, runs=runs, num_draws=num_draws, **settings)
        except ValueError:  # too few to fit: later steps have more
            continue
        for row, reach in zip(report["runs"], np.sort(cost[cost > step]) / step, strict=True):
            error = np.log(row["loss"] / row["value"])
            length = np.log(np.array(row["interval"]) / row["value"])[int(error > 0)]
            rows.append((reach, row["interval"][0] <= row["loss"] <= row["interval"][1], row["value"] / row["loss"] - 1,
                         abs(error) / max(abs(length), 1e-12)))
    if not rows:
        return {"nominal": LEVEL, "measured": None, "num_heldout": 0, "by_reach": []}
    reach, inside, error, needed = np.array(rows).T

    def part(chosen: np.ndarray) -> dict[str, Any]:
        return {"measured": float(inside[chosen].mean()), "num_heldout": int(chosen.sum()),
                "error_mean": float(np.abs(error[chosen]).mean()), "error_signed": float(error[chosen].mean()),
                "reach_max": float(reach[chosen].max()), "widening": max(1.0, float(np.quantile(needed[chosen], LEVEL, method="higher")))}

    parts = [(reach > low) & (reach <= high) for low, high in pairwise(REACHES)]
    return {"nominal": LEVEL, **part(reach > 0), "by_reach": [part(chosen) for chosen in parts if chosen.any()]}


def widened(coverage: Mapping[str, Any], reach: float, value: float, interval: tuple[float, float]) -> dict[str, Any]:
    """A prediction's interval made as much longer as rolling hold-outs of its reach (FLOPs over those of the dearest run) needed.

    Returns the interval, what was measured at this reach, and whether hold-outs went as far; where none did, the farthest stand in.
    """
    near = next((part for part in coverage["by_reach"] if part["reach_max"] >= reach), coverage["by_reach"][-1])
    ends = [float(value * (end / value) ** near["widening"]) for end in interval]
    return {"interval": ends, "reach": reach, "measured_so_far": near["reach_max"] >= reach, **{
        key: near[key] for key in ("measured", "num_heldout", "reach_max", "widening")}}
