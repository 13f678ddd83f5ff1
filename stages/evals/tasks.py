"""What is asked: the embedded test problems, and real benchmarks from a local file or the hub, all as problem rows.

A task is written `word_problems` (embedded, from prepare's problems) or `[name=]format:source`, where the format is one of
stages/data/problems.py and the source a local file or, if the name is not one of those, a hub dataset id: `gsm8k:data/test.jsonl`
or `gsm8k:openai/gsm8k`.
"""
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompts.templates import BENCHMARK_CUES, exemplars
from stages.data.curriculum import CUES, TASKS
from stages.data.problems import FORMATS, load_problems, read_problems, split_spec


@dataclass(frozen=True, kw_only=True)
class Task:
    """Problem rows to solve, rows to take examples from (never test problems), and the cues the task's prompts use."""

    name: str
    rows: list[dict]
    pool: list[dict]
    cues: Mapping[str, str]

    def examples(self, row: Mapping[str, Any], shots: int, seed: int) -> list[dict]:
        """`shots` examples for one problem, fixed by seed and problem. Raises ValueError when the pool is too small."""
        if shots > len(self.pool):
            raise ValueError(f"{self.name} has {len(self.pool)} examples: set shots to at most that, not {shots}")
        return random.Random(f"{seed}:{row['id']}").sample(self.pool, shots)


def load_task(spec: str, *, problems: Path, difficulties: list[int], num_problems: int, seed: int) -> Task:
    """The task that `spec` names, with `num_problems` of its problems (0: all), the same ones for every model.

    `problems` is prepare's folder of embedded problems, of which the given difficulties are taken in equal numbers.
    Raises ValueError for an unknown task or format, a source that cannot be read, or too few problems.
    """
    if spec in TASKS:
        return _embedded(spec, problems, difficulties, num_problems, seed)
    try:
        name, format, _ = split_spec(spec)
    except ValueError:
        raise ValueError(f"unknown task {spec!r}: expected one of {', '.join(TASKS)}, or format:source with a format of "
                         f"{', '.join(FORMATS)}, such as gsm8k:data/test.jsonl") from None
    chosen = load_problems(spec, hub_split="test")
    if prompted := [row["id"] for row in chosen if "prompt" in row]:
        raise ValueError(f"problem {prompted[0]!r} of {spec} has a prompt of its own ({len(prompted)} of {len(chosen)} have one), which "
                         "every strategy would have to rewrite: give it a question; prompts are for PPO and rejection sampling")
    if num_problems:
        _enough(chosen, num_problems, spec)
        chosen = random.Random(f"{seed}:{spec}").sample(chosen, num_problems)
    return Task(name=name, rows=chosen, pool=exemplars("multiple_choice" if format == "aqua" else "arithmetic"), cues=BENCHMARK_CUES)


def _embedded(name: str, folder: Path, difficulties: list[int], num_problems: int, seed: int) -> Task:
    def rows_of(split: str) -> list[dict]:
        return read_problems(folder / f"{split}.jsonl", [name], difficulties)

    test = rows_of("test")
    random.Random(f"{seed}:{name}").shuffle(test)
    chosen = test
    if num_problems:
        chosen = []
        for i, difficulty in enumerate(difficulties):
            share = num_problems // len(difficulties) + (i < num_problems % len(difficulties))
            fitting = [row for row in test if row["difficulty"] == difficulty]
            _enough(fitting, share, f"{name}, difficulty {difficulty},")
            chosen += fitting[:share]
    return Task(name=name, rows=chosen, pool=rows_of("sft"), cues=CUES)


def _enough(rows: list[dict], wanted: int, what: str) -> None:
    if len(rows) < wanted:
        raise ValueError(f"{what} has {len(rows)} test problems but {wanted} are asked for: set num_problems lower, or make more")
