"""The study on human preferences: judges are compared on the same pairs, out of fold. No stage runs here."""
import random
from types import SimpleNamespace

import pytest

from reward.baselines import BASELINES
from stages.evals.study_hh import arguments, report, transcript


def test_the_reward_model_is_compared_on_the_same_pairs():
    rng = random.Random(0)
    rows, scores = [], []
    for number in range(80):
        good, bad = "a " * rng.randint(2, 9), "b " * rng.randint(2, 9)  # words tell them apart, length does not
        rows.append({"ranks": [1, 2], "responses": [good, bad]})
        scores.append([1.0, 0.0] if number % 4 else [0.0, 1.0])
    told = report(scores, rows, [(number,) for number in range(80)], SimpleNamespace(folds=5, seed=0))
    figures = told["figures"]
    assert set(figures) == {"reward model", *BASELINES}
    assert figures["reward model"]["accuracy"]["value"] == 0.75 and figures["tfidf"]["accuracy"]["value"] == 1.0
    assert 0.2 < figures["length"]["accuracy"]["value"] < 0.8
    assert figures["tfidf"]["lead"][0] == pytest.approx(-0.25) and figures["reward model"]["lead"] == (0, 0, 0)
    assert "| reward model | 0.750 [" in told["table"] and "better response shorter" in told["table"]


def test_what_is_pretrained_on():
    assert transcript([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]) == "User: Hi\n\nAssistant: Hello"
    assert arguments([]).folds == 5
