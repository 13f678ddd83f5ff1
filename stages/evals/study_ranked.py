"""Study: how many labelled prompts does a reward model need when each has a ranking of K responses, and when it has one pair?

    python -m stages.evals.study_ranked --seeds 0 1 2

For each seed a small base is pretrained and tuned; its responses are ranked by the simulated annotator, K = 8 and K = 2 a prompt, for a
growing number of prompts, and a reward model is trained on each set. All are measured on the same fresh samples of the tuned model,
ranked by the gold score. Every run is a folder, not run again once finished, and one JSON line in `--out`, so the same command continues
where it was.
"""
import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.evals.scoring import write_records
from stages.evals.studies import markdown, mean, places, stage
from stages.run import figures
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.figures import Series
from stages.run.manifest import say

PROMPTS, KS = (50, 100, 200, 400, 800, 1600), (2, 8)
ASSUMED_BASE_S, ASSUMED_RUN_S = 180, 40  # on one CPU core, for the budget alone


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_ranked", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--prompts", nargs="+", type=int, default=list(PROMPTS), help="labelled prompts")
    parser.add_argument("--responses", nargs="+", type=int, default=list(KS), help="K, responses ranked a prompt")
    places(parser, "study_ranked", "a reward model", base=(64, 1_100_000))
    return parser.parse_args(argv)


def study(given: argparse.Namespace) -> None:
    models = len(given.seeds) * len(given.prompts) * len(given.responses)
    say(f"budget: {len(given.seeds)} bases and {models} reward models, about "
        f"{clock(len(given.seeds) * ASSUMED_BASE_S + models * ASSUMED_RUN_S)}")
    lines: list[dict[str, Any]] = []
    for seed in given.seeds:
        base, tuned = given.runs / f"pretrain-{seed}", given.runs / f"sft-{seed}"
        stage("pretrain", base, seed=seed, hidden_size=given.hidden_size, num_heads=max(1, given.hidden_size // 32),
              tokens=given.train_tokens, **{"parents.prepare": given.prepare})
        stage("sft", tuned, seed=seed, probe_prompts=0, instruction_prompts=0,
              **{"parents.prepare": given.prepare, "parents.pretrain": str(base)})
        parents = {"parents.prepare": given.prepare, "parents.sft": str(tuned)}
        for count in given.prompts:
            for k in given.responses:
                ranked = stage("preferences", given.runs / f"preferences-{count}-{k}-{seed}", seed=seed, max_prompts=count, max_responses=0,
                               responses_per_prompt=k, error_rate=0.0, **parents)
                model = stage("reward_model", given.runs / f"reward-{count}-{k}-{seed}", seed=seed, heldout_share=0.1, epochs=3.0,
                              **parents, **{"parents.preferences": str(ranked.path)})
                lines.append({"seed": seed, "k": k, "prompts": count, **{n: ranked.counts[n] for n in ("asked", "responses", "pairs")},
                              **{key: model.metrics[key]["value"] for key in ("fresh_accuracy", "heldout_accuracy")},
                              "wall_s": model.data["provenance"]["wall_s"]})
                write_records(given.out or given.runs / "study_ranked.jsonl", lines)
                say(f"{len(lines)} of {models} reward models")
    say("\n" + report(lines) + "\n\n" + saved(lines))
    draw(given.runs / "ranked.svg", lines)


def by_size(lines: Sequence[Mapping[str, Any]]) -> dict[int, dict[int, list[Mapping[str, Any]]]]:
    """Lines of each K by the number of prompts, in the order of seeds."""
    found: dict[int, dict[int, list[Mapping[str, Any]]]] = {}
    for line in sorted(lines, key=lambda line: (line["k"], line["prompts"], line["seed"])):
        found.setdefault(line["k"], {}).setdefault(line["prompts"], []).append(line)
    return found


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: accuracy on fresh samples by labelled prompts and K, mean over seeds; and the largest K less the smallest, by seed."""
    found = by_size(lines)
    sizes = sorted({line["prompts"] for line in lines})
    rows = [[f"{n:,}", *(f"{mean([line['fresh_accuracy'] for line in of[n]])}, {sum(line['pairs'] for line in of[n]) // len(of[n]):,} pairs"
                         if n in of else "-" for of in found.values())] for n in sizes]
    header = ["labelled prompts", *(f"K = {k}" for k in found)]
    if len(found) > 1:
        few, many = found[min(found)], found[max(found)]
        for row, n in zip(rows, sizes, strict=True):
            both = n in few and n in many and len(few[n]) == len(many[n])
            row.append(mean([a["fresh_accuracy"] - b["fresh_accuracy"] for a, b in zip(many[n], few[n], strict=True)]) if both else "-")
        header.append(f"K = {max(found)} less K = {min(found)}, seed by seed")
    return markdown(header, rows)


def prompts_for(of: Mapping[int, Sequence[Mapping[str, Any]]], seed: int, accuracy: float) -> float | None:
    """Prompts with which a seed's curve first reaches an accuracy, linear between points in the logarithm of the prompts; None if never."""
    points = [(n, line["fresh_accuracy"]) for n, lines in of.items() for line in lines if line["seed"] == seed]
    for (n, low), (more, high) in zip([(points[0][0], points[0][1]), *points], points, strict=False):
        if high >= accuracy:
            return more if high == low or low >= accuracy else float(n * (more / n) ** ((accuracy - low) / (high - low)))
    return None


def saved(lines: Sequence[Mapping[str, Any]]) -> str:
    """How many prompts the largest K needs for what the smallest reaches with most prompts, by seed; and the mean difference a seed."""
    found = by_size(lines)
    few, many = found[min(found)], found[max(found)]
    most, parts, means = max(few), [], []
    for line in few[most]:
        seed, accuracy = line["seed"], line["fresh_accuracy"]
        needed = prompts_for(many, seed, accuracy)
        parts.append(f"seed {seed}: " + ("more than there are" if needed is None else
                                         f"{'at most ' if needed <= min(many) else ''}{needed:.0f}") + f" ({accuracy:.3f})")
        both = [(a["fresh_accuracy"], b["fresh_accuracy"]) for n in many for a in many[n] for b in few.get(n, ())
                if a["seed"] == b["seed"] == seed]
        means.append(sum(a - b for a, b in both) / len(both))
    return (f"Prompts that K = {max(found)} needs for the accuracy of {most:,} prompts with K = {min(found)}: {'; '.join(parts)}.\n"
            f"K = {max(found)} less K = {min(found)} over all numbers of prompts, a mean a seed: {mean(means)}")


def draw(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    series = []
    for k, of in by_size(lines).items():
        values = [[line["fresh_accuracy"] for line in found] for found in of.values()]
        series.append(Series(f"K = {k}", list(of), [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values]))
    figures.plot(path, series, x="labelled prompts", y="accuracy on fresh samples (bars: lowest and highest seed)", log_x=True)
    say(f"figure: {path}")


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
