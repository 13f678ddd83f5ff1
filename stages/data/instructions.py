"""Exact instructions whose answers a program can check: how many words, in which case, in what order.

The words are the curriculum's, so that its tokenizer knows them. An instruction belongs to one of `SPLITS` by a hash of what it asks
in its first wording, so that a rewording never stands in another split. None is solved by repeating what stands after the colon.
"""
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stages.data.curriculum import COLORS, DAYS, FOODS, MAX_NUMBER, MOODS, NAMES, OBJECTS, PETS, PLACES

KINDS = ("count", "case", "order")
SPLITS = {"sft": 80, "validation": 10, "test": 10}  # percent
WORDS = [*OBJECTS, *PLACES, *FOODS, *COLORS, *PETS, *MOODS]
NUMBERS = [str(number) for number in range(MAX_NUMBER + 1)]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What is done to `length` (least, most) different items of a pool. `answer` gets the items and n, which some wordings name."""

    kind: str
    wordings: tuple[str, ...]
    pool: Sequence[str]
    length: tuple[int, int]
    answer: Callable[[list[str], int], list[str]]


OPERATIONS = (
    Operation(kind="count", wordings=("Write {n} times: {items}", "Write {items} {n} times.", "Repeat this {n} times: {items}"),
              pool=WORDS, length=(1, 2), answer=lambda items, n: items * n),
    Operation(kind="count", wordings=("Write the first {n} words of: {items}", "Write only the first {n} of these words: {items}"),
              pool=WORDS, length=(5, 7), answer=lambda items, n: items[:n]),
    Operation(kind="count", wordings=("Write the last {n} words of: {items}", "Write only the last {n} of these words: {items}"),
              pool=WORDS, length=(5, 7), answer=lambda items, n: items[-n:]),
    Operation(kind="case", wordings=("Write in capital letters: {items}", "Write {items} in capital letters."),
              pool=WORDS, length=(1, 3), answer=lambda items, n: [item.upper() for item in items]),
    Operation(kind="case", wordings=("Write in small letters: {items}", "Write {items} in small letters."),
              pool=NAMES + DAYS, length=(1, 3), answer=lambda items, n: [item.lower() for item in items]),
    Operation(kind="case", wordings=("Write each word with a capital first letter: {items}", "Begin each word with a capital: {items}"),
              pool=WORDS, length=(1, 3), answer=lambda items, n: [item.capitalize() for item in items]),
    Operation(kind="order", wordings=("Sort these words by the alphabet: {items}", "Write in the order of the alphabet: {items}"),
              pool=WORDS, length=(3, 5), answer=lambda items, n: sorted(items)),
    Operation(kind="order", wordings=("Write these numbers from small to large: {items}", "Sort these numbers, smallest first: {items}"),
              pool=NUMBERS, length=(3, 5), answer=lambda items, n: sorted(items, key=int)),
    Operation(kind="order", wordings=("Write these words backward: {items}", "Write these words from last to first: {items}"),
              pool=WORDS, length=(3, 5), answer=lambda items, n: items[::-1]))


def instructions(seed: int, *, split: str, kinds: Sequence[str] = KINDS) -> Iterator[dict[str, str]]:
    """Endless rows `{"id", "kind", "prompt", "answer"}` of one split, in an order fixed by the seed; one may come again.

    Raises ValueError for an unknown split or kind, or no kind.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose from {', '.join(SPLITS)}")
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds {list(kinds)}: choose at least one, from {', '.join(KINDS)}")
    rng = random.Random(f"{seed}:{split}")
    while True:
        kind = rng.choice(kinds)
        operation = rng.choice([operation for operation in OPERATIONS if operation.kind == kind])
        items, n = rng.sample(operation.pool, rng.randint(*operation.length)), rng.randint(2, 4)
        answer = operation.answer(items, n)
        prompts = [wording.format(n=n, items=" ".join(items)) for wording in operation.wordings]
        if split_of(prompts[0]) == split and answer != items:
            prompt = rng.choice(prompts)
            yield {"id": hashlib.sha256(prompt.encode()).hexdigest()[:16], "kind": kind, "prompt": prompt, "answer": " ".join(answer)}


def split_of(prompt: str) -> str:
    """The split of an instruction, given in its first wording."""
    point = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    for name, share in SPLITS.items():
        if point < share:
            return name
        point -= share
    raise AssertionError("shares of SPLITS do not add up to 100")


def follows(row: Mapping[str, Any], text: str) -> bool:
    """Whether a text is the answer, exactly but for white space around it: case, order and count are what was asked."""
    return text.strip() == row["answer"]
