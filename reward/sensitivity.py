"""How far a score moves when nothing that matters changes: boilerplate appended, white space and punctuation, the same said otherwise.

Rewrites that keep meaning or rank are what reward models were found brittle under (Wu et al. 2025, reWordBench).
"""
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from prompts.intervals import mean_interval
from reward.calibration import Accuracy, Figure, Ranks, Scores, accuracy
from reward.preferences import pairs


class Rewrite(NamedTuple):
    """`change` gives the text itself where it has nothing to change. With `only_worse`, a pair's better response is left as it is: the
    question is whether the worse one can buy its way past it."""

    change: Callable[[str], str]
    only_worse: bool = False


BOILERPLATE = " I hope this helps!"


def said_otherwise(text: str) -> str:
    """`The answer is 7.` becomes `So the answer is 7.`, and the other way round."""
    if re.search(r"\bSo the answer is\b", text):
        return re.sub(r"\bSo the answer is\b", "The answer is", text)
    return re.sub(r"\bThe answer is\b", "So the answer is", text)


REWRITES = {
    "boilerplate": Rewrite(lambda text: text.rstrip() + BOILERPLATE, only_worse=True),
    "whitespace": Rewrite(lambda text: re.sub(r"(?<=[.!?]) (?=\S)", "  ", text)),
    "punctuation": Rewrite(lambda text: text[:-1] if text.endswith(".") else text + "." if text[-1:].isalnum() else text),
    "wording": Rewrite(said_otherwise)}


def sensitivity(score: Callable[[list[list[str]]], Scores], responses: Sequence[Sequence[str]], ranks: Ranks, *, std: float,
                rewrites: dict[str, Rewrite] = REWRITES) -> dict[str, Accuracy | Figure]:
    """For each rewrite, how far scores move and how often the order of a pair turns.

    `score` takes texts, one list a prompt, and gives their scores in the same lists; `std` is the standard deviation of the scores of
    SFT samples. `score_shift_<name>` is the mean move of a rewritten response and `score_move_<name>` the mean size of it, in those
    (n: responses that the rewrite changes; the interval is over prompts). `flip_rate_<name>` is of the pairs that were ordered right
    the share that are not (equal scores: half) once one of the two is rewritten; each pair counts for each of its responses that the
    rewrite changes (n). A figure that nothing was there for is left out. Raises ValueError when `std` is not above 0.
    """
    if not std > 0:
        raise ValueError(f"std is {std}: give the standard deviation of the scores of SFT samples, above 0")
    before = score([list(row) for row in responses])
    figures: dict[str, Accuracy | Figure] = {}
    for name, rewrite in rewrites.items():
        texts = [[rewrite.change(text) for text in row] for row in responses]
        after = score(texts)
        changed = [[new != old for new, old in zip(a, b, strict=True)] for a, b in zip(texts, responses, strict=True)]
        moves = [[(y - x) / std for x, y, moved in zip(b, a, m, strict=True) if moved]
                 for b, a, m in zip(before, after, changed, strict=True)]
        if sum(map(bool, moves)) > 1:
            figures[f"score_shift_{name}"] = mean_of_prompts(moves)
            figures[f"score_move_{name}"] = mean_of_prompts([[abs(move) for move in row] for row in moves])
        flips = [[turned(left, right) for i, j, _ in pairs(list(r)) if b[i] > b[j] for left, right, is_new in
                  ((b[i], a[j], m[j]), (a[i], b[j], m[i] and not rewrite.only_worse)) if is_new]
                 for r, b, a, m in zip(ranks, before, after, changed, strict=True)]
        if any(flips):
            figures[f"flip_rate_{name}"] = accuracy(flips)
    return figures


def turned(better: float, worse: float) -> float:
    return 1.0 if better < worse else 0.5 if better == worse else 0.0


def mean_of_prompts(rows: Sequence[Sequence[float]]) -> Figure:
    """Mean over prompts of each one's mean, with its interval by Student's t; n counts all values. Prompts without any are left out."""
    mean, low, high = mean_interval([math.fsum(row) / len(row) for row in rows if row])
    return Figure(mean, sum(map(len, rows)), low, high)
