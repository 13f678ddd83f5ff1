"""Gold score against proxy score as a policy leaves its start: best-of-n, the curves of Gao et al. 2023, and their peak.

The proxy is what is optimised (a reward model), the gold what is meant (a judge). Over the distance d = sqrt(KL to the start) the
gold score follows

    R_bon(d) = d (a - b d)       best-of-n
    R_rl(d)  = d (a - b log d)   reinforcement learning

(Gao, Schulman & Hilton 2023, "Scaling Laws for Reward Model Overoptimization", section 3.1; they fit gold scores relative to the
start's, natural logarithm). The start's score is fitted here as well: the first batch is as noisy as any other.

Letters: P prompts, N samples a prompt, K points of a curve. KL is in nats a response, scores in their own units.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Form = Literal["bon", "rl"]
DRAWS = 1000
Place = Literal["before the peak", "at the peak", "beyond the peak", "no peak within reach"]


class BestOfN(NamedTuple):
    """Expected scores of the best of n samples by proxy, a row a prompt: `proxy` and `gold` (P, N), `kl` (N,) for n = 1..N."""

    kl: np.ndarray
    proxy: np.ndarray
    gold: np.ndarray


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n from the policy sampled, log n - (n - 1) / n nats (Stiennon et al. 2020, appendix G.3).

    An upper bound, exact where no two samples are alike (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(proxy: Sequence[Sequence[float]], gold: Sequence[Sequence[float]]) -> BestOfN:
    """Unbiased estimates for every n up to N from N samples of each prompt, given both scores (P, N).

    Sorted by proxy, the i-th sample (from 1, the worst) is the best of a random n of N in C(i - 1, n - 1) / C(N, n) of the cases
    (Nakano et al. 2021, appendix I). Samples of equal proxy share their gold: which of them is taken is chance. Raises ValueError
    for scores of unlike shapes.
    """
    p, g = np.asarray(proxy, dtype=float), np.asarray(gold, dtype=float)
    if p.ndim != 2 or p.shape != g.shape or not p.size:
        raise ValueError(f"got proxy scores {p.shape} and gold scores {g.shape}: give both for the same samples, as many a prompt")
    count = p.shape[1]
    weights = np.array([[math.comb(i - 1, n - 1) / math.comb(count, n) for i in range(1, count + 1)] for n in range(1, count + 1)])
    order = np.argsort(p, axis=1, kind="stable")
    ranked, meant = np.take_along_axis(p, order, axis=1), np.take_along_axis(g, order, axis=1)
    for row, values in zip(ranked, meant, strict=True):
        for value in np.unique(row):
            values[row == value] = values[row == value].mean()
    return BestOfN(np.array([best_of_n_kl(n) for n in range(1, count + 1)]), ranked @ weights.T, meant @ weights.T)


class Curve(NamedTuple):
    """A fitted curve: `start` + d (a - b d) or `start` + d (a - b log d).

    `peak` is the distance sqrt(KL) of its maximum, inf where it rises for ever. `intervals` are 95 % percentile intervals of
    `start`, `a`, `b`, `peak` over `n` things drawn anew (points of a curve, or prompts).
    """

    form: Form
    start: float
    a: float
    b: float
    peak: float
    n: int
    intervals: dict[str, tuple[float, float]]

    def at(self, distance: float) -> float:
        """The score at a distance sqrt(KL)."""
        return self.start + float(self.a * distance - self.b * _bend(np.array([distance]), self.form)[0])

    def as_note(self) -> dict[str, Any]:
        """As JSON; what is infinite is null."""
        def finite(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {**self._asdict(), "peak": finite(self.peak), "peak_kl": finite(self.peak**2),
                "intervals": {name: [finite(end) for end in ends] for name, ends in self.intervals.items()}}


def traced(note: Mapping[str, Any], kl: Sequence[float], points: int = 40) -> tuple[list[float], list[float]]:
    """A curve, as `as_note` gives it, over the distances sqrt(KL) that were measured: (distances, scores), for a figure."""
    d = np.linspace(0, math.sqrt(max(0.0, *kl)), points)
    return d.tolist(), (note["start"] + note["a"] * d - note["b"] * _bend(d, note["form"])).tolist()


def _bend(d: np.ndarray, form: Form) -> np.ndarray:
    """What b multiplies: d^2, or d log d, which is 0 at 0."""
    return d * d if form == "bon" else np.where(d > 0, d * np.log(np.where(d > 0, d, 1.0)), 0.0)


def peak_distance(a: float, b: float, form: Form) -> float:
    """Where the curve is highest: a / 2b of best-of-n, exp(a / b - 1) of RL; inf for b <= 0, and 0 where best-of-n only falls.

    Of nearly straight curves it is held below 1e150, so that its square, a KL, is still a number.
    """
    if b <= 0:
        return math.inf
    return min(1e150, max(0.0, a / (2 * b))) if form == "bon" else math.exp(min(a / b - 1, 345.0))


def _solve(d: np.ndarray, scores: np.ndarray, form: Form) -> tuple[float, float, float]:
    """Least squares: (start, a, b)."""
    columns = np.stack([np.ones_like(d), d, -_bend(d, form)], axis=1)
    start, a, b = np.linalg.lstsq(columns, scores, rcond=None)[0]
    return float(start), float(a), float(b)


def _curve(form: Form, best: tuple[float, float, float], drawn: Sequence[tuple[float, float, float]], n: int) -> Curve:
    of = {name: [fit[i] for fit in drawn] for i, name in enumerate(("start", "a", "b"))}
    of["peak"] = [peak_distance(a, b, form) for _, a, b in drawn]
    # Order statistics, because a percentile between a number and infinity is no number.
    ends = {name: (sorted(values)[int(0.025 * len(values))], sorted(values)[math.ceil(0.975 * len(values)) - 1])
            for name, values in of.items()}
    return Curve(form, *best, peak_distance(best[1], best[2], form), n, ends)


def fit_points(kl: Sequence[float], scores: Sequence[float], form: Form = "rl", *, seed: int = 0, draws: int = DRAWS) -> Curve:
    """A curve through K points of a run, intervals by a bootstrap over them.

    Estimates of KL below 0, which are noise about 0, count as 0. The points share one training: the intervals are those of
    sampling, and another seed of the run may lie outside them. Raises ValueError for fewer than four different distances.
    """
    d, y = np.sqrt(np.maximum(np.asarray(kl, dtype=float), 0.0)), np.asarray(scores, dtype=float)
    if len(set(d.tolist())) < 4:
        raise ValueError(f"got {len(set(d.tolist()))} different distances: a curve with three constants needs 4 or more")
    rng = np.random.default_rng(seed)
    drawn: list[tuple[float, float, float]] = []
    while len(drawn) < draws:
        chosen = rng.integers(len(d), size=len(d))
        if len(set(d[chosen].tolist())) >= 3:
            drawn.append(_solve(d[chosen], y[chosen], form))
    return _curve(form, _solve(d, y, form), drawn, len(d))


def fit_prompts(kl: Sequence[float], scores: Sequence[Sequence[float]], form: Form = "bon", *, seed: int = 0, draws: int = DRAWS) -> Curve:
    """A curve through the means over prompts of `scores` (P, K) at `kl` (K,), intervals by a bootstrap over prompts.

    The points of best-of-n come from the same samples and are no K independent ones. Raises ValueError as `fit_points` does.
    """
    d, y = np.sqrt(np.asarray(kl, dtype=float)), np.asarray(scores, dtype=float)
    if len(set(d.tolist())) < 4:
        raise ValueError(f"got {len(set(d.tolist()))} different distances: a curve with three constants needs 4 or more (n up to 4)")
    rng = np.random.default_rng(seed)
    drawn = [_solve(d, y[rng.integers(len(y), size=len(y))].mean(axis=0), form) for _ in range(draws)]
    return _curve(form, _solve(d, y.mean(axis=0), form), drawn, len(y))


def standing(curve: Curve, kl: float) -> tuple[Place, str]:
    """Where a run at this KL (nats) stands relative to the gold curve's peak, by the peak's interval, and a sentence that says so."""
    here, (low, high) = math.sqrt(max(kl, 0.0)), curve.intervals["peak"]
    if low > 2 * max(here, 1e-12):  # far outside what was measured, where the form alone speaks
        where = "no peak is in sight" if low > 1e3 else (
            f"a peak, if any, lies beyond KL {low**2:.1f}, more than twice the distance travelled")
        return "no peak within reach", f"at KL {kl:.2f} the gold score has not bent: {where}"
    place: Place = "before the peak" if here < low else "beyond the peak" if here > high else "at the peak"
    ends = f"[{low**2:.2f}, {f'{high**2:.2f}' if math.isfinite(high) and high < 1e6 else 'no end'}]"
    peak = f"{curve.peak**2:.2f}" if math.isfinite(curve.peak) and curve.peak < 1e6 else "no end"
    lost = max(0.0, curve.at(curve.peak) - curve.at(here)) if curve.peak < here else 0.0
    return place, (f"KL {kl:.2f} is {place} of the fitted gold score, which lies at KL {peak} {ends}"
                   + (f"; since then {lost:.3f} of gold score was lost" if place == "beyond the peak" else ""))
