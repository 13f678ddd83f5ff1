"""Intervals and paired tests for accuracies: pure functions, no torch. (One proportion: prompts/intervals.py.)

Letters for two answerers on the same n questions: `both` right, `only_a`, `only_b`, `neither`.
"""
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

from prompts.intervals import wilson


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: whether the discordant pairs fall to either side by a fair coin (McNemar 1947)."""
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired_wilson(both: int, only_a: int, only_b: int, neither: int) -> tuple[float, float]:
    """95 % interval of accuracy(a) - accuracy(b) on the same questions (Newcombe 1998, paired data, method 10).

    Built from the two Wilson intervals and their correlation, so that it stays honest when few pairs differ.
    """
    n = both + only_a + only_b + neither
    right_a, right_b = both + only_a, both + only_b
    p_a, p_b = right_a / n, right_b / n
    (low_a, high_a), (low_b, high_b) = wilson(right_a, n), wilson(right_b, n)
    margins = right_a * (n - right_a) * right_b * (n - right_b)
    product = float(both * neither - only_a * only_b)
    if product > 0:
        product = max(0.0, product - n / 2)  # the paper's continuity correction
    phi = product / math.sqrt(margins) if margins else 0.0
    below = math.sqrt((p_a - low_a) ** 2 - 2 * phi * (p_a - low_a) * (high_b - p_b) + (high_b - p_b) ** 2)
    above = math.sqrt((high_a - p_a) ** 2 - 2 * phi * (high_a - p_a) * (p_b - low_b) + (p_b - low_b) ** 2)
    return p_a - p_b - below, p_a - p_b + above


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, resamples: int = 4000) -> tuple[float, float]:
    """95 % percentile interval of a mean over independent units (Efron 1979): questions, each with the share of its samples.

    Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values to average: expected at least one question")
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    low, high = np.quantile(drawn @ distinct / len(values), [0.025, 0.975])
    return float(low), float(high)


def compare(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Paired comparison of two answerers on the same questions, in the same order.

    Entries are 0 or 1, or shares of right samples. With 0/1 on both sides the interval is `paired_wilson` and `p` McNemar's;
    with shares it is a bootstrap over questions, and there is no exact test (`p` is None).
    Raises ValueError for lists of different or no length.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a paired comparison needs equally many answers, at least one: got {len(a)} and {len(b)}")
    n = len(a)
    result: dict[str, Any] = {"difference": math.fsum(x - y for x, y in zip(a, b, strict=True)) / n, "n": n}
    if set(a) | set(b) <= {0, 1}:
        only_a = sum(x > y for x, y in zip(a, b, strict=True))
        only_b = sum(x < y for x, y in zip(a, b, strict=True))
        both = sum(x == y == 1 for x, y in zip(a, b, strict=True))
        return result | {"ci95": paired_wilson(both, only_a, only_b, n - both - only_a - only_b), "p": mcnemar(only_a, only_b),
                         "only_a": only_a, "only_b": only_b}
    return result | {"ci95": bootstrap_mean([x - y for x, y in zip(a, b, strict=True)]), "p": None}
