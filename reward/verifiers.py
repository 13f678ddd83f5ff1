"""The programmatic judge of the embedded problems: the gold score, by which simulated annotators rank (reward/annotators.py)."""
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prompts.answers import equal, extract

STEP_WEIGHT, FAULT_WEIGHT = 0.5, 0.1
ANSWER_SENTENCE = re.compile(r"The answer is\s+(\S.*?)\.(?=\s|$)")
SENTENCE_END = re.compile(r"(?<=\.)\s+")


class GoldScore(NamedTuple):
    """`score` = correct + .5 x steps_right - .1 x len(faults); `steps_right` is a share; `faults` are named in words."""

    score: float
    correct: bool
    steps_right: float
    faults: tuple[str, ...]


def split_steps(text: str) -> list[str]:
    """Sentences of a worked solution, white space normalised. A period inside a number does not end a sentence."""
    return [" ".join(s.split()) for s in SENTENCE_END.split(text.strip()) if s.strip()]


def share_of_steps(steps: Sequence[str], solution: Sequence[str]) -> float:
    """Share of the solution's steps that `steps` has right, in their places, before the first wrong one."""
    right = 0
    for step, wanted in zip(steps, solution, strict=False):
        if step != wanted:
            break
        right += 1
    return right / len(solution) if solution else 0.0


def gold_score(problem: Mapping[str, Any], response: str, *, finished: bool) -> GoldScore:
    """Judge a response: answer right (1) + .5 x share of steps right - .1 per format fault.

    `problem` needs `answer` and `solutions` (lists of steps; possibly none, and then no step counts). `response` is the
    text without special tokens; `finished` says that the model ended its turn itself. Steps are the sentences before
    "The answer is"; of several accepted solutions the one that agrees longest counts.
    """
    stated = ANSWER_SENTENCE.search(response)
    steps = split_steps(response[:stated.start()] if stated else response.partition("The answer is")[0])
    solutions = [split_steps(" ".join(solution)) for solution in problem["solutions"]]
    answer = extract(response)
    correct = answer is not None and equal(answer, problem["answer"])
    steps_right = max((share_of_steps(steps, solution) for solution in solutions), default=0.0)
    faults = []
    if not stated:
        faults.append("no answer sentence")
    elif response[stated.end():].strip():
        faults.append("text after the answer")
    if not finished:
        faults.append("not finished")
    if solutions and len(steps) > max(map(len, solutions)):
        faults.append("too many steps")
    return GoldScore(correct + STEP_WEIGHT * steps_right - FAULT_WEIGHT * len(faults), correct, steps_right, tuple(faults))


def dense_ranks(scores: Sequence[float]) -> list[int]:
    """Competition ranks, highest score first: 1 is best, equal scores tie ([3, 5, 5] -> [3, 1, 1]).

    Scores closer than 1e-9 are equal: sums of the same shares in another order must tie.
    """
    return [1 + sum(other > score + 1e-9 for other in scores) for score in scores]
