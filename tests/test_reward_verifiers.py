import pytest

from reward.verifiers import dense_ranks, gold_score, split_steps

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
