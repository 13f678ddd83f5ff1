"""The mathematics of PPO with per-token KL, as pure functions of tensors.

Letters: B responses, T response tokens. Masks (B, T) are bool, True at real response tokens, which are contiguous in each row;
padding may stand on either side. All tensors are float32 (B, T) unless stated otherwise. Per-token losses are returned unreduced:
the caller divides their sum by the tokens of the global minibatch, so that neither accumulation nor the number of processes
changes the gradient.

Sources: Schulman et al. 2016 (GAE); Schulman et al. 2017 (PPO); Ziegler et al. 2019 (KL in the reward, adaptive coefficient);
Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"; Schulman 2020, "Approximating KL Divergence" (a blog note);
Fu et al. 2025, "Reward Shaping to Mitigate Reward Hacking in RLHF" (PAR); Yao et al. 2025, "Your Efficient RL Framework Secretly
Brings You Off-Policy RL Training" (truncated importance sampling; a blog note).
"""
import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the True positions of the whole batch, a scalar."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Variance over the True positions around their own mean, without Bessel's correction, a scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over the True positions, 0 elsewhere.

    Give it the rollout batch of all processes: with statistics of one's own share the result would depend on how many there are.
    """
    mean, var = masked_mean(x, mask), masked_var(x, mask)
    return torch.where(mask, (x - mean) * torch.rsqrt(var + epsilon), 0.0)


def final_scores(scores: Tensor, finished: Tensor, missing_eos_penalty: float | None) -> Tensor:
    """(B,) scores to learn from: the penalty *replaces* the score of a response that did not end itself (`finished` (B,) bool).

    A reward model has not learned to judge text that was cut off (the "EOS trick" of Huang et al. 2024).
    """
    if missing_eos_penalty is None:
        return scores
    return torch.where(finished, scores, torch.full_like(scores, missing_eos_penalty))


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """(B,) scores held within +-`limit`; None leaves them. What a score beyond those of its training samples says is not known."""
    return scores if limit is None else scores.clamp(-limit, limit)


def preference_as_reward(scores: Tensor, reference_scores: Tensor) -> Tensor:
    """PAR: (B,) from scores (B,) and those of M responses of the reference to the same prompts (B, M): mean of sigmoid(difference).

    The probability, by Bradley and Terry, of being preferred to what the reference says: bounded in (0, 1), steepest where the
    policy starts and flat where only a mistaken reward model sees progress (Fu et al. 2025). It is that probability for scores
    that are logits; for normalised ones the curve is the same and its steepness one a standard deviation of SFT samples.
    """
    return torch.sigmoid(scores[:, None] - reference_scores).mean(dim=1)


def penalise_length(scores: Tensor, lengths: Tensor, coef: float) -> Tensor:
    """(B,) scores less `coef` for each token; `lengths` (B,) in tokens, the end token counted (Singhal et al. 2023)."""
    return scores - coef * lengths


def token_rewards(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token: -kl_coef x (log pi - log pi_ref), and the response's score (B,) added at its last real token.

    The log-ratio is Schulman's k1. In the *reward* k1 has the gradient of the KL divergence; k3 does not, although it is the
    better estimate of its value (Tang & Munos 2025). Ziegler et al. 2019, section 2.
    """
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0)
    positions = torch.arange(mask.size(1), device=mask.device)
    last = torch.where(mask, positions, -1).max(dim=1).values
    rewards[torch.arange(len(scores), device=mask.device), last] += scores
    return rewards


def advantages_and_returns(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (advantages + values), 0 outside the mask.

    The value after the last token is 0: a response is an episode (Schulman et al. 2016, equation 16).
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(values)
    following, running = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    for t in reversed(range(values.size(1))):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, 0.0)
        advantages[:, t] = running
        following = values[:, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, cliprange: float) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss of each token and whether clipping was active there (bool). Schulman et al. 2017, equation 7."""
    ratio = torch.exp(logprobs - old_logprobs)
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(free, clipped), clipped > free


def importance_weights(logprobs: Tensor, engine_logprobs: Tensor, *, cap: float) -> Tensor:
    """Weight of each token that another engine sampled: pi / mu, at most `cap`; `logprobs` are log pi of the trainer as it was then.

    pi and mu have the same weights and round differently, so the policy gradient over mu's tokens is not pi's own. The ratio puts
    that right, and the cap bounds its variance (Yao et al. 2025). 1 where `engine_logprobs` are NaN, which is: not known.
    """
    known = torch.where(engine_logprobs.isnan(), logprobs, engine_logprobs)
    return torch.exp(logprobs - known).clamp(max=cap)


def mismatch(logprobs: Tensor, engine_logprobs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and maximum of |log pi - log mu| over real tokens, and the mean of pi / mu, three scalars; NaN of an engine is left out.

    The mean of pi / mu over mu's own tokens is 1 however far apart they are, so another value says that `engine_logprobs` are not
    those that were sampled from (a temperature left out), or that few tokens carry much of the weight.
    """
    known = mask & ~engine_logprobs.isnan()
    difference = torch.where(known, logprobs - engine_logprobs, 0.0)
    return masked_mean(difference.abs(), known), difference.abs().max(), masked_mean(torch.exp(difference), known)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange: float) -> tuple[Tensor, Tensor]:
    """Clipped value loss of each token and whether clipping was active there (bool).

    Half the squared error, the larger of the plain one and that of the value held within `cliprange` of the old one. Not in the
    text of Schulman et al. 2017 but in its code (Engstrom et al. 2020, section 3).
    """
    held = old_values + (values - old_values).clamp(-cliprange, cliprange)
    free, clipped = (values - returns) ** 2, (held - returns) ** 2
    return 0.5 * torch.maximum(free, clipped), clipped > free


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k2 of each token, (log pi - log pi_ref)^2 / 2, for the *loss*.

    Its derivative is (log pi - log pi_ref) x grad log pi, whose mean over the policy's own tokens is the gradient of their KL
    divergence; k1 in the loss has the mean gradient zero, and k3 that of the other direction (Tang & Munos 2025). It sees each
    token's own divergence; in the reward k1 also sees where a token leads to.
    """
    return 0.5 * (logprobs - ref_logprobs) ** 2


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """KL(old || new) of each token by Schulman's k3, (r - 1) - log r with r = new / old: unbiased and never negative."""
    log_ratio = logprobs - old_logprobs
    return torch.expm1(log_ratio) - log_ratio


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over real tokens, a scalar: 1 is a perfect critic, 0 no better than a constant.

    0 where the returns are all the same, too: there is nothing to explain, and a 1 would make what comes later look like a fall.
    """
    total = masked_var(returns, mask)
    return torch.where(total > 1e-12, 1 - masked_var(returns - values, mask) / total, 0.0)


def adapt_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: float, num_responses: int) -> float:
    """The coefficient after a batch of `num_responses` whose mean KL per response was `kl`; without a target it is fixed.

    A proportional controller in log space with its error clipped to 20 % (Ziegler et al. 2019, section 2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_responses / horizon)
