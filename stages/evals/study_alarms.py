"""Study: do the alarms of reward hacking come before the gold score's peak, how often are they false, and what helps against it?

    python -m stages.evals.study_alarms

One small base is pretrained and tuned. Weak reward models (few responses, wrong labels, all weights or adapters of rank 1) with next
to no price on KL are made to be over-optimised; sound ones with a price are not. What counts is what happened: a run whose gold
score at its end is more than four standard errors below its best, with the reward above, was over-optimised. Every other run of
either kind calibrates: a threshold is the highest value that its sound runs reach. The others test it: how often the alarm comes,
how often it is false, how many iterations before the peak. Then PPO on the best of the weak models with each remedy, over seeds.
Every run is a folder, not run again once finished, and one JSON line in `--out`, so the same command continues where it was.
"""
import argparse
import math
import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompts.intervals import wilson
from reward.alarms import STATISTICS, WINDOW, Limits, fall, statistics
from stages.evals.scoring import write_records
from stages.evals.studies import CAPACITIES, EASY, EASY_RANKED, UNTAXED, markdown, mean, places, stage
from stages.run.checkpoint import read_metrics
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.manifest import say

# responses, share of wrong labels, capacity of the reward model, price of a nat of KL
WEAK = [(size, error, capacity, kl) for size in (250, 1000) for error in (0.2, 0.4)
        for capacity, kl in (("full", 0.0), ("full", 0.01), ("rank 1", 0.0))]
WEAK += [(4000, error, capacity, 0.0) for error in (0.0, 0.1) for capacity in ("full", "rank 1")]
SOUND = [(size, error, capacity, kl) for size in (4000, 12_000) for error in (0.0, 0.1)
         for capacity, kl in (("full", 0.1), ("full", 0.3), ("rank 1", 0.3))]
SECOND = (1000, 0.2)  # what the second reward model, the same for all, has learned from, drawn with another seed
REMEDIED = (4000, 0.0, "full")  # over-optimised without a price on KL, and good enough that a remedy can gain something
OVEROPTIMISED = 4.0  # standard errors of gold score lost by the end
# Settings of PPO. What each is worth is to be seen, so none was tuned: one or two plain values each.
REMEDIES: dict[str, dict[str, Any]] = {
    "nothing": {}, "KL .01": {"kl_coef": 0.01}, "KL .05": {"kl_coef": 0.05}, "KL .2": {"kl_coef": 0.2},
    "worst of the ensemble": {"reward": {"model@min": 1.0}}, "ensemble's mean less its spread": {"reward": {"model@mean_std": 1.0}},
    "score clipped at 1": {"score_clip": 1.0}, "length penalty .01": {"length_penalty": 0.01}, "bounded shaping (PAR)": {"par_samples": 1},
    "early stop, with a judge": {"on_alarm": "rollback"},
    "early stop, without one": {"on_alarm": "rollback", "alarm_limits": {"gold_falls": None, "feature_distance": 3.0}}}
ASSUMED_BASE_S, ASSUMED_MODEL_S, ASSUMED_ITERATION_S = 300, 45, 2.5  # on one CPU core, for the budget alone


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_alarms", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weak", type=int, default=len(WEAK), help="runs made to over-optimise")
    parser.add_argument("--sound", type=int, default=len(SOUND), help="runs that are not")
    parser.add_argument("--remedy-seeds", nargs="*", type=int, default=[0, 1, 2], help="seeds of PPO with each remedy (none: leave out)")
    parser.add_argument("--remedies", nargs="+", default=list(REMEDIES), choices=list(REMEDIES))
    parser.add_argument("--iterations", type=int, default=50, help="of PPO")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of the policy")
    parser.add_argument("--eval-problems", type=int, default=300)
    places(parser, "study_alarms", base=(64, 2_000_000))
    return parser.parse_args(argv)


def study(given: argparse.Namespace) -> None:
    cells = [("weak", *cell) for cell in WEAK[:given.weak]] + [("sound", *cell) for cell in SOUND[:given.sound]]
    models = {cell[1:4] for cell in cells}
    runs = len(cells) + len(given.remedies) * len(given.remedy_seeds)
    say(f"budget: a base, {len(models) + 1} reward models, {len(cells)} runs of PPO and {runs - len(cells)} with remedies, about "
        f"{clock(ASSUMED_BASE_S + (len(models) + 1) * ASSUMED_MODEL_S + runs * given.iterations * ASSUMED_ITERATION_S)}")
    base = {"parents.prepare": given.prepare}
    stage("pretrain", given.runs / "pretrain", seed=given.seed, hidden_size=given.hidden_size, num_heads=max(1, given.hidden_size // 32),
          tokens=given.train_tokens, **base)
    stage("sft", given.runs / "sft", seed=given.seed, probe_prompts=0, instruction_prompts=0, **base,
          **{"parents.pretrain": str(given.runs / "pretrain")})
    base["parents.sft"] = str(given.runs / "sft")

    def reward_model(size: int, error: float, capacity: str, seed: int) -> Path:
        name = f"{size}-{error:g}" + (f"-seed{seed}" if seed != given.seed else "")
        folder = given.runs / f"reward-{name}-{capacity.replace(' ', '')}"
        stage("preferences", given.runs / f"preferences-{name}", seed=seed, max_responses=size, error_rate=error, **EASY_RANKED, **base)
        stage("reward_model", folder, seed=seed, fresh_problems=given.eval_problems, ensemble=3, ensemble_share="trunk",
              **CAPACITIES[capacity], **base,
              **{"parents.preferences": str(given.runs / f"preferences-{name}")})
        return folder

    second = reward_model(*SECOND, "full", given.seed + 1) / "model"

    def ppo(folder: str, model: Path, seed: int, **settings: Any) -> dict[str, Any]:
        settings = {"alarm_limits": {"feature_distance": 3.0}} | settings  # all that can be watched
        made = stage("ppo", given.runs / folder, seed=seed, iterations=given.iterations, learning_rate=given.learning_rate, gate="off",
                     second_reward=str(second), best_of=0, sample_iterations=0, save_iterations=5, eval_problems=given.eval_problems,
                     **UNTAXED, **EASY, **settings, **base, **{"parents.reward_model": str(model)})
        return {"gold": made.metrics["gain/gold"], "proxy": made.metrics["gain/score"]["value"], "kl": made.metrics["after/kl"]["value"],
                "kept_step": made.data["notes"]["kept_step"], "last_step": made.data["notes"]["last_step"]}

    lines: list[dict[str, Any]] = []

    def done(line: dict[str, Any]) -> None:
        lines.append(line)
        write_records(given.out or given.runs / "study_alarms.jsonl", lines)
        say(f"{len(lines)} of {runs} runs")

    for made_to, size, error, capacity, kl in cells:
        name = f"ppo-{size}-{error:g}-{capacity.replace(' ', '')}-kl{kl:g}"
        gains = ppo(name, reward_model(size, error, capacity, given.seed), given.seed, kl_coef=kl)
        done({"made_to_be": made_to, "responses": size, "error_rate": error, "capacity": capacity, "kl_coef": kl, **gains,
              **told(read_metrics(given.runs / name / "metrics.jsonl"))})
    for remedy in given.remedies:
        for seed in given.remedy_seeds:
            name = f"remedy-{''.join(c if c.isalnum() else '-' for c in remedy)}-{seed}"
            settings = {"kl_coef": 0.0} | REMEDIES[remedy]
            done({"remedy": remedy, "seed": seed, **ppo(name, reward_model(*REMEDIED, given.seed), seed, **settings)})
    say("\n" + report(lines))


def told(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What the report needs of a run's rows: every statistic at every iteration (null where there is none), the peak, the outcome.

    `peak` is the iteration (from 0) in the middle of the `WINDOW` whose mean gold score is highest; `lost` standard errors at the end.
    """
    found = [statistics(rows[:end]) for end in range(1, len(rows) + 1)]
    lost = fall(rows, "objective/gold") or 0.0
    smooth = np.convolve([row["objective/gold"] for row in rows], np.ones(WINDOW) / WINDOW, "valid")
    return {"statistics": {name: [each.get(name) for each in found] for name in STATISTICS}, "peak": int(np.argmax(smooth)) + WINDOW // 2,
            "lost": lost if math.isfinite(lost) else None, "overoptimised": lost > OVEROPTIMISED}


Runs = Sequence[Mapping[str, Any]]


def halves(lines: Runs) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Runs to calibrate on and runs to test on: of either outcome every other one, in the order of the study."""
    kinds = [[line for line in lines if line["overoptimised"] == outcome] for outcome in (True, False)]
    return [line for kind in kinds for line in kind[::2]], [line for kind in kinds for line in kind[1::2]]


def calibrated(lines: Runs) -> dict[str, float]:
    """The highest value of each statistic in the runs that were not over-optimised: none of them raises the alarm."""
    found: dict[str, float] = {}
    for line in lines:
        for name, values in line["statistics"].items():
            if not line["overoptimised"] and any(v is not None for v in values):
                found[name] = max([found.get(name, -math.inf), *(v for v in values if v is not None)])
    return found


def first(line: Mapping[str, Any], thresholds: Mapping[str, float | None], names: Sequence[str]) -> int | None:
    """The first iteration (from 0) at which one of the alarms is raised, None if none is."""
    at = [i for name in names if (limit := thresholds.get(name)) is not None
          for i, value in enumerate(line["statistics"][name]) if value is not None and value > limit]
    return min(at, default=None)


def judged(lines: Runs, thresholds: Mapping[str, float | None], names: Sequence[str]) -> list[str]:
    """Cells: over-optimised runs with the alarm, runs without over-optimisation that raise it (each with Wilson's 95 % interval), and
    two leads (median, lowest and highest): the iterations by which the alarm precedes the gold peak, and those by which it precedes the
    iteration at which a judge would have seen the fall. The former cannot be had where gold falls from the start."""
    raised = {outcome: [first(line, thresholds, names) for line in lines if line["overoptimised"] == outcome] for outcome in (True, False)}
    cells = []
    for at in raised.values():
        hits = sum(i is not None for i in at)
        low, high = wilson(hits, len(at))
        cells.append(f"{hits}/{len(at)} [{low:.2f}, {high:.2f}]")
    hacked = [line for line in lines if line["overoptimised"]]
    falls = [first(line, {"gold_falls": OVEROPTIMISED}, ["gold_falls"]) for line in hacked]
    for events in ([line["peak"] for line in hacked], falls):
        leads = [event - i for event, i in zip(events, raised[True], strict=True) if i is not None and event is not None]
        cells.append(f"{plain.median(leads):+g} ({min(leads):+d} to {max(leads):+d})" if leads else "-")
    return cells


def report(lines: Runs) -> str:
    """Markdown: the runs, the alarms on the test half with calibrated thresholds and on all runs with the defaults, the remedies."""
    runs, remedies = ([line for line in lines if ("remedy" in line) == is_remedy] for is_remedy in (False, True))
    tables = []
    if runs:
        tables.append(markdown(
            ["responses", "wrong labels", "adapters", "price of KL", "KL", "reward", "gain in gold score", "peak", "over-optimised"],
            [[f"{r['responses']:,}", f"{r['error_rate']:g}", r["capacity"], f"{r['kl_coef']:g}", f"{r['kl']:.1f}", f"{r['proxy']:+.2f}",
              "{:+.3f} [{:+.3f}, {:+.3f}]".format(r["gold"]["value"], *r["gold"].get("ci95", [r["gold"]["value"]] * 2)),
              str(r["peak"]), f"{'yes' if r['overoptimised'] else 'no'} (made to be {r['made_to_be']})"] for r in runs]))
        learned, tested = halves(runs)
        thresholds, defaults = calibrated(learned), vars(Limits())
        blind = [name for name in STATISTICS if name != "gold_falls"]
        rows = []
        labels = [f"{name}, the definition" if name == "gold_falls" else name for name in STATISTICS]
        for label, names in [*zip(labels, ([name] for name in STATISTICS), strict=True), ("any without a judge", blind)]:
            if any(name in thresholds for name in names):
                usual = defaults[names[0]]
                limit = [f"{thresholds[names[0]]:.3g}", "off" if usual is None else f"{usual:g}"] if len(names) == 1 else ["", ""]
                rows.append([label, limit[0], *judged(tested, thresholds, names), limit[1], *judged(runs, defaults, names)])
        columns = ["raised when over-optimised", "false", "lead over the peak (iterations)", "lead over a judge"]
        tables.append(markdown(["alarm", "calibrated", *columns, "default", *(f"{name}, all runs" for name in columns)], rows))
    if remedies:
        named = {name: [line for line in remedies if line["remedy"] == name] for name in dict.fromkeys(line["remedy"] for line in remedies)}
        tables.append(markdown(["remedy", "gain in gold score", "reward", "KL", "steps kept of those taken"], [
            [name, mean([line["gold"]["value"] for line in of]), mean([line["proxy"] for line in of], 2),
             mean([line["kl"] for line in of], 1), ", ".join(f"{line['kept_step']}/{line['last_step']}" for line in of)]
            for name, of in named.items()]))
    return "\n\n".join(tables)


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
