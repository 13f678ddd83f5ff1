"""How good a judge is: pairwise accuracy with an interval that knows pairs of one prompt are related, calibration, shortcuts.

Scores come as one list a prompt, in the order of its ranks. `ranks`: 1 is best, equal numbers tie; tied pairs are not judged. `keys` name
the prompts where one may come several times, ranked by several people: it then counts once in every interval.
"""
import math
import random
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import rankdata

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


class Figure(NamedTuple):
    """A `value` measured on `n` of something, with its 95 % interval."""

    value: float
    n: int
    low: float
    high: float


class Bin(NamedTuple):
    """The `n` pairs whose confidence lies in [low, high): their mean confidence, and the share of them ordered right."""

    low: float
    high: float
    n: int
    confidence: float
    right: float


class Calibration(NamedTuple):
    """Of sigmoid(score difference) as the probability that the better response is preferred, with 95 % intervals."""

    ece: float
    brier: float
    n: int
    ece_interval: tuple[float, float]
    brier_interval: tuple[float, float]


def judged(scores: Scores, ranks: Ranks, distance: int | None = None) -> list[list[float]]:
    """For each prompt, 1 for every pair ordered right, 0 for wrong, 1/2 for equal scores; `distance` keeps pairs so far apart."""
    return [[(1.0 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0.0) for i, j, d in pairs(list(r)) if distance in (None, d)]
            for s, r in zip(scores, ranks, strict=True)]


def together(rows: Sequence[Sequence[float]], keys: Sequence[Hashable] | None) -> list[list[float]]:
    """One list a key, in the order of first appearance: what several rankings of one prompt say is not independent. None: as they are."""
    if keys is None:
        return [list(row) for row in rows]
    found: dict[Hashable, list[float]] = {}
    for key, row in zip(keys, rows, strict=True):
        found.setdefault(key, []).extend(row)
    return list(found.values())


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


def accuracy_by_distance(scores: Scores, ranks: Ranks, keys: Sequence[Hashable] | None = None) -> dict[int, Accuracy]:
    """Accuracy at each rank distance that occurs: neighbours in a ranking are harder to tell apart than best and worst."""
    distances = sorted({d for r in ranks for _, _, d in pairs(list(r))})
    return {d: accuracy(together(judged(scores, ranks, d), keys)) for d in distances}


def accuracy_difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """First minus second accuracy on the same pairs, with its 95 % interval (paired, by prompt): (difference, low, high)."""
    deltas = [(math.fsum(a) - math.fsum(b), len(a)) for a, b in zip(first, second, strict=True) if a]
    n = sum(size for _, size in deltas)
    difference = math.fsum(d for d, _ in deltas) / n
    variance = math.fsum((d - difference * size) ** 2 for d, size in deltas) * len(deltas) / max(1, len(deltas) - 1) / n ** 2
    half = Z95 * math.sqrt(variance)
    return difference, difference - half, difference + half


def accuracy_by(names: Sequence[str], scores: Scores, ranks: Ranks, keys: Sequence[Hashable] | None = None) -> dict[str, Accuracy]:
    """Accuracy within each group of rankings, such as those of one source or annotator; `names` has each ranking's group.

    Groups without a pair of different rank are left out.
    """
    rows = [row for row in zip(names, judged(scores, ranks), keys or range(len(ranks)), strict=True) if row[1]]
    return {name: accuracy(together([o for own, o, _ in rows if own == name], [key for own, _, key in rows if own == name]))
            for name in sorted({name for name, _, _ in rows})}


def accuracy_by_length(scores: Scores, ranks: Ranks, lengths: Scores, keys: Sequence[Hashable] | None = None) -> dict[str, Accuracy]:
    """Accuracy on the pairs whose better response is `shorter`, `longer` or as long (`equal`); what does not occur is left out.

    A judge that goes by length is right on one kind and wrong on the other, whatever its accuracy over all.
    """
    outcomes = judged(scores, ranks)
    kinds = [[("equal", "longer", "shorter")[int(np.sign(own[i] - own[j]))] for i, j, _ in pairs(list(r))]
             for own, r in zip(lengths, ranks, strict=True)]
    found = {}
    for kind in ("shorter", "longer", "equal"):
        chosen = [[o for o, k in zip(row, of, strict=True) if k == kind] for row, of in zip(outcomes, kinds, strict=True)]
        if any(chosen):
            found[kind] = accuracy(together(chosen, keys))
    return found


# ---- calibration ----


def differences(scores: Scores, ranks: Ranks) -> list[list[float]]:
    """Better less worse response's score for each pair of each prompt. Raises ValueError when there is no pair."""
    found = [[s[i] - s[j] for i, j, _ in pairs(list(r))] for s, r in zip(scores, ranks, strict=True)]
    if not any(found):
        raise ValueError("no pair of different rank to judge: every prompt's responses tie")
    return found


def _binned(scores: Scores, ranks: Ranks, bins: int, keys: Sequence[Hashable] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(prompts, bins, 3): each prompt's pairs, confidence and right ones by bin of confidence; (prompts,): squared errors.

    Prompts without a pair are left out.
    """
    rows = [np.asarray(row) for row in together(differences(scores, ranks), keys) if row]
    cells, errors = np.zeros((len(rows), bins, 3)), np.zeros(len(rows))
    for cell, error, row in zip(cells, range(len(rows)), rows, strict=True):
        p = 1 / (1 + np.exp(-np.clip(row, -60, 60)))
        confidence = np.maximum(p, 1 - p)
        right = np.where(p > 0.5, 1.0, np.where(p == 0.5, 0.5, 0.0))
        where = np.minimum(bins - 1, ((confidence - 0.5) * 2 * bins).astype(int))
        np.add.at(cell, where, np.stack([np.ones_like(p), confidence, right], axis=1))
        errors[error] = ((1 - p) ** 2).sum()
    return cells, errors


def reliability(scores: Scores, ranks: Ranks, bins: int = 10) -> list[Bin]:
    """The bins of `calibration`, for showing; empty ones are left out. Right below confidence: the judge is too sure of itself."""
    table = _binned(scores, ranks, bins)[0].sum(axis=0)
    return [Bin(0.5 + k / (2 * bins), 0.5 + (k + 1) / (2 * bins), int(n), confidence / n, right / n)
            for k, (n, confidence, right) in enumerate(table.tolist()) if n]


def calibration(scores: Scores, ranks: Ranks, bins: int = 10, keys: Sequence[Hashable] | None = None) -> Calibration:
    """Expected calibration error (Guo et al. 2017, equation 3; equal bins of confidence from .5 to 1) and Brier score.

    Intervals by bootstrap over prompts. The error is a sum of absolute values, which noise alone lifts above zero, and a resample
    lifts once more: its interval is the basic one (Davison & Hinkley 1997, section 5.2), which takes that off. It begins at 0 where
    a judge without any error would show as much by chance, which prompts whose gaps take random signs tell (the wild bootstrap).
    Simulated at 100 to 1,000 pairs it covers the truth 83 to 99 % of the time; below 300 pairs mostly under 92 %.
    """
    cells, errors = _binned(scores, ranks, bins, keys)
    sizes, gaps = cells[:, :, 0].sum(axis=1), cells[:, :, 2] - cells[:, :, 1]

    def ece(weights: np.ndarray) -> np.ndarray:
        return np.abs(weights @ gaps).sum(axis=-1) / (weights @ sizes)

    def brier(weights: np.ndarray) -> np.ndarray:
        return weights @ errors / (weights @ sizes)

    value, (low, high) = bootstrap(ece, len(sizes))
    mean, interval = bootstrap(brier, len(sizes))
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(1000, len(sizes)))
    chance = float(np.quantile(np.abs(signs @ gaps).sum(axis=1) / sizes.sum(), 0.975))
    return Calibration(value, mean, int(sizes.sum()), (2 * value - high if 2 * value > high and value > chance else 0.0,
                                                       max(value, 2 * value - low)), interval)


def fit_temperature(found: Sequence[float]) -> float:
    """The temperature that makes sigmoid(difference / temperature) most likely (Guo et al. 2017, section 4.2).

    `found` are score differences, better less worse. Lies within a factor of 1,000 of their root mean square: with every pair ordered
    right the likeliest is 0, and with most of them wrong infinity. Raises ValueError when all are 0.
    """
    x = np.asarray(found, dtype=np.float64)
    scale = float(np.sqrt((x * x).mean())) if len(x) else 0.0
    if scale == 0:
        raise ValueError(f"a temperature cannot be fitted to {len(x)} score differences that are all 0")
    limit = math.log(1000)  # the loss has one minimum in 1 / temperature, so in its logarithm, too
    best = minimize_scalar(lambda t: float(np.logaddexp(0, -x / scale * math.exp(-t)).mean()), bounds=(-limit, limit), method="bounded",
                           options={"xatol": 1e-6})
    return scale * math.exp(best.x)


def fitted(scores: Scores, ranks: Ranks, keys: Sequence[Hashable] | None = None, folds: int = 5, seed: int = 0,
           ) -> tuple[list[list[float]], list[float]]:
    """Scores divided by a temperature that was fitted on other prompts, and the temperature of each fold.

    `calibration(*...)` of the result is thus measured on nothing that it was fitted on. `keys` as in `deal`.
    """
    found, place = differences(scores, ranks), deal(keys or range(len(scores)), folds, seed)
    temperatures = [fit_temperature([d for row, at in zip(found, place, strict=True) for d in row if at != fold]) for fold in range(folds)]
    return [[s / temperatures[at] for s in row] for row, at in zip(scores, place, strict=True)], temperatures


def deal(keys: Sequence[Hashable], folds: int, seed: int = 0) -> list[int]:
    """The fold of each prompt; equal keys share one, so that a prompt that comes twice is never on both sides.

    Raises ValueError for fewer than two folds or fewer different keys than folds.
    """
    distinct = list(dict.fromkeys(keys))
    if not 2 <= folds <= len(distinct):
        raise ValueError(f"{len(distinct)} prompts cannot be dealt into {folds} folds: give 2 folds or more and at least a prompt for each")
    random.Random(f"folds:{seed}").shuffle(distinct)
    place = {key: number % folds for number, key in enumerate(distinct)}
    return [place[key] for key in keys]


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], n: int, *, resamples: int = 2000, seed: int = 0,
              ) -> tuple[float, tuple[float, float]]:
    """A statistic of n prompts and its 95 % percentile interval when they are drawn anew (Efron 1979).

    `statistic` takes how often each prompt was drawn, (..., n), and gives (...): a resample costs a product of matrices.
    """
    generator, drawn = np.random.default_rng(seed), []
    with np.errstate(invalid="ignore", divide="ignore"):  # a resample may hold no pair, or no spread: it says nothing
        for _ in range(0, resamples, 100):  # in parts, for memory
            places = generator.integers(n, size=(100, n)) + n * np.arange(100)[:, None]
            drawn.append(statistic(np.bincount(places.ravel(), minlength=100 * n).reshape(100, n).astype(np.float64)))
    low, high = np.nanquantile(np.concatenate(drawn), [0.025, 0.975])
    return float(statistic(np.ones(n))), (float(low), float(high))


# ---- what the scores follow ----


def length_correlation(scores: Scores, lengths: Scores, keys: Sequence[Hashable] | None = None) -> Figure:
    """Rank correlation (Spearman) of score and length within prompts; n counts responses, the bootstrap draws prompts.

    Ranks are taken within each prompt and centred there, so easy prompts with short answers and high scores say nothing; the
    correlation is of all of them together. Of two responses a prompt it is how much oftener the longer scores higher than lower.
    Raises ValueError when no prompt has two responses of different score and length.
    """
    sums: dict[Hashable, np.ndarray] = {}
    for key, s, own in zip(keys or range(len(scores)), scores, lengths, strict=True):
        x, y = (rankdata(values) - (len(s) + 1) / 2 for values in (s, own))
        sums[key] = sums.get(key, 0) + np.array([(x * y).sum(), (x * x).sum(), (y * y).sum()])
    products = np.array(list(sums.values()))
    if not (products.sum(axis=0)[1:] > 0).all():
        raise ValueError("score and length do not both differ within any prompt: there is no correlation")

    def correlation(weights: np.ndarray) -> np.ndarray:
        total = weights @ products
        return total[..., 0] / np.sqrt(total[..., 1] * total[..., 2])

    value, interval = bootstrap(correlation, len(products))
    return Figure(value, sum(map(len, scores)), *interval)
