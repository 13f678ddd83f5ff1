"""What training texts share: with one another (near-duplicates) and with the questions of an evaluation (contamination).

Texts are compared as lower-case words without punctuation (near-duplicates: with the signs of arithmetic). Near-duplicates share
word 5-shingles to a Jaccard similarity of at least .8; finding candidates by MinHash and then checking each pair follows Lee et al.
2022 (Deduplicating training data makes language models better, appendix A), whose check is edit similarity. Overlap with an
evaluation is a shared 13-gram of words, as Brown et al. 2020 (GPT-3, appendix C) look for it.
"""
import re
from collections import defaultdict
from collections.abc import Container, Sequence
from typing import Any

from datasketch import MinHash, MinHashLSH

SHINGLE, SIMILAR, GRAM = 5, 0.8, 13
BANDS, ROWS = 25, 5  # a pair at Jaccard .8 becomes a candidate with probability 1 - (1 - .8^5)^25 = .99995
_WORD = re.compile(r"\w+")
_WORD_OR_SIGN = re.compile(r"\w+|[-+*/=<>^]")  # 3 + 4 and 3 - 4 are different problems


def words(text: str, pattern: re.Pattern = _WORD) -> list[str]:
    return pattern.findall(text.casefold())


def grams(said: Sequence[str], size: int) -> list[str]:
    """Every run of `size` words in order; of fewer words the one run that there is, of none none."""
    return [" ".join(said[i:i + size]) for i in range(max(1, len(said) - size + 1))] if said else []


def near_duplicates(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(position, position of the earlier text it nearly repeats), by position.

    The earlier text is itself no repeat, so leaving out every first position keeps one of each kind. Candidates come from MinHash
    with fixed permutations, and their shingles are then compared exactly: no pair listed is less alike than `SIMILAR`.
    """
    index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
    kept: dict[int, set[str]] = {}
    found = []
    shingles = [set(grams(words(text, _WORD_OR_SIGN), SHINGLE)) for text in texts]
    for at, (mine, sketch) in enumerate(zip(shingles, _sketches(shingles), strict=True)):
        if not mine:
            continue
        alike = [other for other in sorted(index.query(sketch)) if len(mine & kept[other]) >= SIMILAR * len(mine | kept[other])]
        if alike:
            found.append((at, alike[0]))
        else:
            index.insert(at, sketch)
            kept[at] = mine
    return found


def _sketches(shingles: Sequence[set[str]]) -> list[MinHash]:
    return MinHash.bulk([[shingle.encode() for shingle in mine] for mine in shingles], num_perm=BANDS * ROWS, seed=1)


def overlapping(texts: Sequence[str], questions: Sequence[str]) -> list[tuple[int, int]]:
    """(position of a text, position of a question) wherever the text holds 13 words in a row of the question, or all of a shorter one.

    Questions of fewer words than a shingle ("Why?") are not looked for: they stand in any text.
    """
    asked: dict[int, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for number, question in enumerate(questions):
        said = words(question)
        for gram in grams(said, GRAM) if len(said) >= SHINGLE else ():
            asked[min(len(said), GRAM)][gram].add(number)
    found = set()
    for at, text in enumerate(texts):
        said = words(text)
        for size, known in asked.items():
            found |= {(at, number) for gram in grams(said, size) if gram in known for number in known[gram]}
    return sorted(found)


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
