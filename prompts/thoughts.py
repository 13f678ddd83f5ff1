"""How a task is put to a model for tree search: what a thought is, and the prompts that ask for thoughts and judge states.

Worked steps (any task with worked answers): a thought is one step of the solution, as the model itself writes it. Game of 24: a thought
is one operation on two of the numbers that are left (Yao et al. 2023, section 4.1); the prompts are this project's own.
"""
import re
from collections.abc import Sequence
from fractions import Fraction

from prompts.answers import extract
from prompts.search import Puzzle, Thoughts
from prompts.templates import WORKED, Prompt, Row, Style, begun, render

# One number of the game as it stands in a text: whole, decimal or a fraction.
_FIGURE = r"-?\d{1,9}(?:\.\d{1,9}|/\d{1,9})?"
_STEP = re.compile(rf"({_FIGURE})\s*([-+*/])\s*({_FIGURE})\s*=\s*({_FIGURE})(?![\d/.]*\d)")
RATINGS = {"sure": 20.0, "likely": 1.0, "impossible": 0.001}  # values of the paper's three verdicts
PROPOSE_EXAMPLE = ("Numbers: 2 3 5 12\nNext steps:\n12 / 2 = 6 (left: 3 5 6)\n3 + 5 = 8 (left: 2 8 12)\n12 - 5 = 7 (left: 2 3 7)\n"
                   "2 * 3 = 6 (left: 5 6 12)\n")
VALUE_EXAMPLES = (("4 6", "4 * 6 = 24", "sure"), ("2 3", "2 + 3 = 5, 2 * 3 = 6, far below 24", "impossible"),
                  ("3 7 8", "3 * 7 = 21, and 21 is near 24", "likely"))


def worked_steps(problem: Row, style: Style, examples: Sequence[Row] = (), *, step_tokens: int, end: str = ".") -> Puzzle:
    """Steps of a worked answer as thoughts, to be sampled one at a time: the model goes on with the solution begun so far.

    A step ends at `end`, a token of its own in what the model writes; it is whole when the model has stated its answer.
    A model that can be asked in words judges states by value (a mark from 1 to 10) or by vote; one that cannot needs the reward model.
    """
    asked = render(problem["question"], style, WORKED, examples)

    def read(state: Thoughts, text: str) -> list[str]:
        step = " ".join(text.split())
        return [step + end] if step else []

    def solution(state: Thoughts) -> str:
        return " ".join(state)

    def value(state: Thoughts) -> Prompt:
        return _say(style, f"{problem['question']}\nThe solution so far: {solution(state)}\nHow likely is it that every step is right and "
                           "leads to the answer? Give a mark from 1 (wrong) to 10 (right).", "Mark:")

    def choose(states: Sequence[Thoughts]) -> Prompt:
        shown = "\n".join(f"{i}. {solution(state)}" for i, state in enumerate(states, start=1))
        return _say(style, f"{problem['question']}\nPartial solutions:\n{shown}\nWhich of them is the best? Give its number.", "Number:")

    def rate(text: str) -> float:
        figure = re.search(r"(?<!\d)(?:10|[0-9])(?!\d)", text)
        return float(figure[0]) if figure else 0.0

    def answer(state: Thoughts) -> str | None:
        return extract(solution(state), problem.get("answer_type"))

    return Puzzle(extend=lambda state: begun(asked, solution(state)), read=read, finished=lambda state: answer(state) is not None,
                  answer=answer, text=solution, max_tokens=step_tokens, stop=(end, *style.stop), value=value, rate=rate, choose=choose)


def game_of_24(problem: Row, style: Style, *, step_tokens: int) -> Puzzle:
    """Game of 24: operations on the numbers that are left as thoughts, three to a solution.

    The row's "numbers" are the four. What breaks the rules (a number that is not there, a wrong result) is left out as it is read; the
    answer is the expression that the steps make. Raises ValueError for a problem without four numbers.
    """
    given = [str(number) for number in problem.get("numbers", [])]
    if len(given) != 4:
        raise ValueError(f"problem {problem['id']} is no game of 24: it has {len(given)} \"numbers\", not 4")

    def extend(state: Thoughts) -> Prompt:
        return _say(style, f"Combine two of the numbers with +, -, * or / so that 24 can be reached. One step a line, as here.\n"
                           f"{PROPOSE_EXAMPLE}Numbers: {_shown(left(state))}", "Next steps:\n")

    def value(state: Thoughts) -> Prompt:
        shown = "\n".join(f"Numbers: {numbers}\n{why}\n{verdict}" for numbers, why, verdict in VALUE_EXAMPLES)
        return _say(style, f"Can the numbers make 24? Say sure, likely or impossible, as here.\n{shown}\n"
                           f"Numbers: {_shown(left(state))}", "")

    def left(state: Thoughts) -> list[tuple[Fraction, str]]:
        return _play(given, state)

    def read(state: Thoughts, text: str) -> list[str]:
        steps = dict.fromkeys(f"{a} {sign} {b} = {c}" for a, sign, b, c in _STEP.findall(text))
        return [step for step in steps if _allowed(given, (*state, step))]

    def answer(state: Thoughts) -> str | None:
        numbers = left(state)
        return _bare(numbers[0][1]) if len(numbers) == 1 else None

    def rate(text: str) -> float:
        verdicts = re.findall(r"sure|likely|impossible", text.lower())
        return RATINGS[verdicts[-1]] if verdicts else 0.0

    return Puzzle(extend=extend, read=read, finished=lambda state: len(state) == 3, answer=answer, text=" ; ".join,
                  max_tokens=step_tokens, stop=style.stop, value=value, rate=rate)


def _say(style: Style, text: str, opening: str) -> Prompt:
    if not style.chat:
        return f"{text}\n{opening}".rstrip("\n") + ("\n" if opening.endswith("\n") or not opening else "")
    system = ({"role": "system", "content": style.system},) if style.system else ()
    return (*system, {"role": "user", "content": f"{text}\n{opening}".strip()})


def _allowed(given: Sequence[str], state: Thoughts) -> bool:
    try:
        _play(given, state)
    except (ValueError, ZeroDivisionError):
        return False
    return True


def _play(given: Sequence[str], state: Thoughts) -> list[tuple[Fraction, str]]:
    """(value, expression) of the numbers left after the steps. Raises ValueError for a step that breaks the rules."""
    numbers = [(Fraction(number), number) for number in given]
    for step in state:
        a, sign, b, c = _STEP.fullmatch(step).groups()  # type: ignore[union-attr]
        used = []
        for wanted in (Fraction(a), Fraction(b)):
            used.append(numbers.pop([value for value, _ in numbers].index(wanted)))
        (x, first), (y, second) = used
        result = x + y if sign == "+" else x - y if sign == "-" else x * y if sign == "*" else x / y
        if result != Fraction(c):
            raise ValueError(f"{step} is wrong")
        numbers.append((result, f"({first} {sign} {second})"))
    return numbers


def _shown(numbers: Sequence[tuple[Fraction, str]]) -> str:
    return " ".join(str(value) for value, _ in sorted(numbers))


def _bare(expression: str) -> str:
    return expression[1:-1] if expression.startswith("(") and expression.endswith(")") else expression
