"""Votes over sampled answers and the rules for stopping early: pure functions of counts.

Self-consistency (Wang et al. 2023, section 2) takes the most frequent answer. What does not parse abstains: it is counted,
but it never wins a vote. A tie goes to the answer that was seen first, and is counted as a tie.
"""
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from scipy.special import betainc

from prompts.answers import normalize

Stopper = Callable[[Sequence[str | None]], bool]


@dataclass(frozen=True, kw_only=True)
class Vote:
    """`answer` is the winner as it was first written, None when every sample abstained. `counts` is in order of first sight."""

    answer: str | None
    counts: dict[str, int]
    abstained: int
    tie: bool


def count(answers: Iterable[str | None], type: str | None = None) -> tuple[dict[str, int], dict[str, str], int]:
    """Votes by normal form in order of first sight, how each was first written, and how many abstained."""
    counts: dict[str, int] = {}
    written: dict[str, str] = {}
    abstained = 0
    for answer in answers:
        form = normalize(answer, type) if answer is not None else ""
        if not form:
            abstained += 1
            continue
        counts[form] = counts.get(form, 0) + 1
        written.setdefault(form, answer or "")
    return counts, written, abstained


def majority(answers: Iterable[str | None], type: str | None = None, weights: Sequence[float] | None = None) -> Vote:
    """The plurality winner of answers in drawing order; with `weights`, one a sample, the answer with the largest sum of them.

    Weights are probabilities or other figures that are not negative (a reward through a sigmoid, not the raw reward: more votes for
    a bad answer must not make it worse). Sums that differ by rounding alone tie. Raises ValueError for weights that are negative,
    not finite or not one a sample.
    """
    answers = list(answers)
    counts, written, abstained = count(answers, type)
    if not counts:
        return Vote(answer=None, counts={}, abstained=abstained, tie=False)
    totals = dict(counts) if weights is None else _totals(answers, type, weights)
    most = max(totals.values())
    winners = [form for form in counts if math.isclose(totals[form], most, rel_tol=1e-9)]
    return Vote(answer=written[winners[0]], counts=counts, abstained=abstained, tie=len(winners) > 1)


def _totals(answers: Sequence[str | None], type: str | None, weights: Sequence[float]) -> dict[str, float]:
    if len(weights) != len(answers):
        raise ValueError(f"got {len(weights)} weights for {len(answers)} answers: give one a sample")
    if bad := [w for w in weights if not (math.isfinite(w) and w >= 0)]:
        raise ValueError(f"got the weight {bad[0]}: weights are finite and not negative; put raw rewards through a sigmoid or exp")
    parts: dict[str, list[float]] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None:
            parts.setdefault(normalize(answer, type), []).append(weight)
    return {form: math.fsum(each) for form, each in parts.items()}


def settled(counts: dict[str, int], remaining: int) -> bool:
    """Whether `remaining` more samples cannot change the winner, whatever they answer.

    Stopping on this rule gives the answer of the full vote exactly, only cheaper. The leader must stay strictly ahead, because
    a challenger who draws level may have been seen first.
    """
    votes = [*sorted(counts.values(), reverse=True), 0, 0]
    return remaining == 0 or votes[0] - votes[1] > remaining


def stopper(spec: str) -> Stopper:
    """The rule that `spec` names: from the answers so far, normal forms in drawing order (None: abstained), whether to stop sampling.

    beta:0.95 -- adaptive consistency (Aggarwal et al. 2023, section 3): stop when the posterior probability, under a uniform prior,
    that the leader is ahead of the runner-up is above the threshold: P(p > 1/2), p ~ Beta(leader + 1, runner-up + 1). Four alike do at
    0.95: 1 - .5^5 = .969.

    window:5 -- early-stopping self-consistency (Li et al. 2024): samples come in windows of this size that do not overlap, and the
    first in which all answer alike stops. One that abstains is no agreement.

    binomial:0.05 -- stop when an exact two-sided binomial test of leader against runner-up rejects "as likely as each other" at this
    level. The level is that of one look. This rule looks after every sample, and at whichever two are in front, so it stops on a
    lead that is chance more often than that: for two equally likely answers at 0.05 in 15 % of 40 samples, and surely in the end.

    none -- never. Raises ValueError for anything else.
    """
    name, _, given = spec.partition(":")
    try:
        if name == "beta" and 0.5 <= (threshold := float(given)) < 1:
            return lambda answers: probability_ahead(*_leaders(answers)) > threshold
        if name == "window" and (size := int(given)) >= 2:
            return lambda answers: bool(answers) and len(answers) % size == 0 and len({*answers[-size:]}) == 1 and answers[-1] is not None
        if name == "binomial" and 0 < (level := float(given)) < 1:
            return lambda answers: binomial_p(*_leaders(answers)) <= level * (1 + 1e-9)  # at the level itself, but for rounding
    except ValueError:
        pass
    if spec == "none":
        return lambda answers: False
    raise ValueError(f"unknown stopping rule {spec!r}: expected beta:0.95 (a probability from 0.5 to below 1), window:5 (at least 2), "
                     "binomial:0.05 (a level between 0 and 1) or none")


@functools.cache
def probability_ahead(first: int, second: int) -> float:
    """P(p > 1/2) for p ~ Beta(first + 1, second + 1): how sure `first` against `second` votes make us who is ahead."""
    return float(betainc(second + 1, first + 1, 0.5))


@functools.cache
def binomial_p(first: int, second: int) -> float:
    """Exact two-sided p of `first` against `second` votes under a fair coin (1 without votes)."""
    most, least = max(first, second), min(first, second)
    return min(1.0, 2 * float(betainc(most, least + 1, 0.5))) if most else 1.0  # P(X >= most) of `most + least` fair flips


def _leaders(answers: Sequence[str | None]) -> tuple[int, int]:
    counts = Counter(answers)
    del counts[None]
    votes = [*sorted(counts.values(), reverse=True), 0, 0]
    return votes[0], votes[1]
