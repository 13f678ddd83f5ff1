"""What is asked: the embedded test problems, and real benchmarks from a local file or the hub, all as problem rows.

A task is written `word_problems` (embedded, from prepare's problems) or `[name=]format:source`, where the format is one of
`FORMATS` and the source a local file or, if there is no such file, a hub dataset id: `gsm8k:data/test.jsonl` or
`gsm8k:openai/gsm8k`.
"""
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompts.answers import extract, normalize
from prompts.templates import BENCHMARK_CUES, exemplars
from stages.data.corpora import read_jsonl, read_text
from stages.data.curriculum import CUES, TASKS


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
    name, _, rest = spec.rpartition("=") if "=" in spec.partition(":")[0] else ("", "", spec)
    format, colon, source = rest.partition(":")
    if not colon or format not in FORMATS:
        raise ValueError(f"unknown task {spec!r}: expected one of {', '.join(TASKS)}, or format:source with a format of "
                         f"{', '.join(FORMATS)}, such as gsm8k:data/test.jsonl")
    read, pool, _ = FORMATS[format]
    rows: dict[str, dict] = {}
    for position, (where, record) in enumerate(_records(source, format)):
        row = {"id": f"{format}-{position}", "task": name or format, "difficulty": 0, **_converted(read, record, where)}
        if rows.setdefault(row["id"], row) is not row:
            raise ValueError(f"{where}: id {row['id']!r} was there before; every problem needs an id of its own")
    chosen = list(rows.values())
    if num_problems:
        _enough(chosen, num_problems, spec)
        chosen = random.Random(f"{seed}:{spec}").sample(chosen, num_problems)
    return Task(name=name or format, rows=chosen, pool=exemplars(pool), cues=BENCHMARK_CUES)


def _embedded(name: str, folder: Path, difficulties: list[int], num_problems: int, seed: int) -> Task:
    def rows_of(split: str) -> list[dict]:
        rows = (row for _, row in read_rows(folder / f"{split}.jsonl"))
        return [row for row in rows if row["task"] == name and row["difficulty"] in difficulties]

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


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """JSON objects of a jsonl file, or of one JSON list, each with its place in words.

    Raises ValueError naming file and line for anything else.
    """
    path = Path(path)
    if not read_text(path).lstrip().startswith("["):  # by content: AQuA's .json files hold a line a record
        for number, row in read_jsonl(path):
            yield f"{path}, line {number}", row
        return
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, entry {number}: expected a JSON object, got {type(row).__name__}")
        yield f"{path}, entry {number}", row


def _records(source: str, format: str) -> Iterator[tuple[str, dict]]:
    if Path(source).exists():
        yield from read_rows(source)
        return
    if Path(source).suffix or source.count("/") > 1:
        raise ValueError(f"{source} does not exist: give a local file or a hub dataset id such as openai/gsm8k")
    from datasets import load_dataset

    try:
        dataset = load_dataset(source, FORMATS[format][2], split="test")
    except Exception as error:  # the hub's clients raise what they like
        raise ValueError(f"{source} is no local file, and loading it from the hub failed: {error}") from None
    for i, row in enumerate(dataset):
        yield f"{source}, row {i}", dict(row)


def _converted(read: Callable[[dict], dict], record: dict, where: str) -> dict:
    try:
        row = read(record)
    except KeyError as error:
        raise ValueError(f"{where}: no key {error}; it has {', '.join(map(str, record)) or 'none'}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError(f"{where}: the question is not a text")
    if not normalize(row["answer"]):
        raise ValueError(f"{where}: no answer to compare with")
    return row


def _gsm8k(record: dict) -> dict:
    """Cobbe et al. 2021: worked lines with <<calculator marks>>, then `#### answer`."""
    steps, marker, answer = record["answer"].rpartition("####")
    if not marker:
        raise ValueError("the answer has no '####' line")
    lines = [re.sub(r"<<.*?>>", "", line).strip() for line in steps.splitlines()]
    return {"question": record["question"], "answer": answer.strip(),
            "solutions": [[line if line.endswith(".") else line + "." for line in lines if line]]}


def _svamp(record: dict) -> dict:
    """Patel et al. 2021: body and question apart, the answer a number."""
    question = f"{record['Body'].strip()} {record['Question'].strip()}"
    return {"question": question, "answer": str(record["Answer"]), "solutions": []}


def _aqua(record: dict) -> dict:
    """Ling et al. 2017: five options written `A)...`, the answer a letter."""
    options = [re.sub(r"^(?:([A-E])\))+\s*", r"(\1) ", option) for option in record["options"]]
    question = f"{record['question'].strip()} Choices: {' '.join(options)}"
    return {"question": question, "answer": record["correct"], "solutions": []}


def _problem(record: dict) -> dict:
    """The project's own rows; `solutions`, `difficulty` and `id` may be missing, and the answer may be in GSM8K's spelling."""
    answer = str(record["answer"])
    return {"question": record["question"], "answer": extract(answer) or answer, "solutions": record.get("solutions", []),
            "difficulty": record.get("difficulty", 0), **({"id": str(record["id"])} if "id" in record else {})}


# format: reader of one record, the examples that go with it, and the configuration of the dataset on the hub
FORMATS: dict[str, tuple[Callable[[dict], dict], str, str | None]] = {
    "gsm8k": (_gsm8k, "arithmetic", "main"), "svamp": (_svamp, "arithmetic", None), "aqua": (_aqua, "multiple_choice", "raw"),
    "problems": (_problem, "arithmetic", None)}
