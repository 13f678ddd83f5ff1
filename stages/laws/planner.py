"""What a fitted law says about spending compute: parameters and tokens for a budget, for a loss, and for a model that will be used.

Letters: k FLOPs a parameter and token in training (6), S bootstrap draws, constants (..., 5) in the order of `PARAMETERS`.
"""
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from stages.laws.fit import PARAMETERS, law, predict
from stages.laws.objective import Array

Figure = dict[str, Any]  # {"value": ..., "interval": [low, high]}


def optimal(constants: ArrayLike, flops: ArrayLike, flops_per_unit: float = 6.0) -> tuple[Array, Array]:
    """N and D that minimise the law at C = k N D FLOPs: N = G (C/k)^a, D = (C/k)^(1-a) / G (Hoffmann et al. 2022, eq. 4).

    a = beta / (alpha + beta), G = (alpha A / (beta B))^(1 / (alpha + beta)). `constants` (..., 5), `flops` broadcasts with it.
    """
    _, A, B, alpha, beta = np.moveaxis(np.asarray(constants, dtype=np.float64), -1, 0)
    with np.errstate(divide="ignore"):  # a bootstrap draw may have lost a term, A or B = 0: the optimum is then at an end
        units = np.log(np.asarray(flops, dtype=np.float64) / flops_per_unit)
        size = (np.log(alpha * A) - np.log(beta * B) + beta * units) / (alpha + beta)
    size = size.clip(-200, 200)  # within what a float holds, so that D / N and JSON stay finite
    return np.exp(size), np.exp(units - size)


def cheapest(constants: ArrayLike, loss: float, flops_per_unit: float = 6.0) -> Array:
    """FLOPs of the cheapest training to `loss` nats: C = k ((A G^-alpha + B G^beta) / (L - E))^((alpha + beta) / (alpha beta)).

    `optimal` put into the law, solved for C, with its G. `constants` (..., 5); infinite where the loss is not above E.
    """
    E, A, B, alpha, beta = np.moveaxis(np.asarray(constants, dtype=np.float64), -1, 0)
    G = (alpha * A / (beta * B)) ** (1 / (alpha + beta))
    with np.errstate(divide="ignore", over="ignore"):
        units = ((A * G**-alpha + B * G**beta) / np.maximum(loss - E, 0.0)) ** ((alpha + beta) / (alpha * beta))
    return flops_per_unit * units


def tokens_for(constants: ArrayLike, N: ArrayLike, loss: float) -> Array:
    """Tokens with which N parameters reach `loss`: (B / (L - E - A / N^alpha))^(1 / beta); infinite where they cannot."""
    E, A, B, alpha, beta = np.moveaxis(np.asarray(constants, dtype=np.float64), -1, 0)
    left = loss - E - A / np.asarray(N, dtype=np.float64) ** alpha
    with np.errstate(divide="ignore", over="ignore"):
        return (B / np.maximum(left, 0.0)) ** (1 / beta)


def serving(constants: ArrayLike, inference_tokens: float, *, loss: float | None = None, flops: float | None = None,
            price_ratio: float = 1.0, flops_per_unit: float = 6.0) -> tuple[Array, Array]:
    """N and D for a model that will read and write `inference_tokens` T (Sardana et al. 2024, arXiv 2401.00448).

    The lifetime costs k N D + 2 r N T in training FLOPs, r the price of an inference FLOP over that of a training FLOP (`price_ratio`).
    With `loss`: the least cost at that loss (their section 2, and with r their section 3, in prices). With `flops`: the least loss at that
    lifetime cost. `constants` (..., 5). Searched over log N by thirds: both fall, then rise. NaN where a loss is out of reach.
    """
    constants = np.asarray(constants, dtype=np.float64)
    E, A, _, alpha, _ = np.moveaxis(constants, -1, 0)
    per_parameter = 2 * price_ratio * inference_tokens
    if loss is not None:
        out_of_reach = loss <= E
        low = np.log(A / np.where(out_of_reach, np.nan, loss - E)) / alpha  # the size that would need endless tokens
        high = low + 30.0

        def split(size: Array) -> tuple[Array, Array]:
            D = tokens_for(constants, np.exp(size), loss)
            return D, size + np.log(flops_per_unit * D + per_parameter)
    elif flops is not None:
        high = np.broadcast_to(math.log(flops / per_parameter) if per_parameter else 200.0, E.shape)  # all of it spent on inference
        low = high - 60.0

        def split(size: Array) -> tuple[Array, Array]:
            D = np.maximum(flops * np.exp(-size) - per_parameter, 1e-300) / flops_per_unit
            return D, law(constants, np.exp(size), D)
    else:
        raise ValueError("give the loss to reach or the FLOPs to spend")
    for _ in range(150):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        lower = split(left)[1] < split(right)[1]
        low, high = np.where(lower, low, left), np.where(lower, right, high)
    size = (low + high) / 2
    return np.exp(size), split(size)[0]


def relative_price(*, training_mfu: float, input_mfu: float, output_mfu: float, input_share: float, price: float = 1.0) -> float:
    """What an inference FLOP costs over a training FLOP: `price` (of an hour of the device that serves over one that trains) times the
    training utilisation over that of serving, prompts and answers weighted by the share of tokens that are prompts (Sardana et al.
    2024, section 3)."""
    return price * training_mfu * (input_share / input_mfu + (1 - input_share) / output_mfu)


@np.errstate(divide="ignore", over="ignore", invalid="ignore")  # bootstrap draws that lost a term or cannot reach the loss
def plan(fit: Mapping[str, Any], flops: float | None = None, *, loss: float | None = None, inference_tokens: float = 0.0,
         price_ratio: float = 1.0, flops_per_unit: float | None = None) -> dict[str, Any]:
    """Best N, D, their ratio, loss and FLOPs for a budget of `flops` or a `loss`, each {"value", "interval"} (95 %, over the bootstrap).

    With `inference_tokens` the budget is that of training and serving, as `serving` counts it, and for a loss what it saves over the
    model that is cheapest to train is given. A budget counts `flops_per_unit` N D (default: the fit's own, else 6), with N in the fit's own
    convention. An interval ends in null where some draw never reaches the loss, and is null where the fit has no draws. Raises
    ValueError for a budget that is not positive, a loss at or below E, and any form but the sum.
    """
    if fit.get("form", "sum") != "sum":
        raise ValueError("a product of powers has no optimal split of a budget, and a mean with one none in closed form: fit a sum")
    if (flops is None) == (loss is None):
        raise ValueError("plan needs one of flops, for example 1e21, and loss, for example 2.5")
    if flops is not None and not flops > 0:
        raise ValueError(f"flops {flops} must be positive, for example 1e18")
    if loss is not None and not loss > fit["E"]:
        raise ValueError(f"the loss {loss:g} does not lie above E = {fit['E']:.4g}, which no budget goes below: ask for a higher one")
    if not (inference_tokens >= 0 and price_ratio > 0):
        raise ValueError(f"inference_tokens {inference_tokens:g} and price_ratio {price_ratio:g} must be positive")
    k = float(flops_per_unit or fit.get("conventions", {}).get("flops_per_unit", 6.0))
    main = np.array([fit[name] for name in PARAMETERS])
    draws = np.array([*fit.get("draws", ()), main])  # the fit itself last

    def lifetime(N: Array, D: Array) -> Array:
        return k * N * D + 2 * price_ratio * inference_tokens * N

    least = optimal(draws, cheapest(draws, loss, k) if loss is not None else np.float64(flops or 0.0), k)
    N, D = least
    if inference_tokens:
        N, D = serving(draws, inference_tokens, loss=loss, flops=flops, price_ratio=price_ratio, flops_per_unit=k)

    if not (np.isfinite([N[-1], D[-1]]).all() and min(N[-1], D[-1]) > 0):
        raise ValueError("the fit determines no split of this budget: see its warnings, and give it runs that vary both N and D more")

    def figure(values: Array) -> Figure:
        if len(values) == 1:
            return {"value": float(values[0]), "interval": None}  # a fit without draws has no intervals
        ends = np.quantile(np.where(np.isfinite(values[:-1]), values[:-1], np.inf), [0.025, 0.975], method="nearest")
        return {"value": float(values[-1]), "interval": [float(end) if np.isfinite(end) else None for end in ends]}

    reached, interval = predict(fit, float(N[-1]), float(D[-1]))
    figures = {"flops_per_unit": k, "N": figure(N), "D": figure(D), "tokens_per_parameter": figure(D / N),
               "loss": {"value": reached, "interval": list(interval) if len(draws) > 1 else None}, "training_flops": figure(k * N * D),
               "exponent_N": figure(draws[:, 4] / (draws[:, 3] + draws[:, 4])), "irreducible_share": fit["E"] / reached}
    figures["flops"] = flops if flops is not None else figure(lifetime(N, D))
    if inference_tokens:
        figures |= {"inference_tokens": inference_tokens, "price_ratio": price_ratio}
        if loss is not None:
            figures["saved_share"] = figure(1 - lifetime(N, D) / lifetime(*least))
    return figures
