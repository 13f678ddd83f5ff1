import pytest

from reward.gate import BASELINES, HEADER, Gate, judge


def figure(value, half=0.01, n=900):
    return {"value": value, "n": n, "ci95": [value - half, value + half]}


GOOD = {"fresh_accuracy": figure(0.91), "heldout_accuracy": figure(0.85), "fresh_ece_fitted": figure(0.02),
        "length_correlation": figure(-0.1), "accuracy_shorter_better": figure(0.9), "accuracy_longer_better": figure(0.9),
        "flip_rate_boilerplate": figure(0.02),
        **{f"gain_over_{name}": figure(0.2) for name in BASELINES}, **{f"baseline_{name}_accuracy": figure(0.6) for name in BASELINES}}


def level(**changes):
    return judge({key: value for key, value in (GOOD | changes).items() if value is not None})


def test_good_figures_pass():
    verdict = judge(GOOD)
    assert verdict.level == "pass" and {r.level for r in verdict.reasons} == {"pass"}
    assert len(verdict.reasons) == 10 and all(len(row) == len(HEADER) for row in verdict.rows())


@pytest.mark.parametrize(("name", "straddles", "wrong"), [
    ("fresh_accuracy", 0.85, 0.8), ("heldout_accuracy", 0.6, 0.5), ("fresh_ece_fitted", 0.05, 0.2), ("gain_over_tfidf", 0.0, -0.1),
    ("gain_over_min_logprob", 0.005, -0.1), ("accuracy_shorter_better", 0.5, 0.3), ("accuracy_longer_better", 0.5, 0.3)])
def test_intervals_decide(name, straddles, wrong):
    for value, expected in ((straddles, "warn"), (wrong, "fail")):
        verdict = level(**{name: figure(value)})
        assert verdict.level == expected and [r.name for r in verdict.reasons if r.level == expected] == [name]
        assert f"{name} is {value:.3f} [" in verdict.why(expected) and "n 900" in verdict.why(expected)
    wide = level(**{name: figure(wrong, half=1.0)})  # the same value, known badly
    assert wide.level == "warn"


@pytest.mark.parametrize(("name", "wrong"), [("length_correlation", 0.8), ("length_correlation", -0.8), ("flip_rate_boilerplate", 0.4),
                                             ("flip_rate_wording", 0.4)])
def test_what_may_have_good_reasons_only_warns(name, wrong):
    assert level(**{name: figure(wrong)}).level == "warn"


@pytest.mark.parametrize("name", ["fresh_accuracy", "heldout_accuracy", "gain_over_tfidf", "length_correlation", "flip_rate_boilerplate"])
def test_what_was_not_measured_warns_by_name(name):
    verdict = level(**{name: None})
    assert verdict.level == "warn" and f"{name} was not measured" in verdict.why("warn")
    assert next(row for row in verdict.rows() if row[0] == name)[1:4] == ["-", "-", "-"]


def test_nothing_measured_warns_of_everything_and_a_value_without_interval_is_no_evidence():
    assert {r.level for r in judge({}).reasons} == {"warn"} and len(judge({}).reasons) == 10
    bare = level(fresh_accuracy={"value": 0.99, "n": 10})
    assert bare.level == "warn" and "0.990 without an interval" in bare.why("warn")


def test_the_error_after_fitting_goes_before_the_raw_one():
    names = [r.name for r in level(fresh_ece=figure(0.3)).reasons]
    assert "fresh_ece_fitted" in names and "fresh_ece" not in names
    assert level(fresh_ece_fitted=None, fresh_ece=figure(0.3)).level == "fail"
    assert "heldout_ece" in [r.name for r in level(fresh_ece_fitted=None, heldout_ece=figure(0.01)).reasons]


def test_thresholds_can_be_set():
    people = {**GOOD, "fresh_accuracy": figure(0.7)}
    assert judge(people).level == "fail" and judge(people, Gate(min_fresh_accuracy=0.65)).level == "pass"
    assert judge(people).as_note()["verdict"] == "fail" and judge(people).as_note()["reasons"][0]["asked"] == ">= 0.85"
