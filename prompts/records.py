"""What passes between a strategy, the scheduler and a backend: plain records, no torch.

A strategy asks (`Request`, `Score`), is given a `Result` for each, and returns a `Solution` with everything it asked in it.
"""
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from prompts.templates import Prompt

Finish = Literal["stop", "length", "too_long", "missing"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text wanted. `key` and `sample` name the draw: the same pair gets the same noise, whatever else is in the batch.

    `stage` says what the text is for ("chain", "extract", "value/2", ...), so that two calls about one question never share noise.
    """

    prompt: Prompt
    question: str
    task: str = ""
    stage: str = "chain"
    sample: int = 0
    temperature: float = 0.0
    max_tokens: int = 96
    stop: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.task}/{self.question}/{self.stage}"


@dataclass(frozen=True, kw_only=True)
class Score:
    """The reward model's opinion of a response to a prompt wanted: `Result.score`, in standard deviations of SFT samples.

    `ended` says that the response is whole, so that the model sees its end token; the beginning of a solution has none.
    """

    prompt: Prompt
    response: str
    ended: bool
    question: str
    task: str = ""
    stage: str = "score"
    sample: int = 0


@dataclass(frozen=True, kw_only=True)
class Result:
    """One answer given.

    `generated_tokens` includes the end token. `finish`: the model ended it ("stop"), it ran into `max_tokens` ("length"), the prompt
    left no room for it ("too_long"), or the backend gave nothing after its retries ("missing"); the last two have no text.
    `logprobs` are those of the generated tokens where the backend has them; `score` answers a `Score`.
    """

    text: str
    prompt_tokens: int
    generated_tokens: int
    finish: Finish
    logprobs: tuple[float, ...] | None = None
    score: float | None = None

    @property
    def finished(self) -> bool:
        return self.finish == "stop"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The ledger of a question: everything that was asked for it, extraction, critique, valuation and scoring included.

    `prompt_tokens` counts the prompt of every request, also where a backend reads a prompt once for all its samples.
    """

    requests: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(requests=self.requests + other.requests, prompt_tokens=self.prompt_tokens + other.prompt_tokens,
                    generated_tokens=self.generated_tokens + other.generated_tokens)


class Step(NamedTuple):
    """One thing asked, and what was given."""

    asked: Request | Score
    given: Result


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a strategy concluded.

    `samples` are the candidate answers' texts in drawing order and `answers` what each says, None where it says nothing; `trace` is
    all that was asked, in order, and `cost` its sum.
    """

    answer: str | None
    samples: tuple[Result, ...]
    answers: tuple[str | None, ...]
    tie: bool = False
    trace: tuple[Step, ...] = ()

    @property
    def cost(self) -> Cost:
        given = [step.given for step in self.trace]
        return Cost(requests=len(given), prompt_tokens=sum(r.prompt_tokens for r in given),
                    generated_tokens=sum(r.generated_tokens for r in given))

    @property
    def tokens(self) -> int:
        return sum(sample.generated_tokens for sample in self.samples)

    @property
    def unparsed(self) -> int:
        return sum(answer is None for answer in self.answers)


Asked = list[Request] | list[Score] | list[Request | Score]
Strategy = Generator[Asked, list[Result], Solution]
