"""Rows of tokens on their way to disk: what they hold, what they take in memory, and that they repeat."""
import tracemalloc

import numpy as np
import pytest
from datasets import load_from_disk

from stages.data.packing import CHUNK_ROWS, to_dataset


def rows(count: int, row_length: int, first: int = 0):
    for i in range(count):
        yield [first + i % 60_000, *range(1000, 1000 + row_length - 1)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "int32")])
def test_chunks_hold_every_row_in_order(tmp_path, vocab_size, dtype):
    count = CHUNK_ROWS + 3
    to_dataset(rows(count, 4), 4, vocab_size=vocab_size).save_to_disk(tmp_path / "tokens")
    read = load_from_disk(tmp_path / "tokens")
    assert len(read) == count and read.features["input_ids"].feature.dtype == dtype
    assert np.array_equal(read.with_format("numpy")[:]["input_ids"], np.array(list(rows(count, 4))))


def test_memory_is_little_more_than_the_tokens_themselves():
    tracemalloc.start()
    made = to_dataset(rows(10 * CHUNK_ROWS, 128), 128, vocab_size=600)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tokens = 2 * 128 * 10 * CHUNK_ROWS
    assert made.data.nbytes < 1.1 * tokens and peak < 2 * tokens  # as Python lists of all rows: 20 times


def test_fingerprint_is_of_the_content():
    """Left to itself, datasets makes one of a pickled copy of the table; one at random would change the product's hash."""
    def made(*given):
        return to_dataset(*given, vocab_size=1 << 16)._fingerprint

    assert made(rows(8, 4), 4) == made(rows(8, 4), 4) != made(rows(8, 4, first=1), 4)
    assert made([[1, 2], [3, 4]], 2) != made([[1, 2, 3, 4]], 4)
