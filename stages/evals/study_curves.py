"""Study: what does each figure that PPO logs look like in a sound run, and which of them tell what is broken?

    python -m stages.evals.study_curves

One small base is pretrained and tuned. PPO runs on easy problems with the verifier as its reward, over seeds that differ in the order
of problems and in the samples: the sound runs, whose values are the range. Then with one thing broken at a time, at the first of these
seeds. The last sound seed is kept out of the range and judged by it, as a broken run is: what leaves the range there left it by chance.
Every run is a folder, not run again once finished, and one JSON line in `--out`, so the same command continues where it was; the
tables of docs/reading-ppo-curves.md are made from such a file.
"""
import argparse
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from stages.evals.scoring import write_records
from stages.evals.studies import EASY, EASY_RANKED, UNTAXED, markdown, places, stage
from stages.run import figures
from stages.run.checkpoint import read_metrics
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.figures import Series
from stages.run.manifest import say

# Responses and share of wrong labels. PPO needs a reward model for its critic to begin as, whatever gives the reward.
MODELS: dict[str, tuple[int, float]] = {"sound": (4000, 0.0), "weak": (250, 0.4)}
SOUND: dict[str, Any] = {"reward": {"verifier": 1.0}, "learning_rate": 3e-4, "kl_coef": 0.05}
BROKEN: dict[str, dict[str, Any]] = {
    "learning rate 30 times as high": {"learning_rate": 1e-2},
    "learning rate a thirtieth": {"learning_rate": 1e-5},
    "weak reward model, KL free": {"reward": {"model": 1.0}, "kl_coef": 0.0},
    "KL 40 times as dear": {"kl_coef": 2.0},
    "critic that does not learn": {"critic_learning_rate": 0.0},
    "cut off at 16 tokens": {"max_new_tokens": 16},
    "cut off, no penalty": {"max_new_tokens": 16, "missing_eos_penalty": None},
    "constant reward": {"reward": {"verifier": 0.0}},
    "noise for a reward": {"reward": {"stages.evals.study_curves:noise": 1.0}},
    "reward with the wrong sign": {"reward": {"verifier": -1.0}},
    "temperature .3": {"temperature": 0.3},
    "16 responses a rollout": {"rollout_batch": 16, "micro_batch_size": 4},
    "8 passes over a rollout": {"epochs": 8}}
# In the order of docs/reading-ppo-curves.md.
METRICS = ("objective/score", "objective/gold", "objective/accuracy", "objective/kl", "objective/entropy", "response/length",
           "response/eos_rate", "response/repetition", "policy/clip_fraction", "policy/approx_kl", "loss/policy",
           "train/grad_norm", "value/explained_variance", "value/clip_fraction", "loss/value", "critic/grad_norm", "reward/zero_variance")
# In units of the reward: another reward's values say nothing beside the sound run's.
SCALED = ("objective/score", "value/clip_fraction", "loss/value", "critic/grad_norm")
LOGARITHMIC = ("policy/approx_kl",)  # falls by four orders of magnitude as the learning rate does
JUDGED = ("objective/gold", "objective/accuracy")  # known here alone: with problems of one's own there usually is no judge
SHOWN = (1, 5, 10, 20, 30)  # iterations in the tables
REACH = 2  # iterations on either side that belong to the range at an iteration
BLOCKS = "▁▂▃▄▅▆▇█"
ASSUMED_BASE_S, ASSUMED_MODEL_S, ASSUMED_ITERATION_S, ASSUMED_EPOCH_S = 150, 20, 1.0, 0.5  # on one CPU core, for the budget alone
Line = Mapping[str, Any]


def noise(problems: Sequence[Mapping[str, Any]], texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
    """A reward that knows nothing: between 0 and 1, the same for the same response to the same problem."""
    return [random.Random(f"{problem['id']}:{text}").random() for problem, text in zip(problems, texts, strict=True)]


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_curves", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3],
                        help="of the sound runs; the last one is held against the rest")
    parser.add_argument("--broken", nargs="*", default=list(BROKEN), choices=list(BROKEN), help="runs with one thing broken")
    parser.add_argument("--iterations", type=int, default=30, help="of PPO")
    parser.add_argument("--eval-problems", type=int, default=200)
    places(parser, "study_curves", base=(64, 2_000_000))
    return parser.parse_args(argv)


def study(given: argparse.Namespace) -> None:
    if len(given.seeds) < 3:
        raise ValueError(f"--seeds has {len(given.seeds)} of the three or more it takes: two to make the range and one to hold against it")
    seed = given.seeds[0]
    cells: list[tuple[str, int, dict[str, Any]]] = [("sound", each, {}) for each in given.seeds]
    cells += [(name, seed, BROKEN[name]) for name in given.broken]
    passes = sum(settings.get("epochs", 1) for _, _, settings in cells)
    training_s = given.iterations * (len(cells) * ASSUMED_ITERATION_S + passes * ASSUMED_EPOCH_S)
    say(f"budget: a base, {len(MODELS)} reward models, {len(given.seeds)} sound and {len(given.broken)} broken runs of PPO, about "
        f"{clock(ASSUMED_BASE_S + len(MODELS) * ASSUMED_MODEL_S + training_s)}")
    base = {"parents.prepare": given.prepare}
    stage("pretrain", given.runs / "pretrain", seed=seed, hidden_size=given.hidden_size, num_heads=max(1, given.hidden_size // 32),
          tokens=given.train_tokens, **base)
    stage("sft", given.runs / "sft", seed=seed, probe_prompts=0, instruction_prompts=0, **base,
          **{"parents.pretrain": str(given.runs / "pretrain")})
    base["parents.sft"] = str(given.runs / "sft")
    for name, (size, error) in MODELS.items():
        stage("preferences", given.runs / f"preferences-{name}", seed=seed, max_responses=size, error_rate=error, **EASY_RANKED, **base)
        stage("reward_model", given.runs / f"reward-{name}", seed=seed, fresh_problems=given.eval_problems, **base,
              **{"parents.preferences": str(given.runs / f"preferences-{name}")})
    lines: list[dict[str, Any]] = []
    for name, own, settings in cells:
        folder = given.runs / f"ppo-{slug(name)}-{own}"
        model = "weak" if name.startswith("weak") else "sound"
        made = stage("ppo", folder, seed=own, iterations=given.iterations, gate="off", kl_limit=None, best_of=0, sample_iterations=0,
                     eval_problems=given.eval_problems, **UNTAXED, **EASY, **{**SOUND, **settings}, **base,
                     **{"parents.reward_model": str(given.runs / f"reward-{model}")})
        rows = read_metrics(folder / "metrics.jsonl")
        lines.append({"run": name, "seed": own, "settings": settings, **{
            when: {key: made.metrics[f"{when}/{key}"] for key in ("gold", "greedy_accuracy")} for when in ("before", "after")},
            "alarms": {key.removeprefix("alarm/"): i for i, row in enumerate(rows, 1) for key in row if key.startswith("alarm/")},
            "rows": {key: [float(f"{row[key]:.3g}") for row in rows] for key in METRICS}})
        write_records(given.out or given.runs / "study_curves.jsonl", lines)
        say(f"{len(lines)} of {len(cells)} runs")
    say("\n" + "\n\n".join(report(lines).values()))
    draw(given.runs / "figures", lines)


def split(lines: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """The sound runs that make the range, and what is held against it: the last sound run and the broken ones."""
    sound = [line for line in lines if line["run"] == "sound"]
    return sound[:-1], [sound[-1], *(line for line in lines if line["run"] != "sound")]


def levels(line: Line, metric: str) -> list[float]:
    """A run's values as they are compared."""
    values = line["rows"][metric]
    return [math.log10(max(value, 1e-12)) for value in values] if metric in LOGARITHMIC else values


def bands(sound: Sequence[Line], metric: str) -> list[tuple[float, float]]:
    """The range at each iteration: lowest and highest of the sound runs there and at `REACH` iterations on either side, and half of
    what lies between them beyond either end, since a few runs do not reach as far as another would."""
    found = []
    columns = [levels(line, metric) for line in sound]
    for at in range(len(columns[0])):
        near = [value for column in columns for value in column[max(0, at - REACH):at + REACH + 1]]
        low, high = min(near), max(near)
        found.append((low - (high - low) / 2, high + (high - low) / 2))
    return found


def left(line: Line, sound: Sequence[Line], metric: str) -> int | None:
    """The iteration (from 1) at which the run leaves the range, for that and the next one; None if it stays, or has another unit."""
    if metric in SCALED and "reward" in line["settings"]:
        return None
    out = [not low <= value <= high for value, (low, high) in zip(levels(line, metric), bands(sound, metric), strict=True)]
    return next((i for i, (now, then) in enumerate(pairwise(out), 1) if now and then), None)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def label(line: Line) -> str:
    return "sound, another seed" if line["run"] == "sound" else line["run"]


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else figures.short(value) if abs(value) < 1e6 else f"{value:.0e}"


def curve(values: Sequence[float], among: Sequence[float]) -> str:
    """A row of blocks, two values each; the lowest block stands for the lowest of `values` and `among`, the highest for their highest."""
    low, high = min([*among, *values]), max([*among, *values])
    if low == high:
        return BLOCKS[0] * math.ceil(len(values) / 2)
    means = [statistics.fmean(values[i:i + 2]) for i in range(0, len(values), 2)]
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(len(BLOCKS) * (value - low) / (high - low)))] for value in means)


def overview(lines: Sequence[Line]) -> str:
    """Markdown: what told of each run first, when the gold score did, and what the run came to."""
    sound, others = split(lines)
    rows = []
    for line in [sound[0], *others]:
        seen = {} if line is sound[0] else {metric: at for metric in METRICS if (at := left(line, sound, metric)) is not None}
        unjudged = {metric: at for metric, at in seen.items() if metric not in JUDGED}
        first = [f"`{metric}`" for metric, at in unjudged.items() if at == min(unjudged.values())]
        ends = [(line["before"][key], line["after"][key]) for key in ("gold", "greedy_accuracy")]
        rows.append(["sound" if line is sound[0] else label(line),
                     f"{', '.join(first)} at {min(unjudged.values())}" if first else "-", str(seen.get("objective/gold", "-")),
                     ", ".join(f"{name} at {at}" for name, at in line["alarms"].items()) or "-",
                     *("{:.3f} -> {:.3f} [{:.3f}, {:.3f}]".format(start["value"], end["value"], *end.get("ci95", [end["value"]] * 2))
                       for start, end in ends)])
    return markdown(["run", "first to leave the range, at iteration", "gold leaves it at", "alarms", "gold score",
                     "greedy accuracy"], rows)


def values_of(metric: str, lines: Sequence[Line]) -> str:
    """Markdown: a metric in the sound runs and in each run that leaves their range or has another unit; then those that stay."""
    sound, others = split(lines)
    columns = [line["rows"][metric] for line in sound]
    among = [value for column in columns for value in column]
    shown = [at for at in SHOWN if at <= len(columns[0])]

    def ends(values: Sequence[float]) -> str:
        return " to ".join(dict.fromkeys((number(min(values)), number(max(values)))))

    rows = [[f"sound, {len(sound)} seeds", *(ends([column[at - 1] for column in columns]) for at in shown), curve(columns[0], among), "-"]]
    within = []
    for line in others:
        at, own_unit = left(line, sound, metric), metric in SCALED and "reward" in line["settings"]
        if at is None and not own_unit:
            within.append(label(line))
            continue
        values = line["rows"][metric]
        rows.append([label(line), *(number(values[i - 1]) for i in shown), curve(values, [] if own_unit else among),
                     "another unit" if own_unit else str(at)])
    table = markdown(["run", *map(str, shown), "curve", "leaves at"], rows)
    return f"{table}\n\nWithin the range: {'; '.join(within)}." if within else table


def report(lines: Sequence[Line]) -> dict[str, str]:
    """The tables of docs/reading-ppo-curves.md: `runs`, and one under each metric's name."""
    return {"runs": overview(lines)} | {metric: values_of(metric, lines) for metric in METRICS}


def draw(folder: Path, lines: Sequence[Line]) -> None:
    """A figure for each run and each metric by which it leaves the range, with the sound runs dashed."""
    sound, others = split(lines)
    for line in others:
        for metric in METRICS:
            if left(line, sound, metric) is not None:
                at = range(1, len(line["rows"][metric]) + 1)
                figures.plot(folder / f"{slug(label(line))}-{slug(metric)}.svg", [
                    *(Series("" if i else "sound", at, one["rows"][metric], look="dashed", color=7) for i, one in enumerate(sound)),
                    Series(label(line), at, line["rows"][metric], color=0)], x="iteration", y=metric)


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
