"""How far annotators agree, with each other and with themselves, and what sways them apart from the responses.

Everything here is a pure function of records (reward/preferences.py); skipped ones say nothing. Rankings are compared where the same
responses of the same prompt were ranked by the same criterion, in whatever order the records hold them. An annotator's first
ranking of a set counts; later ones say how consistent the annotator is. Intervals are over prompts, because the pairs of one
prompt share responses; they take the annotators as given, and say nothing about other annotators.
"""
import datetime
import json
import math
from collections.abc import Iterable, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np

from reward.calibration import Accuracy, accuracy
from reward.preferences import NOBODY, Record, pairs

Sets = dict[tuple[str, ...], dict[str, list[Record]]]
UNKNOWN = datetime.datetime.min.replace(tzinfo=datetime.UTC)
BOOTSTRAP_CHUNK = 100  # resamples at a time, to bound memory


class Alpha(NamedTuple):
    """`value` over `n` rankings of `num_prompts` prompts; `low` and `high` are its 95 % interval."""

    value: float
    n: int
    num_prompts: int
    low: float
    high: float


class Repeats(NamedTuple):
    """Rankings of a set that its annotator had ranked before: all, those just like the one before, those that reverse a pair of it."""

    again: int
    duplicated: int
    contradicting: int


class Comparison(NamedTuple):
    """Two annotators on one set: 1 for each pair of responses ordered alike, 0 for a reversed one, 1/2 where only one ties."""

    prompt: str
    annotators: tuple[str, str]
    time: datetime.datetime | None
    outcomes: list[float]


class Window(NamedTuple):
    """Agreement of the comparisons that became possible from `start` to `end` (when the later of the two had ranked)."""

    start: datetime.datetime
    end: datetime.datetime
    agreement: Accuracy | None


def ranked_sets(records: Iterable[Record]) -> Sets:
    """For each (prompt, criterion, *responses sorted) what each annotator ranked, in order of time where it is known.

    Rankings of nobody known are left out: two of them may be one person's or two people's, so they tell of neither.
    """
    sets: Sets = {}
    for record in sorted((r for r in records if r.get("ranks")), key=lambda r: moment(r) or UNKNOWN):
        if record.get("annotator", NOBODY) == NOBODY:
            continue
        key = (json.dumps(record["prompt"], sort_keys=True), record.get("criterion") or "overall", *sorted(record["responses"]))
        sets.setdefault(key, {}).setdefault(record["annotator"], []).append(record)
    return sets


def moment(record: Record) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(record["time"]) if record.get("time") else None


def midranks(record: Record) -> list[float]:
    """Ranks in the order of the sorted responses, ties sharing their mean place: both (1, 1, 3) and (1, 1, 2) give (1.5, 1.5, 3)."""
    ranks = [record["ranks"][i] for i in sorted(range(len(record["ranks"])), key=record["responses"].__getitem__)]
    return [sum(other < r for other in ranks) + (ranks.count(r) + 1) / 2 for r in ranks]


def krippendorff_alpha(units: Sequence[Sequence[float]]) -> float:
    """Krippendorff's alpha for ordinal data (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections C and D).

    `units` holds for each unit the values that its observers gave, in any order; what is missing is not in it, and units with
    fewer than two values do not count. 1 is perfect agreement, 0 what chance gives. Raises ValueError when alpha is not defined:
    no unit with two values, or only one value anywhere.
    """
    values = sorted({v for unit in units if len(unit) > 1 for v in unit})
    if len(values) < 2:
        raise ValueError(f"alpha needs units with two values and values that differ: the values are {values}")
    index = {v: i for i, v in enumerate(values)}
    return float(alpha_of(np.sum([coincidences([index[v] for v in unit], len(values)) for unit in units if len(unit) > 1], axis=0)))


def coincidences(unit: Sequence[int], size: int) -> np.ndarray:
    """(size, size): ordered pairs of the unit's values (indices) by different observers, each weighing 1 / (values - 1)."""
    counts = np.bincount(np.asarray(unit, dtype=int), minlength=size).astype(float)
    return (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1) if len(unit) > 1 else np.zeros((size, size))


def alpha_of(matrix: np.ndarray) -> np.ndarray:
    """Ordinal alpha of coincidence matrices: (...) from (..., V, V), values ascending; nan where not defined.

    The ordinal distance of two values is the number of values between them, of each end half: the difference of their
    positions in the cumulative count.
    """
    count = matrix.sum(-1)
    n = count.sum(-1)
    position = np.cumsum(count, -1) - count / 2
    distance = (position[..., :, None] - position[..., None, :]) ** 2
    observed = (matrix * distance).sum((-1, -2))
    expected = (count[..., :, None] * count[..., None, :] * distance).sum((-1, -2)) / np.maximum(n - 1, 1)
    return 1 - np.divide(observed, expected, out=np.full_like(observed, np.nan), where=expected > 0)


def ranking_alpha(records: Iterable[Record], *, samples: int = 1000, seed: int = 0) -> Alpha | None:
    """Krippendorff's alpha of rankings, with a percentile bootstrap over prompts (all rankings of a prompt are drawn together).

    A response is a unit and its midrank the value. Sets of different size are kept apart, and alpha is their mean, weighted by
    values: ranks of 2 and ranks of 8 in one table would agree by the size of their set alone. None when no set was ranked
    by two annotators, or everything ties. With one prompt the interval is (-1, 1): nothing is known.
    """
    tables: dict[int, list[np.ndarray]] = {}
    owners: dict[int, list[int]] = {}
    prompts: dict[str, int] = {}
    n = 0
    for (prompt, *_), annotators in ranked_sets(records).items():
        if len(annotators) < 2:
            continue
        ranks = [midranks(rankings[0]) for rankings in annotators.values()]
        size = len(ranks[0])
        units = [[round(2 * value) - 2 for value in unit] for unit in zip(*ranks, strict=True)]
        tables.setdefault(size, []).append(np.sum([coincidences(unit, 2 * size - 1) for unit in units], axis=0))
        owners.setdefault(size, []).append(prompts.setdefault(prompt, len(prompts)))
        n += len(ranks)
    stacked = {size: np.stack(part).reshape(len(part), -1) for size, part in tables.items()}

    def pooled(counts: np.ndarray) -> np.ndarray:
        """(B,) alphas when each prompt is there so often: counts (B, prompts)."""
        total, weight = np.zeros(len(counts)), np.zeros(len(counts))
        for size, part in stacked.items():
            matrices = (counts[:, owners[size]] @ part).reshape(len(counts), 2 * size - 1, 2 * size - 1)
            alphas, values = alpha_of(matrices), matrices.sum((-1, -2))
            there = ~np.isnan(alphas)
            total[there] += alphas[there] * values[there]
            weight[there] += values[there]
        return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)

    value = float(pooled(np.ones((1, len(prompts))))[0]) if prompts else math.nan
    if math.isnan(value):
        return None
    if len(prompts) == 1:
        return Alpha(value, n, 1, -1.0, 1.0)
    rng = np.random.default_rng(seed)
    share = np.full(len(prompts), 1 / len(prompts))
    drawn = np.concatenate([pooled(rng.multinomial(len(prompts), share, size=min(BOOTSTRAP_CHUNK, samples - start)).astype(float))
                            for start in range(0, samples, BOOTSTRAP_CHUNK)])
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Alpha(value, n, len(prompts), float(low), float(high))


def ordered_alike(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """For each pair of responses 1 if both rankings order it alike, 0 if they reverse it, 1/2 if only one ties; both tied is left out."""
    found = []
    for i, j in combinations(range(len(first)), 2):
        a, b = np.sign(first[j] - first[i]), np.sign(second[j] - second[i])
        if a or b:
            found.append(0.5 + 0.5 * float(a * b))
    return found


def comparisons(records: Iterable[Record]) -> list[Comparison]:
    """Every two annotators on every set that both ranked."""
    found = []
    for (prompt, *_), annotators in ranked_sets(records).items():
        for one, other in combinations(sorted(annotators), 2):
            a, b = annotators[one][0], annotators[other][0]
            times = [moment(a), moment(b)]
            later = max(t for t in times if t) if all(times) else None
            found.append(Comparison(prompt, (one, other), later, ordered_alike(midranks(a), midranks(b))))
    return found


def share(outcomes: Iterable[tuple[str, list[float]]]) -> Accuracy | None:
    """Mean outcome with its interval over prompts (calibration.accuracy), from (prompt, outcomes); None without any."""
    groups: dict[str, list[float]] = {}
    for prompt, part in outcomes:
        groups.setdefault(prompt, []).extend(part)
    return accuracy(list(groups.values())) if any(groups.values()) else None


def pairwise_agreement(found: Sequence[Comparison]) -> Accuracy | None:
    """Share of pairs of responses that two annotators order alike. Without ties two who guess agree on a half."""
    return share((c.prompt, c.outcomes) for c in found)


def agreement_by_annotator(found: Sequence[Comparison]) -> dict[str, Accuracy | None]:
    """Each annotator against all others."""
    names = sorted({name for c in found for name in c.annotators})
    return {name: pairwise_agreement([c for c in found if name in c.annotators]) for name in names}


def agreement_over_time(found: Sequence[Comparison], windows: int = 5) -> list[Window]:
    """Agreement in order of time, in windows of equally many comparisons. Comparisons without both times are not in any."""
    timed = sorted(((c.time, c) for c in found if c.time), key=lambda pair: pair[0])
    cuts = [round(k * len(timed) / windows) for k in range(windows + 1)]
    return [Window(timed[start][0], timed[end - 1][0], pairwise_agreement([c for _, c in timed[start:end]]))
            for start, end in pairwise(cuts) if end > start]


def position_bias(records: Iterable[Record]) -> Accuracy | None:
    """Share of preferences for the one of two responses that was shown earlier; 1/2 without bias, if the order was random.

    None when nothing says in which order the responses were shown, or all were shown as they are in the record: an order that
    was not drawn by chance may follow quality, and then the share says nothing.
    """
    shown = [r for r in records if r.get("ranks") and r.get("order")]
    if all(r["order"] == sorted(r["order"]) for r in shown):
        return None
    return share((json.dumps(r["prompt"]), [float(r["order"].index(better) < r["order"].index(worse)) for better, worse, _ in
                                            pairs(r["ranks"])]) for r in shown)


def length_bias(records: Iterable[Record]) -> Accuracy | None:
    """Share of preferences for the longer of two responses, in characters; of equal length are left out.

    More than 1/2 is a bias only as far as longer responses are not better.
    """
    return share((json.dumps(r["prompt"]), [float(len(r["responses"][better]) > len(r["responses"][worse]))
                                            for better, worse, _ in pairs(r["ranks"])
                                            if len(r["responses"][better]) != len(r["responses"][worse])])
                 for r in records if r.get("ranks"))


def inconsistency(records: Iterable[Record]) -> Accuracy | None:
    """Share of pairs that an annotator orders otherwise when ranking the same set again; a tie in one of the two counts half."""
    return share((prompt, [1 - o for before, after in pairwise(rankings) for o in ordered_alike(midranks(before), midranks(after))])
                 for (prompt, *_), annotators in ranked_sets(records).items() for rankings in annotators.values())


def repeats(records: Iterable[Record]) -> Repeats:
    """How many rankings repeat one, how many of these exactly, and how many contradict the one before."""
    again = duplicated = contradicting = 0
    for annotators in ranked_sets(records).values():
        for rankings in annotators.values():
            for before, after in pairwise(map(midranks, rankings)):
                again += 1
                duplicated += before == after
                contradicting += 0.0 in ordered_alike(before, after)
    return Repeats(again, duplicated, contradicting)


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Every figure of this page that the records allow, by name: Alpha or Accuracy, each with value, n and interval."""
    compared = comparisons(records)
    each = agreement_by_annotator(compared)
    windows = agreement_over_time(compared)
    found = {"agreement_alpha": ranking_alpha(records), "agreement_pairs": pairwise_agreement(compared),
             **({f"agreement_pairs/{name}": figure for name, figure in each.items()} if len(each) > 2 else {}),
             **({f"agreement_pairs_window_{k}": window.agreement for k, window in enumerate(windows, 1)} if len(windows) > 1 else {}),
             "first_shown_preferred": position_bias(records), "longer_preferred": length_bias(records),
             "changed_when_asked_again": inconsistency(records)}
    return {name: figure for name, figure in found.items() if figure}
