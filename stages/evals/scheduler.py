"""Runs the strategies of many problems side by side: what all of them ask for goes to the model in big batches."""
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from prompts.records import Asked, Request, Result, Score, Solution, Strategy
from prompts.templates import Prompt

Judge = Callable[[list[Score]], list[Result]]


class Backend(Protocol):
    """Where requests are answered. `generate` gives one result for each request, in order; `score` the log-probability of every
    token of a continuation after a context."""

    def generate(self, requests: list[Request]) -> list[Result]: ...

    def score(self, context: Prompt, continuation: str) -> list[float]: ...


class _Live:
    """A strategy at work: what it has asked for, and what has come back of that."""

    def __init__(self, place: int, strategy: Any):
        self.place, self.strategy = place, strategy
        self.asked: Asked = []
        self.given: list[Result | None] = []
        self.left = 0

    def advance(self) -> tuple[bool, Any]:
        """Send what has come and take the next requests: (True, what it returned) at its end. An empty list is answered at once."""
        try:
            self.asked = self.strategy.send(self.given) if self.asked else next(self.strategy)
            while not self.asked:
                self.asked = self.strategy.send([])
        except StopIteration as finished:
            return True, finished.value
        self.given, self.left = [None] * len(self.asked), len(self.asked)
        return False, None


def run(strategies: Iterable[Any], backend: Backend, *, batch_size: int, judge: Judge | None = None,
        advance: Callable[[int], object] = lambda n: None) -> Iterator[tuple[int, Any]]:
    """(place, what the strategy returned) for each strategy, as they finish.

    Batches of `batch_size` are filled first from strategies that are under way, the one that began first coming first, then from
    strategies that are started for it: so one that needs more rounds goes on with the next batch, whoever else is still in theirs, and
    no more than `batch_size` of them are alive however many there are (each has a request in the queue). `judge` answers `Score`s;
    `advance` hears how many requests were answered. Results do not depend on order or batches as long as the backend gives the same
    result for the same request.
    Raises ValueError when a backend does not answer all of a batch, and for a `Score` without a judge.
    """
    if batch_size < 1:
        raise ValueError(f"a batch holds at least one request, got batch_size {batch_size}")
    coming = enumerate(strategies)
    waiting: deque[tuple[_Live, int]] = deque()  # (strategy, which of its requests), those under way before those just begun
    while True:
        while len(waiting) < batch_size and (entry := next(coming, None)) is not None:
            live = _Live(*entry)
            finished, returned = live.advance()
            if finished:
                yield live.place, returned
            waiting.extend((live, i) for i in range(0 if finished else live.left))
        if not waiting:
            return
        batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
        _answer(batch, backend, judge)
        advance(len(batch))
        ready = {live.place: live for live, _ in batch if not live.left}
        again: list[tuple[_Live, int]] = []
        for live in ready.values():
            finished, returned = live.advance()
            if finished:
                yield live.place, returned
            again += [(live, i) for i in range(0 if finished else live.left)]
        # Those that have begun go first, in the order of their beginning: the requests of one strategy stay together.
        waiting = deque(sorted([*again, *waiting], key=lambda entry: entry[0].place))


def solve(strategies: Sequence[Strategy], backend: Backend, *, batch_size: int, judge: Judge | None = None,
          advance: Callable[[int], object] = lambda n: None) -> list[Solution]:
    """The solution of each strategy, in order. Arguments and errors as of `run`."""
    return [solution for _, solution in sorted(run(strategies, backend, batch_size=batch_size, judge=judge, advance=advance),
                                               key=lambda entry: entry[0])]


def _answer(batch: Sequence[tuple[_Live, int]], backend: Backend, judge: Judge | None) -> None:
    asked = [live.asked[i] for live, i in batch]
    texts = [n for n, request in enumerate(asked) if isinstance(request, Request)]
    scores = [n for n, request in enumerate(asked) if isinstance(request, Score)]
    if scores and judge is None:
        raise ValueError("a strategy asks for the reward model's scores, but there is no reward model: add the reward_model run to the "
                         "stage's parents, or leave that strategy out")
    for places, answer in ((texts, backend.generate), (scores, judge)):
        if not places:
            continue
        given = answer([asked[n] for n in places])  # type: ignore[misc]
        if len(given) != len(places):
            raise ValueError(f"{len(places)} requests but {len(given)} results: a backend answers each request once, in order")
        for n, result in zip(places, given, strict=True):
            live, i = batch[n]
            live.given[i] = result
            live.left -= 1
