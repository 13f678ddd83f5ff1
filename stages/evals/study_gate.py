"""Study: does what is measured of a reward model foretell whether PPO on it raises the gold score?

    python -m stages.evals.study_gate

One small base is pretrained and tuned; one set of responses is sampled and ranked with each rate of wrong labels. 24 reward models are
made good and bad on purpose (number of responses, wrong labels, all weights or adapters of rank 1), and PPO runs 20 iterations on
each. The table gives the rank correlation of each figure with the gain in gold score. Every run is a folder, not run again once
finished, and one JSON line in `--out`, so the same command continues where it was.
"""
import argparse
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

from reward.gate import judge
from stages.evals.scoring import write_records
from stages.evals.studies import CAPACITIES, EASY, EASY_RANKED, UNTAXED, markdown, places, stage
from stages.run import figures
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.figures import Series
from stages.run.manifest import say

SIZES, ERRORS = (250, 1000, 4000, 12_000), (0.0, 0.2, 0.4)
FIGURES = ("heldout_accuracy", "fresh_accuracy", "gain_over_min_logprob", "gain_over_features", "fresh_ece", "fresh_ece_fitted",
           "fresh_brier", "length_correlation", "flip_rate_whitespace")
VERDICTS = {"fail": 0, "warn": 1, "pass": 2}
ASSUMED_BASE_S, ASSUMED_RUN_S = 300, 90  # on one CPU core, for the budget alone
DRAWS = 2000


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="ranked responses")
    parser.add_argument("--errors", nargs="+", type=float, default=list(ERRORS), help="share of pairs that the annotator judges wrong")
    parser.add_argument("--iterations", type=int, default=20, help="of PPO")
    places(parser, "study_gate", "a reward model", base=(64, 2_000_000))
    return parser.parse_args(argv)


def study(given: argparse.Namespace) -> None:
    cells = list(itertools.product(given.sizes, given.errors, CAPACITIES))
    say(f"budget: a base, {len(given.sizes) * len(given.errors)} sets of rankings, {len(cells)} reward models with PPO on each, about "
        f"{clock(ASSUMED_BASE_S + len(cells) * ASSUMED_RUN_S)}")
    parents = {"parents.prepare": given.prepare}

    def made(name: str, folder: str, **settings: Any):
        return stage(name, given.runs / folder, seed=given.seed, **settings, **parents)

    made("pretrain", "pretrain", hidden_size=given.hidden_size, num_heads=max(1, given.hidden_size // 32), tokens=given.train_tokens)
    parents["parents.pretrain"] = str(given.runs / "pretrain")
    made("sft", "sft", probe_prompts=0, instruction_prompts=0)
    del parents["parents.pretrain"]
    parents["parents.sft"] = str(given.runs / "sft")
    lines: list[dict[str, Any]] = []
    for size, error, capacity in cells:
        ranked, name = f"preferences-{size}-{error:g}", f"{size}-{error:g}-{capacity.replace(' ', '')}"
        made("preferences", ranked, max_responses=size, error_rate=error, **EASY_RANKED)
        model = made("reward_model", f"reward-{name}", fresh_problems=300, **CAPACITIES[capacity],
                     **{"parents.preferences": str(given.runs / ranked)})
        tuned = made("ppo", f"ppo-{name}", iterations=given.iterations, gate="off", **UNTAXED, **EASY,
                     **{"parents.reward_model": str(given.runs / f"reward-{name}")})
        lines.append({"responses": size, "error_rate": error, "capacity": capacity, "verdict": judge(model.metrics).level,
                      "figures": {key: model.metrics[key]["value"] for key in FIGURES if key in model.metrics},
                      "gain": tuned.metrics["gain/gold"], "proxy": tuned.metrics["gain/score"]["value"],
                      "kl": tuned.metrics["after/kl"]["value"]})
        write_records(given.out or given.runs / "study_gate.jsonl", lines)
        say(f"{len(lines)} of {len(cells)} reward models")
    say("\n" + report(lines))
    figures.plot(given.runs / "gate.svg", [
        Series(name, [line["figures"]["fresh_accuracy"] for line in lines if line["verdict"] == name],
               [line["gain"]["value"] for line in lines if line["verdict"] == name], look="points") for name in VERDICTS],
        x="accuracy on fresh samples of the policy", y="gain in gold score by PPO")


def correlation(figure: Sequence[float], gain: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation with its 95 % interval by a bootstrap over models (percentiles of 2,000 draws)."""
    rng = random.Random(f"correlation:{seed}")
    drawn: list[float] = []
    places = range(len(gain))
    while len(drawn) < DRAWS:
        chosen = rng.choices(places, k=len(gain))
        if len({figure[i] for i in chosen}) > 1 and len({gain[i] for i in chosen}) > 1:
            drawn.append(float(spearmanr([figure[i] for i in chosen], [gain[i] for i in chosen]).statistic))
    drawn.sort()
    return float(spearmanr(figure, gain).statistic), drawn[int(0.025 * DRAWS)], drawn[int(0.975 * DRAWS) - 1]


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: every model, then the rank correlation of each figure (and of the verdict) with the gain in gold score."""
    rows = [[f"{line['responses']:,}", f"{line['error_rate']:g}", line["capacity"], f"{line['figures']['fresh_accuracy']:.3f}",
             line["verdict"], f"{line['proxy']:+.2f}",
             "{:+.3f} [{:+.3f}, {:+.3f}]".format(line["gain"]["value"], *line["gain"]["ci95"])] for line in lines]
    tables = [markdown(["responses", "wrong labels", "adapters", "fresh accuracy", "verdict", "proxy", "gain in gold score"], rows)]
    gains = [line["gain"]["value"] for line in lines]
    columns: dict[str, list[float]] = {key: [line["figures"][key] for line in lines] for key in FIGURES
                                       if all(key in line["figures"] for line in lines)}
    columns["verdict"] = [VERDICTS[line["verdict"]] for line in lines]
    rows = [[key, "{:+.2f} [{:+.2f}, {:+.2f}]".format(*correlation(values, gains)) if len(set(values)) > 1 else "the same for all"]
            for key, values in columns.items()]
    return "\n\n".join([*tables, markdown(["figure", "rank correlation with the gain"], rows)])


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
