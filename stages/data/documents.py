"""Documents between reading and tokenising: cleaned, filtered, each text once, held on disk, with every drop counted and sampled.

A corpus may be larger than memory: its texts wait in a temporary file, and memory holds some 30 bytes a document to find them again.
"""
import functools
import hashlib
import json
import os
import random
import re
import tempfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stages.run.workers import spread

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_SPACES = re.compile(r"[\t\u00a0\u2000-\u200a\u3000]")
SAMPLES, SAMPLE_CHARS = 20, 500  # texts kept of each reason for dropping one, and how much of each
BATCH_CHARS = 1 << 17  # of the documents that are cleaned at once
COLUMNS = {"start": "q", "size": "q", "digest": "Q", "source": "H", "kind": "H", "easy": "B", "heldout": "B"}


def clean(text: str) -> str:
    """NFC; no control characters; runs of spaces and more than one blank line collapsed; no space at line ends."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    if not text.replace("\n", " ").isprintable():  # quicker than a pattern that finds nothing
        text = _SPACES.sub(" ", _CONTROL.sub("", text))
    while "  " in text:
        text = text.replace("  ", " ")
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip("\n ")


class Documents(Sequence[str]):
    """Texts in a temporary file of `folder`, in the order in which they were added, with a numpy column of each of `COLUMNS`.

    `source` and `kind` are positions in `names`. After `keep` it is the sequence of those that were kept.
    """

    def __init__(self, folder: Path):
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the documents
        self.names: list[str] = []
        self._number: dict[str, int] = {}
        self._added = {name: array(kind) for name, kind in COLUMNS.items()}
        self.columns: dict[str, np.ndarray] = {}
        self._end = 0

    def add(self, text: bytes, *, digest: int, source: str, kind: str, easy: bool, heldout: bool) -> None:
        row = {"start": self._end, "size": len(text), "digest": digest, "source": self.number(source), "kind": self.number(kind),
               "easy": easy, "heldout": heldout}
        for name, value in row.items():
            self._added[name].append(value)
        self.file.write(text)
        self._end += len(text)

    def number(self, name: str) -> int:
        """The position of a source's or kind's name. Raises ValueError when there are more than a column can hold."""
        if name not in self._number:
            if len(self.names) > 65_535:
                raise ValueError("more than 65,536 sources and kinds of text (files are kinds): put the documents into fewer files")
            self._number[name] = len(self.names)
            self.names.append(name)
        return self._number[name]

    def close(self) -> None:
        """No document is added after this; columns and texts can be read."""
        self.file.flush()
        self.columns = {name: np.array(values, dtype=values.typecode) for name, values in self._added.items()}
        self._added.clear()

    def keep(self, kept: np.ndarray) -> None:
        """Leave out the documents where `kept` (bool, one a document) is False."""
        self.columns = {name: column[kept] for name, column in self.columns.items()}

    def __len__(self) -> int:
        return len(self.columns["start"])

    def __getitem__(self, at: Any) -> Any:
        return os.pread(self.file.fileno(), int(self.columns["size"][at]), int(self.columns["start"][at])).decode()

    def source(self, at: int) -> str:
        return self.names[self.columns["source"][at]]

    def of(self, source: str) -> np.ndarray:
        """Mask of the documents of one source."""
        return self.columns["source"] == self.number(source)


class Drops:
    """How many documents were read and dropped, why, and a random sample of the texts dropped for each reason."""

    def __init__(self) -> None:
        self.read: Counter[str] = Counter()  # by source
        self.reasons: Counter[str] = Counter()
        self.by_source: dict[str, Counter[str]] = {}
        self.samples: dict[str, list[dict[str, str]]] = {}
        self._random = random.Random(0)

    def drop(self, reason: str, source: str, shown: dict[str, str] | Callable[[], dict[str, str]]) -> None:
        """Count a document, and perhaps keep what there is to show of it."""
        self.reasons[reason] += 1
        self.by_source.setdefault(source, Counter())[reason] += 1
        kept = self.samples.setdefault(reason, [])
        at = len(kept) if len(kept) < SAMPLES else self._random.randrange(self.reasons[reason])  # reservoir: each is as likely to stay
        if at < SAMPLES:
            texts = shown() if callable(shown) else shown
            kept[at:at + 1] = [{"reason": reason, "source": source, **{key: text[:SAMPLE_CHARS] for key, text in texts.items()}}]

    def remove(self, documents: Documents, out: Sequence[int] | np.ndarray, reason: Callable[[int], str],
               found: Callable[[int], str] | None = None) -> None:
        """Drop the documents at these positions, for a reason by position; `found` is what each was found to hold or repeat."""
        kept = np.ones(len(documents), dtype=bool)
        kept[np.asarray(out, dtype=np.int64)] = False
        def shown(at: int) -> dict[str, str]:
            return {"text": documents[at]} | ({"found": found(at)} if found else {})

        for at in np.flatnonzero(~kept).tolist():
            self.drop(reason(at), documents.source(at), functools.partial(shown, at))
        documents.keep(kept)

    def lines(self) -> list[str]:
        kept = self.read.total() - self.reasons.total()
        return [f"{self.read.total():,} documents read, {kept:,} kept"] + [
            f"  dropped {count:,} ({reason}), for example {self.samples[reason][0]['text'][:60]!r}"
            for reason, count in self.reasons.most_common()]

    def write(self, path: Path) -> None:
        with path.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for rows in self.samples.values() for row in rows)


def judged(batch: Sequence[dict[str, str]], *, min_chars: int, faults: Sequence[Callable[[str], str | None]],
           ) -> list[tuple[str, Any, Any]]:
    """Of each document, cleaned: "", its text and the hash of that; or why it is to be dropped, and what to show of it."""
    found: list = []
    for document in batch:
        text = clean(document["text"])
        if len(text) < min_chars:
            found.append(("empty or too short after cleaning", document["text"][:SAMPLE_CHARS], None))
            continue
        try:
            encoded = text.encode()
        except UnicodeEncodeError:  # JSON can spell half a character
            found.append(("not text: half a surrogate pair", text[:SAMPLE_CHARS].encode(errors="replace").decode(), None))
            continue
        reason = next(filter(None, (fault(text) for fault in faults)), "")
        found.append((reason, text[:SAMPLE_CHARS], None) if reason else ("", encoded, hashlib.sha256(encoded).digest()))
    return found


def batches(read: Iterable[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    batch, chars = [], 0
    for document in read:
        batch.append(document)
        chars += len(document["text"])
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def gather(read: Iterable[dict[str, str]], documents: Documents, drops: Drops, *, heldout_share: float, min_chars: int = 1,
           faults: Sequence[Callable[[str], str | None]] = (), workers: int | None = 1) -> None:
    """Clean what was read (`{"text", "kind", "phase", "source"}`), and put into `documents` each text once, without faults.

    `faults` say of a cleaned text why it is to be dropped, or None. `heldout` is decided by the hash of the text, so that a text is on
    the same side in every run, whatever else is in the corpus.
    """
    for batch, found in spread(functools.partial(judged, min_chars=min_chars, faults=faults), batches(read), workers):
        for document, (reason, text, digest) in zip(batch, found, strict=True):
            source = document["source"]
            drops.read[source] += 1
            if reason:
                drops.drop(reason, source, {"text": text})
            else:
                documents.add(text, digest=int.from_bytes(digest[:8], "big"), source=source, kind=document["kind"],
                              easy=document["phase"] == "easy", heldout=int.from_bytes(digest[16:24], "big") < heldout_share * 2**64)
    documents.close()
    first = np.unique(documents.columns["digest"], return_index=True)[1]
    drops.remove(documents, np.setdiff1d(np.arange(len(documents)), first), lambda at: "exact duplicate")
    columns = documents.columns
    drops.remove(documents, np.flatnonzero(columns["easy"] & columns["heldout"]), lambda at: "easy document on the held-out side")


def check_sources(sources: Iterable[str], documents: Documents, drops: Drops) -> None:
    """Raises ValueError for a source of which no document is left, with what became of them."""
    for source in sources:
        if not documents.of(source).any():
            dropped = "; ".join(f"{count:,} {reason}" for reason, count in drops.by_source.get(source, Counter()).most_common())
            raise ValueError(f"no document is left of {source}: " + (f"all {drops.read[source]:,} were dropped ({dropped})" if dropped
                                                                     else "it holds none"))


def mixture(documents: Documents, weights: Mapping[str, float], total_bytes: int, seed: int) -> tuple[np.ndarray, dict[str, float]]:
    """(how often each document is taken, epochs by source): training text in which each source has its weight's share of the bytes.

    A source with less text than its share is repeated, one with more gives a random part: the whole number of its epochs for every
    document and one more for some. `total_bytes` is the text to make; 0: as much as the sources hold. Held-out documents and those of an
    easy beginning are taken once. Raises ValueError for a source without training text.
    """
    columns = documents.columns
    training = (columns["heldout"] == 0) & (columns["easy"] == 0)
    sizes = {source: int(columns["size"][training & documents.of(source)].sum()) for source in weights}
    if empty := [source for source, size in sizes.items() if not size]:
        raise ValueError(f"{empty[0]} has a weight but no training document: lower heldout_share, or leave it out")
    total = total_bytes or sum(sizes.values())
    epochs = {source: total * weight / sum(weights.values()) / sizes[source] for source, weight in weights.items()}
    times = np.ones(len(documents), dtype=np.int64)
    rng = np.random.default_rng(seed)
    for source, wanted in epochs.items():
        own = np.flatnonzero(training & documents.of(source))
        times[own] = int(wanted)
        order = rng.permutation(own)
        before = np.cumsum(columns["size"][order]) - columns["size"][order]
        times[order[before < (wanted % 1) * sizes[source] - 0.5]] += 1
    return times, epochs


def check_weights(weights: Mapping[str, float], sources: Sequence[str], total_bytes: int) -> None:
    """Raises ValueError for weights that are not above 0, leave out a source or name none, and for a total that nothing divides."""
    if total_bytes < 0 or (total_bytes and not weights):
        raise ValueError(f"train_bytes {total_bytes:,} divides text by weights: " + (
            "give every source one in weights, or leave it out" if total_bytes > 0 else "give a number above 0, or leave it out"))
    for source, weight in weights.items():
        if source not in sources:
            raise ValueError(f"weights: {source!r} is none of the sources {', '.join(sources)}")
        if not 0 < weight < float("inf"):
            raise ValueError(f"weights: {source} has {weight}, which must be above 0: leave the source out instead")
    if missing := [source for source in sources if weights and source not in weights]:
        raise ValueError(f"weights: {missing[0]} has none; give every source one")


def in_order(times: np.ndarray, seed: int) -> np.ndarray:
    """Positions of documents in a seeded order, each as often as `times` says."""
    order = array("q", np.repeat(np.arange(len(times)), times).tobytes())
    random.Random(seed).shuffle(order)
    return np.frombuffer(order, dtype=np.int64)


def texts(documents: Documents, positions: Iterable[int]) -> Iterator[str]:
    return (documents[at] for at in positions)
