"""Judges that know nothing, on responses made so that what each can know is known."""
import random

import pytest

from reward.baselines import against_baselines, out_of_fold, surface, tokens
from reward.calibration import accuracy, accuracy_difference, judged


def pairs_of(make, n=60, seed=0):
    """n prompts with a better and a worse response, in either order."""
    rng = random.Random(seed)
    responses, ranks = [], []
    for _ in range(n):
        better, worse = make(rng)
        turned = rng.random() < 0.5
        responses.append([worse, better] if turned else [better, worse])
        ranks.append([2, 1] if turned else [1, 2])
    return responses, ranks


def found(name, responses, ranks, **more):
    return accuracy(judged(out_of_fold(name, responses, ranks, **more), ranks)).value


@pytest.mark.parametrize("longer_is_better", [True, False])
def test_length_learns_which_way_it_goes_from_the_other_folds(longer_is_better):
    responses, ranks = pairs_of(lambda rng: ("ab " * rng.randint(5, 9), "ab " * rng.randint(1, 4))[::1 if longer_is_better else -1])
    assert found("length", responses, ranks) == 1.0
    assert found("length", [[list(range(len(r))) for r in row] for row in responses], ranks) == 1.0  # token ids


def test_tfidf_knows_words_that_length_cannot_and_works_on_token_ids():
    responses, ranks = pairs_of(lambda rng: (f"a fine {rng.randint(100, 999)} yes", f"a poor {rng.randint(100, 999)} yes"))
    assert found("tfidf", responses, ranks) == 1.0 and found("length", responses, ranks) == 0.5
    ids = {word: i for i, word in enumerate(sorted({w for row in responses for r in row for w in tokens(r)}))}
    assert found("tfidf", [[[ids[w] for w in tokens(r)] for r in row] for row in responses], ranks) == 1.0


def test_features_see_repetition_where_length_is_the_same():
    responses, ranks = pairs_of(lambda rng: ("one two six ten", "one one one one"))
    assert found("features", responses, ranks) == 1.0 and found("length", responses, ranks) == 0.5
    assert surface("A b, b 12\n") == [10.0, 5.0, 0.8, 1.0, 0.2, 0.1, 0.1, 1.0, 0.0]
    assert surface([5, 5, 5, 6]) == [4.0, 4.0, 0.5, 2 / 3]


def test_pairs_of_one_prompt_are_never_on_both_sides():
    """Each prompt has its own word for good: with the prompt's other pair among the training pairs it would be learned."""
    responses, ranks, keys = [], [], []
    for prompt in range(40):
        for _ in range(2):
            responses.append([f"w{prompt}a", f"w{prompt}b"])
            ranks.append([1, 2] if prompt % 2 else [2, 1])
            keys.append(prompt)
    assert found("tfidf", responses, ranks, keys=keys) == 0.5
    assert found("tfidf", responses, ranks) > 0.8  # the same entries as prompts of their own


def test_no_signal_no_lead():
    responses, ranks = pairs_of(lambda rng: tuple(" ".join(rng.choice("abcdefgh") for _ in range(9)) for _ in "xy"), n=200)
    for name in ("features", "tfidf"):
        outcome = accuracy(judged(out_of_fold(name, responses, ranks), ranks))
        assert outcome.low < 0.5 < outcome.high


def test_against_baselines_pairs_the_same_pairs():
    responses, ranks = pairs_of(lambda rng: ("yes " * rng.randint(1, 9), "no " * rng.randint(1, 9)))
    scores = [[2.0 - rank for rank in row] for row in ranks]
    figures = against_baselines(scores, ranks, responses)
    assert set(figures) == {f"{kind}{name}{end}" for name in ("length", "features", "tfidf")
                            for kind, end in (("baseline_", "_accuracy"), ("gain_over_", ""))}
    theirs = judged(out_of_fold("length", responses, ranks), ranks)
    assert figures["baseline_length_accuracy"] == accuracy(theirs)
    assert (figures["gain_over_length"].value, figures["gain_over_length"].low, figures["gain_over_length"].high) == accuracy_difference(
        judged(scores, ranks), theirs)
    assert figures["gain_over_length"].n == 60 and figures["gain_over_tfidf"].value == 0


def test_bad_input_says_what_to_do():
    with pytest.raises(ValueError, match="choose from length, features, tfidf"):
        out_of_fold("size", [["a", "b"]] * 9, [[1, 2]] * 9)
    with pytest.raises(ValueError, match="3 prompts cannot be dealt into 5 folds"):
        out_of_fold("length", [["a", "b"]] * 3, [[1, 2]] * 3)
    with pytest.raises(ValueError, match="0 pairs of different rank to fit length on"):
        out_of_fold("length", [["a", "b"]] * 5, [[1, 1]] * 5)


def test_baselines_that_learn_from_other_prompts_know_what_those_tell_and_nothing_of_what_is_measured():
    """Among the measured pairs the word is the other way round than in training: who had learned from them would be right."""
    train = pairs_of(lambda rng: ("good pen", "poor pen"), n=40)
    responses, ranks = pairs_of(lambda rng: ("poor pen", "good pen"), n=40, seed=1)
    scores = [[2.0 - rank for rank in row] for row in ranks]
    assert against_baselines(scores, ranks, responses)["baseline_tfidf_accuracy"].value == 1.0
    figures = against_baselines(scores, ranks, responses, train=train)
    assert figures["baseline_tfidf_accuracy"].value == 0.0 and figures["gain_over_tfidf"].value == 1.0
    few = against_baselines(scores[:3], ranks[:3], responses[:3], train=train)  # fewer prompts than folds
    assert few["baseline_length_accuracy"].n == 3
