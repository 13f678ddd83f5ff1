"""What each prompting strategy buys for the tokens it costs, on held-out problems, for the base, SFT and PPO model.

    accelerate launch --config_file recipes/accelerate/cpu.yaml -m stages.evaluation --config recipes/tiny/evaluation.yaml
    python -m stages.evaluation score samples.jsonl --answer-type number --out result.json
    python -m stages.evaluation frontier RUN [RUN ...] --out FOLDER
    python -m stages.evaluation emergence runs/tiny/scaling --out FOLDER
"""
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stages.data.corpora import read_rows
from stages.evals import emergence, scoring
from stages.evals.asking import MODELS, AskingConfig, ask, cells, check, file_of, first_prompts, needs_judge
from stages.evals.commands import frontier, score
from stages.evals.frontier import computed, frontiers
from stages.evals.pairs import pairs
from stages.evals.tasks import load_task, searched, task_name
from stages.models.training import barrier
from stages.run.config import option
from stages.run.console import table
from stages.run.entry import launch, run_program
from stages.run.manifest import MANIFEST, Manifest, Run, hash_data, is_main, metric, say, write_json


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(AskingConfig):
    STAGE = "evaluation"
    PARENTS = ("prepare", "pretrain", "sft", "reward_model", "ppo")

    tasks: list[str] = option(["word_problems", "chained_variables"],
                              "embedded tasks, or [name=]format:source such as gsm8k:data/test.jsonl", recorded_only=True)
    difficulties: list[int] = option([1, 2, 3, 4], "steps of the embedded problems, in equal numbers")
    num_problems: int = option(200, "problems a cell (0: all there are)")
    exemplars: dict[str, str] = option({}, "by task name, where its examples come from instead of the project's own: format:source such as "
                                       "gsm8k:train.jsonl, drawn by seed, or a prompt in a .txt file, in its order", recorded_only=True)


def main(config: EvaluationConfig) -> Manifest:
    check(config)
    if not config.tasks:
        raise ValueError("nothing to evaluate: give at least one task, and one model with a strategy")
    needed = {"prepare"} | {MODELS[model][0] for model, chosen in config.models.items() if chosen} - {""}
    prepared = Manifest(config.parents["prepare"])
    problems = prepared.product("problems")
    tasks = [load_task(spec, problems=problems, difficulties=config.difficulties, num_problems=config.num_problems,
                       seed=config.seed, examples=config.exemplars.get(task_name(spec))) for spec in config.tasks]
    if unknown := config.exemplars.keys() - {task.name for task in tasks}:
        raise ValueError(f"exemplars names {min(unknown)!r}, which is no task here: choose from {', '.join(t.name for t in tasks)}")
    for task in tasks:
        if task.leaked:
            say(f"{task.name}: {task.leaked} examples are problems that are asked; they are not shown")
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"two tasks are called {[task.name for task in tasks]}: name them apart, as in train=gsm8k:train.jsonl")
    needed |= {"reward_model"} if needs_judge(config, tasks) else set()
    all_parents = config.parents
    config = replace(config, parents={name: path for name, path in config.parents.items() if name in needed})
    run = Run(config, inputs={"prompts": hash_data(first_prompts(config, tasks)),
                              **{f"task {task.name}": hash_data([task.rows, task.pool]) for task in tasks}})
    if run.finished:
        return run.manifest
    barrier()  # the run folder is there for all

    ask(config, run, tasks)
    if not is_main():
        return run.finish(metrics={})
    records = {key: [scoring.without_texts(row) for _, row in read_rows(run.directory / file_of(*key))] for key in cells(config, tasks)}
    if lost := [key for key, rows in records.items() if {sample["finish"] for row in rows for sample in row["samples"]} == {"missing"}]:
        for key in lost:
            (run.directory / file_of(*key)).unlink()  # else the next run would take it for answered
        raise ValueError(f"{len(lost)} of {len(records)} cells got no answer at all, {'/'.join(lost[0])} first: see that the server runs "
                         "and endpoint has its url; the same command then asks them again, and no other")
    for key in [key for key, rows in records.items() if unasked(key, rows)]:
        del records[key]  # its figures stay missing
    results = summarize(records)
    results["compute"] = computed(results["frontier"], {name: made.data for name, made in ancestry(run.parents, all_parents).items()})
    results["contamination"] = searched(config.tasks, prepared) if needed & {"pretrain", "sft", "ppo"} else {}
    write_json(run.directory / "results.json", results)
    report(results)
    return run.finish(
        metrics=metrics_of(results), products={"results": "results.json", "items": "results"},
        counts={"problems": sum(len(task.rows) for task in tasks), "cells": len(records),
                "tokens": sum(r["cost"]["generated_tokens"] for cell in records.values() for r in cell)})


def ancestry(runs: Mapping[str, Manifest], paths: Mapping[str, str]) -> dict[str, Manifest]:
    """The runs, and those at `paths` that they were made from: what an evaluation of PPO alone has to know to price its training."""
    found, last = dict(runs), list(runs.values())
    while last:
        for name, fingerprint in last.pop().data.get("parents", {}).items():
            if name not in found and name in paths and (Path(paths[name]) / MANIFEST).is_file():
                made = Manifest(paths[name])
                if made.fingerprint == fingerprint:  # what is there now may be another run
                    found[name] = made
                    last.append(made)
    return found


def unasked(key: tuple[str, str, str], rows: list[dict]) -> bool:
    """Says how many prompts left no room or got no answer; whether that is so for all of them."""
    ends = Counter(end for row in rows for end in scoring.finishes(row))
    for finish, what in (("too_long", "prompts leave no room to answer in the model's context"), ("missing", "requests got no answer")):
        if ends[finish]:
            say(f"{'/'.join(key)}: {ends[finish]} {what}")
    return ends["too_long"] + ends["missing"] > 0 and not any(row["cost"]["generated_tokens"] for row in rows)


def summarize(records: dict[tuple[str, str, str], list[dict]]) -> dict:
    """results.json: every cell, one sampled chain beside each vote, the paired comparisons, all pairs with p adjusted for their
    number, and what accuracy costs."""
    found = []
    for (model, task, strategy), rows in records.items():
        key = {"model": model, "task": task, "strategy": strategy}
        found.append({**key, **scoring.summary(rows), "items": str(file_of(model, task, strategy))})
        if scoring.equal_votes(strategy, rows):
            found.append({**key, "strategy": scoring.SAMPLED, **scoring.sampled_summary(rows)})
    return {"cells": found, "comparisons": scoring.comparisons(records), "pairs": pairs(records), "frontier": frontiers(records)}


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
    if unknown := [task for task, found in results["contamination"].items() if found is None]:
        say(f"warning: the pretraining text was not searched for the questions of {', '.join(unknown)}, so some may stand in it: name the "
            "sets in prepare's evaluation_sets, with decontaminate at report or drop")
    rows = []
    for cell in results["cells"]:
        low, high = cell.get("wilson95") or cell["bootstrap95"]
        unparsed = cell["unparsed"] / cell["num_samples"]
        rows.append([cell["model"], cell["task"], cell["strategy"], f"{cell['accuracy']:.3f}", f"[{low:.3f}, {high:.3f}]",
                     str(cell["n"]), f"{unparsed:.1%}", f"{cell['finished']:.1%}", f"{cell['tokens_mean']:.1f}"])
    say(table(["model", "task", "strategy", "accuracy", "95 %", "n", "unparsed", "stopped", "tokens"], rows))
    rows = [[c["a"], c["b"], c["task"], f"{c['difference']:+.3f}", f"[{c['ci95'][0]:+.3f}, {c['ci95'][1]:+.3f}]", str(c["n"]),
             f"{c['p']:.2g}", f"{c['mde']:.3f}" if c["mde"] else ""] for c in results["comparisons"]]
    if rows:
        say("\n" + table(["first", "minus second", "task", "difference", "95 %", "n", "p", "detectable"], rows))
        say(f"results.json has all {len(results['pairs'])} pairs, with p adjusted for their number (Holm)")


def chosen(commands: Mapping[str, Callable[[list[str]], None]], name: str) -> Callable[[list[str]], None]:
    if name not in commands:
        raise ValueError(f"unknown command {name!r}: give {', '.join(commands)}, or --config recipes/<recipe>/evaluation.yaml to evaluate "
                         "a recipe's models")
    return commands[name]


if __name__ == "__main__":
    commands = {"score": score, "frontier": frontier, "emergence": emergence.run}
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        run_program(lambda given: chosen(commands, given[0])(given[1:]))
    else:
        launch(main, EvaluationConfig)
