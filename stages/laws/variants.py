"""Laws that say more than the sum: over-training, repeated data, experts.

Each changes what N or D counts, or ties the exponents, and leaves E + A / N^alpha + B / D^beta as it is. One number more (how fast repeated
tokens or parameters in excess wear out, how much idle experts help) is reported as a profile: the objective of the best fit at each of its
values, since few ladders determine it.
"""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.optimize import minimize_scalar, nnls

from stages.laws.fit import PARAMETERS, fit_law
from stages.laws.objective import EXPONENTS, Array

REPETITIONS = tuple(np.geomspace(0.5, 500, 31).tolist())  # R*, tried for the profile
ROUNDS = 6  # at most, of the two profiles of worn data
EXPERT_POWERS = tuple(np.linspace(0, 1, 21).tolist())  # g


def fit_overtraining(N: ArrayLike, D: ArrayLike, loss: ArrayLike) -> dict[str, float]:
    """E, a, b and eta of L = E + (a M^eta + b M^-eta) C^-eta, C = 6 N D and M = D / N (Gadre et al. 2024, arXiv 2403.08540, eq. 4).

    It is the sum with alpha = beta = 2 eta, a = A 6^eta, b = B 6^eta: more tokens a parameter then change the factor of C^-eta, never its
    exponent. Least squares on the loss, as theirs, by variable projection over eta: for a given eta the rest is linear and not
    negative. `N`, `D`, `loss` (n,). Raises ValueError for fewer than five runs.
    """
    N, D, loss = (np.asarray(values, dtype=np.float64).ravel() for values in (N, D, loss))
    if len(loss) < 5:
        raise ValueError(f"{len(loss)} runs cannot determine the four parameters of the over-training form: give five or more")
    C, M = 6 * N * D, D / N

    def solve(eta: float) -> tuple[Array, float]:
        powers = np.exp(-eta * (np.log(C) - np.log(C).mean()))  # of the size of 1, so that nnls can weigh the columns
        return nnls(np.column_stack([np.ones(len(C)), powers * M**eta, powers * M**-eta]), loss)

    grid = np.geomspace(EXPONENTS[0] / 2, EXPONENTS[1] / 2, 200)
    best = int(np.argmin([solve(eta)[1] for eta in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    eta = float(minimize_scalar(lambda value: solve(value)[1], bounds=ends, method="bounded", options={"xatol": 1e-10}).x)
    (E, a, b), distance = solve(eta)
    centre = float(np.exp(eta * np.log(C).mean()))
    return {"E": float(E), "a": float(a) * centre, "b": float(b) * centre, "eta": eta, "rmse": float(distance) / float(np.sqrt(len(loss)))}


def overtrained_loss(fit: Mapping[str, float], N: ArrayLike, D: ArrayLike) -> Array:
    """Loss (nats) by what `fit_overtraining` found; N and D broadcast."""
    N, D = np.asarray(N, dtype=np.float64), np.asarray(D, dtype=np.float64)
    C, M = 6 * N * D, D / N
    return fit["E"] + (fit["a"] * M ** fit["eta"] + fit["b"] * M ** -fit["eta"]) * C ** -fit["eta"]


def worn(amount: Array, base: Array, decay: float) -> Array:
    """X + X R* (1 - exp(-R / R*)) for `base` X and R = `amount` / X - 1."""
    return base * (1 - decay * np.expm1(-np.maximum(amount / base - 1, 0.0) / decay))


def effective_tokens(tokens: ArrayLike, unique: ArrayLike, decay: float) -> Array:
    """What D tokens are worth when only U of them differ: U + U R* (1 - exp(-R / R*)), R = D / U - 1 the repetitions, R* `decay`.

    Muennighoff et al. 2023 (arXiv 2305.16264, equation 5), who found R* = 15.4: 16 epochs are worth 10.6 of new text. As R* grows,
    repeated tokens are as good as new. Raises ValueError where D < U.
    """
    tokens, unique = np.asarray(tokens, dtype=np.float64), np.asarray(unique, dtype=np.float64)
    if (unique > tokens * (1 + 1e-9)).any() or (unique <= 0).any():
        raise ValueError("unique tokens must be positive and at most the tokens trained on: give the size of the text, not of the run")
    return worn(tokens, unique, decay)


def supported(law: Mapping[str, float], unique: ArrayLike) -> Array:
    """U_N of U distinct tokens: the parameters that are compute-optimal for them, (alpha A / beta B)^(1/alpha) U^(beta/alpha).

    Muennighoff et al. 2023, equation 9 with their G put in; .051 U by their constants. `law` has A, B, alpha and beta.
    """
    ratio = law["alpha"] * law["A"] / (law["beta"] * law["B"])
    return ratio ** (1 / law["alpha"]) * np.asarray(unique, dtype=np.float64) ** (law["beta"] / law["alpha"])


def without_excess(parameters: ArrayLike, support: ArrayLike, decay: float) -> Array:
    """What N parameters are worth where the text supports `support` of them: U + U R* (1 - exp(-(N / U - 1) / R*)), U = min(N, support).

    Muennighoff et al. 2023, equation 6, who found R* = 5.3: parameters in excess wear out faster than repeated tokens.
    """
    parameters = np.asarray(parameters, dtype=np.float64)
    return worn(parameters, np.minimum(parameters, support), decay)


def effective_parameters(active: ArrayLike, total: ArrayLike, power: float) -> Array:
    """N_eff = N_act (N_tot / N_act)^g: parameters of the dense model that one with experts is worth.

    g = 0 counts the parameters that a token visits, g = 1 all. An effective count as that of Clark et al. 2022 (arXiv 2202.01169), here
    with one exponent for all sizes. Raises ValueError where N_tot < N_act.
    """
    active, total = np.asarray(active, dtype=np.float64), np.asarray(total, dtype=np.float64)
    if (total < active * (1 - 1e-9)).any() or (active <= 0).any():
        raise ValueError("active parameters must be positive and at most the total ones")
    return active * (total / active) ** power


def profile(values: Sequence[float], runs_at: Callable[[float], tuple[Array, Array]], loss: ArrayLike, **settings: Any) -> dict[str, Any]:
    """The objective of the best fit at each of `values`, of which `runs_at` gives N and D; `settings` are those of `fit_law`.

    Returns values, objective, best and interval: from the last value below to the first above that a likelihood-ratio test at 95 % rejects,
    the noise estimated from the best fit; null where none is rejected on that side. Approximate: the objective is Huber's.
    """
    objectives = np.array([fit_law(*runs_at(value), loss, **settings, num_draws=0)["objective"] for value in values])
    best = int(objectives.argmin())
    n, allowed = np.size(loss), stats.chi2.ppf(0.95, 1)
    inside = np.flatnonzero(n * np.log(np.maximum(objectives, 1e-300) / max(objectives[best], 1e-300)) <= allowed)
    low, high = int(inside[0]) - 1, int(inside[-1]) + 1
    return {"values": [float(value) for value in values], "objective": objectives.tolist(), "best": float(values[best]),
            "interval": [float(values[low]) if low >= 0 else None, float(values[high]) if high < len(values) else None]}


def wear(N: Array, D: Array, loss: Array, unique: Array, **settings: Any) -> dict[str, Any]:
    """Profiles of how fast repeated tokens (`repetition`) and, where a run has more parameters than its text supports, those in excess
    of it (`excess`, with the `law` by which U_N was found) wear out.

    One at the other's best, in turn until neither moves: each alone would take in what is the other's.
    """
    def of_tokens(worth: Array) -> Callable[[float], tuple[Array, Array]]:
        return lambda decay: (worth, effective_tokens(D, unique, decay))

    def of_parameters(support: Array, tokens: Array) -> Callable[[float], tuple[Array, Array]]:
        return lambda decay: (without_excess(N, support, decay), tokens)

    found: dict[str, Any] = {}
    worth = N
    for _ in range(ROUNDS):
        before = [part["best"] for part in found.values()]
        found["repetition"] = profile(REPETITIONS, of_tokens(worth), loss, **settings)
        tokens = effective_tokens(D, unique, found["repetition"]["best"])
        law = {name: value for name, value in fit_law(worth, tokens, loss, **settings, num_draws=0).items() if name in PARAMETERS}
        support = supported(law, unique)
        if (support >= N).all():
            break
        found["excess"] = profile(REPETITIONS, of_parameters(support, tokens), loss, **settings)
        found["excess"]["law"] = law
        worth = without_excess(N, support, found["excess"]["best"])
        if before == [part["best"] for part in found.values()]:
            break
    return found
