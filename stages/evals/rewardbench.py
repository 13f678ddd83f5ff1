"""A reward model on pairwise and best-of-n benchmarks such as RewardBench (Lambert et al. 2024) and RewardBench 2 (Malik et al. 2025).

    python -m stages.evals.rewardbench --model runs/tiny/reward_model/model --data benchmark.jsonl

A row has a `prompt` (text or messages) and either `chosen` and `rejected`, each one response or a list of them, or `responses` with
`correct` (places or true/false of the right ones) or `best` (the place of one), counted from 0; `subset` and `id` may stand beside them.
A row is right when the highest score is a right response's. Rows that are none of this, or too long for the model, are left out, counted
and listed with file and line. The mean over subsets weighs them alike. Left to their own programs are RewardBench's weights of sections
and RewardBench 2's extra score of ties, where here the highest score alone counts.
"""
import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward import preferences
from reward.calibration import Accuracy, accuracy
from reward.converters import from_pair
from reward.folders import trusted
from reward.model import COMBINATIONS, ENSEMBLE, Group, combined_groups, load_ensemble, member_folders, score_groups
from stages.data.corpora import hash_inputs, source_rows
from stages.data.tokenizer import chat_ids
from stages.run.console import progress, table
from stages.run.entry import run_program
from stages.run.manifest import hash_path, metric, provenance, say, write_json

RUNS = os.environ.get("PLUMBLINE_RUNS", "runs")


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stages.evals.rewardbench", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a reward model: a sequence classifier with one output, and its tokenizer")
    parser.add_argument("--data", required=True, help="a jsonl, json, csv, tsv or parquet file, a folder or glob of them, or a hub id")
    parser.add_argument("--hub-config", help="configuration of the hub dataset")
    parser.add_argument("--hub-split", default="test", help="split of the hub dataset (RewardBench: filtered; RewardBench 2: test)")
    parser.add_argument("--combination", choices=COMBINATIONS, help="of an ensemble's scores (default: what it was saved with)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(RUNS) / "rewardbench.json")
    return parser.parse_args(argv)


def as_record(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row as a preference record in which right responses have rank 1 and wrong ones rank 2. Raises ValueError naming the fault."""
    if "responses" in row:
        responses, correct = listed(row["responses"], where), listed(row.get("correct", row.get("best")), where)
        flags = correct if correct and all(isinstance(c, bool) for c in correct) else [i in correct for i in range(len(responses))]
        if not set(correct) <= {True, False, *range(len(responses))} or len(flags) != len(responses):
            raise ValueError(f"{where}: correct or best is {correct}: give places from 0 to {len(responses) - 1}, or true or false for "
                             f"each of the {len(responses)} responses")
        record = {**row, "responses": responses, "ranks": [1 if flag else 2 for flag in flags]}
    elif isinstance(row.get("chosen"), list) and all(isinstance(c, str) for c in row["chosen"]):
        wrong = row.get("rejected")
        rejected = [wrong] if isinstance(wrong, str) else wrong or []
        record = {**row, "responses": [*row["chosen"], *rejected], "ranks": [1] * len(row["chosen"]) + [2] * len(rejected)}
    elif "chosen" not in row or "rejected" not in row:
        raise ValueError(f"{where}: neither chosen and rejected nor responses and correct: it has {', '.join(row)}")
    else:
        pair = from_pair(row, where, Counter())
        if pair is None:
            raise ValueError(f"{where}: chosen and rejected answer different prompts")
        record = {**row, **pair}
    if set(record["ranks"]) != {1, 2}:
        counts = [record["ranks"].count(rank) for rank in (1, 2)]
        raise ValueError(f"{where}: {counts[0]} right and {counts[1]} wrong responses: give one or more of each")
    preferences.check({key: record.get(key) for key in ("prompt", "responses", "ranks")}, where)  # other columns are the benchmark's own
    return record


def listed(value: Any, where: str) -> list:
    """A list; one that a table's cell holds as JSON; one of a single value. Raises ValueError when there is none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{where}: {value[:40]!r} is not a JSON list") from None
    if value is None:
        raise ValueError(f"{where}: responses stand without correct or best: say which are right")
    return list(value) if isinstance(value, list) else [value]


def encoded(rows: Iterable[tuple[str, dict[str, Any]]], tokenizer, context: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Records with token ids, `where` and `subset`, and a line for every row that was left out: its place and its fault."""
    records: list[dict[str, Any]] = []
    bad: list[str] = []
    for where, row in rows:
        try:
            record = preferences.encode(as_record(row, where), partial(chat_ids, tokenizer))
        except (ValueError, TypeError, KeyError) as error:
            bad.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
            continue
        longest = len(record["prompt_ids"]) + max(map(len, record["response_ids"]))
        if longest > context:
            bad.append(f"{where}: {longest} tokens, more than the model's context of {context}")
        else:
            records.append({**record, "where": where, "subset": str(row.get("subset") or "all")})
    return records, bad


def right(scores: Sequence[float], ranks: Sequence[int]) -> float:
    """1 when a right response scores highest, 0 when a wrong one does; where several share the highest score, the share of right ones."""
    best = [rank for score, rank in zip(scores, ranks, strict=True) if score == max(scores)]
    return best.count(1) / len(best)


def mean_of_subsets(found: Sequence[Accuracy]) -> tuple[float, float, float]:
    """Mean of independent shares and its 95 % interval from theirs (MOVER: Zou & Donner 2008), which stays honest at 0 and 1."""
    k = len(found)
    mean = math.fsum(a.value for a in found) / k
    return (mean, mean - math.sqrt(math.fsum((a.value - a.low) ** 2 for a in found)) / k,
            mean + math.sqrt(math.fsum((a.high - a.value) ** 2 for a in found)) / k)


def evaluate(given: argparse.Namespace) -> dict[str, Any]:
    """Score, print and write. Raises ValueError for a model that cannot be loaded and when no row is left."""
    began = time.time()
    if not (Path(given.model) / "config.json").is_file():
        raise ValueError(f"{given.model} has no config.json: give the folder of a reward model, such as runs/tiny/reward_model/model")
    tokenizer = AutoTokenizer.from_pretrained(trusted(given.model))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: list[Any] = [AutoModelForSequenceClassification.from_pretrained(trusted(folder), num_labels=1, dtype=torch.float32).to(device)
                         for folder in member_folders(Path(given.model))]
    judge: Callable[[list[Group]], list[list[float]]] = partial(score_groups, models[0], batch_size=given.batch_size)
    if given.combination or (Path(given.model) / ENSEMBLE).is_file():
        ensemble = load_ensemble(Path(given.model), models, given.combination)
        judge = partial(combined_groups, ensemble)
        say(f"{given.model}: an ensemble of {len(ensemble.members)}, combined as {ensemble.combination}")
    config = models[0].config.get_text_config()
    if config.pad_token_id is None:
        raise ValueError(f"{given.model}/config.json has no pad_token_id, by which the last token of a text is found: set one that no text "
                         "holds")
    records, bad = encoded(source_rows(given.data, given.hub_config, given.hub_split), tokenizer, config.max_position_embeddings)
    if bad:
        say(f"left out {len(bad):,} of {len(records) + len(bad):,} rows (all of them in {given.out}), the first: {bad[0]}")
    if not records:
        raise ValueError(f"{given.data}: no row is left to score; the first fault: {bad[0] if bad else 'it has no rows'}")
    scores: list[list[float]] = []
    for at in progress(range(0, len(records), 256), "scoring"):
        scores += judge([(r["prompt_ids"], r["response_ids"]) for r in records[at:at + 256]])
    items = [{"id": str(r.get("id", r["where"])), "where": r["where"], "subset": r["subset"], "right": right(s, r["ranks"]), "scores": s,
              "ranks": r["ranks"]} for r, s in zip(records, scores, strict=True)]
    subsets = {name: accuracy([[item["right"]] for item in items if item["subset"] == name])
               for name in sorted({item["subset"] for item in items})}
    mean, low, high = mean_of_subsets(list(subsets.values()))
    rows = [[name, f"{a.value:.3f}", f"[{a.low:.3f}, {a.high:.3f}]", f"{a.n:,}",
             f"{sum(len(i['ranks']) for i in items if i['subset'] == name) / a.n:.1f}"] for name, a in subsets.items()]
    say(table(["subset", "accuracy", "95 %", "rows", "responses a row"],
              [*rows, ["mean of subsets", f"{mean:.3f}", f"[{low:.3f}, {high:.3f}]", f"{len(items):,}", ""]]))
    result = {"metrics": {f"accuracy/{name}": metric(a.value, n=a.n, ci95=(a.low, a.high)) for name, a in subsets.items()}
              | {"mean_of_subsets": metric(mean, n=len(items), ci95=(low, high))},
              "model": {"path": str(given.model), "sha256": hash_path(Path(given.model))},
              "data": {"source": given.data, "split": given.hub_split, **hash_inputs([given.data])}, "left_out": bad, "items": items,
              "provenance": provenance(began, 1)}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, result)
    say(f"written: {given.out}")
    return result


if __name__ == "__main__":
    run_program(lambda argv: evaluate(arguments(argv)))
