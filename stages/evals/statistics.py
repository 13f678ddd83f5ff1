"""Intervals, paired tests and sample statistics for accuracies: pure functions, no torch. (One proportion: prompts/intervals.py.)

Letters for two answerers on the same n questions: `both` right, `only_a`, `only_b`, `neither`. Questions are the independent
units, or, where `clusters` names the template that each was made from, the templates: questions of one template are right and
wrong together, and counting them one by one makes intervals too short (Miller 2024, "Adding error bars to evals", section 2.2).
"""
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest

from prompts.intervals import Z95, mean_variance, student95, wilson

POWER_Z = 0.8416212335729143  # the 80 % point of the normal distribution: the power that a detectable effect is stated for
CHUNK = 20_000_000  # random numbers drawn at a time, for memory
Clusters = Sequence[Hashable] | None


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


def bootstrap_mean(values: Sequence[float], clusters: Clusters = None, *, seed: int = 0, resamples: int = 4000) -> tuple[float, float]:
    """95 % percentile interval of a mean over independent units (Efron 1979): questions, each with the share of its samples, or
    the difference of two answerers on it (the paired bootstrap). With `clusters` whole clusters are drawn.

    Few clusters (under about 30) make it too short, as any percentile bootstrap is; `compare` uses Student's t there.
    Raises ValueError without values.
    """
    if not values:
        raise ValueError("no values to average: expected at least one question")
    rng = np.random.default_rng(seed)
    if clusters is None:
        distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
        sums, sizes, shares = distinct, np.ones(len(distinct)), counts / len(values)
        units = len(values)
    else:
        sums, sizes = cluster_sums(values, clusters)
        units, shares = len(sums), np.full(len(sums), 1 / len(sums))
    means = np.empty(resamples)
    for rows in np.array_split(np.arange(resamples), math.ceil(resamples * len(sums) / CHUNK)):
        drawn = rng.multinomial(units, shares, size=len(rows))
        means[rows] = drawn @ sums / (drawn @ sizes)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def cluster_sums(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[NDArray, NDArray]:
    """Sum and number of the values of each cluster, in order of first sight."""
    sums: dict[Hashable, float] = {}
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value
    sizes = Counter(clusters)
    return np.asarray(list(sums.values())), np.asarray([float(sizes[c]) for c in sums])


def sign_flips(differences: Sequence[float], clusters: Clusters = None, *, seed: int = 0, draws: int = 99_999) -> float:
    """Two-sided p that paired differences are symmetric about zero (Fisher 1935): as large a sum by flipping signs at random.

    The same question as McNemar's asks, for shares as well, and for whole clusters. Signs are drawn, so p is no smaller than
    1 / (draws + 1), and varies by about sqrt(p / draws) with the seed; units that differ by as much are flipped together.
    """
    units = np.asarray(differences, dtype=np.float64) if clusters is None else cluster_sums(differences, clusters)[0]
    sizes, counts = np.unique(np.round(np.abs(units), 12), return_counts=True)
    rng, observed = np.random.default_rng(seed), abs(math.fsum(units))
    often, once = counts > 1, sizes[counts == 1]
    reached, most = 0, max(1, min(10_000, CHUNK // len(sizes)))
    for start in range(0, draws, most):
        chunk = min(most, draws - start)
        heads = rng.binomial(counts[often], 0.5, size=(chunk, int(often.sum())))
        flips = rng.integers(0, 2, size=(chunk, len(once)), dtype=np.int8)
        sums = (2 * heads - counts[often]) @ sizes[often] + (2.0 * flips - 1) @ once
        reached += int(np.sum(np.abs(sums) >= observed - 1e-9))
    return (reached + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for the number of tests (Holm 1979): whoever rejects below .05 errs anywhere in the family with at most 5 %.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none comes out below a smaller one, or above 1. The tests may depend
    on one another in any way.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted


def minimum_detectable_effect(n: float, discordance: float) -> float | None:
    """The least difference of accuracies that McNemar's test at 5 % finds with 80 % power on n paired questions (Connor 1987).

    `discordance` is the share of questions that one answerer alone gets right; a difference needs at least as much of it, so where the
    effect would exceed it, it is taken to be as large as the effect. n may be an effective number. None where even answerers that
    differ on every question could not be told apart, and where the discordance is 0: then nothing says how much they would differ.
    """
    if not 0 <= discordance <= 1 or n <= 0:
        raise ValueError(f"got discordance {discordance} and n {n}: expected a share and a positive number of questions")

    def lacking(effect: float) -> float:
        differ = max(discordance, effect)
        return effect * math.sqrt(n) - Z95 * math.sqrt(differ) - POWER_Z * math.sqrt(max(0.0, differ - effect * effect))

    return float(brentq(lacking, 1e-12, 1.0)) if discordance and lacking(1.0) > 0 else None


def compare(a: Sequence[float], b: Sequence[float], clusters: Clusters = None) -> dict[str, Any]:
    """Paired comparison of two answerers on the same questions, in the same order.

    Entries are 0 or 1, or shares of right samples. `ci95` and `p` (by the test that `test` names) are Newcombe's `paired_wilson` and
    McNemar's for 0/1 on both sides; for shares a bootstrap over questions and random sign flips. With `clusters` (fewer than
    questions) `ci95` is Student's t on the cluster-robust standard error, and whole clusters flip. Beside them: `bootstrap95`, the
    paired bootstrap, and `mde`, the least difference that as many such questions show with 80 % power (None: unknown).
    Raises ValueError for lists of different or no length, and for a single cluster.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"a paired comparison needs equally many answers, at least one: got {len(a)} and {len(b)}")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n, mean = len(a), math.fsum(differences) / len(a)
    grouped = clusters is not None and len(set(clusters)) < n
    binary = set(a) | set(b) <= {0, 1}
    low, high = bootstrap_mean(differences, clusters if grouped else None)
    result: dict[str, Any] = {"difference": mean, "n": n, "ci95": (low, high), "p": None, "test": "sign flips", "bootstrap95": (low, high)}
    variance, units = mean_variance(differences, clusters if grouped else None) if n > 1 else (0.0, 1)
    if binary:
        only_a, only_b = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
        both = sum(x == y == 1 for x, y in zip(a, b, strict=True))
        result |= {"only_a": only_a, "only_b": only_b, "test": "McNemar", "p": mcnemar(only_a, only_b),
                   "ci95": paired_wilson(both, only_a, only_b, n - both - only_a - only_b)}
    if grouped:
        half = student95(units - 1) * math.sqrt(variance)
        result |= {"clusters": units, "test": "sign flips of clusters", "ci95": (max(-1.0, mean - half), min(1.0, mean + half))}
    elif not binary and not variance:  # no spread is no proof of none: as wide as a proportion of 0 out of n
        beyond = wilson(0, n)[1]
        result["ci95"] = (max(-1.0, mean - beyond), min(1.0, mean + beyond))
    if grouped or not binary:
        result["p"] = sign_flips(differences, clusters if grouped else None)
    detectable = (Z95 + POWER_Z) * math.sqrt(variance) or None
    if binary and not grouped:
        detectable = minimum_detectable_effect(n, (result["only_a"] + result["only_b"]) / n)
    return result | {"mde": detectable}


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that one of k samples is right, from n >= k recorded ones of which `right` are: 1 - C(n - right, k) / C(n, k).

    Unbiased, as 1 - (1 - right / n)^k is not (Chen et al. 2021, section 2.1). Average it over questions.
    Raises ValueError unless 1 <= k <= n and 0 <= right <= n.
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(f"pass@{k} from {n} samples of which {right} are right: expected 1 <= k <= n and 0 <= right <= n")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def maj_at_k(votes: Sequence[tuple[int, float]], abstained: int = 0) -> list[float]:
    """For k = 1 to n the probability that the majority of k of a question's n samples, drawn without replacement, is right.

    `votes` holds each distinct answer's count and whether it is right (a share, where it was written in ways of which not all are: the
    first seen stands for them, and any of them is as likely to be it); `abstained` samples gave no answer and never win, so that an
    all-silent draw is wrong. The k samples come in random order, which is what k fresh ones would do, and a tie goes to the answer
    first seen in that order: to each of t tied answers with probability 1 / t, for they have equally many samples. So the value is
    exact, counted and not drawn, and unbiased for a fresh vote of k. At k = n it differs from the recorded vote only if that tied.
    Average it over questions. Raises ValueError for counts that are not positive and for more than 1,000 samples.
    """
    n = sum(count for count, _ in votes) + abstained
    if any(count < 1 for count, _ in votes) or abstained < 0 or not 1 <= n <= 1000:
        raise ValueError(f"got counts {[count for count, _ in votes]} and {abstained} without an answer: expected positive counts, "
                         "between 1 and 1,000 samples in all")
    won = [0.0] * (n + 1)
    for top in range(1, max((count for count, right in votes if right), default=0) + 1):  # votes of the winner
        # samples drawn, answers with `top` of them, how many of these are right
        ways: Counter[tuple[int, int, float]] = Counter({(0, 0, 0.0): 1})
        for count, right in votes:
            more: Counter[tuple[int, int, float]] = Counter()
            for (drawn, tied, good), number in ways.items():
                for taken in range(min(count, top) + 1):
                    hit = taken == top
                    more[drawn + taken, tied + hit, good + hit * right] += number * math.comb(count, taken)
            ways = more
        for (drawn, tied, good), number in ways.items():
            for silent in range(abstained + 1 if good else 0):
                k = drawn + silent
                won[k] += number * math.comb(abstained, silent) * good / (tied * math.comb(n, k))
    return [min(1.0, value) for value in won[1:]]


def variance_split(samples: Sequence[Sequence[float]], *, seed: int = 0, resamples: int = 2000) -> dict[str, Any]:
    """How much of the spread of right and wrong lies between questions, and how much between samples of one (Miller 2024, section 3).

    `samples` holds each question's 0/1 (or scores). `within` is the mean of the questions' sample variances; `between` the
    variance of their means less what sampling adds to it, which in few samples may come out negative and then reads 0. With K samples
    a question the standard error of the accuracy is sqrt((between + within / K) / n): `se_one` at one sample, `se` as recorded,
    `se_limit` for samples without end, beyond which only more questions help. Intervals are a bootstrap over questions.
    Raises ValueError for fewer than two questions or samples of one.
    """
    if len(samples) < 2 or min(map(len, samples), default=0) < 2:
        raise ValueError(f"a split of variance needs at least 2 questions with at least 2 samples each: got {len(samples)} with at least "
                         f"{min(map(len, samples), default=0)}")
    n = len(samples)
    means = np.asarray([math.fsum(s) / len(s) for s in samples])
    inside = np.asarray([np.var(s, ddof=1) for s in samples])
    added = inside / np.asarray([len(s) for s in samples])
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    spread = (drawn @ means**2 - (drawn @ means) ** 2) * n / (n - 1)
    between, within = max(0.0, float(np.var(means, ddof=1) - added.mean())), float(inside.mean())

    def ends(values: NDArray) -> list[float]:
        return [max(0.0, float(end)) for end in np.quantile(values, [0.025, 0.975])]

    return {"n": n, "num_samples": sum(map(len, samples)), "between": between, "between_ci95": ends(spread - drawn @ added),
            "within": within, "within_ci95": ends(drawn @ inside), "se_one": math.sqrt((between + within) / n),
            "se": math.sqrt((between + float(added.mean())) / n), "se_limit": math.sqrt(between / n)}
