"""Documents packed into rows of fixed length, on disk as memory-mapped Arrow, without contamination between documents.

A row is `row_length` token ids: whole documents, each ended by the end-of-text token, then padding. Boundaries are read back
from the end-of-text tokens, so nothing but the ids is stored. `PackedCollator` resets the position ids at each boundary and
passes no attention mask; transformers then builds the block-diagonal mask itself (an all-ones mask would silently let
documents see each other). The first token of each document carries no loss: nothing in its own document predicts it.

Letters: B rows, T tokens a row.
"""
import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetInfo, Features, List, Value
from datasets.table import InMemoryTable

OPEN_ROWS = 16  # rows kept open at once: enough to fill them to 98 %, few enough to keep the order of the documents
CHUNK_ROWS = 1000  # rows of an Arrow batch
SHARD_TOKENS = 1 << 24  # tokens of a file, and of memory


def pack(documents: Iterable[list[int]], row_length: int, *, eos_id: int, pad_id: int) -> Iterator[list[int]]:
    """Rows of exactly `row_length` ids. Documents keep their order up to `OPEN_ROWS` rows; best fit decides the row.

    `documents` are token ids without end-of-text. One longer than a row is cut into pieces, each treated as a document.
    """
    rows: list[list[int]] = []
    for ids in documents:
        whole = [*ids, eos_id]
        for start in range(0, len(whole), row_length):
            piece = whole[start:start + row_length]
            fitting = [row for row in rows if len(row) + len(piece) <= row_length]
            if fitting:
                row = max(fitting, key=len)
                row.extend(piece)
            else:
                row = list(piece)
                rows.append(row)
            if len(row) == row_length:
                rows.remove(row)
                yield row
            elif len(rows) > OPEN_ROWS:
                fullest = max(rows, key=len)
                rows.remove(fullest)
                yield fullest + [pad_id] * (row_length - len(fullest))
    for row in rows:
        yield row + [pad_id] * (row_length - len(row))


def documents_of(row: Sequence[int], *, eos_id: int, pad_id: int) -> Iterator[list[int]]:
    """The documents of one packed row, each with its end-of-text token; a piece that was cut off stands as it is."""
    document: list[int] = []
    for token in row:
        if token == pad_id:
            break
        document.append(token)
        if token == eos_id:
            yield document
            document = []
    if document:
        yield document


def replayed(rows: Sequence[dict], *, tokens: float, seed: int, longest: int, eos_id: int, pad_id: int) -> list[dict]:
    """Documents of packed rows in a seeded order, `tokens` tokens of them, as encoded rows with loss on all but the first token."""
    chosen: list[dict] = []
    for at in random.Random(f"replay:{seed}").sample(range(len(rows)), len(rows)):
        for ids in documents_of(rows[at]["input_ids"], eos_id=eos_id, pad_id=pad_id):
            if tokens <= 0:
                return chosen
            chosen.append({"input_ids": ids[:longest], "labels": [-100, *ids[1:longest]], "source": "replay"})
            tokens -= len(ids)
    return chosen


def to_dataset(rows: Iterable[list[int]], row_length: int, *, vocab_size: int) -> Dataset:
    """Arrow dataset of one column `input_ids`, two bytes a token when the vocabulary allows it (else four), and that is all it takes.

    Rows become arrays as they come: in Python lists a token takes 40 bytes and more. The fingerprint is the hash of the ids: left to
    itself, datasets pickles the table to make one.
    """
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
    features = Features({"input_ids": List(Value(np.dtype(dtype).name), length=row_length)})
    schema, digest, batches = features.arrow_schema, hashlib.sha256(str(row_length).encode()), []
    rows = iter(rows)
    while chunk := [np.asarray(row, dtype=dtype) for row in itertools.islice(rows, CHUNK_ROWS)]:
        ids = np.concatenate(chunk)
        digest.update(ids.tobytes())
        batches.append(pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(ids), row_length)], schema=schema))
    table = InMemoryTable.from_batches(batches, schema=schema)
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=digest.hexdigest()[:16])


def save_rows(rows: Iterable[list[int]], row_length: int, folder: Path, *, vocab_size: int) -> int:
    """`to_dataset(rows).save_to_disk(folder)`, with one shard in memory at a time; returns the number of rows.

    Up to `SHARD_TOKENS` the files are the same to the byte. Raises ValueError when there are no rows.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what a killed attempt left
    rows, count = iter(rows), 0
    parts: list[Path] = []
    while chunk := list(itertools.islice(rows, 1)):
        part = folder.with_name(f"{folder.name}.{len(parts)}")
        shard = itertools.chain(chunk, itertools.islice(rows, SHARD_TOKENS // row_length - 1))
        dataset = to_dataset(shard, row_length, vocab_size=vocab_size)
        dataset.save_to_disk(part, num_shards=1)
        count += len(dataset)
        parts.append(part)
    if not parts:
        raise ValueError(f"no rows for {folder}")
    states = [json.loads((part / "state.json").read_text(encoding="utf-8")) for part in parts]
    if len(parts) > 1:
        names = [{"filename": f"data-{i:05d}-of-{len(parts):05d}.arrow"} for i in range(len(parts))]
        digest = hashlib.sha256("".join(state["_fingerprint"] for state in states).encode()).hexdigest()[:16]
        for part, state, name in zip(parts, states, names, strict=True):
            (part / state["_data_files"][0]["filename"]).rename(parts[0] / name["filename"])
        state = states[0] | {"_data_files": names, "_fingerprint": digest}
        (parts[0] / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
        for part in parts[1:]:
            shutil.rmtree(part)
    parts[0].rename(folder)
    return count


class PackedCollator:
    """Rows to `input_ids`, `position_ids`, `labels`, each (B, T) int64; labels are -100 at padding and document starts."""

    def __init__(self, *, eos_id: int, pad_id: int):
        self.eos_id, self.pad_id = eos_id, pad_id

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        ids = torch.tensor(np.stack([np.asarray(row["input_ids"]) for row in rows]).astype(np.int64))
        index = torch.arange(ids.size(1)).expand_as(ids)
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, :-1] == self.eos_id
        padding = ids == self.pad_id
        starts |= padding  # each padding token is a document of its own: it sees nothing and nothing sees it
        positions = index - torch.where(starts, index, 0).cummax(dim=1).values
        labels = ids.masked_fill(starts | padding, -100)
        return {"input_ids": ids, "position_ids": positions, "labels": labels}
