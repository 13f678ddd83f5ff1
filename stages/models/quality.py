"""What is measured of a reward model for reward/gate.py to judge: on held-out rankings, and on fresh samples of the policy.

Scores and ranks come as one list a prompt; `keys` name the prompts, so that equal ones never stand on both sides of a fit.
"""
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from reward.baselines import against_baselines
from reward.calibration import (
    Accuracy,
    Figure,
    accuracy,
    accuracy_by,
    accuracy_by_distance,
    accuracy_by_length,
    accuracy_difference,
    calibration,
    fitted,
    judged,
    length_correlation,
    together,
)
from reward.model import Group, min_token_logprobs
from reward.sensitivity import sensitivity
from reward.verifiers import dense_ranks, gold_score
from stages.data.curriculum import WORKED, user_turn
from stages.data.tokenizer import chat_ids
from stages.models.ranking import shared_out
from stages.models.responses import stop_ids
from stages.run.manifest import metric

FITTING, SHAKEN = 20, 150  # prompts with a pair that cross-fitting needs; prompts whose responses are rewritten
Lists = Sequence[Sequence[float]]


def as_metric(a: Accuracy | Figure) -> dict[str, Any]:
    return metric(a.value, n=a.n, ci95=(a.low, a.high))


def comparable(ranks: Sequence[Sequence[int]], keys: Sequence[Hashable]) -> list[int]:
    """Places of the prompts that have a pair, none if they are too few to fit anything across them."""
    places = [i for i, r in enumerate(ranks) if len(set(r)) > 1]
    return places if len({keys[i] for i in places}) >= FITTING else []


def quality(scores: Lists, ranks: Sequence[Sequence[int]], name: str, keys: Sequence[Hashable],
            groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, dict]:
    """Accuracy overall, by rank distance and by each of `groups` (such as `annotator`: the name of each ranking's) that has several
    kinds; how far sigmoid(difference) can be taken as a probability, as it is and after a temperature was fitted on other prompts."""
    metrics = {f"{name}_accuracy": as_metric(accuracy(together(judged(scores, ranks), keys)))}
    metrics |= {f"{name}_accuracy_distance_{d}": as_metric(a) for d, a in accuracy_by_distance(scores, ranks, keys).items()}
    for group, names in (groups or {}).items():
        if len(set(names)) > 1:
            metrics |= {f"{name}_accuracy/{group}={kind}": as_metric(a) for kind, a in accuracy_by(names, scores, ranks, keys).items()}
    found = {"": calibration(scores, ranks, keys=keys)}
    if places := comparable(ranks, keys):
        some, theirs = [scores[i] for i in places], [ranks[i] for i in places]
        own = [keys[i] for i in places]
        found["_fitted"] = calibration(fitted(some, theirs, own)[0], theirs, keys=own)
    for end, c in found.items():
        metrics |= {f"{name}_ece{end}": metric(c.ece, n=c.n, ci95=c.ece_interval),
                    f"{name}_brier{end}": metric(c.brier, n=c.n, ci95=c.brier_interval)}
    return metrics


def shortcuts(scores: Lists, ranks: Sequence[Sequence[int]], texts: Sequence[Sequence[str]], lengths: Sequence[Sequence[int]],
              keys: Sequence[Hashable], train: tuple[Sequence[Sequence[str]], Sequence[Sequence[int]]] | None = None) -> dict[str, dict]:
    """How far the model goes by length, and what it leads judges by that know nothing. They learn from `train`, responses and ranks of
    other prompts, or without it from the other folds of what is measured."""
    figures: dict[str, Accuracy | Figure] = {
        f"accuracy_{kind}_better": a for kind, a in accuracy_by_length(scores, ranks, lengths, keys).items()}
    if any(len(set(row)) > 1 and len(set(s)) > 1 for row, s in zip(lengths, scores, strict=True)):
        figures["length_correlation"] = length_correlation(scores, lengths, keys)
    if train or (places := comparable(ranks, keys)):
        places = list(range(len(ranks))) if train else places
        figures |= against_baselines([scores[i] for i in places], [ranks[i] for i in places], [texts[i] for i in places],
                                     [keys[i] for i in places], train=train)
    return {name: as_metric(a) for name, a in figures.items()}


def measure_fresh(judge: Callable[[list[Group]], list[list[float]]], scores: Lists, std: float, lm, tokenizer, problems: list[dict],
                  groups: list[Group]) -> tuple[dict[str, dict], list[list[int]]]:
    """Quality and shortcuts on new samples of the SFT model, ranked by the gold score, beside the model's own surprise; and what
    rewrites that change nothing do to the score. The gold ranks beside. `scores` are those of `judge`, `std` is that of the scores of
    SFT samples."""
    eos_ids = stop_ids(lm)
    texts = [tokenizer.batch_decode(responses, skip_special_tokens=True) for _, responses in groups]
    ranks = [dense_ranks([gold_score(problem, text, finished=ids[-1] in eos_ids).score for text, ids in zip(row, responses, strict=True)])
             for problem, row, (_, responses) in zip(problems, texts, groups, strict=True)]
    surprise = judged(shared_out(lm, groups, min_token_logprobs), ranks)
    lead, low, high = accuracy_difference(judged(scores, ranks), surprise)

    def rescored(rows: list[list[str]]) -> list[list[float]]:
        asked = [[{"role": "user", "content": user_turn(problem["question"], WORKED)}] for problem in problems]
        return judge([(prompt, [chat_ids(tokenizer, [*messages, {"role": "assistant", "content": text.strip()}])[len(prompt):]
                                for text in row]) for messages, (prompt, _), row in zip(asked, groups, rows, strict=False)])

    keys = [tuple(prompt) for prompt, _ in groups]
    shaken = sensitivity(rescored, texts[:SHAKEN], ranks[:SHAKEN], std=std)
    return quality(scores, ranks, "fresh", keys) | {
        "baseline_min_logprob_accuracy": as_metric(accuracy(surprise)),
        "gain_over_min_logprob": metric(lead, n=sum(map(len, surprise)), ci95=(low, high))} | shortcuts(
            scores, ranks, texts, [[len(ids) for ids in responses] for _, responses in groups], keys) | {
                name: as_metric(figure) for name, figure in shaken.items()}, ranks
