"""The preference record: a prompt, K responses, a ranking with ties, and who ranked it. Files in, files out, ids where there is text.

    {"id", "prompt": text | [messages], "responses": [text, ...], "ranks": [1, 1, 3] | "skipped": reason,
     "annotator", "simulated", "criterion", "order": [2, 0, 1], "time": "2026-01-31T09:30:00+00:00", "seconds", "comment",
     "origin": {...}, "origins": [{...}, ...], "prompt_ids": [...], "response_ids": [[...], ...]}

`ranks`: 1 is best and equal numbers tie. A record that somebody skipped has a reason and no ranks: it is kept and counted, and
nothing is learned from it. `order` names the responses as they were shown, first to last; `origin` says what made all responses
(model, sampling), `origins` what made each. Token ids are optional; where they are given, they are what is scored, because text
tokenised anew can split differently from what a model sampled. A key that is null is a key that is not there.
"""
import datetime
import gzip
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from reward.converters import WHO, convert

Record = dict[str, Any]
KINDS = {"annotator": str, "criterion": str, "comment": str, "time": str, "simulated": bool, "origin": dict}
NOBODY = "unknown"  # the annotator of a ranking of which nothing says who made it
AS_JSON = {"plumbline": "json"}  # marks a Parquet column of JSON texts


def check(record: Record, where: str) -> Record:
    """The record itself. Raises ValueError that names `where` and the fault."""
    def fail(fault: str) -> ValueError:
        return ValueError(f"{where}: {fault}")

    record = {key: value for key, value in record.items() if value is not None}
    skipped = "skipped" in record
    for key in ("prompt", "responses", "skipped" if skipped else "ranks"):
        if not record.get(key):
            raise fail(f"no {key!r}: a record has prompt, responses and ranks or, instead of ranks, the reason why it was skipped "
                       f"(it has {', '.join(record)}); a list that is best first is named ranked")
    prompt, responses, ranks = record["prompt"], record["responses"], record.get("ranks")
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt)):
        raise fail("prompt is neither text nor a list of messages with role and content")
    if not (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip():
        raise fail("the prompt is empty text")
    if not isinstance(responses, list) or not all(isinstance(r, str) for r in responses):
        raise fail("responses must be texts")
    if skipped:
        if ranks is not None or not isinstance(record["skipped"], str):
            raise fail(f"skipped {record['skipped']!r} with ranks {ranks}: a skipped record has a reason and no ranks")
        if len(responses) < 2:
            raise fail(f"{len(responses)} responses: give at least two")
    elif not isinstance(ranks, list) or len(responses) < 2 or len(ranks) != len(responses):
        raise fail(f"{len(responses)} responses and {len(ranks) if isinstance(ranks, list) else ranks!r} ranks: give at least two "
                   "responses and a rank for each")
    elif not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranks):
        raise fail(f"ranks {ranks}: expected whole numbers from 1 (best); equal numbers tie")
    if (record.get("prompt_ids") is None) != (record.get("response_ids") is None):
        raise fail("prompt_ids and response_ids belong together: give both or neither")
    if record.get("response_ids") is not None and (len(record["response_ids"]) != len(responses)
                                                   or not all(len(ids) for ids in record["response_ids"])):
        raise fail(f"response_ids must hold a list of token ids, not empty, for each of the {len(responses)} responses")
    if record.get("response_ids") is None and not all(r.strip() for r in responses):
        raise fail("a response is empty text: only response_ids can say what such a response was")
    texts = [*responses, *([prompt] if isinstance(prompt, str) else [m["content"] for m in prompt])]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise fail(f"a text has half of a surrogate pair ({error.object[error.start]!r}), which is no character: mend the file") from None
    check_circumstances(record, fail)
    return record


def check_circumstances(record: Record, fail: Callable[[str], ValueError]) -> None:
    """Raises what `fail` makes of a fault in who ranked, when, how long and in which order."""
    for key, kind in KINDS.items():
        if key in record and not isinstance(record[key], kind):
            raise fail(f"{key} {record[key]!r}: expected {kind.__name__}")
    count, order, seconds = len(record["responses"]), record.get("order"), record.get("seconds")
    if order is not None and not (isinstance(order, list) and all(type(i) is int for i in order) and sorted(order) == list(range(count))):
        raise fail(f"order {order}: expected the numbers 0 to {count - 1} of the responses as they were shown, each once")
    if seconds is not None and (type(seconds) not in (int, float) or not math.isfinite(seconds) or seconds < 0):
        raise fail(f"seconds {seconds!r}: expected how long the ranking took")
    if "origins" in record and (not isinstance(record["origins"], list) or len(record["origins"]) != count):
        raise fail(f"origins must be a list of {count}, one for each response")
    if "time" in record:
        try:
            offset = datetime.datetime.fromisoformat(record["time"]).utcoffset()
        except ValueError:
            offset = None
        if offset != datetime.timedelta(0):
            raise fail(f"time {record['time']!r}: expected ISO 8601 in UTC, such as 2026-01-31T09:30:00+00:00")


def read(path: str | Path, *, skipped: bool = False) -> tuple[list[Record], Counter[str]]:
    """Records of a .jsonl, .jsonl.gz or .parquet file in any form that is known, and what was left out or assumed, counted by reason.

    Skipped records are left out, and counted, unless asked for. Raises ValueError naming file and line for a row that is not
    JSON or not a preference.
    """
    return collect(rows(Path(path)), str(path), skipped=skipped)


def collect(places: Iterable[tuple[str, Record]], source: str, *, skipped: bool = False) -> tuple[list[Record], Counter[str]]:
    """Checked records of raw rows, each with the name of its place, and the counts of converters.convert and of `skipped`.

    Raises ValueError as `read` does, and when one annotator ranked one id by one criterion twice.
    """
    counted: Counter[str] = Counter()
    records = list(checked(places, source, counted, skipped=skipped))
    if not records:
        raise ValueError(f"{source} has no preferences" + "".join(f"; {why}: {n}" for why, n in counted.items() if n))
    return records, +counted


def checked(places: Iterable[tuple[str, Record]], source: str, counted: Counter[str], *, skipped: bool = False) -> Iterator[Record]:
    """The records of `collect` one by one, so that a reader who has enough can stop: `counted` then tells of what was read."""
    first: dict[tuple[str, str, str], str] = {}
    for number, (where, row) in enumerate(places, start=1):
        converted = convert(row, where, counted)
        if converted is None:
            continue
        record = {"id": f"{Path(source).name}:{number}", **check(converted, where)}
        record["id"] = str(record["id"])
        key = json.dumps(record["id"]), record.get("annotator", NOBODY), record.get("criterion", "overall")
        if key in first:
            raise ValueError(f"{where}: id {record['id']!r} was ranked by {key[1]!r} already ({first[key]}): give another id to a "
                             "ranking that was repeated, or delete one")
        first[key] = where
        if "skipped" in record and not skipped:
            counted["skipped"] += 1
        else:
            yield record


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
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not parquet: {str(error).splitlines()[0]}") from None
        as_json = [field.name for field in table.schema if (field.metadata or {}).get(b"plumbline") == b"json"]
        for number, row in enumerate(table.to_pylist(), start=1):
            yield f"{path}, row {number}", row | {key: json.loads(row[key]) for key in as_json if row[key] is not None}
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


def write(path: str | Path, records: Iterable[Record]) -> None:
    """Write .parquet or .jsonl by the name; `read` gives the same records back, a key that is null aside.

    Parquet wants one type a column. A column whose values would come back otherwise (prompts as text and as messages, objects
    of different keys) is written as JSON texts and marked so in the schema.
    """
    path, records = Path(path), [{k: v for k, v in r.items() if v is not None} for r in records]
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq
        fields, columns = [], []
        for key in dict.fromkeys(key for r in records for key in r):
            values = [r.get(key) for r in records]
            try:
                column = pa.array(values)
                exact = canonical(column.to_pylist()) == canonical(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                exact = False
            if not exact:
                column = pa.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in values], pa.string())
            columns.append(column)
            fields.append(pa.field(key, column.type, metadata=None if exact else AS_JSON))
        pq.write_table(pa.Table.from_arrays(columns, schema=pa.schema(fields)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8", newline="\n")
    else:
        raise ValueError(f"{path}: the name must end in .parquet or .jsonl")


def canonical(value: Any) -> str:
    """Text that is equal only for equal values of equal types: 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True)


def trl_pairs(records: Iterable[Record]) -> list[Record]:
    """Rows of TRL's preference format, {"prompt", "chosen", "rejected"}: a pair for any two responses of different rank.

    A text prompt gives texts (TRL's standard form), messages give messages (its conversational form, the prompt beside).
    Ties and skipped records give none. Who ranked goes along, and `read` takes such rows back.
    """
    return [{"id": f"{record['id']}/{better}>{worse}", "prompt": record["prompt"], **{
                side: text if isinstance(record["prompt"], str) else [{"role": "assistant", "content": text}]
                for side, text in (("chosen", record["responses"][better]), ("rejected", record["responses"][worse]))},
             **{key: record[key] for key in WHO if record.get(key) is not None}}
            for record in records if record.get("ranks") for better, worse, _ in pairs(record["ranks"])]


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
