"""What is asked: the embedded test problems, and real benchmarks from a local file or the hub, all as problem rows.

A task is written `word_problems` (embedded, from prepare's problems) or `[name=]format:source`, where the format is one of
stages/data/problems.py and the source a local file or, if the name is not one of those, a hub dataset id: `gsm8k:data/test.jsonl`
or `gsm8k:openai/gsm8k`.
"""
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prompts.templates import BENCHMARK_CUES, exemplars
from stages.data.corpora import read_text
from stages.data.curriculum import CUES, TASKS
from stages.data.problems import FORMATS, GENERATED, load_problems, read_problems, split_spec
from stages.run.manifest import Manifest, hash_data


@dataclass(frozen=True, kw_only=True)
class Task:
    """Problem rows to solve, rows to take examples from (never test problems), and the cues the task's prompts use.

    `in_order` shows the first examples of the pool to every problem, as a paper's prompt does, instead of drawing them. `leaked` counts
    what was left out of the pool because it is asked.
    """

    name: str
    rows: list[dict]
    pool: list[dict]
    cues: Mapping[str, str]
    in_order: bool = False
    leaked: int = 0

    def examples(self, row: Mapping[str, Any], shots: int, seed: int) -> list[dict]:
        """`shots` examples for one problem, fixed by seed and problem. Raises ValueError when the pool is too small."""
        if shots and not self.pool:
            raise ValueError(f"{self.name} has no examples of its own: name a source of {shots} or more in exemplars, as in "
                             f"{{{self.name}: format:source}}, or leave out the strategies that show examples")
        if shots > len(self.pool):
            raise ValueError(f"{self.name} has {len(self.pool)} examples: set shots to at most that, not {shots}, or name a source of "
                             "more in exemplars")
        return self.pool[:shots] if self.in_order else random.Random(f"{seed}:{row['id']}").sample(self.pool, shots)


def load_task(spec: str, *, problems: Path, difficulties: list[int], num_problems: int, seed: int, examples: str | None = None) -> Task:
    """The task that `spec` names, with `num_problems` of its problems (0: all), the same ones for every model.

    `problems` is prepare's folder of embedded problems, of which the given difficulties are taken in equal numbers. `examples` is where
    examples come from in place of the project's own: another `format:source` (of a hub dataset its train split), drawn from by seed, or a
    prompt in a .txt file, shown in its order. An example that is one of the problems asked is left out of what is drawn from, and counted;
    in a prompt that is shown as it stands it is an error.
    Raises ValueError for an unknown task or format, a source that cannot be read, or too few problems.
    """
    name = task_name(spec)
    embedded = spec in TASKS
    rows, pool = _embedded(spec, problems, difficulties, num_problems, seed) if embedded else _benchmark(spec, num_problems, seed)
    in_order = examples is not None and examples.endswith(".txt")
    if examples is not None:
        pool = read_prompt(Path(examples)) if in_order else load_problems(examples, hub_split="train")
    asked = {_wording(row["question"]) for row in rows}
    kept = [row for row in pool if _wording(row["question"]) not in asked]
    if in_order and len(kept) < len(pool):
        leaked = next(row for row in pool if _wording(row["question"]) in asked)
        raise ValueError(f"{examples}: example {leaked['id']} is one of the problems of {spec}: its answer would stand in the prompt; "
                         "take it out of either file")
    cues = CUES if embedded else BENCHMARK_CUES
    return Task(name=name, rows=rows, pool=kept, cues=cues, in_order=in_order, leaked=len(pool) - len(kept))


def task_name(spec: str) -> str:
    """The name that a task has in results. Raises ValueError for an unknown task or format."""
    try:
        return spec if spec in TASKS else split_spec(spec)[0]
    except ValueError:
        raise ValueError(f"unknown task {spec!r}: expected one of {', '.join(TASKS)}, or format:source with a format of "
                         f"{', '.join((*FORMATS, *GENERATED))}, such as gsm8k:data/test.jsonl") from None


def searched(specs: Sequence[str], prepared: Manifest) -> dict[str, dict[str, Any] | None]:
    """By task, what prepare found of its questions in the pretraining text, and None where it did not look for them.

    A benchmark is known by its rows, whatever name prepare was given. Nothing where all text is the curriculum's, which is made by program
    and shares no problem with its own test split.
    """
    if set(prepared.data["config"]["sources"]) == {"curriculum"}:
        return {}
    found = prepared.data["notes"]["contamination"]
    known = {digest: name.removeprefix("evaluation set ") for name, digest in prepared.data["inputs"].items()}
    names = {spec: "problems/test" if spec in TASKS else known.get(hash_data(load_problems(spec, hub_split="test")), "") for spec in specs}
    return {task_name(spec): {key: found[name][key] for key in ("questions", "found", "documents")} if name in found else None
            for spec, name in names.items()}


def _wording(question: str) -> str:
    return " ".join(question.casefold().split())


def read_prompt(path: Path) -> list[dict]:
    """The worked examples of a prompt in plain text, in order: `Question:` or `Q:`, then `Answer:` or `A:` if there is one, the steps a
    line each, and "The answer is ..." at the end. A cue to think step by step is left out, as it belongs to the question.

    Papers publish their prompts so (Wei et al. 2022, Suzgun et al. 2023). Raises ValueError naming the file for an example without answer.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: name a file with worked examples in exemplars")
    blocks = re.split(r"^(?:Question|Q):\s*", read_text(path), flags=re.MULTILINE)[1:]
    if not blocks:
        raise ValueError(f"{path} has no example: each begins with \"Question:\" or \"Q:\" on a line of its own")
    rows = []
    for number, block in enumerate(blocks):
        question, worked = _parted(block.strip())
        stated = re.search(r"(?:So )?[Tt]he answer is\s+(\S.*?)\.?\s*$", worked)
        if not question or not stated:
            raise ValueError(f"{path}: example {number} has no question, or does not end with \"The answer is ...\": {block[:40]!r}")
        steps = [line.strip() for line in worked[:stated.start()].splitlines() if line.strip()]
        rows.append({"id": f"{path.stem}-{number}", "task": path.stem, "difficulty": 0, "question": question,
                     "answer": stated[1].strip().strip("()") if re.fullmatch(r"\([A-Z]\)", stated[1].strip()) else stated[1].strip(),
                     "solutions": [steps] if steps else []})
    return rows


def _parted(block: str) -> tuple[str, str]:
    """Question and worked answer of one example: at the line that begins the answer, else at the cue's, else at the answer sentence."""
    for mark in (r"^(?:Answer|A):", r"^(?=Let's think step by step)", r"^(?=(?:So )?[Tt]he answer is)"):
        if match := re.search(mark, block, re.MULTILINE):
            worked = re.sub(r"^\s*Let's think step by step\.?\s*", "", block[match.end():])
            return block[:match.start()].strip(), worked
    return "", ""


def _benchmark(spec: str, num_problems: int, seed: int) -> tuple[list[dict], list[dict]]:
    format = split_spec(spec)[1]
    chosen = load_problems(spec, hub_split="test")
    if prompted := [row["id"] for row in chosen if "prompt" in row]:
        raise ValueError(f"problem {prompted[0]!r} of {spec} has a prompt of its own ({len(prompted)} of {len(chosen)} have one), which "
                         "every strategy would have to rewrite: give it a question; prompts are for PPO and rejection sampling")
    if num_problems:
        _enough(chosen, num_problems, spec)
        chosen = random.Random(f"{seed}:{spec}").sample(chosen, num_problems)
    if format in GENERATED:
        return chosen, load_problems(spec, hub_split="train")
    own = FORMATS[format].examples
    return chosen, exemplars(own) if own else []


def _embedded(name: str, folder: Path, difficulties: list[int], num_problems: int, seed: int) -> tuple[list[dict], list[dict]]:
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
    return chosen, rows_of("sft")


def _enough(rows: list[dict], wanted: int, what: str) -> None:
    if len(rows) < wanted:
        raise ValueError(f"{what} has {len(rows)} test problems but {wanted} are asked for: set num_problems lower, or make more")
