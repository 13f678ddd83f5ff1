"""Subcommands of `python -m stages.evaluation` that need no model: `score` and `frontier`."""
import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prompts.answers import ANSWER_TYPES
from stages.evals import recorded
from stages.evals.frontier import cheapest, joined
from stages.evals.studies import markdown
from stages.run import figures
from stages.run.figures import short
from stages.run.manifest import Manifest, say, write_json
from stages.run.story_frontier import compute_series, file_name

LEVELS = (0.5, 0.7, 0.8, 0.9, 0.95)  # accuracies whose price is told


def score(arguments: list[str]) -> None:
    """Accuracy of recorded samples, by vote or of one sample, with early stopping replayed and a paired comparison."""
    parser = argparse.ArgumentParser(prog="python -m stages.evaluation score", description=score.__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help='{"id", "gold", "samples": [text | {"text", "tokens"?, "answer"?, "weight"?}]} a line')
    parser.add_argument("--answer-type", choices=ANSWER_TYPES, help="what an answer is; left out: told by its looks")
    parser.add_argument("--extract", choices=("last", "first"), default="last", help="which of several marked answers counts")
    parser.add_argument("--vote", choices=recorded.VOTES, default="majority", help="first: the first sample alone")
    parser.add_argument("--samples", type=int, metavar="K", help="use the first K samples of each question")
    parser.add_argument("--stop", default="none", metavar="RULE", help="beta:0.95, window:5, binomial:0.05 or none")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a second file, paired by id")
    parser.add_argument("--out", required=True, type=Path, help="result.json to write")
    given = parser.parse_args(arguments)
    rules = recorded.Rules(answer_type=given.answer_type, extract=given.extract, vote=given.vote, samples=given.samples, stop=given.stop)
    check_files(given.file, given.compare, given.out)
    result = recorded.score(given.file, rules, other=given.compare)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, result)
    for line in lines(result, given.samples):
        say(line)


def check_files(file: Path, other: Path | None, out: Path) -> None:
    """Raises ValueError for samples that are no file and for a result that cannot be written or would replace samples."""
    for path in filter(None, (file, other)):
        if not path.is_file():
            raise ValueError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}: give a file with a question's samples a line")
        if out.resolve() == path.resolve():
            raise ValueError(f"--out {out} would replace the samples: give the result another name")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name the file, as in {out / 'result.json'}")


def lines(result: dict[str, Any], samples: int | None) -> list[str]:
    low, high = result["wilson95"]
    said = [f"accuracy {result['accuracy']:.4f} [{low:.4f}, {high:.4f}], n {result['n']}, unparsed {result['unparsed']}, "
            f"unanswered {result['unanswered']}, ties {result['ties']}, samples used {result['samples_used_mean']:.2f} a question"]
    if result["lenient"]:
        said.append(f"lenient accuracy {result['lenient']['accuracy']:.4f}, unparsed {result['lenient']['unparsed']}")
    if result["fewer_samples"]:
        said.append(f"{result['fewer_samples']} questions have fewer than {samples} samples: all of theirs were used")
    if pair := result.get("compare"):
        low, high = pair["ci95"]  # the bootstrap has no width where no question differs
        said.append(f"minus {pair['other']}: {pair['difference']:+.4f} [{low:+.4f}, {high:+.4f}], n {pair['n']}, McNemar p "
                    f"{pair['mcnemar']['p']:.3g} ({pair['mcnemar']['only_first']} against {pair['mcnemar']['only_second']})")
        if lone := pair["only_in_first_file"] + pair["only_in_second_file"]:
            said.append(f"{lone} questions are in one of the files only and left out of the comparison")
    return said


def frontier(arguments: list[str]) -> None:
    """Inference against training: the models of several evaluations on one figure a task, and what each accuracy costs."""
    parser = argparse.ArgumentParser(prog="python -m stages.evaluation frontier", description=frontier.__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="finished evaluations of the same problems, one a size")
    parser.add_argument("--questions", nargs="+", type=float, default=[1e4, 1e6], help="how many answers a model is trained for")
    parser.add_argument("--out", required=True, type=Path, help="folder for frontier.json, frontier.md and the figures")
    given = parser.parse_args(arguments)
    runs = [Manifest(path) for path in given.runs]
    if other := [run for run in runs if "results" not in run.data["products"]]:
        raise ValueError(f"{other[0].path} is a {other[0].data['stage']} run: give finished evaluations")
    asked = [{name: value for name, value in run.data["inputs"].items() if name.startswith("task ")} for run in runs]
    if other := [run for run, tasks in zip(runs, asked, strict=True) if tasks != asked[0]]:
        raise ValueError(f"{other[0].path} asked other problems than {runs[0].path}: evaluate with the same prepare run, tasks, "
                         "difficulties, num_problems and seed")
    points = joined([json.loads(run.product("results").read_text(encoding="utf-8"))["compute"] for run in runs])
    if not points:
        raise ValueError("no model of these evaluations has a price: their stages count no FLOPs, or no task has two strategies")
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "frontier.json", {"runs": {str(run.path): run.fingerprint for run in runs}, "points": points})
    for task in dict.fromkeys(p["task"] for p in points):
        figures.plot(given.out / f"{file_name(task)}.svg", compute_series([p for p in points if p["task"] == task], {}), title=task,
                     x="FLOPs a question", y="accuracy", log_x=True, y_range=(0, 1.02))
    text = "\n\n".join([prices(points), levels(points, given.questions)])
    (given.out / "frontier.md").write_text(text + "\n", encoding="utf-8")
    say(text)


def prices(points: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: each model's training FLOPs, and by task what its greedy worked answers and its largest vote get for their FLOPs."""
    tasks = list(dict.fromkeys(p["task"] for p in points))
    rows = []
    for model in dict.fromkeys(p["model"] for p in points):
        row = [model, short(next(p["training_flops"] for p in points if p["model"] == model))]
        for task in tasks:
            own = [p for p in points if (p["model"], p["task"]) == (model, task)]
            for some in ([p for p in own if p["strategy"] == "zero_shot_cot"], [p for p in own if p["k"]][-1:]):
                row += [f"{p['accuracy']:.3f} {span(p['ci95'])}, {short(p['inference_flops'])}" for p in some] or ["-"]
        rows.append(row)
    heads = [f"{task}, {what}" for task in tasks for what in ("greedy steps", "vote of all")]
    return markdown(["model", "FLOPs to train", *heads], rows)


def levels(points: Sequence[Mapping[str, Any]], questions: Sequence[float]) -> str:
    """Markdown: the cheapest way to each of `LEVELS`, by inference alone and with training for so many questions."""
    rows: list[list[str]] = []
    for task in dict.fromkeys(p["task"] for p in points):
        told: dict[tuple[str, ...], list[float]] = {}  # levels by their ways: what holds for several is one row
        for level in LEVELS:
            found = [cheapest([p for p in points if p["task"] == task], level, n) for n in (0, *questions)]
            if any(found):
                told.setdefault(tuple(f"{of[0]['model']}, {way(of[0])}: {short(of[1])}" if of else "-" for of in found), []).append(level)
        rows += [[task, " to ".join(f"{level:g}" for level in dict.fromkeys((same[0], same[-1]))), *ways] for ways, same in told.items()]
    return markdown(["task", "accuracy", "FLOPs a question", *(f"in all, {short(n)} questions" for n in questions)], rows)


def span(ends: Sequence[float]) -> str:
    return "[{:.3f}, {:.3f}]".format(*ends)


def way(point: Mapping[str, Any]) -> str:
    return point["strategy"] if not point["k"] else "one chain" if point["k"] == 1 else f"vote of {point['k']}"
