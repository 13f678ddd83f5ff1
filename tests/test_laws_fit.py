"""The law's fit: gradient, recovery of known constants, two roads to one minimum, intervals, warnings, bad input."""
import json
import math
import time

import numpy as np
import pytest
from scipy.optimize import approx_fprime

from stages.laws import objective as objective_module
from stages.laws.fit import (
    FORMS,
    PARAMETERS,
    cross_check,
    expected,
    fit_law,
    formula,
    law,
    predict,
    refuse_far,
    resampled,
)
from stages.laws.holdout import holdout, rolling, widened
from stages.laws.objective import DELTA, huber, log_loss, minimise, objective, project
from stages.laws.planner import plan
from stages.laws.product import fit_product

TRUE = (0.3, 20.0, 300.0, 0.4, 0.5)
SIZES, BUDGETS = np.repeat([5e4, 1e5, 2e5, 5e5], 3), np.tile([3e5, 6e5, 1.2e6], 4)


def test_law_and_huber_by_hand():
    assert law((1.0, 8.0, 27.0, 0.5, 1 / 3), 16.0, 27.0) == pytest.approx(1 + 2 + 9)
    assert huber(np.array([0.0, 1e-3, -3e-3])) == pytest.approx([0.0, 0.5e-6, 1e-3 * 2.5e-3])


def test_log_loss_is_the_log_of_the_law():
    theta = np.array([[np.log(TRUE[0]), np.log(TRUE[1]), np.log(TRUE[2]), *TRUE[3:]]])
    assert np.exp(log_loss(theta, np.log(SIZES), np.log(BUDGETS))[0][0]) == pytest.approx(law(TRUE, SIZES, BUDGETS))


def test_gradient_is_analytic():
    x, y = np.log(SIZES / 1.5e5), np.log(BUDGETS / 6e5)
    target = np.log(law(TRUE, SIZES, BUDGETS))
    theta = np.array([-1.0, -1.3, -0.9, 0.35, 0.6])
    weights = np.linspace(0.5, 2, 12)
    numeric = approx_fprime(theta, lambda t: objective(t, x, y, target, weights)[0], 1e-7)
    assert objective(theta, x, y, target, weights)[1] == pytest.approx(numeric, rel=1e-4, abs=1e-2)


def test_recovers_exact_constants_and_predicts():
    fit = fit_law(SIZES, BUDGETS, law(TRUE, SIZES, BUDGETS), num_draws=20)
    assert [fit[name] for name in PARAMETERS] == pytest.approx(TRUE, rel=1e-4)
    assert fit["objective"] < 1e-12
    value, (low, high) = predict(fit, 9e5, 1.6e6)
    assert value == pytest.approx(law(TRUE, 9e5, 1.6e6), rel=1e-6)
    assert low <= value * (1 + 1e-9) and value <= high * (1 + 1e-9)


def test_a_known_floor_is_kept_and_decides_far_predictions():
    N, D = (grid.ravel() for grid in np.meshgrid([1e5, 2e5, 4e5], [2e5, 4e5, 8e5]))
    constants = [1.2, 30.0, 900.0, 0.4, 0.55]
    loss = law(constants, N, D) * np.exp(np.random.default_rng(0).normal(0, 0.01, len(N)))
    known, fitted = (fit_law(N, D, loss, floor=floor, num_draws=20) for floor in (1.2, None))
    assert known["E"] == pytest.approx(1.2) and known["intervals"]["E"] == pytest.approx([1.2, 1.2])
    assert known["conventions"]["E"] == "known beforehand" and fitted["conventions"]["E"] == "fitted"
    target = float(law(constants, 1e9, 1e9))
    assert abs(predict(known, 1e9, 1e9)[0] / target - 1) < 0.05 < abs(predict(fitted, 1e9, 1e9)[0] / target - 1)
    with pytest.raises(ValueError, match="lowest loss"):
        fit_law(N, D, loss, floor=float(loss.min()))


def test_a_product_is_found_exactly_and_predicts():
    true = 0.4 + 50 / (SIZES**0.3 * BUDGETS**0.25)
    found = fit_product(SIZES, BUDGETS, true, floor=0.4)
    assert (found["C"], found["a"], found["b"]) == pytest.approx((50, 0.3, 0.25), rel=1e-6) and found["sigma"] < 1e-9
    fit = fit_law(SIZES, BUDGETS, true, floor=0.4, form="product", num_draws=0)
    assert fit["product"] == found and fit["form"] == "product" and formula(fit) == "0.400 + 50 / (N^0.300 D^0.250)"
    far = 0.4 + 50 / (1e6**0.3 * 5e6**0.25)
    assert predict(fit, 1e6, 5e6)[0] == pytest.approx(far, rel=1e-6) == float(expected(fit, 1e6, 5e6))
    summed = fit_law(SIZES, BUDGETS, true, floor=0.4, num_draws=0)
    assert predict(summed, 1e6, 5e6)[0] != pytest.approx(far, rel=1e-3)  # the sum is another law
    assert holdout(SIZES, BUDGETS, true, floor=0.4, num_draws=0, form="product")["error_max"] < 1e-6
    assert not fit["warnings"] and fit["product"]["intervals"]["a"] == pytest.approx([0.3, 0.3], abs=1e-6)
    flat = fit_law(SIZES, BUDGETS, 0.4 + np.exp(0.1 * np.random.default_rng(0).standard_normal(12)) / BUDGETS**0.25, floor=0.4,
                   form="product", num_draws=0)
    assert flat["warnings"] == ["a is not determined: its interval holds 0"]  # the size decides nothing here
    with pytest.raises(ValueError, match="needs a known floor"):
        fit_law(SIZES, BUDGETS, true, form="product", num_draws=0)
    with pytest.raises(ValueError, match="no optimal split"):
        plan(fit, 1e13)


def test_the_mean_of_both_forms_lies_between_them_and_its_interval_holds_theirs():
    loss = 0.4 + 5000 / (SIZES**0.3 * BUDGETS**0.25) * np.exp(0.05 * np.random.default_rng(3).standard_normal(len(SIZES)))
    (total, ends), (product, others), (mean, interval) = (
        predict(fit_law(SIZES, BUDGETS, loss, floor=0.4, form=form, num_draws=50), 1e6, 5e6) for form in FORMS)
    assert total != pytest.approx(product, rel=1e-2) and mean == pytest.approx(math.sqrt(total * product), rel=1e-12)
    assert interval == (min(ends[0], others[0]), max(ends[1], others[1]))
    fit = fit_law(SIZES, BUDGETS, loss, floor=0.4, form="mean", num_draws=50)
    assert expected(fit, [1e6, 1e5], 5e6).shape == (2,) and formula(fit).startswith("geometric mean of 0.400 + ")
    assert holdout(SIZES, BUDGETS, loss, floor=0.4, num_draws=50, form="mean")["fit"]["form"] == "mean"
    with pytest.raises(ValueError, match="form mean: a product of powers needs a known floor"):
        fit_law(SIZES, BUDGETS, loss, form="mean", num_draws=0)
    with pytest.raises(ValueError, match="none in closed form"):
        plan(fit, 1e13)


def test_intervals_of_a_product_hold_the_share_they_name():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        noisy, new = (0.4 + 50 / (N**0.3 * D**0.25) * np.exp(0.15 * rng.standard_normal(np.shape(N)))
                      for N, D in ((SIZES, BUDGETS), (1e6, 2e6)))
        low, high = predict({"E": 0.4, "form": "product", "product": fit_product(SIZES, BUDGETS, noisy, floor=0.4)}, 1e6, 2e6)[1]
        inside += low < new < high
    assert 0.92 < inside / 300 < 0.98


def test_one_outlier_does_not_move_a_huber_fit():
    clean = law(TRUE, SIZES, BUDGETS)
    loss = clean.copy()
    loss[5] *= 1.2
    fit = fit_law(SIZES, BUDGETS, loss, num_draws=0)
    fitted = law([fit[name] for name in PARAMETERS], SIZES, BUDGETS)
    assert fitted == pytest.approx(clean, rel=2e-3)  # least squares would put the other runs several percent off
    assert predict(fit, 9e5, 1.6e6)[0] == pytest.approx(law(TRUE, 9e5, 1.6e6), rel=5e-3)


def test_twelve_points_are_quick_and_intervals_hold_most_new_runs():
    rng = np.random.default_rng(0)
    covered, began = 0, time.process_time()
    for _ in range(20):
        loss = law(TRUE, SIZES, BUDGETS) * np.exp(5e-3 * rng.standard_normal(12))
        fit = fit_law(SIZES, BUDGETS, loss, num_draws=200)
        _, (low, high) = predict(fit, 9e5, 1.6e6)
        covered += low <= law(TRUE, 9e5, 1.6e6) * np.exp(5e-3 * rng.standard_normal()) <= high
        assert (high - low) / low < 0.2
    assert covered >= 16  # nominal 19; parameters alone would hold far fewer
    assert time.process_time() - began < 20, "a ladder of 12 runs should fit in well under a second"


def test_few_degrees_of_freedom_lengthen_an_interval():
    fit = fit_law(SIZES, BUDGETS, noisy(), num_draws=200)
    many = fit | {"num_points": 10**6}
    (value, ends), (_, normal) = predict(fit, 9e5, 1.6e6), predict(many, 9e5, 1.6e6)
    factor = 2.3646 / 1.9600  # Student's 97.5 % quantile of seven degrees of freedom, tables
    assert np.log(np.array(ends) / value) == pytest.approx(factor * np.log(np.array(normal) / value), rel=1e-4)


def test_fit_is_json_and_repeats():
    loss = law(TRUE, SIZES, BUDGETS) * np.exp(5e-3 * np.random.default_rng(1).standard_normal(12))
    first, second = (fit_law(SIZES, BUDGETS, loss, num_draws=50, conventions={"N": "matmul parameters"}) for _ in range(2))
    assert first == second
    restored = json.loads(json.dumps(first, allow_nan=False))
    assert predict(restored, 9e5, 1.6e6) == predict(first, 9e5, 1.6e6)
    assert restored["conventions"]["N"] == "matmul parameters"
    assert set(restored) >= {*PARAMETERS, "objective", "num_points", "intervals", "conventions"}
    assert all(restored["intervals"][name][0] < restored["intervals"][name][1] for name in PARAMETERS)


@pytest.mark.parametrize(("change", "message"), [
    ({"loss": [1.0] * 11}, "12, 12, 11 and 12"), ({"loss": [1.0] * 11 + [float("nan")]}, "positive and finite"),
    ({"N": [1e5] * 12}, "1 sizes"), ({"D": [1e5] * 6 + [2e5] * 6}, "2 token budgets"), ({"loss": [-1.0] * 12}, "not -1"),
    ({"weights": [0.0] * 12}, "weights must be positive"), ({"runs": ["a"] * 11}, "11 names of runs"),
    ({"drop_worst": 7}, "12 runs of 4 sizes and 3 token budgets, less 7, cannot determine 5 parameters")])
def test_bad_input_is_named(change, message):
    values = {"N": SIZES, "D": BUDGETS, "loss": law(TRUE, SIZES, BUDGETS)} | change
    with pytest.raises(ValueError, match=message):
        fit_law(**values)


def noisy(N=SIZES, D=BUDGETS, sigma=5e-3, seed=0):
    return law(TRUE, N, D) * np.exp(sigma * np.random.default_rng(seed).standard_normal(len(N)))


def test_variable_projection_and_gauss_newton_meet():
    for seed in range(3):
        loss, x, y = noisy(seed=seed), np.log(SIZES / 1.5e5), np.log(BUDGETS / 6e5)
        (theta, value), (other, other_value) = (road(x, y, loss, np.ones(12), DELTA, None) for road in (minimise, project))
        assert other_value == pytest.approx(value, rel=1e-7)
        assert other[3:] == pytest.approx(theta[3:], rel=1e-3)
    fit = fit_law(SIZES, BUDGETS, loss, num_draws=0)
    assert cross_check(fit, SIZES, BUDGETS, loss)["excess"] < 1e-7
    assert cross_check({**fit, "objective": 1.1 * fit["objective"]}, SIZES, BUDGETS, loss)["excess"] == pytest.approx(0.1, rel=1e-5)


def test_neither_scale_nor_order_nor_unit_moves_the_fit(monkeypatch):
    loss, order = noisy(), np.random.default_rng(5).permutation(12)
    plain = fit_law(SIZES, BUDGETS, loss, num_draws=0)
    shuffled = fit_law(SIZES[order], BUDGETS[order], loss[order], num_draws=0)
    bits = fit_law(SIZES, BUDGETS, loss / math.log(2), num_draws=0)
    for scale in (1.0, 1e10):
        monkeypatch.setattr(objective_module, "SCALE", scale)
        scaled = fit_law(SIZES, BUDGETS, loss, num_draws=0)
        for other in (shuffled, bits, scaled):
            assert other["objective"] == pytest.approx(plain["objective"], rel=1e-9)
            assert [other["alpha"], other["beta"]] == pytest.approx([plain["alpha"], plain["beta"]], rel=1e-5)
    assert bits["E"] * math.log(2) == pytest.approx(plain["E"], rel=1e-5)


def test_a_weight_of_two_is_a_row_twice():
    loss, weights = noisy(), np.ones(12)
    weights[[2, 7]] = 2
    weighted = fit_law(SIZES, BUDGETS, loss, weights=weights, num_draws=0)
    twice = fit_law(*(np.append(values, values[[2, 7]]) for values in (SIZES, BUDGETS, loss)), num_draws=0)
    assert weighted["objective"] == pytest.approx(twice["objective"], rel=1e-9)
    assert weighted["alpha"] == pytest.approx(twice["alpha"], rel=1e-5)
    assert weighted["alpha"] != pytest.approx(fit_law(SIZES, BUDGETS, loss, num_draws=0)["alpha"], rel=1e-3)


def test_the_worst_rows_are_dropped_and_named():
    loss = law(TRUE, SIZES, BUDGETS)
    loss[[3, 8]] *= [1.3, 0.8]
    fit = fit_law(SIZES, BUDGETS, loss, drop_worst=2, num_draws=0)
    assert fit["dropped"] == [3, 8] and fit["num_points"] == 10
    assert [fit[name] for name in PARAMETERS] == pytest.approx(TRUE, rel=1e-4)


def test_what_a_run_shares_is_resampled_together():
    names, rng = np.repeat(["a", "b", "c", "d"], 3), np.random.default_rng(0)
    shared = np.repeat([-0.03, 0.01, 0.05, -0.03], 3)
    drawn = resampled(shared, names, 50, rng).reshape(50, 4, 3)
    assert drawn == pytest.approx(np.repeat(drawn[:, :, :1], 3, axis=2))  # nothing is left over within a run
    assert set(drawn.ravel().round(9)) == {-0.03, 0.01, 0.05}
    alone = resampled(shared, np.arange(12), 50, rng).reshape(50, 4, 3)
    assert (np.ptp(alone, axis=2) > 0).any()


def test_naming_the_runs_widens_intervals_of_clustered_losses():
    rng = np.random.default_rng(0)
    N, D = np.repeat(np.geomspace(5e4, 1e6, 12), 5), np.tile(np.geomspace(3e5, 3e6, 5), 12) * np.repeat(rng.uniform(0.7, 1.4, 12), 5)
    loss = law(TRUE, N, D) * np.exp(np.repeat(0.01 * rng.standard_normal(12), 5) + 0.002 * rng.standard_normal(60))
    widths = [np.diff(fit_law(N, D, loss, runs=runs, num_draws=200)["intervals"]["alpha"])[0]
              for runs in (np.repeat(np.arange(12), 5), None)]
    assert widths[0] > 1.4 * widths[1]  # in 40 such draws the interval held the true alpha 35 times with names, 23 without
    assert "too few" in fit_law(N, D, loss, runs=np.repeat(np.arange(6), 10), num_draws=0)["warnings"][-1]


def test_fits_that_cannot_be_trusted_say_why():
    rng = np.random.default_rng(0)
    N = np.geomspace(1e5, 1e7, 8)
    along = fit_law(N, 20 * N * rng.uniform(0.9, 1.1, 8), noisy(N, 20 * N, 2e-3), num_draws=50)["warnings"]
    assert "D/N spans a factor of" in along[0] and "not separately identified" in along[1]
    flat = fit_law(SIZES, BUDGETS, (0.3 + 300 / BUDGETS**0.5) * np.exp(3e-3 * rng.standard_normal(12)), num_draws=50)
    assert flat["at_bound"] or any("vanished" in text for text in flat["warnings"]), "the size decides nothing here"
    N, D = (grid.ravel() for grid in np.meshgrid(N, 10 * N))
    assert not fit_law(N, D, noisy(N, D), num_draws=50)["warnings"]


def test_far_extrapolation_is_refused_with_the_reason():
    fit = fit_law(SIZES, BUDGETS, noisy(), num_draws=0)
    refuse_far(fit, 5e6, 1.2e7, 1000)
    for N, D, what in ((5e9, 1e6, "N = 5e"), (1e5, 1e2, "D = 100"), (1e8, 1e9, "ND = 1e")):
        with pytest.raises(ValueError, match=what + r".* lies .* times outside the runs, .* raise --max-ratio"):
            refuse_far(fit, N, D, 1000)
    refuse_far(fit, 5e9, 1e6, 1e5)


def test_rolling_holdouts_measure_coverage():
    N, D = np.repeat(np.geomspace(5e4, 1e6, 6), 5), np.tile(np.geomspace(3e5, 6e6, 5), 6)
    right = rolling(N, D, noisy(N, D))
    wrong = rolling(N, D, (0.4 + 50 / (N**0.3 * D**0.25)) * np.exp(1e-3 * np.random.default_rng(0).standard_normal(30)))
    assert right["nominal"] == 0.95 and right["num_heldout"] == wrong["num_heldout"]
    assert right["num_heldout"] == sum(part["num_heldout"] for part in right["by_reach"])
    assert right["measured"] > 0.7 > 0.5 > wrong["measured"]  # another law: the intervals say nothing of it, the hold-outs do
    assert wrong["widening"] > 2 > right["widening"] >= 1
    assert rolling(N[:5], D[:5], noisy(N, D)[:5]) == {"nominal": 0.95, "measured": None, "num_heldout": 0, "by_reach": []}


def test_intervals_are_widened_by_what_hold_outs_of_their_reach_needed():
    near, far = ({"reach_max": reach, "widening": widening, "measured": 0.5, "num_heldout": 4}
                 for reach, widening in ((2.5, 1.0), (8.0, 3.0)))
    coverage = {"by_reach": [near, far]}
    assert widened(coverage, 0.5, 2.0, (1.8, 2.2))["interval"] == pytest.approx([1.8, 2.2])
    found = widened(coverage, 5.0, 2.0, (1.0, 4.0))
    assert found["interval"] == pytest.approx([0.25, 16]) and found["measured_so_far"]  # three times as long in log loss
    assert widened(coverage, 100.0, 2.0, (1.0, 4.0)) == {**found, "reach": 100.0, "measured_so_far": False}


def test_a_hold_out_may_ask_for_runs_far_away_only():
    N, D = np.repeat(np.geomspace(5e4, 1e6, 6), 5), np.tile(np.geomspace(3e5, 6e6, 5), 6)
    loss, flops, below = noisy(N, D), 6 * N * D, 6 * 1e6 * 6e6 / 4 * 1.0001
    far, all_above = (holdout(N, D, loss, below=below, reach=reach, num_draws=0) for reach in (4.0, 1.0))
    dearest = flops[flops < below].max()
    assert far["num_heldout"] == (flops >= 4 * dearest).sum() == 1 < all_above["num_heldout"] == (flops >= below).sum()
    assert far["num_fitted"] == all_above["num_fitted"] and far["fit"]["alpha"] == all_above["fit"]["alpha"]
    with pytest.raises(ValueError, match="and 0 above"):
        holdout(N, D, loss, below=below, reach=1e3, num_draws=0)


def test_a_run_is_never_both_fitted_and_held_out():
    N, D = np.repeat(np.geomspace(5e4, 1e6, 8), 3), np.tile([3e5, 1e6, 4e6], 8)
    loss, runs = noisy(N, D), np.repeat(np.arange(8), 3)
    report = holdout(N, D, loss, below=6 * 1e6 * 4e6 / 2, runs=runs, num_draws=0)
    assert report["num_heldout"] % 3 == 0 and len({row["N"] for row in report["runs"]}) * 3 == report["num_heldout"] == 6
    assert holdout(N, D, loss, below=6 * 1e6 * 4e6 / 2, num_draws=0)["num_heldout"] == 2  # without names only the rows above
    with pytest.raises(ValueError, match="24 runs lie below"):
        holdout(N, D, loss, below=1e30)
