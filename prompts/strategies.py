"""Prompting strategies as generators: they yield requests, are sent results, and return a solution.

A strategy never calls a model, so one scheduler can run hundreds of problems side by side in big batches, any backend can
answer, and a strategy of several rounds (early stopping here; search and critique later) is an ordinary loop.
"""
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from prompts.answers import extract
from prompts.templates import DIRECT, WORKED, Prompt, Row, Style, render
from prompts.voting import majority, settled


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer wanted. `key` and `sample` name the draw: the same pair gets the same noise, whatever else is in the batch."""

    prompt: Prompt
    key: str
    sample: int = 0
    temperature: float = 0.0
    max_tokens: int = 96
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Result:
    """One answer given. `tokens` counts what was generated; `finished` says that the model ended it, not the length limit."""

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a strategy concluded. `answers` holds one entry a sample in drawing order, None where a sample gave no answer."""

    answer: str | None
    samples: tuple[Result, ...]
    answers: tuple[str | None, ...]
    tie: bool = False

    @property
    def tokens(self) -> int:
        return sum(sample.tokens for sample in self.samples)

    @property
    def unparsed(self) -> int:
        return sum(answer is None for answer in self.answers)


Strategy = Generator[list[Request], list[Result], Solution]


def conclude(samples: Sequence[Result]) -> Solution:
    """Majority over the answers found in the samples; with one sample, that sample's answer."""
    answers = tuple(extract(sample.text) for sample in samples)
    vote = majority(answers)
    return Solution(answer=vote.answer, samples=tuple(samples), answers=answers, tie=vote.tie)


def _greedy(problem: Row, style: Style, kind: str, examples: Sequence[Row] = ()) -> Strategy:
    prompt = render(problem["question"], style, kind, examples)
    results = yield [Request(prompt=prompt, key=problem["id"], max_tokens=style.max_tokens[kind], stop=style.stop)]
    return conclude(results)


def direct(problem: Row, style: Style) -> Strategy:
    """The bare answer, greedily."""
    return (yield from _greedy(problem, style, DIRECT))


def few_shot(problem: Row, style: Style, examples: Sequence[Row]) -> Strategy:
    """The bare answer after examples with bare answers (Brown et al. 2020)."""
    return (yield from _greedy(problem, style, DIRECT, examples))


def zero_shot_cot(problem: Row, style: Style) -> Strategy:
    """Worked steps on the cue alone (Kojima et al. 2022)."""
    return (yield from _greedy(problem, style, WORKED))


def few_shot_cot(problem: Row, style: Style, examples: Sequence[Row]) -> Strategy:
    """Worked steps after worked examples (Wei et al. 2022)."""
    return (yield from _greedy(problem, style, WORKED, examples))


def self_consistency(problem: Row, style: Style, examples: Sequence[Row] = (), *, n: int, temperature: float,
                     round_size: int | None = None) -> Strategy:
    """The majority of `n` sampled chains (Wang et al. 2023).

    `round_size` draws that many at a time and stops as soon as the rest cannot change the winner. Without it all chains are
    drawn at once, which also gives an unbiased accuracy of one sampled chain.
    Raises ValueError for settings that cannot vote.
    """
    if n < 1 or temperature <= 0 or (round_size is not None and round_size < 1):
        raise ValueError(f"self-consistency needs n >= 1, temperature > 0 and round_size >= 1, got n={n}, "
                         f"temperature={temperature}, round_size={round_size}")
    prompt = render(problem["question"], style, WORKED, examples)
    samples: list[Result] = []
    while len(samples) < n:
        wanted = range(len(samples), min(n, len(samples) + (round_size or n)))
        samples += yield [Request(prompt=prompt, key=problem["id"], sample=i, temperature=temperature,
                                  max_tokens=style.max_tokens[WORKED], stop=style.stop) for i in wanted]
        if settled(majority(extract(s.text) for s in samples).counts, n - len(samples)):
            break
    return conclude(samples)
