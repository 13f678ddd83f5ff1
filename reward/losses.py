"""Losses of reward models as pure functions.

Letters: B prompts, K responses a prompt (padded), R = responses of all prompts.
"""
import torch.nn.functional as F
from torch import Tensor


def preferred(ranks: Tensor) -> Tensor:
    """(B, K, K) bool: True where the first index ranks above the second. `ranks` (B, K): 1 is best, 0 is padding; ties are False."""
    real = ranks > 0
    return (ranks[:, :, None] < ranks[:, None, :]) & real[:, :, None] & real[:, None, :]


def per_prompt(values: Tensor, pairs: Tensor) -> Tensor:
    """Mean over prompts of the mean over each prompt's pairs: () from two (B, K, K).

    One prompt counts once, however many pairs its K responses make (Ouyang et al. 2022, section 3.4): pairs of one
    prompt share responses and are not independent. Prompts without a pair are left out.
    """
    count = pairs.sum((1, 2))
    return ((values * pairs).sum((1, 2)) / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


def ranked_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Bradley-Terry over all pairs of different rank: () from scores (B, K) float and ranks (B, K) int, 0 for padding.

    -log sigmoid(score of the better - score of the worse) (Bradley and Terry 1952; Ouyang et al. 2022, equation 1). Ties
    carry no pair, which is also what a partial ranking says about its tied responses.
    """
    return per_prompt(F.softplus(scores[:, None, :] - scores[:, :, None]), preferred(ranks))


def centring_penalty(scores: Tensor, ranks: Tensor) -> Tensor:
    """Mean squared sum of the two scores of a pair: () (Eisenstein et al. 2023, equation 2). Keeps scores near zero."""
    return per_prompt((scores[:, None, :] + scores[:, :, None]) ** 2, preferred(ranks))
