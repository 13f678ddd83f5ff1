"""Every pair of strategies of a model, and of models on a strategy, compared on the same problems: the table that results.json
keeps of them, with p adjusted for how many there are.
"""
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from stages.evals.scoring import SAMPLED, clusters_of, equal_votes, shares
from stages.evals.statistics import compare, holm

Records = Sequence[Mapping[str, Any]]
Cells = Mapping[tuple[str, str, str], Records]  # by model, task, strategy
ORDER = ("direct", "few_shot", "zero_shot_cot", "few_shot_cot", SAMPLED, "self_consistency")  # the later is `a`; others come after these


def aligned(sides: Sequence[Records], where: str) -> list[list[Mapping[str, Any]]]:
    """The records of each side in the order of the first. Raises ValueError unless all answer the same problems."""
    by_id = [{r["id"]: r for r in records} for records in sides]
    for other in by_id[1:]:
        if other.keys() != by_id[0].keys():
            odd = sorted(map(str, other.keys() ^ by_id[0].keys()))
            raise ValueError(f"{where}: {len(odd)} problems were asked of one strategy and not of another, such as {odd[0]!r}; compare "
                             "cells of one run, which asks all of them the same problems")
    return [[side[i] for i in by_id[0]] for side in by_id]


def pairs(cells: Cells) -> list[dict[str, Any]]:
    """One row a pair and task: `a`, `b` ("model/strategy"), what `statistics.compare` says of a - b, and `p_holm`.

    Pairs are two strategies of one model, or two models on one strategy. A vote's chains also stand alone, as `sampled_cot`. The
    family that Holm's adjustment covers is the whole table (`family` rows), for a reader looks through all of it for what stands out.
    Questions are clustered by their template where rows name one.
    """
    sides: dict[tuple[str, str, str], tuple[Records, list[float] | None]] = {}
    for (model, task, strategy), records in cells.items():
        sides[model, task, strategy] = records, None
        if equal_votes(strategy, records):
            sides[model, task, SAMPLED] = records, shares(records)
    models = list(dict.fromkeys(model for model, _, _ in sides))

    def rank(key: tuple[str, str, str]) -> tuple[int, int, str]:
        model, _, strategy = key
        return models.index(model), ORDER.index(strategy) if strategy in ORDER else len(ORDER), strategy

    found = []
    for task in dict.fromkeys(task for _, task, _ in sides):
        for first, second in combinations(sorted((key for key in sides if key[1] == task), key=rank), 2):
            if first[0] == second[0] or first[2] == second[2]:
                found.append({"a": f"{second[0]}/{second[2]}", "b": f"{first[0]}/{first[2]}", "task": task,
                              **_compared(sides[second], sides[first], f"{task}, {second[0]}/{second[2]} and {first[0]}/{first[2]}")})
    adjusted = holm([row["p"] for row in found])
    return [{**row, "p_holm": p, "family": len(found)} for row, p in zip(found, adjusted, strict=True)]


def _compared(a: tuple[Records, list[float] | None], b: tuple[Records, list[float] | None], where: str) -> dict[str, Any]:
    (records, first), (others, second) = a, b
    aligned([records, others], where)
    right_a, right_b = ({r["id"]: float(r["correct"]) if share is None else share[i] for i, r in enumerate(rows)}
                        for rows, share in ((records, first), (others, second)))
    return compare([right_a[r["id"]] for r in records], [right_b[r["id"]] for r in records], clusters_of(records))
