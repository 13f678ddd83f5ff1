"""Paired tests and intervals on numbers worked by hand, and the coverage they promise."""
import numpy as np
import pytest

from prompts.intervals import wilson
from stages.evals.statistics import bootstrap_mean, compare, mcnemar, paired_wilson


def test_mcnemar_by_hand():
    assert mcnemar(1, 5) == pytest.approx(2 * (1 + 6) / 64)  # two-sided binomial: 2 P(X <= 1), X ~ B(6, 1/2)
    assert mcnemar(5, 1) == mcnemar(1, 5)
    assert mcnemar(3, 3) == 1.0 and mcnemar(0, 0) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 / 1024)


def test_paired_interval_by_hand():
    # every pair differs: margins vanish, so phi is 0; Wilson of 10/10 is [n/(n+z2), 1] and of 0/10 [0, z2/(n+z2)], z2 = 3.8415
    low, high = paired_wilson(0, 10, 0, 0)
    assert low == pytest.approx(1 - 2 ** 0.5 * 3.841459 / 13.841459, abs=1e-6) and high == pytest.approx(1.0)
    # no pair differs: phi = (25 - 10/2) / 25 = .8, both intervals are .5 +- .26341, so the half width is .26341 sqrt(2 - 1.6)
    low, high = paired_wilson(5, 0, 0, 5)
    assert (low, high) == pytest.approx((-0.16660, 0.16660), abs=1e-4)


def test_paired_interval_covers():
    rng = np.random.default_rng(0)
    shares, truth = [0.5, 0.2, 0.1, 0.2], 0.1
    hits = 0
    for counts in rng.multinomial(150, shares, size=800):
        low, high = paired_wilson(*map(int, counts))
        hits += low <= truth <= high
    assert 0.93 <= hits / 800 <= 0.98


def test_compare_counts_pairs():
    result = compare([1, 1, 1, 0, 0], [1, 0, 0, 1, 0])
    assert result["difference"] == pytest.approx(0.2) and (result["only_a"], result["only_b"], result["n"]) == (2, 1, 5)
    assert result["p"] == 1.0 and result["ci95"] == paired_wilson(1, 2, 1, 1)
    shares = compare([1.0, 0.0, 1.0, 1.0], [0.5, 0.25, 0.75, 1.0])
    assert shares["p"] is None and shares["difference"] == pytest.approx(0.125) and shares["ci95"][0] < 0.125 < shares["ci95"][1]
    with pytest.raises(ValueError, match="equally many"):
        compare([1], [1, 0])


def test_bootstrap_has_the_width_of_the_mean():
    values = list(np.random.default_rng(1).random(400))
    low, high = bootstrap_mean(values)
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 20, rel=0.1)
    assert bootstrap_mean(values) == (low, high)  # seeded
    assert bootstrap_mean([0.5] * 10) == (0.5, 0.5)


def test_wilson_as_used_here():
    assert wilson(0, 24)[1] == pytest.approx(0.13798, abs=1e-4)  # not the zero width that a normal interval reports
