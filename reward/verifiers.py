"""Programmatic judges of the embedded problems: the gold score, and the simulated annotator that ranks by it.

Both stand in for people on machines without people. Whatever is ranked here says so: `annotator` starts with
`simulated` and `simulated` is true in every record, so that no figure passes for human judgement.
"""
import random
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
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


def annotator_name(error_rate: float) -> str:
    return f"simulated: gold score, error rate {error_rate:g}"


def dense_ranks(scores: Sequence[float]) -> list[int]:
    """Competition ranks, highest score first: 1 is best, equal scores tie ([3, 5, 5] -> [3, 1, 1]).

    Scores closer than 1e-9 are equal: sums of the same shares in another order must tie.
    """
    return [1 + sum(other > score + 1e-9 for other in scores) for score in scores]


def simulated_ranks(gold: Sequence[float], *, error_rate: float, row_id: str, seed: int = 0) -> list[int]:
    """Ranks of K responses as a fallible judge gives them (simulated; 1 is best, equal numbers tie).

    The judge compares every pair. A pair of different gold is judged the wrong way round with probability `error_rate`,
    each pair on its own; equal gold is judged equal. The ranking orders the responses by pairs won, half a win for a tie
    (Copeland 1951), so without errors it is the order of the gold scores, and with errors neighbours swap more often than
    the best and the worst. The errors depend on the seed and the row's id alone, not on the order of rows.
    Raises ValueError unless 0 <= error_rate <= .5: beyond a half the judge would mean the opposite.
    """
    if not 0 <= error_rate <= 0.5:
        raise ValueError(f"error_rate {error_rate} is not between 0 and 0.5: 0.5 is already a judge who guesses")
    rng = random.Random(f"{seed}:{row_id}")
    wins = [0.0] * len(gold)
    for i, j in combinations(range(len(gold)), 2):
        wrong = rng.random() < error_rate  # drawn for ties too, so that one pair's gold does not move another's error
        if abs(gold[i] - gold[j]) <= 1e-9:
            wins[i] += 0.5
            wins[j] += 0.5
        else:
            wins[i if (gold[i] > gold[j]) != wrong else j] += 1
    return dense_ranks(wins)
