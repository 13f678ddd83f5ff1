"""Study: a reward model on real human preferences against judges that know nothing, out of fold.

    python -m stages.evals.study_hh

A small base is pretrained and tuned here on the dialogues of the file without their labels (both sides of every pair, alike); then, for
each of five folds of prompts, a reward model learns from the others' pairs and scores the fold's. Every pair is so judged once, by a
model that saw neither it nor another answer to its prompt with a label. TF-IDF and length-only judges are fitted on the same folds.
Every run is a folder, not run again once finished, so the same command continues where it was.
"""
import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward import preferences
from reward.baselines import BASELINES, out_of_fold
from reward.calibration import accuracy, accuracy_by_length, accuracy_difference, deal, judged, together
from reward.folders import trusted
from reward.model import score_groups
from stages.data.tokenizer import chat_ids
from stages.evals.scoring import write_records
from stages.evals.studies import markdown, stage
from stages.run.console import clock
from stages.run.entry import run_program
from stages.run.manifest import say, write_json

RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")
ASSUMED_BASE_S, ASSUMED_FOLD_S = 900, 150  # on one CPU core, for the budget alone


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.study_hh", description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/hh-rlhf/test.jsonl.gz", help="pairs of dialogues, chosen and rejected")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--train-tokens", type=int, default=1_500_000, help="tokens that the base is pretrained on")
    parser.add_argument("--epochs", type=float, default=1.0, help="passes over the pairs; one, because more learn them by heart (Ouyang et "
                        "al. 2022, appendix C.2)")
    parser.add_argument("--max-length", type=int, default=512,
                        help="tokens of prompt and response; longer pairs are left out, for every judge")
    parser.add_argument("--runs", type=Path, default=Path(RUNS) / "study_hh", help="a folder a run in here")
    return parser.parse_args(argv)


def transcript(messages: list[dict[str, str]]) -> str:
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, rows)
    return str(path)


def study(given: argparse.Namespace) -> None:
    say(f"budget: a base and {given.folds} reward models, about {clock(ASSUMED_BASE_S + given.folds * ASSUMED_FOLD_S)}")
    records, left_out = preferences.read(given.data)
    dialogues = [[*record["prompt"], {"role": "assistant", "content": response}] for record in records for response in record["responses"]]
    text = written(given.runs / "data" / "text.jsonl", [{"text": transcript(dialogue)} for dialogue in dialogues])
    asked = written(given.runs / "data" / "dialogues.jsonl", [{"messages": dialogue} for dialogue in dialogues])

    prepared = {"parents.prepare": str(given.runs / "prepare")}
    stage("prepare", given.runs / "prepare", seed=given.seed, sources=[text], num_problems={}, vocab_size=2048)
    stage("pretrain", given.runs / "pretrain", seed=given.seed, hidden_size=given.hidden_size, num_heads=max(1, given.hidden_size // 32),
          tokens=given.train_tokens, easy_share=0.0, **prepared)
    tuned = stage("sft", given.runs / "sft", seed=given.seed, sources=[{"data": asked}], num_rows=0, epochs=1.0, bad_rows="drop",
                  repeats="ignore", replay_share=0.0, probe_prompts=0, instruction_prompts=0, peft={"modules_to_save": ["lm_head"]},
                  **prepared,
                  **{"parents.pretrain": str(given.runs / "pretrain")})
    tokenizer = AutoTokenizer.from_pretrained(trusted(tuned.product("model")))
    encoded = [preferences.encode(record, partial(chat_ids, tokenizer)) for record in records]
    fits = [len(row["prompt_ids"]) + max(map(len, row["response_ids"])) <= given.max_length for row in encoded]
    kept = [row for row, fit in zip(encoded, fits, strict=True) if fit]
    say(f"{len(kept):,} of {len(records) + sum(left_out.values()):,} pairs; left out: {len(records) - len(kept)} longer than "
        f"{given.max_length} tokens, {dict(left_out)}")

    keys = [tuple(row["prompt_ids"]) for row in kept]
    place = deal(keys, given.folds, given.seed)
    scores: list[list[float]] = [[] for _ in kept]
    parents = prepared | {"parents.sft": str(given.runs / "sft")}
    for fold in range(given.folds):
        learned = written(given.runs / "data" / f"train-{fold}.jsonl", [
            {key: row[key] for key in ("id", "prompt", "responses", "ranks", "prompt_ids", "response_ids")}
            for row, at in zip(kept, place, strict=True) if at != fold])
        ranked = stage("preferences", given.runs / f"preferences-{fold}", seed=given.seed, source=learned, max_responses=0,
                       max_length=given.max_length, **parents)
        made = stage("reward_model", given.runs / f"reward-{fold}", seed=given.seed, fresh_problems=20, epochs=given.epochs, **parents,
                     **{"parents.preferences": str(ranked.path)})
        model = AutoModelForSequenceClassification.from_pretrained(trusted(made.product("model")), dtype=torch.float32)
        held = [i for i, at in enumerate(place) if at == fold]
        for i, found in zip(held, score_groups(model, [(kept[i]["prompt_ids"], kept[i]["response_ids"]) for i in held]), strict=True):
            scores[i] = found
    told = report(scores, kept, keys, given)
    say("\n" + told["table"])
    write_json(given.runs / "study_hh.json", told)


def report(scores: list[list[float]], rows: list[dict[str, Any]], keys: list[tuple[int, ...]], given: argparse.Namespace) -> dict[str, Any]:
    """The table, and its figures: accuracy of each judge on the same pairs, and what the reward model leads by, paired."""
    ranks, responses = [row["ranks"] for row in rows], [row["responses"] for row in rows]
    mine = together(judged(scores, ranks), keys)
    of = {"reward model": mine} | {name: together(judged(out_of_fold(name, responses, ranks, keys, given.folds, given.seed), ranks), keys)
                                   for name in BASELINES}
    table, figures = [], {}
    for name, outcomes in of.items():
        found, lead = accuracy(outcomes), accuracy_difference(mine, outcomes)
        figures[name] = {"accuracy": found._asdict(), "lead": lead}
        table.append([name, f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]", f"{found.n:,}",
                      "" if name == "reward model" else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*lead)])
    by_length = accuracy_by_length(scores, ranks, [[len(r) for r in group] for group in responses])
    table += [[f"reward model, better response {kind}", f"{a.value:.3f} [{a.low:.3f}, {a.high:.3f}]", f"{a.n:,}", ""]
              for kind, a in by_length.items()]
    return {"table": markdown(["judge, out of fold", "pairs ordered right", "n", "reward model leads by"], table), "figures": figures}


if __name__ == "__main__":
    run_program(lambda given: study(arguments(given)))
