"""Whether a document reads like text that somebody wrote, by rules that need no model; and which language it is in, by one that does.

The rules and their thresholds are those of Rae et al. 2021 (Gopher), appendix A.1.1, which were made for English web pages: verse, code,
tables and short texts fail them, so each can be set. Language is told by py3langid, whose model comes with its package (an
extra: requirements-language.lock).
"""
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

STOP_WORDS = frozenset("the be to of and that have with".split())
_LETTER = re.compile(r"[^\W\d_]")
_WORD = re.compile(r"\w+")
STEP = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing
LANGUAGE_CHARS = 2000  # of a document, which tell its language
BULLETS, ELLIPSES = ("•", "-", "*", "‣", "●"), ("...", "…")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Thresholds; the document that stands at one passes. An empty mapping of n-grams leaves its rule out."""

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0  # mean, in characters
    max_word_length: float = 10.0
    max_symbols: float = 0.1  # number signs, and ellipses, a word
    max_bullet_lines: float = 0.9  # share of the lines that begin with a bullet
    max_ellipsis_lines: float = 0.3  # share of the lines that end in an ellipsis
    min_lettered_words: float = 0.8  # share of the words with a letter in them
    min_stop_words: int = 2  # different ones of STOP_WORDS
    max_duplicate_lines: float = 0.3  # share of the lines that stood before
    max_duplicate_line_chars: float = 0.2  # and of the characters, in such lines
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_chars: float = 0.2
    max_top_ngram_chars: dict[int, float] = field(default_factory=lambda: {2: 0.2, 3: 0.18, 4: 0.16})  # in the commonest n-gram
    max_duplicate_ngram_chars: dict[int, float] = field(  # in n-grams that come more than once
        default_factory=lambda: {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1})

    def fault(self, text: str) -> str | None:
        """The first rule that the text breaks, as `quality: <rule>`, or None."""
        words = text.split()
        if not self.min_words <= len(words) <= self.max_words:
            return f"quality: {'min_words' if len(words) < self.min_words else 'max_words'}"
        mean = sum(map(len, words)) / max(1, len(words))
        if not self.min_word_length <= mean <= self.max_word_length:
            return f"quality: {'min_word_length' if mean < self.min_word_length else 'max_word_length'}"
        lines = [line for line in text.split("\n") if line.strip()]
        paragraphs = [block for block in re.split(r"\n\s*\n", text) if block.strip()]
        shares = {
            "max_symbols": max(text.count("#"), sum(map(text.count, ELLIPSES))) / max(1, len(words)),
            "max_bullet_lines": _share(line.lstrip().startswith(BULLETS) for line in lines),
            "max_ellipsis_lines": _share(line.rstrip().endswith(ELLIPSES) for line in lines),
            **dict(zip(("max_duplicate_lines", "max_duplicate_line_chars"), _repeated(lines), strict=True)),
            **dict(zip(("max_duplicate_paragraphs", "max_duplicate_paragraph_chars"), _repeated(paragraphs), strict=True))}
        if over := next((rule for rule, share in shares.items() if share > getattr(self, rule)), None):
            return f"quality: {over}"
        if _share(map(str.isalpha, words)) < self.min_lettered_words and \
                _share(_LETTER.search(word) is not None for word in words) < self.min_lettered_words:  # the same for words with other signs
            return "quality: min_lettered_words"
        if len(STOP_WORDS.intersection(words)) < self.min_stop_words and \
                len(STOP_WORDS.intersection(_WORD.findall(text.casefold()))) < self.min_stop_words:
            return "quality: min_stop_words"
        return self._repetition(words)

    def _repetition(self, words: list[str]) -> str | None:
        numbers = dict(zip(dict.fromkeys(words), itertools.count()))
        ids = np.fromiter(map(numbers.__getitem__, words), dtype=np.uint64, count=len(words))
        lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        once = len(ids)  # the size from which on no n-gram comes twice
        for rule in ("max_top_ngram_chars", "max_duplicate_ngram_chars"):
            for size, limit in getattr(self, rule).items():
                share = _in_ngrams(ids, lengths, size, only_top="top" in rule) if size < once else 0.0
                once = min(once, size) if share == 0 else once
                if share > limit:
                    return f"quality: {rule} {size}"
        return None


def _share(found: Any) -> float:
    marks = list(found)
    return sum(marks) / max(1, len(marks))


def _repeated(parts: list[str]) -> tuple[float, float]:
    """Shares of the parts, and of their characters, that stood before."""
    counts = Counter(parts)
    extra = {part: count - 1 for part, count in counts.items() if count > 1}
    chars = sum(map(len, parts))
    return sum(extra.values()) / max(1, len(parts)), sum(len(part) * count for part, count in extra.items()) / max(1, chars)


def _in_ngrams(ids: np.ndarray, lengths: np.ndarray, size: int, *, only_top: bool) -> float:
    """Share of the words' characters in n-grams that come more than once, each character once: in the commonest, or in any."""
    hashed = rolling(ids, size)
    ordered = np.sort(hashed)
    if (ordered[1:] != ordered[:-1]).all():
        return 0.0
    _, inverse, counts = np.unique(hashed, return_inverse=True, return_counts=True)
    found = (counts[inverse] > 1) & ((inverse == counts.argmax()) | (not only_top))
    covered = np.zeros(len(ids) + 1, dtype=np.int64)
    covered[:len(found)] += found
    covered[size:] -= found
    inside = np.cumsum(covered[:-1]) > 0
    return float(lengths[inside].sum() / lengths.sum())


def rolling(codes: np.ndarray, size: int) -> np.ndarray:
    """A hash (uint64) of every run of `size` codes in order."""
    hashed = np.zeros(max(0, len(codes) - size + 1) if size else 0, dtype=np.uint64)
    for i in range(size):
        hashed = hashed * STEP + codes[i:len(codes) - size + 1 + i]
    return hashed


def language_fault(languages: Collection[str]) -> Callable[[str], str | None]:
    """A function that says of a text which other language it is in, as `language: xx`, or None for one of `languages` (ISO 639-1).

    Raises ValueError when py3langid is not installed or does not know a language.
    """
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ValueError("languages needs py3langid: .venv/bin/pip install -c requirements.lock -r requirements-language.lock") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    if unknown := sorted(set(languages) - set(identifier.nb_classes)):
        raise ValueError(f"languages: {unknown[0]!r} is not one of {', '.join(sorted(identifier.nb_classes))}")

    def fault(text: str) -> str | None:
        found = identifier.classify(text[:LANGUAGE_CHARS])[0]
        return None if found in languages else f"language: {found}"
    return fault
