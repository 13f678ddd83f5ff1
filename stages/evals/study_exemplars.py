"""Study: accuracy against the number of exemplars in the prompt, with and without worked steps, for base, SFT and PPO models of several
sizes; and what accuracy costs these models, inference against training.

    python -m stages.evals.study_exemplars --widths 64 96

Smaller models than the recipe's go the same road as its main model, whose finished runs are taken as they are. Each model answers the
same held-out problems greedily after 0, 1, 2, 4 exemplars and as many as its context holds (Brown et al. 2020; with steps Wei et al. 2022).
Every problem has exemplars of its own, drawn from the `sft` split twice or more by seed, so that no figure hangs on one lucky prompt. Every
stage is a folder, not run again once finished, and every measurement one JSON line in `--out`: the same command continues where it was.
"""
import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prompts import strategies
from prompts.intervals import share_interval
from prompts.templates import DIRECT, WORKED, Style, render
from stages.data import curriculum
from stages.evals import commands, scoring
from stages.evals.backends import LocalModel
from stages.evals.scheduler import solve
from stages.evals.statistics import compare
from stages.evals.studies import markdown, stage
from stages.evals.tasks import Task, load_task
from stages.run import figures
from stages.run.console import clock, progress
from stages.run.entry import run_program
from stages.run.manifest import MANIFEST, Manifest, say
from stages.run.story_frontier import example_series, file_name

RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")
SHOTS = (0, 1, 2, 4)  # and what the context holds
KINDS = {WORKED: "few_shot_cot", DIRECT: "few_shot"}  # without exemplars the same prompts as zero_shot_cot and direct
MAX_TOKENS = {WORKED: 96, DIRECT: 16}
MODELS = {"base": "pretrain", "sft": "sft", "ppo": "ppo"}
ROAD = {"pretrain": (), "sft": ("pretrain",), "preferences": ("sft",), "reward_model": ("sft", "preferences"),
        "ppo": ("sft", "reward_model")}  # stages with their parents, all of them beside prepare
PRICED = ["direct", "zero_shot_cot", "self_consistency"]  # strategies of the frontier
# For the budget alone, on one CPU core: seconds of a size's stages at width 128 up to SFT and from there to PPO (less for a narrower one),
# of one measurement of 300 problems, and of a model's part of the frontier.
ASSUMED_SFT_S, ASSUMED_PPO_S, ASSUMED_CELL_S, ASSUMED_FRONTIER_S = 700, 1200, 8, 300
Line = dict[str, Any]


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_exemplars", description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--main", type=Path, default=Path(RUNS) / "tiny", help="folder of the tiny recipe's finished runs")
    parser.add_argument("--widths", nargs="*", type=int, default=[64, 96], help="of the models that the study trains, multiples of 32")
    parser.add_argument("--ppo", nargs="*", type=int, default=[64, 96], help="which of these get preferences, a reward model and PPO too")
    parser.add_argument("--tasks", nargs="+", default=["word_problems", "chained_variables", "last_letters"],
                        choices=list(curriculum.TASKS))
    parser.add_argument("--difficulties", nargs="+", type=int, default=[3, 4, 5], help="steps of problems and exemplars")
    parser.add_argument("--problems", type=int, default=300, help="test problems a task, the same for every model")
    parser.add_argument("--draws", type=int, default=2, help="draws of exemplars, by seed")
    parser.add_argument("--num-samples", type=int, default=8, help="chains that vote, for the frontier (0: leave the frontier out)")
    parser.add_argument("--seed", type=int, default=0, help="of training, and of the choice of problems")
    parser.add_argument("--runs", type=Path, default=Path(RUNS) / "study_exemplars", help="a folder a run in here, and the figures")
    parser.add_argument("--out", type=Path, help="one JSON line a measurement (default: study_exemplars.jsonl in --runs)")
    return parser.parse_args(argv)


def study(given: argparse.Namespace) -> None:
    if wrong := [width for width in given.widths if width <= 0 or width % 32]:
        raise ValueError(f"--widths {wrong[0]}: heads are 32 wide, so give a multiple of 32")
    models = len(MODELS) + 2 * len(given.widths) + len(set(given.ppo) & set(given.widths))
    cells = models * len(given.tasks) * len(KINDS) * (1 + given.draws * len(SHOTS))
    training = sum((ASSUMED_SFT_S + ASSUMED_PPO_S * (width in given.ppo)) * width / 128 for width in given.widths)
    say(f"budget: {len(given.widths)} sizes to train, about {clock(training)}; at most {cells} measurements of {given.problems} problems, "
        f"about {clock(cells * ASSUMED_CELL_S * given.problems / 300)}; a frontier over {models} models, about "
        f"{clock(models * ASSUMED_FRONTIER_S * given.problems / 300 * given.num_samples / 8)}")
    tasks = [load_task(name, problems=Manifest(given.main / "prepare").product("problems"), difficulties=given.difficulties,
                       num_problems=given.problems, seed=given.seed) for name in given.tasks]
    out = given.out or given.runs / "study_exemplars.jsonl"
    done: list[Line] = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []

    def once(key: Line, make: Callable[[], Line]) -> Line:
        """A measurement from the file, or made now and added to it."""
        if line := next((line for line in done if line.items() >= key.items()), None):
            return line
        began = time.time()
        done.append(key | make() | {"wall_s": round(time.time() - began, 1)})
        out.parent.mkdir(parents=True, exist_ok=True)
        scoring.write_records(out, done)  # whole or not at all, so that a kill leaves no half line
        return done[-1]

    used: list[Line] = []
    evaluations = []
    most: dict[tuple[bool, str, str], int] = {}  # exemplars that the context holds: one tokenizer and one context for all sizes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for width, runs in sizes(given):
        for name in [name for name in MODELS if MODELS[name] in runs]:
            run = Manifest(runs[MODELS[name]])
            backend = LocalModel(run.product("model"), seed=given.seed, batch_size=256, device=device)
            style = Style(chat=name != "base", cues=curriculum.CUES, max_tokens=MAX_TOKENS)
            for task, kind in itertools.product(tasks, KINDS):
                key = (style.chat, task.name, kind)
                most[key] = most[key] if key in most else room(backend, task, style, kind, given.draws)
                for shots in sorted({s for s in SHOTS if s <= most[key]} | {most[key]}):
                    for draw in range(given.draws if shots else 1):
                        used.append(once({
                            "width": width, "model": name, "run": run.fingerprint, "task": task.name, "kind": kind, "shots": shots,
                            "draw": draw, "difficulties": given.difficulties, "n": len(task.rows), "seed": given.seed},
                            partial(measure, backend, style, task, kind, shots, draw, f"{name} {width}, {task.name}, {shots} {kind}")))
        if given.num_samples:
            evaluations.append(priced_run(given, width, runs))
    say("\n" + report(used))
    draw_figures(given.runs / "figures", used)
    if evaluations:
        commands.frontier([*map(str, evaluations), "--out", str(given.runs / "frontier")])


def sizes(given: argparse.Namespace) -> Iterator[tuple[int, dict[str, Path]]]:
    """Widths with the finished runs of each: those of the study, made here unless they are there already, then the recipe's main model.

    The gate warns and does not refuse: which size is shown should not depend on how good its reward model came out.
    """
    prepare = given.main / "prepare"
    for width in given.widths:
        runs = {"prepare": prepare}
        for name in list(ROAD)[:None if width in given.ppo else 2]:
            own = {"pretrain": {"hidden_size": width, "num_heads": max(1, width // 32)}, "ppo": {"gate": "warn"}}.get(name, {})
            folder = given.runs / f"{name}-{width}-{given.seed}"
            stage(name, folder, seed=given.seed, **own, **{f"parents.{parent}": str(runs[parent]) for parent in ("prepare", *ROAD[name])})
            runs[name] = folder
        yield width, runs
    found = {name: given.main / name for name in ("prepare", *ROAD) if (given.main / name / MANIFEST).is_file()}
    yield Manifest(given.main / "pretrain").config["hidden_size"], found


def room(backend: LocalModel, task: Task, style: Style, kind: str, draws: int) -> int:
    """The most exemplars with which every problem's prompt, of every draw, leaves room for its answer in the model's context."""
    for shots in range(1, len(task.pool) + 1):
        prompts = (render(row["question"], style, kind, task.examples(row, shots, draw)) for row in task.rows for draw in range(draws))
        if any(len(backend.encode(prompt)) + style.max_tokens[kind] > backend.context for prompt in prompts):
            return shots - 1
    return len(task.pool)


def measure(backend: LocalModel, style: Style, task: Task, kind: str, shots: int, draw: int, what: str) -> Line:
    """Greedy answers to the task's problems; one digit a problem in `right`."""
    strategy = getattr(strategies, KINDS[kind])
    bar: Any = progress([], what, total=len(task.rows))
    solved = solve([strategy(row, style, task.examples(row, shots, draw)) for row in task.rows], backend,
                   batch_size=4 * backend.batch_size, advance=bar.update)
    bar.close()
    records = [scoring.record(row, solution) for row, solution in zip(task.rows, solved, strict=True)]
    told = scoring.summary(records)
    return {"right": "".join(str(int(r["correct"])) for r in records), **{name: told[name] for name in (
        "unparsed", "finished", "tokens_mean", "prompt_tokens_mean", "too_long")}}


def priced_run(given: argparse.Namespace, width: int, runs: Mapping[str, Path]) -> Path:
    """The evaluation of one size for the frontier: the same problems, without exemplars, and a vote."""
    folder = given.runs / f"evaluation-{width}-{given.seed}"
    stage("evaluation", folder, seed=given.seed, tasks=given.tasks, difficulties=given.difficulties, num_problems=given.problems,
          num_samples=given.num_samples, models={name: PRICED for name, made in MODELS.items() if made in runs},
          **{f"parents.{name}": str(path) for name, path in runs.items() if name != "preferences"})
    return folder


def groups(lines: Sequence[Line]) -> dict[tuple[str, int, str, str], dict[int, list[float]]]:
    """By task, width, model and kind: for each number of exemplars every problem's share of right answers over the draws."""
    found: dict[tuple[str, int, str, str], dict[int, list[list[int]]]] = {}
    for line in lines:
        found.setdefault((line["task"], line["width"], line["model"], line["kind"]), {}).setdefault(line["shots"], []).append(
            [int(digit) for digit in line["right"]])
    return {key: {shots: [sum(right) / len(right) for right in zip(*draws, strict=True)] for shots, draws in by_shots.items()}
            for key, by_shots in found.items()}


def report(lines: Sequence[Line]) -> str:
    """Markdown: accuracy by number of exemplars, a table a task; and what exemplars add, pooled over the tasks, paired by problem."""
    found = groups(lines)
    tables = []
    for task in dict.fromkeys(key[0] for key in found):
        rows = []
        for (name, width, model, kind), by_shots in found.items():
            if name == task:
                told = {shots: "{:.3f} [{:.3f}, {:.3f}]".format(*share_interval(shares)) for shots, shares in by_shots.items()}
                rows.append([f"{model} {width}, {kind}", *(told.get(shots, "-") for shots in SHOTS), f"{told[max(told)]} ({max(told)})"])
        tables.append(markdown([task, *map(str, SHOTS), "what the context holds"], rows))
    rows = []
    for chosen in dict.fromkeys(key[1:] for key in found):
        own = [by_shots for key, by_shots in found.items() if key[1:] == chosen]
        none = [share for by_shots in own for share in by_shots[0]]
        rows.append(["{1} {0}, {2}".format(*chosen)])
        for shots in ([min(1, max(by_shots)) for by_shots in own], [max(by_shots) for by_shots in own]):
            pooled = compare([share for by_shots, number in zip(own, shots, strict=True) for share in by_shots[number]], none)
            rows[-1].append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in (pooled["difference"], *pooled["ci95"]))))
        draws: dict[tuple[str, int], list[float]] = {}
        for line in lines:
            if (line["width"], line["model"], line["kind"]) == chosen:
                draws.setdefault((line["task"], line["shots"]), []).append(100 * line["right"].count("1") / line["n"])
        rows[-1].append(f"{max(max(some) - min(some) for some in draws.values()):.1f}")
    tables.append(markdown(["points, all tasks", "one exemplar - none", "what the context holds - none", "draws differ by at most"], rows))
    return "\n\n".join(tables)


def draw_figures(folder: Path, lines: Sequence[Line]) -> None:
    """A figure for each task and stage of training: a colour a width, worked steps solid, bare answers dashed."""
    cells: list[Line] = []
    for (task, width, model, kind), by_shots in groups(lines).items():
        for shots, shares in by_shots.items():
            mean, *ends = share_interval(shares)
            cells.append({"task": task, "stage": model, "model": str(width), "strategy": KINDS[kind], "shots": shots, "accuracy": mean,
                          "wilson95": ends})
    for task, model in dict.fromkeys((c["task"], c["stage"]) for c in cells):
        here = [c for c in cells if (c["task"], c["stage"]) == (task, model)]
        figures.plot(folder / f"{file_name(task)}-{model}.svg",
                     example_series(here, 0, {c["model"]: f"width {c['model']}" for c in here}), title=f"{task}, {model}",
                     x="exemplars in the prompt", y="accuracy", y_range=(0, 1.02))
    say(f"figures: {folder}")


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
