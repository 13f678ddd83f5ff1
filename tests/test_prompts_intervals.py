import pytest

from prompts.intervals import mean_interval, share_interval, wilson


def test_wilson_agrees_with_a_hand_computation():
    # 8 of 10: centre (0.8 + 3.8415/20) / 1.38415 = 0.71674, half 1.95996 sqrt(.016 + 3.8415/400) / 1.38415 = 0.22659
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=2e-5)


def test_wilson_has_width_at_the_ends_and_knows_nothing_of_nothing():
    low, high = wilson(0, 24)
    assert low == 0 and 0.13 < high < 0.15
    assert wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson(11, 10)


def test_mean_interval_is_students():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])  # standard error 1/sqrt(3), t(2) = 4.30265
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.48414, 2 + 2.48414), abs=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        mean_interval([1.0])


def test_interval_of_shares_counts_independent_trials_and_stays_inside():
    # variance of the mean 1/6 / 4 = 1/24, p (1 - p) = 1/4: as much as six independent trials, three of them right
    assert share_interval([1.0, 0.5, 0.0, 0.5]) == pytest.approx((0.5, *wilson(3, 6)))
    assert share_interval([0.0, 1.0] * 50)[1:] == pytest.approx(wilson(49.5, 99))
    assert share_interval([1.0] * 10)[1:] == pytest.approx(wilson(10, 10))
    assert mean_interval([1.0] * 9 + [0.75])[2] > 1 > share_interval([1.0] * 9 + [0.75])[2]
