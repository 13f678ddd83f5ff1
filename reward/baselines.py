"""Judges that know nothing: what a reward model must beat to have learned more than how long and of which words good responses are.

Each is a logistic regression over differences of two responses' features, fitted on other prompts' pairs than it is measured on. A
response is a text or a list of token ids; with ids the features are those of token ids, so decode first where the text is wanted.
"""
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain, pairwise

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from reward.calibration import Accuracy, Figure, Ranks, Scores, accuracy, accuracy_difference, deal, judged, together
from reward.preferences import pairs

Response = str | Sequence[int]
WORD, MARK = re.compile(r"\w+|[^\w\s]"), re.compile(r"[^\w\s]")
DIGIT, CAPITAL = re.compile(r"\d"), re.compile(r"[A-Z]")


def tokens(response: Response) -> list[Hashable]:
    """Words in lower case and punctuation marks of a text; token ids as they are."""
    return list(WORD.findall(response.lower()) if isinstance(response, str) else response)


def length(response: Response) -> int:
    """Characters of a text, or token ids."""
    return len(response)


def surface(response: Response) -> list[float]:
    """Length, how much repeats (words and pairs of words), and of a text the share of digits, capitals and marks, and its lines."""
    words = tokens(response)
    following = list(pairwise(words))
    features = [float(length(response)), float(len(words)), len(set(words)) / max(1, len(words)),
                len(set(following)) / max(1, len(following))]
    if isinstance(response, str):
        size = max(1, len(response))
        features += [len(kind.findall(response)) / size for kind in (DIGIT, CAPITAL, MARK)]
        features += [float(response.count(mark)) for mark in ("\n", "?")]
    return features


def grams(response: Response) -> Iterator[Hashable]:
    """Single tokens and pairs of neighbours."""
    words = tokens(response)
    return chain(((word,) for word in words), pairwise(words))


def by_numbers(features: Callable[[Response], list[float]]) -> Callable[[list[Response], list[Response]], tuple]:
    """Features in units of their root mean square deviation over the training responses."""
    def fit(train: list[Response], rest: list[Response]) -> tuple:
        learned, applied = (np.array([features(r) for r in responses], dtype=np.float64) for responses in (train, rest))
        scale = learned.std(axis=0)
        return tuple(scipy.sparse.csr_array(x / np.where(scale > 0, scale, 1)) for x in (learned, applied))

    return fit


def by_words(train: list[Response], rest: list[Response]) -> tuple:
    """TF-IDF of single tokens and of pairs of neighbours, sublinear in their counts."""
    words = TfidfVectorizer(analyzer=grams, sublinear_tf=True)
    return words.fit_transform(train), words.transform(rest)


BASELINES: dict[str, Callable[[list[Response], list[Response]], tuple]] = {
    "length": by_numbers(lambda r: [length(r)]), "features": by_numbers(surface), "tfidf": by_words}


def learned_scores(name: str, train: Sequence[Sequence[Response]], ranks: Ranks, rest: Sequence[Sequence[Response]]) -> list[list[float]]:
    """A baseline's scores of the responses in `rest`, fitted on the pairs of `train`; one list a prompt.

    Raises ValueError for an unknown baseline and for fewer than two pairs of different rank to fit it on.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}: choose from {', '.join(BASELINES)}")
    learned, applied = BASELINES[name](*([r for row in side for r in row] for side in (train, rest)))
    starts = np.cumsum([0, *map(len, train)])
    better, worse = ([start + pair[side] for start, own in zip(starts, ranks, strict=False) for pair in pairs(list(own))]
                     for side in (0, 1))
    if len(better) < 2:
        raise ValueError(f"{len(better)} pairs of different rank to fit {name} on: give more prompts, or fewer folds")
    # Every second pair the other way round: the loss is the same, and scikit-learn wants both classes.
    signs = np.where(np.arange(len(better)) % 2, -1.0, 1.0)
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(scipy.sparse.diags_array(signs) @ (learned[better] - learned[worse]), signs)
    found = iter((applied @ model.coef_[0]).tolist())
    return [[next(found) for _ in row] for row in rest]


def out_of_fold(name: str, responses: Sequence[Sequence[Response]], ranks: Ranks, keys: Sequence[Hashable] | None = None,
                folds: int = 5, seed: int = 0) -> list[list[float]]:
    """A baseline's score of each response, fitted on the pairs of the other folds' prompts; lists in the order of `ranks`.

    `keys` name the prompts (default: each entry is its own); pairs of equal ones are never on both sides. Scores of different folds
    come from different fits: only those of one prompt compare. Raises ValueError for fewer prompts than folds and as `learned_scores`.
    """
    place = deal(keys or range(len(ranks)), folds, seed)
    scores: list[list[float]] = [[] for _ in ranks]
    for fold in range(folds):
        train, rest = ([i for i, at in enumerate(place) if (at == fold) is out] for out in (False, True))
        found = learned_scores(name, [responses[i] for i in train], [ranks[i] for i in train], [responses[i] for i in rest])
        for i, own in zip(rest, found, strict=True):
            scores[i] = own
    return scores


def against_baselines(scores: Scores, ranks: Ranks, responses: Sequence[Sequence[Response]], keys: Sequence[Hashable] | None = None,
                      folds: int = 5, seed: int = 0, train: tuple[Sequence[Sequence[Response]], Ranks] | None = None,
                      ) -> dict[str, Accuracy | Figure]:
    """`baseline_<name>_accuracy` of every baseline and `gain_over_<name>`, the paired lead of `scores` on the same pairs.

    The baselines learn from the other folds or, where there is `train` (responses and ranks of other prompts), from that alone: a
    model that was trained on it is then held against judges that knew as much.
    """
    mine = together(judged(scores, ranks), keys)
    figures: dict[str, Accuracy | Figure] = {}
    for name in BASELINES:
        own = learned_scores(name, *train, responses) if train else out_of_fold(name, responses, ranks, keys, folds, seed)
        theirs = together(judged(own, ranks), keys)
        figures[f"baseline_{name}_accuracy"] = accuracy(theirs)
        difference, low, high = accuracy_difference(mine, theirs)
        figures[f"gain_over_{name}"] = Figure(difference, sum(map(len, theirs)), low, high)
    return figures
