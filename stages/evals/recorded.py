"""Recorded samples, from here or elsewhere, scored without a model: extraction, the vote, early stopping replayed, comparison.

One line a question: {"id", "gold", "samples": [text | {"text", "tokens"?, "answer"?, "weight"?}, ...]}, samples in drawing order. An
`answer` counts as it is, and the text is then not read (null: not given); `tokens` is a count or a list; `weight` is for weighted votes.
"""
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompts.answers import ANSWER_TYPES, equal, extract, extract_lenient, normalize
from prompts.intervals import wilson
from prompts.voting import Vote, majority, stopper
from stages.data.corpora import read_rows
from stages.evals.statistics import bootstrap_mean, mcnemar, paired_wilson

VOTES = ("majority", "first", "weighted")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How recorded samples become one answer. `first` takes the first sample's answer alone; `samples` uses so many of each question
    at most; `stop` is a rule of prompts.voting.stopper. Raises ValueError for what does not exist or go together."""

    answer_type: str | None = None
    extract: str = "last"
    vote: str = "majority"
    samples: int | None = None
    stop: str = "none"

    def __post_init__(self) -> None:
        if self.answer_type not in (None, *ANSWER_TYPES):
            raise ValueError(f"unknown answer type {self.answer_type!r}: expected one of {', '.join(ANSWER_TYPES)}")
        if self.extract not in ("last", "first"):
            raise ValueError(f"got extract {self.extract!r}: expected last or first")
        if self.vote not in VOTES:
            raise ValueError(f"unknown vote {self.vote!r}: expected one of {', '.join(VOTES)}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"got samples {self.samples}: expected at least 1")
        stopper(self.stop)
        if self.vote == "first" and self.stop != "none":
            raise ValueError(f"a vote of the first sample alone has nothing to stop: leave out --stop {self.stop} or --vote first")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """`answer` is the strict one, `lenient` with the fallback; both None where there is none of the type."""

    answer: str | None
    lenient: str | None
    tokens: int | None
    weight: float


@dataclass(frozen=True, kw_only=True)
class Question:
    id: Any
    gold: str
    samples: list[Sample]


def read_samples(path: str | Path, rules: Rules) -> list[Question]:
    """The questions of a file, each with the samples that the rules let it use.

    Raises ValueError naming file and line for what is not such a line, an id seen twice, a gold answer that does not fit the type, and a
    sample without a weight where weights vote; naming the file when it is empty or no question has as many samples as are asked for.
    """
    found: dict[str, Question] = {}
    longest = 0
    for where, row in read_rows(path):
        if missing := [key for key in ("id", "gold", "samples") if row.get(key) is None]:
            raise ValueError(f"{where}: no {missing[0]!r}; expected id, gold and samples")
        if not isinstance(row["samples"], list):
            raise ValueError(f"{where}: expected a list of samples, got {type(row['samples']).__name__}")
        if str(row["id"]) in found:
            raise ValueError(f"{where}: id {row['id']!r} was there before; a question counted twice biases the accuracy")
        written = str(row["gold"])
        gold = extract(written, rules.answer_type) or written
        if not normalize(gold, rules.answer_type):
            raise ValueError(f"{where}: the gold answer {written[:60]!r} is not of the type {rules.answer_type or 'of any answer'}: "
                             f"correct it, or give another --answer-type ({', '.join(ANSWER_TYPES)})")
        longest = max(longest, len(row["samples"]))
        samples = [_sample(sample, f"{where}, sample {i}", rules) for i, sample in enumerate(row["samples"][:rules.samples], 1)]
        found[str(row["id"])] = Question(id=row["id"], gold=gold, samples=samples)
    if not found:
        raise ValueError(f"{path} holds no samples")
    if rules.samples and longest < rules.samples:
        raise ValueError(f"{path}: no question has {rules.samples} samples: set --samples to at most {longest}")
    return list(found.values())


def _sample(sample: Any, where: str, rules: Rules) -> Sample:
    given = {"text": sample} if isinstance(sample, str) else sample
    if not isinstance(given, dict) or not (isinstance(given.get("text"), str) or given.get("answer") is not None):
        raise ValueError(f"{where}: expected a text or an object with a text, got {json.dumps(sample)[:60]}")
    tokens, weight = given.get("tokens"), given.get("weight")
    tokens = len(tokens) if isinstance(tokens, list) else tokens
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0):
        raise ValueError(f"{where}: expected tokens to be a count or a list, got {json.dumps(tokens)[:60]}")
    if rules.vote != "weighted":
        weight = None
    elif weight is None:
        raise ValueError(f"{where}: a weighted vote needs a weight for each sample, and this one has none")
    elif isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"{where}: a weighted vote needs a weight that is finite and not negative, got {json.dumps(weight)[:60]}: "
                         "put raw rewards through a sigmoid or exp")
    if given.get("answer") is not None:
        answer = lenient = str(given["answer"]) if normalize(str(given["answer"]), rules.answer_type) else None
    else:
        answer = lenient = extract(given["text"], rules.answer_type, which=rules.extract)
        if answer is None and rules.answer_type is not None:
            lenient = extract_lenient(given["text"], rules.answer_type, which=rules.extract)
    return Sample(answer=answer, lenient=lenient, tokens=tokens, weight=1.0 if weight is None else weight)


def decide(answers: Sequence[str | None], weights: Sequence[float], rules: Rules) -> tuple[Vote, int]:
    """The vote of answers in drawing order, and how many were used until the stopping rule was content or they ran out."""
    used = len(answers)
    if rules.vote == "first":
        used = min(1, used)
    elif rules.stop != "none":
        stop = stopper(rules.stop)
        forms = [None if answer is None else normalize(answer, rules.answer_type) for answer in answers]
        used = next((k for k in range(1, used + 1) if stop(forms[:k])), used)
    return majority(answers[:used], rules.answer_type, weights[:used] if rules.vote == "weighted" else None), used


def score(path: str | Path, rules: Rules | None = None, *, other: str | Path | None = None) -> dict[str, Any]:
    """result.json of a file of samples: docs/evaluation.md names its keys. With `other`, the paired comparison with a second file.

    Raises ValueError as `read_samples` does.
    """
    rules = rules or Rules()
    result = _scored(read_samples(path, rules), rules)
    if other is not None:
        second = _scored(read_samples(other, rules), rules)
        result["compare"] = {"other": str(other), **_compared(result["items"], second["items"], path, other, rules)}
    for item in result["items"]:
        del item["gold"]
    return result


def _scored(questions: Sequence[Question], rules: Rules) -> dict[str, Any]:
    items, tokens = [], []
    unparsed = ties = right_lenient = unparsed_lenient = 0
    for question in questions:
        weights = [sample.weight for sample in question.samples]
        strict = [sample.answer for sample in question.samples]
        lenient = [sample.lenient for sample in question.samples]
        vote, used = decide(strict, weights, rules)
        correct = vote.answer is not None and equal(vote.answer, question.gold, rules.answer_type)
        items.append({"id": question.id, "answer": vote.answer, "correct": correct, "samples_used": used, "gold": question.gold})
        tokens += [sample.tokens for sample in question.samples[:used]]
        unparsed += vote.abstained
        ties += vote.tie
        if lenient != strict:  # its own replay: another extraction may stop elsewhere
            vote, _ = decide(lenient, weights, rules)
            correct = vote.answer is not None and equal(vote.answer, question.gold, rules.answer_type)
        right_lenient += correct
        unparsed_lenient += vote.abstained
    n, right = len(items), sum(item["correct"] for item in items)
    figures = {"accuracy": right / n, "n": n, "wilson95": list(wilson(right, n)), "unparsed": unparsed}
    counted = [count for count in tokens if count is not None]
    return {**figures, "unanswered": sum(item["answer"] is None for item in items), "ties": ties,
            "samples_used_mean": sum(item["samples_used"] for item in items) / n,
            "tokens_mean": sum(counted) / n if counted and len(counted) == len(tokens) else None,
            "fewer_samples": sum(len(question.samples) < (rules.samples or 0) for question in questions),
            "strict": figures, "lenient": None if rules.answer_type is None else {
                "accuracy": right_lenient / n, "n": n, "wilson95": list(wilson(right_lenient, n)), "unparsed": unparsed_lenient},
            "items": items}


def _compared(items: Sequence[dict], others: Sequence[dict], path: str | Path, other: str | Path,
              rules: Rules) -> dict[str, Any]:
    """First minus second on the questions that both have. Raises ValueError when there are none or their gold answers differ."""
    second = {str(item["id"]): item for item in others}
    pairs = [(item, second[str(item["id"])]) for item in items if str(item["id"]) in second]
    if not pairs:
        raise ValueError(f"{path} and {other} have no id in common, so there is nothing to compare")
    for a, b in pairs:
        if normalize(a["gold"], rules.answer_type) != normalize(b["gold"], rules.answer_type):
            raise ValueError(f"id {a['id']!r} has the gold answer {a['gold']!r} in {path} and {b['gold']!r} in {other}: not one question")
    both = sum(a["correct"] and b["correct"] for a, b in pairs)
    only_first = sum(a["correct"] and not b["correct"] for a, b in pairs)
    only_second = sum(b["correct"] and not a["correct"] for a, b in pairs)
    n = len(pairs)
    neither = n - both - only_first - only_second
    return {"n": n, "only_in_first_file": len(items) - n, "only_in_second_file": len(others) - n,
            "accuracy": [(both + only_first) / n, (both + only_second) / n], "difference": (only_first - only_second) / n,
            "ci95": list(paired_wilson(both, only_first, only_second, neither)),
            "bootstrap95": list(bootstrap_mean([float(a["correct"]) - float(b["correct"]) for a, b in pairs])),
            "mcnemar": {"both": both, "only_first": only_first, "only_second": only_second, "neither": neither,
                        "p": mcnemar(only_first, only_second)}}
