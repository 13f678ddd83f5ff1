"""Problems of the reasoning-gym package (Stojanovski et al. 2025, an optional extra) and its scorers, guarded.

Written `reasoning_gym:leg_counting?size=200&seed=1`; settings other than these two go to the generator's own configuration.

A scorer of the package gives part of a point for much that is wrong; only exactly 1 counts here. Some give it for anything. Each
generator of `MEASURED` was asked to score, on up to 100 of its problems, texts that answer nothing: empty, one space, 0, 1, yes, no, True,
False, [], {}, None, A, words, the question itself. Those that gave 1 where the answer was another are in `ACCEPTS_JUNK`; those that have no
answer of their own, which nothing can be tested with, are in `NO_ANSWER`. As versions differ, the problems taken are tested again.
"""
import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from typing import Any

MEASURED = "reasoning-gym 0.1.25"
ACCEPTS_JUNK = {"game_of_life_halting": "any text, 100 of 100 (it compares the truth values of two texts)",
                "coin_flip": "\"0\", 96 of 100 (the beginning of a probability is enough)",
                "sokoban": "its own question, 1 of 87 (it picks the moves out of any text)",
                "gsm_symbolic": "its own question, 10 of 400 (it takes the first number of any text)",
                "codeio": "{} for [], 1 of 100"}
NO_ANSWER = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
JUNK = ("", " ", "0", "1", "yes", "no", "True", "False", "[]", "{}", "None", "A", "lorem", "table seven green")
TRAIN_SEED = 1_000_000  # added to the seed for the split that examples come from


def make(name: str, settings: Mapping[str, str], split: str) -> Iterator[tuple[str, dict]]:
    """`size` (100) problems of one generator with where each comes from.

    Raises ValueError where the package is missing, for a generator that it does not have or that is not to be trusted, and for settings
    that it refuses.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("reasoning_gym is not installed: .venv/bin/pip install -c requirements.lock -r requirements-reasoning-gym.lock, "
                         "or leave the task out")
    if name in ACCEPTS_JUNK:
        raise ValueError(f"the scorer of {name} accepts {ACCEPTS_JUNK[name]} ({MEASURED}): its accuracy would mean nothing; choose another")
    if name in NO_ANSWER:
        raise ValueError(f"{name} gives no answer with its problems ({MEASURED}), so its scorer cannot be tested: choose another")
    from reasoning_gym.factory import DATASETS
    if name not in DATASETS:
        raise ValueError(f"reasoning_gym has no generator {name!r}: choose from {', '.join(sorted(DATASETS))}")
    given = {key: _read(value) for key, value in settings.items()}
    size, seed = given.pop("size", 100), given.pop("seed", 0)
    if type(size) is not int or type(seed) is not int or size < 1 or seed < 0:
        raise ValueError(f"reasoning_gym:{name}: size is {size!r} and seed {seed!r}: give whole numbers, size 1 or more")
    written = json.dumps(given, sort_keys=True)
    dataset = _dataset(name, written, size, seed + (TRAIN_SEED if split != "test" else 0))
    for i in range(size):
        entry = dataset[i]
        row = {"question": str(entry["question"]), "answer": str(entry["answer"]), "answer_type": "string", "verifier": "reasoning_gym",
               "generator": name, "settings": written, "entry": json.loads(json.dumps(entry))}
        where = f"reasoning_gym:{name}, problem {i}"
        if not right(row, row["answer"]):
            raise ValueError(f"{where}: its scorer does not give 1 for its own answer {row['answer']!r:.40}: choose another generator")
        wrong = [junk for junk in (*JUNK, row["question"]) if right(row, junk) and not _same(junk, row["answer"])]
        if wrong:
            raise ValueError(f"{where}: its scorer accepts {wrong[0]!r:.40} where the answer is {row['answer']!r:.40}: choose another")
        yield where, row


def right(row: Mapping[str, Any], answer: str) -> bool:
    """Whether the generator's own scorer gives an answer to its problem exactly 1; one that fails on the answer does not."""
    scorer = _dataset(row["generator"], row["settings"], 1, 0)
    try:
        return scorer.score_answer(answer=answer, entry=row["entry"]) == 1.0
    except Exception:  # scorers parse whatever the model wrote and raise what they like
        return False


@functools.lru_cache(maxsize=64)
def _dataset(name: str, settings: str, size: int, seed: int) -> Any:
    import reasoning_gym
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **json.loads(settings))
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"reasoning_gym:{name} refuses its settings {settings}: {error}") from None


def _read(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _same(a: str, b: str) -> bool:
    return a.strip().casefold() == b.strip().casefold()
