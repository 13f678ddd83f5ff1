"""Intervals for the figures this project states: every figure has an n and an interval."""
import math
from collections.abc import Hashable, Sequence

from scipy.special import stdtrit

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); (0, 1) when n is 0, because then nothing is known.

    Unlike p +- 1.96 standard errors it stays inside [0, 1] and keeps its width at 0/n and n/n. `n` may be an effective
    number of independent observations and so need not be whole. Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"got {successes} successes of {n}: expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half  # exact at the ends, not to rounding


def mean_variance(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, int]:
    """Variance of the mean of `values`, and the number of independent units behind it.

    `clusters` names what each value belongs to, such as the template that its question was made from: values of one cluster may
    vary together, so deviations are summed within clusters before they are squared (Miller 2024, section 2.2), and the usual
    G / (G - 1) of G clusters makes up for the mean being fitted. Raises ValueError for lists of different lengths or fewer than two units.
    """
    groups = list(range(len(values))) if clusters is None else clusters
    if len(groups) != len(values):
        raise ValueError(f"each value needs its cluster: got {len(values)} values and {len(groups)} clusters")
    mean = math.fsum(values) / max(1, len(values))
    sums: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value - mean
    units = len(sums)
    if units < 2:
        raise ValueError(f"the variance of a mean needs at least 2 independent units, got {units}: with one cluster leave `clusters` out "
                         "and state the figure for that cluster alone")
    return math.fsum(s * s for s in sums.values()) / len(values) ** 2 * units / (units - 1), units


def share_interval(shares: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, float, float]:
    """Mean of shares, such as each prompt's share of right answers, and its 95 % interval inside [0, 1]: (mean, low, high).

    Wilson's, at the number of independent trials whose mean would vary as much; with no spread, at one trial a share. With
    `clusters` (see `mean_variance`) the variance is theirs, no spread counts as one trial a cluster, and few clusters widen it by
    Student's t.
    """
    n, mean = len(shares), math.fsum(shares) / len(shares)
    variance, units = mean_variance(shares, clusters) if n > 1 else (0.0, n)
    trials = mean * (1 - mean) / variance if variance > 0 else units
    return mean, *wilson(mean * trials, trials, Z95 if clusters is None else student95(units - 1))


def student95(freedom: int) -> float:
    """The 97.5 % point of Student's t: what a 95 % interval multiplies a standard error of `freedom` degrees of freedom by."""
    return float(stdtrit(freedom, 0.975))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t: (mean, low, high). Raises ValueError for fewer than two values."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval of a mean needs at least 2 values, got {n}")
    mean = math.fsum(values) / n
    half = student95(n - 1) * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half
