"""Over-optimisation: best-of-n and the curves of Gao et al., by hand and by recovery of constants that are known."""
import itertools
import json
import math
import random

import numpy as np
import pytest

from reward import overoptimization
from reward.overoptimization import best_of_n, best_of_n_kl, fit_points, fit_prompts, peak_distance, standing


def test_kl_of_best_of_n_by_hand():
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(4) == pytest.approx(1.3862943611 - 0.75)


def test_best_of_n_by_hand():
    """Three samples with proxies 3, 1, 2: of the three pairs two hold the best, one the middle one."""
    found = best_of_n([[3.0, 1.0, 2.0]], [[10.0, 0.0, 4.0]])
    assert found.proxy[0].tolist() == pytest.approx([2.0, (3 + 3 + 2) / 3, 3.0])
    assert found.gold[0].tolist() == pytest.approx([14 / 3, (10 + 10 + 4) / 3, 10.0])
    assert found.kl[2] == pytest.approx(math.log(3) - 2 / 3)


def test_best_of_n_is_the_mean_over_all_subsets():
    rng = random.Random(0)
    proxy, gold = ([rng.gauss(0, 1) for _ in range(7)] for _ in range(2))
    found = best_of_n([proxy], [gold])
    for n in (1, 3, 6, 7):
        subsets = list(itertools.combinations(range(7), n))
        best = [max(subset, key=proxy.__getitem__) for subset in subsets]
        assert found.gold[0, n - 1] == pytest.approx(sum(gold[i] for i in best) / len(subsets))
        assert found.proxy[0, n - 1] == pytest.approx(sum(proxy[i] for i in best) / len(subsets))


def test_equal_proxies_share_their_gold_whatever_their_order():
    first, second = best_of_n([[1.0, 1.0, 0.0]], [[4.0, 0.0, 1.0]]), best_of_n([[1.0, 0.0, 1.0]], [[0.0, 1.0, 4.0]])
    assert first.gold[0].tolist() == second.gold[0].tolist() == pytest.approx([5 / 3, 2.0 , 2.0])


def test_scores_of_unlike_shapes_are_refused():
    with pytest.raises(ValueError, match=r"proxy scores \(1, 2\) and gold scores \(1, 3\)"):
        best_of_n([[1.0, 2.0]], [[1.0, 2.0, 3.0]])


def test_peaks_by_hand():
    assert peak_distance(2.0, 0.5, "bon") == 2.0  # 2d - d^2 / 2
    assert peak_distance(1.0, 0.5, "rl") == pytest.approx(math.e)  # d - d/2 log d: derivative 1/2 - 1/2 log d
    assert peak_distance(1.0, -0.1, "rl") == peak_distance(1.0, 0.0, "bon") == math.inf and peak_distance(-1.0, 1.0, "bon") == 0


@pytest.mark.parametrize(("form", "shape"), [("bon", lambda d: d * (0.8 - 0.2 * d)), ("rl", lambda d: d * (0.8 - 0.3 * math.log(d)))])
def test_constants_are_recovered_exactly_without_noise(form, shape):
    kl = [0.0, 0.25, 1.0, 2.0, 4.0, 9.0, 20.0]
    curve = fit_points(kl, [0.4 + (shape(math.sqrt(k)) if k else 0.0) for k in kl], form, draws=50)
    assert (curve.start, curve.a, curve.b) == pytest.approx((0.4, 0.8, 0.2 if form == "bon" else 0.3))
    assert curve.peak == pytest.approx(2.0 if form == "bon" else math.exp(0.8 / 0.3 - 1))
    assert curve.at(curve.peak) == pytest.approx(0.4 + shape(curve.peak)) and curve.at(0.0) == pytest.approx(0.4)
    ends = curve.intervals["a"]
    assert ends[0] == pytest.approx(0.8) and ends[1] == pytest.approx(0.8)


def test_intervals_cover_the_constants():
    """Of 60 noisy runs the 95 % interval of each constant holds the truth in most: a bootstrap over 30 points is a little narrow."""
    rng = np.random.default_rng(1)
    d = np.linspace(0.1, 5, 30)
    covered = {"a": 0, "b": 0, "peak": 0}
    for _ in range(60):
        curve = fit_points(d**2, 0.3 + d * (0.5 - 0.3 * np.log(d)) + rng.normal(0, 0.03, len(d)), draws=200)
        for name, truth in (("a", 0.5), ("b", 0.3), ("peak", math.exp(0.5 / 0.3 - 1))):
            covered[name] += curve.intervals[name][0] <= truth <= curve.intervals[name][1]
    assert all(48 <= hits < 60 for hits in covered.values()), covered


def test_prompts_are_what_is_drawn_anew():
    """Points of best-of-n are exact in each prompt and differ between prompts: a bootstrap over points would see no error at all."""
    kl = [best_of_n_kl(n) for n in range(1, 9)]
    d = np.sqrt(kl)
    slopes = np.random.default_rng(0).normal(1.0, 0.5, 40)
    curve = fit_prompts(kl, [slope * d - 0.4 * d * d for slope in slopes], draws=400)
    assert curve.a == pytest.approx(slopes.mean()) and curve.b == pytest.approx(0.4) and curve.n == 40
    half = (curve.intervals["a"][1] - curve.intervals["a"][0]) / 2
    assert half == pytest.approx(1.96 * slopes.std() / math.sqrt(40), rel=0.2)
    assert curve.intervals["b"] == pytest.approx((0.4, 0.4))


def test_too_few_distances_are_refused():
    with pytest.raises(ValueError, match="needs 4 or more"):
        fit_points([0.0, -0.1, 1.0, 4.0], [0, 0, 1, 1])  # two of them are 0: below it an estimate of KL is noise


def test_where_a_run_stands():
    rng = np.random.default_rng(0)
    d = np.linspace(0, 4, 40)
    falls = fit_points(d**2, d * (1.0 - 0.3 * d) + rng.normal(0, 0.02, 40), "bon")  # peak at d = 5/3, KL 2.78
    assert standing(falls, 1.0)[0] == "before the peak" and standing(falls, falls.peak**2)[0] == "at the peak"
    place, sentence = standing(falls, 16.0)
    assert place == "beyond the peak" and "KL 16.00 is beyond the peak" in sentence and "gold score was lost" in sentence
    assert float(sentence.split("since then ")[1].split()[0]) == pytest.approx(falls.at(falls.peak) - falls.at(4.0), abs=1e-3)
    rises = fit_points(d**2, d * (1.0 + 0.1 * d) + rng.normal(0, 0.02, 40), "bon")
    assert standing(rises, 16.0)[0] == "no peak within reach"
    note = rises.as_note()
    assert note["peak"] is None and json.loads(json.dumps(note, allow_nan=False))["intervals"]["peak"] == [None, None]


@pytest.mark.parametrize("form", ["rl", "bon"])
def test_a_nearly_straight_rise_has_a_peak_that_can_be_written_down(form):
    """a / b far above what exp or a square can hold: a run that never bends must not fail after its training."""
    curve = overoptimization._curve(form, (0.0, 1.0, 1e-200), [(0.0, 1.0, 1e-200)] * 40, 40)
    json.dumps(curve.as_note(), allow_nan=False)
    place, sentence = standing(curve, 2.0)
    assert place == "no peak within reach" and "no peak is in sight" in sentence and "inf" not in sentence
