"""What training texts share: with one another (near-duplicates) and with the questions of an evaluation (contamination).

Texts are compared as lower-case words without punctuation (near-duplicates: with the signs of arithmetic). Near-duplicates share
word 5-shingles to a Jaccard similarity of at least .8; finding candidates by MinHash and then checking each pair follows Lee et al.
2022 (Deduplicating training data makes language models better, appendix A), whose check is edit similarity. Overlap with an
evaluation is a shared 13-gram of words, as Brown et al. 2020 (GPT-3, appendix C) look for it.

Runs of words are compared by 64-bit hashes. datasketch makes the MinHash signatures; its index of them holds each text in 25
dictionaries in memory, so the bands are sorted from a file here instead, one at a time.
"""
import functools
import hashlib
import itertools
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasketch import MinHash

from stages.data.documents import Documents, Drops
from stages.data.quality import STEP, rolling
from stages.run.console import progress
from stages.run.workers import spread

SHINGLE, SIMILAR, GRAM = 5, 0.8, 13
BANDS, ROWS = 25, 5  # a pair at Jaccard .8 becomes a candidate with probability 1 - (1 - .8^5)^25 = .99995
EXAMPLES, SHOWN = 5, 200  # of contamination: how many, and how many characters
CACHED = 1 << 19  # words whose codes are kept
BATCH = 128  # texts whose signatures are written at once
_WORD = re.compile(r"\w+")
_WORD_OR_SIGN = re.compile(r"\w+|[-+*/=<>^]")  # 3 + 4 and 3 - 4 are different problems


class _Codes(dict):
    """A fixed 64-bit number for each word; it forgets all when it is full."""

    def __missing__(self, word: str) -> int:
        if len(self) > CACHED:
            self.clear()
        code = self[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big", signed=True)
        return code


_CODES = _Codes()


def words(text: str, pattern: re.Pattern = _WORD) -> list[str]:
    return pattern.findall(text.casefold())


def grams(said: Sequence[str], size: int) -> np.ndarray:
    """A hash (uint64) of every run of `size` words in order; of fewer words of the one run that there is, of none none."""
    codes = np.fromiter(map(_CODES.__getitem__, said), dtype=np.int64, count=len(said)).view(np.uint64)
    hashed = rolling(codes, min(size, len(codes)))
    return hashed ^ hashed >> np.uint64(32)  # the low half is what MinHash reads


def near_duplicates(texts: Sequence[str], workers: int | None = 1) -> list[tuple[int, int]]:
    """(position, position of the earlier text it nearly repeats), by position.

    The earlier text is itself no repeat, so leaving out every first position keeps one of each kind. Candidates come from MinHash
    with fixed permutations, and their shingles are then compared exactly: no pair listed is less alike than `SIMILAR`. Texts are read
    one at a time; 200 bytes of each go to a temporary file, and memory holds 24 bytes of each and 16 for every band it shares.
    """
    @functools.lru_cache(maxsize=64)
    def shingles(at: int) -> np.ndarray:
        return np.unique(grams(words(texts[at], _WORD_OR_SIGN), SHINGLE))

    kept: dict[int, list[int]] = defaultdict(list)  # of each bucket of a band, the texts that are no repeats
    found = []
    for at, buckets in _shared_buckets(len(texts), shingles, workers):
        mine = shingles(at)
        candidates = sorted({other for bucket in buckets for other in kept[bucket]})
        alike = next((other for other in candidates if _alike(mine, shingles(other))), None)
        if alike is None:
            for bucket in buckets:
                kept[bucket].append(at)
        else:
            found.append((at, alike))
    return found


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared >= SIMILAR * (len(one) + len(other) - shared)


def _signatures(span: range, shingles: Callable[[int], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of each text a number for each band, uint64 of (BANDS, texts), and whether it has any words."""
    sketch = MinHash(num_perm=BANDS * ROWS, seed=1, hashfunc=int)
    block, full = np.zeros((BANDS, len(span)), dtype=np.uint64), np.zeros(len(span), dtype=bool)
    for i, at in enumerate(span):
        mine = shingles(at)
        full[i] = len(mine) > 0
        if full[i]:
            sketch.clear()
            sketch.update_batch((mine & np.uint64(0xFFFFFFFF)).tolist())
            for values in sketch.hashvalues.reshape(BANDS, ROWS).astype(np.uint64).T:
                block[:, i] = block[:, i] * STEP + values
    return block, full


def _shared_buckets(count: int, shingles: Callable[[int], np.ndarray], workers: int | None) -> Iterable[tuple[int, list[int]]]:
    """By position, the texts that share a bucket of a band with another, and the numbers of those buckets."""
    with tempfile.TemporaryFile() as file:
        full = np.zeros(count, dtype=bool)
        spans = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
        for span, (block, has_words) in progress(spread(functools.partial(_signatures, shingles=shingles), spans, workers),
                                                 "near-duplicates: signatures", total=len(spans)):
            full[span.start:span.stop] = has_words
            for band, column in enumerate(block):
                os.pwrite(file.fileno(), column.tobytes(), 8 * (band * count + span.start))
        sharers, buckets, first = [], [], 0
        for band in range(BANDS):
            file.seek(8 * band * count)
            column = np.fromfile(file, dtype=np.uint64, count=count)
            _, number, sizes = np.unique(column, return_inverse=True, return_counts=True)
            sharing = np.flatnonzero(full & (sizes[number] > 1))
            sharers.append(sharing)
            buckets.append(number[sharing] + first)
            first += len(sizes)
    at, bucket = np.concatenate(sharers), np.concatenate(buckets)
    order = np.argsort(at, kind="stable")
    at, bucket = at[order], bucket[order]
    starts = np.flatnonzero(np.diff(at, prepend=-1))
    ends = itertools.pairwise([*starts.tolist(), len(at)])
    for start, end in progress(ends, "near-duplicates: comparison", total=len(starts)):
        yield int(at[start]), bucket[start:end].tolist()


def drop_near_duplicates(documents: Documents, drops: Drops, workers: int | None = 1) -> None:
    """Keep one of each kind, the first."""
    found = dict(near_duplicates(documents, workers))
    drops.remove(documents, list(found), lambda at: "near-duplicate", lambda at: documents[found[at]])


def is_looked_for(question: str) -> bool:
    """Whether `overlapping` looks for it: a question of fewer words than a shingle ("Why?") stands in any text."""
    return len(words(question)) >= SHINGLE


def overlapping(texts: Iterable[str], questions: Sequence[str], workers: int | None = 1) -> list[tuple[int, int]]:
    """(position of a text, position of a question) wherever the text holds 13 words in a row of the question, or all of a shorter one.

    Questions that are too short (`is_looked_for`) are passed over.
    """
    asked: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for number, question in enumerate(questions):
        said = words(question)
        for gram in grams(said, GRAM).tolist() if is_looked_for(question) else ():
            asked[min(len(said), GRAM)][gram].add(number)
    known = {size: np.array(sorted(numbers), dtype=np.uint64) for size, numbers in asked.items()}

    def held(text: str) -> list[int]:
        said = words(text)
        numbers: set[int] = set()
        for size, codes in known.items():
            if len(said) >= size:
                mine = grams(said, size)
                places = np.searchsorted(codes, mine).clip(max=len(codes) - 1)
                numbers.update(*(asked[size][gram] for gram in mine[codes[places] == mine].tolist()))
        return sorted(numbers)

    texts, at = iter(texts), itertools.count()
    batches = iter(lambda: list(itertools.islice(texts, BATCH)), [])
    return [(place, number) for _, each in spread(lambda batch: [held(text) for text in batch], batches, workers)
            for numbers, place in zip(each, at, strict=False) for number in numbers]


def contamination(documents: Documents, drops: Drops, sets: Mapping[str, Sequence[str]], *, passed_over: str, drop: bool,
                  workers: int | None = 1) -> dict[str, dict[str, Any]]:
    """By evaluation set, how many of its questions stand in training documents, in how many, and examples; `drop` drops the documents.

    The source `passed_over` is not looked at: its splits share no problem by construction, and its wording is of few moulds.
    """
    looked_at = np.flatnonzero((documents.columns["heldout"] == 0) & ~documents.of(passed_over))
    asked = [(name, question) for name, questions in sets.items() for question in questions]
    hits = [(int(looked_at[at]), *asked[number]) for at, number in overlapping(
        (documents[at] for at in progress(looked_at, "contamination")), [question for _, question in asked], workers)]
    found = {}
    for name, questions in sets.items():
        own = [(at, question) for at, which, question in hits if which == name]
        found[name] = {"questions": sum(map(is_looked_for, questions)), "found": len({question for _, question in own}),
                       "documents": len({at for at, _ in own}),
                       "examples": [{"question": question[:SHOWN], "text": documents[at][:SHOWN], "source": documents.source(at)}
                                    for at, question in own[:EXAMPLES]]}
    if drop:
        first = {at: (name, question) for at, name, question in reversed(hits)}
        drops.remove(documents, list(first), lambda at: f"holds a question of {first[at][0]}", lambda at: first[at][1])
    return found


def screened(train: Sequence[dict[str, Any]], validation: Sequence[dict[str, Any]], questions: Sequence[str], *, generated: Container[str],
             drop: bool) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Training rows (all, or with `drop` those without findings) and findings `{"where", "reason", "source"}`: a row that nearly repeats
    an earlier one, or that holds one of `questions` or the last question of a validation row.

    Rows of `generated` sources are passed over: their splits share no problem by construction, and their wording is of few moulds.
    """
    rows = list({id(row): row for row in train if row["source"] not in generated}.values())  # a mixture repeats whole rows on purpose
    held = [*questions, *(row["messages"][-2]["content"] for row in validation if row["source"] not in generated and "messages" in row
                          and len(row["messages"]) > 1)]
    texts = [row["text"] if "text" in row else "\n".join(message["content"] for message in row["messages"]) for row in rows]
    found = {at: f"nearly repeats {rows[earlier]['id']}" for at, earlier in near_duplicates(texts)}
    found |= {at: f"holds the evaluation question {held[number][:60]!r}" for at, number in overlapping(texts, held)}
    findings = [{"where": rows[at]["id"], "reason": reason, "source": rows[at]["source"]} for at, reason in sorted(found.items())]
    out = {id(rows[at]) for at in found} if drop else set()
    return [row for row in train if id(row) not in out], findings
