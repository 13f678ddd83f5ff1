"""Emergence over a ladder: do its models learn a task suddenly, or does the metric jump?

    python -m stages.evaluation emergence runs/tiny/scaling runs/tiny/pretrain --out runs/tiny/emergence

Every model answers the same held-out problems greedily, and is asked how likely it finds the tokens of the right answer: their mean
log-probability and Brier score, which are smooth. Beside the measured accuracy stands what these scores alone predict
(stages.laws.emergence, Schaeffer et al. 2023): by a monotone map that knows nothing of compute and, for the log-probability, as the chance
that all tokens of the answer are right, exp(L x mean). Each measurement is one line of measured.jsonl, so the same command continues where
it was.
"""
import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prompts import strategies
from prompts.intervals import wilson
from prompts.templates import DIRECT, WORKED, Style, example_answer, render
from stages.data import curriculum
from stages.data.problems import read_problems
from stages.evals.backends import LocalModel
from stages.evals.scheduler import solve
from stages.evals.scoring import record, write_records
from stages.evals.studies import markdown
from stages.evals.tasks import Task, load_task
from stages.laws.emergence import emergence, exact_match, line, monotone, r_squared
from stages.run import figures
from stages.run.console import progress
from stages.run.figures import Series, short
from stages.run.manifest import Manifest, say, write_json

TASKS, PROBLEMS = ("word_problems", "chained_variables", "last_letters"), 150  # asked unless the user says otherwise
HOW = {DIRECT: strategies.direct, WORKED: strategies.zero_shot_cot}
MAX_TOKENS = {DIRECT: 16, WORKED: 96}
SMOOTH = {"logprob": "mean log-probability", "brier": "Brier score"}
Line = dict[str, Any]


def run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.evaluation emergence", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="finished ladders and pretrain runs, five models together at least")
    parser.add_argument("--tasks", nargs="+", choices=list(curriculum.TASKS),
                        help=f"default: {', '.join(TASKS)}, those of them that prepare has test problems of")
    parser.add_argument("--difficulties", nargs="+", type=int,
                        help="steps of the problems, in equal numbers (default: the three largest that prepare has)")
    parser.add_argument("--problems", type=int, help=f"problems a task, the same for every model (default: {PROBLEMS}, or all there are)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of problems")
    parser.add_argument("--out", type=Path, required=True, help="folder for measured.jsonl, emergence.json, emergence.md and the figures")
    given = parser.parse_args(argv)
    models = models_of(given.runs)
    prepare = Manifest(models[0][1].config["parents"]["prepare"])
    fill_in(given, read_problems(prepare.product("problems") / "test.jsonl"))
    tasks = [load_task(name, problems=prepare.product("problems"), difficulties=given.difficulties, num_problems=given.problems,
                       seed=given.seed) for name in given.tasks]
    out = given.out / "measured.jsonl"
    lines: list[Line] = [json.loads(row) for row in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []
    given.out.mkdir(parents=True, exist_ok=True)
    used = []
    for name, manifest, flops in models:
        backend = None
        for task in tasks:
            for kind in HOW:
                key = {"model": name, "run": manifest.fingerprint, "flops": flops, "task": task.name, "kind": kind, "n": len(task.rows),
                       "difficulties": given.difficulties, "seed": given.seed}
                found = next((row for row in lines if row.items() >= key.items()), None)
                if found is None:
                    backend = backend or LocalModel(manifest.product("model"), seed=given.seed, batch_size=256,
                                                    device="cuda" if torch.cuda.is_available() else "cpu")
                    found = key | measure(backend, task, kind, f"{name}, {task.name}, {kind}")
                    lines.append(found)
                    write_records(out, lines)
                used.append(found)
    told = curves(used)
    write_json(given.out / "emergence.json", told)
    (given.out / "emergence.md").write_text(report(told) + "\n", encoding="utf-8")
    draw(given.out, told)
    say("\n" + report(told))


def fill_in(given: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """What was not asked for, by the test problems there are; says so where that is less than usual."""
    given.difficulties = given.difficulties or sorted({row["difficulty"] for row in rows})[-3:]
    counts = Counter((row["task"], row["difficulty"]) for row in rows)
    fewest = {task: min(counts[task, difficulty] for difficulty in given.difficulties) for task in given.tasks or TASKS}
    given.tasks = given.tasks or [task for task in TASKS if fewest[task]] or list(TASKS)  # of none, the error names what there is
    given.problems = given.problems or min(PROBLEMS, len(given.difficulties) * min(fewest[task] for task in given.tasks)) or PROBLEMS
    say(f"{given.problems} problems of difficulties {', '.join(map(str, given.difficulties))} each of {', '.join(given.tasks)}" + "".join(
        f"; none of {task} there" for task in TASKS if fewest.get(task) == 0))


def models_of(runs: Sequence[Path]) -> list[tuple[str, Manifest, float]]:
    """Name, run and training FLOPs of each model, the cheapest first. Of a ladder, those its law was fitted to.

    Raises ValueError for runs of another stage, of different prepare runs, and for fewer than five models.
    """
    found = []
    for path in runs:
        manifest = Manifest(path)
        if manifest.data["stage"] not in ("scaling", "pretrain"):
            raise ValueError(f"{path} is a {manifest.data['stage']} run: give ladders (scaling) and pretrain runs")
        names = ([json.loads(row)["run"] for row in manifest.product("points").read_text(encoding="utf-8").splitlines()]
                 if manifest.data["stage"] == "scaling" else [""])
        for name in names:
            one = Manifest(path / name)
            found.append((name or path.name, one, float(one.counts["flops"])))
    if other := [one for _, one, _ in found if one.data["parents"] != found[0][1].data["parents"]]:
        raise ValueError(f"{other[0].path} was trained on other tokens than {found[0][1].path}: give runs of one prepare run")
    if len(found) < 5:
        raise ValueError(f"{len(found)} models: give a ladder, or five pretrain runs or more")
    return sorted(found, key=lambda model: model[2])


def measure(backend: LocalModel, task: Task, kind: str, what: str) -> Line:
    """Greedy accuracy on the task, and the means over problems of what the model gives the right answer's tokens: their mean
    log-probability, their mean Brier score, the share of problems of which each token is right, and their number."""
    style = Style(chat=False, cues=curriculum.CUES, max_tokens=MAX_TOKENS)
    bar: Any = progress([], what, total=len(task.rows))
    solved = solve([HOW[kind](row, style) for row in task.rows], backend, batch_size=4 * backend.batch_size, advance=bar.update)
    bar.close()
    right = sum(record(row, solution)["correct"] for row, solution in zip(task.rows, solved, strict=True))
    graded = [backend.grade(render(row["question"], style, kind), f" {example_answer(row, kind)}") for row in task.rows]
    return {"accuracy": right / len(task.rows), "wilson95": list(wilson(right, len(task.rows))),
            "logprob": float(np.mean([np.mean(logprobs) for logprobs, _ in graded])),
            "brier": float(np.mean([np.mean(brier) for _, brier in graded])),
            "tokens": float(np.mean([len(logprobs) for logprobs, _ in graded]))}


def curves(lines: Sequence[Line]) -> dict[str, Any]:
    """By task and kind: the models' figures, what the smooth scores predict, and how well each explains the accuracy (R2)."""
    found: dict[str, Any] = {}
    for task, kind in dict.fromkeys((row["task"], row["kind"]) for row in lines):
        own = [row for row in lines if (row["task"], row["kind"]) == (task, kind)]
        flops, accuracy, logprob = (np.array([row[key] for row in own]) for key in ("flops", "accuracy", "logprob"))
        tokens = float(np.mean([row["tokens"] for row in own]))
        cell: dict[str, Any] = {"task": task, "kind": kind, "n": own[0]["n"], "tokens": tokens, "models": own}
        found[f"{task}, {kind}"] = cell
        if np.ptp(accuracy) == 0:
            continue  # nothing to explain
        for name in SMOOTH:
            cell[name] = emergence(flops, accuracy, np.array([row[name] for row in own]))
        cell["r2_own"] = r_squared(accuracy, monotone(logprob, accuracy, logprob))
        chance = exact_match(np.minimum(line(np.log10(flops), logprob)[0], 0.0), tokens)
        cell["all_tokens_right"] = {"predicted_accuracy": chance.tolist(), "r2_predicted": r_squared(accuracy, chance)}
    return found


def report(told: Mapping[str, Any]) -> str:
    """Markdown: R2 of lines over log FLOPs, of the accuracy that the smooth scores' lines alone predict, and of the monotone map without a
    line: what compute does not explain and the score does. In words, where there is nothing to explain."""
    header = ["task, asked for", "tokens of an answer", "accuracy, cheapest to dearest model", "R2 of a line: accuracy",
              *(f"{text}" for text in SMOOTH.values()), *(f"accuracy by the {text}'s line" for text in SMOOTH.values()),
              "accuracy by exp(L x mean log-probability)", "accuracy by each model's own mean log-probability"]
    rows = []
    for name, cell in told.items():
        ends = [next(f"{m['accuracy']:.3f}" for m in sorted(cell["models"], key=lambda m: sign * m["flops"])) for sign in (1, -1)]
        row = [name, f"{cell['tokens']:.1f}", " to ".join(ends)]
        if "logprob" in cell:
            row += [f"{cell['logprob']['r2_accuracy']:.2f}", *(f"{cell[s]['r2_smooth']:.2f}" for s in SMOOTH),
                    *(f"{cell[s]['r2_predicted']:.2f}" for s in SMOOTH), f"{cell['all_tokens_right']['r2_predicted']:.2f}",
                    f"{cell['r2_own']:.2f}"]
        rows.append(row + ["-"] * (len(header) - len(row)))
    flat = [f"{name} ({cell['models'][0]['accuracy']:.3f})" for name, cell in told.items() if "logprob" not in cell]
    note = (f"-: no R2, of smooth scores either, where every model has the same accuracy, so that there is no rise to explain: "
            f"{'; '.join(flat)}. Ask easier or harder problems with --difficulties, or of larger models.")
    return "\n".join([markdown(header, rows), *(["", note] if flat else [])])


def draw(folder: Path, told: Mapping[str, Any]) -> None:
    """A figure for each task and kind: accuracy, the probability of a token of the right answer, and the accuracy predicted from it."""
    for name, cell in told.items():
        models = sorted(cell["models"], key=lambda m: m["flops"])
        flops = [m["flops"] for m in models]
        series = [Series("accuracy", flops, [m["accuracy"] for m in models], [m["wilson95"][0] for m in models],
                         [m["wilson95"][1] for m in models], look="points"),
                  Series("probability of a token", flops, [float(np.exp(m["logprob"])) for m in models], look="squares"),
                  Series("Brier score", flops, [m["brier"] for m in models], look="diamonds")]
        if "logprob" in cell:
            predicted = sorted((row["flops"], row["predicted_accuracy"]) for row in cell["logprob"]["rows"])
            series.append(Series("accuracy by the log-probability", [x for x, _ in predicted], [y for _, y in predicted], color=0))
            chance = sorted(zip([m["flops"] for m in cell["models"]], cell["all_tokens_right"]["predicted_accuracy"], strict=True))
            series.append(Series(f"all {short(cell['tokens'])} tokens right", [x for x, _ in chance], [y for _, y in chance], look="dashed",
                                 color=0))
        figures.plot(folder / f"{name.replace(', ', '-')}.svg", series, x="training FLOPs", y="", title=name, log_x=True)
    say(f"figures: {folder}/*.svg")
