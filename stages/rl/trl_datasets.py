"""What stages learn from, as files in TRL's dataset formats, so that another tool can take a stage's place; and all of it reads back.

    sft-train.jsonl, sft-validation.jsonl   prompt-completion of messages; loss belongs on the completion's assistant turns
    sft-text.jsonl                          language modelling, where a source of sft is plain text
    preference.jsonl                        prompt, chosen, rejected: a pair for any two responses of different rank
    prompts.jsonl                           prompt-only, with what the measures and reward functions need as further columns

https://huggingface.co/docs/trl/dataset_formats has the formats; docs/export.md says how each comes back in.
"""
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prompts.templates import BENCHMARK_CUES
from reward import preferences
from stages.data import dialogues
from stages.data.curriculum import CUES
from stages.rl.questions import QuestionConfig, embedded_problems, own_problems
from stages.run.config import fill
from stages.run.manifest import Manifest

Row = dict[str, Any]
KEPT = ("id", "answer", "answer_type", "solutions", "difficulty", "template")  # what stages.data.problems reads back


def sft_rows(sft: Manifest, prepare: Manifest) -> dict[str, list[Row]]:
    """The mixture of a finished sft run by file name: before tokens are counted, so rows that it cut or dropped for length are there.

    Raises ValueError where a source is no longer what the run read.
    """
    config = sft.config
    mixture = dialogues.read(dialogues.parse_sources(config["sources"], "sources"), problems=prepare.product("problems"),
                             seed=config["seed"], num_rows=config["num_rows"], validation_rows=config["validation_rows"],
                             bad_rows=config["bad_rows"])
    if mixture.counts != sft.data["notes"]["sources"]:
        raise ValueError(f"the sources of {sft.path} now give other rows than the run read: restore them, or run sft again")
    found: dict[str, list[Row]] = {"sft-train": [], "sft-validation": [], "sft-text": []}
    for split, rows in (("sft-train", mixture.train), ("sft-validation", mixture.validation)):
        for row in rows:
            if "text" in row:
                found["sft-text"].append({"text": row["text"]})
                continue
            first = row["first"] or next(i for i, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
            found[split].append({"prompt": row["messages"][:first], "completion": row["messages"][first:]})
    return found


def prompt_rows(config: QuestionConfig, prepare: Manifest) -> list[Row]:
    """The problems of a ppo run in the words they are asked by; those that it measures on come last, `eval_problems` of them."""
    own = own_problems(config)
    learned, measured = own or embedded_problems(config, prepare.product("problems"))
    cue = (BENCHMARK_CUES if own else CUES)[config.style]
    return [{"prompt": row.get("prompt") or [{"role": "user", "content": f"{row['question']} {cue}"}],
             **{key: row[key] for key in KEPT if key in row}} for row in [*learned, *measured]]


def write_datasets(runs: dict[str, Manifest], folder: Path) -> dict[str, int]:
    """Write what the finished ones of sft, preferences and ppo learn from; returns the rows of each file. Raises ValueError without any."""
    found: dict[str, list[Row]] = {}
    if {"sft", "prepare"} <= runs.keys():
        found |= sft_rows(runs["sft"], runs["prepare"])
    if "preferences" in runs:
        found["preference"] = preferences.trl_pairs(preferences.read(runs["preferences"].product("preferences"))[0])
    if {"ppo", "prepare"} <= runs.keys():
        given = {key: runs["ppo"].config[key] for key in QuestionConfig.__dataclass_fields__ if key in runs["ppo"].config}
        found["prompts"] = prompt_rows(QuestionConfig(**fill(QuestionConfig, given, where="ppo")), runs["prepare"])
    found = {name: rows for name, rows in found.items() if rows}
    if not found:
        raise ValueError("no finished run of sft, preferences or ppo to take rows from: run `make sft` first")
    folder.mkdir(parents=True)
    for name, rows in found.items():
        write(folder / f"{name}.jsonl", rows)
    return {f"{name}.jsonl": len(rows) for name, rows in found.items()}


def write(file: Path, rows: Iterable[Row]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n")
