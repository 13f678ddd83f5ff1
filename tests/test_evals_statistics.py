"""Paired tests and intervals on numbers worked by hand, and the coverage they promise."""
import itertools
import math
import random
import tracemalloc

import numpy as np
import pytest

from prompts.intervals import mean_variance, share_interval, student95, wilson
from prompts.voting import majority
from stages.evals import statistics
from stages.evals.statistics import (
    bootstrap_mean,
    compare,
    holm,
    maj_at_k,
    mcnemar,
    minimum_detectable_effect,
    paired_wilson,
    pass_at_k,
    sign_flips,
    variance_split,
)


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
    assert shares["test"] == "sign flips" and shares["difference"] == pytest.approx(0.125) and shares["ci95"][0] < 0.125 < shares["ci95"][1]
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


def test_holm_by_hand():
    # sorted .005, .01, .03, .04: times 4, 3, 2, 1 is .02, .03, .06, .04; none below a smaller one: the last becomes .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == [0.8, 0.9] and holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_holm_keeps_the_error_of_the_family():
    """Of 15 true null hypotheses one or more is rejected in 5 % of families; unadjusted it would be in 54 %."""
    families = np.random.default_rng(0).random((2000, 15))
    wrong = sum(min(holm(list(p))) < 0.05 for p in families) / 2000
    assert 0.035 < wrong < 0.065 and np.mean(families.min(axis=1) < 0.05) > 0.5


def test_sign_flips_ask_what_mcnemar_asks():
    differences = [1.0] * 12 + [-1.0] * 3 + [0.0] * 85
    assert sign_flips(differences) == pytest.approx(mcnemar(12, 3), abs=0.002) == sign_flips(differences)  # 2 P(X <= 3) = .0352
    # by hand: of the 8 signs of 3, 1, 1 only +++ and --- reach 5
    assert sign_flips([3.0, 1.0, 1.0]) == pytest.approx(2 / 8, abs=0.005)
    # two clusters sum to 5 and 0: every flip reaches 5
    assert sign_flips([2.0, 3.0, 1.0, -1.0], ["a", "a", "b", "b"]) == 1.0
    assert sign_flips([0.0, 0.0]) == 1.0


def test_cluster_robust_variance_by_hand():
    # mean .5; deviations .5 .5 -.5 -.5; one by one: 4 * .25 / 16 * 4/3; in clusters of two: (1 + 1) / 16 * 2/1
    assert mean_variance([1, 1, 0, 0]) == (pytest.approx(1 / 12), 4)
    assert mean_variance([1, 1, 0, 0], ["a", "a", "b", "b"]) == (pytest.approx(1 / 4), 2)
    with pytest.raises(ValueError, match="at least 2 independent units, got 1"):
        mean_variance([1, 0], ["a", "a"])
    with pytest.raises(ValueError, match="2 values and 1 clusters"):
        mean_variance([1, 0], ["a"])


def templates(rng, num: int, each: int, gap: float):
    """Differences of two answerers on questions from templates: one gains on some templates and loses on others, by `gap` on average."""
    clusters = np.repeat(np.arange(num), each)
    gain = np.repeat(rng.normal(gap, 0.25, num), each)
    a = rng.random(num * each) < np.clip(0.5 + gain / 2, 0, 1)
    b = rng.random(num * each) < np.clip(0.5 - gain / 2, 0, 1)
    return a.astype(float).tolist(), b.astype(float).tolist(), clusters.tolist()


@pytest.mark.parametrize("num, each", [(8, 25), (40, 5)])
def test_clustered_intervals_cover_and_others_do_not(num, each):
    """Questions of one template are right and wrong together: intervals that count them one by one are too short."""
    rng, rounds = np.random.default_rng(num), 1000
    clustered = plain = rejected = 0
    for i in range(rounds):
        a, b, clusters = templates(rng, num, each, 0.1)
        differences = [x - y for x, y in zip(a, b, strict=True)]
        off = abs(sum(differences) / len(differences) - 0.1)
        clustered += off <= (half := student95(num - 1) * mean_variance(differences, clusters)[0] ** 0.5)
        plain += off <= 1.96 * mean_variance(differences)[0] ** 0.5
        if i % 4 == 0:
            a, b, clusters = templates(rng, num, each, 0.0)
            rejected += sign_flips([x - y for x, y in zip(a, b, strict=True)], clusters, draws=999) < 0.05
    low, high = compare(*templates(np.random.default_rng(0), num, each, 0.1))["ci95"]
    assert 0.93 <= clustered / rounds <= 0.97 and rejected / (rounds / 4) <= 0.08 and 0 < high - low < 6 * half
    assert plain / rounds < (0.75 if num == 8 else 0.91)


def test_bootstraps_cover():
    """Over questions at 60 of them; over clusters at 40, where a percentile interval is only a little short."""
    rng, rounds = np.random.default_rng(2), 400
    over_questions = over_clusters = 0
    for _ in range(rounds):
        low, high = bootstrap_mean(list(rng.beta(2, 3, 60)), resamples=1000)
        over_questions += low <= 0.4 <= high
        a, b, clusters = templates(rng, 40, 5, 0.1)
        low, high = bootstrap_mean([x - y for x, y in zip(a, b, strict=True)], clusters, resamples=1000)
        over_clusters += low <= 0.1 <= high
    assert 0.92 <= over_questions / rounds <= 0.98 and 0.91 <= over_clusters / rounds <= 0.98


def test_cluster_bootstrap_draws_whole_clusters():
    values, clusters = [1.0] * 10 + [0.0] * 10, [0] * 10 + [1] * 10
    assert bootstrap_mean(values, clusters) == (0.0, 1.0)  # both draws from one cluster in a quarter of cases each
    low, high = bootstrap_mean(values)
    assert 0.2 < low < 0.4 and 0.6 < high < 0.8


def test_share_interval_of_clusters_covers():
    rng, rounds, hits = np.random.default_rng(3), 500, 0
    for _ in range(rounds):
        level = np.repeat(rng.beta(4, 1, 15), 10)  # 15 templates, mean .8
        _, low, high = share_interval((rng.random(150) < level).astype(float).tolist(), np.repeat(np.arange(15), 10).tolist())
        hits += low <= 0.8 <= high
    assert 0.92 <= hits / rounds <= 0.99
    assert share_interval([1.0] * 20, [i % 4 for i in range(20)])[1] < share_interval([1.0] * 20)[1]  # four trials prove less than twenty


def test_a_clustered_comparison_by_hand():
    # differences 1 1 and six 0, clusters of two: mean 1/4, deviations in sums 3/2 and three -1/2, variance 3 / 64 * 4/3 = 1/16; t(3) 3.1824
    found = compare([1, 1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0], list("aabbccdd"))
    assert found["ci95"] == (pytest.approx(1 / 4 - 3.1824 / 4, abs=1e-4), 1.0)  # cut at what a difference can be
    assert found["mde"] == pytest.approx(2.8016 / 4, abs=1e-4) and found["p"] == 1.0  # one cluster differs: either sign is as likely


def test_a_share_of_clusters_by_hand():
    # mean 3/4, deviations in sums three 1/2 and -3/2, variance 1/16 as above: worth .75 * .25 * 16 = 3 trials; t(3) in Wilson's place of z
    found = share_interval([1, 1, 1, 1, 1, 1, 0, 0], list("aabbccdd"))
    assert found == pytest.approx((0.75, *wilson(2.25, 3, 3.18245)), abs=1e-5)


def test_clusters_of_one_are_questions():
    a, b = [1, 1, 0, 0, 1], [1, 0, 0, 1, 0]
    assert compare(a, b, list("abcde")) == compare(a, b)
    assert compare(a, b, list("aabbc"))["test"] == "sign flips of clusters" and compare(a, b, list("aabbc"))["clusters"] == 3


def test_no_difference_at_all_is_no_proof():
    found = compare([0.5] * 30, [0.5] * 30)
    assert found["difference"] == 0 and found["ci95"] == (-wilson(0, 30)[1], wilson(0, 30)[1])
    assert found["p"] == 1.0 and found["mde"] is None


def test_minimum_detectable_effect_by_hand_and_by_simulation():
    # n 400, discordance .2: e * 20 = 1.96 sqrt(.2) + .8416 sqrt(.2 - e^2)
    effect = minimum_detectable_effect(400, 0.2)
    assert effect * 20 == pytest.approx(1.959964 * 0.2**0.5 + 0.841621 * (0.2 - effect**2) ** 0.5) == pytest.approx(1.2492, abs=1e-4)
    rng = np.random.default_rng(4)
    drawn = rng.multinomial(400, [(0.2 + effect) / 2, (0.2 - effect) / 2, 0.8], size=2000)
    assert np.mean([mcnemar(int(a), int(b)) < 0.05 for a, b, _ in drawn]) == pytest.approx(0.8, abs=0.05)  # McNemar's exact test is careful
    assert minimum_detectable_effect(1600, 0.2) == pytest.approx(effect / 2, rel=0.01)  # four times the questions, half the effect
    small = minimum_detectable_effect(40, 0.05)  # fewer questions than any effect of .05 needs: then more of them must differ
    assert small > 0.05 and small * 40**0.5 == pytest.approx(1.959964 * small**0.5 + 0.841621 * (small - small**2) ** 0.5)
    assert minimum_detectable_effect(3, 0.5) is None and minimum_detectable_effect(300, 0.0) is None
    with pytest.raises(ValueError, match="expected a share"):
        minimum_detectable_effect(10, 1.5)


def test_detectable_differences_of_shares_are_detected():
    rng, n, rounds = np.random.default_rng(5), 200, 300
    found, mde = 0, 2.8016 * (2 * 0.05 / n) ** 0.5  # both sides vary with variance .05
    for _ in range(rounds):
        a, b = rng.normal(0.5 + mde, 0.05**0.5, n), rng.normal(0.5, 0.05**0.5, n)
        found += bootstrap_mean((a - b).tolist(), resamples=1000)[0] > 0
    result = compare(a.tolist(), b.tolist())
    assert result["ci95"][0] < result["difference"] < result["ci95"][1]
    assert result["mde"] == pytest.approx(mde, rel=0.2) and found / rounds == pytest.approx(0.8, abs=0.07)


def test_pass_at_k_by_hand():
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4) and pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)  # C(3,2)/C(5,2)
    assert pass_at_k(5, 2, 4) == 1.0 and pass_at_k(5, 0, 5) == 0.0
    with pytest.raises(ValueError, match="pass@6 from 5 samples"):
        pass_at_k(5, 2, 6)


def test_pass_at_k_is_unbiased():
    right = np.random.default_rng(6).binomial(10, 0.2, size=20_000)
    assert np.mean([pass_at_k(10, int(r), 4) for r in right]) == pytest.approx(1 - 0.8**4, abs=0.004)


WORDS = {"a": "ant", "A": "asp", "b": "bee", "B": "bug", "c": "cat", "-": None}


@pytest.mark.parametrize("answers", ["aab-", "abc", "aabbc", "bba-c", "a-----", "bb", "--", "aabbcc", "AaBb-"])
def test_maj_at_k_is_the_vote_over_every_order(answers):
    """Against the project's own vote over all ordered draws; right is a (and A, which is another answer that is right too)."""
    counts = [(answers.count(x), x in "aA") for x in sorted(set(answers) - {"-"})]
    found = maj_at_k(counts, answers.count("-"))
    for k in range(1, len(answers) + 1):
        votes = [majority([WORDS[x] for x in drawn]).answer for drawn in itertools.permutations(answers, k)]
        assert found[k - 1] == pytest.approx(np.mean([vote in ("ant", "asp") for vote in votes])), k


def test_maj_at_k_is_unbiased_for_a_fresh_vote():
    rng = random.Random(0)

    def draw(k: int) -> list[str | None]:
        return [rng.choices(["a", "b", "c", None], [0.4, 0.3, 0.2, 0.1])[0] for _ in range(k)]

    fresh = np.mean([majority(draw(5)).answer == "a" for _ in range(20_000)])
    recorded = []
    for _ in range(4000):
        sample = draw(12)
        recorded.append(maj_at_k([(sample.count(x), x == "a") for x in "abc" if x in sample], sample.count(None))[4])
    assert np.mean(recorded) == pytest.approx(fresh, abs=0.015)


def test_resampling_takes_bounded_memory_and_the_same_draws(monkeypatch):
    values = np.random.default_rng(0).normal(size=400).tolist()
    whole = bootstrap_mean(values), sign_flips(values, draws=2000)
    monkeypatch.setattr(statistics, "CHUNK", 10_000)
    tracemalloc.start()
    assert bootstrap_mean(values) == pytest.approx(whole[0])
    assert sign_flips(values, draws=2000) == pytest.approx(whole[1], abs=0.03)
    assert tracemalloc.get_traced_memory()[1] < 2e6  # 4,000 draws of 400 at once are 13 MB
    tracemalloc.stop()


def test_maj_at_k_refuses_what_it_cannot_count():
    assert maj_at_k([(40, True), (30, False)], 10)[0] == pytest.approx(0.5) and maj_at_k([(1, True)] * 64)[63] == 1.0
    for votes, silent in (([(0, True)], 3), ([], 0), ([(1001, True)], 0)):
        with pytest.raises(ValueError, match="positive counts"):
            maj_at_k(votes, silent)


def test_variance_split_by_hand():
    # means 1, 0, .5, .5: variance 1/6; within: 0, 0, .5, .5, mean .25, of which sampling adds .125 to the variance of means
    found = variance_split([[1, 1], [0, 0], [1, 0], [0, 1]])
    assert (found["between"], found["within"]) == (pytest.approx(1 / 6 - 1 / 8), pytest.approx(0.25))
    assert (found["n"], found["num_samples"], found["se"]) == (4, 8, pytest.approx(math.sqrt(1 / 6 / 4)))
    assert found["se_one"] == pytest.approx(math.sqrt((1 / 24 + 1 / 4) / 4)) and found["se_limit"] == pytest.approx(math.sqrt(1 / 24 / 4))
    assert variance_split([[1, 0], [0, 1], [1, 0]])["between"] == 0.0  # less spread than sampling alone would give
    with pytest.raises(ValueError, match="at least 2 samples each: got 2 with at least 1"):
        variance_split([[1, 0], [1]])


def test_variance_split_covers_both_parts():
    """Questions with Beta(2, 2) chances: between 1/20, within 1/5."""
    rng, rounds, hits = np.random.default_rng(7), 300, np.zeros(2)
    for _ in range(rounds):
        found = variance_split((rng.random((150, 6)) < rng.beta(2, 2, (150, 1))).astype(float).tolist(), resamples=500)
        hits += [low <= truth <= high for (low, high), truth in
                 ((found["between_ci95"], 0.05), (found["within_ci95"], 0.2))]
    assert all(0.91 <= share <= 0.98 for share in hits / rounds)
