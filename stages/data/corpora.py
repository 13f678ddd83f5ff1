"""Documents from the embedded curriculum, local files or a hub dataset, one after the other."""
import codecs
import csv
import functools
import glob
import gzip
import io
import itertools
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from stages.data import curriculum
from stages.run.console import progress
from stages.run.manifest import hash_data, hash_path

TABLE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".tsv")
LOCAL_SUFFIXES = (".txt", ".md", *TABLE_SUFFIXES)
PIECE = 1 << 20  # bytes read at a time


def is_local(source: str) -> bool:
    return source.endswith(LOCAL_SUFFIXES) or Path(source).exists() or bool(glob.glob(source))


def local_files(source: str) -> list[Path]:
    """Files of a path, folder or glob. Raises ValueError when there are none, or when one that is named cannot be read."""
    path = Path(source)
    found = sorted(p for p in path.rglob("*") if p.name.endswith(LOCAL_SUFFIXES)) if path.is_dir() else \
        sorted(p for p in map(Path, glob.glob(source, recursive=True)) if p.is_file())
    if not found:
        raise ValueError(f"{source}: no such file, and no {', '.join(LOCAL_SUFFIXES)} in it if it is a folder")
    for path in found:
        if not path.name.endswith(LOCAL_SUFFIXES):
            raise ValueError(f"{path}: cannot tell what it holds by its name: give {', '.join(LOCAL_SUFFIXES)}")
    return found


def hash_files(source: str) -> str:
    """Content hash of what a path, folder or glob yields. Raises ValueError as `local_files` does."""
    files = local_files(source)
    return hash_path(files[0]) if len(files) == 1 else hash_data({str(file): hash_path(file) for file in files})


def hash_inputs(sources: Iterable[str]) -> dict[str, str | None]:
    """What each source but the curriculum holds, for the run's fingerprint: content hash of local files, revision of a hub dataset.

    None for a hub dataset when the hub cannot be asked.
    """
    return {source: hash_files(source) if is_local(source) else known_revision(source) for source in sources if source != "curriculum"}


def known_revision(source: str, repo_type: str = "dataset") -> str | None:
    try:
        return hub_revision(source, repo_type)
    except ValueError:
        return None


@functools.cache  # what is recorded is then what is read, also when the hub changes in between
def hub_revision(source: str, repo_type: str = "dataset") -> str:
    """The commit that a hub dataset or model stands at. Raises ValueError when the hub cannot be asked or does not have it."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        raise ValueError(f"{source} is neither a local file nor reachable: HF_HUB_OFFLINE=1 is set; give a path that exists")
    from huggingface_hub import HfApi

    try:
        return str(HfApi().repo_info(source, repo_type=repo_type, timeout=20).sha)
    except Exception as error:  # of whichever HTTP library the client uses
        raise ValueError(f"{source} is neither a local file nor reachable on the hub ({error}): give a path that exists") from error


def hub_rows(source: str, hub_config: str | None, hub_split: str, *, streaming: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a hub dataset, at the revision that is recorded, with where each came from.

    Without `streaming` the dataset is kept on this machine, and read from there when the hub is out of reach.
    Raises ValueError when it cannot be had.
    """
    revision = hub_revision(source) if streaming else known_revision(source)
    import datasets

    try:
        rows = datasets.load_dataset(source, hub_config, split=hub_split, streaming=streaming, revision=revision)
        for number, row in enumerate(rows):
            yield f"{source}, row {number}", row
    except Exception as error:  # the hub's clients raise what they like
        raise ValueError(f"loading {source} (configuration {hub_config}, split {hub_split}) from the hub failed: {error}") from error


def text_pieces(path: Path, *, decode_errors: str = "strict", advance: Callable[[int], object] = lambda size: None) -> Iterator[str]:
    """A UTF-8 file, gzipped or not, piece by piece; `advance` is told the bytes of the file that each took.

    Raises ValueError naming the byte offset when it is not text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(decode_errors)
    read = start = 0  # bytes read of the file; where what the decoder looks at begins
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            at = 0
            while data := file.read(PIECE):
                advance(raw.tell() - at)
                at = raw.tell()
                if not read and b"\0" in data:
                    raise ValueError(f"{path} is binary (it has a zero byte at offset {data.index(0)}): give text, jsonl or parquet files")
                start = read - len(decoder.getstate()[0])
                read += len(data)
                yield decoder.decode(data)
            start = read - len(decoder.getstate()[0])
            yield decoder.decode(b"", final=True)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.object[error.start]:#04x} at offset {start + error.start} is not UTF-8: convert the file "
                         "(iconv -t UTF-8) or set decode_errors: replace") from None


def read_text(path: Path, *, decode_errors: str = "strict") -> str:
    """A UTF-8 file as one text. Raises ValueError as `text_pieces` does."""
    return "".join(text_pieces(path, decode_errors=decode_errors))


def cut(pieces: Iterable[str], limit: int) -> Iterator[str]:
    """A long text as documents of at most about `limit` characters, cut at blank lines (at lines where there are none).

    `pieces` are the text in order, however it is divided. Memory holds a document and a piece; only a line of more than `PIECE` and
    `limit` characters is cut inside.
    """
    held = ""
    for block, joint in _blocks(pieces, limit):
        if held and len(held) + len(block) > limit:
            yield held
            held = ""
        held += (joint if held else "") + block
    if held:
        yield held


def _blocks(pieces: Iterable[str], limit: int) -> Iterator[tuple[str, str]]:
    """What stands between blank lines, or its lines where that is longer than `limit`, each with what joins it to the one before."""
    rest, inside = "", False  # inside: the first lines of a long block are out already
    for piece in itertools.chain(pieces, [None]):
        if piece is not None:
            rest += piece
        body = rest if piece is None else rest.rstrip("\n")  # more newlines may follow
        *whole, last = re.split("\n\n+", body)
        whole = [f"{block}\n" for block in whole]
        for block in whole if piece is not None else [*whole, last]:
            lines = block.splitlines(keepends=True) if inside or len(block) > limit else [block]
            joint = "\n" if len(lines) == 1 and not inside else ""
            yield from ((line, joint) for line in lines)
            inside = False
        if piece is None:
            return
        rest = last + rest[len(body):][:2]  # a longer run says no more
        if len(last) > max(limit, PIECE):
            at = last.rfind("\n") + 1 or len(last)  # whole lines; of one line all there is
            yield from ((line, "") for line in rest[:at].splitlines(keepends=True))
            rest, inside = rest[at:], True


def lines_of(pieces: Iterable[str]) -> Iterator[str]:
    rest = ""
    for piece in pieces:
        *whole, rest = (rest + piece).split("\n")
        yield from whole
    yield rest


def read_rows(path: str | Path, *, decode_errors: str = "strict", advance: Callable[[int], object] = lambda size: None,
              ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file with where each came from: parquet, csv and tsv by their names, all else JSON, as one list or a row a line.

    jsonl and parquet files may be larger than memory; json, csv and tsv files are read whole.
    Raises ValueError naming file and row for what is not a row.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        rows = _parquet_rows(path, advance)
    elif path.suffix in (".txt", ".md"):
        raise ValueError(f"{path} has no rows with columns: give {', '.join(TABLE_SUFFIXES)}")
    else:
        pieces = text_pieces(path, decode_errors=decode_errors, advance=advance)
        begin = next(pieces).removeprefix("\ufeff")  # the mark that Windows programs put first
        if path.name.endswith((".jsonl", ".jsonl.gz")) and not begin.lstrip().startswith("["):
            for where, row in _line_rows(lines_of(itertools.chain([begin], pieces)), path):
                yield where, _checked(row, where)
            return
        text = begin + "".join(pieces)
        if path.suffix in (".csv", ".tsv"):
            yield from _table_rows(text, path)
            return
        is_object = path.suffix == ".json" and text.lstrip().startswith("{")
        rows = _list_rows(text, path) if text.lstrip().startswith("[") else _object_rows(text, path) if is_object else \
            _line_rows(text.split("\n"), path)
    for where, row in rows:
        yield where, _checked(row, where)


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(row).__name__}")
    return row


def source_rows(source: str, hub_config: str | None, hub_split: str, *, streaming: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file, folder or glob or, if the name is none of these, of a hub dataset. Raises ValueError as those readers do."""
    if is_local(source):
        for path in local_files(source):
            yield from read_rows(path)
    else:
        yield from hub_rows(source, hub_config, hub_split, streaming=streaming)


def _parquet_rows(path: Path, advance: Callable[[int], object]) -> Iterator[tuple[str, Any]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file, number = pyarrow.parquet.ParquetFile(path), itertools.count()
        for batch in file.iter_batches(1024):
            advance(path.stat().st_size * len(batch) // file.metadata.num_rows)
            for row in batch.to_pylist():
                yield f"{path}, row {next(number)}", row
    except pyarrow.lib.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None


def _table_rows(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)  # the module's own limit, 128 KiB a cell, is less than a long document
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    header: list[str] = []
    begins = 1  # a quoted cell may run over several lines
    try:
        for cells in reader:
            if not header:
                header = cells
                if len(set(header)) < len(header) or "" in header:
                    raise ValueError(f"{path}, line {begins}: columns need names, each its own: got {', '.join(header)}")
            elif cells and len(cells) != len(header):
                raise ValueError(f"{path}, line {begins} has {len(cells)} cells, but the header names {len(header)}: {', '.join(header)}")
            elif cells:
                yield f"{path}, line {begins}", dict(zip(header, cells, strict=True))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {begins} is not {path.suffix[1:]} ({error}): put cells with quotes in \", each doubled") from None


def _list_rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        for number, row in enumerate(json.loads(text)):
            yield f"{path}, row {number}", row
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is not JSON ({error.msg})") from None


def _object_rows(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """BIG-bench's form: one object with its rows under "examples", and a `task_prefix` for all. Else lines, as in AQuA's .json files."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().partition("\n")[0].strip() == "{":  # one object over many lines
            raise ValueError(f"{path}, line {error.lineno} is not JSON ({error.msg})") from None
        whole = {}
    if not isinstance(whole.get("examples"), list):
        yield from _line_rows(text.split("\n"), path)
        return
    shared = {"task_prefix": whole["task_prefix"]} if "task_prefix" in whole else {}
    for number, row in enumerate(whole["examples"]):
        yield f"{path}, example {number}", {**shared, **row} if isinstance(row, dict) else row


def _line_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error.msg} at column {error.colno}): {line[:60]!r}") from None


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    if not isinstance(row.get(column), str):
        raise ValueError(f"{where} has no text in column {column!r}: it has {', '.join(row)}; set text_column")
    return row[column]


def read_documents(source: str, *, seed: int, num_documents: int, num_easy_documents: int = 0, text_column: str = "text",
                   hub_config: str | None = None, hub_split: str = "train", document_chars: int = 4000,
                   decode_errors: str = "strict") -> Iterator[dict[str, str]]:
    """`{"text", "kind", "phase"}` of one source: `curriculum`, a local path or glob, or a hub dataset id.

    `num_documents` bounds curriculum and hub sources (0: all of a hub dataset). Plain text is cut into documents of
    `document_chars`. Raises ValueError naming file and row for anything that cannot be read.
    """
    if source == "curriculum":
        for phase, count in (("easy", num_easy_documents), ("main", num_documents)):
            for document in progress(itertools.islice(curriculum.documents(seed, phase=phase), count), f"reading {source}", total=count):
                yield {**document, "phase": phase}
    elif is_local(source):
        files = local_files(source)
        bar: Any = progress([], f"reading {source}", total=sum(path.stat().st_size for path in files), unit="B")
        with bar:
            for path in files:
                if path.suffix in (".txt", ".md"):
                    for text in cut(text_pieces(path, decode_errors=decode_errors, advance=bar.update), document_chars):
                        yield {"text": text, "kind": path.stem, "phase": "main"}
                    continue
                for where, row in read_rows(path, decode_errors=decode_errors, advance=bar.update):
                    yield {"text": text_of(row, text_column, where), "kind": path.stem, "phase": "main"}
    else:
        rows = progress(hub_rows(source, hub_config, hub_split), f"reading {source}", total=num_documents or None)
        for where, row in itertools.islice(rows, num_documents or None):
            yield {"text": text_of(row, text_column, where), "kind": source, "phase": "main"}
