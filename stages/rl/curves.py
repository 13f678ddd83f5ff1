"""Gold and proxy score over KL, of a PPO run and of best-of-n from its start, with the fits of reward/overoptimization.py."""
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prompts.intervals import mean_interval
from reward.overoptimization import BestOfN, best_of_n, fit_points, fit_prompts, standing
from reward.verifiers import GoldScore
from stages.models.training import gather, rank, world_size
from stages.rl.measure import Prompts, answers
from stages.rl.rewards import Response, Reward
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.manifest import metric, say

LEAST_POINTS = 8  # iterations that three constants are fitted to


@torch.no_grad()
def draw_best_of_n(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, *, reward: Reward,
                   judge: Callable[[Sequence[Response]], list[GoldScore]], samples: int, **sampling: Any) -> BestOfN:
    """Both scores of the best of n for n = 1..`samples`, a row a prompt in their order, the same on every process."""
    mine = list(range(rank(), len(prompts), world_size()))
    drawn = answers(policy, tokenizer, [prompts[i] for i in mine], samples, **sampling) if mine else []
    proxy, gold = (reward(drawn).tolist(), [g.score for g in judge(drawn)]) if mine else ([], [])
    rows = gather([(i, proxy[k * samples:(k + 1) * samples], gold[k * samples:(k + 1) * samples]) for k, i in enumerate(mine)])
    rows.sort(key=lambda row: row[0])
    return best_of_n([row[1] for row in rows], [row[2] for row in rows])


def of_best_of_n(found: BestOfN) -> dict[str, Any]:
    """As JSON: for each n the KL, and both scores as [mean, low, high] with 95 % intervals over prompts; fits from n = 4 on."""
    def means(values: np.ndarray) -> list[list[float]]:
        return [list(mean_interval(column)) for column in values.T.tolist()]

    enough = len(found.kl) >= 4
    kl = found.kl.tolist()
    return {"n": list(range(1, len(kl) + 1)), "kl": kl, "prompts": len(found.gold), "proxy": means(found.proxy), "gold": means(found.gold),
            "fits": {name: fit_prompts(kl, scores.tolist()).as_note() if enough else None
                     for name, scores in (("proxy", found.proxy), ("gold", found.gold))}}


def of_run(rows: Sequence[Mapping[str, float]], sampled_at: int | None = None) -> dict[str, Any]:
    """As JSON: KL and both scores of each iteration's own samples, their fits, and where the policy stands that was sampled in the row
    of step `sampled_at` (default, or where there is no such row: in the last)."""
    rows = [row for row in rows if {"objective/kl", "objective/score", "objective/gold"} <= row.keys()]
    kl, proxy, gold = ([row[key] for row in rows] for key in ("objective/kl", "objective/score", "objective/gold"))
    made: dict[str, Any] = {"step": [row["step"] for row in rows], "kl": kl, "proxy": proxy, "gold": gold, "fits": None, "standing": None}
    if len({max(0.0, k) for k in kl}) < LEAST_POINTS:
        return made
    curves = {"proxy": fit_points(kl, proxy), "gold": fit_points(kl, gold)}
    place, sentence = standing(curves["gold"], next((row["objective/kl"] for row in rows if row["step"] == sampled_at), kl[-1]))
    return made | {"fits": {name: curve.as_note() for name, curve in curves.items()}, "standing": {"place": place, "sentence": sentence}}


def compare(rows: Sequence[Mapping[str, float]], found: BestOfN | None, sampled_at: int | None = None,
            ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What `overoptimization.json` holds, and the manifest's metrics of the best of all samples; says where the run stands."""
    run, best = of_run(rows, sampled_at), of_best_of_n(found) if found else None
    curves = {"ppo": run, "best_of_n": best}
    if run["standing"]:
        say(f"over-optimisation: {run['standing']['sentence']}")
    if not best:
        return curves, {}
    n, prompts = best["n"][-1], best["prompts"]
    say(f"best of {n} by the reward: gold score {best['gold'][-1][0]:.3f}, reward {best['proxy'][-1][0]:.3f} at KL {best['kl'][-1]:.2f} "
        f"(n={prompts})")
    return curves, {f"best_of_n/{key}": metric(best[name][-1][0], n=prompts, ci95=ends if ends[0] < ends[1] else None)
                    for key, name in (("gold", "gold"), ("score", "proxy")) for ends in [best[name][-1][1:]]}


def show(directory: Path) -> None:
    """Draw the iterations' scores over steps and over KL into `figures/` of a run."""
    logged = read_metrics(directory / "metrics.jsonl")
    axes: list[tuple[str, str, str, Literal["line", "points"]]] = [
        ("scores", "step", "step", "line"), ("scores-against-kl", "objective/kl", "KL to the start (nats a response)", "points")]
    for name, column, label, look in axes:
        figures.plot(directory / "figures" / f"{name}.png", [
            figures.Series(legend, [row[column] for row in logged], [row[key] for row in logged], look=look) for legend, key in
            (("reward (proxy)", "objective/score"), ("gold score", "objective/gold"), ("sampled accuracy", "objective/accuracy"))],
            x=label, y="mean of an iteration")
