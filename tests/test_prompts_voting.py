"""Votes and stopping rules on counts worked by hand."""
import random
import time

import pytest

from prompts.voting import binomial_p, majority, probability_ahead, stopper


def stops(spec, answers):
    """After how many answers the rule stops; None when it never does."""
    rule = stopper(spec)
    return next((k for k in range(len(answers) + 1) if rule(answers[:k])), None)


def test_votes_are_of_the_type():
    assert majority(["18.0", "18", "19", "B"], "number").counts == {"18": 2, "19": 1}
    assert majority(["18.0", "18", "19"], "string").counts == {"18.0": 1, "18": 1, "19": 1}
    vote = majority(["(4+8)*2", "[invalid]", "24", None], "expression")
    assert (vote.answer, vote.counts, vote.abstained, vote.tie) == ("(4+8)*2", {"24": 2}, 2, False)


def test_weights():
    assert majority(["1", "1", "2"], weights=[0.2, 0.3, 0.6]).answer == "2"
    vote = majority(["1", "2", "1", None], weights=[0.1, 0.3, 0.2, 5.0])  # .1 + .2 is .3 but for rounding; an abstention weighs nothing
    assert (vote.answer, vote.tie, vote.counts) == ("1", True, {"1": 2, "2": 1})
    assert majority(["2", "1"], weights=[0, 0]).tie and majority(["2", "1"], weights=[1, 1]) == majority(["2", "1"])
    for weights, message in [([1.0], "1 weights for 2 answers"), ([1.0, -2.0], "the weight -2.0"), ([1.0, float("nan")], "the weight nan")]:
        with pytest.raises(ValueError, match=message):
            majority(["1", "2"], weights=weights)


def test_beta_by_hand():
    # P(p > 1/2) for Beta(a + 1, b + 1) is P(at most a heads of a + b + 1 tosses): 1 - 1/16 for (3, 0), 1 - 8/128 for (5, 1)
    assert [probability_ahead(*votes) for votes in [(0, 0), (3, 0), (4, 0), (5, 1), (2, 2)]] == pytest.approx(
        [0.5, 15 / 16, 31 / 32, 15 / 16, 0.5])
    assert stops("beta:0.95", ["1"] * 9) == 4 and stops("beta:0.9", ["1"] * 9) == 3
    assert stops("beta:0.95", ["1", None, None, "1", "1", "1"]) == 6  # abstentions are no votes
    assert stops("beta:0.95", ["2", "1", "1", "1", "1", "1", "1"]) == 7  # 6 against 1: 1 - 9/256
    assert stops("beta:0.95", ["2", "3", "1", "1", "1", "1", "1", "1"]) == 8  # the runner-up alone counts, not both others
    assert stops("beta:0.95", ["1", "2"] * 20) is None and stops("beta:0.95", [None] * 20) is None


def test_windows_do_not_overlap():
    assert stops("window:3", ["1", "1", "1", "2"]) == 3
    assert stops("window:3", ["2", "1", "1", "1", "1", "1"]) == 6  # three alike at 2 to 4 are no window
    assert stops("window:3", ["1", None, "1", None, None, None, "1", "1"]) is None


def test_binomial_by_hand():
    assert [binomial_p(*votes) for votes in [(0, 0), (5, 0), (6, 0), (7, 1), (2, 2)]] == pytest.approx([1, 2 / 32, 2 / 64, 18 / 256, 1])
    assert stops("binomial:0.05", ["1"] * 9) == 6 and stops("binomial:0.0625", ["1"] * 9) == 5  # two-sided, and at the level itself
    assert binomial_p(3000, 0) == 0 and binomial_p(1500, 1500) == 1  # beyond the range of floats
    assert stops("none", ["1"] * 100) is None
    begun = time.process_time()
    assert all(0 < binomial_p(k, k + 9) <= 1 for k in range(600))  # every look at a question of 1,200 samples
    assert time.process_time() - begun < 1


def test_the_level_holds_at_one_look_only():
    """The docstring's 15 %: two equally likely answers, a look after each of 40 samples."""
    draw, rule = random.Random(0), stopper("binomial:0.05")
    runs = [draw.choices("12", k=40) for _ in range(1500)]
    assert sum(rule(run) for run in runs) / 1500 < 0.055
    early = sum(any(rule(run[:k]) for k in range(41)) for run in runs) / 1500
    assert early == pytest.approx(0.1535, abs=0.03)


@pytest.mark.parametrize("spec", ["", "beta", "beta:", "beta:1", "beta:0.4", "beta:nan", "window:1", "window:2.5", "binomial:0",
                                  "binomial:1", "none:1", "Beta:0.95"])
def test_unknown_rules(spec):
    with pytest.raises(ValueError, match=f"unknown stopping rule '{spec}': expected beta:0.95"):
        stopper(spec)
