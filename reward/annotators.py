"""Simulated annotators: judges who rank by the gold score, with errors that are known because they were put in.

They stand in for people on machines without people. Whatever is ranked here says so: `annotator` starts with `simulated`, names
every error, and `simulated` is true in every record, so that no figure passes for human judgement. Against known errors the
measures of reward/agreement.py can be tested, and a reward model can be trained on labels of a known quality.
"""
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from reward.verifiers import dense_ranks

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How a simulated annotator judges a pair, each pair on its own.

    With probability `position_bias` the response shown first is preferred, with probability `length_bias` the one with more
    characters (of equal length: neither, so gold decides); else the gold score decides, the wrong way round with probability
    `error_rate`, and equal gold is judged equal. Asked about a pair again, the annotator judges as before (position by the
    new order) and then reverses the judgement with probability `inconsistency`.

    So of two responses of different gold, shown in random order, the first is preferred with probability
    (1 + position_bias) / 2, and of two of the same length the better with (1 + (1 - position_bias) (1 - 2 error_rate)) / 2.
    Raises ValueError for rates that are no probabilities, and above a half for those that would mean the opposite.
    """

    error_rate: float = 0.0
    position_bias: float = 0.0
    length_bias: float = 0.0
    inconsistency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("error_rate", "inconsistency"):
            if not 0 <= getattr(self, name) <= 0.5:
                raise ValueError(f"{name} {getattr(self, name)} is not between 0 and 0.5: 0.5 is already a judge who guesses")
        if min(self.position_bias, self.length_bias) < 0 or self.position_bias + self.length_bias > 1:
            raise ValueError(f"position_bias {self.position_bias} and length_bias {self.length_bias}: give shares of the judgements, "
                             "0 or more, that sum to at most 1")


def annotator_name(error_rate: float, position_bias: float = 0.0, length_bias: float = 0.0, inconsistency: float = 0.0, *,
                   number: int = 0, of: int = 1) -> str:
    """The annotator's name with all of its errors, and which of several it is (`number` from 0)."""
    biases = {"position bias": position_bias, "length bias": length_bias, "inconsistency": inconsistency}
    return (f"simulated: gold score, error rate {error_rate:g}" + "".join(f", {name} {rate:g}" for name, rate in biases.items() if rate)
            + (f", annotator {number + 1} of {of}" if of > 1 else ""))


def simulated_ranks(gold: Sequence[float], errors: Errors, *, row_id: str, seed: int = 0, annotator: int = 0, again: int = 0,
                    order: Sequence[int] | None = None, lengths: Sequence[int] | None = None) -> list[int]:
    """Ranks of K responses as a fallible judge gives them (simulated; 1 is best, equal numbers tie).

    The judge compares every pair (see Errors); the ranking orders the responses by pairs won, half a win for a tie (Copeland
    1951), so without errors it is the order of the gold scores, and with errors neighbours swap more often than the best and
    the worst. `order` names the responses as shown, first to last (default: as given), `lengths` their characters (needed for
    a length bias), `annotator` which of several judges, `again` how often this one was asked before. All chance depends on
    the seed, the row's id and the annotator alone, not on the order of rows.
    """
    assert lengths is not None or not errors.length_bias, "a length bias needs lengths"
    who = f"{seed}:{row_id}" + (f":annotator {annotator}" if annotator else "")
    rng, biased, changing = random.Random(who), random.Random(f"{who}:bias"), random.Random(f"{who}:again {again}")
    place = {response: position for position, response in enumerate(order if order is not None else range(len(gold)))}
    wins = [0.0] * len(gold)
    for i, j in combinations(range(len(gold)), 2):
        wrong = rng.random() < errors.error_rate  # drawn for every pair, so that one pair's gold does not move another's error
        draw, changed = biased.random(), changing.random() < errors.inconsistency
        if draw < errors.position_bias:
            winner = i if place[i] < place[j] else j
        elif draw < errors.position_bias + errors.length_bias and lengths and lengths[i] != lengths[j]:
            winner = i if lengths[i] > lengths[j] else j
        elif abs(gold[i] - gold[j]) <= 1e-9:
            wins[i] += 0.5
            wins[j] += 0.5
            continue
        else:
            winner = i if (gold[i] > gold[j]) != wrong else j
        wins[i + j - winner if again and changed else winner] += 1
    return dense_ranks(wins)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Several simulated annotators with the same errors, independent of one another.

    All rank a share `overlap` of the prompts, one of them each other prompt; everyone is asked again about a share
    `repeat_share` of what they ranked, with another id. Raises ValueError for shares that are none, and for an inconsistency
    that could not show because nobody is asked again.
    """

    errors: Errors
    annotators: int = 1
    overlap: float = 1.0
    repeat_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.annotators < 1 or not 0 <= self.overlap <= 1 or not 0 <= self.repeat_share <= 1:
            raise ValueError(f"annotators {self.annotators}, overlap {self.overlap}, repeat_share {self.repeat_share}: expected one "
                             "annotator or more and shares between 0 and 1")
        if self.errors.inconsistency and not self.repeat_share:
            raise ValueError(f"inconsistency {self.errors.inconsistency} shows only when annotators are asked again: set repeat_share")

    @property
    def plain(self) -> bool:
        """One annotator who does not look at the order: then responses are shown as they were drawn."""
        return self.annotators == 1 and not self.errors.position_bias and not self.repeat_share

    def rank(self, row_id: str, texts: Sequence[str], gold: Sequence[float]) -> list[Record]:
        """What the annotators add to the record of one prompt: id, ranks, annotator, simulated, order. Shown in random order."""
        chance = random.Random(f"panel:{self.seed}:{row_id}")
        everyone, one = chance.random() < self.overlap, chance.randrange(self.annotators)
        rankings = []
        for number in range(self.annotators) if everyone else [one]:
            rng = random.Random(f"order:{self.seed}:{row_id}:{number}")
            for again in range(2 if rng.random() < self.repeat_share else 1):
                order = list(range(len(texts)))
                if not self.plain:
                    rng.shuffle(order)
                ranks = simulated_ranks(gold, self.errors, row_id=row_id, seed=self.seed, annotator=number, again=again, order=order,
                                        lengths=[len(t) for t in texts])
                rankings.append({"id": row_id + (":again" if again else ""), "ranks": ranks, "simulated": True, "order": order,
                                 "annotator": annotator_name(**vars(self.errors), number=number, of=self.annotators)})
        return rankings
