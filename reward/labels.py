"""What people say of responses, on disk and in turn: the items they rank, the file of labels, and whose turn which prompt is.

    {"id", "prompt", "responses", "ranks": [1, 1, 3] | "skipped": "why", "annotator", "simulated": false, "criterion", "order": [2, 0, 1],
     "time": "2026-11-24T03:44:58Z", "seconds": 21.4, "comment", "origin", "prompt_ids", "response_ids"}

A label is a preference record (reward/preferences.py) with keys beside it. `ranks` follow `responses`, not what was shown; `order` is
what was shown: response `order[0]` stood first. The last label of an annotator, prompt and criterion counts; those before it stay in the
file.
"""
import fcntl
import hashlib
import json
import os
import random
import statistics as stats
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reward import agreement, preferences
from reward.calibration import Accuracy
from reward.converters import convert
from reward.preferences import Record

Key = tuple[str, str]  # id of the prompt, criterion
AGREEMENT_S = 30.0  # so often at most is agreement counted anew: nobody is to wait for it at every prompt
HOLD_S = 3600.0  # a prompt that somebody opened and left alone for so long is given to the next who asks
ITEM_KEYS = ("id", "prompt", "responses", "origin", "origins", "prompt_ids", "response_ids")
LABEL_KEYS = {"id", "annotator", "criterion", "responses", "order"}
MAX_COMMENT, MAX_NAME = 10_000, 60


class RefusedError(ValueError):
    """A label that cannot be taken as it is; the page keeps what the annotator has chosen."""


class OutdatedError(RefusedError):
    """A label of a prompt that is no longer this annotator's to rank; the page shows the next one."""


def read_items(path: str | Path) -> list[Record]:
    """Prompts with K >= 2 responses each, of a .jsonl, .jsonl.gz or .parquet file; ranks of a preference file are ignored.

    A row without `id` is named after its file and place. Raises ValueError naming file and line for what nobody could rank.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist: give --items a .jsonl, .jsonl.gz or .parquet file of prompts with responses")
    items: list[Record] = []
    places: dict[str, str] = {}
    seen: dict[str, Record] = {}
    for number, (where, row) in enumerate(preferences.rows(Path(path)), start=1):
        left_out: Counter[str] = Counter()
        record = convert(row, where, left_out)
        if record is None:
            raise ValueError(f"{where}: nothing to rank ({', '.join(left_out)}): leave the row out")
        item = checked_item({"id": row.get("id") or f"{Path(path).name}:{number}", **record}, where)
        if seen.setdefault(item["id"], item) == item and item["id"] in places and "annotator" in row:
            continue  # one prompt of a preference file, ranked by several: it is asked once
        if item["id"] in places:
            raise ValueError(f"{where}: id {item['id']!r} is that of {places[item['id']]} too: give each prompt an id of its own")
        places[item["id"]] = where
        items.append(item)
    if not items:
        raise ValueError(f"{path} has no prompts")
    return items


def checked_item(row: Record, where: str) -> Record:
    """The keys of a row that a label keeps. Raises ValueError that names `where` and the fault."""
    responses = row.get("responses") or []
    if len(responses) < 2:
        raise ValueError(f"{where}: {len(responses)} responses: a ranking needs two or more")
    row = {key: row[key] for key in ITEM_KEYS if row.get(key) is not None}
    preferences.check({**row, "ranks": [1] * len(responses)}, where)
    if not all(r.strip() for r in responses):  # with token ids a record may have such a response; nobody could rank it
        raise ValueError(f"{where}: a response is empty text: leave the row out")
    return row | {"id": str(row["id"])}


def shown_order(annotator: str, item_id: str, num_responses: int) -> list[int]:
    """The order in which this annotator sees the responses, the same each time: position -> index into `responses`."""
    order = list(range(num_responses))
    random.Random(f"{annotator}\0{item_id}").shuffle(order)
    return order


def ranks_of(groups: Any, order: Sequence[int]) -> list[int]:
    """Ranks of the responses from positions on the page, best group first: [[1], [0, 2]] in order [2, 0, 1] -> [1, 2, 2].

    Ranks count as in sport (1, 1, 3). Raises RefusedError unless each of the K positions 0..K-1 is named exactly once.
    """
    if not isinstance(groups, list) or not all(isinstance(g, list) for g in groups):
        raise RefusedError("the ranking is no list of groups")
    ranks = [0] * len(order)
    place = 1
    for group in groups:
        for position in group:
            if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < len(order):
                raise RefusedError(f"there is no response {position!r}: {len(order)} are shown")
            if ranks[order[position]]:
                raise RefusedError(f"response {position + 1} is ranked twice")
            ranks[order[position]] = place
        place += len(group)
    missing = [str(position + 1) for position, index in enumerate(order) if not ranks[index]]
    if missing:
        raise RefusedError("nothing is ranked yet: choose the best response first" if len(missing) == len(order)
                           else f"no rank yet: response {', '.join(missing)}")
    return ranks


def read_labels(path: str | Path) -> tuple[list[Record], int, bytes]:
    """Labels of a file, the bytes that hold them, and what follows them: a last line that power loss tore, else nothing.

    Raises ValueError naming the line of anything else that is not a label.
    """
    labels: list[Record] = []
    content = Path(path).read_bytes()
    lines, end = content.splitlines(keepends=True), 0
    for number, line in enumerate(lines, start=1):
        try:
            label = json.loads(line.decode("utf-8"))
        except ValueError:
            if number == len(lines):
                return labels, end, line
            raise ValueError(f"{path}, line {number} is not JSON: {line[:60]!r}") from None
        if not isinstance(label, dict) or not set(label) >= LABEL_KEYS or not {"ranks", "skipped"} & set(label):
            raise ValueError(f"{path}, line {number} is not a label: expected {', '.join(sorted(LABEL_KEYS))}, and ranks or skipped")
        labels.append(label)
        end += len(line)
    return labels, end, b""


class LabelFile:
    """Labels as lines of JSON, each on the disk before `append` returns. One program a file.

    A last line torn by power loss is moved to `<name>.torn`; `torn` says how many bytes. Raises ValueError when another
    program writes to the file, or when it holds something else than labels.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.parent.is_dir() or self.path.is_dir():
            raise ValueError(f"{path}: give --out a file in a folder that exists")
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.labels, end, torn = read_labels(self.path)
        except BlockingIOError:
            os.close(self.file)
            raise ValueError(f"{path} is being written by another program: stop it, or give another --out") from None
        except ValueError:
            os.close(self.file)
            raise
        self.torn = len(torn)
        if torn:
            with self.aside.open("ab") as f:
                f.write(torn.rstrip(b"\n") + b"\n")
                f.flush()
                os.fsync(f.fileno())
            os.ftruncate(self.file, end)
        elif end and os.pread(self.file, 1, end - 1) != b"\n":
            os.write(self.file, b"\n")  # a whole label whose line end was lost
        os.fsync(self.file)
        folder = os.open(self.path.parent, os.O_RDONLY)  # a new name is durable only when its folder is
        os.fsync(folder)
        os.close(folder)

    @property
    def aside(self) -> Path:
        return self.path.with_name(self.path.name + ".torn")

    def append(self, label: Record) -> None:
        """Write one line and wait for the disk. On OSError (disk full) the file is as before. Callers hold a lock."""
        line = memoryview(json.dumps(label).encode("ascii") + b"\n")
        end = os.fstat(self.file).st_size
        try:
            while line:
                line = line[os.write(self.file, line):]
            os.fsync(self.file)
        except OSError:
            os.ftruncate(self.file, end)
            raise
        self.labels.append(label)

    def close(self) -> None:
        os.close(self.file)


def last_labels(labels: Iterable[Record]) -> list[Record]:
    """The last label of each annotator, prompt and criterion: what undo replaced is left out."""
    last: dict[tuple[str, str, str], Record] = {}
    for label in labels:
        key = (label["annotator"], label["id"], label["criterion"])
        last.pop(key, None)
        last[key] = label
    return list(last.values())


def export(source: str | Path, out: str | Path, criteria: Sequence[str] = ()) -> str:
    """Write the labels that count as preference records (.jsonl or .parquet), and return what was written and left out.

    `criteria` keeps only these. Raises ValueError without a single ranking, or for a file that is no label file.
    """
    if not Path(source).is_file():
        raise ValueError(f"{source} does not exist: give --out the file that the page wrote")
    if Path(out).exists() and Path(out).samefile(source):
        raise ValueError(f"{out} is the file of labels itself: give --export another name")
    labels, _, torn = read_labels(source)
    last = last_labels(labels)
    asked = [label for label in last if not criteria or label["criterion"] in criteria]
    ranked = [preferences.check(label, f"{source}, prompt {label['id']!r}") for label in asked if "ranks" in label]
    if not ranked:
        raise ValueError(f"{source} has no ranking to export ({len(asked)} skipped)")
    part = Path(out).with_name(f".part.{Path(out).name}")
    try:
        preferences.write(part, ranked)
    except Exception:
        part.unlink(missing_ok=True)
        raise
    part.replace(out)
    left = [f"{len(asked) - len(ranked)} skipped", f"{len(labels) - len(last)} replaced later"]
    left += [f"{len(last) - len(asked)} of other criteria"] if criteria else []
    left += ["1 torn line"] if torn else []
    by = len({label["annotator"] for label in ranked})
    return f"{out}: {len(ranked):,} rankings by {by} annotator{'s' * (by > 1)}; left out: {', '.join(left)}"


def median_seconds(labels: Iterable[Record]) -> float | None:
    times = [label["seconds"] for label in labels if label.get("seconds") is not None]
    return stats.median(times) if times else None


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def statistics(labels: Sequence[Record]) -> list[tuple[str, str]]:
    """What the page tells everybody: (name, figure) a line, of the labels that count (`last_labels`)."""
    lines = []
    by: dict[str, list[Record]] = {}
    for label in labels:
        by.setdefault(label["annotator"], []).append(label)
    for annotator, own in sorted(by.items()):
        skipped = sum("skipped" in label for label in own)
        median = median_seconds(own)
        pace = f", {median:.0f} s each (median)" if median is not None else ""
        lines.append((annotator, f"{len(own) - skipped} ranked, {skipped} skipped{pace}"))
    return lines


def agreement_lines(labels: Sequence[Record]) -> list[tuple[str, str]]:
    """How far the annotators agree, over all, each against the others and over time: (name, figure with interval) a line."""
    compared = agreement.comparisons(labels)
    found: dict[str, agreement.Alpha | Accuracy | None] = {
        "Krippendorff's alpha": agreement.ranking_alpha(labels, samples=200), "pairs ordered alike": agreement.pairwise_agreement(compared)}
    each = agreement.agreement_by_annotator(compared)
    if len(each) > 2:
        found |= {f"{name} with the others": figure for name, figure in each.items()}
    windows = agreement.agreement_over_time(compared)
    if len(windows) > 1:
        found |= {f"part {k} of {len(windows)}, to {w.end:%d %b %H:%M} UTC": w.agreement for k, w in enumerate(windows, 1)}
    return [(name, f"{f.value:.2f} [{f.low:.2f}, {f.high:.2f}], {f.num_prompts} prompts") for name, f in found.items() if f]


class Queue:
    """Whose turn which prompt is. All of it but who has which prompt open comes from the file of labels, so it outlives the program.

    A share `overlap` of the prompts (to the nearest whole one, chosen by hash of the id) is given to every annotator, each other
    prompt to the first who comes. A prompt that its annotator skipped stays that annotator's. `clock` gives seconds.
    """

    def __init__(self, items: Sequence[Record], file: LabelFile, criteria: Sequence[str] = ("overall",), overlap: float = 0.0,
                 clock: Callable[[], float] = time.monotonic):
        if not 0 <= overlap <= 1:
            raise ValueError(f"overlap {overlap}: expected a share of the prompts, 0 to 1")
        if not criteria or len(set(criteria)) != len(criteria) or not all(c.strip() for c in criteria):
            raise ValueError(f"criteria {list(criteria)}: expected different names")
        self.items = {item["id"]: item for item in items}
        self.criteria, self.file, self.clock = tuple(criteria), file, clock
        by_hash = sorted(self.items, key=lambda i: hashlib.sha256(i.encode()).digest())
        self.shared = set(by_hash[:round(overlap * len(by_hash))])
        self.lock = threading.RLock()
        self.done: dict[str, dict[Key, Record]] = {}  # the last label of each, by annotator, in order of time
        self.owner: dict[str, str] = {}  # who ranked or skipped first, of prompts that are not shared
        self.open: dict[str, tuple[str, float]] = {}  # annotator -> the prompt on the page, and when it was last asked for
        self.reopened: dict[str, Key] = {}
        self.since: dict[tuple[str, Key], float] = {}
        self.agreed: tuple[float, list[tuple[str, str]]] | None = None
        for label in file.labels:
            item = self.items.get(label["id"])
            if item is not None and item["responses"] != label["responses"]:
                raise ValueError(f"{file.path} has labels of other responses to prompt {label['id']!r}: give these items another --out")
            self.count(label)

    def agreement(self) -> list[tuple[str, str]]:
        """`agreement_lines` of the labels that count, at most half a minute old."""
        with self.lock:
            if self.agreed is None or self.clock() - self.agreed[0] > AGREEMENT_S:
                self.agreed = self.clock(), agreement_lines(self.counted())
            return self.agreed[1]

    def count(self, label: Record) -> None:
        own = self.done.setdefault(label["annotator"], {})
        key = (label["id"], label["criterion"])
        own.pop(key, None)
        own[key] = label
        if label["id"] not in self.shared:
            self.owner.setdefault(label["id"], label["annotator"])

    def known_name(self, name: Any) -> str:
        """The annotator's name as it was first written. Raises RefusedError for what cannot be a name."""
        name = " ".join(name.split()) if isinstance(name, str) else ""
        if not name or len(name) > MAX_NAME or not name.isprintable():
            raise RefusedError(f"give your name, one line of at most {MAX_NAME} characters")
        if name.casefold().startswith("simulated"):
            raise RefusedError("names that begin with 'simulated' are those of programs: give your own")
        with self.lock:
            return next((known for known in (*self.done, *self.open) if known.casefold() == name.casefold()), name)

    def free(self, item_id: str, annotator: str) -> bool:
        """Whether this annotator may rank this prompt now."""
        if item_id in self.shared:
            return True
        if item_id in self.owner:
            return self.owner[item_id] == annotator
        return not any(who != annotator and opened == item_id and self.clock() - asked < HOLD_S
                       for who, (opened, asked) in self.open.items())

    def todo(self, item_id: str, annotator: str) -> list[Key]:
        own = self.done.get(annotator, {})
        return [(item_id, c) for c in self.criteria if (item_id, c) not in own]

    def current(self, annotator: str) -> Key | None:
        """The prompt and criterion that the annotator is asked for now, None when nothing is left. The same until it is labelled."""
        with self.lock:
            if annotator in self.reopened:
                return self.since_now(annotator, self.reopened[annotator])
            opened = self.open.get(annotator)
            for item_id in ([opened[0]] if opened else []) + list(self.items):
                keys = self.todo(item_id, annotator)
                if keys and self.free(item_id, annotator):
                    for who in [w for w, (i, _) in self.open.items() if i == item_id and w != annotator and item_id not in self.shared]:
                        del self.open[who]  # left alone for longer than HOLD_S
                    self.open[annotator] = (item_id, self.clock())
                    return self.since_now(annotator, keys[0])
            self.open.pop(annotator, None)
            return None

    def since_now(self, annotator: str, key: Key) -> Key:
        self.since.setdefault((annotator, key), self.clock())
        return key

    def order(self, annotator: str, item_id: str) -> list[int]:
        return shown_order(annotator, item_id, len(self.items[item_id]["responses"]))

    def version(self, annotator: str, item_id: str) -> str:
        """A digest of what is shown: a page opened before the items were changed cannot label the new ones."""
        item, order = self.items[item_id], self.order(annotator, item_id)
        return hashlib.sha256(json.dumps([item["prompt"], item["responses"], order]).encode()).hexdigest()[:16]

    def submit(self, annotator: str, answer: Record) -> Record:
        """Check one answer of the page, write it to the disk, and count it; returns the label.

        `answer`: {"id", "criterion", "version", "replace"?, "comment"?, and "groups": positions, best first, or "skip": why}.
        Raises RefusedError for an answer that is not whole, OutdatedError for a prompt that is not this annotator's now, OSError when
        the disk did not take it; in each case nothing is counted.
        """
        with self.lock:
            item_id, criterion = str(answer.get("id")), str(answer.get("criterion"))
            if item_id not in self.items or criterion not in self.criteria:
                raise OutdatedError("this prompt is no longer asked for")
            if answer.get("version") != self.version(annotator, item_id):
                raise OutdatedError("this prompt was changed since the page showed it: nothing was saved")
            if (item_id, criterion) in self.done.get(annotator, {}) and answer.get("replace") is not True:
                raise OutdatedError("this prompt has your label already; Undo goes back to it")
            if not self.free(item_id, annotator):
                raise OutdatedError("this prompt went to somebody else, because it was open for long: nothing was saved")
            item = self.items[item_id]
            order = self.order(annotator, item_id)
            comment = answer.get("comment") or ""
            if not isinstance(comment, str) or len(comment) > MAX_COMMENT:
                raise RefusedError(f"the comment is longer than {MAX_COMMENT:,} characters")
            verdict: Record
            if "skip" in answer:
                if not isinstance(answer["skip"], str) or not answer["skip"].strip():
                    raise RefusedError("say why you skip this prompt")
                verdict = {"skipped": storable(answer["skip"])[:MAX_COMMENT]}
            else:
                verdict = {"ranks": ranks_of(answer.get("groups"), order)}
            started = self.since.get((annotator, (item_id, criterion)))  # none when the program was started anew under an open page
            label = {**item, **verdict, "annotator": annotator, "simulated": False, "criterion": criterion, "order": order,
                     "time": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
                     "seconds": None if started is None else round(self.clock() - started, 1), "comment": storable(comment)}
            self.file.append(label)
            self.count(label)
            self.reopened.pop(annotator, None)
            self.since.pop((annotator, (item_id, criterion)), None)
            return label

    def undo(self, annotator: str) -> None:
        """Go back one label, then the one before. The file changes only when it is labelled anew. Raises RefusedError at the first."""
        with self.lock:
            keys = [k for k in self.done.get(annotator, {}) if k[0] in self.items and k[1] in self.criteria]
            if annotator in self.reopened:
                keys = keys[:keys.index(self.reopened[annotator])]
            if not keys:
                raise RefusedError("there is no label before this one")
            self.reopened[annotator] = keys[-1]
            self.since[annotator, keys[-1]] = self.clock()

    def keep(self, annotator: str) -> None:
        """Leave the label that undo went back to as it is."""
        with self.lock:
            self.reopened.pop(annotator, None)

    def progress(self, annotator: str) -> tuple[int, int, float | None]:
        """(labels given, labels left, seconds left) of one annotator. What nobody has taken is divided by those at work now.

        Seconds are from the annotator's own median, None before the first label.
        """
        with self.lock:
            own = self.done.get(annotator, {})
            done = sum(k[0] in self.items and k[1] in self.criteria for k in own)
            opened = {i for i, asked in self.open.values() if self.clock() - asked < HOLD_S}
            mine = self.open.get(annotator, ("", 0.0))[0]
            bound = pool = 0
            for item_id in self.items:
                left = len(self.todo(item_id, annotator))
                if item_id in self.shared or self.owner.get(item_id) == annotator or item_id == mine:
                    bound += left
                elif item_id not in self.owner and item_id not in opened:
                    pool += left
            at_work = max(1, sum(self.clock() - asked < HOLD_S for _, asked in self.open.values()))
            left = bound + -(-pool // at_work)
            median = median_seconds(own.values())
            return done, left, None if median is None else median * left

    def counted(self) -> list[Record]:
        """The labels that count, of all annotators."""
        with self.lock:
            return [label for own in self.done.values() for label in own.values()]


def storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8").strip()
