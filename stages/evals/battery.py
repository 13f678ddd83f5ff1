"""What a model can do, asked the same way before and after training: one value an item, so that two exams compare in pairs."""
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from prompts import strategies
from prompts.intervals import wilson
from prompts.records import Solution, Strategy
from prompts.templates import DIRECT, WORKED, Style
from reward.verifiers import right
from stages.data.curriculum import CUES
from stages.data.instructions import follows
from stages.evals.backends import LocalModel
from stages.evals.scheduler import solve
from stages.evals.statistics import compare
from stages.evals.tasks import Task
from stages.models.training import gather, rank, world_size
from stages.run.manifest import metric, say

Row = Mapping[str, Any]
Item = tuple[Strategy, Callable[[Solution], dict[str, bool]]]  # what is asked, and what its solution says in which columns


def exam(model: Any, tokenizer: Any, *, chat: bool, stop_ids: Sequence[int], problems: Sequence[dict], instructions: Sequence[dict] = (),
         benchmarks: Sequence[Task] = (), seed: int, max_new_tokens: int, instruction_tokens: int = 32, batch_size: int = 256,
         ) -> dict[str, list[float]]:
    """Greedy answers, marked 0 or 1: each column in the order of its items, the same on every process. Call on every process.

    `chat` asks in the chat format, else as the pretraining documents write it; answers end at `stop_ids`, plain ones also at a stop
    text. Each of `problems` is asked for a worked and for a direct answer, instructions as they stand, benchmarks for worked answers
    with their own cues; instructions get `instruction_tokens`, the others `max_new_tokens`. Columns:
    `stop_rate` (ended by itself) and `format_rate` (ended with a full stop, after exactly one "The answer is"), both cues of each
    problem, worked ones first; `worked_accuracy`, `direct_accuracy`, `worked_accuracy/<task>`; `instructions`, `instructions/<kind>`;
    `benchmark/<name>`. An item whose prompt leaves no room for its answer counts as not done, and their number is printed; a
    column with no other item is left out.

    Raises ValueError for two benchmarks of one name, and for chat without a chat template.
    """
    if len({task.name for task in benchmarks}) < len(benchmarks):
        raise ValueError(f"two benchmarks are called {[task.name for task in benchmarks]}: name them apart, as in train=gsm8k:train.jsonl")
    own, bare = _style(chat, CUES, max_new_tokens), _style(chat, {DIRECT: ""}, instruction_tokens)
    items: list[Item] = [(strategies.zero_shot_cot(row, own), partial(_problem, row, WORKED)) for row in problems]
    items += [(strategies.direct(row, own), partial(_problem, row, DIRECT)) for row in problems]
    items += [(strategies.direct({"id": row["id"], "question": row["prompt"]}, bare), partial(_instruction, row)) for row in instructions]
    for task in benchmarks:
        style = _style(chat, task.cues, max_new_tokens)
        items += [(strategies.zero_shot_cot(row, style), partial(_benchmark, row, task.name)) for row in task.rows]

    mine = range(rank(), len(items), world_size())
    backend = LocalModel.of(model, tokenizer, stop_ids=stop_ids, seed=seed, batch_size=batch_size)
    solutions = solve([items[i][0] for i in mine], backend, batch_size=max(1, len(mine)))  # the backend sorts by length: show it all
    marked = gather([(i, s.samples[0].finish not in strategies.NO_ROOM, items[i][1](s)) for i, s in zip(mine, solutions, strict=True)])
    columns, answered = defaultdict(list), set()
    for _, asked, marks in sorted(marked, key=lambda entry: entry[0]):
        for name, mark in marks.items():
            columns[name].append(float(mark))
        answered |= set(marks) if asked else set()
    if too_long := sum(not asked for _, asked, _ in marked):
        say(f"exam: {too_long} of {len(items)} prompts leave no room for an answer in a context of {backend.context} tokens")
    return {name: column for name, column in columns.items() if name in answered}


def summary(columns: Mapping[str, Sequence[float]], group: str) -> dict[str, dict]:
    """Manifest metrics `group/name`: the share of ones, n, and its Wilson interval."""
    return {f"{group}/{name}": metric(sum(column) / len(column), n=len(column), ci95=wilson(sum(column), len(column)))
            for name, column in columns.items()}


def changes(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """Manifest metrics `change/name`, after minus before with the interval of pairs, for the columns of both exams.

    Raises ValueError when a column has another length after than before.
    """
    metrics = {}
    for name in before:
        if name in after:
            pairs = compare(after[name], before[name])
            metrics[f"change/{name}"] = metric(pairs["difference"], n=pairs["n"], ci95=pairs["ci95"])
    return metrics


def _style(chat: bool, cues: Mapping[str, str], max_tokens: int) -> Style:
    return Style(chat=chat, cues=cues, max_tokens=dict.fromkeys((WORKED, DIRECT), max_tokens))


def _problem(row: Row, kind: str, solution: Solution) -> dict[str, bool]:
    [sample] = solution.samples
    in_format = sample.text.strip().endswith(".") and sample.text.count("The answer is") == 1
    marks = {"stop_rate": sample.finished, "format_rate": sample.finished and in_format, f"{kind}_accuracy": _right(row, solution)}
    return marks | ({f"worked_accuracy/{row['task']}": _right(row, solution)} if kind == WORKED else {})


def _instruction(row: Row, solution: Solution) -> dict[str, bool]:
    done = follows(row, solution.samples[0].text)
    return {"instructions": done, f"instructions/{row['kind']}": done}


def _benchmark(row: Row, name: str, solution: Solution) -> dict[str, bool]:
    return {f"benchmark/{name}": _right(row, solution)}


def _right(row: Row, solution: Solution) -> bool:
    return right(row, solution.answer)
