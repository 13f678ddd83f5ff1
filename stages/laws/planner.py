"""What a fitted law says about spending compute: the loss-optimal parameters and tokens for a budget."""
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stages.laws.fit import PARAMETERS, Array, law, predict

Figure = dict[str, Any]  # {"value": ..., "interval": [low, high]}


def optimal(constants: ArrayLike, flops: ArrayLike, flops_per_unit: float = 6.0) -> tuple[Array, Array]:
    """N and D that minimise the law at C = k N D FLOPs: N = G (C/k)^a, D = (C/k)^(1-a) / G (Hoffmann et al. 2022, eq. 4).

    a = beta / (alpha + beta), G = (alpha A / (beta B))^(1 / (alpha + beta)). `constants` (..., 5), `flops` broadcasts with it.
    """
    _, A, B, alpha, beta = np.moveaxis(np.asarray(constants, dtype=np.float64), -1, 0)
    units = np.log(np.asarray(flops, dtype=np.float64) / flops_per_unit)
    with np.errstate(divide="ignore"):  # a bootstrap draw may have lost a term, A or B = 0: the optimum is then at an end
        size = (np.log(alpha * A) - np.log(beta * B) + beta * units) / (alpha + beta)
    size = size.clip(-200, 200)  # within what a float holds, so that D / N and JSON stay finite
    return np.exp(size), np.exp(units - size)


def plan(fit: Mapping[str, Any], flops: float, *, flops_per_unit: float = 6.0) -> dict[str, Any]:
    """Compute-optimal N, D, their ratio and loss for a budget of `flops`, each {"value", "interval"} (95 %, over the bootstrap).

    The budget counts `flops_per_unit` N D, with N in the fit's own convention. Raises ValueError unless it is positive, and for a product.
    """
    if fit.get("form") == "product":
        raise ValueError("a product of powers has no optimal split of a budget: its best is all parameters or all tokens; fit a sum")
    if not flops > 0:
        raise ValueError(f"flops {flops} must be positive, for example 1e18")
    N, D = optimal([fit[name] for name in PARAMETERS], flops, flops_per_unit)
    draws = fit.get("draws") or [[fit[name] for name in PARAMETERS]]
    drawn_N, drawn_D = optimal(draws, flops, flops_per_unit)
    loss, interval = predict(fit, float(N), float(D))

    def figure(value: Array, drawn: Array) -> Figure:
        return {"value": float(value), "interval": np.quantile(drawn, [0.025, 0.975]).tolist()}

    a = float(fit["beta"] / (fit["alpha"] + fit["beta"]))
    columns = np.asarray(draws)
    return {"flops": flops, "N": figure(N, drawn_N), "D": figure(D, drawn_D),
            "tokens_per_parameter": figure(D / N, drawn_D / drawn_N), "loss": {"value": loss, "interval": list(interval)},
            "exponent_N": figure(np.asarray(a), columns[:, 4] / (columns[:, 3] + columns[:, 4])),
            "irreducible_share": float(fit["E"] / law([fit[name] for name in PARAMETERS], N, D))}
