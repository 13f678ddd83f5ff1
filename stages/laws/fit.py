"""Scaling laws of the form L(N, D) = E + A / N^alpha + B / D^beta: fitted, bounded by a bootstrap, asked for predictions.

Above a known floor also as a product of powers (product.py), and as the geometric mean of both: forms that err to either side err less
together (Bates and Granger 1969 on combined forecasts). The rest is about the sum, whose optimiser is in objective.py.

Letters: n measurements, G training runs they come from, S bootstrap draws, p parameters.
"""
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from stages.laws.objective import DELTA, EXPONENTS, TERMS, Array, bounds_of, descend, log_loss, minimise, project
from stages.laws.product import fit_product, plane

PARAMETERS = ("E", "A", "B", "alpha", "beta")
Form = Literal["sum", "product", "mean"]  # of the law: two powers added, multiplied, or the geometric mean of what both predict
FORMS: tuple[Form, ...] = get_args(Form)
SPAN = 10.0  # D/N must span this much for A and B to be told apart: below, runs lie along one ray


def fit_law(N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, floor: float | None = None, form: Form = "sum", delta: float = DELTA,
            weights: ArrayLike | None = None, runs: ArrayLike | None = None, drop_worst: int = 0, num_draws: int = 300, seed: int = 0,
            conventions: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fit the law to finished runs; the result is what fit.json holds.

    `N` parameters, `D` training tokens and `loss` (nats) per measurement, (n,) each; taken after the learning rate has decayed, one
    convention of counting throughout, which `conventions` records. `floor` is E where it is known, as the entropy of generated
    text is; otherwise E is fitted. `form` is the one to predict by; all but the sum need a floor, and "product" then holds
    what `fit_product` finds, beside the sum. `weights` (n,) multiply the terms of the objective. `drop_worst` leaves out the measurements
    farthest from a first fit, as Hoffmann et al. 2022 left out five of 245, and "dropped" names their places.

    Intervals are 95 % percentiles of a residual bootstrap, warm-started. `runs` (n,) names the training run of each measurement
    (default: each its own). What the measurements of a run share is drawn from the runs' means of the residuals, the rest from what
    is left of them: the random-effect bootstrap of Field and Welsh 2007 (JRSS B 69:369). Residuals are centred and widened by
    sqrt(n / (n - p)) before. `draws` and `residuals` are kept for `predict` and `plan`, `warnings` for people.

    Raises ValueError when the runs cannot determine the parameters, a loss lies below the floor, or a form that needs one has none.
    """
    N, D, loss, weights = checked(N, D, loss, weights, floor, drop_worst)
    names = np.arange(len(N)) if runs is None else np.asarray(runs).ravel()
    if len(names) != len(N):
        raise ValueError(f"{len(names)} names of runs for {len(N)} measurements: name the run of each")
    if form != "sum" and floor is None:
        raise ValueError(f"form {form}: a product of powers needs a known floor: give one, or fit a sum")
    kept = np.arange(len(N))
    if drop_worst:
        x, y, _ = centred(N, D)
        theta, _ = minimise(x, y, loss, weights, delta, floor)
        kept = np.sort(np.argsort(np.abs(log_loss(theta[None], x, y)[0][0] - np.log(loss)), kind="stable")[:-drop_worst])
    dropped = sorted(set(range(len(N))) - set(kept.tolist()))
    N, D, loss, weights, names = N[kept], D[kept], loss[kept], weights[kept], names[kept]
    product = fit_product(N, D, loss, floor=floor, weights=weights) if form != "sum" and floor is not None else None
    x, y, origin = centred(N, D)
    theta, value = minimise(x, y, loss, weights, delta, floor)
    num_parameters = 5 if floor is None else 4
    fitted = log_loss(theta[None], x, y)[0][0]
    residuals = np.log(loss) - fitted
    residuals = (residuals - residuals.mean()) * math.sqrt(len(N) / max(len(N) - num_parameters, 1))
    targets = fitted + resampled(residuals, names, num_draws, np.random.default_rng(seed))
    draws = constants_of(descend(np.tile(theta, (num_draws, 1)), x, y, targets, weights, delta, 60, bounds_of(floor))[0], origin)
    constants = dict(zip(PARAMETERS, constants_of(theta[None], origin)[0].tolist(), strict=True))
    ends = np.quantile(draws, [0.025, 0.975], axis=0).T.tolist() if num_draws else []
    fit = {
        **constants, "objective": value, "num_points": len(N), "num_runs": len(np.unique(names)), "dropped": dropped,
        "intervals": dict(zip(PARAMETERS, ends, strict=True)) if num_draws else {},
        "conventions": {"E": "fitted" if floor is None else "known beforehand",
                        "objective": f"sum over runs of Huber({delta:g}) of the difference in log loss", "interval":
                        f"95 % percentiles of {num_draws} residual bootstrap draws", **(conventions or {})},
        "range": {name: [float(values.min()), float(values.max())] for name, values in (("N", N), ("D", D), ("ND", N * D))},
        "at_bound": [name for name in ("alpha", "beta") if not EXPONENTS[0] * 1.01 < constants[name] < EXPONENTS[1] * 0.99],
        "residuals": residuals.tolist(), "draws": draws.tolist(), "form": form, **({"product": product} if product else {})}
    return fit | {"warnings": warnings(fit, N, D, theta)}


def checked(N: ArrayLike, D: ArrayLike, loss: ArrayLike, weights: ArrayLike | None, floor: float | None,
            drop_worst: int = 0) -> tuple[Array, Array, Array, Array]:
    """The measurements as arrays (n,). Raises ValueError when they cannot determine a law or a loss lies below the floor."""
    N, D, loss = (np.asarray(values, dtype=np.float64).ravel() for values in (N, D, loss))
    weights = np.ones(len(N)) if weights is None else np.asarray(weights, dtype=np.float64).ravel()
    if not len(N) == len(D) == len(loss) == len(weights):
        raise ValueError(f"N, D, loss and weights have {len(N)}, {len(D)}, {len(loss)} and {len(weights)} values: give one of each for "
                         "every run")
    for name, values in (("N", N), ("D", D), ("loss", loss), ("weights", weights)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name} must be positive and finite, not {values[~(np.isfinite(values) & (values > 0))][0]:g}: leave out "
                             "runs that failed")
    num_parameters, sizes, budgets = 5 if floor is None else 4, len(np.unique(N)), len(np.unique(D))
    if len(N) - drop_worst <= num_parameters or sizes < 3 or budgets < 3:
        dropped = f", less {drop_worst}," if drop_worst else ""
        raise ValueError(f"{len(N)} runs of {sizes} sizes and {budgets} token budgets{dropped} cannot determine {num_parameters} "
                         f"parameters: give at least {num_parameters + 1} runs, 3 sizes and 3 budgets")
    if floor is not None and not 0 < floor < loss.min():
        raise ValueError(f"the floor {floor:.4g} must lie between 0 and the lowest loss, {loss.min():.4g}: it is not that of this text")
    return N, D, loss, weights


def centred(N: Array, D: Array) -> tuple[Array, Array, tuple[float, float]]:
    """Logs of N and D less their means, and these means."""
    x, y = np.log(N), np.log(D)
    return x - x.mean(), y - y.mean(), (float(x.mean()), float(y.mean()))


def constants_of(theta: Array, origin: tuple[float, float]) -> Array:
    """(S, 5) centred parameters to (E, A, B, alpha, beta) of the law in plain N and D."""
    e, a, b, alpha, beta = theta.T
    return np.column_stack([np.exp(e), np.exp(a + alpha * origin[0]), np.exp(b + beta * origin[1]), alpha, beta])


def resampled(residuals: Array, names: np.ndarray, num_draws: int, rng: np.random.Generator) -> Array:
    """(S, n) new residuals: for each run a mean of some run, for each measurement what is left over of some measurement."""
    _, run = np.unique(names, return_inverse=True)
    means = np.bincount(run, residuals) / np.bincount(run)
    shared = rng.choice(means, size=(num_draws, len(means)))[:, run]
    return shared + rng.choice(residuals - means[run], size=(num_draws, len(residuals)))


def warnings(fit: Mapping[str, Any], N: Array, D: Array, theta: Array) -> list[str]:
    """What a reader of this fit has to know: minima at a boundary, runs along one line, exponents that cannot be told apart."""
    if fit["form"] == "mean":
        return [text for one in both(fit) for text in warnings(one, N, D, theta)]
    if fit["form"] == "product":
        return [f"{name} is not determined: its interval holds 0" for name in ("a", "b") if fit["product"]["intervals"][name][0] <= 0]
    found = [f"{name} = {fit[name]:.3g} lies at the bound of what is tried, {EXPONENTS[0]} to {EXPONENTS[1]}: the runs do not determine it"
             for name in fit["at_bound"]]
    found += [f"the term of {name} has vanished: the runs do not determine it"
              for name, value in zip("EAB", theta, strict=False) if value < TERMS[0] + 0.1]
    ratio = float((D / N).max() / (D / N).min())
    if ratio < SPAN:
        found.append(f"D/N spans a factor of {ratio:.3g}, less than {SPAN:g}: predict only near that ratio")
    correlation = float(np.corrcoef(np.log(N), np.log(D))[0, 1])
    shares = np.array([row[4] / (row[3] + row[4]) for row in fit["draws"]] or [0.5])
    low, high = np.quantile(shares, [0.025, 0.975])
    if abs(correlation) > 0.98 or high - low > 0.4:
        found.append("alpha and beta are not separately identified: the exponent of the optimal N, beta / (alpha + beta), is anything from "
                     f"{low:.2f} to {high:.2f}" + (f" (log N and log D correlate at {correlation:.2f})" if abs(correlation) > 0.5 else ""))
    if fit["num_runs"] < min(fit["num_points"], 10):
        found.append(f"{fit['num_runs']} training runs: too few for intervals over runs to be trusted")
    return found


def cross_check(fit: Mapping[str, Any], N: ArrayLike, D: ArrayLike, loss: ArrayLike, *, floor: float | None = None, delta: float = DELTA,
                weights: ArrayLike | None = None) -> dict[str, float]:
    """The same law by variable projection: alpha, beta, the objective, and by how much the fit's own objective is above it.

    Takes what `fit_law` took. Raises ValueError as that does.
    """
    kept = [i for i in range(np.size(loss)) if i not in fit["dropped"]]
    N, D, loss, weights = (np.asarray(v, dtype=np.float64)[kept] for v in checked(N, D, loss, weights, floor, len(fit["dropped"])))
    x, y, _ = centred(N, D)
    theta, value = project(x, y, loss, weights, delta, floor)
    return {"alpha": float(theta[3]), "beta": float(theta[4]), "objective": value, "excess": fit["objective"] / max(value, 1e-300) - 1}


def law(constants: ArrayLike, N: ArrayLike, D: ArrayLike) -> Array:
    """E + A / N^alpha + B / D^beta. `constants` (..., 5) in the order of `PARAMETERS`; N and D broadcast against (...)."""
    E, A, B, alpha, beta = np.moveaxis(np.asarray(constants, dtype=np.float64), -1, 0)
    return E + A / np.asarray(N, dtype=np.float64) ** alpha + B / np.asarray(D, dtype=np.float64) ** beta


def expected(fit: Mapping[str, Any], N: ArrayLike, D: ArrayLike) -> Array:
    """Loss (nats) by the fitted law, in the form of the fit; N and D broadcast."""
    if fit.get("form") == "mean":
        return np.exp(np.mean([np.log(expected(one, N, D)) for one in both(fit)], axis=0))
    if fit.get("form") == "product":
        product = fit["product"]
        return fit["E"] + np.exp(plane(N, D) @ (math.log(product["C"]), product["a"], product["b"]))
    return law([fit[name] for name in PARAMETERS], N, D)


def both(fit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The sum and the product of a fit that has both, each as a fit of its own."""
    return [{**fit, "form": form} for form in ("sum", "product")]


def formula(fit: Mapping[str, Any]) -> str:
    """The fitted law as people write it."""
    if fit.get("form") == "mean":
        return "geometric mean of " + " and ".join(map(formula, both(fit)))
    if fit.get("form") == "product":
        product = fit["product"]
        return f"{fit['E']:.3f} + {product['C']:.3g} / (N^{product['a']:.3f} D^{product['b']:.3f})"
    return f"{fit['E']:.3f} + {fit['A']:.3g} / N^{fit['alpha']:.3f} + {fit['B']:.3g} / D^{fit['beta']:.3f}"


def predict(fit: Mapping[str, Any], N: float, D: float, *, level: float = 0.95) -> tuple[float, tuple[float, float]]:
    """The loss (nats) of a run of N parameters on D tokens, and an interval for one such measurement.

    The interval holds both the uncertainty of the parameters and one run's residual: without the residual a nominal 95 %
    covered 13 % of held-out runs in one study, with it 61 %. Percentiles of few residuals are too near: they are moved outwards in log
    loss by Student's quantile over the normal one, n - p degrees of freedom. Extrapolation error of the form itself is in none of it:
    measure it with `rolling`. That of the product is Student's, of a new observation of a linear model in log(L - E); that of
    the mean reaches from the lower of both lower ends to the higher of both higher ones.
    """
    value = float(expected(fit, N, D))
    if fit.get("form") == "mean":
        lows, highs = zip(*(predict(one, N, D, level=level)[1] for one in both(fit)), strict=True)
        return value, (min(lows), max(highs))
    if fit.get("form") == "product":
        product, row = fit["product"], plane(N, D)
        error = product["sigma"] * math.sqrt(1 + row @ np.asarray(product["covariance"]) @ row)
        reach = float(stats.t.ppf((1 + level) / 2, product["num_points"] - 3)) * error
        return value, (fit["E"] + (value - fit["E"]) * math.exp(-reach), fit["E"] + (value - fit["E"]) * math.exp(reach))
    if not fit.get("draws"):
        return value, (value, value)
    centres = np.log(law(fit["draws"], N, D))
    spread = (centres[:, None] + np.asarray(fit["residuals"])[None, :]).ravel()
    ends = np.quantile(spread, [(1 - level) / 2, (1 + level) / 2])
    freedom = max(fit["num_points"] - (4 if fit.get("conventions", {}).get("E") == "known beforehand" else 5), 1)
    student = stats.t.ppf((1 + level) / 2, freedom) / stats.norm.ppf((1 + level) / 2)
    low, high = value * np.exp((ends - math.log(value)) * student)
    return value, (float(low), float(high))


def refuse_far(fit: Mapping[str, Any], N: float, D: float, limit: float) -> None:
    """Raise ValueError when N, D or N D lies more than `limit` times outside what was fitted: nothing measured speaks for the law there."""
    values = {"N": N, "D": D, "ND": N * D}
    for name, (low, high) in fit.get("range", {}).items():
        value = values[name]
        factor = max(value / high, low / value)
        if factor > limit:
            raise ValueError(f"{name} = {value:.4g} lies {factor:.4g} times outside the runs, {low:.4g} to {high:.4g}, not {limit:g}: "
                             "nothing measured speaks for the law there; train larger runs, or raise --max-ratio to see the figure")
