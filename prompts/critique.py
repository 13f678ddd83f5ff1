"""Self-refine (Madaan et al. 2023): the model answers, says what is wrong with its answer, and answers again, until it finds no fault."""
from prompts.answers import extract
from prompts.records import Request, Result, Solution, Strategy
from prompts.strategies import NO_ROOM, about, greedy, ledgered
from prompts.templates import WORKED, Prompt, Row, Style, render

NO_FAULT = "no mistake"  # a review that says this (and not "there is no mistake except") ends the loop
REVIEW = ('Check the solution step by step. If every step is right, write "No mistake." and nothing else. '
          "Otherwise say which step is the first wrong one, and why.")
REFINE = "Write the solution again without that mistake."


def review_prompt(problem: Row, style: Style, solution: str) -> Prompt:
    """Asks what is wrong with a solution: a text, or a chat in which the solution was the assistant's turn."""
    asked = render(problem["question"], style, WORKED)
    if isinstance(asked, str):
        return f"{asked} {solution.strip()}\nQuestion: {REVIEW}\nAnswer:"
    return (*asked, {"role": "assistant", "content": solution.strip()}, {"role": "user", "content": REVIEW})


def refine_prompt(problem: Row, style: Style, solution: str, review: str) -> Prompt:
    """Asks for the solution again after a review of it."""
    cue = f"{REFINE} {style.cues[WORKED]}".strip()
    asked = review_prompt(problem, style, solution)
    if isinstance(asked, str):
        return f"{asked} {review.strip()}\nQuestion: {cue}\nAnswer:"
    return (*asked, {"role": "assistant", "content": review.strip()}, {"role": "user", "content": cue})


def finds_no_fault(review: str) -> bool:
    """Whether a review's first sentence says that there is no mistake."""
    first = review.strip().partition("\n")[0].casefold().lstrip(' "*')
    return first.startswith((NO_FAULT, f"there is {NO_FAULT}")) and " except" not in first and " but" not in first


@ledgered
def self_refine(problem: Row, style: Style, *, rounds: int = 3) -> Strategy:
    """The last answer that states one, after at most `rounds` reviews, greedily.

    It stops when a review finds no fault, when a refinement repeats the solution before it, or when a text no longer fits in the
    context. `samples` are the solutions in order, the answer the last that is stated. Raises ValueError for fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"self-refine needs at least one round, got {rounds}")
    type = problem.get("answer_type")
    solutions: list[Result] = yield [greedy(problem, style, WORKED)]
    for number in range(rounds):
        last = solutions[-1].text
        if solutions[-1].finish in NO_ROOM:
            break
        [review] = yield [_asked(problem, style, review_prompt(problem, style, last), f"review/{number}")]
        if review.finish in NO_ROOM or finds_no_fault(review.text):
            break
        [again] = yield [_asked(problem, style, refine_prompt(problem, style, last, review.text), f"refine/{number}")]
        if again.finish in NO_ROOM:
            break
        solutions = [*solutions, again]
        if again.text.strip() == last.strip():
            break
    answers = tuple(extract(solution.text, type) for solution in solutions)
    stated = [answer for answer in answers if answer is not None]
    return Solution(answer=stated[-1] if stated else None, samples=tuple(solutions), answers=answers)


def _asked(problem: Row, style: Style, prompt: Prompt, stage: str) -> Request:
    return Request(prompt=prompt, **about(problem), stage=stage, max_tokens=style.max_tokens[WORKED], stop=style.stop)
