"""What accuracy costs: strategies as points and votes as curves over all tokens that a question takes, and models over FLOPs.

Pure functions of the records that an evaluation leaves (`scoring.record`). A *point* is a strategy with what it got right and what it
spent on each question; the chains of self-consistency make one for each number K of them, a *curve*. n: questions; K: chains.
"""
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prompts.answers import normalize
from prompts.intervals import mean_interval, share_interval, wilson
from prompts.voting import count
from stages.evals.pairs import Cells, Records, aligned
from stages.evals.scoring import clusters_of, equal_votes
from stages.evals.statistics import compare, maj_at_k
from stages.run.figures import short


@dataclass(frozen=True, kw_only=True)
class Point:
    """`right`: each question's 0/1, or probability that a vote of `k` is right; `prompt` and `generated`: the tokens it took, all
    requests together. `prompt` is None where records do not say. Arrays of shape (n,), float64."""

    strategy: str
    k: int | None
    right: NDArray
    prompt: NDArray | None
    generated: NDArray

    def tokens(self, with_prompt: bool) -> NDArray:
        return self.generated + self.prompt if with_prompt and self.prompt is not None else self.generated


def points_of(strategy: str, records: Records) -> list[Point]:
    """The point of a strategy's records; of self-consistency, with equally many chains to every question, one for each K.

    A record's `cost` is its ledger (critique, valuation and extraction included); without it the samples' tokens are summed, and prompts
    stay unknown. K of N chains cost K/N of the question's tokens, prompts too (each request reads its own), and are right with the
    probability of `maj_at_k`: at K = N this is the recorded vote, but for what the recorded order decided there: ties, and which of the
    ways of writing the winner stands for it (24 can be made of the right numbers or of others).
    """
    costs = [r.get("cost") for r in records]
    generated = np.asarray([c["generated_tokens"] if c else sum(s["tokens"] for s in r["samples"])
                            for r, c in zip(records, costs, strict=True)], dtype=np.float64)
    prompt = np.asarray([c["prompt_tokens"] for c in costs if c], dtype=np.float64) if all(costs) else None
    if not equal_votes(strategy, records):
        right = np.asarray([float(r["correct"]) for r in records])
        return [Point(strategy=strategy, k=None, right=right, prompt=prompt, generated=generated)]
    num = len(records[0]["samples"])
    won = np.asarray([_votes(r) for r in records])
    return [Point(strategy=strategy, k=k, right=won[:, k - 1], prompt=None if prompt is None else prompt * k / num,
                  generated=generated * k / num) for k in range(1, num + 1)]


def _votes(record: Mapping[str, Any]) -> list[float]:
    type = record.get("answer_type")
    counts, _, abstained = count([sample["answer"] for sample in record["samples"]], type)
    right: Counter[str] = Counter()
    for sample in record["samples"]:
        right[normalize(sample["answer"] or "", type)] += sample["correct"]
    return maj_at_k([(number, right[form] / number) for form, number in counts.items()], abstained)


def pareto(costs: ArrayLike, accuracy: Sequence[float]) -> list[bool]:
    """Which points no other beats: none costs at most as much in every respect and gets at least as much right, one of them strictly.

    `costs` holds one or more figures a point. Equal points do not beat one another.
    """
    spent, got = np.asarray(costs, dtype=np.float64).reshape(len(accuracy), -1), np.asarray(accuracy, dtype=np.float64)
    no_worse = np.all(spent[:, None] <= spent[None], axis=-1) & (got[:, None] >= got[None])  # (by, point)
    better = np.any(spent[:, None] < spent[None], axis=-1) | (got[:, None] > got[None])
    return [bool(x) for x in ~np.any(no_worse & better, axis=0)]


def pareto_shares(points: Sequence[Point], with_prompt: bool, *, seed: int = 0, resamples: int = 500) -> list[float]:
    """In what share of bootstrap draws over questions each point is in the Pareto set: how far its place there is luck."""
    n = len(points[0].right)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    got = drawn @ np.stack([p.right for p in points], axis=1)
    spent = drawn @ np.stack([p.tokens(with_prompt) for p in points], axis=1)
    kept = np.asarray([pareto(s, list(g)) for s, g in zip(spent, got, strict=True)])
    return [float(share) for share in kept.mean(axis=0)]


def at_budget(curve: Sequence[Point], budget: float, with_prompt: bool) -> tuple[float, NDArray] | None:
    """(K, each question's chance to be right) for a vote that spends `budget` tokens a question on average, None outside the curve.

    Between K and K + 1 it is a mixture: K + 1 chains to a share of the questions, K to the others, which costs and gets exactly what
    lies on the line between the two, so nothing is assumed of a curve that was not measured. Nothing is extrapolated.
    """
    costs = [float(p.tokens(with_prompt).mean()) for p in curve]
    if not costs or not costs[0] <= budget <= costs[-1]:
        return None
    i = max(j for j, c in enumerate(costs) if c <= budget)
    if i == len(costs) - 1 or costs[i + 1] == costs[i]:
        return float(curve[i].k or 1), curve[i].right
    share = (budget - costs[i]) / (costs[i + 1] - costs[i])
    return (curve[i].k or 1) + share, (1 - share) * curve[i].right + share * curve[i + 1].right


def frontier(cells: Mapping[str, Records], where: str = "") -> dict[str, Any]:
    """Accuracy against tokens of one model's strategies on one task: `points`, with intervals, Pareto set and how sure it is, and
    `matched`: each strategy against a vote that spends as many tokens (paired; `k` is how many chains that buys).

    `counted` says which tokens `tokens` are: prompt and generated, or generated alone where some records do not hold the cost of
    their prompts (both are given apart in any case). A strategy cheaper than one chain or dearer than all of them has no match:
    `unmatched` names it. Questions are clustered by their template where rows name one.
    Raises ValueError unless all strategies answer the same problems.
    """
    records = dict(zip(cells, aligned(list(cells.values()), where), strict=True))
    some = next(iter(records.values()))
    clusters = clusters_of(some)
    points = [p for strategy, rows in records.items() for p in points_of(strategy, rows)]
    with_prompt = all(p.prompt is not None for p in points)
    means = [float(p.tokens(with_prompt).mean()) for p in points]
    best = pareto(means, [float(p.right.mean()) for p in points])
    shares = pareto_shares(points, with_prompt)
    shown = []
    for p, mean, kept, share in zip(points, means, best, shares, strict=True):
        shown.append({"strategy": p.strategy, "k": p.k, **_accuracy(p.right, clusters), "n": len(p.right), "tokens": mean,
                      "tokens_ci95": _ends(p.tokens(with_prompt)), "prompt_tokens": None if p.prompt is None else float(p.prompt.mean()),
                      "generated_tokens": float(p.generated.mean()), "pareto": kept, "pareto_share": share})
    curve = [p for p in points if p.k is not None]
    matched, unmatched = [], []
    for p, mean in zip(points, means, strict=True):
        if p.k is not None or not curve:
            continue
        if (vote := at_budget(curve, mean, with_prompt)) is None:
            unmatched.append(p.strategy)
            continue
        matched.append({"strategy": p.strategy, "against": curve[0].strategy, "tokens": mean, "k": vote[0],
                        "accuracy": float(p.right.mean()), "against_accuracy": float(vote[1].mean()),
                        **compare(p.right.tolist(), vote[1].tolist(), clusters)})
    return {"counted": "prompt and generated" if with_prompt else "generated", "n": len(some), "points": shown, "matched": matched,
            "unmatched": unmatched}


def _accuracy(right: NDArray, clusters: Sequence[Any] | None) -> dict[str, Any]:
    values = right.tolist()
    if clusters is None and set(values) <= {0.0, 1.0}:
        return {"accuracy": sum(values) / len(values), "ci95": list(wilson(sum(values), len(values)))}
    mean, low, high = share_interval(values, clusters)
    return {"accuracy": mean, "ci95": [low, high]}


def _ends(values: NDArray) -> list[float] | None:
    return list(mean_interval(values.tolist())[1:]) if len(values) > 1 else None


def frontiers(cells: Cells) -> list[dict[str, Any]]:
    """The `frontier` of each model and task of an evaluation that has more than a single point."""
    found = []
    for model, task in dict.fromkeys((model, task) for model, task, _ in cells):
        here = {strategy: rows for (m, t, strategy), rows in cells.items() if (m, t) == (model, task)}
        made = frontier(here, f"{model}, {task}")
        if len(made["points"]) > 1:
            found.append({"model": model, "task": task, **made})
    return found


def compute(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Training against inference: points with `training_flops`, `inference_flops` a question, and whether they are Pareto-best of all.

    A point has `parameters` (N, those of matrix products), `tokens` a question (prompt and generated), `accuracy`, and
    `training_flops`, or `training_tokens` (D) for 6ND; inference is 2N a token (Kaplan et al. 2020, section 2.1; attention over the
    context left out). `pareto`: no other point needs at most as much of both and gets more right.
    Raises ValueError for a point that says neither how it was trained nor on how much.
    """
    made = []
    for p in points:
        trained = p.get("training_flops")
        if trained is None:
            if p.get("training_tokens") is None:
                raise ValueError(f"point {dict(p)} needs training_flops, or training_tokens for 6ND")
            trained = 6.0 * p["parameters"] * p["training_tokens"]
        made.append({**p, "training_flops": float(trained), "inference_flops": 2.0 * p["parameters"] * p["tokens"]})
    if not made:
        return []
    best = pareto([(p["training_flops"], p["inference_flops"]) for p in made], [p["accuracy"] for p in made])
    return [{**p, "pareto": kept} for p, kept in zip(made, best, strict=True)]


MADE_BY = {"base": "pretrain", "base_chat": "pretrain", "sft": "sft", "ppo": "ppo"}


def road(stage: str, runs: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The stages whose FLOPs went into a stage's product: itself and all that it was made from, but for `prepare`, which trains nothing."""
    return {stage}.union(*(road(parent, runs) for parent in runs.get(stage, {}).get("parents", ()) if parent != "prepare"))


def computed(frontiers: Sequence[Mapping[str, Any]], runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of an evaluation's frontiers under `compute`, task by task, from the stages' manifests (`counts`, `parents`).

    A model's training is that of its `road`: of PPO on a reward model, preferences and reward model too. A model of no stage, of whose
    stages one is not there or does not count its FLOPs, or whose parameters nobody counted, has no points.
    """
    counts = {name: run.get("counts", {}) for name, run in runs.items()}
    parameters = counts.get("pretrain", {}).get("matmul_parameters")
    found = []
    for task in dict.fromkeys(of["task"] for of in frontiers):
        points = []
        for of in frontiers:
            made_by = MADE_BY.get(of["model"])
            trained = [counts.get(stage, {}).get("flops") for stage in road(made_by, runs)] if made_by else []
            if of["task"] == task and parameters and trained and None not in trained:
                points += [{"model": of["model"], "task": task, "strategy": p["strategy"], "k": p["k"], "parameters": parameters,
                            "training_flops": sum(trained), "tokens": p["tokens"], "counted": of["counted"], "accuracy": p["accuracy"],
                            "ci95": p["ci95"], "n": p["n"]} for p in of["points"]]
        found += compute(points)
    return found


def joined(evaluations: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The `compute` points of several evaluations together, each model named with its size ("sft 883k").

    `pareto` is about the price of an answer alone: no other point of the task costs at most as much inference and gets more right. What
    training adds to it depends on how many questions will be asked: `cheapest`.
    Raises ValueError where two evaluations hold models that would share a name.
    """
    found: list[dict[str, Any]] = []
    for points in evaluations:
        named = [{**p, "model": f"{p['model']} {short(p['parameters'])}"} for p in points]
        if twice := {p["model"] for p in found} & {p["model"] for p in named}:
            raise ValueError(f"two evaluations hold a model {min(twice)!r}: give one run for each stage and size")
        found += named
    best: dict[str, Iterator[bool]] = {}
    for task in {p["task"] for p in found}:
        own = [p for p in found if p["task"] == task]
        best[task] = iter(pareto([p["inference_flops"] for p in own], [p["accuracy"] for p in own]))
    return [{**p, "pareto": next(best[p["task"]])} for p in found]


def cheapest(points: Sequence[Mapping[str, Any]], accuracy: float, questions: float) -> tuple[Mapping[str, Any], float] | None:
    """The point that gets at least `accuracy` right for the fewest FLOPs, and these: training and the inference of so many `questions`.

    At 0 questions those of inference alone, a question (a model that is there anyway). None where no point is so good.
    """
    def flops(p: Mapping[str, Any]) -> float:
        return p["training_flops"] + questions * p["inference_flops"] if questions else p["inference_flops"]

    good = [p for p in points if p["accuracy"] >= accuracy]
    return min(((p, flops(p)) for p in good), key=lambda found: found[1], default=None)
