"""The preference record: a prompt, K responses, a ranking with ties, and who ranked it. Files in, files out, ids where there is text.

    {"id", "prompt": text | [messages], "responses": [text, ...], "ranks": [1, 1, 3], "annotator", "simulated", "criterion",
     "origin": {...}, "prompt_ids": [...], "response_ids": [[...], ...]}

`ranks`: 1 is best and equal numbers tie. Token ids are optional; where they are given, they are what is scored, because text
tokenised anew can split differently from what a model sampled.
"""
import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ROLES = {"Human": "user", "Assistant": "assistant"}  # the turns of hh-rlhf (Bai et al. 2022)
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def check(record: Record, where: str) -> Record:
    """The record itself. Raises ValueError that names `where` and the fault."""
    def fail(fault: str) -> ValueError:
        return ValueError(f"{where}: {fault}")

    for key in ("prompt", "responses", "ranks"):
        if record.get(key) is None or len(record[key]) == 0:
            raise fail(f"no {key!r}: a record has prompt, responses and ranks (it has {', '.join(record)})")
    prompt, responses, ranks = record["prompt"], record["responses"], record["ranks"]
    if not isinstance(prompt, str) and not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt):
        raise fail("prompt is neither text nor a list of messages with role and content")
    if not all(isinstance(r, str) for r in responses):
        raise fail("responses must be texts")
    if len(responses) < 2 or len(ranks) != len(responses):
        raise fail(f"{len(responses)} responses and {len(ranks)} ranks: give at least two responses and a rank for each")
    if not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranks):
        raise fail(f"ranks {ranks}: expected whole numbers from 1 (best); equal numbers tie")
    if (record.get("prompt_ids") is None) != (record.get("response_ids") is None):
        raise fail("prompt_ids and response_ids belong together: give both or neither")
    if record.get("response_ids") is not None and (len(record["response_ids"]) != len(responses)
                                                   or not all(len(ids) for ids in record["response_ids"])):
        raise fail(f"response_ids must hold a list of token ids, not empty, for each of the {len(responses)} responses")
    return record


def read(path: str | Path) -> tuple[list[Record], int]:
    """Records of a .jsonl, .jsonl.gz or .parquet file, and how many pairs were left out because their two prompts differ.

    Raises ValueError naming file and line for a row that is not JSON or not a preference.
    """
    return collect(rows(Path(path)), str(path))


def collect(places: Iterable[tuple[str, Record]], source: str) -> tuple[list[Record], int]:
    """Checked records of raw rows, each with the name of its place; rows with `chosen` and `rejected` are converted."""
    records, differing = [], 0
    for number, (where, row) in enumerate(places, start=1):
        record = from_pair(row, where)
        if record is None:
            differing += 1
        else:
            records.append({"id": f"{Path(source).name}:{number}", **check(record, where)})
    if not records:
        raise ValueError(f"{source} has no preferences")
    return records, differing


def existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist: give a .jsonl, .jsonl.gz or .parquet file of preferences")
    return Path(path)


def rows(path: Path) -> Iterator[tuple[str, Record]]:
    """Raw rows with the name of their place. Raises ValueError naming file and line."""
    existing(path)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        try:
            table = pq.read_table(path).to_pylist()
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not parquet: {str(error).splitlines()[0]}") from None
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(table, start=1))
        return
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as f:
            for number, line in enumerate(f, start=1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    text = line.decode("utf-8")
                    row = json.loads(text)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where} is not UTF-8 (byte {line[error.start]:#04x}): convert the file") from None
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where} is not JSON ({error.msg} at column {error.colno}): {text.strip()[:60]!r}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{where} is a {type(row).__name__}, expected an object")
                yield where, row
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not whole gzip after line {number}: {error}") from None


def from_pair(row: Record, where: str) -> Record | None:
    """A record from `chosen` and `rejected` (hh-rlhf's text, messages, or texts beside `prompt`); other rows pass as they are.

    None when the two dialogues differ before their last turn (five of 2,312 in harmless-base): they answer different prompts.
    """
    if "chosen" not in row or "rejected" not in row:
        return row
    sides = [row["chosen"], row["rejected"]]
    if isinstance(sides[0], str) and row.get("prompt") is not None:
        prompt, responses = row["prompt"], sides
    else:
        dialogues = [dialogue(side, where) if isinstance(side, str) else list(side) for side in sides]
        if any(not d or d[-1]["role"] != "assistant" for d in dialogues):
            raise ValueError(f"{where}: a dialogue does not end with the assistant's turn")
        prompt, responses = [d[:-1] for d in dialogues], [d[-1]["content"] for d in dialogues]
        if prompt[0] != prompt[1]:
            return None
        prompt = prompt[0]
    return {"prompt": prompt, "responses": list(responses), "ranks": [1, 2], "simulated": False,
            "annotator": row.get("annotator", "people"), "criterion": row.get("criterion", "overall")}


def dialogue(text: str, where: str) -> list[dict[str, str]]:
    """Messages of an hh-rlhf text, turns marked by a blank line and "Human:" or "Assistant:". Raises ValueError without turns."""
    marks = list(TURN.finditer(text))
    if not marks or text[:marks[0].start()].strip():
        raise ValueError(f"{where}: expected turns that begin with 'Human:' or 'Assistant:', got {text[:40]!r}")
    ends = [m.start() for m in marks[1:]] + [len(text)]
    return [{"role": ROLES[m[1]], "content": text[m.end():end].strip()} for m, end in zip(marks, ends, strict=True)]


def write(path: str | Path, records: Iterable[Record]) -> None:
    """Write .parquet or .jsonl by the name. Parquet wants one type a column: all prompts text, or all messages."""
    path, records = Path(path), list(records)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    else:
        raise ValueError(f"{path}: the name must end in .parquet or .jsonl")


def encode(record: Record, chat_ids: Callable[..., list[int]]) -> Record:
    """The record with token ids. `chat_ids(messages, ask=bool)` renders messages as ids; a text prompt is one user turn.

    Raises ValueError when the template renders a prompt differently once it is answered: then no response begins anywhere.
    """
    if record.get("response_ids") is not None:
        return record
    prompt = record["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    start = chat_ids(messages, ask=True)
    whole = [chat_ids([*messages, {"role": "assistant", "content": r}], ask=False) for r in record["responses"]]
    if any(ids[:len(start)] != start for ids in whole):
        raise ValueError("the chat template changes a prompt when an answer follows: its generation prompt must be a prefix")
    return {**record, "prompt_ids": start, "response_ids": [ids[len(start):] for ids in whole]}


def pairs(ranks: list[int]) -> list[tuple[int, int, int]]:
    """(better, worse, distance) of every two responses of different rank; distance counts distinct ranks ([1, 1, 3] -> 1)."""
    level = {rank: i for i, rank in enumerate(sorted(set(ranks)))}
    ordered = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2) if ranks[i] != ranks[j]]
    return [(i, j, level[ranks[j]] - level[ranks[i]]) for i, j in ordered]
