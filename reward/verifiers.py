"""The programmatic judges: whether an answer is right, and the gold score, by which simulated annotators rank (reward/annotators.py)."""
import ast
import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from prompts.answers import equal, extract, normalize
from prompts.critique import split_steps
from reward import puzzles

STEP_WEIGHT, FAULT_WEIGHT = 0.5, 0.1
ANSWER_SENTENCE = re.compile(r"The answer is\s+(\S.*?)\.(?=\s|$)")


class GoldScore(NamedTuple):
    """`score` = correct + .5 x steps_right - .1 x len(faults); `steps_right` is a share; `faults` are named in words."""

    score: float
    correct: bool
    steps_right: float
    faults: tuple[str, ...]


def share_of_steps(steps: Sequence[str], solution: Sequence[str]) -> float:
    """Share of the solution's steps that `steps` has right, in their places, before the first wrong one."""
    right = 0
    for step, wanted in zip(steps, solution, strict=False):
        if step != wanted:
            break
        right += 1
    return right / len(solution) if solution else 0.0


def right(row: Mapping[str, Any], answer: str | None) -> bool:
    """Whether an answer to a problem row is right; no answer is not. The one place that says so.

    A row with a "verifier" is judged by that program (game24: by `makes` on its "numbers"; reasoning_gym: by its own scorer), one with a
    "tolerance" by how far the number is off, any other by equality with its "answer". Raises ValueError for an unknown verifier.
    """
    if answer is None:
        return False
    verifier = row.get("verifier")
    if verifier == "game24":
        return makes(answer, row["numbers"], 24)
    if verifier == "reasoning_gym":
        return puzzles.right(row, answer)
    if verifier is not None:
        raise ValueError(f"problem {row['id']}: unknown verifier {verifier!r}: expected game24 or reasoning_gym")
    if "tolerance" in row:
        try:
            if abs(Fraction(normalize(answer, "number")) - Fraction(row["answer"])) <= row["tolerance"]:
                return True
        except ValueError:  # not a number
            return False
    return equal(answer, row["answer"], row.get("answer_type"))


_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_LONGEST_EXPRESSION = 200  # characters: four numbers, three signs and brackets need far less


def makes(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether an expression of + - * / and brackets uses each of the numbers exactly once and equals the target, in exact fractions.

    `= target` may follow. A sign before a number is not one of the four operations, so "-1 + 25" does not use a 1. Nothing is evaluated
    but these; a text that is anything else is wrong.
    """
    left, equals, stated = expression.strip().rstrip(".").translate(str.maketrans("×÷−·", "*/-*")).partition("=")
    if len(left) > _LONGEST_EXPRESSION or (equals and stated.strip() != str(target)):
        return False
    used: list[int] = []

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used.append(node.value)
            return Fraction(node.value)
        raise ValueError("neither a whole number nor one of the four operations")

    try:
        made = value(ast.parse(left.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return made == target and sorted(used) == sorted(numbers)


def gold_score(problem: Mapping[str, Any], response: str, *, finished: bool) -> GoldScore:
    """Judge a response: answer right (1) + .5 x share of steps right - .1 per format fault.

    `problem` needs what `right` needs, and `solutions` (lists of steps; possibly none, and then no step counts). `response` is the
    text without special tokens; `finished` says that the model ended its turn itself. Steps are the sentences before
    "The answer is"; of several accepted solutions the one that agrees longest counts.
    """
    stated = ANSWER_SENTENCE.search(response)
    steps = split_steps(response[:stated.start()] if stated else response.partition("The answer is")[0])
    solutions = [split_steps(" ".join(solution)) for solution in problem["solutions"]]
    answer = extract(response, problem.get("answer_type"))
    correct = right(problem, answer)
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
