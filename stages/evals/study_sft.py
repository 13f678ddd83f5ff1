"""Study: what fine-tuning teaches and what it forgets, by method, learning rate, rank and remedy, over seeds.

    python -m stages.evals.study_sft --seeds 0 1 2

For each seed a small base is pretrained, and every arm fine-tunes it on the same dialogues: problems of the base's own text in the new
format, and exact instructions, which are new to it. Learning is the validation loss and the instructions followed; forgetting is what
the base corpus's held-out loss rises by. The arms of the sequence learn three sources one after the other. Every run is a folder of
stages.sft, not run again once finished, and one JSON line in `--out`, so the same command continues where it was.
"""
import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from reward.folders import trusted
from stages.evals.scoring import write_records
from stages.evals.studies import markdown, mean, places, stage
from stages.run import figures
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.figures import Series
from stages.run.manifest import say

CURRICULUM = {"data": "curriculum"}
INSTRUCTIONS = {"data": "instructions", "tasks": ["count", "order"]}  # answers in words of the base's text; it never saw capitals
LEARN: dict[str, Any] = {"sources": [INSTRUCTIONS], "num_rows": 3000}
BOTH: dict[str, Any] = {"sources": [CURRICULUM, INSTRUCTIONS], "num_rows": 2000}
IN_TURN: dict[str, Any] = {"num_rows": 2000, "order": "sequence", "sources": [
    {**CURRICULUM, "name": "words", "tasks": ["word_problems"]}, INSTRUCTIONS,
    {**CURRICULUM, "name": "chains", "tasks": ["chained_variables"]}]}
FULL: dict[str, Any] = {"method": "full"}


def lora(rank: int, rate: float) -> dict[str, Any]:
    return {"lora_rank": rank, "lora_alpha": 2 * rank, "learning_rate": rate}


BASELINE = "LoRA"
GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "remedies": {BASELINE: BOTH, "replay 1 %": BOTH | {"replay_share": 0.01}, "replay 5 %": BOTH | {"replay_share": 0.05},
                 "replay 10 %": BOTH | {"replay_share": 0.1}, "KL x 0.1": BOTH | {"kl_coef": 0.1}, "average .75": BOTH | {"average": 0.75},
                 "rank 4": BOTH | lora(4, 1e-3), "LR / 3": BOTH | lora(16, 3.3e-4)},
    "methods": {**{f"LoRA {rank}, {rate:g}": LEARN | lora(rank, rate) for rank, rate in (
                    (16, 3e-4), (16, 1e-3), (16, 3e-3), (4, 1e-3), (64, 1e-3))},
                "LoRA 16 and head, 0.001": LEARN | lora(16, 1e-3) | {"peft": {"modules_to_save": ["lm_head"]}},
                "LoRA 16 head and embeddings, 0.001": LEARN | lora(16, 1e-3) | {"peft": {
                    "modules_to_save": ["lm_head", "embed_tokens"], "trainable_token_indices": None}},
                **{f"full, {rate:g}": LEARN | FULL | {"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)}},
    "sequence": {"in turn, LoRA": IN_TURN, "in turn, replay 5 %": IN_TURN | {"replay_share": 0.05},
                 "in turn, full": IN_TURN | FULL | {"learning_rate": 3.3e-4}}}
ARMS = {name: arm for group in GROUPS.values() for name, arm in group.items()}
FORGOTTEN = {"change/base_loss": "base loss, change", "after/kl_to_base": "KL from the base",
             "after/plain/worked_accuracy": "problems right, base format"}
SHOWN = {"remedies": {"validation_loss/curriculum": "validation loss, problems", "validation_loss/instructions": "the same, instructions",
                      "after/worked_accuracy": "problems right, chat", **FORGOTTEN},
         "methods": {"validation_loss": "validation loss", "after/instructions": "instructions followed", **FORGOTTEN,
                     "update/spectral": "largest singular value of the change", "update/rank": "effective rank of the change"},
         "sequence": {"backward_transfer": "backward transfer", "validation_loss": "validation loss", **FORGOTTEN}}
ASSUMED_BASE_S, ASSUMED_RUN_S = 80, 35  # on two CPU cores, for the budget alone


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_sft", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(GROUPS), choices=[*GROUPS, *ARMS], metavar="ARM",
                        help=f"groups ({', '.join(GROUPS)}) or of: {'; '.join(ARMS)}".replace("%", "%%"))
    places(parser, "study_sft", base=(64, 1_100_000))
    given = parser.parse_args(argv)
    given.arms = list(dict.fromkeys(arm for name in given.arms for arm in GROUPS.get(name, [name])))
    return given


def study(given: argparse.Namespace) -> None:
    transformers.utils.logging.disable_progress_bar()
    runs = len(given.arms) * len(given.seeds)
    say(f"budget: {len(given.seeds)} bases and {runs} fine-tuning runs, about "
        f"{clock(len(given.seeds) * ASSUMED_BASE_S + runs * ASSUMED_RUN_S)}")
    lines: list[dict[str, Any]] = []
    for seed in given.seeds:
        base = given.runs / f"base-{given.hidden_size}-{given.train_tokens}-{seed}"
        stage("pretrain", base, seed=seed, hidden_size=given.hidden_size, num_heads=max(1, given.hidden_size // 32),
              tokens=given.train_tokens, **{"parents.prepare": given.prepare})
        for name in given.arms:
            settings = {"learning_rate": 1e-3, "replay_share": 0.0, "epochs": 2.0, "keep": "last", "patience": 0, "watch_share": 0.08,
                        "probe_prompts": 120, "instruction_prompts": 100, "forgetting_rows": 48} | ARMS[name]
            folder = given.runs / f"{name.replace(' ', '-').replace('/', 'over').replace('%', 'percent').replace(',', '')}-{seed}"
            run = stage("sft", folder, seed=seed, **settings, **{"parents.prepare": given.prepare, "parents.pretrain": str(base)})
            lines.append({"arm": name, "seed": seed, "run": str(folder), "settings": settings, "wall_s": run.data["provenance"]["wall_s"],
                          "figures": {key: value["value"] for key, value in run.metrics.items()}
                          | update(base / "model", run.product("model")),
                          "watch": run.data["notes"]["watch"]["share_of_training"], "flops": run.counts["flops"]})
            write_records(given.out or given.runs / "study_sft.jsonl", lines)
            say(f"{len(lines)} of {runs} runs")
    say("\n" + report(lines))
    frontier(given.runs / "frontier.svg", lines)


def update(base: Path, tuned: Path) -> dict[str, float]:
    """How the matrices of the layers changed, mean over them: the change's largest singular value as a share of the matrix's own, and
    its effective rank, the squared sum of its singular values over the sum of their squares."""
    before, after = (AutoModelForCausalLM.from_pretrained(trusted(path), dtype="float32").state_dict() for path in (base, tuned))
    spectral, ranks = [], []
    for name, weight in before.items():
        if weight.ndim == 2 and ".layers." in name:
            change, own = (torch.linalg.svdvals(matrix) for matrix in (after[name] - weight, weight))
            spectral.append(float(change[0] / own[0]))
            ranks.append(float(change.sum() ** 2 / change.square().sum()))
    return {"update/spectral": sum(spectral) / len(spectral), "update/rank": sum(ranks) / len(ranks)}


def by_arm(lines: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """Figures of each arm's runs by seed."""
    arms: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        arms.setdefault(line["arm"], {})[line["seed"]] = line["figures"]
    return arms


def report(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables, one a group: every arm, mean over seeds; and each remedy less no remedy, seed by seed."""
    arms = by_arm(lines)
    tables = []
    for group, shown in SHOWN.items():
        found = {name: arms[name] for name in GROUPS[group] if name in arms}
        rows = [[name, *(mean([run[key] for run in runs.values()]) for key in shown)] for name, runs in found.items()]
        tables += [markdown([group, *shown.values()], rows)] if rows else []
        if BASELINE in found and len(found) > 1:
            rows = [[name, *(mean([run[key] - found[BASELINE][seed][key] for seed, run in runs.items()]) for key in shown)]
                    for name, runs in found.items() if name != BASELINE]
            tables.append(markdown([f"less {BASELINE}, seed by seed", *shown.values()], rows))
    return "\n\n".join(tables)


def frontier(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Learning against forgetting, a point an arm (mean over seeds): LoRA by rank and full tuning, over learning rates."""
    series: dict[str, list[tuple[float, ...]]] = {}
    for name, runs in by_arm(lines).items():
        if name in GROUPS["methods"]:
            series.setdefault(name.partition(",")[0], []).append(
                tuple(sum(run[key] for run in runs.values()) / len(runs) for key in ("change/base_loss", "validation_loss")))
    if series:
        figures.plot(path, [Series(label, [p[0] for p in points], [p[1] for p in points]) for label, points in series.items()],
                     x="forgetting: rise of the base corpus's loss (nats a token)", y="learning: validation loss (nats a token)")
        say(f"figure: {path}")


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
