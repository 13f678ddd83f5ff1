"""Runs the strategies of many problems side by side: what all of them ask for goes to the model in big batches."""
from collections.abc import Callable, Sequence

from prompts.strategies import Request, Result, Solution, Strategy

Answer = Callable[[list[Request]], list[Result]]


def solve(strategies: Sequence[Strategy], answer: Answer, *, batch_size: int, advance: Callable[[int], object] = lambda n: None,
          ) -> list[Solution]:
    """The solution of each strategy, in order.

    Every round collects the requests of all unfinished strategies and asks `answer` for at most `batch_size` at a time;
    `advance` hears how many were answered. Solutions do not depend on order or batches as long as `answer` gives the same result
    for the same request. Raises ValueError when it does not answer all of them.
    """
    solutions: dict[int, Solution] = {}
    inbox: dict[int, list[Result] | None] = dict.fromkeys(range(len(strategies)))
    while inbox:
        asked: dict[int, list[Request]] = {}
        for i, results in inbox.items():
            try:
                asked[i] = next(strategies[i]) if results is None else strategies[i].send(results)
            except StopIteration as finished:
                solutions[i] = finished.value
        requests = [request for wanted in asked.values() for request in wanted]
        answers: list[Result] = []
        for start in range(0, len(requests), batch_size):
            batch = requests[start:start + batch_size]
            given = answer(batch)
            if len(given) != len(batch):
                raise ValueError(f"{len(batch)} requests but {len(given)} results: a backend answers each request once, in order")
            answers += given
            advance(len(batch))
        remaining = iter(answers)
        inbox = {i: [next(remaining) for _ in wanted] for i, wanted in asked.items()}
    return [solutions[i] for i in range(len(strategies))]
