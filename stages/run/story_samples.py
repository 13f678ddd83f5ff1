"""The same questions answered by the model of each stage, side by side, from what the evaluation keeps of them (results/*/*.jsonl)."""
import itertools
import json
from pathlib import Path
from typing import Any

from stages.run.cited import MODELS, SCORE, STRATEGIES, Stage, Stages
from stages.run.page import Section, Table, foreign, number

SHOWN = 3  # questions of a task
PREFERRED = ("zero_shot_cot", "direct", "few_shot_cot", "few_shot", "self_consistency")


def samples(stages: Stages) -> Section | None:
    """The first questions of every task, unchosen, under the strategy by which most models were asked. None without two models."""
    s = stages.get("evaluation")
    if s is None or "items" not in s.manifest.data["products"]:
        return None
    items = s.manifest.product("items")
    tables = [table for task in dict.fromkeys(file.name.rsplit(".", 2)[0] for file in sorted(items.glob("*/*.jsonl")))
              if (table := side_by_side(s, items, task))]
    if not tables:
        return None
    text = ("The first questions of each task as the model of each stage answered them, in the order of the file and not chosen. Gold is a "
            "program's score: right answer, right steps, format.")
    if "ppo" in stages:
        text += " What the reward model gave to answers on the way is in the section on PPO."
    return Section("samples", "The same questions, stage by stage", [text], tables=tables)


def side_by_side(s: Stage, items: Path, task: str) -> Table | None:
    asked = {strategy: [model for model in MODELS if (items / model / f"{task}.{strategy}.jsonl").is_file()] for strategy in PREFERRED}
    strategy = max(PREFERRED, key=lambda name: len(asked[name]))  # of equals the first
    models = asked[strategy]
    if len(models) < 2:
        return None
    files = {model: items / model / f"{task}.{strategy}.jsonl" for model in models}
    found = {model: {row["id"]: row for row in first(file)} for model, file in files.items()}
    rows = []
    for id, row in found[models[0]].items():
        cells = [answer(found[model][id], f"{files[model]}#{id}") if id in found[model] else "-" for model in models]
        rows.append([foreign(row.get("question") or f"problem {id}") + f"\nRight: {foreign(str(row['gold']))}", *cells])
    chain = "one of the chains that voted" if strategy == "self_consistency" else STRATEGIES[strategy]
    return Table(["question", *(MODELS[model] for model in models)], rows, f"{task}: {chain}.",
                 [s.cite(*(str(file.relative_to(s.path)) for file in files.values()))], stack=True)


def first(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:  # the whole may be large
        return [json.loads(line) for line in itertools.islice(lines, SHOWN)]


def answer(row: dict[str, Any], where: str) -> str:
    """The first sample's text and what it was worth."""
    if not row["samples"]:
        return "no sample"
    sample = row["samples"][0]
    said = "\u2713 right" if sample["correct"] else "\u2717 wrong" if sample["answer"] else "\u2717 no answer read"
    gold = sample.get("gold_score")
    return f"{foreign(sample['text']) or '(empty)'}\n{said}" + (f", gold {number(SCORE.text(gold), f'{where}/gold_score')}"
                                                                if gold is not None else "")
