"""Study: does self-consistency beat greedy chain of thought where greedy stands between 50 and 80 %?

    python -m stages.evals.study_sc --seeds 0 1 2

Without examples, models of the default recipe are too good or too bad for the question, so the study pretrains its own on fewer
tokens, one for each seed (or takes finished ones: `--runs`, with `--shots` worked examples before each question). Tasks and
difficulties in that range are chosen on validation problems; the comparison is on fresh test problems, other ones each time, pooled
and paired by problem. One JSON line a measurement goes to `--out`; the same command continues where it was.
"""
import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prompts import strategies
from prompts.templates import Style
from stages.data import curriculum
from stages.evals import scoring
from stages.evals.backends import LocalModel
from stages.evals.scheduler import solve
from stages.evals.statistics import compare
from stages.evals.tasks import Task
from stages.run.console import clock, progress, table
from stages.run.entry import run_program
from stages.run.manifest import Manifest, say

# For the budget alone: tokens of a worked answer, tokens a second of decoding and of pretraining on two CPU cores.
ASSUMED_TOKENS, ASSUMED_SPEED, TRAINING_SPEED = 45, 6000, 8500
RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_sc", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", default=[], help="finished pretrain, sft or ppo runs (default: pretrain one a seed)")
    parser.add_argument("--train-tokens", type=int, default=1_000_000, help="tokens of the study's own models")
    parser.add_argument("--config", default="recipes/tiny/pretrain.yaml", help="recipe of the study's own models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training, or of sampling from each of the runs")
    parser.add_argument("--problems", type=int, default=1500, help="test problems for each model and seed, over all its cells")
    parser.add_argument("--num-samples", type=int, default=16, help="chains that vote")
    parser.add_argument("--shots", type=int, default=0, help="worked examples before each question, the same for every chain of it")
    parser.add_argument("--temperature", type=float, default=0.8, help="temperature of the chains")
    parser.add_argument("--tasks", nargs="+", default=["word_problems", "chained_variables"], choices=list(curriculum.TASKS))
    parser.add_argument("--difficulties", nargs="+", type=int, default=[2, 3, 4, 5], help="steps to look at")
    parser.add_argument("--range", nargs=2, type=float, default=[0.5, 0.8], help="greedy accuracy wanted, on validation problems")
    parser.add_argument("--probe", type=int, default=200, help="validation problems a task and difficulty")
    parser.add_argument("--max-tokens", type=int, default=112, help="tokens of a worked answer")
    parser.add_argument("--out", type=Path, default=Path(RUNS) / "study_sc.jsonl", help="measurements, one JSON line each")
    return parser.parse_args(argv)


def fresh(split: str, task: str, difficulty: int, start: int, count: int) -> list[dict]:
    """Problems `start` to `start + count` of an endless stream without repeats, so that seeds never share one."""
    def distinct() -> Iterator[dict]:
        seen = set()
        for problem in curriculum.problems(7_000_000, split=split, tasks={task: 1.0}, difficulties=(difficulty,)):
            if problem.id not in seen:
                seen.add(problem.id)
                yield problem.as_row()
    return list(itertools.islice(distinct(), start, start + count))


def examples_of(task: str, count: int = 300) -> list[dict]:
    """Problems of the pretraining split, of every difficulty that is trained on."""
    source = curriculum.problems(7_000_001, split="train", tasks={task: 1.0})
    return [problem.as_row() for problem in itertools.islice(source, count)]


def measure(backend: LocalModel, style: Style, rows: list[dict], num_samples: int, temperature: float, what: str,
            shots: int = 0) -> dict[str, Any]:
    """Greedy chain of thought, the vote and its single chains on the same problems; one digit or number a problem."""
    task = Task(name=rows[0]["task"], rows=rows, cues=style.cues, pool=examples_of(rows[0]["task"]) if shots else [])
    shown = [task.examples(row, shots, 0) for row in rows]
    made: dict[str, list[dict]] = {}
    too_long = backend.too_long
    for name in ("greedy", "vote") if num_samples else ("greedy",):
        chains = [strategies.few_shot_cot(row, style, shown_) if name == "greedy" else
                  strategies.self_consistency(row, style, shown_, n=num_samples, temperature=temperature)
                  for row, shown_ in zip(rows, shown, strict=True)]
        bar: Any = progress([], f"{what} {name}", total=len(rows) * (num_samples if name == "vote" else 1))
        solved = solve(chains, backend, batch_size=4 * backend.batch_size, advance=bar.update)
        bar.close()
        made[name] = [scoring.record(row, solution) for row, solution in zip(rows, solved, strict=True)]
    if backend.too_long > too_long:  # they would count as wrong
        raise ValueError(f"{what}: {backend.too_long - too_long} prompts leave no room for {style.max_tokens['worked']} tokens: "
                         "give fewer --shots or --max-tokens")
    result: dict[str, Any] = {name: "".join(str(int(r["correct"])) for r in records) for name, records in made.items()}
    if num_samples:
        result["sampled"] = [round(share * num_samples) for share in scoring.shares(made["vote"])]
    return result


def models(given: argparse.Namespace) -> list[tuple[str, int]]:
    """Run folders with a sampling seed each; the study's own models are pretrained here unless they are there already."""
    if given.runs:
        return [(folder, seed) for folder in given.runs for seed in given.seeds]
    made = []
    for seed in given.seeds:
        folder = f"{given.out.with_suffix('')}/pretrain-{given.train_tokens}-{seed}"
        if subprocess.run([sys.executable, "-m", "stages.pretrain", "--config", given.config, "--tokens", str(given.train_tokens),
                           "--seed", str(seed), "--run-dir", folder], check=False).returncode:
            raise ValueError(f"pretraining {folder} failed, see above")
        made.append((folder, seed))
    return made


def study(given: argparse.Namespace) -> None:
    """Raises ValueError when no task and difficulty of any model lies in the range."""
    pairs = len(given.seeds) * max(1, len(given.runs))
    answers = pairs * (given.problems * (given.num_samples + 1) + given.probe * len(given.tasks) * len(given.difficulties))
    tokens = answers * ASSUMED_TOKENS
    training = 0 if given.runs else len(given.seeds) * given.train_tokens
    say(f"budget: {pairs} x {given.problems} problems x {given.num_samples + 1} chains with probes {tokens / 1e6:.1f}M tokens, about "
        f"{clock(tokens / ASSUMED_SPEED)}; pretraining {training / 1e6:.1f}M tokens, about {clock(training / TRAINING_SPEED)}")
    done = [json.loads(line) for line in given.out.read_text(encoding="utf-8").splitlines()] if given.out.is_file() else []
    used = []
    for place, (folder, seed) in enumerate(models(given)):
        run = Manifest(folder)
        style = Style(chat=run.data["stage"] != "pretrain", cues=curriculum.CUES, max_tokens={"worked": given.max_tokens})
        backend = LocalModel(run.product("model"), seed=seed, batch_size=256, device="cuda" if torch.cuda.is_available() else "cpu")
        common = {"run": folder, "model": run.fingerprint, "max_tokens": given.max_tokens, "shots": given.shots}

        def once(key: dict[str, Any], split: str, start: int, num_samples: int, backend=backend, style=style) -> dict[str, Any]:
            """A measurement from the file, or made now and added to it."""
            if line := next((line for line in done if ({"shots": 0} | line).items() >= key.items()), None):
                return line
            began, rows = time.time(), fresh(split, key["task"], key["difficulty"], start, key["n"])
            line = key | measure(backend, style, rows, num_samples, given.temperature, f"{key['task']} {key['difficulty']}", given.shots)
            line["wall_s"] = round(time.time() - began, 1)
            done.append(line)
            scoring.write_records(given.out, done)  # whole or not at all, so that a kill leaves no half line
            return line

        cells = []
        for task, difficulty in itertools.product(given.tasks, given.difficulties):
            key = common | {"kind": "probe", "task": task, "difficulty": difficulty, "n": given.probe}
            greedy = once(key, "validation", 0, 0)["greedy"].count("1") / given.probe
            inside = given.range[0] <= greedy <= given.range[1]
            say(f"{folder}: {task}, difficulty {difficulty}: greedy {greedy:.3f} on validation{'' if inside else ', outside the range'}")
            cells += [(task, difficulty)] if inside else []
        if not cells:
            say(f"{folder}: no cell in the range, left out")
        for j, (task, difficulty) in enumerate(cells):
            key = common | {"kind": "cell", "task": task, "difficulty": difficulty, "seed": seed, "place": place,
                            "n": given.problems // len(cells) + (j < given.problems % len(cells)),
                            "num_samples": given.num_samples, "temperature": given.temperature}
            used.append(once(key, "test", place * given.problems, given.num_samples))
    if not used:
        raise ValueError(f"greedy chain of thought is nowhere between {given.range[0]} and {given.range[1]}: give other --difficulties, "
                         "other --train-tokens or another --range")
    report(used)


def report(lines: list[dict[str, Any]]) -> None:
    """Paired comparisons, for each model and pooled."""
    rows = []
    names = list(dict.fromkeys(line["run"] for line in lines))
    for name in [*names, *(["all"] if len(names) > 1 else [])]:
        chosen = [line for line in lines if name in ("all", line["run"])]
        vote, greedy = ([int(digit) for line in chosen for digit in line[kind]] for kind in ("vote", "greedy"))
        sampled = [right / line["num_samples"] for line in chosen for right in line["sampled"]]
        for other, scores in (("greedy", greedy), ("one sampled chain", sampled)):
            result = compare(vote, scores)
            rows.append([name, other, f"{sum(vote) / len(vote):.3f}", f"{sum(scores) / len(scores):.3f}", f"{result['difference']:+.4f}",
                         f"[{result['ci95'][0]:+.4f}, {result['ci95'][1]:+.4f}]", str(result["n"]),
                         "" if result["p"] is None else f"{result['p']:.2g}"])
    say(table(["run", "against", "vote", "other", "difference", "95 %", "n", "p"], rows))


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
