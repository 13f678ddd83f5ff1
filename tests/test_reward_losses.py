import math

import pytest
import torch

from reward.losses import centring_penalty, preferred, ranked_loss


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
