"""Agreement by hand and by a published example; biases that were put in are found, and none where none was."""
import random

import pytest

from reward import agreement
from reward.annotators import Errors, Panel
from reward.preferences import check

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section E: four observers, twelve units, values missing.
OBSERVERS = ([1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
             [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None])


def record(prompt, ranks, annotator="ann", *, responses=None, **more):
    responses = responses or ["a", "bb", "ccc", "dddd"][:len(ranks)]
    return check({"id": f"{prompt}-{annotator}", "prompt": prompt, "responses": responses, "ranks": ranks, "annotator": annotator, **more},
                 "here")


def panel_records(num_prompts, *, num_responses=2, seed=0, tied=False, **settings):
    """Simulated rankings of responses whose length, place and gold score have nothing to do with one another."""
    errors = {k: settings.pop(k) for k in ("error_rate", "position_bias", "length_bias", "inconsistency") if k in settings}
    panel, found = Panel(errors=Errors(**errors), seed=seed, **settings), []
    rng = random.Random(f"test:{seed}")
    for i in range(num_prompts):
        texts = rng.sample(["x" * n for n in range(1, 30)], num_responses)
        gold = [float(rng.choice([0, 1, 1]) if tied else g) for g in rng.sample(range(num_responses), num_responses)]
        found += [{"prompt": f"prompt {i}", "responses": texts, **r} for r in panel.rank(f"{seed}-{i}", texts, gold)]
    return found


def test_alpha_is_that_of_the_published_example():
    units = [[v for v in unit if v is not None] for unit in zip(*OBSERVERS, strict=True)]
    assert agreement.krippendorff_alpha(units) == pytest.approx(0.815, abs=5e-4)


def test_alpha_by_hand():
    # Coincidences of (1, 1), (2, 2), (1, 2): o = [[2, 1], [1, 2]], n = (3, 3); distance 3: D_o = 2 * 9 / 6, D_e = 18 * 9 / 30
    assert agreement.krippendorff_alpha([[1, 1], [2, 2], [1, 2], [7]]) == pytest.approx(1 - 3 / 5.4)
    assert agreement.krippendorff_alpha([[1, 1], [5, 5]]) == 1
    for units in ([[1], [2]], [[3, 3], [3, 3]]):
        with pytest.raises(ValueError, match="alpha needs"):
            agreement.krippendorff_alpha(units)


def test_alpha_of_rankings_takes_the_responses_as_units():
    records = [record("p", [1, 2], "ann"), record("p", [1, 2], "bob"), record("q", [1, 2], "ann"), record("q", [2, 1], "bob"),
               record("r", [1, 2], "ann")]
    found = agreement.ranking_alpha(records)
    # units (1, 1), (2, 2), (1, 2), (2, 1): o = [[2, 2], [2, 2]], n = (4, 4), distance 4: D_o = 4 * 16 / 8, D_e = 32 * 16 / 56
    assert found.value == pytest.approx(1 - 8 / (32 * 16 / 56)) and (found.n, found.num_prompts) == (4, 2)
    assert found.low < found.value < found.high == 1
    assert agreement.ranking_alpha(records[:2]) == (1.0, 2, 1, -1.0, 1.0)  # one prompt: nothing is known
    assert agreement.ranking_alpha(records[::2]) is None  # nobody to compare with


def test_two_sets_of_one_prompt_say_no_more_than_one():
    """The same rankings by a second criterion: twice the rankings, but the interval stays as wide, for alpha and for pairs."""
    once = panel_records(100, error_rate=0.2, annotators=2)
    twice = once + [{**r, "criterion": "tone"} for r in once]
    for measure in (agreement.ranking_alpha, lambda records: agreement.pairwise_agreement(agreement.comparisons(records))):
        first, second = measure(once), measure(twice)
        assert second.n == 2 * first.n and second.num_prompts == first.num_prompts == 100
        assert second[3:] == pytest.approx(first[3:], abs=0.005)


def test_responses_are_matched_by_text_and_ties_by_place():
    records = [record("p", [1, 1, 3], "ann"), record("p", [2, 1, 1], "bob", responses=["ccc", "a", "bb"])]
    assert agreement.ranking_alpha(records).value == 1
    assert agreement.pairwise_agreement(agreement.comparisons(records))[:3] == (1.0, 2, 1)  # the pair that both tie says nothing


def test_sets_of_different_size_agree_by_chance_alone():
    """Rankings by dice of sets of 2 and 8: in one table they would agree, because both know the size of the set."""
    rng = random.Random(0)
    records = [record(str(i), rng.sample(range(1, k + 1), k), who, responses=[str(n) for n in range(k)])
               for i in range(400) for k in [2 if i % 2 else 8] for who in ("ann", "bob")]
    found = agreement.ranking_alpha(records)
    assert found.low < 0 < found.high and abs(found.value) < 0.1
    together = [list(unit) for a, b in zip(records[::2], records[1::2], strict=True) for unit in zip(a["ranks"], b["ranks"], strict=True)]
    assert agreement.krippendorff_alpha(together) > 0.25


def test_pairwise_agreement_by_hand():
    assert agreement.ordered_alike([1, 2, 3], [1, 3, 2]) == [1, 1, 0]
    assert agreement.ordered_alike([1.5, 1.5, 3], [1, 2.5, 2.5]) == [0.5, 1, 0.5]
    assert agreement.ordered_alike([1.5, 1.5], [1.5, 1.5]) == []
    records = [record("p", [1, 2], "ann"), record("p", [1, 2], "bob"), record("p", [2, 1], "eve"), record("q", [1, 2], "ann")]
    found = agreement.comparisons(records)
    assert [(c.annotators, c.outcomes) for c in found] == [(("ann", "bob"), [1]), (("ann", "eve"), [0]), (("bob", "eve"), [0])]
    assert agreement.pairwise_agreement(found).value == pytest.approx(1 / 3)
    assert {name: a.value for name, a in agreement.agreement_by_annotator(found).items()} == {"ann": 0.5, "bob": 0.5, "eve": 0.0}
    assert agreement.pairwise_agreement([]) is None


def test_prompts_criteria_and_skipped_records_are_kept_apart():
    records = [record("p", [1, 2], "ann"), record("p", [1, 2], "bob", criterion="tone"), record("q", [1, 2], "bob"),
               {"id": "s", "prompt": "p", "responses": ["a", "bb"], "skipped": "both unclear", "annotator": "eve"}]
    assert agreement.comparisons(records) == [] and agreement.repeats(records) == (0, 0, 0)


def test_agreement_over_time_goes_by_the_later_of_two_rankings():
    records = []
    for day in range(1, 21):  # they agree in the first half of the month
        time = f"2026-03-{day:02d}T10:00:00Z"
        records += [record(str(day), [1, 2], "ann", time="2026-02-01T00:00:00+00:00"),
                    record(str(day), [1, 2] if day <= 10 else [2, 1], "bob", time=time)]
    records += [record("untimed", [1, 2], "ann"), record("untimed", [2, 1], "bob", time="2026-03-01T10:00:00Z")]
    found = agreement.agreement_over_time(agreement.comparisons(reversed(records)), windows=4)
    assert [(w.start.day, w.end.day, w.agreement.value, w.agreement.n) for w in found] == [
        (1, 5, 1.0, 5), (6, 10, 1.0, 5), (11, 15, 0.0, 5), (16, 20, 0.0, 5)]
    assert agreement.agreement_over_time([], windows=4) == []


def test_biases_by_hand():
    records = [record("p", [2, 1, 3], order=[1, 0, 2]), record("q", [1, 2], order=[1, 0], responses=["long", "x"])]
    position = agreement.position_bias(records)  # all three of p, none of q
    assert (position.value, position.n, position.num_prompts) == (0.75, 4, 2)
    length = agreement.length_bias(records)  # of p one (bb before a), of q the one
    assert (length.value, length.n) == (0.5, 4)
    assert agreement.length_bias([record("p", [1, 2], responses=["ab", "cd"])]) is None
    assert agreement.position_bias([record("p", [1, 2], order=[0, 1]), record("q", [1, 2])]) is None  # not drawn by chance


def test_repetitions_by_hand():
    records = [record("p", [1, 2, 3], time="2026-03-02T00:00:00Z"), record("p", [1, 3, 2], time="2026-03-03T00:00:00Z"),
               record("p", [1, 2, 3], time="2026-03-01T00:00:00Z"), record("q", [1, 1]), record("q", [1, 2])]
    assert agreement.repeats(records) == (3, 1, 1)
    assert agreement.inconsistency(records).value == pytest.approx((0 + 1 + 0.5) / 7)
    assert agreement.inconsistency(records[3:4]) is None


@pytest.mark.parametrize("rate", [0.0, 0.15, 0.3, 0.5])
def test_agreement_of_simulated_annotators_is_what_their_error_rate_gives(rate):
    """Two who err on their own agree on a pair with (1 - e)^2 + e^2; alpha of two values is twice that less 1."""
    records = panel_records(800, error_rate=rate, annotators=3)
    pairs, alpha = agreement.pairwise_agreement(agreement.comparisons(records)), agreement.ranking_alpha(records)
    expected = (1 - rate) ** 2 + rate ** 2
    assert pairs.low <= expected <= pairs.high and pairs.high - pairs.low < 0.08 and pairs.n == 2400
    assert alpha.low - 0.001 <= 2 * expected - 1 <= alpha.high and alpha.high - alpha.low < 0.16  # 1 / n: alpha's own correction


MEASURES = {"position_bias": lambda r: agreement.position_bias(r), "length_bias": lambda r: agreement.length_bias(r),
            "inconsistency": lambda r: agreement.inconsistency(r)}
WANTED = {"position_bias": lambda p: (1 + p) / 2, "length_bias": lambda p: (1 + p) / 2, "inconsistency": lambda p: p}


def near(found, truth):
    """Within 3.3 standard errors: of the grid's 42 checks, one would be expected to miss its 95 % interval by more in 24 runs."""
    return abs(found.value - truth) < 3.3 / 1.96 * (found.high - found.low) / 2


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("rate", [0.1, 0.25, 0.45])
@pytest.mark.parametrize("error_rate", [0.0, 0.2])
def test_a_bias_that_was_put_in_is_recovered_and_no_other_is_found(name, rate, error_rate):
    records = panel_records(1500, error_rate=error_rate, repeat_share=1.0, **{name: rate})
    found = {other: measure(records) for other, measure in MEASURES.items()}
    assert near(found[name], WANTED[name](rate)) and found[name].low > WANTED[name](0.0)
    for other in {"position_bias", "length_bias"} - {name}:
        assert near(found[other], 0.5), other
    if name == "length_bias":  # the same length, the same judgement
        assert found["inconsistency"].value == 0


@pytest.mark.parametrize(("name", "rate", "num_responses"), [
    ("position_bias", 0.0, 4), ("length_bias", 0.0, 4), ("position_bias", 0.3, 2), ("length_bias", 0.3, 2), ("inconsistency", 0.2, 2)])
def test_intervals_hold_the_truth_as_often_as_they_say(name, rate, num_responses):
    """About 19 of 20 do, also where the pairs of a ranking are related (binomial: 88 of 100 or fewer has a chance of .4 %)."""
    hits = 0
    for seed in range(100):
        found = MEASURES[name](panel_records(50, num_responses=num_responses, error_rate=0.2, seed=seed, repeat_share=0.5, **{name: rate}))
        hits += found.low <= WANTED[name](rate) <= found.high
    assert hits > 88


def test_the_interval_of_alpha_holds_the_truth_as_often_as_it_says():
    hits = 0
    truth = agreement.ranking_alpha(panel_records(4000, num_responses=3, error_rate=0.2, annotators=2, seed=99), samples=2).value
    for seed in range(60):
        found = agreement.ranking_alpha(panel_records(60, num_responses=3, error_rate=0.2, annotators=2, seed=seed), samples=300)
        hits += found.low <= truth <= found.high
    assert hits >= 52


def test_with_more_responses_a_stronger_bias_shows_more():
    shares = [agreement.position_bias(panel_records(400, num_responses=4, position_bias=p, annotators=2)).value
              for p in (0.0, 0.2, 0.5, 0.9)]
    assert shares == sorted(shares) and shares[-1] > 0.85
    assert agreement.position_bias(panel_records(400, tied=True, position_bias=0.3)).low > 0.5  # also where gold ties


def test_the_summary_holds_what_the_records_allow():
    assert set(agreement.summary(panel_records(20))) == {"longer_preferred"}
    assert set(agreement.summary(panel_records(20, annotators=2, repeat_share=0.5))) == {
        "agreement_alpha", "agreement_pairs", "first_shown_preferred", "longer_preferred", "changed_when_asked_again"}
    found = agreement.summary([record | {"time": f"2026-01-01T10:{number:02}:00+00:00"}
                               for number, record in enumerate(panel_records(15, annotators=3))])
    assert sum(name.startswith("agreement_pairs/") for name in found) == 3 and "agreement_pairs_window_5" in found


def test_rankings_of_nobody_known_are_neither_one_person_s_nor_two_people_s():
    records = [{"prompt": "p", "responses": ["a", "b"], "ranks": ranks, **who} for ranks in ([1, 2], [2, 1])
               for who in ({}, {"annotator": "unknown"})]
    assert agreement.comparisons(records) == [] and agreement.repeats(records) == (0, 0, 0)
    assert agreement.inconsistency(records) is None and agreement.repeats([{**r, "annotator": "eve"} for r in records]).again == 3
