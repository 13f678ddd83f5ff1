import pytest

from reward.sensitivity import REWRITES, Rewrite, said_otherwise, sensitivity


def by_length(rows):
    return [[float(len(text)) for text in row] for row in rows]


def test_rewrites_keep_meaning():
    changes = {name: rewrite.change("I add. The answer is 7.") for name, rewrite in REWRITES.items()}
    assert changes == {"boilerplate": "I add. The answer is 7. I hope this helps!", "whitespace": "I add.  The answer is 7.",
                       "punctuation": "I add. The answer is 7", "wording": "I add. So the answer is 7."}
    assert said_otherwise("So the answer is 7.") == "The answer is 7." and said_otherwise("Seven.") == "Seven."
    assert REWRITES["punctuation"].change("Seven") == "Seven." and REWRITES["punctuation"].change("Seven!") == "Seven!"


def test_shift_and_flips_of_a_judge_by_length():
    # Scores 4 > 2 > 1; "!" adds one. Pairs ordered right: (0, 1), (0, 2), (1, 2), each rewritten on either side: six trials.
    # (4, 2+1), (4, 1+1), (4+1, 2), (4+1, 1), (2+1, 1) stay, (2, 1+1) ties and counts half.
    found = sensitivity(by_length, [["aaaa", "bb", "c"]] * 2, [[1, 2, 3]] * 2, std=2.0,
                        rewrites={"more": Rewrite(lambda t: t + "!"), "none": Rewrite(lambda t: t)})
    assert set(found) == {"score_shift_more", "score_move_more", "flip_rate_more"}  # what changes nothing has no figure
    assert found["score_shift_more"][:2] == (0.5, 6) and found["flip_rate_more"].value == pytest.approx(0.5 / 6)
    assert found["flip_rate_more"].n == 12 and found["flip_rate_more"].num_prompts == 2


def test_only_worse_asks_whether_the_worse_can_buy_its_way_past():
    found = sensitivity(by_length, [["aaaa", "bb"]] * 2, [[1, 2]] * 2, std=1.0,
                        rewrites={"much": Rewrite(lambda t: t + "!!!", only_worse=True)})
    assert found["flip_rate_much"][:2] == (1.0, 2)
    wrong = sensitivity(by_length, [["aaaa", "bb"]] * 2, [[2, 1]] * 2, std=1.0, rewrites={"much": Rewrite(lambda t: t + "!!!")})
    assert "flip_rate_much" not in wrong  # a pair that was ordered wrong has no order to lose


def test_moves_up_and_down_cancel_in_the_shift_alone():
    found = sensitivity(by_length, [["aaa", "b"], ["aaa", "b"]], [[1, 2]] * 2, std=1.0,
                        rewrites={"even": Rewrite(lambda t: t[:-1] if len(t) > 1 else t + "c")})
    assert found["score_shift_even"].value == 0 and found["score_move_even"].value == 1
    with pytest.raises(ValueError, match="std is 0"):
        sensitivity(by_length, [["a", "b"]], [[1, 2]], std=0.0)
