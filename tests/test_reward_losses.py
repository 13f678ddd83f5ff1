import math
from itertools import pairwise, permutations

import pytest
import torch

from reward.losses import centring_penalty, listwise_loss, preferred, rank_distance, ranked_loss, reward_loss


def softplus(x):
    return math.log1p(math.exp(x))


def test_two_responses_are_bradley_terry():
    loss = ranked_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[2, 1]]))
    assert loss.item() == pytest.approx(-math.log(1 / (1 + math.exp(-2.0))))


def test_all_pairs_of_different_rank_count_and_ties_do_not():
    scores, ranks = torch.tensor([[2.0, 0.5, 1.0]]), torch.tensor([[1, 2, 2]])
    expected = (softplus(-1.5) + softplus(-1.0)) / 2
    assert ranked_loss(scores, ranks).item() == pytest.approx(expected)


def test_every_prompt_counts_once_and_padding_and_all_tied_prompts_not_at_all():
    scores = torch.tensor([[2.0, 0.5, 1.0], [0.0, 1.0, 99.0], [5.0, 7.0, 1.0]])
    ranks = torch.tensor([[1, 2, 2], [1, 2, 0], [1, 1, 1]])
    expected = ((softplus(-1.5) + softplus(-1.0)) / 2 + softplus(1.0)) / 2
    assert ranked_loss(scores, ranks).item() == pytest.approx(expected)
    assert not preferred(ranks)[1, :, 2].any() and not preferred(ranks)[1, 2].any()


def test_the_gradient_pushes_better_up_and_worse_down():
    scores = torch.zeros(1, 3, requires_grad=True)
    ranked_loss(scores, torch.tensor([[1, 2, 3]])).backward()
    # three pairs, each with gradient -+ 1/2, averaged: best -2/6, middle 0, worst +2/6
    assert scores.grad[0].tolist() == pytest.approx([-1 / 3, 0.0, 1 / 3])


def test_centring_squares_the_sum_of_a_pair():
    penalty = centring_penalty(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[1, 2, 2]]))
    assert penalty.item() == pytest.approx((1.0 + 6.25) / 2)


def test_no_pair_at_all_gives_zero_not_nan():
    assert ranked_loss(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.long)).item() == 0


def test_margin_grows_with_rank_distance_within_the_sigmoid():
    ranks = torch.tensor([[2, 1, 5, 2], [3, 1, 0, 0]])  # distinct ranks 1, 2, 5 lie one apart each
    assert rank_distance(ranks)[0].tolist() == [[0, 1, 1, 0], [1, 0, 2, 1], [1, 2, 0, 1], [0, 1, 1, 0]]
    assert rank_distance(ranks)[1, :2, :2].tolist() == [[0, 1], [1, 0]]
    scores = torch.tensor([[2.0, 0.5, 1.0]])
    expected = (softplus(-1.5 + 0.3) + softplus(-1.0 + 0.6) + softplus(0.5 + 0.3)) / 3
    assert ranked_loss(scores, torch.tensor([[1, 2, 3]]), margin=0.3).item() == pytest.approx(expected, abs=1e-6)


def test_smoothed_labels_turn_that_share_of_the_pairs_round():
    loss = ranked_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[2, 1]]), label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.9 * softplus(-2.0) + 0.1 * softplus(2.0))
    # the best difference of scores is then log(.9 / .1): no pair is worth more than it is sure
    scores = torch.tensor([[math.log(9.0), 0.0]], requires_grad=True)
    ranked_loss(scores, torch.tensor([[1, 2]]), label_smoothing=0.1).backward()
    assert scores.grad[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


def test_shares_of_annotators_are_soft_labels():
    """Three of four prefer the first to the second, nobody compared the others with the third; the ranks do not speak."""
    shares = torch.tensor([[[0.0, 0.75, 0.0], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    scores = torch.tensor([[1.0, 0.5, 9.0]])
    loss = ranked_loss(scores, torch.tensor([[1, 1, 2]]), shares=shares)
    assert loss.item() == pytest.approx(0.75 * softplus(-0.5) + 0.25 * softplus(0.5))
    certain = torch.tensor([[1, 2, 2]])
    assert ranked_loss(scores, certain, shares=preferred(certain).float()) == ranked_loss(scores, certain)


def by_enumeration(scores, ranks):
    """-log P(ranking): the sum over all orders that agree with it of the product of softmaxes, by hand."""
    size, total = len(scores), 0.0
    for order in permutations(range(size)):
        if all(ranks[a] <= ranks[b] for a, b in pairwise(order)):
            probability = 1.0
            for place, chosen in enumerate(order):
                probability *= math.exp(scores[chosen]) / sum(math.exp(scores[i]) for i in order[place:])
            total += probability
    return -math.log(total)


@pytest.mark.parametrize("ranks", [[1, 2, 3, 4], [4, 2, 1, 3], [1, 1, 2, 3], [2, 1, 2, 3], [1, 1, 1, 2], [2, 2, 1, 1], [1, 3, 3, 3],
                                   [7, 1, 7, 2]], ids=str)
def test_listwise_loss_is_the_sum_over_orders_of_the_tied(ranks):
    scores = [0.3, -1.2, 2.0, 0.7]
    choices = sum(rank < max(ranks) for rank in ranks)
    loss = listwise_loss(torch.tensor([scores], dtype=torch.float64), torch.tensor([ranks]))
    assert loss.item() == pytest.approx(by_enumeration(scores, ranks) / choices, rel=1e-10)


def test_listwise_loss_worked_by_hand():
    """Equal scores: the first of three is best with 1/3; two of three, in either order, are above the third with 1/3 as well."""
    zero = torch.zeros(1, 3)
    assert listwise_loss(zero, torch.tensor([[1, 2, 2]])).item() == pytest.approx(math.log(3))
    assert listwise_loss(zero, torch.tensor([[1, 1, 2]])).item() == pytest.approx(math.log(3) / 2)  # two choices
    assert listwise_loss(zero, torch.tensor([[1, 2, 3]])).item() == pytest.approx(math.log(6) / 2)


def test_listwise_loss_of_two_is_bradley_terry():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 2, generator=generator, dtype=torch.float64) * 5
    ranks = torch.tensor([[1, 2], [2, 1]]).repeat(25, 1)
    assert listwise_loss(scores, ranks).item() == pytest.approx(ranked_loss(scores, ranks).item(), abs=1e-12)


def test_listwise_loss_leaves_out_padding_and_all_tied_prompts():
    scores = torch.tensor([[0.3, -1.2, 2.0], [0.5, 1.0, 99.0], [5.0, 7.0, 1.0]])
    ranks = torch.tensor([[2, 1, 2], [2, 1, 0], [1, 1, 1]])
    expected = (by_enumeration([0.3, -1.2, 2.0], [2, 1, 2]) + softplus(-0.5)) / 2
    assert listwise_loss(scores, ranks).item() == pytest.approx(expected, rel=1e-6)
    assert listwise_loss(scores[2:], ranks[2:]).item() == 0


@pytest.mark.parametrize("settings", [{}, {"margin": 0.3}, {"label_smoothing": 0.1}, {"kind": "listwise"}], ids=str)
def test_gradients_are_right_and_finite_also_far_out(settings):
    ranks = torch.tensor([[1, 1, 2, 3], [3, 1, 1, 0], [2, 2, 2, 2], [4, 3, 2, 1]])
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: reward_loss(s, ranks, **settings), scores)
    far = (torch.randn(4, 4, generator=torch.Generator().manual_seed(2)) * 100).requires_grad_()  # float32
    loss = reward_loss(far, ranks, **settings)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(far.grad).all() and (far.grad[1, 3] == 0) and (far.grad[2] == 0).all()
    assert far.grad.sum().item() == pytest.approx(0, abs=1e-5)  # a constant on all scores says nothing


def test_losses_say_what_they_cannot_do():
    with pytest.raises(ValueError, match=r"at most 12 responses a prompt.*one has 13: set loss to pairs"):
        listwise_loss(torch.zeros(1, 13), torch.arange(1, 14)[None])
    with pytest.raises(ValueError, match="belong to pairs"):
        reward_loss(torch.zeros(1, 2), torch.tensor([[1, 2]]), kind="listwise", margin=1.0)
    with pytest.raises(ValueError, match="unknown loss 'listwis'"):
        reward_loss(torch.zeros(1, 2), torch.tensor([[1, 2]]), kind="listwis")
