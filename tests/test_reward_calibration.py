import math
import random

import pytest

from prompts.intervals import wilson
from reward.calibration import (
    accuracy,
    accuracy_by,
    accuracy_by_distance,
    accuracy_by_length,
    accuracy_difference,
    calibration,
    deal,
    fit_temperature,
    fitted,
    judged,
    length_correlation,
    reliability,
    together,
)


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


def paired(values):
    """Scores and ranks with the given differences, better less worse, one prompt each."""
    return [[d, 0.0] for d in values], [[1, 2]] * len(values)


def test_accuracy_by_source_and_by_which_is_longer():
    scores, ranks = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [3.0, 2.0]], [[1, 2], [1, 2], [1, 2], [1, 1]]
    found = accuracy_by(["a", "a", "b", "c"], scores, ranks)
    assert {name: (a.value, a.n) for name, a in found.items()} == {"a": (0.5, 2), "b": (1.0, 1)}  # of c all tie
    once = accuracy_by(["a"] * 4, scores, ranks, ["p", "p", "p", "q"])["a"]  # three rankings of one prompt
    assert once.num_prompts == 1 and once.n == 3
    lengths = accuracy_by_length(scores, ranks, [[3, 5], [5, 3], [3, 3], [1, 2]])
    assert {name: (a.value, a.n) for name, a in lengths.items()} == {"shorter": (1.0, 1), "longer": (0.0, 1), "equal": (1.0, 1)}


def test_reliability_shows_the_bins_of_the_error():
    found = reliability([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]], [[1, 2], [1, 2], [1, 2]], bins=2)
    assert found == [(0.5, 0.75, 1, 0.5, 0.5), (0.75, 1.0, 2, pytest.approx(0.75), 0.5)]
    ece = sum(b.n * abs(b.right - b.confidence) for b in found) / 3
    assert calibration([[0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]], [[1, 2], [1, 2], [1, 2]], bins=2).ece == pytest.approx(ece)


def test_temperature_by_hand_and_at_its_limits():
    # Differences of +-d, a share p of them right: sigmoid(d / T) = p is likeliest, so T = d / log(p / (1 - p)).
    assert fit_temperature([2.0] * 3 + [-2.0]) == pytest.approx(2 / math.log(3), rel=1e-4)
    assert fit_temperature([20.0] * 3 + [-20.0]) == pytest.approx(20 / math.log(3), rel=1e-4)  # of any scale
    assert fit_temperature([1.0, 2.0]) == pytest.approx(math.sqrt(2.5) / 1000, rel=1e-2)
    assert fit_temperature([-1.0, -2.0, 0.5]) > 100
    with pytest.raises(ValueError, match="2 score differences that are all 0"):
        fit_temperature([0.0, 0.0])


def calibrated(n, seed, factor=1.0):
    """Differences whose sigmoid is the chance of being right, times a factor that spoils this."""
    rng = random.Random(seed)
    drawn = [rng.uniform(-3, 3) for _ in range(n)]
    return paired([factor * (d if rng.random() < 1 / (1 + math.exp(-d)) else -d) for d in drawn])


def test_fitting_a_temperature_mends_scores_that_are_too_large():
    scores, ranks = calibrated(4000, 0, factor=5)
    mended, temperatures = fitted(scores, ranks)
    before, after = calibration(scores, ranks), calibration(mended, ranks)
    assert len(temperatures) == 5 and temperatures == pytest.approx([5] * 5, rel=0.1)
    assert before.ece > 0.15 and before.ece_interval[0] > 0.1 and after.ece < 0.03 and after.ece_interval[0] < 0.02
    assert after.brier < before.brier and judged(mended, ranks) == judged(scores, ranks)


def test_a_temperature_is_never_fitted_on_what_it_is_applied_to():
    scores, ranks = calibrated(40, 1)
    keys = [i // 2 for i in range(40)]  # prompts that come twice
    place = deal(keys, 5)
    assert all(place[i] == place[i + 1] for i in range(0, 40, 2)) and sorted(map(place.count, range(5))) == [8] * 5
    _, before = fitted(scores, ranks, keys)
    other = [[-99 * s for s in row] if at == 3 else row for row, at in zip(scores, place, strict=True)]
    _, after = fitted(other, ranks, keys)
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, False, False, True, False]


@pytest.mark.parametrize(("factor", "bins"), [(1.0, 10), (2.0, 10)])
def test_the_interval_of_the_calibration_error_covers_the_truth(factor, bins):
    """The truth of these bins, from a hundred thousand pairs; samples of 300, whose plain error lies above it."""
    truth = sum(b.n * abs(b.right - b.confidence) for b in reliability(*calibrated(100_000, 1234, factor), bins)) / 100_000
    found = [calibration(*calibrated(300, seed, factor), bins) for seed in range(40)]
    assert sum(f.ece_interval[0] <= truth <= f.ece_interval[1] for f in found) >= 34  # 38 nominal


def test_length_correlation_within_prompts():
    # Within each prompt the longer scores lower, though prompts with long responses score higher.
    scores, lengths = [[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]], [[6, 5, 4], [60, 50, 40]]
    assert length_correlation(scores, lengths).value == pytest.approx(-1) and length_correlation(scores, lengths).n == 6
    # Centred ranks (-1, 0, 1) against (-1, 1, 0) and against all equal: products 1, squares 2 + 2 and 2 + 0.
    found = length_correlation([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [[1, 3, 2], [5, 5, 5]])
    assert found.value == pytest.approx(1 / math.sqrt(4 * 2))
    noise = random.Random(0)
    none = [length_correlation(*([[noise.random() for _ in range(4)] for _ in range(50)] for _ in "xy")) for _ in range(60)]
    assert sum(f.low < 0 < f.high for f in none) >= 53 and none[0].high - none[0].low < 0.4
    with pytest.raises(ValueError, match="no correlation"):
        length_correlation([[1.0, 1.0]], [[3, 4]])


def test_rankings_of_one_prompt_are_one_prompt_in_every_interval():
    """Each thrice, as by three annotators who agree: the figures stay, and no interval gets narrower."""
    rng = random.Random(3)
    scores = [[rng.gauss(0, 1) for _ in range(4)] for _ in range(40)]
    ranks, lengths = [rng.sample(range(1, 5), 4) for _ in range(40)], [[rng.randint(1, 9) for _ in range(4)] for _ in range(40)]
    keys = list(range(40)) * 3

    def measured(scores, ranks, lengths, keys=None):
        found = calibration(scores, ranks, keys=keys)
        return [*accuracy(together(judged(scores, ranks), keys))[2:], *found.ece_interval, *found.brier_interval,
                *length_correlation(scores, lengths, keys)[2:], *accuracy_by_length(scores, ranks, lengths, keys)["shorter"][2:]]

    assert measured(scores * 3, ranks * 3, lengths * 3, keys) == pytest.approx(measured(scores, ranks, lengths), abs=1e-9)
    assert accuracy(judged(scores * 3, ranks * 3)).num_prompts == 120  # without keys each ranking counts as a prompt
