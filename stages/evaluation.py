"""What each prompting strategy buys for the tokens it costs, on held-out problems, for the base, SFT and PPO model.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.evaluation --config recipes/tiny/evaluation.yaml
    python -m stages.evaluation score samples.jsonl --answer-type number --out result.json
"""
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from prompts import strategies
from prompts.strategies import Strategy
from prompts.templates import Style
from stages.data.corpora import read_rows
from stages.evals import scoring
from stages.evals.backends import LocalModel
from stages.evals.commands import score
from stages.evals.scheduler import solve
from stages.evals.tasks import Task, load_task
from stages.models.training import barrier, gather, rank, world_size
from stages.run.config import StageConfig, option
from stages.run.console import table
from stages.run.entry import launch, run_program
from stages.run.manifest import Manifest, Run, hash_data, is_main, metric, say, write_json

MODELS = {"base": ("pretrain", False), "base_chat": ("pretrain", True), "sft": ("sft", True), "ppo": ("ppo", True)}  # run, chat
STRATEGIES = ("direct", "few_shot", "zero_shot_cot", "few_shot_cot", "self_consistency")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(StageConfig):
    STAGE = "evaluation"
    PARENTS = ("prepare", "pretrain", "sft", "ppo")

    models: dict[str, list[str]] = option(
        {"base": list(STRATEGIES), "base_chat": ["zero_shot_cot"], "sft": list(STRATEGIES), "ppo": list(STRATEGIES)},
        f"strategies for each of {', '.join(MODELS)}: {', '.join(STRATEGIES)}")
    tasks: list[str] = option(["word_problems", "chained_variables"],
                              "embedded tasks, or [name=]format:source such as gsm8k:data/test.jsonl", recorded_only=True)
    difficulties: list[int] = option([1, 2, 3, 4], "steps of the embedded problems, in equal numbers")
    num_problems: int = option(200, "problems a cell (0: all there are)")
    shots: int = option(2, "examples in a few-shot prompt")
    num_samples: int = option(8, "chains that vote in self-consistency")
    temperature: float = option(1.0, "temperature of these chains")
    chain_shots: int = option(0, "examples before each of these chains")
    round_size: int | None = option(None, "draw chains in rounds and stop when settled (then no figure for one sampled chain)")
    max_tokens_worked: int = option(96, "tokens of a worked answer")
    max_tokens_direct: int = option(16, "tokens of a direct answer")
    cues: dict[str, str] = option({}, "phrases for `worked` and `direct`, instead of those that belong to the task")
    system: str | None = option(None, "system turn of every chat")
    batch_size: int = option(256, "rows decoded together; changes speed only", recorded_only=True)
    dtype: Literal["float32", "bfloat16"] = option("float32", "precision of the model")


def main(config: EvaluationConfig) -> Manifest:
    check(config)
    needed = {"prepare"} | {MODELS[model][0] for model, chosen in config.models.items() if chosen}
    config = replace(config, parents={name: path for name, path in config.parents.items() if name in needed})
    problems = Manifest(config.parents["prepare"]).product("problems")
    tasks = [load_task(spec, problems=problems, difficulties=config.difficulties, num_problems=config.num_problems,
                       seed=config.seed) for spec in config.tasks]
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"two tasks are called {[task.name for task in tasks]}: name them apart, as in train=gsm8k:train.jsonl")
    run = Run(config, inputs={"prompts": hash_data(first_prompts(config, tasks)),
                              **{f"task {task.name}": hash_data([task.rows, task.pool]) for task in tasks}})
    if run.finished:
        return run.manifest
    barrier()  # the run folder is there for all

    ask(config, run, tasks)
    if not is_main():
        return run.finish(metrics={})
    records = {key: [row for _, row in read_rows(path)] for key in cells(config, tasks)
               if (path := run.directory / file_of(*key)).is_file()}
    results = summarize(records)
    write_json(run.directory / "results.json", results)
    report(results)
    return run.finish(
        metrics=metrics_of(results), products={"results": "results.json", "items": "results"},
        counts={"problems": sum(len(task.rows) for task in tasks), "cells": len(records),
                "tokens": sum(s["tokens"] for cell in records.values() for r in cell for s in r["samples"])})


def check(config: EvaluationConfig) -> None:
    """Raises ValueError for a model or strategy that does not exist and for settings under which nothing can be asked."""
    for model, chosen in config.models.items():
        if model not in MODELS:
            raise ValueError(f"unknown model {model!r} in models: choose from {', '.join(MODELS)}")
        if unknown := set(chosen) - set(STRATEGIES):
            raise ValueError(f"unknown strategy {sorted(unknown)[0]!r} for {model}: choose from {', '.join(STRATEGIES)}")
    if unknown := set(config.cues) - {"worked", "direct"}:
        raise ValueError(f"unknown cue {sorted(unknown)[0]!r}: choose from worked, direct")
    if not config.tasks or not any(config.models.values()):
        raise ValueError("nothing to evaluate: give at least one task, and one model with a strategy")


def cells(config: EvaluationConfig, tasks: list[Task]) -> list[tuple[str, str, str]]:
    return [(model, task.name, strategy) for model, chosen in config.models.items() for task in tasks for strategy in chosen]


def first_prompts(config: EvaluationConfig, tasks: list[Task]) -> list[list[str]]:
    """What each cell asks first, problem by problem: cells answered under other words are out of date."""
    by_name = {task.name: task for task in tasks}
    return [[str(next(make(row))[0].prompt) for row in by_name[task].rows] for model, task, strategy in cells(config, tasks)
            for make in [strategy_of(config, by_name[task], MODELS[model][1], strategy)]]


def file_of(model: str, task: str, strategy: str) -> Path:
    return Path("results") / model / f"{task}.{strategy}.jsonl"


def strategy_of(config: EvaluationConfig, task: Task, chat: bool, name: str) -> Callable[[dict], Strategy]:
    """A strategy ready for a problem row."""
    style = Style(chat=chat, cues={**task.cues, **config.cues}, system=config.system,
                  max_tokens={"worked": config.max_tokens_worked, "direct": config.max_tokens_direct})
    if name == "self_consistency":
        return lambda row: strategies.self_consistency(
            row, style, task.examples(row, config.chain_shots, config.seed), n=config.num_samples,
            temperature=config.temperature, round_size=config.round_size)
    if name in ("few_shot", "few_shot_cot"):
        with_examples = strategies.few_shot if name == "few_shot" else strategies.few_shot_cot
        return lambda row: with_examples(row, style, task.examples(row, config.shots, config.seed))
    without = strategies.direct if name == "direct" else strategies.zero_shot_cot
    return lambda row: without(row, style)


def ask(config: EvaluationConfig, run: Run, tasks: list[Task]) -> None:
    """Answer every cell that is not on disk yet, each process its share of the problems.

    A cell in which no prompt leaves room for an answer in the model's context is left out: its figures stay missing.
    """
    missing = [key for key in cells(config, tasks) if not (run.directory / file_of(*key)).is_file()]
    barrier()  # all have looked before the first cell is written
    by_name = {task.name: task for task in tasks}
    cost = {key: config.num_samples if key[2] == "self_consistency" else 1 for key in missing}
    total = sum(math.ceil(len(by_name[task].rows) / world_size()) * cost[model, task, s] for model, task, s in missing)
    bar = tqdm(total=total, desc="answers", disable=not is_main(), leave=False, mininterval=.5 if sys.stderr.isatty() else 10)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    backend, loaded = None, ""
    for model, name, strategy in missing:
        parent, chat = MODELS[model]
        if loaded != parent:
            backend, loaded = LocalModel(run.parents[parent].product("model"), seed=config.seed, batch_size=config.batch_size,
                                         device=device, dtype=config.dtype), parent
        assert backend is not None
        task, before = by_name[name], backend.too_long
        make = strategy_of(config, task, chat, strategy)
        mine = range(rank(), len(task.rows), world_size())
        solutions = solve([make(task.rows[i]) for i in mine], backend, batch_size=4 * config.batch_size, advance=bar.update)
        found = gather([(i, scoring.record(task.rows[i], s)) for i, s in zip(mine, solutions, strict=True)])
        dropped = sum(gather([backend.too_long - before]))
        if dropped:
            say(f"{model}/{name}/{strategy}: {dropped} prompts leave no room to answer in a context of {backend.context} tokens")
        records = [r for _, r in sorted(found, key=lambda item: item[0])]
        if is_main() and any(sample["tokens"] for r in records for sample in r["samples"]):
            scoring.write_records(run.directory / file_of(model, name, strategy), records)
    bar.close()
    barrier()


def summarize(records: dict[tuple[str, str, str], list[dict]]) -> dict:
    """results.json: every cell, one sampled chain beside each vote, and the paired comparisons."""
    found = []
    for (model, task, strategy), rows in records.items():
        key = {"model": model, "task": task, "strategy": strategy}
        found.append({**key, **scoring.summary(rows), "items": str(file_of(model, task, strategy))})
        if strategy == "self_consistency" and len({len(r["samples"]) for r in rows}) == 1:
            found.append({**key, "strategy": scoring.SAMPLED, **scoring.sampled_summary(rows)})
    return {"cells": found, "comparisons": scoring.comparisons(records)}


def metrics_of(results: dict) -> dict[str, dict]:
    metrics = {}
    for cell in results["cells"]:
        name = f"{cell['model']}/{cell['task']}/{cell['strategy']}"
        metrics[name] = metric(cell["accuracy"], n=cell["n"], ci95=cell.get("wilson95") or cell["bootstrap95"])
        metrics[f"{name}/finished"] = metric(cell["finished"], n=cell["num_samples"], ci95=cell["finished_wilson95"])
        metrics[f"{name}/gold_score"] = metric(cell["gold_score"], n=cell["n"], ci95=cell["gold_score_ci95"])
    for c in results["comparisons"]:
        metrics[f"{c['a']}-{c['b']}/{c['task']}"] = metric(c["difference"], n=c["n"], ci95=c["ci95"])
    return metrics


def report(results: dict) -> None:
    rows = []
    for cell in results["cells"]:
        low, high = cell.get("wilson95") or cell["bootstrap95"]
        unparsed = cell["unparsed"] / cell["num_samples"]
        rows.append([cell["model"], cell["task"], cell["strategy"], f"{cell['accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]",
                     str(cell["n"]), f"{unparsed:.1%}", f"{cell['finished']:.1%}", f"{cell['tokens_mean']:.1f}"])
    say(table(["model", "task", "strategy", "accuracy", "95 %", "n", "unparsed", "stopped", "tokens"], rows))
    rows = [[c["a"], c["b"], c["task"], f"{c['difference']:+.3f}", f"[{c['ci95'][0]:+.3f}, {c['ci95'][1]:+.3f}]", str(c["n"]),
             "" if c["p"] is None else f"{c['p']:.2g}"] for c in results["comparisons"]]
    if rows:
        say("\n" + table(["first", "minus second", "task", "difference", "95 %", "n", "McNemar p"], rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["score"]:
        run_program(lambda given: score(given[1:]))
    else:
        launch(main, EvaluationConfig)
