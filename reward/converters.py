"""Preferences as others keep them, turned into records (reward/preferences.py). The columns tell the form.

    chosen, rejected[, prompt]       a pair: TRL's, text or messages, the prompt inside or beside; hh-rlhf's transcripts
    completions[, instruction]       UltraFeedback's (Cui et al. 2023): scored responses of one prompt
    prompt, responses, scores        the same, as two lists; a higher score is better
    prompt, ranked                   texts, best first; `responses` without ranks are nobody's ranking and refused

Converted records have no id: the file and its line become one. What is left out is counted with its reason.
"""
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from reward.verifiers import dense_ranks

Record = dict[str, Any]
ROLES = {"Human": "user", "Assistant": "assistant"}  # the turns of hh-rlhf (Bai et al. 2022)
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
WHO = ("annotator", "simulated", "criterion", "time")
SCORES = ("overall_score", "fine-grained_score", "annotations")


def convert(row: Mapping[str, Any], where: str, counted: Counter[str]) -> Record | None:
    """A record from a row of any of the forms above; a row of another form passes as it is, without its empty cells (None).

    None when nothing can be learned from the row; `counted` then says why: `prompts_differ` (the two dialogues of a pair
    differ before their last turn: five of 2,312 in hh-rlhf's harmless-base), `empty_text` (a response without text),
    `too_few_scored` (fewer than two responses have a score). It also counts responses left out of a row that is kept
    (`unscored_responses`).
    Raises ValueError naming `where` for a row that looks like one of the forms and is not.
    """
    row = {key: value for key, value in row.items() if value is not None}
    for key in ("responses", "ranked"):
        if key in row and not isinstance(row[key], list):
            raise ValueError(f"{where}: {key} is a {type(row[key]).__name__}, expected a list of texts")
    if {"chosen", "rejected"} <= set(row):
        record = from_pair(row, where, counted)
    elif "completions" in row and "ranks" not in row:
        record = from_completions(row, where, counted)
    elif {"responses", "scores"} <= set(row) and "ranks" not in row:
        if not isinstance(row["scores"], list) or len(row["scores"]) != len(row["responses"]):
            raise ValueError(f"{where}: {len(row['responses'])} responses and scores {row['scores']!r}: give each its score")
        record = scored(row, row["responses"], [number(s) for s in row["scores"]], counted)
    elif "ranked" in row:
        record = {"responses": row["ranked"], "ranks": list(range(1, len(row["ranked"]) + 1))}
    else:
        return row
    if record is None:
        return None
    if any(isinstance(r, str) and not r.strip() for r in record["responses"]):
        counted["empty_text"] += 1
        return None
    record = {"prompt": row.get("prompt", row.get("instruction")), "annotator": "unknown", "criterion": "overall", **record,
              **{key: row[key] for key in WHO if key in row}}
    return record if record["annotator"] == "unknown" else {"simulated": str(record["annotator"]).startswith("simulated"), **record}


def from_pair(row: Mapping[str, Any], where: str, counted: Counter[str]) -> Record | None:
    """Two responses from `chosen` and `rejected`; None, and counted, when they answer different prompts."""
    sides, given = [row["chosen"], row["rejected"]], row.get("prompt")
    transcripts = given is None and all(isinstance(side, str) for side in sides)  # hh-rlhf's, whom people ranked
    record: Record = {"ranks": [1, 2], **({"annotator": "people"} if transcripts else {})}
    if isinstance(sides[0], str) and given is not None:
        return record | {"prompt": given, "responses": sides}
    for side in sides:
        if not isinstance(side, str | list) or not all(isinstance(m, str) or {"role", "content"} <= set(m) for m in side):
            raise ValueError(f"{where}: chosen and rejected are texts or lists of messages with role and content, got {str(side)[:40]!r}")
    dialogues = [dialogue(side, where) if isinstance(side, str) else side for side in sides]
    if any(not d or d[-1]["role"] != "assistant" for d in dialogues):
        raise ValueError(f"{where}: a dialogue does not end with the assistant's turn")
    prompts, responses = [d[:-1] for d in dialogues], [d[-1]["content"] for d in dialogues]
    if prompts[0] != prompts[1]:
        counted["prompts_differ"] += 1
        return None
    if isinstance(given, list) and dialogues[0][:len(given)] != given:  # TRL's explicit prompt: the sides hold only what follows it
        return record | {"prompt": given + prompts[0], "responses": responses}
    return record | {"prompt": prompts[0] or given, "responses": responses}


def dialogue(text: str, where: str) -> list[dict[str, str]]:
    """Messages of an hh-rlhf text, turns marked by a blank line and "Human:" or "Assistant:". Raises ValueError without turns."""
    marks = list(TURN.finditer(text))
    if not marks or text[:marks[0].start()].strip():
        raise ValueError(f"{where}: expected turns that begin with 'Human:' or 'Assistant:', got {text[:40]!r}")
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return [{"role": ROLES[m[1]], "content": text[m.end():end].strip()} for m, end in zip(marks, ends, strict=True)]


def from_completions(row: Mapping[str, Any], where: str, counted: Counter[str]) -> Record | None:
    """A ranking by the first of overall_score, fine-grained_score and the mean of the annotations' ratings that two responses have.

    The overall score is first because it is what the data set's own reward model learned from; its name becomes the criterion.
    """
    completions = row["completions"]
    if not isinstance(completions, list) or not all(isinstance(c, dict) and "response" in c for c in completions):
        raise ValueError(f"{where}: completions must be a list of objects with a response and a score ({', '.join(SCORES)})")
    for key in SCORES:
        scores = [rating(c.get(key)) for c in completions]
        if sum(s is not None for s in scores) >= 2:
            break
    record = scored(row, [c["response"] for c in completions], scores, counted)
    if record is None:
        return None
    models = [c.get("model") for c, s in zip(completions, scores, strict=True) if s is not None]
    origins = {"origins": [{"model": m} for m in models]} if all(models) else {}
    return record | origins | {"criterion": "mean of the annotations" if key == "annotations" else key}


def scored(row: Mapping[str, Any], responses: list[str], scores: list[float | None], counted: Counter[str]) -> Record | None:
    """A ranking, highest score first; equal scores tie, a response without a score is left out and counted."""
    kept = [(r, s) for r, s in zip(responses, scores, strict=True) if s is not None]
    counted["unscored_responses"] += len(responses) - len(kept)
    if len(kept) < 2:
        counted["too_few_scored"] += 1
        return None
    return {"responses": [r for r, _ in kept], "ranks": dense_ranks([s for _, s in kept]), "scores": [s for _, s in kept]}


def number(value: Any) -> float | None:
    """A finite number, also as text; None for anything else, such as UltraFeedback's N/A."""
    try:
        result = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def rating(value: Any) -> float | None:
    """A score, or the mean of the ratings of several aspects: {"helpfulness": {"Rating": "4", ...}, ...}."""
    if not isinstance(value, dict):
        return number(value)
    ratings = [number(aspect.get("Rating")) for aspect in value.values() if isinstance(aspect, dict)]
    there = [r for r in ratings if r is not None]
    return math.fsum(there) / len(there) if there else None
