"""Prompt and completion rows for supervised fine-tuning, from the curriculum or from the user's own files."""
import itertools
import random
from typing import Any

from stages.data import corpora, curriculum


def curriculum_rows(problems: list[dict], *, seed: int, count: int, worked_share: float, few_shot_share: float) -> list[dict[str, Any]]:
    """`count` dialogues over the problem rows, as many of each task, worked and direct, some after examples of their task as earlier turns.

    Rows are `{"id", "style", "prompt": [messages], "completion": [message]}`; problems repeat where a task has too few.
    """
    rng = random.Random(f"dialogues:{seed}")
    by_task: dict[str, list[dict]] = {}
    for problem in rng.sample(problems, len(problems)):
        by_task.setdefault(problem["task"], []).append(problem)
    turns = itertools.chain.from_iterable(zip(*map(itertools.cycle, by_task.values()), strict=True))
    rows = []
    for problem in itertools.islice(turns, count):
        style = curriculum.WORKED if rng.random() < worked_share else curriculum.DIRECT
        shots = rng.randint(1, 3) if rng.random() < few_shot_share else 0
        prompt = []
        others = [p for p in rng.sample(by_task[problem["task"]], min(shots + 1, len(by_task[problem["task"]]))) if p is not problem]
        for shot in [*others[:shots], problem]:
            prompt.append({"role": "user", "content": curriculum.user_turn(shot["question"], style)})
            prompt.append({"role": "assistant", "content": _answer(shot, style, rng)})
        rows.append({"id": problem["id"], "style": style, "prompt": prompt[:-1], "completion": prompt[-1:]})
    return rows


def _answer(problem: dict, style: str, rng: random.Random) -> str:
    steps = " ".join(rng.choice(problem["solutions"])) + " " if style == curriculum.WORKED else ""
    return f"{steps}The answer is {problem['answer']}."


def file_rows(source: str, *, prompt_column: str, completion_column: str, hub_config: str | None = None,
              hub_split: str = "train", limit: int = 0) -> list[dict[str, Any]]:
    """Dialogues of a local file or a hub dataset. A column may hold text (one turn) or a list of messages.

    Raises ValueError naming file and row for a missing column, one that is neither, an empty completion or an unknown role.
    """
    rows = []
    for where, row in itertools.islice(corpora.source_rows(source, hub_config, hub_split), limit or None):
        for column in (prompt_column, completion_column):
            if not row.get(column):
                raise ValueError(f"{where} has nothing in column {column!r}: it has {', '.join(row)}; "
                                 "set prompt_column and completion_column")
        prompt = _messages(row[prompt_column], "user", where)
        completion = _messages(row[completion_column], "assistant", where)
        rows.append({"id": where, "style": "file", "prompt": prompt, "completion": completion})
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def _messages(value: Any, role: str, where: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(value, list) or not isinstance(message, dict) or not isinstance(message.get("content") or "", str):
            raise ValueError(f"{where}: expected text or a list of {{'role', 'content'}} with text as content, got {str(value)[:60]!r}")
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: unknown role {message.get('role')!r}: use system, user or assistant")
        if not message.get("content"):
            raise ValueError(f"{where}: an empty {message['role']} turn")
    return list(value)
