"""Emergence or the metric? Accuracy and a smooth score over the same models, and what the smooth score alone would predict.

Schaeffer et al. 2023 (arXiv 2304.15004): a score that improves smoothly with compute becomes a sudden jump once a sharp metric is
laid over it. So predict accuracy from the smooth score alone: its straight line over log FLOPs, mapped to accuracy by a monotone curve
that knows nothing of compute. Where the result fits as well as a line through the accuracies themselves, nothing but the metric jumps.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from stages.laws.objective import Array


def exact_match(token_logprob: ArrayLike, num_tokens: ArrayLike) -> Array:
    """Chance that all of an answer's tokens are right, exp(L x mean log-probability): Schaeffer et al. 2023, section 2."""
    return np.exp(np.asarray(num_tokens, dtype=np.float64) * np.asarray(token_logprob, dtype=np.float64))


def line(x: Array, y: Array) -> tuple[Array, float]:
    """Least-squares line at x, and the share of y's variance it explains (R2)."""
    fitted: Array = np.polyval(np.polyfit(x, y, 1), x).astype(np.float64)
    return fitted, r_squared(y, fitted)


def r_squared(y: Array, fitted: Array) -> float:
    return 1 - float(((y - fitted) ** 2).sum() / ((y - y.mean()) ** 2).sum())


def monotone(score: Array, accuracy: Array, at: Array) -> Array:
    """Accuracy at scores `at` by the best curve through (score, accuracy) that only rises or only falls; straight between models."""
    order = np.argsort(score, kind="stable")
    rising = bool(np.corrcoef(score, accuracy)[0, 1] > 0)
    return np.interp(at, score[order], isotonic_regression(accuracy[order], increasing=rising).x)


def emergence(flops: ArrayLike, accuracy: ArrayLike, smooth: ArrayLike) -> dict[str, Any]:
    """How straight accuracy and a smooth score are over log FLOPs, and the accuracy that the smooth score's line predicts.

    `flops`, `accuracy`, `smooth` (n,), one for each model; a smooth score (Brier, log-likelihood) may rise or fall as models
    improve. Returns num_models, r2_accuracy and r2_smooth (each of a line over log FLOPs), r2_predicted (of accuracy by the smooth
    score's line and the monotone map) and the rows. Raises ValueError for fewer than five models or a column without variation.
    """
    x, accuracy, smooth = (np.asarray(values, dtype=np.float64).ravel() for values in (np.log10(flops), accuracy, smooth))
    if len(x) < 5 or min(np.ptp(values) for values in (x, accuracy, smooth)) == 0:
        raise ValueError(f"{len(x)} models: give five or more, whose FLOPs and scores differ")
    straight, r2_smooth = line(x, smooth)
    predicted = monotone(smooth, accuracy, straight)
    rows = [{"flops": float(10**at), "accuracy": float(a), "smooth": float(s), "predicted_accuracy": float(p)}
            for at, a, s, p in zip(x, accuracy, smooth, predicted, strict=True)]
    return {"num_models": len(x), "r2_accuracy": line(x, accuracy)[1], "r2_smooth": r2_smooth,
            "r2_predicted": r_squared(accuracy, predicted), "rows": rows}


def summary(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Several tasks' `emergence` in one table without rows, and on how many the smooth score is the straighter one."""
    keys: Sequence[str] = ("num_models", "skipped", "r2_accuracy", "r2_smooth", "r2_predicted")
    return {"num_tasks": len(tasks), "smooth_is_straighter": sum(task["r2_smooth"] > task["r2_accuracy"] for task in tasks.values()),
            "tasks": {name: {key: task[key] for key in keys if key in task} for name, task in tasks.items()}}
