"""Study: what fine-tuning teaches and what it forgets, by method, learning rate, rank and remedy, over seeds.

    python -m stages.evals.study_sft --seeds 0 1 2

For each seed a small base is pretrained, and every arm fine-tunes it on the same dialogues: problems of the base's own text in the new
format, and exact instructions, which are new to it. Learning is the validation loss and the instructions followed; forgetting is what
the base corpus's held-out loss rises by. The arms of the sequence learn three sources one after the other. Every run is a folder of
stages.sft, not run again once finished, and one JSON line in `--out`, so the same command continues where it was.
"""
import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.evals.scoring import write_records
from stages.evals.study_seeds import markdown, mean
from stages.run import figures
from stages.run.console import clock
from stages.run.entry import fail
from stages.run.figures import Series
from stages.run.manifest import Manifest, say

RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")
BASELINE = "LoRA 16"
MIXTURE = [{"data": "curriculum"}, {"data": "instructions"}]
SEQUENCE = [{"data": "curriculum", "name": "words", "tasks": ["word_problems"]}, {"data": "instructions"},
            {"data": "curriculum", "name": "chains", "tasks": ["chained_variables"]}]
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "replay 1 %": {"replay_share": 0.01}, "replay 5 %": {"replay_share": 0.05}, "replay 10 %": {"replay_share": 0.1},
    "KL x 0.1": {"kl_coef": 0.1}, "KL x 1": {"kl_coef": 1.0},
    "average .75": {"average": 0.75}, "average .5": {"average": 0.5},
    "LoRA 4": {"lora_rank": 4, "lora_alpha": 8}, "LoRA 64": {"lora_rank": 64, "lora_alpha": 128},
    "LoRA 16, LR / 3": {"learning_rate": 3.3e-4}, "LoRA 16, LR x 3": {"learning_rate": 3e-3},
    "LoRA 4, LR x 3": {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 3e-3},
    "LoRA 64, LR x 3": {"lora_rank": 64, "lora_alpha": 128, "learning_rate": 3e-3},
    "full, LR / 10": {"method": "full", "learning_rate": 1e-4}, "full, LR / 3": {"method": "full", "learning_rate": 3.3e-4},
    "full": {"method": "full"}, "full, LR x 3": {"method": "full", "learning_rate": 3e-3},
    "sequence": {"order": "sequence"}, "sequence, replay 5 %": {"order": "sequence", "replay_share": 0.05},
    "sequence, full, LR / 3": {"order": "sequence", "method": "full", "learning_rate": 3.3e-4}}
SHOWN = {"validation_loss": "validation loss", "after/instructions": "instructions followed", "after/worked_accuracy": "problems right, chat",
         "change/base_loss": "base loss, change", "after/kl_to_base": "KL from the base",
         "after/plain/worked_accuracy": "problems right, base format"}
ASSUMED_BASE_S, ASSUMED_RUN_S = 80, 35  # on two CPU cores, for the budget alone


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_sft", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--hidden-size", type=int, default=64, help="width of the base")
    parser.add_argument("--train-tokens", type=int, default=1_100_000, help="tokens that the base is pretrained on")
    parser.add_argument("--num-rows", type=int, default=2000, help="training dialogues")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--prepare", default=f"{RUNS}/tiny/prepare", help="finished prepare run that base and dialogues come from")
    parser.add_argument("--runs", type=Path, default=Path(RUNS) / "study_sft", help="a folder a run in here")
    parser.add_argument("--out", type=Path, help="one JSON line a run (default: study_sft.jsonl in --runs)")
    return parser.parse_args(argv)


def stage(name: str, folder: Path, **settings: Any) -> Manifest:
    """A finished run of a stage with the tiny recipe's settings but those given. Raises ValueError when it stops."""
    flags = [part for key, value in {**settings, "run_dir": str(folder)}.items()
             for part in (f"--{key}", value if isinstance(value, str) else json.dumps(value))]
    if subprocess.run([sys.executable, "-m", f"stages.{name}", "--config", f"recipes/tiny/{name}.yaml", *flags], check=False).returncode:
        raise ValueError(f"{folder} stopped, see above; the same command continues there")
    return Manifest(folder)


def study(given: argparse.Namespace) -> None:
    runs = len(given.arms) * len(given.seeds)
    say(f"budget: {len(given.seeds)} bases and {runs} runs of {given.num_rows:,} dialogues x {given.epochs:g}, about "
        f"{clock(len(given.seeds) * ASSUMED_BASE_S + runs * ASSUMED_RUN_S)}")
    lines: list[dict[str, Any]] = []
    for seed in given.seeds:
        base = given.runs / f"base-{given.hidden_size}-{given.train_tokens}-{seed}"
        stage("pretrain", base, seed=seed, hidden_size=given.hidden_size, num_heads=max(1, given.hidden_size // 32),
              tokens=given.train_tokens, **{"parents.prepare": given.prepare})
        for name in given.arms:
            arm = ARMS[name]
            settings = {"sources": SEQUENCE if "order" in arm else MIXTURE, "num_rows": given.num_rows, "epochs": given.epochs,
                        "keep": "last", "patience": 0, "probe_prompts": 120, "instruction_prompts": 100, "forgetting_rows": 48} | arm
            folder = given.runs / f"{name.replace(' ', '-').replace('/', 'over').replace('%', 'percent').replace(',', '')}-{seed}"
            run = stage("sft", folder, seed=seed, **settings, **{"parents.prepare": given.prepare, "parents.pretrain": str(base)})
            lines.append({"arm": name, "seed": seed, "run": str(folder), "settings": settings, "wall_s": run.data["provenance"]["wall_s"],
                          "figures": {key: value["value"] for key, value in run.metrics.items()},
                          "watch": run.data["notes"]["watch"]["share_of_training"], "flops": run.counts["flops"]})
            write_records(given.out or given.runs / "study_sft.jsonl", lines)
            say(f"{len(lines)} of {runs} runs")
    say("\n" + report(lines))
    frontier(given.runs / "frontier.svg", lines)


def by_arm(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Figures of each arm's runs, in the order of the seeds."""
    arms: dict[str, list[dict[str, float]]] = {}
    for line in lines:
        arms.setdefault(line["arm"], []).append(line["figures"])
    return arms


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables: every arm, mean over seeds; each arm less the baseline of its seed; the sequence."""
    arms = by_arm(lines)
    mixed = {name: runs for name, runs in arms.items() if "order" not in ARMS[name]}
    tables = []
    if mixed:
        tables.append(markdown(["arm", *SHOWN.values()], [
            [name, *(mean([run[key] for run in runs]) for key in SHOWN)] for name, runs in mixed.items()]))
    if BASELINE in mixed and len(mixed) > 1:
        tables.append(markdown([f"less {BASELINE}, seed by seed", *SHOWN.values()], [
            [name, *(mean([run[key] - other[key] for run, other in zip(runs, mixed[BASELINE], strict=True)]) for key in SHOWN)]
            for name, runs in mixed.items() if name != BASELINE]))
    if rows := [[name, *(mean([run[key] for run in runs]) for key in ("backward_transfer", *SHOWN))]
                for name, runs in arms.items() if "order" in ARMS[name]]:
        tables.append(markdown(["arm", "backward transfer", *SHOWN.values()], rows))
    return "\n\n".join(tables)


def frontier(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Learning against forgetting, a point an arm (mean over seeds): LoRA, full tuning, and LoRA with remedies."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for name, runs in by_arm(lines).items():
        if "order" not in ARMS[name]:
            group = "full" if name.startswith("full") else "LoRA" if name.startswith("LoRA") else "LoRA 16 with a remedy"
            groups.setdefault(group, []).append(tuple(sum(run[key] for run in runs) / len(runs)  # type: ignore[arg-type]
                                                      for key in ("change/base_loss", "validation_loss")))
    figures.plot(path, [Series(group, [x for x, _ in points], [y for _, y in points], look="points") for group, points in groups.items()],
                 x="forgetting: rise of the base corpus's loss (nats a token)", y="learning: validation loss (nats a token)", log_y=True)
    say(f"figure: {path}")


if __name__ == "__main__":
    try:
        study(arguments(sys.argv[1:]))
    except (ValueError, OSError) as error:
        fail(str(error), None)
        sys.exit(2)
