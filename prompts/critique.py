"""Answers that are reviewed and written again, until the review finds no fault.

Self-refine (Madaan et al. 2023) asks the model what is wrong in words and for the whole answer again. Where reviews name the first wrong
step, as a model trained on such does, the steps before it stand and the rest is drawn again.
"""
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from prompts.answers import extract
from prompts.records import Request, Result, Solution, Strategy
from prompts.strategies import NO_ROOM, about, chains, greedy, ledgered
from prompts.templates import WORKED, Prompt, Row, Style, begun, render

NO_FAULT = "no mistake"  # a review that says this (and not "there is no mistake except") ends the loop
REVIEW = ('Check the solution step by step. If every step is right, write "No mistake." and nothing else. '
          "Otherwise say which step is the first wrong one, and why.")
REFINE = "Write the solution again without that mistake."
SENTENCE_END = re.compile(r"(?<=\.)\s+")


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
    return _last_stated(solutions, type)


def split_steps(text: str) -> list[str]:
    """Sentences of a worked solution, white space normalised. A period inside a number does not end a sentence."""
    return [" ".join(s.split()) for s in SENTENCE_END.split(text.strip()) if s.strip()]


def steps_of(answer: str) -> list[str]:
    """The sentences of a worked answer up to the one that states the answer, if one does."""
    steps = split_steps(answer)
    return steps[:next((i for i, step in enumerate(steps, start=1) if step.startswith("The answer is")), len(steps))]


def first_wrong_question(question: str, steps: Sequence[str]) -> str:
    """Asks for the first wrong step of a worked answer, numbered from 0 as BIG-Bench Mistake does (Tyen et al. 2024)."""
    shown = "\n".join(f"Step {i}: {step}" for i, step in enumerate(steps))
    return (f"{question.strip()}\n{shown}\nWhich step is the first wrong one? Answer with its number, or with \"no mistake\" "
            "when every step is right.")


def named_step(review: str, num_steps: int) -> int | None:
    """The step that a review calls the first wrong one; None when it finds no mistake, or names no step that there is."""
    named = extract(review, "string") or ""
    return int(named) if re.fullmatch(r"[0-9]{1,4}", named) and int(named) < num_steps else None


@ledgered
def critique_redo(problem: Row, style: Style, *, rounds: int, temperature: float, kind: str = WORKED, sampled: bool = False,
                  find: Callable[[Sequence[str]], int | None] | None = None) -> Strategy:
    """An answer from whose first wrong step on, as a review names it, the rest is drawn again, at most `rounds` times.

    The review is asked for as BIG-Bench Mistake asks, worked or direct (`kind`); the steps before the one it names stand, and their
    continuation is sampled. It ends when the review finds no mistake. The first answer is greedy, or (`sampled`) the first of the chains
    that self-consistency draws. `find` names the step in the review's place, at no cost in tokens: a verifier, say. `samples` are the
    answers in order, the answer the last that is stated. Raises ValueError for fewer than one round, and for temperature 0, at which
    the same steps would follow.
    """
    if rounds < 1 or temperature <= 0:
        raise ValueError(f"critique needs rounds >= 1 and temperature > 0, got rounds={rounds}, temperature={temperature}")
    answers: list[Result] = yield chains(problem, style, (), [0], temperature) if sampled else [greedy(problem, style, WORKED)]
    for number in range(rounds):
        steps = steps_of(answers[-1].text)
        if find:
            wrong = find(steps)
        else:
            asked = render(first_wrong_question(problem["question"], steps), style, kind)
            [review] = yield [replace(_asked(problem, style, asked, f"review/{number}"), max_tokens=style.max_tokens[kind])]
            wrong = named_step(review.text, len(steps))
        if wrong is None:
            break
        kept = " ".join(steps[:wrong])
        again = _asked(problem, style, begun(render(problem["question"], style, WORKED), kept), f"redo/{number}")
        [rest] = yield [replace(again, temperature=temperature)]
        if rest.finish in NO_ROOM:
            break
        answers = [*answers, replace(rest, text=f"{kept} {rest.text.strip()}".strip())]
    return _last_stated(answers, problem.get("answer_type"))


def _last_stated(solutions: Sequence[Result], type: str | None) -> Solution:
    answers = tuple(extract(solution.text, type) for solution in solutions)
    stated = [answer for answer in answers if answer is not None]
    return Solution(answer=stated[-1] if stated else None, samples=tuple(solutions), answers=answers)


def _asked(problem: Row, style: Style, prompt: Prompt, stage: str) -> Request:
    return Request(prompt=prompt, **about(problem), stage=stage, max_tokens=style.max_tokens[WORKED], stop=style.stop)
