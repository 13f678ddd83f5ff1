"""Votes over sampled answers and the rule for stopping early: pure functions of counts.

Self-consistency (Wang et al. 2023, section 2) takes the most frequent answer. What does not parse abstains: it is counted,
but it never wins a vote. A tie goes to the answer that was seen first, and is counted as a tie.
"""
from collections.abc import Iterable
from dataclasses import dataclass

from prompts.answers import normalize


@dataclass(frozen=True, kw_only=True)
class Vote:
    """`answer` is the winner as it was first written, None when every sample abstained. `counts` is in order of first sight."""

    answer: str | None
    counts: dict[str, int]
    abstained: int
    tie: bool


def count(answers: Iterable[str | None]) -> tuple[dict[str, int], dict[str, str], int]:
    """Votes by normal form in order of first sight, how each was first written, and how many abstained."""
    counts: dict[str, int] = {}
    written: dict[str, str] = {}
    abstained = 0
    for answer in answers:
        form = normalize(answer) if answer is not None else ""
        if not form:
            abstained += 1
            continue
        counts[form] = counts.get(form, 0) + 1
        written.setdefault(form, answer or "")
    return counts, written, abstained


def majority(answers: Iterable[str | None]) -> Vote:
    """The plurality winner of answers in drawing order."""
    counts, written, abstained = count(answers)
    if not counts:
        return Vote(answer=None, counts={}, abstained=abstained, tie=False)
    most = max(counts.values())
    winners = [form for form, votes in counts.items() if votes == most]
    return Vote(answer=written[winners[0]], counts=counts, abstained=abstained, tie=len(winners) > 1)


def settled(counts: dict[str, int], remaining: int) -> bool:
    """Whether `remaining` more samples cannot change the winner, whatever they answer.

    Stopping on this rule gives the answer of the full vote exactly, only cheaper. The leader must stay strictly ahead, because
    a challenger who draws level may have been seen first.
    """
    votes = [*sorted(counts.values(), reverse=True), 0, 0]
    return remaining == 0 or votes[0] - votes[1] > remaining
