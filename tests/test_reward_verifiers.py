import random
from itertools import combinations

import pytest

from reward.verifiers import annotator_name, dense_ranks, gold_score, simulated_ranks, split_steps

PROBLEM = {"answer": "9", "solutions": [["Start 5.", "Monday 5 + 6 = 11.", "Tuesday 11 - 2 = 9."],
                                        ["Start 5.", "Tuesday 5 - 2 = 3.", "Monday 3 + 6 = 9."]]}
RIGHT = "Start 5. Monday 5 + 6 = 11. Tuesday 11 - 2 = 9. The answer is 9."


@pytest.mark.parametrize(("response", "finished", "score", "correct", "steps", "faults"), [
    (RIGHT, True, 1.5, True, 1.0, ()),
    ("Start 5. Tuesday 5 - 2 = 3. Monday 3 + 6 = 9. The answer is 9.", True, 1.5, True, 1.0, ()),  # the other accepted order
    ("Start 5. Monday 5 + 6 = 12. Tuesday 12 - 2 = 10. The answer is 10.", True, 0.5 / 3, False, 1 / 3, ()),
    ("Start 5. Monday 5 + 6 = 12. Tuesday 11 - 2 = 9. The answer is 9.", True, 1 + 0.5 / 3, True, 1 / 3, ()),  # up to the first error
    ("The answer is 9.", True, 1.0, True, 0.0, ()),
    ("Start 5. Monday 5 + 6 = 11. Tuesday 11 - 2 = 9.", True, 0.4, False, 1.0, ("no answer sentence",)),
    (RIGHT + " Start 5.", True, 1.4, True, 1.0, ("text after the answer",)),
    (RIGHT, False, 1.4, True, 1.0, ("not finished",)),
    ("Start 5. Monday 5 + 6 = 11. Tuesday 11 - 2 = 9. Wednesday 9 - 0 = 9. The answer is 9.", True, 1.4, True, 1.0, ("too many steps",)),
    ("", False, -0.2, False, 0.0, ("no answer sentence", "not finished"))])
def test_gold_score(response, finished, score, correct, steps, faults):
    gold = gold_score(PROBLEM, response, finished=finished)
    assert gold.score == pytest.approx(score) and gold.correct is correct
    assert gold.steps_right == pytest.approx(steps) and gold.faults == faults


def test_an_answer_given_late_is_right_but_at_fault():
    gold = gold_score(PROBLEM, "The answer is 8. Start 5. The answer is 9.", finished=True)
    assert gold.correct and gold.faults == ("text after the answer",) and gold.score == pytest.approx(0.9)


def test_problems_without_solutions_count_no_steps():
    assert gold_score({"answer": "3.5", "solutions": []}, "Half of 7. The answer is 3.5.", finished=True) == (1.0, True, 0.0, ())


def test_steps_are_sentences_and_numbers_keep_their_points():
    assert split_steps(" Pay 3.5 + 1 = 4.5.  Done\n now. ") == ["Pay 3.5 + 1 = 4.5.", "Done now."]


def test_ranks_tie_and_start_at_one():
    assert dense_ranks([0.5, 1.5, 0.5, 1.5]) == [3, 1, 3, 1]
    assert dense_ranks([0.1 + 0.2, 0.3]) == [1, 1]


def test_an_annotator_without_errors_ranks_by_gold():
    rng = random.Random(0)
    for trial in range(50):
        gold = [rng.choice([0.0, 0.25, 0.5, 1.5]) for _ in range(6)]
        assert simulated_ranks(gold, error_rate=0.0, row_id=str(trial)) == dense_ranks(gold)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_with_two_responses_the_error_rate_is_the_share_of_flipped_pairs(rate):
    flipped = sum(simulated_ranks([1.0, 0.0], error_rate=rate, row_id=str(i)) == [2, 1] for i in range(4000))
    assert flipped / 4000 == pytest.approx(rate, abs=0.025)


def test_errors_swap_neighbours_more_than_extremes_and_leave_ties_of_two_alone():
    near = far = 0
    for i in range(2000):
        ranks = simulated_ranks([3.0, 2.0, 1.0, 0.0], error_rate=0.2, row_id=str(i))
        near += sum(ranks[a] > ranks[a + 1] for a in range(3)) / 3
        far += ranks[0] > ranks[3]
    assert far < 0.6 * near
    assert all(simulated_ranks([1.0, 1.0], error_rate=0.5, row_id=str(i)) == [1, 1] for i in range(20))


def test_errors_belong_to_the_row_and_the_seed():
    def ranks(seed, ids):
        return {i: simulated_ranks([2.0, 1.0, 0.0], error_rate=0.4, row_id=i, seed=seed) for i in ids}

    ids = [str(i) for i in range(30)]
    assert ranks(0, ids) == ranks(0, ids[::-1]) and ranks(0, ids) != ranks(1, ids)


def test_an_error_rate_beyond_guessing_is_refused():
    with pytest.raises(ValueError, match=r"0\.7 is not between 0 and 0\.5"):
        simulated_ranks([1.0, 0.0], error_rate=0.7, row_id="a")


def test_the_annotator_is_called_simulated():
    assert annotator_name(0.1).startswith("simulated")


def test_pairs_of_ranks_agree_with_gold_order():
    gold = [1.5, 0.2, 0.7, 0.7]
    ranks = simulated_ranks(gold, error_rate=0.0, row_id="x")
    for i, j in combinations(range(4), 2):
        assert (ranks[i] < ranks[j]) == (gold[i] > gold[j])
