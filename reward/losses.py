"""Losses of reward models as pure functions.

Letters: B prompts, K responses a prompt (padded), S = 2**K sets of responses. Scores are float, `ranks` int: 1 is best, equal numbers
tie, 0 is padding.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

MOST_LISTED = 12  # responses a prompt that the listwise loss takes: it visits each of their 2**K sets


def preferred(ranks: Tensor) -> Tensor:
    """(B, K, K) bool: True where the first index ranks above the second. `ranks` (B, K): 1 is best, 0 is padding; ties are False."""
    real = ranks > 0
    return (ranks[:, :, None] < ranks[:, None, :]) & real[:, :, None] & real[:, None, :]


def per_prompt(values: Tensor, pairs: Tensor) -> Tensor:
    """Mean over prompts of the mean over each prompt's pairs: () from two (B, K, K); `pairs` are bool, or weights.

    One prompt counts once, however many pairs its K responses make (Ouyang et al. 2022, section 3.4): pairs of one
    prompt share responses and are not independent. Prompts without a pair are left out.
    """
    count = pairs.sum((1, 2))
    return ((values * pairs).sum((1, 2)) / count.clamp_min(1)).sum() / (count > 0).sum().clamp_min(1)


def rank_distance(ranks: Tensor) -> Tensor:
    """(B, K, K): distinct ranks between two responses, 0 for a tie ([1, 1, 3] -> 1 from first to last); of padding no meaning."""
    better = preferred(ranks)
    repeats = torch.tril(ranks[:, :, None] == ranks[:, None, :], -1).any(2)  # (B, K): an earlier response has the same rank
    level = (better & ~repeats[:, :, None]).sum(1)
    return (level[:, None, :] - level[:, :, None]).abs()


def ranked_loss(scores: Tensor, ranks: Tensor, *, margin: float = 0.0, label_smoothing: float = 0.0,
                shares: Tensor | None = None) -> Tensor:
    """Bradley-Terry over all pairs of different rank: () from scores (B, K) float and ranks (B, K) int, 0 for padding.

    -log sigmoid(score of the better - score of the worse) (Bradley and Terry 1952; Ouyang et al. 2022, equation 1). Ties
    carry no pair, which is also what a partial ranking says about its tied responses.

    `margin` times the rank distance is subtracted within the sigmoid: responses far apart in rank are to be far apart in score
    (Touvron et al. 2023, section 3.2.2). With `label_smoothing` each pair is the other way round with that probability (Mitchell
    2023, A note on DPO with noisy preferences). `shares` (B, K, K) float takes the place of the ranks' certainty: the share of
    annotators who put the first response above the second; two opposite shares sum to 1, or both are 0 where nobody compared. Pairs
    then need not differ in rank.
    """
    values = F.softplus(scores[:, None, :] - scores[:, :, None] + margin * rank_distance(ranks)) if margin else F.softplus(
        scores[:, None, :] - scores[:, :, None])
    pairs = preferred(ranks) if shares is None else shares
    if label_smoothing:
        pairs = (1 - label_smoothing) * pairs + label_smoothing * pairs.mT
    return per_prompt(values, pairs)


def listwise_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """Plackett-Luce with ties: () from scores and ranks (B, K).

    A ranking is a row of choices, each of the best response that is left, with probability softmax(scores of those left) (Luce 1959;
    Plackett 1975). Tied responses were chosen one after another in an order that nobody told, so that the probability is the sum
    over their orders (Kalbfleisch and Prentice 1973, the exact likelihood of tied failure times, has the same form). Ties in the
    last place cost nothing, two responses are Bradley-Terry, and an all-tied prompt tells nothing and is left out.

    The sum is taken by dynamic programming over the sets that may have been chosen so far, 2**K of them. Each prompt's negative
    log-likelihood is divided by its choices (responses above the last rank), as `ranked_loss` is by its pairs, so that learning
    rates serve both. Raises ValueError for more than 12 responses a prompt.
    """
    (rows, size), device = scores.shape, scores.device
    if size > MOST_LISTED:
        raise ValueError(f"loss listwise takes at most {MOST_LISTED} responses a prompt, because it sums over the orders of tied ones; "
                         f"one has {size}: set loss to pairs")
    never = -1e9  # finite: the gradient of logsumexp over infinities is not a number
    real, item = ranks > 0, torch.arange(size, device=device)
    sets = torch.arange(1 << size, device=device)
    chosen = (sets[:, None] >> item & 1).bool()  # (S, K)
    left = scores[:, None, :].masked_fill(chosen | ~real[:, None, :], never).logsumexp(2)  # (B, S)
    too_early = torch.einsum("bji,sj->bsi", preferred(ranks).float(), (~chosen).float()) > 0  # someone better is still left
    step = (scores[:, None, :] - left[:, :, None]).masked_fill(chosen | too_early | ~real[:, None, :], never)  # (B, S, K)
    before = torch.where(chosen, sets[:, None] ^ (1 << item), 0)  # (S, K): the set without this response
    likelihood = torch.full((rows, len(sets)), never, dtype=scores.dtype, device=device)
    likelihood[:, 0] = 0
    last = torch.where(real, ranks, 0).amax(1, keepdim=True)
    choices = (real & (ranks < last)).sum(1)  # (B,)
    top = ((real & (ranks < last)) * (1 << item)).sum(1, keepdim=True)  # (B, 1): the set of all above the last rank
    total = likelihood[:, 0]
    for number in range(1, int(choices.max()) + 1):
        likelihood = (likelihood[:, before] + step[:, before, item]).masked_fill(~chosen, never).logsumexp(2)
        total = torch.where(choices == number, likelihood.gather(1, top)[:, 0], total)
    return -(total / choices.clamp_min(1)).sum() / (choices > 0).sum().clamp_min(1)


def reward_loss(scores: Tensor, ranks: Tensor, *, kind: str = "pairs", margin: float = 0.0, label_smoothing: float = 0.0,
                shares: Tensor | None = None) -> Tensor:
    """`ranked_loss` (kind pairs) or `listwise_loss` (kind listwise): (). Raises ValueError for what a list of choices cannot have."""
    if kind == "pairs":
        return ranked_loss(scores, ranks, margin=margin, label_smoothing=label_smoothing, shares=shares)
    if kind != "listwise":
        raise ValueError(f"unknown loss {kind!r}: choose pairs or listwise")
    if margin or label_smoothing or shares is not None:
        raise ValueError("margin, label_smoothing and shares belong to pairs: leave them out, or set loss to pairs")
    return listwise_loss(scores, ranks)


def centring_penalty(scores: Tensor, ranks: Tensor) -> Tensor:
    """Mean squared sum of the two scores of a pair: () (Eisenstein et al. 2023, equation 2). Keeps scores near zero."""
    return per_prompt((scores[:, None, :] + scores[:, :, None]) ** 2, preferred(ranks))
