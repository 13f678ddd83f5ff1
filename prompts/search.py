"""Tree of Thought (Yao et al. 2023): partial solutions are extended by thoughts, valued, and searched breadth- or depth-first.

A puzzle says how a problem is put to the model for that (prompts/thoughts.py). Letters as in the paper: a state is the list of
thoughts so far, b the states kept (`beam`), k the thoughts asked for a state (`width`), T the steps (`depth`).
"""
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prompts.records import Request, Result, Solution, Strategy
from prompts.strategies import about, ledgered, score_of
from prompts.templates import Prompt, Row, Style
from prompts.voting import majority

Thoughts = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """How the thoughts of a problem are asked for and read.

    `extend` is the prompt for the next thought(s) after a state; `read` the next thoughts that a text offers, those that cannot be
    (a number used twice) left out. `value` is the prompt that asks how good a state is and `rate` reads the figure, higher is better;
    `choose` is the prompt that shows states by number and asks for the best one. `finished` says that a state is a whole solution and
    `answer` what it concludes. `text` writes a state as the beginning of a solution. `max_tokens` bounds one thought (or a whole
    proposal), `stop` ends it.
    """

    extend: Callable[[Thoughts], Prompt]
    read: Callable[[Thoughts, str], list[str]]
    finished: Callable[[Thoughts], bool]
    answer: Callable[[Thoughts], str | None]
    text: Callable[[Thoughts], str]
    max_tokens: int
    stop: tuple[str, ...]
    value: Callable[[Thoughts], Prompt] | None = None
    rate: Callable[[str], float] | None = None
    choose: Callable[[Sequence[Thoughts]], Prompt] | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """How the tree is searched.

    `thoughts`: "propose" asks once, greedily, for all next thoughts; "sample" draws `width` of them at `temperature`. `judge`:
    "value" asks about each state `judgements` times and takes the mean, "vote" asks `judgements` times which of the states is best,
    "reward" asks the reward model. `order`: "breadth" keeps the best `beam` states of each of `depth` levels; "depth" follows the
    best first, leaves states below `threshold`, and goes back where all are left, for `nodes` states at most.
    """

    order: Literal["breadth", "depth"] = "breadth"
    thoughts: Literal["propose", "sample"] = "sample"
    judge: Literal["value", "vote", "reward"] = "value"
    width: int = 4
    beam: int = 2
    depth: int = 6
    threshold: float = -1e9
    judgements: int = 1
    temperature: float = 1.0
    nodes: int = 40


@ledgered
def tree_of_thought(problem: Row, style: Style, puzzle: Puzzle, search: Search) -> Strategy:
    """The answer of the best state that the search ends with; one that found no whole solution abstains.

    Its one sample is the solution found, put together from thoughts: its tokens are in the trace, where they were drawn.

    Breadth-first: algorithm 1 of the paper, the best finished state of all levels; depth-first: algorithm 2, the first finished one.
    Raises ValueError for settings that cannot search, and for a puzzle without the prompt that the search judges by.
    """
    check_search(search, puzzle)
    find = _breadth_first if search.order == "breadth" else _depth_first
    state = yield from find(problem, style, puzzle, search)
    answer = puzzle.answer(state) if state is not None else None
    answer = majority([answer], problem.get("answer_type")).answer  # an answer that has no normal form is none
    written = Result(text=puzzle.text(state or ()), prompt_tokens=0, generated_tokens=0, finish="length" if state is None else "stop")
    return Solution(answer=answer, samples=(written,), answers=(answer,))


def check_search(search: Search, puzzle: Puzzle) -> None:
    """Raises ValueError for settings that cannot search, and for a puzzle without the prompt that the search judges by."""
    if min(search.width, search.beam, search.depth, search.judgements, search.nodes) < 1 or search.temperature <= 0:
        raise ValueError(f"tree of thought needs width, beam, depth, judgements and nodes of at least 1 and a temperature above 0, "
                         f"got {search}")
    if search.order == "depth" and search.judge == "vote":
        raise ValueError("a depth-first search compares a state with a threshold, and votes have none: set judge to value or reward, "
                         "or order to breadth")
    if (search.judge == "value" and (puzzle.value is None or puzzle.rate is None)) or (search.judge == "vote" and puzzle.choose is None):
        raise ValueError(f"this task has no prompt to judge states by {search.judge}: set judge to another of value, vote, reward")


Found = Generator[list[Any], list[Any], Any]


def _breadth_first(problem: Row, style: Style, puzzle: Puzzle, search: Search) -> Found:
    states: list[Thoughts] = [()]
    whole: list[tuple[float, Thoughts]] = []
    for level in range(search.depth):
        states = yield from _extended(problem, puzzle, search, states)
        if not states:
            break
        values = yield from _valued(problem, style, puzzle, search, states, f"value/{level}")
        ranked = sorted(range(len(states)), key=lambda i: -values[i])[:search.beam]
        whole += [(values[i], states[i]) for i in ranked if puzzle.finished(states[i])]
        states = [states[i] for i in ranked if values[i] >= search.threshold and not puzzle.finished(states[i])]
        if not states:
            break
    return max(whole, key=lambda entry: entry[0])[1] if whole else None


def _depth_first(problem: Row, style: Style, puzzle: Puzzle, search: Search) -> Found:
    open_states: list[Thoughts] = [()]  # the next to look at comes last
    for _ in range(search.nodes):
        if not open_states:
            return None
        state = open_states.pop()
        if state and puzzle.finished(state):
            return state
        if len(state) == search.depth:
            continue
        states = yield from _extended(problem, puzzle, search, [state])
        values = yield from _valued(problem, style, puzzle, search, states, "value")
        ranked = sorted(range(len(states)), key=lambda i: -values[i])
        open_states += [states[i] for i in reversed(ranked) if values[i] >= search.threshold]
    return None


def _extended(problem: Row, puzzle: Puzzle, search: Search, states: Sequence[Thoughts]) -> Found:
    """Every state with each of its next thoughts, none twice. A state's draws are named by its thoughts, not by its place."""
    once = search.thoughts == "propose"
    asked = [Request(prompt=puzzle.extend(state), **about(problem), stage=f"thought/{puzzle.text(state)}", sample=i,
                     temperature=0.0 if once else search.temperature, max_tokens=puzzle.max_tokens, stop=puzzle.stop)
             for state in states for i in range(1 if once else search.width)]
    given = yield asked
    each = [state for state in states for _ in range(1 if once else search.width)]
    found: dict[Thoughts, None] = {}
    for state, result in zip(each, given, strict=True):
        thoughts = puzzle.read(state, result.text)
        found |= dict.fromkeys((*state, thought) for thought in (thoughts[:search.width] if once else thoughts[:1]))
    return list(found)


def _valued(problem: Row, style: Style, puzzle: Puzzle, search: Search, states: Sequence[Thoughts], stage: str) -> Found:
    """A value for each state, higher is better. What a judgement does not say counts nothing."""
    temperature = search.temperature if search.judgements > 1 else 0.0
    if search.judge == "reward":
        given = yield [score_of(problem, style, puzzle.text(state), ended=puzzle.finished(state), sample=0, stage=f"{stage}/{i}")
                       for i, state in enumerate(states)]
        return [float("-inf") if result.score is None else result.score for result in given]
    if search.judge == "vote":
        assert puzzle.choose is not None
        given = yield [Request(prompt=puzzle.choose(states), **about(problem), stage=stage, sample=j, temperature=temperature,
                               max_tokens=puzzle.max_tokens, stop=puzzle.stop) for j in range(search.judgements)]
        votes = [_number(result.text) for result in given]
        return [float(votes.count(i)) for i in range(1, len(states) + 1)]
    assert puzzle.value is not None and puzzle.rate is not None
    given = yield [Request(prompt=puzzle.value(state), **about(problem), stage=f"value/{puzzle.text(state)}", sample=j,
                           temperature=temperature, max_tokens=puzzle.max_tokens, stop=puzzle.stop)
                   for state in states for j in range(search.judgements)]
    n = search.judgements
    return [sum(puzzle.rate(result.text) for result in given[i * n:(i + 1) * n]) / n for i in range(len(states))]


def _number(text: str) -> int | None:
    """The last whole number of a vote, None where it has none."""
    words = [word.strip(".,:;()[]*") for word in text.split()]
    digits = [word for word in words if word.isascii() and word.isdigit() and len(word) < 6]
    return int(digits[-1]) if digits else None
