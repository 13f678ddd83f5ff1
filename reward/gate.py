"""Is a reward model good enough to optimise against? Its figures against thresholds, decided by their intervals.

A figure passes when its whole interval is on the right side of the threshold, fails when the whole of it is on the wrong side, and
warns in between. What was not measured, or has no interval, warns by its name: silence is no evidence. docs/reward-model.md.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Level = Literal["pass", "warn", "fail"]
Metrics = Mapping[str, Mapping[str, Any]]  # as manifests hold them: {name: {"value", "n", "ci95"}}
LEVELS: tuple[Level, ...] = ("pass", "warn", "fail")
BASELINES = ("length", "features", "tfidf")  # that every reward model must have been measured against


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The thresholds. Those without a source are this project's choice: set them to what the task needs.

    `min_fresh_accuracy`: pairs of the policy's own first samples, judged by a program that knows the answer. PPO optimises where the
    model errs: at .85 one comparison in seven is wrong. `min_heldout_accuracy`: held-out pairs of the annotators, who err themselves.
    People agree with one another on 73 % of pairs, and reward models order 70 % of the pairs of people they have not learned from right
    (Ouyang et al. 2022, sections 3.4 and 4.1), so not much above chance is asked. `max_ece`: after a temperature was fitted (Guo et al.
    2017). `min_gain`: over every baseline. `min_accuracy_by_length`: where the better response is the shorter one, and the longer one; a
    model that goes by length is below chance at one of them. `max_length_correlation` (of either sign; Singhal et al. 2023) and
    `max_flip_rate` (Wu et al. 2025) only warn: good responses may be the longer ones, and a task may have rules that a rewrite breaks.
    """

    min_fresh_accuracy: float = 0.85
    min_heldout_accuracy: float = 0.6
    max_ece: float = 0.05
    min_gain: float = 0.0
    min_accuracy_by_length: float = 0.5
    max_length_correlation: float = 0.5
    max_flip_rate: float = 0.1


class Reason(NamedTuple):
    """One figure and what it says. `value`, `low`, `high` are None where they were not measured."""

    name: str
    level: Level
    value: float | None
    n: int | None
    low: float | None
    high: float | None
    asked: str
    sentence: str


class Verdict(NamedTuple):
    """The worst level among the reasons, and all of them."""

    level: Level
    reasons: list[Reason]

    def as_note(self) -> dict[str, Any]:
        """As JSON, for a manifest's notes."""
        return {"verdict": self.level, "reasons": [reason._asdict() for reason in self.reasons]}

    def rows(self) -> list[list[str]]:
        """Cells of a table under `HEADER`."""
        def cell(value: float | None, style: str) -> str:
            return "-" if value is None else format(value, style)

        return [[r.name, cell(r.value, ".3f"), f"[{cell(r.low, '.3f')}, {cell(r.high, '.3f')}]" if r.low is not None else "-",
                 cell(r.n, ","), r.asked, r.level] for r in self.reasons]

    def why(self, level: Level) -> str:
        """The sentences of one level, in one line."""
        return "; ".join(r.sentence for r in self.reasons if r.level == level)


HEADER = ["figure", "value", "95 %", "n", "asked", "verdict"]


def judge(metrics: Metrics, gate: Gate = Gate()) -> Verdict:
    """A verdict on a reward model's metrics, a reason for every figure that is asked for.

    `fresh_ece_fitted` is read, else `fresh_ece`, else the same of held-out pairs. Besides the baselines that are always asked for,
    every other `gain_over_*` there is counts.
    """
    calibrated = next((name for name in ("fresh_ece_fitted", "fresh_ece", "heldout_ece_fitted", "heldout_ece") if name in metrics),
                      "fresh_ece_fitted")
    gains = [f"gain_over_{name}" for name in BASELINES]
    gains += sorted(name for name in metrics if name.startswith("gain_over_") and name not in gains)
    flips = sorted(name for name in metrics if name.startswith("flip_rate_")) or ["flip_rate_boilerplate"]
    reasons = [
        at_least("fresh_accuracy", metrics, gate.min_fresh_accuracy), at_least("heldout_accuracy", metrics, gate.min_heldout_accuracy),
        at_most(calibrated, metrics, gate.max_ece), *(at_least(name, metrics, gate.min_gain) for name in gains),
        *(at_least(f"accuracy_{kind}_better", metrics, gate.min_accuracy_by_length) for kind in ("shorter", "longer")),
        softened(at_most("length_correlation", metrics, gate.max_length_correlation, either_sign=True)),
        *(softened(at_most(name, metrics, gate.max_flip_rate)) for name in flips)]
    return Verdict(max((r.level for r in reasons), key=LEVELS.index), reasons)


def at_least(name: str, metrics: Metrics, threshold: float) -> Reason:
    return compared(name, metrics, f">= {threshold:g}", lambda low, high: (low >= threshold, high < threshold))


def at_most(name: str, metrics: Metrics, threshold: float, *, either_sign: bool = False) -> Reason:
    asked = f"within +-{threshold:g}" if either_sign else f"<= {threshold:g}"
    floor = -threshold if either_sign else float("-inf")
    return compared(name, metrics, asked, lambda low, high: (floor <= low and high <= threshold, low > threshold or high < floor))


def compared(name: str, metrics: Metrics, asked: str, decide: Any) -> Reason:
    """`decide(low, high)` says whether the whole interval is on the right side, and whether it is on the wrong one."""
    figure = metrics.get(name)
    if figure is None:
        return Reason(name, "warn", None, None, None, None, asked, f"{name} was not measured ({asked} is asked)")
    value, n, interval = figure["value"], figure.get("n"), figure.get("ci95")
    if interval is None:
        return Reason(name, "warn", value, n, None, None, asked, f"{name} is {value:.3f} without an interval ({asked} is asked)")
    low, high = interval
    right, wrong = decide(low, high)
    level: Level = "pass" if right else "fail" if wrong else "warn"
    sentence = (f"{name} is {value:.3f} [{low:.3f}, {high:.3f}]{f', n {n:,}' if n is not None else ''}: "
                f"{'' if right else 'not ' if wrong else 'not surely '}{asked}")
    return Reason(name, level, value, n, low, high, asked, sentence)


def softened(reason: Reason) -> Reason:
    """A reason that warns at most."""
    return reason._replace(level="warn") if reason.level == "fail" else reason
