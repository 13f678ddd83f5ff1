"""Problems as rows `{"id", "task", "difficulty", "question", "answer", "solutions"}`: prepare's own, and the user's in four formats.

The user's are written `[name=]format:source`, where the format is one of `FORMATS` and the source a local file or, if the name is not
one of those, a hub dataset id: `gsm8k:data/test.jsonl` or `gsm8k:openai/gsm8k`.
"""
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prompts.answers import extract, normalize
from stages.data.corpora import read_rows, source_rows

ROLES = ("system", "user", "assistant")


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
    if not colon or format not in FORMATS:
        raise ValueError(f"{spec!r} is not format:source with a format of {', '.join(FORMATS)}, such as gsm8k:data/test.jsonl")
    return name or format, format, source


def load_problems(spec: str, *, hub_split: str) -> list[dict[str, Any]]:
    """All rows of `[name=]format:source`, in order; `hub_split` is the split taken of a hub dataset.

    Raises ValueError for an unknown format, a source that cannot be read, a record without question or answer, or an id seen twice.
    """
    name, format, source = split_spec(spec)
    rows: dict[str, dict] = {}
    for position, (where, record) in enumerate(source_rows(source, FORMATS[format][1], hub_split, streaming=False)):
        row = {"id": f"{format}-{position}", "task": name, "difficulty": 0, **_converted(FORMATS[format][0], record, where)}
        if rows.setdefault(row["id"], row) is not row:
            raise ValueError(f"{where}: id {row['id']!r} was there before; every problem needs an id of its own")
    return list(rows.values())


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
    return {**(asked or {"question": record["question"]}), "answer": extract(answer) or answer, "solutions": record.get("solutions") or [],
            "difficulty": record.get("difficulty", 0), **({"id": str(record["id"])} if "id" in record else {})}


# format: reader of one record, and the configuration of the dataset on the hub
FORMATS: dict[str, tuple[Callable[[dict], dict], str | None]] = {
    "gsm8k": (_gsm8k, "main"), "svamp": (_svamp, None), "aqua": (_aqua, "raw"), "problems": (_problem, None)}
