"""Study: does self-consistency beat greedy chain of thought where greedy stands between 50 and 80 %?

    python -m stages.evals.study_sc --runs runs/tiny/sft --seeds 0 1 2

Tasks and difficulties in that range are chosen on validation problems; the comparison is on fresh test problems, other ones for
each seed, pooled over seeds and paired by problem. One JSON line a measurement goes to `--out`; the same command continues there.
"""
import argparse
import itertools
import json
import os
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
from stages.run.console import clock, progress, table
from stages.run.entry import fail
from stages.run.manifest import Manifest, say

ASSUMED_TOKENS, ASSUMED_SPEED = 45, 6000  # tokens of a worked answer, tokens a second: for the budget alone
RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_sc", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", default=[f"{RUNS}/tiny/sft"], help="run folders of models (pretrain, sft or ppo)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="sampling seeds, each with problems of its own")
    parser.add_argument("--problems", type=int, default=900, help="test problems a run and seed, over all its cells")
    parser.add_argument("--num-samples", type=int, default=16, help="chains that vote")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of the chains")
    parser.add_argument("--tasks", nargs="+", default=["word_problems", "chained_variables"], choices=list(curriculum.TASKS))
    parser.add_argument("--difficulties", nargs="+", type=int, default=[3, 4, 5], help="steps to look at")
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


def measure(backend: LocalModel, style: Style, rows: list[dict], num_samples: int, temperature: float, what: str) -> dict[str, Any]:
    """Greedy chain of thought, the vote and its single chains on the same problems; one digit or number a problem."""
    made: dict[str, list[dict]] = {}
    for name in ("greedy", "vote") if num_samples else ("greedy",):
        chains = [strategies.zero_shot_cot(row, style) if name == "greedy" else
                  strategies.self_consistency(row, style, n=num_samples, temperature=temperature) for row in rows]
        bar: Any = progress([], f"{what} {name}", total=len(rows) * (num_samples if name == "vote" else 1))
        solved = solve(chains, backend, batch_size=4 * backend.batch_size, advance=bar.update)
        bar.close()
        made[name] = [scoring.record(row, solution) for row, solution in zip(rows, solved, strict=True)]
    result: dict[str, Any] = {name: "".join(str(int(r["correct"])) for r in records) for name, records in made.items()}
    if num_samples:
        result["sampled"] = [round(share * num_samples) for share in scoring.shares(made["vote"])]
    return result


def study(given: argparse.Namespace) -> None:
    """Raises ValueError when no task and difficulty of a run lies in the range."""
    tokens = len(given.runs) * len(given.seeds) * given.problems * (given.num_samples + 1) * ASSUMED_TOKENS
    say(f"budget: {len(given.runs)} runs x {len(given.seeds)} seeds x {given.problems} problems x {given.num_samples + 1} chains, about "
        f"{tokens / 1e6:.1f}M tokens, {clock(tokens / ASSUMED_SPEED)} at {ASSUMED_SPEED:,} tokens a second")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in given.out.read_text(encoding="utf-8").splitlines()] if given.out.is_file() else []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for folder in given.runs:
        run = Manifest(folder)
        chat = run.data["stage"] != "pretrain"
        style = Style(chat=chat, cues=curriculum.CUES, max_tokens={"worked": given.max_tokens, "direct": 16})
        backend = LocalModel(run.product("model"), seed=0, batch_size=256, device=device)

        def once(key: dict[str, Any], split: str, start: int, count: int, num_samples: int, backend=backend, style=style) -> dict[str, Any]:
            """A measurement from the file, or made now and appended to it."""
            for line in done:
                if all(line.get(k) == v for k, v in key.items()):
                    return line
            began, backend.seed = time.time(), key.get("seed", 0)
            rows = fresh(split, key["task"], key["difficulty"], start, count)
            what = f"{key['task']} {key['difficulty']}"
            line = key | measure(backend, style, rows, num_samples, given.temperature, what) | {"wall_s": round(time.time() - began, 1)}
            with given.out.open("a", encoding="utf-8") as f:
                f.write(json.dumps(line) + "\n")
            done.append(line)
            return line

        common = {"run": str(folder), "model": run.fingerprint, "max_tokens": given.max_tokens}
        cells = []
        for task, difficulty in itertools.product(given.tasks, given.difficulties):
            key = common | {"kind": "probe", "task": task, "difficulty": difficulty, "n": given.probe}
            greedy = once(key, "validation", 0, given.probe, 0)["greedy"].count("1") / given.probe
            inside = given.range[0] <= greedy <= given.range[1]
            say(f"{folder} {task} difficulty {difficulty}: greedy {greedy:.3f} on {given.probe} validation problems"
                f"{'' if inside else ', outside the range'}")
            if inside:
                cells.append((task, difficulty))
        if not cells:
            raise ValueError(f"{folder}: greedy chain of thought is nowhere between {given.range[0]} and {given.range[1]}: "
                             "give other --difficulties or another --range")
        for i, seed in enumerate(given.seeds):
            for j, (task, difficulty) in enumerate(cells):
                count = given.problems // len(cells) + (j < given.problems % len(cells))
                key = common | {"kind": "cell", "task": task, "difficulty": difficulty, "seed": seed, "place": i, "n": count,
                                "num_samples": given.num_samples, "temperature": given.temperature}
                once(key, "test", i * given.problems, count, given.num_samples)
    report(given, done)


def report(given: argparse.Namespace, done: list[dict[str, Any]]) -> None:
    """Paired comparisons of the lines that belong to these settings: each run, and all together."""
    lines = [line for line in done if line["kind"] == "cell" and line["run"] in given.runs and line["seed"] in given.seeds
             and (line["num_samples"], line["temperature"]) == (given.num_samples, given.temperature)]
    rows = []
    for name in [*given.runs, *(["all"] if len(given.runs) > 1 else [])]:
        chosen = [line for line in lines if name in ("all", line["run"])]
        vote, greedy = ([int(digit) for line in chosen for digit in line[kind]] for kind in ("vote", "greedy"))
        sampled = [right / line["num_samples"] for line in chosen for right in line["sampled"]]
        for other, scores in (("greedy", greedy), ("one sampled chain", sampled)):
            result = compare(vote, scores)
            rows.append([name, other, f"{sum(vote) / len(vote):.3f}", f"{sum(scores) / len(scores):.3f}", f"{result['difference']:+.4f}",
                         f"[{result['ci95'][0]:+.4f}, {result['ci95'][1]:+.4f}]", str(result["n"]),
                         "" if result["p"] is None else f"{result['p']:.2g}"])
    say(table(["run", "against", "vote", "other", "difference", "95 %", "n", "McNemar p"], rows))


if __name__ == "__main__":
    try:
        study(arguments(sys.argv[1:]))
    except (ValueError, OSError) as error:
        fail(str(error), None)
        sys.exit(2)
