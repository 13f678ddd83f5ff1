"""Problems as rows `{"id", "task", "difficulty", "question", "answer", "answer_type", "solutions"}`: prepare's own, and the user's.

The user's are written `[name=]format:source`, where the format is one of `FORMATS` and the source a local file or, if the name is not
one of those, a hub dataset id: `gsm8k:data/test.jsonl` or `gsm8k:openai/gsm8k`. The source of a format in `GENERATED` is what to make,
with settings after a question mark: `coin_flip:4?size=200&seed=1`.
"""
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prompts.answers import ANSWER_TYPES, extract
from reward import puzzles
from stages.data.benchmarks import BENCHMARKS, Format, fits
from stages.data.corpora import is_local, local_files, read_rows, source_rows
from stages.data.generated import MADE, make, settings

ROLES = ("system", "user", "assistant")
GENERATED = (*MADE, "reasoning_gym")  # their source is what to make


def read_problems(path: Path, tasks: Sequence[str] = (), difficulties: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Rows of these tasks and difficulties (empty: all), in the file's order. Raises ValueError naming those there are, and for a file
    that prepare did not make."""
    if not path.is_file():
        raise ValueError(f"{path} is not there: give prepare a number of {path.stem} problems in num_problems, or ask none of them "
                         "(probe_prompts: 0, and problems of your own)")
    rows = [row for _, row in read_rows(path)]
    kept = [r for r in rows if (not tasks or r["task"] in tasks) and (not difficulties or r["difficulty"] in difficulties)]
    if not rows:
        raise ValueError(f"{path} holds no problems")
    if not kept:
        raise ValueError(f"no problem of {path} has tasks {tasks} and difficulties {difficulties}: choose from tasks "
                         f"{sorted({r['task'] for r in rows})} and difficulties {sorted({r['difficulty'] for r in rows})}")
    return kept


def split_spec(spec: str) -> tuple[str, str, str]:
    """(name, format, source) of `[name=]format:source`; without a name the format's. Raises ValueError when it is not written so."""
    name, _, rest = spec.partition("=") if "=" in spec.partition(":")[0] else ("", "", spec)
    format, colon, source = rest.partition(":")
    if not colon or format not in (*FORMATS, *GENERATED):
        raise ValueError(f"{spec!r} is not format:source with a format of {', '.join((*FORMATS, *GENERATED))}, such as "
                         "gsm8k:data/test.jsonl")
    return name or format, format, source


def load_problems(spec: str, *, hub_split: str) -> list[dict[str, Any]]:
    """All rows of `[name=]format:source`, in order; `hub_split` is the split taken of a hub dataset, or made of a generated task.

    Of a benchmark whose test split has no published answers, "test" is its validation split. Rows of several files carry the file's name
    as "template". Raises ValueError for an unknown format, a source that cannot be read, a record without question or answer, an answer
    that is not of its type, or an id seen twice.
    """
    name, format, source = split_spec(spec)
    rows: dict[str, dict] = {}
    for position, (where, read) in enumerate(_read(format, source, hub_split)):
        row = {"id": f"{format}-{position}", "task": name, "difficulty": 0, "solutions": [], **read}
        _check(row, where)
        if rows.setdefault(row["id"], row) is not row:
            raise ValueError(f"{where}: id {row['id']!r} was there before; every problem needs an id of its own")
    return list(rows.values())


def _read(format: str, source: str, split: str) -> Iterator[tuple[str, dict]]:
    if format in GENERATED:
        yield from puzzles.make(*settings(source), split) if format == "reasoning_gym" else make(format, source, split)
        return
    kind = FORMATS[format]
    several = is_local(source) and len(local_files(source)) > 1
    hub_split = kind.test if split == "test" else split
    for where, record in source_rows(source, kind.hub_config, hub_split, streaming=False):
        try:
            row = kind.read(record)
        except KeyError as error:
            raise ValueError(f"{where}: no key {error}; it has {', '.join(map(str, record)) or 'none'}") from None
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        typed = {"answer_type": kind.answer_type} if kind.answer_type else {}
        yield where, {**typed, **({"template": Path(where.partition(", ")[0]).stem} if several else {}), **row}


def _check(row: dict, where: str) -> None:
    if not isinstance(row["question"], str) or not row["question"].strip():
        raise ValueError(f"{where}: the question is not a text")
    kind = row.get("answer_type")
    if kind is not None and kind not in ANSWER_TYPES:
        raise ValueError(f"{where}: answer_type is {kind!r}: choose from {', '.join(ANSWER_TYPES)}, or leave it out")
    if not fits(row["answer"], None):
        raise ValueError(f"{where}: no answer to compare with")
    if not fits(row["answer"], kind, row.get("num_choices")):
        raise ValueError(f"{where}: the answer {row['answer']!r:.40} is not of the type {kind}"
                         + (f" with {row['num_choices']} choices" if "num_choices" in row else ""))


def conversation(prompt: Any) -> list[dict[str, str]]:
    """The messages of a prompt: a text is one user turn. Raises ValueError for messages after which no assistant can speak."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"the prompt is {prompt!r:.60}: give a text, or a list of messages that ends with the user's")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"message {number} of the prompt is {message!r:.60}: give an object with role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"message {number} of the prompt has the role {message['role']!r}: use {', '.join(ROLES)}")
        if message["role"] == "system" and number > 1:
            raise ValueError(f"message {number} of the prompt is the system's: only the first can be")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError(f"message {number} of the prompt has the content {message['content']!r:.60}: give a text, or leave it out")
    if messages[-1]["role"] != "user":
        raise ValueError(f"the prompt ends with a turn of the {messages[-1]['role']}: end it with the user's, which the policy answers")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _problem(record: dict) -> dict:
    """The project's own rows; `solutions`, `difficulty` and `id` may be missing, and the answer may be in GSM8K's spelling.

    With a `prompt` in place of the question, a text or messages, the row keeps its messages, and the last turn is its question.
    """
    answer = str(record["answer"])
    asked: dict[str, Any] = {}
    if "prompt" in record:
        if "question" in record:
            raise ValueError("it has a question and a prompt: keep one, the question to be asked with a cue, the prompt as it is")
        asked = {"prompt": (messages := conversation(record["prompt"])), "question": messages[-1]["content"]}
    if record["answer"] is None:
        raise ValueError("the answer is null")
    kept = {key: record[key] for key in ("answer_type", "template") if record.get(key) is not None}
    typed = record.get("answer_type") in (None, "number")
    return {**(asked or {"question": record["question"]}), "answer": extract(answer) or answer if typed else answer,
            "solutions": record.get("solutions") or [], "difficulty": record.get("difficulty", 0), **kept,
            **({"id": str(record["id"])} if "id" in record else {})}


FORMATS: dict[str, Format] = BENCHMARKS | {"problems": Format(read=_problem, examples="arithmetic")}
