"""Prompting strategies as generators: they yield requests, are sent results, and return a solution.

A strategy never calls a model, so one scheduler can run hundreds of problems side by side in big batches, any backend can
answer, and a strategy of several rounds is an ordinary loop. Tree search is in prompts/search.py, self-refine in
prompts/critique.py, the budget over many questions in prompts/allocation.py.
"""
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

from prompts.answers import extract, normalize
from prompts.records import Asked, Request, Result, Score, Solution, Step, Strategy
from prompts.templates import DIRECT, WORKED, Prompt, Row, Style, ask_for_answer, render
from prompts.voting import Stopper, majority, settled, stopper

NO_ROOM = ("too_long", "missing")  # finishes of a result that holds no text to go on with


def ledgered(strategy: Callable[..., Strategy]) -> Callable[..., Strategy]:
    """The strategy with everything that it asks and is given in its solution's trace: no request can be left out of the cost."""
    @wraps(strategy)
    def with_trace(*arguments: Any, **settings: Any) -> Strategy:
        inner = strategy(*arguments, **settings)
        trace: list[Step] = []
        asked: Asked = next(inner)
        while True:
            given = yield asked
            trace += map(Step, asked, given)
            try:
                asked = inner.send(given)
            except StopIteration as finished:
                return replace(finished.value, trace=tuple(trace))
    return with_trace


def conclude(samples: Sequence[Result], type: str | None = None) -> Solution:
    """Majority over the answers found in the samples; with one sample, that sample's answer."""
    answers = tuple(extract(sample.text, type) for sample in samples)
    vote = majority(answers, type)
    return Solution(answer=vote.answer, samples=tuple(samples), answers=answers, tie=vote.tie)


def about(problem: Row) -> dict[str, Any]:
    """What names a problem in its requests."""
    return {"question": problem["id"], "task": problem.get("task", "")}


def chains(problem: Row, style: Style, examples: Sequence[Row], numbers: Sequence[int], temperature: float) -> list[Request]:
    """Sampled worked answers. Every strategy that samples chains asks for the same ones, so that strategies compare in pairs."""
    prompt = render(problem["question"], style, WORKED, examples)
    return [Request(prompt=prompt, **about(problem), sample=i, temperature=temperature, max_tokens=style.max_tokens[WORKED],
                    stop=style.stop) for i in numbers]


def greedy(problem: Row, style: Style, kind: str, examples: Sequence[Row] = ()) -> Request:
    """The one answer at temperature 0, of the kind asked for."""
    return Request(prompt=render(problem["question"], style, kind, examples), **about(problem), stage=kind,
                   max_tokens=style.max_tokens[kind], stop=style.stop)


@ledgered
def _once(problem: Row, style: Style, kind: str, examples: Sequence[Row] = ()) -> Strategy:
    return conclude((yield [greedy(problem, style, kind, examples)]), problem.get("answer_type"))


def direct(problem: Row, style: Style) -> Strategy:
    """The bare answer, greedily."""
    return _once(problem, style, DIRECT)


def few_shot(problem: Row, style: Style, examples: Sequence[Row]) -> Strategy:
    """The bare answer after examples with bare answers (Brown et al. 2020)."""
    return _once(problem, style, DIRECT, examples)


def zero_shot_cot(problem: Row, style: Style) -> Strategy:
    """Worked steps on the cue alone; an answer that the steps do not state is not asked for again (see `two_stage_cot`)."""
    return _once(problem, style, WORKED)


def few_shot_cot(problem: Row, style: Style, examples: Sequence[Row]) -> Strategy:
    """Worked steps after worked examples (Wei et al. 2022)."""
    return _once(problem, style, WORKED, examples)


@ledgered
def two_stage_cot(problem: Row, style: Style) -> Strategy:
    """Worked steps on the cue, then, where they state no answer, a second request for it (Kojima et al. 2022, section 3).

    The paper asks the second time always; an answer that is already marked is not asked for again here, which costs nothing.
    """
    type, first = problem.get("answer_type"), greedy(problem, style, WORKED)
    [steps] = yield [first]
    answer = extract(steps.text, type)
    if answer is None and steps.finish not in NO_ROOM:
        prompt = ask_for_answer(first.prompt, steps.text)
        [last] = yield [Request(prompt=prompt, **about(problem), stage="extract", max_tokens=style.max_tokens[DIRECT], stop=style.stop)]
        answer = extract(last.text, type) or extract(f"The answer is {last.text.strip()}", type)
    return Solution(answer=answer, samples=(steps,), answers=(answer,))


@ledgered
def self_consistency(problem: Row, style: Style, examples: Sequence[Row] = (), *, n: int, temperature: float,
                     round_size: int | None = None, stop: str = "none") -> Strategy:
    """The majority of at most `n` sampled chains (Wang et al. 2023).

    `stop` is a stopping rule of `voting.stopper`. With one, a round is as many chains as it takes at the least until the rule can
    stop, so that none is drawn which one at a time would not be, in far fewer rounds. `round_size` alone draws that many at a time and
    stops as soon as the rest cannot change the winner. With neither all chains are drawn at once, which also gives an unbiased accuracy
    of one sampled chain.
    Raises ValueError for settings that cannot vote.
    """
    _can_sample("self-consistency", n, temperature)
    if round_size is not None and round_size < 1:
        raise ValueError(f"self-consistency draws at least one chain a round, got round_size={round_size}")
    enough, type = stopper(stop), problem.get("answer_type")
    samples: list[Result] = []
    answers: list[str | None] = []
    forms: list[str | None] = []
    while len(samples) < n:
        size = round_size or _fewest(enough, forms, n - len(samples))
        drawn = yield chains(problem, style, examples, range(len(samples), min(n, len(samples) + size)), temperature)
        samples += drawn
        answers += (found := [extract(sample.text, type) for sample in drawn])
        forms += [normalize(answer, type) or None if answer is not None else None for answer in found]
        if enough(forms) or (round_size and settled(majority(answers, type).counts, n - len(samples))):
            break
    return conclude(samples, type)


def _fewest(enough: Stopper, forms: Sequence[str | None], left: int) -> int:
    """Samples until the rule can stop at the earliest, which is when all agree with the leader; `left` when it cannot before."""
    leader = next(iter(Counter(form for form in forms if form is not None).most_common(1)), ("", 0))[0]
    return next((k for k in range(1, left) if enough([*forms, *[leader] * k])), left)


@ledgered
def best_of_n(problem: Row, style: Style, examples: Sequence[Row] = (), *, n: int, temperature: float) -> Strategy:
    """The answer of the chain that the reward model likes best, of `n` (Cobbe et al. 2021, section 4.2); what states no answer is out."""
    samples, answers, scores = yield from _scored(problem, style, examples, n, temperature)
    stated = [i for i, answer in enumerate(answers) if answer is not None]
    best = max(stated, key=lambda i: scores[i], default=None)
    level = {normalize(answers[i] or "", problem.get("answer_type")) for i in stated if best is not None and scores[i] == scores[best]}
    return Solution(answer=None if best is None else answers[best], samples=tuple(samples), answers=tuple(answers), tie=len(level) > 1)


@ledgered
def weighted_vote(problem: Row, style: Style, examples: Sequence[Row] = (), *, n: int, temperature: float) -> Strategy:
    """The majority of `n` chains, each with the weight that the reward model gives it (Li et al. 2023, section 3.2).

    The weight is exp(score): a Bradley-Terry reward is the log of a strength, and strengths add up. Scores come in standard deviations
    of SFT samples, so how sharp the weights are follows from that unit and not from the reward model's own.
    """
    samples, answers, scores = yield from _scored(problem, style, examples, n, temperature)
    most = max(scores, default=0.0)
    weights = [math.exp(score - most) if score > -math.inf else 0.0 for score in scores]
    vote = majority(answers, problem.get("answer_type"), weights)
    return Solution(answer=vote.answer, samples=tuple(samples), answers=tuple(answers), tie=vote.tie)


def _scored(problem: Row, style: Style, examples: Sequence[Row], n: int, temperature: float) -> Any:
    """Chains, their answers, and the reward model's scores; a chain without an answer is not scored, which would buy nothing."""
    _can_sample("a choice among chains", n, temperature)
    asked = chains(problem, style, examples, range(n), temperature)
    samples = yield asked
    answers = [extract(sample.text, problem.get("answer_type")) for sample in samples]
    wanted = [i for i, answer in enumerate(answers) if answer is not None]
    given = yield [score_of(problem, style, samples[i].text, ended=samples[i].finished, sample=i) for i in wanted]
    scores = [-math.inf] * n
    for i, result in zip(wanted, given, strict=True):
        scores[i] = -math.inf if result.score is None else result.score
    return samples, answers, scores


def score_of(problem: Row, style: Style, response: str, *, ended: bool, sample: int, stage: str = "score") -> Score:
    """The request for a reward: always in the chat format without examples, which is what the reward model was trained on."""
    prompt: Prompt = render(problem["question"], replace(style, chat=True), WORKED)
    return Score(prompt=prompt, response=response, ended=ended, **about(problem), sample=sample, stage=stage)


def _can_sample(what: str, n: int, temperature: float) -> None:
    if n < 1 or temperature <= 0:
        raise ValueError(f"{what} needs n >= 1 and temperature > 0, got n={n}, temperature={temperature}")
