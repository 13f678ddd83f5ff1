import math
import random

import pytest

from prompts.intervals import wilson
from reward.calibration import accuracy, accuracy_by_distance, accuracy_difference, calibration, judged


def test_accuracy_counts_pairs_of_different_rank_and_halves_equal_scores():
    outcomes = judged([[3.0, 1.0, 1.0], [0.0, 0.0]], [[1, 2, 3], [1, 2]])
    assert outcomes == [[1.0, 1.0, 0.5], [0.5]]
    assert accuracy(outcomes).value == pytest.approx(3 / 4) and accuracy(outcomes).n == 4 and accuracy(outcomes).num_prompts == 2


def test_by_rank_distance():
    found = accuracy_by_distance([[3.0, 1.0, 2.0]], [[1, 2, 3]])
    assert {d: (a.value, a.n) for d, a in found.items()} == {1: (0.5, 2), 2: (1.0, 1)}


def test_independent_pairs_get_wilsons_interval_and_repeated_ones_the_width_of_their_prompts():
    rng = random.Random(1)
    single = [[float(rng.random() < 0.7)] for _ in range(400)]
    one = accuracy(single)
    assert (one.low, one.high) == pytest.approx(wilson(one.value * 400, 400), abs=2e-3)
    copied = accuracy([row * 10 for row in single])  # ten copies of each outcome say no more than one
    assert copied.n == 4000 and copied.high - copied.low == pytest.approx(one.high - one.low, rel=0.02)


def test_a_perfect_score_keeps_an_interval_by_prompts():
    best = accuracy([[1.0, 1.0, 1.0], [1.0]])
    assert best.value == best.high == 1.0 and best.low == pytest.approx(wilson(2, 2)[0])


def test_the_interval_covers_the_truth_of_clustered_pairs():
    rng = random.Random(0)
    covered = 0
    for _ in range(200):
        outcomes = []
        for _ in range(60):
            p = rng.choice([0.4, 1.0])  # pairs of a prompt succeed or fail together; the mean is .7
            outcomes.append([float(rng.random() < p) for _ in range(10)])
        a = accuracy(outcomes)
        covered += a.low <= 0.7 <= a.high
    assert covered >= 180  # 95 % nominal; 600 independent pairs would cover 66 %


def test_difference_is_paired_by_prompt():
    first, second = [[1.0, 1.0], [1.0], [0.0]], [[1.0, 0.0], [1.0], [0.0]]
    difference, low, high = accuracy_difference(first, second)
    assert difference == pytest.approx(0.25) and low < 0 < high
    assert accuracy_difference(first, first)[0] == 0


def test_calibration_of_hand_made_differences():
    # sigmoid(0) = .5, right by half; sigmoid(log 3) = .75, right; sigmoid(-log 3) = .25, wrong at confidence .75
    found = calibration([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]], [[1, 2], [1, 2], [1, 2]], bins=2)
    assert found.brier == pytest.approx((0.25 + 0.0625 + 0.5625) / 3)
    assert found.ece == pytest.approx((abs(0.5 - 0.5) + abs(1.0 - 1.5)) / 3)  # bins [.5, .75) and [.75, 1]
    assert found.n == 3


def test_nothing_to_judge_is_an_error_not_a_number():
    with pytest.raises(ValueError, match="tie"):
        accuracy(judged([[1.0, 2.0]], [[1, 1]]))
    with pytest.raises(ValueError, match="tie"):
        calibration([[1.0, 2.0]], [[1, 1]])
