"""PPO's formulas on numbers worked by hand."""
import math

import pytest
import torch

from stages.rl.maths import (
    adapt_kl_coef,
    advantages_and_returns,
    approx_kl,
    clip_scores,
    explained_variance,
    final_scores,
    importance_weights,
    k2,
    masked_mean,
    masked_var,
    mismatch,
    penalise_length,
    policy_loss,
    preference_as_reward,
    token_rewards,
    value_loss,
    whiten,
)
from stages.rl.measure import reward_drift, summarise

MASK = torch.tensor([[True, True, True], [True, False, False], [False, True, True]])  # padding right, and left


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **tolerance)


def test_masked_mean_and_variance_ignore_padding():
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, float("nan")], [float("inf"), 5.0, 9.0]])
    close(masked_mean(x, MASK), 4.0)  # (1 + 2 + 3 + 4 + 5 + 9) / 6
    close(masked_var(x, MASK), 40 / 6)  # 9 + 4 + 1 + 0 + 1 + 25


def test_whiten_uses_all_rows_together():
    x = torch.tensor([[1.0, 3.0], [5.0, 77.0]])
    mask = torch.tensor([[True, True], [True, False]])
    root = math.sqrt(8 / 3)  # mean 3, deviations -2 0 2
    close(whiten(x, mask), [[-2 / root, 0.0], [2 / root, 0.0]])
    assert not torch.allclose(whiten(x, mask)[:1], whiten(x[:1], mask[:1])), "a share whitened alone differs"


def test_penalty_replaces_the_score():
    scores, finished = torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    close(final_scores(scores, finished, -1.0), [2.0, -1.0])  # not 3 - 1
    close(final_scores(scores, finished, None), [2.0, 3.0])


def test_token_rewards_are_k1_with_the_score_at_the_last_real_token():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 9.0, 9.0], [9.0, -1.0, -1.0]])
    ref = torch.tensor([[-1.5, -2.0, -1.0], [-2.0, 5.0, 5.0], [5.0, -3.0, -1.0]])
    rewards = token_rewards(logprobs, ref, torch.tensor([10.0, 20.0, 30.0]), MASK, kl_coef=0.1)
    close(rewards, [[-0.05, 0.0, 10.2], [19.9, 0.0, 0.0], [0.0, -0.2, 30.0]])


def test_k1_in_the_reward_has_the_gradient_of_the_kl_and_k3_does_not():
    """Exact on a three-way choice: E[reward x grad log p] against the gradient of KL(p || q) by autograd."""
    logits, q = torch.tensor([0.3, -0.4, 1.1], requires_grad=True), torch.tensor([0.2, 0.5, 0.3])
    p = logits.softmax(0)
    (true,) = torch.autograd.grad((p * (p / q).log()).sum(), logits, retain_graph=True)
    log_ratio = (p.log() - q.log()).detach()
    one_token = torch.ones(3, 1, dtype=torch.bool)
    k1 = -token_rewards(log_ratio[:, None], torch.zeros(3, 1), torch.zeros(3), one_token, kl_coef=1.0)[:, 0]
    k3 = torch.exp(-log_ratio) - 1 + log_ratio
    (ours,) = torch.autograd.grad((p.detach() * k1 * p.log()).sum(), logits, retain_graph=True)
    (other,) = torch.autograd.grad((p.detach() * k3 * p.log()).sum(), logits)
    close(ours, true)
    assert not torch.allclose(other, true, atol=1e-2)


def test_k2_in_the_loss_has_the_gradient_of_the_kl_and_k1_and_k3_do_not():
    """Exact on a three-way choice, over the policy's own draws: E[grad k2] against the gradient of KL(p || q) by autograd."""
    logits, q = torch.tensor([0.3, -0.4, 1.1], requires_grad=True), torch.tensor([0.2, 0.5, 0.3])
    p = logits.softmax(0)
    (true,) = torch.autograd.grad((p * (p / q).log()).sum(), logits, retain_graph=True)

    def mean_gradient(loss):
        return torch.autograd.grad((p.detach() * loss).sum(), logits, retain_graph=True)[0]

    close(mean_gradient(k2(p.log(), q.log())), true)
    close(mean_gradient(p.log() - q.log()), [0.0, 0.0, 0.0], atol=1e-6, rtol=0)
    assert not torch.allclose(mean_gradient(approx_kl(q.log(), p.log())), true, atol=1e-2)


def test_scores_are_clipped():
    close(clip_scores(torch.tensor([-3.0, 0.5, 9.0]), 2.0), [-2.0, 0.5, 2.0])
    close(clip_scores(torch.tensor([-3.0, 9.0]), None), [-3.0, 9.0])


def test_length_has_its_price():
    close(penalise_length(torch.tensor([1.0, 1.0]), torch.tensor([10.0, 0.0]), 0.05), [0.5, 1.0])


def test_par_is_the_mean_chance_of_being_preferred():
    third = math.log(0.5)  # sigmoid of it is 1/3
    scores = torch.tensor([2.0, 1.0, 50.0])
    reference = torch.tensor([[2.0, 2.0], [1.0, 1.0 - third], [0.0, 0.0]])
    close(preference_as_reward(scores, reference), [0.5, (1 / 2 + 1 / 3) / 2, 1.0])


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 7.0, 7.0], [7.0, 1.0, 1.0]])
    values = torch.tensor([[0.5, 1.0, 1.5], [1.0, 9.0, 9.0], [9.0, 2.0, 4.0]])
    advantages, returns = advantages_and_returns(rewards, values, MASK, gamma=0.5, lam=0.5)
    # row 0: deltas 1 + .5 - .5 = 1, 0 + .75 - 1 = -.25, 2 - 1.5 = .5; then -.25 + .25 x .5 = -.125, 1 + .25 x -.125 = .96875
    # row 2: deltas 1 + 2 - 2 = 1, 1 - 4 = -3; then 1 + .25 x -3 = .25
    close(advantages, [[0.96875, -0.125, 0.5], [2.0, 0.0, 0.0], [0.0, 0.25, -3.0]])
    close(returns, [[1.46875, 0.875, 2.0], [3.0, 0.0, 0.0], [0.0, 2.25, 1.0]])


def slow_gae(rewards, values, gamma, lam):
    """Equation 16 of Schulman et al. 2016 as it is written: each advantage is its own sum over all later errors, O(T^2)."""
    following = [*values[1:], 0.0]
    deltas = [r + gamma * f - v for r, v, f in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))]


@pytest.mark.parametrize("side", ["left", "right"])
def test_gae_equals_its_definition_and_ignores_padding(side):
    generator = torch.Generator().manual_seed(0)
    lengths, width = [1, 4, 9], 12  # three columns more than the longest
    rewards, values = (torch.randn(3, width, generator=generator, dtype=torch.float64) for _ in range(2))
    columns, counts = torch.arange(width), torch.tensor(lengths)[:, None]
    mask = columns >= width - counts if side == "left" else columns < counts
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma=0.97, lam=0.9)
    for i in range(3):
        expected = torch.tensor(slow_gae(rewards[i, mask[i]].tolist(), values[i, mask[i]].tolist(), 0.97, 0.9))
        close(advantages[i, mask[i]], expected)
        close(returns[i, mask[i]], expected + values[i, mask[i]])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_with_lambda_one_is_the_discounted_return_whatever_the_critic():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[5.0, -3.0, 8.0]])
    _, returns = advantages_and_returns(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, lam=1.0)
    close(returns, [[3.0, 4.0, 4.0]])


def test_policy_loss_clips_only_where_that_is_pessimistic():
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0]])
    loss, clipped = policy_loss(ratio.log(), torch.zeros(1, 5), advantages, cliprange=0.2)
    close(loss, [[-1.2, -0.5, 1.5, 0.8, -2.2]])
    assert clipped.tolist() == [[True, False, False, True, False]]


def test_clipped_tokens_have_no_gradient():
    logprobs = torch.tensor([[0.5, 0.0]], requires_grad=True)
    policy_loss(logprobs, torch.zeros(1, 2), torch.ones(1, 2), cliprange=0.2)[0].sum().backward()
    close(logprobs.grad, [[0.0, -1.0]])


def test_importance_weights_by_hand():
    """Probabilities .6 and .2 where the engine had .4 and .1: 1.5, and 2 held at the cap of 1.8; .1 where it had .5: .2; unknown: 1."""
    ours, theirs = torch.tensor([[0.6, 0.2], [0.1, 0.3]]).log(), torch.tensor([[0.4, 0.1], [0.5, float("nan")]]).log()
    close(importance_weights(ours, theirs, cap=1.8), [[1.5, 1.8], [0.2, 1.0]])
    assert torch.equal(importance_weights(ours, ours, cap=2.0), torch.ones(2, 2))


def test_mismatch_by_hand():
    """Differences of log 2, -log 4 and one unknown; what lies at padding is not looked at."""
    ours, theirs = torch.tensor([[0.8, 0.1], [0.3, 0.9]]).log(), torch.tensor([[0.4, 0.4], [float("nan"), 1e-9]]).log()
    mean, most, ratio = mismatch(ours, theirs, torch.tensor([[True, True], [True, False]]))
    close(mean, 1.5 * math.log(2))
    close(most, 2 * math.log(2))
    close(ratio, (2 + 0.25) / 2)


def test_weights_make_another_engines_tokens_an_estimate_of_the_policys_gradient():
    """Exact on a three-way choice: the mean over mu of (pi / mu) x A x grad log pi is the gradient over pi's own tokens."""
    logits, mu = torch.tensor([0.3, -0.4, 1.1], requires_grad=True), torch.tensor([0.2, 0.5, 0.3])
    advantages, log_pi = torch.tensor([1.0, -2.0, 0.5]), logits.log_softmax(0)
    (true,) = torch.autograd.grad((log_pi.exp() * advantages).sum(), logits, retain_graph=True)

    def estimate(weights):
        loss, _ = policy_loss(log_pi, log_pi.detach(), advantages, cliprange=0.2)
        return -torch.autograd.grad((mu * weights * loss).sum(), logits, retain_graph=True)[0]

    close(estimate(importance_weights(log_pi.detach(), mu.log(), cap=100.0)), true)
    assert not torch.allclose(estimate(torch.ones(3)), true, atol=0.05)


def test_value_loss_by_hand():
    values, old, returns = torch.tensor([[1.0, 1.0, 0.1]]), torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 1.0]])
    loss, clipped = value_loss(values, old, returns, cliprange=0.2)
    close(loss, [[0.5 * 0.64, 0.5 * 3.24, 0.5 * 0.81]])  # held at .2, at .2, free at .1
    assert clipped.tolist() == [[True, True, False]]


def test_approx_kl_is_k3():
    close(approx_kl(torch.tensor([[math.log(2.0), 0.0]]), torch.zeros(1, 2)), [[1 - math.log(2.0), 0.0]])


def test_explained_variance():
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    close(explained_variance(returns + 5, returns, mask), 1.0)
    close(explained_variance(torch.zeros(1, 3), returns, mask), 0.0)
    close(explained_variance(torch.tensor([[0.0, 2.0, 4.0]]), returns, mask), 0.0)  # errors 1 0 -1, as wide as the returns
    for values in (returns, torch.zeros(1, 3)):  # nothing to explain
        close(explained_variance(values, torch.zeros(1, 3), mask), 0.0)


@pytest.mark.parametrize(("kl", "expected"), [(6.0, 0.1), (6.6, 0.1 * (1 + 0.1 * 0.02)), (60.0, 0.1 * 1.004), (0.0, 0.1 * 0.996)])
def test_adaptive_kl_coefficient(kl, expected):
    assert adapt_kl_coef(0.1, kl, target=6.0, horizon=10_000, num_responses=200) == pytest.approx(expected)


def test_a_column_without_spread_gets_no_interval_of_zero_width():
    metrics = summarise({"greedy_accuracy": [1.0] * 10, "length": [5.0] * 10, "gold": [1.0, 2.0, 3.0]}, "after")
    assert metrics["after/greedy_accuracy"]["ci95"] == pytest.approx([0.7225, 1.0], abs=1e-3)  # Wilson, 10 of 10
    assert "ci95" not in metrics["after/length"]
    assert metrics["after/gold"]["ci95"] == pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5], abs=1e-3)  # t, 2 degrees


def test_how_well_the_reward_orders_samples_before_and_after_by_hand():
    before = {"pairs_right": [3.0, 0.5, 0.0], "pairs": [4.0, 1.0, 0.0]}  # the third problem's samples are all alike
    after = {"pairs_right": [0.0, 0.0, 0.0], "pairs": [0.0, 0.0, 0.0]}
    found = reward_drift(before, after)
    assert set(found) == {"before/reward_accuracy"} and found["before/reward_accuracy"]["value"] == 3.5 / 5
    assert found["before/reward_accuracy"]["n"] == 5
    assert set(summarise({"score": [1.0, 2.0], **{name: values[:2] for name, values in before.items()}}, "before")) == {"before/score"}
