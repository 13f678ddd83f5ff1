"""How good a judge is: pairwise accuracy with an interval that knows pairs of one prompt are related, calibration, baselines.

Scores come as one list a prompt, in the order of its ranks. `ranks`: 1 is best, equal numbers tie; tied pairs are not judged.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

from prompts.intervals import Z95, wilson
from reward.preferences import pairs

Scores = Sequence[Sequence[float]]
Ranks = Sequence[Sequence[int]]


class Accuracy(NamedTuple):
    """`value` over `n` pairs of `num_prompts` prompts; `low` and `high` are its 95 % interval."""

    value: float
    n: int
    num_prompts: int
    low: float
    high: float


class Calibration(NamedTuple):
    """Of sigmoid(score difference) as the probability that the better response is preferred."""

    ece: float
    brier: float
    n: int


def judged(scores: Scores, ranks: Ranks, distance: int | None = None) -> list[list[float]]:
    """For each prompt, 1 for every pair ordered right, 0 for wrong, 1/2 for equal scores; `distance` keeps pairs so far apart."""
    return [[(1.0 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0.0) for i, j, d in pairs(list(r)) if distance in (None, d)]
            for s, r in zip(scores, ranks, strict=True)]


def accuracy(outcomes: Sequence[Sequence[float]]) -> Accuracy:
    """Share of pairs ordered right, with Wilson's interval at the effective number of pairs.

    Pairs of one prompt share responses, so n pairs say less than n prompts would. The variance between prompts (the
    ratio estimator of cluster sampling, Cochran 1977, section 6.3) over p (1 - p) gives the number of independent pairs
    with the same variance; it never exceeds n. Raises ValueError when there is no pair.
    """
    groups = [o for o in outcomes if o]
    n = sum(map(len, groups))
    if n == 0:
        raise ValueError("no pair of different rank to judge: every prompt's responses tie")
    p = math.fsum(math.fsum(o) for o in groups) / n
    effective = float(n)
    if 0 < p < 1:
        clusters = len(groups)
        between = math.fsum((math.fsum(o) - p * len(o)) ** 2 for o in groups) * clusters / max(1, clusters - 1) / n ** 2
        effective = min(effective, p * (1 - p) / between) if between > 0 else effective
    else:
        effective = float(len(groups))
    low, high = wilson(p * effective, effective)
    return Accuracy(p, n, len(groups), low, high)


def accuracy_by_distance(scores: Scores, ranks: Ranks) -> dict[int, Accuracy]:
    """Accuracy at each rank distance that occurs: neighbours in a ranking are harder to tell apart than best and worst."""
    distances = sorted({d for r in ranks for _, _, d in pairs(list(r))})
    return {d: accuracy(judged(scores, ranks, d)) for d in distances}


def accuracy_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """First minus second accuracy on the same pairs, with its 95 % interval (paired, by prompt): (difference, low, high)."""
    deltas = [(math.fsum(a) - math.fsum(b), len(a)) for a, b in zip(first, second, strict=True) if a]
    n = sum(size for _, size in deltas)
    difference = math.fsum(d for d, _ in deltas) / n
    variance = math.fsum((d - difference * size) ** 2 for d, size in deltas) * len(deltas) / max(1, len(deltas) - 1) / n ** 2
    half = Z95 * math.sqrt(variance)
    return difference, difference - half, difference + half


def calibration(scores: Scores, ranks: Ranks, bins: int = 10) -> Calibration:
    """Expected calibration error (Guo et al. 2017, equation 3; equal bins of confidence from .5 to 1) and Brier score."""
    probabilities = [1 / (1 + math.exp(-max(-60.0, min(60.0, s[i] - s[j]))))
                     for s, r in zip(scores, ranks, strict=True) for i, j, _ in pairs(list(r))]
    if not probabilities:
        raise ValueError("no pair of different rank to judge: every prompt's responses tie")
    table = [[0, 0.0, 0.0] for _ in range(bins)]  # count, right, confidence
    for p in probabilities:
        confidence = max(p, 1 - p)
        cell = table[min(bins - 1, int((confidence - 0.5) * 2 * bins))]
        cell[0] += 1
        cell[1] += 1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0
        cell[2] += confidence
    n = len(probabilities)
    return Calibration(sum(abs(right - confidence) for _, right, confidence in table) / n,
                       math.fsum((1 - p) ** 2 for p in probabilities) / n, n)
