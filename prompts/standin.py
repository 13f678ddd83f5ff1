"""Until the typed answers and the stopping rules of prompts/answers.py and prompts/voting.py are merged: their signatures, nothing more."""
from collections.abc import Callable, Iterable, Sequence

from scipy.special import betainc

from prompts import answers as plain
from prompts.voting import Vote, count
from prompts.voting import majority as unweighted


def extract(text: str, type: str | None = None) -> str | None:
    return plain.extract(text)


def normalize(text: str, type: str | None = None) -> str:
    return plain.normalize(text)


def majority(answers: Iterable[str | None], type: str | None = None, weights: Sequence[float] | None = None) -> Vote:
    answers = list(answers)
    if weights is None:
        return unweighted(answers)
    _, written, abstained = count(answers)
    totals: dict[str, float] = dict.fromkeys(written, 0.0)
    for answer, weight in zip(answers, weights, strict=True):
        if answer is not None and plain.normalize(answer):
            totals[plain.normalize(answer)] += weight
    if not totals:
        return Vote(answer=None, counts={}, abstained=abstained, tie=False)
    winners = [form for form, total in totals.items() if total == max(totals.values())]
    return Vote(answer=written[winners[0]], counts=totals, abstained=abstained, tie=len(winners) > 1)  # type: ignore[arg-type]


def stopper(spec: str) -> Callable[[Sequence[str | None]], bool]:
    kind, _, value = spec.partition(":")
    if kind == "none":
        return lambda answers: False
    if kind == "window":
        return lambda answers: len(answers) >= int(value) and answers[-1] is not None and len(set(answers[-int(value):])) == 1
    if kind != "beta":
        raise ValueError(f"unknown stopping rule {spec!r}: give beta:0.95, window:5, binomial:0.05 or none")

    def stop(answers: Sequence[str | None]) -> bool:
        votes = [*sorted(count(answers)[0].values(), reverse=True), 0, 0]
        return 1 - float(betainc(votes[0] + 1, votes[1] + 1, 0.5)) >= float(value)
    return stop
