"""Study: the whole road at several seeds, and its figures averaged over them.

    python -m stages.evals.study_seeds --seeds 0 1 2

Every stage of every seed runs through `make` into a folder of its own and is not run again once it is finished, so the same
command continues where it was. With `--ptx-coef` PPO runs a second time, with pretraining loss (PPO-ptx), for the alignment tax with
and without it. One JSON line a seed goes to `--out`; the tables (markdown) go to the console.
"""
import argparse
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.evals.scoring import write_records
from stages.evals.studies import markdown, mean
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.manifest import MANIFEST, Manifest, say

RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")
TARGETS = ("prepare", "scaling", "pretrain", "sft", "rlhf", "evaluate")  # each by name, so that all of them get the seed
PTX = "ppo_ptx"
STAGES = ("pretrain", "sft", "preferences", "reward_model", "ppo", PTX, "evaluation")
ASSUMED_MINUTES = 22  # a seed of the tiny recipe on two CPU cores, for the budget alone
STRATEGIES = {"direct": "direct", "few_shot": "few-shot", "zero_shot_cot": "CoT", "few_shot_cot": "few-shot CoT",
              "sampled_cot": "one sampled chain", "self_consistency": "vote"}
MEASURES = {  # what the table of the stages shows
    "prediction/error": "held-out loss predicted by the ladder, against the one measured: relative error",
    "pretrain/heldout_loss": "held-out loss of the main model (nats a token)",
    "sft/before/stop_rate": "answers that stop, before SFT", "sft/after/stop_rate": "answers that stop, after SFT",
    "sft/before/base_loss": "held-out loss of the base corpus, before SFT", "sft/after/base_loss": "the same after SFT",
    "reward_model/fresh_accuracy": "reward model: pairs of fresh SFT samples ranked right",
    "reward_model/baseline_min_logprob_accuracy": "least token log-probability on the same pairs",
    "reward_model/gain_over_min_logprob": "the reward model's lead",
    "ppo/before/gold": "gold score before PPO", "ppo/after/gold": "gold score after PPO", "ppo/gain/gold": "its gain",
    "ppo/gain/sampled_accuracy": "PPO's gain in sampled accuracy", "ppo/gain/greedy_accuracy": "PPO's gain in greedy accuracy",
    "ppo/before/entropy": "entropy before PPO (nats a token)", "ppo/after/entropy": "entropy after PPO",
    "ppo/after/kl": "KL to the SFT model after PPO (nats a response)",
    "best_of_n at that KL": "gold score of the SFT model's best of n at that KL",
    "ppo/change/base_loss": "held-out loss of the base corpus, change by PPO",
    "ppo/change/worked_accuracy": "worked answers on all tasks, greedy, change by PPO",
    "ppo_ptx/gain/gold": "gain in gold score of PPO-ptx", "ppo_ptx/after/kl": "KL to the SFT model after PPO-ptx",
    "ppo_ptx/change/base_loss": "held-out loss of the base corpus, change by PPO-ptx",
    "ppo_ptx/change/worked_accuracy": "worked answers on all tasks, greedy, change by PPO-ptx",
    "minutes to the end of PPO": "minutes to the end of PPO, start-ups left out", "peak GiB": "peak memory (GiB), PPO-ptx left out"}


def figures(folder: Path) -> dict[str, float]:
    """Every metric of a seed's finished stages as stage/metric, the minutes each took, memory, and the ladder's error."""
    runs = {stage: Manifest(folder / stage) for stage in STAGES if (folder / stage / MANIFEST).is_file()}
    found = {f"{stage}/{name}": value["value"] for stage, run in runs.items() for name, value in run.metrics.items()}
    if (at := best_of_n_at(runs["ppo"].product("overoptimization"), found["ppo/after/kl"])) is not None:
        found["best_of_n at that KL"] = at
    timed = {stage: Manifest(folder / stage).data["provenance"] for stage in ("prepare", "scaling", *STAGES)
             if (folder / stage / MANIFEST).is_file()}
    found |= {f"{stage}/minutes": made["wall_s"] / 60 for stage, made in timed.items()}
    found |= {"minutes to the end of PPO": sum(made["wall_s"] for stage, made in timed.items() if stage not in (PTX, "evaluation")) / 60,
              "peak GiB": max(made["peak_rss_bytes"] for stage, made in timed.items() if stage != PTX) / 2**30}
    if forecast := runs["pretrain"].data["notes"].get("forecast"):
        found["prediction/error"] = forecast["value"] / found["pretrain/heldout_loss"] - 1
    return found


def best_of_n_at(file: Path, kl: float) -> float | None:
    """Gold score of best-of-n at a KL in nats, on the line between the two n beside it; None without the curve, and beyond its end."""
    curve = json.loads(file.read_text(encoding="utf-8"))["best_of_n"]
    if not curve or kl > curve["kl"][-1]:
        return None
    return float(np.interp(kl, curve["kl"], [gold for gold, *_ in curve["gold"]]))


def report(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown tables: the stages' measures, accuracy by strategy, and the differences that the study is about."""
    seeds = [line["figures"] for line in lines]
    stages = [[label, mean(values), ", ".join(f"{value:.3f}" for value in values)]
              for key, label in MEASURES.items() if (values := [s[key] for s in seeds if key in s])]
    cells = sorted({tuple(key.split("/")[1:3]) for key in seeds[0] if key.startswith("evaluation/") and key.count("/") == 3})
    cells = [cell for cell in cells if f"evaluation/{cell[0]}/{cell[1]}/zero_shot_cot" in seeds[0]]

    def accuracy(cell: tuple[str, ...], strategy: str) -> list[float]:
        key = f"evaluation/{cell[0]}/{cell[1]}/{strategy}"
        return [s[key] for s in seeds if key in s]

    def gain(cell: tuple[str, ...], a: str, b: str) -> str:
        first, second = accuracy(cell, a), accuracy(cell, b)
        return mean([100 * (x - y) for x, y in zip(first, second, strict=True)], 1) if first and second else "-"

    strategies = [[f"{model}, {task.replace('_', ' ')}",
                   *(f"{sum(values) / len(values):.3f}" if values else "-" for s in STRATEGIES for values in [accuracy((model, task), s)])]
                  for model, task in cells]
    differences = [[f"{cell[0]}, {cell[1].replace('_', ' ')}", gain(cell, "zero_shot_cot", "direct"),
                    gain(cell, "self_consistency", "sampled_cot"), gain(cell, "self_consistency", "zero_shot_cot")]
                   for cell in cells if accuracy(cell, "direct")]
    return "\n\n".join([
        markdown(["measure", "mean over seeds [95 %]", "each seed"], stages),
        markdown(["model, task", *STRATEGIES.values()], strategies),
        markdown(["points, mean over seeds [95 %]", "CoT - direct", "vote - one sampled chain", "vote - CoT"], differences)])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_seeds", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--runs", type=Path, default=Path(RUNS) / "seeds", help="a folder a seed in here")
    parser.add_argument("--out", type=Path, help="one JSON line a seed (default: study_seeds.jsonl in --runs)")
    parser.add_argument("--no-ladder", action="store_true", help="train no ladder, which is a third of the time")
    parser.add_argument("--no-evaluation", action="store_true", help="stop after PPO")
    parser.add_argument("--ptx-coef", type=float, help="train PPO once more with this weight of pretraining loss (a packed row for each "
                        "response: three to four times as long as PPO)")
    given = parser.parse_args(argv)
    say(f"budget: {len(given.seeds)} seeds x about {ASSUMED_MINUTES} minutes = {clock(60 * ASSUMED_MINUTES * len(given.seeds))}")
    lines = []
    for seed in given.seeds:
        runs = given.runs / str(seed)
        targets = [target for target in TARGETS if target != "evaluate" or not given.no_evaluation]
        asked = {f"--seed {seed}": targets}
        if given.ptx_coef is not None:
            asked[f"--seed {seed} --ptx-coef {given.ptx_coef} --run-dir {runs / given.recipe / PTX}"] = ["ppo"]
        for settings, names in asked.items():
            command = ["make", *names, *["LADDER=0"] * given.no_ladder, f"RECIPE={given.recipe}", f"PLUMBLINE_RUNS={runs}"]
            command.append(f"ARGS={settings}")
            if subprocess.run(command, check=False).returncode:
                raise ValueError(f"seed {seed} stopped, see above; the same command continues there")
        lines.append({"seed": seed, "runs": str(runs / given.recipe), "figures": figures(runs / given.recipe)})
        given.runs.mkdir(parents=True, exist_ok=True)
        write_records(given.out or given.runs / "study_seeds.jsonl", lines)
    say("\n" + report(lines))


if __name__ == "__main__":
    run_program(main)
