import itertools
import random
from itertools import combinations

import pytest

from reward.annotators import Errors, Panel, annotator_name, simulated_ranks
from reward.verifiers import dense_ranks


def test_an_annotator_without_errors_ranks_by_gold():
    rng = random.Random(0)
    for trial in range(50):
        gold = [rng.choice([0.0, 0.25, 0.5, 1.5]) for _ in range(6)]
        ranks = simulated_ranks(gold, Errors(), row_id=str(trial))
        assert ranks == dense_ranks(gold)
        assert all((ranks[i] < ranks[j]) == (gold[i] > gold[j]) for i, j in combinations(range(6), 2))


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_with_two_responses_the_error_rate_is_the_share_of_flipped_pairs(rate):
    flipped = sum(simulated_ranks([1.0, 0.0], Errors(error_rate=rate), row_id=str(i)) == [2, 1] for i in range(4000))
    assert flipped / 4000 == pytest.approx(rate, abs=0.025)


def test_errors_swap_neighbours_more_than_extremes_and_leave_ties_of_two_alone():
    near = far = 0
    for i in range(2000):
        ranks = simulated_ranks([3.0, 2.0, 1.0, 0.0], Errors(error_rate=0.2), row_id=str(i))
        near += sum(ranks[a] > ranks[a + 1] for a in range(3)) / 3
        far += ranks[0] > ranks[3]
    assert far < 0.6 * near
    assert all(simulated_ranks([1.0, 1.0], Errors(error_rate=0.5), row_id=str(i)) == [1, 1] for i in range(20))


def test_errors_belong_to_the_row_the_seed_and_the_annotator():
    def ranks(seed, ids, annotator=0):
        return {i: simulated_ranks([2.0, 1.0, 0.0], Errors(error_rate=0.4), row_id=i, seed=seed, annotator=annotator) for i in ids}

    ids = [str(i) for i in range(30)]
    assert ranks(0, ids) == ranks(0, ids[::-1]) and ranks(0, ids) != ranks(1, ids) and ranks(0, ids) != ranks(0, ids, annotator=1)


def test_rankings_of_before_there_were_biases_stay_as_they_were():
    """Fixed by the first version of the annotator: studies with an error rate can be repeated."""
    gold = [1.5, 0.2, 0.7, 0.7]
    assert [simulated_ranks(gold, Errors(error_rate=0.3), row_id=f"row{i}") for i in range(4)] == [
        [1, 3, 2, 4], [3, 4, 1, 1], [1, 4, 2, 2], [1, 4, 2, 2]]


def test_certain_biases_decide_alone():
    gold, lengths = [3.0, 2.0, 1.0], [5, 9, 7]
    assert simulated_ranks(gold, Errors(position_bias=1), row_id="a", order=[2, 0, 1]) == [2, 3, 1]
    assert simulated_ranks(gold, Errors(length_bias=1), row_id="a", lengths=lengths) == [3, 1, 2]
    assert simulated_ranks(gold, Errors(length_bias=1), row_id="a", lengths=[4, 4, 4]) == [1, 2, 3]  # of equal length: gold decides
    assert simulated_ranks([1.0, 1.0], Errors(position_bias=1), row_id="a", order=[1, 0]) == [2, 1]  # also what is equally good


def test_asked_again_an_annotator_without_inconsistency_says_the_same():
    for i in range(50):
        first, again = (simulated_ranks([2.0, 1.0, 0.0], Errors(error_rate=0.4, length_bias=0.2), row_id=str(i), again=n,
                                        lengths=[1, 2, 3]) for n in (0, 1))
        assert first == again


@pytest.mark.parametrize(("values", "message"), [
    ({"error_rate": 0.7}, r"error_rate 0\.7 is not between 0 and 0\.5"), ({"inconsistency": 0.6}, "inconsistency 0.6"),
    ({"position_bias": -0.1}, "position_bias -0.1"), ({"position_bias": 0.6, "length_bias": 0.5}, "sum to at most 1")])
def test_errors_that_are_none_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Errors(**values)


@pytest.mark.parametrize("values", [{"annotators": 0}, {"overlap": 1.5}, {"repeat_share": -1}])
def test_panels_that_are_none_are_refused(values):
    with pytest.raises(ValueError, match="one annotator or more"):
        Panel(errors=Errors(), **values)
    with pytest.raises(ValueError, match="set repeat_share"):
        Panel(errors=Errors(inconsistency=0.2))


def test_the_name_says_that_it_is_simulated_and_with_which_errors():
    assert annotator_name(0.1) == "simulated: gold score, error rate 0.1"
    name = annotator_name(0.1, position_bias=0.2, length_bias=0.05, inconsistency=0.3, number=1, of=3)
    assert name == "simulated: gold score, error rate 0.1, position bias 0.2, length bias 0.05, inconsistency 0.3, annotator 2 of 3"


def test_a_panel_shares_prompts_out_and_asks_again():
    panel = Panel(errors=Errors(inconsistency=0.1), annotators=3, overlap=0.4, repeat_share=0.25)
    rankings = {i: panel.rank(f"p{i}", ["a", "bb", "ccc"], [2.0, 1.0, 0.0]) for i in range(2000)}
    assert rankings == {i: panel.rank(f"p{i}", ["a", "bb", "ccc"], [2.0, 1.0, 0.0]) for i in reversed(range(2000))}
    sizes = [len({r["annotator"] for r in part}) for part in rankings.values()]
    assert set(sizes) == {1, 3} and sizes.count(3) / 2000 == pytest.approx(0.4, abs=0.04)
    alone = [part[0]["annotator"] for part in rankings.values() if len({r["annotator"] for r in part}) == 1]
    assert all(alone.count(name) / len(alone) == pytest.approx(1 / 3, abs=0.05) for name in set(alone)) and len(set(alone)) == 3
    asked = list(itertools.chain(*rankings.values()))
    again = [r for r in asked if r["id"].endswith(":again")]
    assert len(again) / (len(asked) - len(again)) == pytest.approx(0.25, abs=0.03)
    assert len({(r["id"], r["annotator"]) for r in asked}) == len(asked)  # each ranking can be told from the others
    assert {tuple(r["order"]) for r in asked} == set(itertools.permutations(range(3)))


def test_a_single_annotator_who_does_not_look_at_the_order_sees_responses_as_drawn():
    (ranking,) = Panel(errors=Errors(error_rate=0.2, length_bias=0.1)).rank("p", ["a", "b"], [1.0, 0.0])
    assert ranking["order"] == [0, 1] and ranking["id"] == "p"
