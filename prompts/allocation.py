"""A fixed budget of tokens over many questions: each next sample goes where it helps most."""
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from scipy.special import betainc

from prompts.answers import extract, normalize
from prompts.records import Request, Result, Solution, Step
from prompts.strategies import chains, conclude
from prompts.templates import WORKED, Row, Style


def doubt(counts: Mapping[str, int]) -> float:
    """Posterior chance that the leader of a vote is not the mode, against its first challenger: .5 when nothing is known.

    With a uniform prior on the leader's share of the two, P(share < 1/2) of Beta(v1 + 1, v2 + 1) (Aggarwal et al. 2023, section 3).
    """
    first, second, *_ = [*sorted(counts.values(), reverse=True), 0, 0]
    return float(betainc(first + 1, second + 1, 0.5))


def gain(counts: Mapping[str, int]) -> float:
    """By how much one more vote for the leader would lower the doubt: high where a question is contested, low where it is settled
    and where so many votes are split that one more says little.

    The better outcome counts, not the mean of both (optimistic knowledge gradient, Chen, Lin and Zhou 2013): the mean is zero wherever
    a single vote cannot change the leader, so it would never come back to a question of 3 to 1.
    """
    first, second, *_ = [*sorted(counts.values(), reverse=True), 0, 0]
    return float(betainc(first + 1, second + 1, 0.5) - betainc(first + 2, second + 1, 0.5))


@dataclass
class _Question:
    problem: Row
    examples: Sequence[Row]
    samples: list[Result] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    spent: int = 0

    def worth(self) -> float:
        """Gain a token that its next sample is expected to cost, by the share of samples that vote. The first sample comes before all."""
        if not self.samples:
            return 1e9
        votes = sum(self.counts.values())  # a sample that states no answer says nothing, and its like may follow
        return gain(self.counts) * (votes + 1) / (len(self.samples) + 1) / max(1.0, self.spent / len(self.samples))


def budgeted(problems: Sequence[Row], examples: Sequence[Sequence[Row]], style: Style, *, budget: int, most: int, temperature: float,
             round_size: int = 64):
    """One strategy over many questions: yields requests of several, returns the solution of each, in order.

    At most `budget` generated tokens are spent over all questions, one sample for each first, then a sample of the `round_size` questions
    where it is worth most, again and again, none more than `most` times. A round is no larger than what the rest of the budget pays
    for at full length, so the budget is never exceeded. Rounds are fixed by this alone: results do not depend on batches.
    Raises ValueError for a budget that does not pay for one sample of each question at full length.
    """
    longest = style.max_tokens[WORKED]
    if budget < longest * len(problems) or temperature <= 0 or most < 1:
        raise ValueError(f"a budget of {budget} tokens over {len(problems)} questions, at most {most} samples each at temperature "
                         f"{temperature}: give at least {longest} tokens a question, one sample and a temperature above 0")
    questions = [_Question(problem, shown) for problem, shown in zip(problems, examples, strict=True)]
    waiting = [(-question.worth(), i) for i, question in enumerate(questions)]  # a heap: a sample changes the worth of its question alone
    spent = 0
    while waiting and (affordable := min(round_size, (budget - spent) // longest)):
        chosen = [heapq.heappop(waiting)[1] for _ in range(min(affordable, len(waiting)))]
        requests = [request for i in chosen for request in chains(
            questions[i].problem, style, questions[i].examples, [len(questions[i].samples)], temperature)]
        results = yield requests
        for i, request, result in zip(chosen, requests, results, strict=True):
            question, type = questions[i], questions[i].problem.get("answer_type")
            question.asked.append(request)
            question.samples.append(result)
            answer = extract(result.text, type)
            if answer is not None and (form := normalize(answer, type)):
                question.counts[form] = question.counts.get(form, 0) + 1
            question.spent += result.generated_tokens
            spent += result.generated_tokens
            if len(question.samples) < most and not _unanswerable(question):
                heapq.heappush(waiting, (-question.worth(), i))
    return [_solution(question) for question in questions]


def _unanswerable(question: _Question) -> bool:
    return bool(question.samples) and question.samples[-1].finish == "too_long"


def _solution(question: _Question) -> Solution:
    trace = tuple(map(Step, question.asked, question.samples))
    return replace(conclude(question.samples, question.problem.get("answer_type")), trace=trace)
