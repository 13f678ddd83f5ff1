"""Problem rows on disk, as stages.prepare writes them: `{"id", "task", "difficulty", "question", "answer", "solutions"}`."""
import json
from pathlib import Path
from typing import Any


def read_problems(path: Path, tasks: list[str], difficulties: list[int]) -> list[dict[str, Any]]:
    """Rows of these tasks and difficulties (empty: all), in the file's order. Raises ValueError naming those there are."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [r for r in rows if (not tasks or r["task"] in tasks) and (not difficulties or r["difficulty"] in difficulties)]
    if not kept:
        raise ValueError(f"no problem of {path} has tasks {tasks} and difficulties {difficulties}: choose from tasks "
                         f"{sorted({r['task'] for r in rows})} and difficulties {sorted({r['difficulty'] for r in rows})}")
    return kept
