"""Intervals for the figures this project states: every figure has an n and an interval."""
import math
from collections.abc import Sequence

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


def share_interval(shares: Sequence[float]) -> tuple[float, float, float]:
    """Mean of shares, such as each prompt's share of right answers, and its 95 % interval inside [0, 1]: (mean, low, high).

    Wilson's, at the number of independent trials whose mean would vary as much; with no spread, at one trial a share.
    """
    n, mean = len(shares), math.fsum(shares) / len(shares)
    variance = math.fsum((s - mean) ** 2 for s in shares) / max(1, n - 1) / n
    trials = mean * (1 - mean) / variance if variance > 0 else n
    return mean, *wilson(mean * trials, trials)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t: (mean, low, high). Raises ValueError for fewer than two values."""
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval of a mean needs at least 2 values, got {n}")
    mean = math.fsum(values) / n
    half = float(stdtrit(n - 1, 0.975)) * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half
