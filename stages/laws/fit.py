"""Scaling laws of the form L(N, D) = E + A / N^alpha + B / D^beta: fitted, bounded by a bootstrap, asked for predictions.

Above a known floor also as a product of powers, `fit_product`. The rest is about the sum.

The objective is that of Hoffmann et al. 2022 (arXiv 2203.15556), Approach 3: the sum over runs of Huber(1e-3) of the
difference in log loss. It is flat and kinked, and an optimiser with default tolerances stops early: Besiroglu et al. 2024
(arXiv 2404.10102) trace the constants of the original paper to a mean in place of the sum. So here: the sum, rescaled by 1e6,
its analytic gradient, a hundred and more starts, each the best (E, A, B) for its pair of exponents (variable projection, Golub
and Pereyra 1973), all improved at once by a damped Gauss-Newton method, the best polished by another method.

Letters: n runs, S starts or bootstrap draws, 5 parameters theta = (e, a, b, alpha, beta), where with x and y the centred logs
of N and D, log L = logsumexp(e, a - alpha x, b - beta y). Centring makes a and b independent enough to be fitted at all.
"""
import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import minimize

Array = NDArray[np.float64]
DELTA = 1e-3  # Huber's threshold on log loss, Hoffmann et al. 2022, appendix D.3
SCALE = 1e6  # the objective's natural size is 1e-6 to 1e-3: below the default tolerances of any optimiser
EXPONENTS = (0.01, 2.0)  # bounds of alpha and beta
TERMS = (-12.0, 30.0)  # bounds of e, a, b: a term below 6e-6 nats is none
START_EXPONENTS = np.geomspace(0.05, 1.8, 12)  # 144 pairs
PARAMETERS = ("E", "A", "B", "alpha", "beta")
Form = Literal["sum", "product"]  # of the law: two powers added, or multiplied
FORMS: tuple[Form, ...] = get_args(Form)


def log_loss(theta: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Log of the law (S, n) and its derivative by theta (S, n, 5). `theta` (S, 5); `x`, `y` (n,) centred logs."""
    e, a, b, alpha, beta = (theta[:, i, None] for i in range(5))
    terms = np.stack([np.broadcast_to(e, (len(theta), len(x))), a - alpha * x, b - beta * y], axis=-1)
    top = terms.max(axis=-1, keepdims=True)
    weights = np.exp(terms - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights /= total
    size, data = weights[..., 1], weights[..., 2]
    return (top + np.log(total))[..., 0], np.stack([weights[..., 0], size, data, -x * size, -y * data], axis=-1)


def huber(residuals: Array, delta: float = DELTA) -> Array:
    """Huber's loss: r^2/2 up to delta, delta (|r| - delta/2) beyond (Huber 1964). Any shape."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def objective(theta: Array, x: Array, y: Array, target: Array, delta: float = DELTA) -> tuple[float, Array]:
    """Sum of Huber losses and its gradient, both times `SCALE`. `theta` (5,), `target` (n,) log losses."""
    predicted, jacobian = log_loss(theta[None], x, y)
    residuals = predicted[0] - target
    return float(SCALE * huber(residuals, delta).sum()), SCALE * np.clip(residuals, -delta, delta) @ jacobian[0]


def _bounds(floor: float | None) -> Array:
    """(5, 2) lower and upper ends of theta; a known floor leaves e no room."""
    ends = np.array([TERMS] * 3 + [EXPONENTS] * 2)
    return ends if floor is None else np.vstack([np.full(2, math.log(floor)), ends[1:]])


def _descend(theta: Array, x: Array, y: Array, target: Array, delta: float, steps: int, bounds: Array) -> tuple[Array, Array]:
    """All starts at once: reweighted Gauss-Newton steps, damped where they fail to descend (Levenberg-Marquardt).

    A Huber loss is bounded above by the quadratic with weight min(1, delta/|r|) that touches it, so minimising that one
    descends. `theta` (S, 5), `target` (n,) or (S, n). Returns theta and the unscaled objective (S,).
    """
    free = bounds[:, 0] < bounds[:, 1]  # a parameter without room has no slope either
    damping = np.full(len(theta), 1e-3)
    predicted, jacobian = log_loss(theta, x, y)
    residuals = predicted - target
    value = huber(residuals, delta).sum(axis=1)
    diagonal = np.arange(5)
    for _ in range(steps):
        weights = np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300))
        jacobian = jacobian * free
        weighted = jacobian * weights[..., None]
        hessian = weighted.swapaxes(1, 2) @ jacobian
        slope = (weighted.swapaxes(1, 2) @ residuals[..., None])[..., 0]
        hessian[:, diagonal, diagonal] *= 1 + damping[:, None]
        hessian[:, diagonal, diagonal] += 1e-12
        proposal = (theta - np.linalg.solve(hessian, slope[..., None])[..., 0]).clip(*bounds.T)
        predicted, new_jacobian = log_loss(proposal, x, y)
        new_residuals = predicted - target
        new_value = huber(new_residuals, delta).sum(axis=1)
        better = new_value < value
        gain = float(np.max((value - new_value) / np.maximum(value, 1e-300), initial=0.0, where=better))
        theta = np.where(better[:, None], proposal, theta)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        residuals = np.where(better[:, None], new_residuals, residuals)
        value = np.where(better, new_value, value)
        damping = np.where(better, damping / 3, damping * 4).clip(1e-9, 1e9)
        if gain < 1e-9 and (damping[~better] > 1e6).all():
            break
    return theta, value


def _starts(x: Array, y: Array, loss: Array, floor: float | None) -> Array:
    """The best positive (E, A, B), or (A, B) on a known floor, of the relative least-squares problem for each pair of exponents: (S, 5)."""
    alpha, beta = (grid.ravel() for grid in np.meshgrid(START_EXPONENTS, START_EXPONENTS))
    columns = np.stack([np.ones((len(alpha), len(x))), np.exp(-alpha[:, None] * x), np.exp(-beta[:, None] * y)], axis=-1)
    columns /= loss[:, None]  # relative errors, close to differences of logs
    wanted = np.ones(len(x))
    if floor is not None:
        columns, wanted = columns[..., 1:], wanted - floor / loss
    gram = columns.swapaxes(1, 2) @ columns + 1e-9 * np.eye(columns.shape[-1])
    linear = np.linalg.solve(gram, (columns.swapaxes(1, 2) @ wanted)[..., None])[..., 0].clip(0.01 * loss.min(), None)
    if floor is not None:
        linear = np.column_stack([np.full(len(alpha), floor), linear])
    return np.column_stack([np.log(linear), alpha, beta])


def _minimise(x: Array, y: Array, loss: Array, delta: float, floor: float | None) -> tuple[Array, float]:
    """theta and the unscaled objective of the best of all starts, polished."""
    target, bounds = np.log(loss), _bounds(floor)
    thetas, values = _descend(_starts(x, y, loss, floor), x, y, target, delta, steps=60, bounds=bounds)
    best = np.argsort(values)[:8]
    thetas, values = _descend(thetas[best], x, y, target, delta, steps=200, bounds=bounds)
    finished = []
    for theta in thetas[np.argsort(values)[:3]]:
        result = minimize(objective, theta, (x, y, target, delta), jac=True, method="L-BFGS-B", bounds=bounds,
                          options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-9})
        finished.append((float(result.fun) / SCALE, tuple(result.x)))
    value, theta = min([*finished, (float(values.min()), tuple(thetas[values.argmin()]))])
    return np.array(theta), value


def _constants(theta: Array, x0: float, y0: float) -> Array:
    """(S, 5) centred parameters to (E, A, B, alpha, beta) of the law in plain N and D."""
    e, a, b, alpha, beta = theta.T
    return np.column_stack([np.exp(e), np.exp(a + alpha * x0), np.exp(b + beta * y0), alpha, beta])


def fit_law(N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, floor: float | None = None, form: Form = "sum", delta: float = DELTA,
            num_draws: int = 300, seed: int = 0, conventions: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fit the law to finished runs; the result is what fit.json holds.

    `N` parameters, `D` training tokens and `loss` (nats) per run, (n,) each; runs whose learning rate has been decayed, one
    convention of counting throughout, which `conventions` records. `floor` is E where it is known, as the entropy of generated
    text is; otherwise E is fitted. `form` is the one to predict by; a product needs a floor, and "product" then holds what
    `fit_product` finds, beside the sum. Intervals are 95 % percentiles of a residual bootstrap: residuals, centred and widened by
    sqrt(n / (n - p)) for the p parameters they were fitted with, are drawn with replacement, added to the fit, and fitted again.
    `draws` and `residuals` are kept for `predict` and `plan`.

    Raises ValueError when the runs cannot determine the parameters, a loss lies below the floor, or a product has none.
    """
    N, D, loss = _runs(N, D, loss, floor)
    product = None
    if form == "product":
        if floor is None:
            raise ValueError("a product of powers needs a known floor: give one, or fit a sum")
        product = fit_product(N, D, loss, floor=floor)
    x0, y0 = float(np.log(N).mean()), float(np.log(D).mean())
    x, y = np.log(N) - x0, np.log(D) - y0
    theta, value = _minimise(x, y, loss, delta, floor)
    fitted = log_loss(theta[None], x, y)[0][0]
    residuals = np.log(loss) - fitted
    widened = (residuals - residuals.mean()) * math.sqrt(len(N) / max(len(N) - (5 if floor is None else 4), 1))
    targets = fitted + np.random.default_rng(seed).choice(widened, size=(num_draws, len(N)))
    draws = _constants(_descend(np.tile(theta, (num_draws, 1)), x, y, targets, delta, steps=60, bounds=_bounds(floor))[0], x0, y0)
    constants = dict(zip(PARAMETERS, _constants(theta[None], x0, y0)[0].tolist(), strict=True))
    low, high = np.quantile(draws, [0.025, 0.975], axis=0) if num_draws else np.full((2, 5), np.nan)
    at_bound = [name for name in ("alpha", "beta") if not EXPONENTS[0] * 1.01 < constants[name] < EXPONENTS[1] * 0.99]
    return {
        **constants, "objective": value, "num_points": len(N),
        "intervals": {name: [float(low[i]), float(high[i])] for i, name in enumerate(PARAMETERS)} if num_draws else {},
        "conventions": {"E": "fitted" if floor is None else "known beforehand",
                        "objective": f"sum over runs of Huber({delta:g}) of the difference in log loss", "interval":
                        f"95 % percentiles of {num_draws} residual bootstrap draws", **(conventions or {})},
        "range": {"N": [float(N.min()), float(N.max())], "D": [float(D.min()), float(D.max())]}, "at_bound": at_bound,
        "residuals": widened.tolist(), "draws": draws.tolist(),
        "form": form, **({"product": product} if product else {})}


def _runs(N: ArrayLike, D: ArrayLike, loss: ArrayLike, floor: float | None) -> tuple[Array, Array, Array]:
    """The runs as arrays (n,). Raises ValueError when they cannot determine a law or a loss lies below the floor."""
    N, D, loss = (np.asarray(values, dtype=np.float64).ravel() for values in (N, D, loss))
    if not len(N) == len(D) == len(loss):
        raise ValueError(f"N, D and loss have {len(N)}, {len(D)} and {len(loss)} values: give one of each for every run")
    if not all((np.isfinite(values) & (values > 0)).all() for values in (N, D, loss)):
        raise ValueError("N, D and loss must be positive and finite: leave out runs that failed")
    if len(N) < 6 or len(np.unique(N)) < 3 or len(np.unique(D)) < 3:
        raise ValueError(f"{len(N)} runs of {len(np.unique(N))} sizes and {len(np.unique(D))} token budgets cannot determine "
                         "five parameters: give at least 6 runs, 3 sizes and 3 budgets")
    if floor is not None and not 0 < floor < loss.min():
        raise ValueError(f"the floor {floor:.4g} must lie between 0 and the lowest loss, {loss.min():.4g}: it is not that of this text")
    return N, D, loss


def fit_product(N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, floor: float) -> dict[str, Any]:
    """L = E + C / (N^a D^b) above a known floor E: a plane through log(L - E), by least squares.

    In the sum of two powers more data cannot make up for a small model; here it can. Which of the two extrapolates better depends on
    the ladder (LOG.md). `sigma` is the residuals' standard deviation and `covariance` that of
    (log C, a, b) over sigma^2, both for `predict`; intervals are Student's, 95 %. Raises ValueError as `fit_law` does.
    """
    N, D, loss = _runs(N, D, loss, floor)
    rows, target = _plane(N, D), np.log(loss - floor)
    found, *_ = np.linalg.lstsq(rows, target, rcond=None)
    residuals = target - rows @ found
    sigma, covariance = float(np.sqrt(residuals @ residuals / (len(N) - 3))), np.linalg.inv(rows.T @ rows)
    reach = float(stats.t.ppf(0.975, len(N) - 3)) * sigma * np.sqrt(np.diag(covariance))
    values, ends = found.tolist(), np.stack([found - reach, found + reach], axis=-1)
    return {"C": math.exp(values[0]), "a": values[1], "b": values[2], "sigma": sigma, "covariance": covariance.tolist(),
            "num_points": len(N), "intervals": {"C": np.exp(ends[0]).tolist(), "a": ends[1].tolist(), "b": ends[2].tolist()}}


def _plane(N: ArrayLike, D: ArrayLike) -> Array:
    """(..., 3) what log C, a and b are multiplied with."""
    x, y = np.broadcast_arrays(np.log(np.asarray(N, dtype=np.float64)), np.log(np.asarray(D, dtype=np.float64)))
    return np.stack([np.ones_like(x), -x, -y], axis=-1)


def law(constants: ArrayLike, N: ArrayLike, D: ArrayLike) -> Array:
    """E + A / N^alpha + B / D^beta. `constants` (..., 5) in the order of `PARAMETERS`; N and D broadcast against (...)."""
    E, A, B, alpha, beta = np.moveaxis(np.asarray(constants, dtype=np.float64), -1, 0)
    return E + A / np.asarray(N, dtype=np.float64) ** alpha + B / np.asarray(D, dtype=np.float64) ** beta


def expected(fit: Mapping[str, Any], N: ArrayLike, D: ArrayLike) -> Array:
    """Loss (nats) by the fitted law, in the form of the fit; N and D broadcast."""
    if product := fit.get("product"):
        return fit["E"] + np.exp(_plane(N, D) @ (math.log(product["C"]), product["a"], product["b"]))
    return law([fit[name] for name in PARAMETERS], N, D)


def formula(fit: Mapping[str, Any]) -> str:
    """The fitted law as people write it."""
    if product := fit.get("product"):
        return f"{fit['E']:.3f} + {product['C']:.3g} / (N^{product['a']:.3f} D^{product['b']:.3f})"
    return f"{fit['E']:.3f} + {fit['A']:.3g} / N^{fit['alpha']:.3f} + {fit['B']:.3g} / D^{fit['beta']:.3f}"


def undetermined(fit: Mapping[str, Any]) -> list[str]:
    """Exponents that the runs leave open: of a sum at the bound of what is tried, of a product with an interval that holds 0."""
    if product := fit.get("product"):
        return [name for name in ("a", "b") if product["intervals"][name][0] <= 0]
    return list(fit["at_bound"])


def predict(fit: Mapping[str, Any], N: float, D: float, *, level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """The loss (nats) of a run of N parameters on D tokens, and an interval for one such measurement.

    The interval holds both the uncertainty of the parameters and one run's residual: without the residual a nominal 95 %
    covered 13 % of held-out runs in one study, with it 61 %. Extrapolation error of the form itself is in neither: measure it
    with `holdout`. That of the product is Student's, of a new observation of a linear model in log(L - E).
    """
    value = float(expected(fit, N, D))
    if product := fit.get("product"):
        row = _plane(N, D)
        error = product["sigma"] * math.sqrt(1 + row @ np.asarray(product["covariance"]) @ row)
        reach = float(stats.t.ppf((1 + level) / 2, product["num_points"] - 3)) * error
        return value, (fit["E"] + (value - fit["E"]) * math.exp(-reach), fit["E"] + (value - fit["E"]) * math.exp(reach))
    if not fit.get("draws"):
        return value, (value, value)
    centres = np.log(law(fit["draws"], N, D))
    spread = (centres[:, None] + np.asarray(fit["residuals"])[None, :]).ravel()
    low, high = np.exp(np.quantile(spread, [(1 - level) / 2, (1 + level) / 2]))
    return value, (float(low), float(high))


def holdout(N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, fraction: float = 0.25, flops: ArrayLike | None = None,
            floor: float | None = None, num_draws: int = 300, seed: int = 0, form: Form = "sum",
            conventions: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fit on the cheap runs, predict the dear ones: relative error and the share of losses inside their 95 % interval.

    `flops` (n,) orders the runs (default 6 N D); the dearest `fraction` of them is held out.
    Returns num_fitted, num_heldout, error_mean, error_max (absolute relative errors), error_signed, coverage, level, and
    each held-out run's row.
    """
    N, D, loss = (np.asarray(values, dtype=np.float64).ravel() for values in (N, D, loss))
    order = np.argsort(6 * N * D if flops is None else np.asarray(flops, dtype=np.float64), kind="stable")
    num_heldout = max(1, round(fraction * len(order)))
    small, large = order[:-num_heldout], order[-num_heldout:]
    fit = fit_law(N[small], D[small], loss[small], floor=floor, form=form, num_draws=num_draws, seed=seed, conventions=conventions)
    rows = []
    for i in large:
        value, interval = predict(fit, N[i], D[i])
        rows.append({"N": N[i], "D": D[i], "loss": loss[i], "value": value, "interval": list(interval)})
    errors = np.array([row["value"] / row["loss"] - 1 for row in rows])
    covered = [row["interval"][0] <= row["loss"] <= row["interval"][1] for row in rows]
    return {"num_fitted": len(small), "num_heldout": num_heldout, "level": 0.95, "coverage": float(np.mean(covered)),
            "error_mean": float(np.abs(errors).mean()), "error_max": float(np.abs(errors).max()),
            "error_signed": float(errors.mean()), "runs": rows,
            "fit": {key: fit[key] for key in (*PARAMETERS, "intervals", "conventions", "form")}}


def read_points(path: str | Path, *, columns: Sequence[str] = ("N", "D", "loss"),
                where: Mapping[str, str] | None = None) -> Array:
    """(n, 3) rows of N, D, loss from a csv or jsonl file with those columns; `where` keeps rows with these values.

    Raises ValueError naming file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a csv or jsonl file of runs with the columns {', '.join(columns)}")
    with path.open(encoding="utf-8-sig", newline="") as f:
        if path.suffix == ".csv":
            rows: list[tuple[int, Any]] = list(enumerate(csv.DictReader(f), start=2))
        elif path.suffix == ".jsonl":
            rows = []
            for number, line in enumerate(f, start=1):
                try:
                    rows.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        else:
            raise ValueError(f"{path}: expected a .csv or .jsonl file of runs")
    points = []
    for number, row in rows:
        missing = [name for name in (*columns, *(where or {})) if not isinstance(row, dict) or row.get(name) in (None, "")]
        if missing:
            found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}, line {number}: no {missing[0]!r} among {found}")
        if any(str(row[name]) != value for name, value in (where or {}).items()):
            continue
        try:
            points.append([float(row[name]) for name in columns])
        except (TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: {[row[name] for name in columns]} are not numbers") from None
    if not points:
        raise ValueError(f"{path} has no runs" + (f" with {dict(where)}" if where else ""))
    return np.array(points)
