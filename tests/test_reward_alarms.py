"""Alarms on rows made by hand: what raises each, what does not, and when."""
import math
import re
from pathlib import Path

import numpy as np
import pytest

from reward.alarms import STATISTICS, WINDOW, Limits, fall, first_alarms, fit_cloud, raised, recent, repetition, statistics
from stages.run.config import fill

START = {"objective/score": 0.0, "objective/gold": 0.5, "objective/gold_se": 0.1, "objective/kl": 0.0, "objective/entropy": 2.0,
         "response/length": 20.0, "response/repetition": 0.1, "response/eos_rate": 0.9, "value/explained_variance": 0.5,
         "score/beyond": 0.01, "watch/second": 0.0, "watch/second_se": 0.1, "watch/disagreement": 0.2, "watch/feature_distance": 1.0}


def run(*rows: dict) -> list[dict]:
    """Rows as a run logs them, four steps an iteration; each is the start but for what it names."""
    return [{**START, **row, "step": 4 * (i + 1)} for i, row in enumerate(rows)]


def constant(**changed) -> list[dict]:
    """The start, then a window of rows with other values."""
    return run({}, *[{name.replace("__", "/"): value for name, value in changed.items()}] * WINDOW)


def test_a_run_that_stays_at_its_start_raises_nothing():
    rows = run(*[{}] * 12)
    assert first_alarms(rows) == [] and set(statistics(rows)) == set(STATISTICS)
    assert set(STATISTICS) == set(vars(Limits()))


def test_a_window_is_asked_for_and_is_a_mean():
    assert recent(run({}, {}, {}, {}), "objective/kl") is None
    assert recent(run({}, *[{"objective/kl": k} for k in (1, 2, 3, 4, 5)]), "objective/kl") == 3.0
    assert recent(run(*[{}] * 4, {}), "objective/kl_of_another_name") is None


CASES = {
    "beyond_range": ({"score__beyond": 0.6}, 0.6), "disagreement": ({"watch__disagreement": 0.5}, 2.5),
    "feature_distance": ({"watch__feature_distance": 4.0}, 4.0), "length_drift": ({"response__length": 8.0}, 0.6),
    "repetition": ({"response__repetition": 0.35}, 0.25), "entropy_lost": ({"objective__entropy": 0.1}, 0.95),
    "eos_lost": ({"response__eos_rate": 0.6}, 0.3), "critic_blind": ({"value__explained_variance": -4.5}, 1.0),
    "kl": ({"objective__kl": 120.0}, 120.0)}


@pytest.mark.parametrize("name", CASES)
def test_each_alarm_by_hand(name):
    changed, value = CASES[name]
    limits = Limits(feature_distance=3.0)  # off by default
    alarms = raised(constant(**changed), limits)
    assert [a.name for a in alarms] == [name]
    assert alarms[0].value == pytest.approx(value) and alarms[0].step == 24 and alarms[0].threshold == getattr(limits, name)
    assert raised(constant(**changed), Limits(**{name: value + 0.01})) == [] == raised(constant(**changed), Limits(**{name: None}))
    assert str(round(100 * value)) in alarms[0].sentence or f"{value:.1f}" in alarms[0].sentence or f"{value:.2f}" in alarms[0].sentence


@pytest.mark.parametrize(("key", "low", "said"), [("objective/gold", 0.2, "4.7"), ("watch/second", 0.15, "5.5")])
def test_a_score_that_falls_while_the_reward_rises(key, low, said):
    """Five rows at .5, five at .2 with standard errors of .1: .3 / sqrt(2 x .1^2 / 5) = 4.74 standard errors."""
    rows = run(*[{key: 0.5}] * 5, *[{key: low, "objective/score": 1.0}] * 5)
    assert fall(rows, key) == pytest.approx((0.5 - low) / math.sqrt(2 * 0.01 / 5))
    name = "gold_falls" if key == "objective/gold" else "second_falls"
    alarms = first_alarms(rows)
    assert [(a.name, a.step) for a in alarms] == [(name, 40)] and f"{said} standard errors below its best" in alarms[0].sentence
    assert fall([{**row, "objective/score": -row["objective/score"]} for row in rows], key) == 0  # both fell: no hacking
    assert fall([{k: v for k, v in row.items() if k != f"{key}_se"} for row in rows], key) is None
    assert 1e3 < fall([{**row, f"{key}_se": 0.0} for row in rows], key) < math.inf  # a number, because it is written down


def test_a_fall_counts_from_the_best_and_not_from_the_start():
    rows = run(*[{"objective/gold": g, "objective/score": i / 10} for i, g in enumerate([0.5] * 5 + [0.9] * 5 + [0.6] * 5)])
    assert fall(rows, "objective/gold") == pytest.approx(0.3 / math.sqrt(2 * 0.01 / 5))


def test_a_critic_that_begins_blind_and_learns_raises_nothing():
    values = [-3.0, -1.0, -0.5, 0.0, 0.2, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.4]
    rows = run(*[{"value/explained_variance": value} for value in values])
    assert first_alarms(rows) == [] and statistics(rows)["critic_blind"] == pytest.approx(0.02)


def test_an_alarm_is_raised_once_at_its_first_step():
    rows = run(*[{}] * 6, *[{"objective/kl": 40.0, "response/eos_rate": 0.5}] * 8)
    assert [(a.name, a.step) for a in first_alarms(rows)] == [("eos_lost", 32), ("kl", 36)]  # two rows of .5 lower five by .16


def test_what_is_not_logged_raises_nothing():
    rows = [{"step": 4 * i, "objective/score": float(i), "objective/kl": 1.0} for i in range(1, 9)]
    assert set(statistics(rows)) == {"kl"} and raised(rows) == []
    assert "repetition" in statistics(constant(response__repetition=0.0))
    assert "entropy_lost" not in statistics([{**row, "objective/entropy": 0.0} for row in constant()])  # nothing to divide by


def test_repetition_by_hand():
    assert repetition([1, 2, 3]) == 0 and repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)  # 1234 2341 3412 4123 1234
    assert repetition([7] * 13) == pytest.approx(0.9)


def test_distances_of_features_by_hand():
    """Of a wide cloud with variances 4 and 1: (2, 0) is one standard deviation away, (0, 2) two; half of their squares, d being 2."""
    rng = np.random.default_rng(0)
    cloud = fit_cloud(rng.normal(0, 1, (20_000, 2)) * [2.0, 1.0] + [5.0, 0.0])
    assert cloud.distances(np.array([[7.0, 0.0], [5.0, 2.0], [5.0, 0.0]])) == pytest.approx([0.5, 2.0, 0.0], abs=0.05)
    assert fit_cloud(rng.normal(0, 1, (20, 50))).distances(rng.normal(0, 1, (500, 50))).mean() == pytest.approx(1.0, abs=0.25)


def test_limits_are_given_by_name_and_null_turns_off():
    assert fill(Limits, {"kl": 5, "eos_lost": None}, where="alarm_limits") == {"kl": 5.0, "eos_lost": None}
    with pytest.raises(ValueError, match="did you mean 'repetition'"):
        fill(Limits, {"repetitions": 5}, where="alarm_limits")


def test_the_page_has_the_thresholds_that_the_code_has():
    page = (Path(__file__).parent.parent / "docs" / "reward-hacking.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d.]+|off) \|[^|]*\|$", page.partition("## The alarms")[2], re.MULTILINE)
    assert {name: None if limit == "off" else float(limit) for name, limit in rows} == vars(Limits())


def test_few_runs_in_which_nothing_changes_raise_gold_falls():
    """Ninety iterations of pure noise under a reward that rises: the best of many windows is above the last one by chance alone."""
    rng, alarmed = np.random.default_rng(0), 0
    for _ in range(100):
        rows = [{"step": i, "objective/score": i, "objective/gold": x, "objective/gold_se": 1.0} for i, x in enumerate(rng.normal(size=90))]
        alarmed += any(a.name == "gold_falls" for end in range(WINDOW, 91) for a in raised(rows[:end]))
    assert alarmed <= 8  # 3 expected; 45 at a threshold of three standard errors
