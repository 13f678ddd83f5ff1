"""L = E + C / (N^a D^b): a law above a known floor in which more data can make up for a small model."""
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from stages.laws.objective import Array


def fit_product(N: Array, D: Array, loss: Array, *, floor: float, weights: Array | None = None) -> dict[str, Any]:
    """L = E + C / (N^a D^b) above a known floor E: a plane through log(L - E), by least squares.

    In the sum of two powers more data cannot make up for a small model; here it can. Which of the two extrapolates better depends on
    the ladder (LOG.md). `N`, `D`, `loss` (nats, above the floor) and `weights` (n,). `sigma` is the residuals' standard deviation and
    `covariance` that of (log C, a, b) over sigma^2, both for `predict`; intervals are Student's, 95 %.
    """
    scale = np.ones(len(N)) if weights is None else np.sqrt(weights / weights.mean())
    rows, target = plane(N, D) * scale[:, None], np.log(loss - floor) * scale
    found, *_ = np.linalg.lstsq(rows, target, rcond=None)
    residuals = target - rows @ found
    sigma, covariance = float(np.sqrt(residuals @ residuals / (len(N) - 3))), np.linalg.inv(rows.T @ rows)
    reach = float(stats.t.ppf(0.975, len(N) - 3)) * sigma * np.sqrt(np.diag(covariance))
    values, ends = found.tolist(), np.stack([found - reach, found + reach], axis=-1)
    return {"C": math.exp(values[0]), "a": values[1], "b": values[2], "sigma": sigma, "covariance": covariance.tolist(),
            "num_points": len(N), "intervals": {"C": np.exp(ends[0]).tolist(), "a": ends[1].tolist(), "b": ends[2].tolist()}}


def plane(N: ArrayLike, D: ArrayLike) -> Array:
    """(..., 3) what log C, a and b are multiplied with."""
    x, y = np.broadcast_arrays(np.log(np.asarray(N, dtype=np.float64)), np.log(np.asarray(D, dtype=np.float64)))
    return np.stack([np.ones_like(x), -x, -y], axis=-1)
