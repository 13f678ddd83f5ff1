"""The rows of supervised fine-tuning: a weighted mixture of sources, each row checked and brought to one form.

A dialogue is `{"id", "source", "messages": [{"role", "content"}, ...], "first": k}`: the assistant's turns from message `k` on are
learned. Plain text is `{"id", "source", "text"}`. Files and hub datasets may hold prompts and completions, conversations (also
ShareGPT's `from` and `value`), Alpaca's instruction, input and output, the `chosen` side of preferences, or text.
"""
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from reward.converters import TURN, dialogue
from stages.data import corpora, curriculum
from stages.data.instructions import KINDS, instructions
from stages.data.problems import read_problems
from stages.run.config import fill, unknown

Row = dict[str, Any]
FORMATS = {  # roles of columns that a row needs; the order decides where a row would fit several
    "prompt_completion": ("prompt", "completion"), "messages": ("messages",), "instruction": ("instruction", "output"),
    "chosen": ("chosen",), "text": ("text",)}
OPTIONAL = {"instruction": ("input",), "chosen": ("prompt",)}
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}  # the last two: ShareGPT
GENERATED = {"curriculum": ("tasks", "worked_share", "few_shot_share"), "instructions": ("tasks",)}
READ = ("format", "columns", "where", "hub_config", "hub_split")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One part of a mixture: `data` is `curriculum`, `instructions`, a local file, folder or glob, or a hub dataset id.

    `columns` maps a column's role to its name in the file ({prompt: question}); `where` keeps the rows whose columns equal its values
    ({is_correct: true}) and counts the others as filtered. `tasks` (empty: all) are the curriculum's, or kinds of instructions; the two
    shares are the curriculum's: of dialogues with worked steps, and of those that begin with examples as earlier turns.
    """

    data: str
    name: str = ""
    format: Literal["auto", "prompt_completion", "messages", "instruction", "chosen", "text"] = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    where: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    hub_config: str | None = None
    hub_split: str = "train"
    tasks: list[str] = field(default_factory=list)
    worked_share: float = 0.7
    few_shot_share: float = 0.15


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """`train` and `validation` source by source in the order given; `dropped` rows as `{"where", "reason", "source"}`.

    `counts` by source: rows read, filtered, dropped, trained on, of these repeats of a row (or problem) that is there already, and
    validated on.
    """

    train: list[Row]
    validation: list[Row]
    dropped: list[dict[str, str]]
    counts: dict[str, dict[str, int]]


class BadRow(ValueError):
    """A row that cannot be trained on: where it is, and why."""

    def __init__(self, where: str, reason: str, remedy: str = ""):
        super().__init__(f"{where}: {reason}{remedy}")
        self.where, self.reason = where, reason


def parse_sources(given: Sequence[dict[str, Any]], where: str = "data") -> list[Source]:
    """Sources from a recipe's mappings. Raises ValueError naming the entry, and the nearest valid key or the values there are."""
    if not given:
        raise ValueError(f"{where}: no source: give at least one, such as {{data: curriculum}}")
    sources: dict[str, Source] = {}
    for number, values in enumerate(given):
        place = f"{where}[{number}]"
        source = Source(**fill(Source, values, where=place))
        own = ("data", "name", "weight", *GENERATED.get(source.data, READ))
        if foreign := [key for key in values if key not in own]:
            raise ValueError(f"{place}: {foreign[0]} has no meaning for {source.data}: it takes {', '.join(own)}")
        _check_values(source, place)
        source = replace(source, name=source.name or _name(source.data))
        if source.name in sources:
            raise ValueError(f"{place}: a source named {source.name!r} is there already: give one of them another name")
        sources[source.name] = source
    return list(sources.values())


def _check_values(source: Source, place: str) -> None:
    if not 0 < source.weight < float("inf"):
        raise ValueError(f"{place}: weight {source.weight} must be above 0: leave the source out instead")
    for key in ("worked_share", "few_shot_share"):
        if not 0 <= getattr(source, key) <= 1:
            raise ValueError(f"{place}: {key} {getattr(source, key)} must lie between 0 and 1")
    tasks = KINDS if source.data == "instructions" else tuple(curriculum.TASKS)
    for task in source.tasks:
        if task not in tasks:
            raise unknown(task, list(tasks), f"{place}: tasks", "task")
    known = _roles(source.format) if source.format != "auto" else list(dict.fromkeys(r for f in FORMATS for r in _roles(f)))
    for role in source.columns:
        if role not in known:
            raise unknown(role, known, f"{place}: columns")


def _roles(format: str) -> list[str]:
    return [*FORMATS[format], *OPTIONAL.get(format, ())]


def _name(data: str) -> str:
    suffix = next((s for s in sorted(corpora.LOCAL_SUFFIXES, key=len, reverse=True) if data.endswith(s)), "")
    return data if data in GENERATED or not corpora.is_local(data) or "*" in data else Path(data).name.removesuffix(suffix)


def read(sources: Sequence[Source], *, problems: Path | None, seed: int, num_rows: int, validation_rows: int,
         bad_rows: str = "stop") -> Mixture:
    """The mixture: `num_rows` training rows divided by the weights, or with 0 every source's rows times its weight.

    Whole passes over a source come in its own order first and in seeded orders after; of a last pass a seeded part is taken. A
    source without an end counts, with `num_rows` 0, as long as the others on average. Validation rows, divided by the weights, are
    the last of each file by its length (of a hub dataset, the last of what is needed and read) and never trained on; the curriculum
    has its own.
    `problems` is the folder of the curriculum's files. Raises BadRow with `bad_rows` stop; ValueError where rows are too few.
    """
    weights, dropped = [source.weight for source in sources], []
    held = apportion(validation_rows, weights)
    shares = apportion(num_rows, weights)
    pools: dict[str, list[Row]] = {}
    filtered: dict[str, int] = {}
    for source, share, out in zip(sources, shares, held, strict=True):
        if source.data not in GENERATED:
            limit = max(1, share + out) if num_rows and not corpora.is_local(source.data) else None
            pools[source.name], bad, filtered[source.name] = _read_source(source, limit, bad_rows)
            dropped += bad
            if len(pools[source.name]) <= out:
                raise ValueError(f"{source.data} has {len(pools[source.name])} rows that can be used ({len(bad)} dropped), not more than "
                                 f"the {out} validation rows that are its share: lower validation_rows")
    if not num_rows:
        lengths = {source.name: len(pools[source.name]) - out for source, out in zip(sources, held, strict=True) if source.name in pools}
        if not lengths:
            raise ValueError(f"{sources[0].data} has no end: set num_rows above 0")
        mean = sum(lengths.values()) / len(lengths)
        shares = [round(source.weight * lengths.get(source.name, mean)) for source in sources]

    mixture = Mixture(train=[], validation=[], dropped=dropped, counts={})
    for source, share, out in zip(sources, shares, held, strict=True):
        if source.name in pools:
            rest, validation = _hold_out(pools[source.name], out)
            train = _take(rest, share, random.Random(f"mixture:{source.name}:{seed}"))
        else:
            train, validation = (_generated(source, split, count, problems, seed) for split, count in (("sft", share), ("validation", out)))
        bad_count = sum(d["source"] == source.name for d in dropped)
        mixture.train.extend(train)
        mixture.validation.extend(validation)
        mixture.counts[source.name] = {
            "read": len(pools[source.name]) + bad_count + filtered[source.name] if source.name in pools else len(train) + len(validation),
            "filtered": filtered.get(source.name, 0), "dropped": bad_count,
            "train": len(train), "repeated": len(train) - len({row["id"] for row in train}), "validation": len(validation)}
    return mixture


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts by weight, what rounding leaves going to the largest remainders (Hamilton's method), earlier first."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(share) for share in exact]
    for i in sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])[:total - sum(parts)]:
        parts[i] += 1
    return parts


def _hold_out(rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and `count` to validate on, the last of each file: the files of a folder often are kinds of their own."""
    files: dict[str, list[Row]] = {}
    for row in rows:
        files.setdefault(row["id"].rpartition(", ")[0], []).append(row)
    ends = [len(of) - out for of, out in zip(files.values(), apportion(count, [len(of) for of in files.values()]), strict=True)]
    return ([row for of, end in zip(files.values(), ends, strict=True) for row in of[:end]],
            [row for of, end in zip(files.values(), ends, strict=True) for row in of[end:]])


def _take(rows: list[Row], count: int, rng: random.Random) -> list[Row]:
    taken: list[Row] = []
    while len(taken) < count:
        size = min(len(rows), count - len(taken))
        taken += rows if not taken and size == len(rows) else rng.sample(rows, size)
    return taken


def _read_source(source: Source, limit: int | None, bad_rows: str) -> tuple[list[Row], list[dict[str, str]], int]:
    rows: list[Row] = []
    dropped: list[dict[str, str]] = []
    filtered, format = 0, str(source.format)
    for where, raw in corpora.source_rows(source.data, source.hub_config, source.hub_split):
        if len(rows) == limit:
            break
        try:
            if missing := [column for column in source.where if column not in raw]:
                raise BadRow(where, f"no column {missing[0]!r} for where: it has {', '.join(raw)}")
            if any(raw[column] != value for column, value in source.where.items()):
                filtered += 1
                continue
            format = detect(raw, source.columns, where) if format == "auto" else format
            rows.append({"id": where, "source": source.name, **normalise(raw, format, source.columns, where)})
        except BadRow as error:
            if bad_rows == "stop":
                raise BadRow(error.where, error.reason, "; `bad_rows: drop` leaves such rows out and lists them") from None
            dropped.append({"where": error.where, "reason": error.reason, "source": source.name})
    if not rows:
        first = f" that can be used: {len(dropped)} dropped, the first, {dropped[0]['where']}: {dropped[0]['reason']}" if dropped else ""
        why = first or (f" where {source.where}" if source.where else "")
        raise ValueError(f"{source.data} has no rows{why}")
    return rows, dropped, filtered


def detect(row: Row, columns: dict[str, str], where: str) -> str:
    """The format of a row by its columns; only those that know every role of `columns` are asked. Raises BadRow."""
    able = [format for format in FORMATS if set(columns) <= set(_roles(format))]
    found = [format for format in able if all(_column(role, columns, row) in row for role in FORMATS[format])]
    if found or len(able) == 1:
        return (found or able)[0]
    forms = "; ".join(" and ".join(columns.get(role, role) for role in FORMATS[format]) for format in able)
    raise BadRow(where, f"cannot tell its format: it has {', '.join(row)}; expected one of: {forms}; name others in `columns`")


def _column(role: str, columns: dict[str, str], row: Row) -> str:
    if role == "messages" and role not in columns and role not in row and "conversations" in row:
        return "conversations"
    return columns.get(role, role)


def normalise(row: Row, format: str, columns: dict[str, str], where: str) -> Row:
    """`{"messages", "first"}` or `{"text"}` of one row. Raises BadRow for a missing column or what cannot be trained on."""
    cells: dict[str, Any] = {}
    for role in _roles(format):
        column = _column(role, columns, row)
        if column not in row and (role in FORMATS[format] or role in columns):
            raise BadRow(where, f"no column {column!r} for {role}: it has {', '.join(row)}; set columns: {{{role}: ...}}")
        cells[role] = row.get(column)
        optional = role not in FORMATS[format] and cells[role] in (None, "")
        if not optional and (cells[role] in (None, []) or (isinstance(cells[role], str) and not cells[role].strip())):
            raise BadRow(where, f"an empty {role}")
        if role in ("instruction", "input", "output", "text") and not optional and not isinstance(cells[role], str):
            raise BadRow(where, f"{role} is not text but {cells[role]!r:.60}")
    if format == "text":
        return {"text": cells["text"]}
    if format == "instruction":
        cells = {"prompt": "\n\n".join(filter(None, (cells["instruction"], cells["input"]))), "completion": cells["output"]}
    if format == "messages":
        prompt, rest = [], _turns(cells["messages"], "", where)
    elif format == "chosen":
        rest = _chosen(cells, where)
        prompt = _turns(cells["prompt"], "user", where) if cells["prompt"] and rest[0]["role"] == "assistant" else []
    else:
        prompt, rest = _turns(cells["prompt"], "user", where), _turns(cells["completion"], "assistant", where)
    _check_turns([*prompt, *rest], where)
    return {"messages": [*prompt, *rest], "first": len(prompt)}


def _chosen(cells: Row, where: str) -> list[dict[str, str]]:
    """The turns of an hh-rlhf transcript or a list; a text that is neither answers the row's prompt."""
    text = cells["chosen"]
    if not isinstance(text, str) or (cells["prompt"] and not TURN.match(text)):
        return _turns(text, "assistant", where)
    try:
        return dialogue(text, where)
    except ValueError as error:
        raise BadRow(where, str(error).removeprefix(f"{where}: ")) from None


def _turns(value: Any, role: str, where: str) -> list[dict[str, str]]:
    """One turn of `role` for text or a list of its lines (where a role is given), or the messages of a list."""
    if role and isinstance(value, list) and value and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    turns = []
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(value, list) or not isinstance(message, dict):
            raise BadRow(where, f"expected {'text or ' if role else ''}a list of {{'role', 'content'}}, got {value!r:.60}")
        said, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if said not in ROLES:
            raise BadRow(where, f"unknown role {said!r}: use system, user or assistant")
        if content is not None and not isinstance(content, str):
            raise BadRow(where, f"the content of a turn ({ROLES[said]}) is not text but {content!r:.60}")
        turns.append({"role": ROLES[said], "content": content or ""})
    return turns


def _check_turns(turns: list[dict[str, str]], where: str) -> None:
    roles = [turn["role"] for turn in turns]
    for number, turn in enumerate(turns, start=1):
        if not turn["content"].strip():
            raise BadRow(where, f"turn {number} ({turn['role']}) is empty")
        if turn["role"] == "system" and number > 1:
            raise BadRow(where, f"turn {number} is a system turn: only the first may be")
        if number > 1 and roles[number - 2] == turn["role"]:
            raise BadRow(where, f"two {turn['role']} turns in a row (turns {number - 1} and {number})")
    if "assistant" not in roles:
        raise BadRow(where, "no assistant turn: nothing to learn")
    if roles[-1] != "assistant":
        raise BadRow(where, f"the dialogue does not end with the assistant's turn but with the {roles[-1]}'s")


def _generated(source: Source, split: str, count: int, problems: Path | None, seed: int) -> list[Row]:
    if source.data == "instructions":
        made = itertools.islice(instructions(seed, split=split, kinds=source.tasks or KINDS), count)
        return [{"id": row["id"], "source": source.name, "first": 1, "messages": [
            {"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]} for row in made]
    if problems is None:
        raise ValueError("the curriculum's dialogues are made of the problems of stages.prepare: none were given")
    rows = curriculum_rows(read_problems(problems / f"{split}.jsonl", source.tasks), seed=seed, count=count,
                           worked_share=source.worked_share, few_shot_share=source.few_shot_share) if count else []
    return [{"id": row["id"], "source": source.name, "messages": [*row["prompt"], *row["completion"]], "first": len(row["prompt"])}
            for row in rows]


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


def in_turn(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows in a seeded order with the sources taking turns, so that each look, which reads the first of them, reads some of all."""
    by_source: dict[str, list[Row]] = {}
    for row in random.Random(f"validation:{seed}").sample(rows, len(rows)):
        by_source.setdefault(row["source"], []).append(row)
    return [row for turn in itertools.zip_longest(*by_source.values()) for row in turn if row is not None]
