"""Worked chains of the curriculum with errors planted by program, in the format of BIG-Bench Mistake (Tyen et al. 2024), and reviews
that find the first wrong step. A chain's last step is its answer sentence.
"""
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reward.verifiers import share_of_steps
from stages.data.benchmarks import BENCHMARKS
from stages.data.curriculum import CUES, MAX_NUMBER, WORKED

KINDS = ("result", "copy", "skip")
TASKS = ("word_problems", "chained_variables")  # families whose steps compute one number from the one before
NUMBER = r"\d+"
_COMPUTED = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)\.$")  # how each of their steps ends, the first one aside
_ANSWER = re.compile(r"The answer is (\d+)\.")


def complete(solution: Sequence[str], answer: str) -> list[str]:
    return [*solution, f"The answer is {answer}."]


def closest(problem: Mapping[str, Any], steps: Sequence[str]) -> tuple[int, list[str]]:
    """How many steps agree with the accepted solution that agrees longest, and that solution with its answer sentence."""
    accepted = [complete(solution, problem["answer"]) for solution in problem["solutions"]]
    return max(((round(share_of_steps(steps, solution) * len(solution)), solution) for solution in accepted), key=lambda found: found[0])


def first_wrong(problem: Mapping[str, Any], steps: Sequence[str]) -> int | None:
    """Index of the first step, from 0, with which no accepted solution agrees any longer; None when one agrees with all."""
    right, _ = closest(problem, steps)
    return right if right < len(steps) else None


def record(problem: Mapping[str, Any], steps: Sequence[str]) -> dict[str, Any]:
    """A chain in the format of BIG-Bench Mistake, judged by the program. Raises ValueError for a chain without an answer sentence."""
    stated = _ANSWER.fullmatch(steps[-1]) if steps else None
    if not stated:
        raise ValueError(f"the chain ends with {steps[-1] if steps else 'nothing'!r}, not with an answer sentence")
    return {"input": problem["question"], "steps": list(steps), "answer": stated[1], "target": problem["answer"],
            "mistake_index": first_wrong(problem, steps)}


def planted(problem: Mapping[str, Any], rng: random.Random, kinds: Sequence[str] = KINDS) -> list[str]:
    """A solution's steps with one error, from which the later steps and the answer follow consistently.

    Kinds: `result`, a computation's result is wrong; `copy`, a number is taken from elsewhere in the question; `skip`, a step is left
    out. One that can be had is drawn, then its place, then the wrong number. No number leaves the range of the curriculum, so that none
    gives the error away. Raises ValueError for a family whose steps are not single computations, and where no error of these kinds fits.
    """
    solution = complete(rng.choice(problem["solutions"]), problem["answer"])
    if not all(_COMPUTED.search(step) for step in solution[1:-1]):
        raise ValueError(f"problem {problem['id']}: errors are planted in {' and '.join(TASKS)}, got {problem['task']}")
    given = sorted({int(n) for n in re.findall(NUMBER, problem["question"])})
    makers: dict[str, Callable[[int], list[list[str]]]] = {
        "result": lambda i: [_carried(solution, i, result=n) for n in range(MAX_NUMBER + 1)] if i else [],
        "copy": lambda i: [_carried(_copied(solution, i, n), i) for n in given],
        "skip": lambda i: [_carried([*solution[:i], *solution[i + 1:]], i)] if 0 < i < len(solution) - 2 else []}
    for kind in rng.sample(kinds, len(kinds)):
        for place in rng.sample(range(len(solution) - 1), len(solution) - 1):
            if fitting := [steps for steps in makers[kind](place) if _in_range(steps) and first_wrong(problem, steps) == place]:
                return rng.choice(fitting)
    raise ValueError(f"problem {problem['id']}: no error of {', '.join(kinds)} fits into {len(solution) - 1} steps")


def _copied(steps: Sequence[str], place: int, number: int) -> list[str]:
    """The number that a step takes from the question, after a sign or the start value, replaced by another."""
    pattern = r"(?<=[+-] )\d+" if place else NUMBER
    return [*steps[:place], re.sub(pattern, str(number), steps[place]), *steps[place + 1:]]


def _carried(steps: Sequence[str], place: int, result: int | None = None) -> list[str]:
    """The steps from `place` on computed anew from what stands before them, the step at `place` with the wrong `result` if one is given."""
    made, total = list(steps[:place]), int(re.findall(NUMBER, steps[max(0, place - 1)])[-1])
    for i, step in enumerate(steps[place:], start=place):
        if match := _COMPUTED.search(step):
            _, sign, change, _ = match.groups()
            after = result if i == place and result is not None else total + int(f"{sign}{change}")
            made.append(f"{step[:match.start()]}{total} {sign} {change} = {after}.")
            total = after
        elif _ANSWER.fullmatch(step):
            made.append(f"The answer is {total}.")
        else:
            made.append(step)  # the start
    return made


def _in_range(steps: Sequence[str]) -> bool:
    text = " ".join(steps)
    return not re.search(r"(?:=|is) -", text) and all(int(n) <= MAX_NUMBER for n in re.findall(NUMBER, text))


def chain(problem: Mapping[str, Any], rng: random.Random, kinds: Sequence[str] = KINDS, wrong: float = 0.5) -> list[str]:
    """A solution as it is, or in a share `wrong` of the cases with an error planted."""
    return planted(problem, rng, kinds) if rng.random() < wrong else complete(rng.choice(problem["solutions"]), problem["answer"])


def review(problem: Mapping[str, Any], steps: Sequence[str], style: str) -> str:
    """What a critic is to say of a chain: the bare index, or before it for each step what should stand there, the number that the chain
    has in its place, and whether they agree.

    It goes on after the first wrong step: as the chain's later steps follow from the wrong one, they differ too, so that a critic cannot
    come far by copying what it reads. Small models learn to say whether two numbers side by side agree, and not from afar (LOG.md).
    """
    right, solution = closest(problem, steps)
    wrong = right < len(steps)
    said = [f"{i} {wanted.removeprefix('The answer is ')} {(re.findall(NUMBER, step) or ['?'])[-1]} {'yes' if i < right else 'no'}."
            for i, (wanted, step) in enumerate(zip(solution, steps, strict=False))] if style == WORKED else []
    return " ".join([*said, f"The answer is {right if wrong else 'no mistake'}."])


def dialogue(problem: Mapping[str, Any], steps: Sequence[str], style: str) -> dict[str, str]:
    """A row to train a critic on: the question as `mistake` asks it, and the review."""
    question = BENCHMARKS["mistake"].read(record(problem, steps))["question"]
    return {"prompt": f"{question} {CUES[style]}", "completion": review(problem, steps, style)}

