"""Tables of runs that somebody trained: csv or jsonl to arrays, each fault named with its line."""
import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read_columns(path: str | Path, columns: Mapping[str, str], *, where: Sequence[str] = (), without: Sequence[str] = (),
                 labels: Sequence[str] = (), skip_missing: bool = False) -> dict[str, np.ndarray]:
    """(n,) values of each of `columns` (what it is: its name in the file), floats but for those whose key is in `labels`.

    `where` keeps the rows with all of COLUMN=VALUE, `without` leaves out those with any of them. `skip_missing` leaves out rows with a
    column empty or not a number, and counts them under "skipped", beside the conditions of `without` that no row meets, "idle". Raises
    ValueError naming file and line.
    """
    path = Path(path)
    rows = _rows(path, columns)
    conditions = [(*text.partition("="), wanted) for wanted, texts in ((True, where), (False, without)) for text in texts]
    for text, equals, _, _ in conditions:
        if not equals:
            raise ValueError(f"{text!r} is no condition: give COLUMN=VALUE, for example mode=train")
    known = dict.fromkeys(name for _, row in rows for name in row)
    for name in (*columns.values(), *(column for column, *_ in conditions)):
        if name not in known:
            raise ValueError(f"{path} has no column {name!r}: it has {', '.join(known)}")
    found: list[list[Any]] = []
    skipped = 0
    for number, row in rows:
        if any((str(row.get(name)) == value) != wanted for name, _, value, wanted in conditions):
            continue
        try:
            found.append([row.get(name) if what in labels else _number(row.get(name), name) for what, name in columns.items()])
        except ValueError as error:
            if not skip_missing:
                raise ValueError(f"{path}, line {number}: {error}; remove the row, or select others with --where") from None
            skipped += 1
    if not found:
        raise ValueError(f"{path} has no usable rows" + (f" with {', '.join(where)}" if where else ""))
    table = {what: np.array([row[i] for row in found], dtype=None if what in labels else np.float64) for i, what in enumerate(columns)}
    idle = [f"{name}={value}" for name, _, value, wanted in conditions
            if not wanted and all(str(row.get(name)) != value for _, row in rows)]
    return table | ({"skipped": np.array(skipped), "idle": np.array(idle)} if skip_missing else {})


def _rows(path: Path, columns: Mapping[str, str]) -> list[tuple[int, dict[str, Any]]]:
    """Line number and row of each line."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give a csv or jsonl file of runs with the columns {', '.join(columns.values())}")
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: expected a .csv or .jsonl file of runs")
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as f:
        if path.suffix == ".csv":
            reader = csv.DictReader(f)
            rows = [(reader.line_num, row) for row in reader]
        else:
            for number, line in enumerate(f, start=1):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: expected an object with the columns {', '.join(columns.values())}")
                rows.append((number, row))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _number(value: Any, name: str) -> float:
    """Raises ValueError for what is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value}, not finite")
    return number
