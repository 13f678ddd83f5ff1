"""Approach 2 of Hoffmann et al. 2022: at each FLOP budget the N of least loss, then a power law N* = c C^a through these.

A parabola in log N through the losses of one budget is not what the law looks like there. With h = log(N / N*) the law is E plus a constant
times exp(-alpha h) / alpha + exp(beta h) / beta: symmetric only where alpha = beta. Otherwise the vertex of the fitted parabola lies off
the minimum by `vertex_bias`: on the side of the flatter branch, more the wider the window, and by the same factor at each budget if
the window is centred each time. So c is biased; a is too once windows are not centred, as with a fixed list of sizes.
"""
from typing import Any, Literal, get_args

import numpy as np
from scipy import stats
from scipy.interpolate import Akima1DInterpolator

from stages.laws.objective import Array

Method = Literal["parabola", "akima"]
METHODS: tuple[Method, ...] = get_args(Method)


def minimum(N: Array, loss: Array, method: Method = "parabola", window: float = 8.0) -> tuple[float, float] | None:
    """N* and its loss for one budget, or None where the least loss lies at an end, so that the minimum may lie outside.

    `N` and `loss` (n,). A parabola goes through the sizes within a factor of `window` of the one with the least loss, three at least.
    `akima` interpolates log loss over log N (Akima 1970) and takes the lowest of 25 points a gap: no shape is assumed, noise goes
    straight into the result (Porian et al. 2024, arXiv 2406.19146, who also take the median over resampled noise).
    """
    sizes = np.unique(N)
    losses = np.array([loss[size == N].min() for size in sizes])
    x, best = np.log(sizes), int(losses.argmin())
    if len(x) < 3:
        return None
    if method == "akima":
        grid = np.linspace(x[0], x[-1], 25 * (len(x) - 1))
        curve = Akima1DInterpolator(x, np.log(losses))(grid)
        lowest = int(curve.argmin())
        return None if lowest in (0, len(grid) - 1) else (float(np.exp(grid[lowest])), float(np.exp(curve[lowest])))
    if best in (0, len(x) - 1):
        return None
    near = np.abs(x - x[best]) <= np.log(window) + 1e-9
    near[best - 1:best + 2] = True
    square, slope, constant = np.polyfit(x[near] - x[best], losses[near], 2)
    vertex = -slope / (2 * square)
    if square <= 0 or not x[near][0] < vertex + x[best] < x[near][-1]:
        return None
    return float(np.exp(vertex + x[best])), float(constant - slope**2 / (4 * square))


def approach_2(C: Array, N: Array, loss: Array, *, method: Method = "parabola", window: float = 8.0,
               flops_per_unit: float = 6.0) -> dict[str, Any]:
    """The power law N* = c C^a of compute-optimal sizes; D* = C / (k N*) then grows with 1 - a.

    `C` FLOPs, `N`, `loss` (n,): several sizes at each of several equal budgets. Returns a with a 95 % interval (Student's, over budgets),
    c, the minima found, and the budgets left out because their least loss lies at an end. Raises ValueError where fewer than
    three budgets have a minimum inside.
    """
    minima, left_out = [], []
    for flops in np.unique(C):
        found = minimum(N[flops == C], loss[flops == C], method, window)
        if found is None:
            left_out.append(float(flops))
        else:
            minima.append({"C": float(flops), "N": found[0], "D": float(flops) / flops_per_unit / found[0], "loss": found[1]})
    if len(minima) < 3:
        raise ValueError(f"{len(minima)} of {len(np.unique(C))} budgets have their least loss between two sizes: give three or more such "
                         "budgets, with equal FLOPs for all sizes of a budget")
    return {"method": method, **power_law([row["C"] for row in minima], [row["N"] for row in minima]), "minima": minima,
            "left_out": left_out}


def at_flops(C: Array, N: Array, loss: Array, where: float) -> tuple[Array, Array]:
    """Sizes of a grid whose budgets reach to either side of `where` FLOPs, and their losses there: straight in logs between two budgets.

    A grid of sizes and token budgets has no two runs of equal FLOPs, so that its isoFLOP curves lie between runs. `C`, `N`, `loss` (n,).
    """
    sizes, losses = [], []
    for size in np.unique(N):
        own = np.flatnonzero(size == N)
        own = own[np.argsort(C[own])]
        if C[own[0]] * (1 - 1e-9) <= where <= C[own[-1]] * (1 + 1e-9):
            sizes.append(size)
            losses.append(np.exp(np.interp(np.log(where), np.log(C[own]), np.log(loss[own]))))
    return np.array(sizes), np.array(losses)


def grid_curves(C: Array, N: Array, loss: Array, *, num_budgets: int = 5, num_steps: int = 40) -> dict[str, Any]:
    """What a grid says at equal compute: `envelope`, the least loss of any size for at most so many FLOPs and that size (approach 1 of
    Hoffmann et al. 2022, here through finished runs, as a loss before the rate has fallen is not comparable); `isoflop`, the losses of the
    sizes at budgets that three or more reach, with the minimum between sizes or None. `C` FLOPs, `N`, `loss` (n,).
    """
    envelope: list[dict[str, float]] = []
    for where in np.union1d(np.geomspace(C.min(), C.max(), num_steps), C):
        sizes, losses = at_flops(C, N, loss, where)
        here = [{"C": float(where), "N": float(size), "loss": float(value)} for size, value in zip(sizes, losses, strict=True)]
        envelope.append(min([*here, *({**row, "C": float(where)} for row in envelope[-1:])], key=lambda row: row["loss"]))
    shared = [where for where in np.geomspace(C.min(), C.max(), 10 * num_steps) if len(at_flops(C, N, loss, where)[0]) >= 3]
    isoflop = []
    for where in dict.fromkeys(shared[i] for i in np.linspace(0, len(shared) - 1, num_budgets).round().astype(int)) if shared else ():
        sizes, losses = at_flops(C, N, loss, where)
        found = minimum(sizes, losses)
        isoflop.append({"C": float(where), "N": sizes.tolist(), "loss": losses.tolist(),
                        "minimum": {"N": found[0], "loss": found[1]} if found else None})
    return {"envelope": envelope, "isoflop": isoflop}


def power_law(C: Any, N: Any, weights: Any = None) -> dict[str, Any]:
    """N = c C^a by least squares in logs: a, its 95 % interval, c. `weights` (n,) are inverse variances of log N."""
    x, y = np.log(np.asarray(C, dtype=np.float64)), np.log(np.asarray(N, dtype=np.float64))
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    centre, height = np.average(x, weights=w), np.average(y, weights=w)
    spread = (w * (x - centre) ** 2).sum()
    a = float((w * (x - centre) * (y - height)).sum() / spread)
    residuals = y - height - a * (x - centre)
    error = float(np.sqrt((w * residuals**2).sum() / (len(x) - 2) / spread)) * float(stats.t.ppf(0.975, len(x) - 2))
    return {"a": a, "interval": [a - error, a + error], "c": float(np.exp(height - a * centre)), "num_budgets": len(x)}


def vertex_bias(alpha: float, beta: float, window: float = 8.0, num_sizes: int = 101) -> float:
    """By what factor a parabola's vertex misses N*: sizes spread evenly in log N within a factor of `window` to either side, no noise."""
    h = np.linspace(-np.log(window), np.log(window), num_sizes)
    square, slope, _ = np.polyfit(h, np.exp(-alpha * h) / alpha + np.exp(beta * h) / beta, 2)
    return float(np.exp(-slope / (2 * square)))
