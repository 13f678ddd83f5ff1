"""Tasks of the reasoning-gym package: its scorers are trusted for nothing but a whole point, and not where they give it for anything.

The package is an optional extra: what needs it is skipped without it. The guard is tested on a stand-in of the package as well.
"""
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from reward import puzzles
from reward.verifiers import right
from stages.data.problems import load_problems

needs_package = pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="reasoning_gym is not installed")


@pytest.fixture
def stand_in(monkeypatch):
    """A package with the generators that a test puts into it: name -> scorer(answer, gold)."""
    scorers = {}

    def create_dataset(name, *, size, seed, **settings):
        if settings:
            raise TypeError(f"unexpected {min(settings)}")
        return SimpleNamespace(
            score_answer=lambda answer, entry: scorers[name](answer, entry["answer"]),
            entries=[{"question": f"number {seed + i}?", "answer": str(seed + i), "metadata": {}} for i in range(size)])

    class Dataset:
        def __init__(self, made):
            self.entries, self.score_answer = made.entries, made.score_answer

        def __getitem__(self, i):
            return self.entries[i]

    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    package.create_dataset = lambda *given, **more: Dataset(create_dataset(*given, **more))
    factory.DATASETS = scorers
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)
    monkeypatch.setattr(puzzles.importlib.util, "find_spec", lambda name: object())
    puzzles._dataset.cache_clear()
    yield scorers
    puzzles._dataset.cache_clear()


def test_only_a_whole_point_counts_and_a_scorer_that_fails_gives_none(stand_in):
    stand_in["half"] = lambda answer, gold: 1.0 if answer == gold else 0.99 if answer.startswith("1") else int(answer)
    rows = load_problems("reasoning_gym:half?size=3&seed=12", hub_split="test")
    assert [row["answer"] for row in rows] == ["12", "13", "14"] and rows[0]["verifier"] == "reasoning_gym"
    assert right(rows[0], "12") and not right(rows[0], "13") and not right(rows[0], "many") and not right(rows[0], None)
    train = load_problems("reasoning_gym:half?size=3&seed=12", hub_split="train")
    assert {row["question"] for row in train}.isdisjoint(row["question"] for row in rows)


@pytest.mark.parametrize("scorer, message", [
    (lambda answer, gold: 1.0, "problem 0: its scorer accepts '' where the answer is '12'"),
    (lambda answer, gold: float(gold in answer), "problem 0: its scorer accepts 'number 12\\?' where the answer is '12'"),
    (lambda answer, gold: .5, "problem 0: its scorer does not give 1 for its own answer '12'")])
def test_scorers_are_tried_on_junk_before_they_are_trusted(stand_in, scorer, message):
    stand_in["new"] = scorer
    with pytest.raises(ValueError, match=message):
        load_problems("reasoning_gym:new?size=3&seed=12", hub_split="test")


@pytest.mark.parametrize("spec, message", [
    ("reasoning_gym:coin_flip", r"the scorer of coin_flip accepts \"0\", 96 of 100"),
    ("reasoning_gym:rush_hour", "rush_hour gives no answer with its problems"),
    ("reasoning_gym:nothing", "has no generator 'nothing': choose from fine"), ("reasoning_gym:fine?size=0", "size is 0"),
    ("reasoning_gym:fine?levels=3", "refuses its settings .*levels.*: unexpected levels"),
    ("reasoning_gym:fine?size", "write settings as")])
def test_what_is_refused(stand_in, spec, message):
    stand_in["fine"] = lambda answer, gold: float(answer == gold)
    with pytest.raises(ValueError, match=message):
        load_problems(spec, hub_split="test")


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(puzzles.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"reasoning_gym is not installed: .*requirements-reasoning-gym\.lock"):
        load_problems("reasoning_gym:leg_counting", hub_split="test")


@needs_package
@pytest.mark.parametrize("name", ["leg_counting", "chain_sum", "spell_backward", "countdown", "puzzle24", "course_schedule"])
def test_generators_of_the_package(name):
    rows = load_problems(f"reasoning_gym:{name}?size=20&seed=3", hub_split="test")
    assert len(rows) == 20 and all(right(row, row["answer"]) and not right(row, "junk") for row in rows)
    assert rows == json.loads(json.dumps(rows)) == load_problems(f"reasoning_gym:{name}?size=20&seed=3", hub_split="test")


@needs_package
def test_settings_reach_the_generator():
    (row,) = load_problems("reasoning_gym:chain_sum?size=1&min_terms=6&max_terms=6", hub_split="test")
    assert len([part for part in row["question"].split() if part in "+-"]) == 5


@needs_package
@pytest.mark.parametrize("name", sorted(puzzles.ACCEPTS_JUNK))
def test_the_deny_list_is_still_needed(name):
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, size=100, seed=7 if name == "gsm_symbolic" else 11)
    entries = [dataset[i] for i in range(100)]
    accepted = [junk for entry in entries for junk in (*puzzles.JUNK, entry["question"])
                if dataset.score_answer(answer=junk, entry=entry) == 1.0 and junk.strip().casefold() != entry["answer"].casefold()]
    assert accepted, f"{name} accepts no junk any more: take it off the list"
