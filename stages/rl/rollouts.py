"""From prompts to experience: what is sampled in an iteration, what the models say about it, and the numbers PPO learns from.

Letters: N responses of an iteration over all processes, R tokens of the longest.
"""
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward.verifiers import GoldScore
from stages.models.training import gather
from stages.rl import maths
from stages.rl.models import TokenStats, align_right, pad_sequences, policy_stats
from stages.rl.rewards import Response, Row

LOGITS = 1 << 28  # elements of the logits of responses read without a gradient, 1 GiB in float32: 1,800 tokens of 150,000 words


class Scored(NamedTuple):
    """A response with its score (normalised, before any shaping), the judge's opinion if there is one, a number for each of its
    tokens in one-dimensional tensors on the CPU, what watchers say about it, for alarms alone, the scores of what the reference
    says to the same prompt, if PAR needs them, and its tokens' log-probabilities by the engine that sampled it, if one did."""

    response: Response
    score: float
    gold: GoldScore | None
    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor
    watched: Mapping[str, float] = {}
    reference_scores: tuple[float, ...] = ()
    engine_logprobs: Tensor | None = None


class Experience(NamedTuple):
    """An iteration's responses, the same on every process; tensors (N, R) on the CPU, in the columns of the response window."""

    responses: list[Response]
    mask: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]
    engine_logprobs: Tensor | None = None  # where the trainer's own sampler did not sample

    def inputs(self, rows: list[int], pad_id: int) -> dict[str, Tensor]:
        """What the loss needs of some rows, in a response window as wide as their longest response."""
        inputs = pad_sequences([self.responses[i].prompt_ids for i in rows], [self.responses[i].ids for i in rows], pad_id)
        window = inputs["response_mask"].size(1)
        columns = {"old_logprobs": self.logprobs, "ref_logprobs": self.ref_logprobs, "old_values": self.values,
                   "advantages": self.advantages, "returns": self.returns}
        if self.engine_logprobs is not None:
            columns["engine_logprobs"] = self.engine_logprobs
        return inputs | {name: column[rows, -window:] for name, column in columns.items()}


def draws(iteration: int, *, count: int, num_prompts: int, seed: int) -> list[tuple[int, int]]:
    """(prompt index, draw number) of each of the `count` responses of an iteration.

    Prompts come in an order fixed by the seed, each once before any comes again. The number counts all draws of the run: as the
    sample index it makes a prompt's second visit another draw, and needs no state that a resumed run would have to restore.
    """
    chosen: list[tuple[int, int]] = []
    for number in range(iteration * count, (iteration + 1) * count):
        visit, place = divmod(number, num_prompts)
        if not chosen or place == 0:
            order = np.random.default_rng([seed, visit]).permutation(num_prompts)
        chosen.append((int(order[place]), number))
    return chosen


def minibatch_rows(iteration: int, epoch: int, minibatch: int, *, count: int, minibatches: int, seed: int) -> list[int]:
    """Which of the iteration's `count` responses a minibatch holds: a slice of a permutation drawn anew each epoch."""
    size = count // minibatches
    order = np.random.default_rng([seed, iteration, epoch]).permutation(count)
    return order[minibatch * size:(minibatch + 1) * size].tolist()


def as_responses(prompts: Sequence[tuple[Row, list[int]]], sampled: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, *,
                 eos_ids: Sequence[int], stop_strings: Sequence[str] = ()) -> list[Response]:
    """What was sampled, cut after the token that completes the first stop string; the score is read at the token that then is last.

    A response is finished when it ends with a token of `eos_ids` or a stop string. Stop strings are looked for in the text without
    special tokens; what the last token has beyond the stop string stays.
    """
    cut = []
    for ids in sampled:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if stopped := any(stop in text for stop in stop_strings):
            length = next(n for n in range(1, len(ids) + 1) if any(
                stop in tokenizer.decode(ids[:n], skip_special_tokens=True) for stop in stop_strings))
            ids = ids[:length]
        cut.append((ids, stopped or ids[-1] in eos_ids))
    texts = tokenizer.batch_decode([ids for ids, _ in cut], skip_special_tokens=True)
    return [Response(row, prompt, ids, text, finished)
            for (row, prompt), (ids, finished), text in zip(prompts, cut, texts, strict=True)]


def groups(order: Sequence[int], lengths: Sequence[int], most: int, tokens: int) -> Iterator[list[int]]:
    """`order` cut into groups of at most `most`, and of at most `tokens` padded to the longest of `lengths`; one alone may have more."""
    group: list[int] = []
    for i in order:
        if group and (len(group) == most or (len(group) + 1) * max(lengths[j] for j in [*group, i]) > tokens):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@torch.no_grad()
def token_numbers(stats_of: Callable[..., TokenStats], reference: PreTrainedModel, responses: Sequence[Response], *, temperature: float,
                  pad_id: int, batch_size: int, device: torch.device, in_step: bool = False) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For each response its tokens' log-probabilities under policy and reference, entropies and values, on the CPU.

    `stats_of` is a PolicyWithCritic, or `policy_alone`, whose values are 0.
    Computed here and not taken from the sampler: a decoder with a cache rounds differently, and the ratio would not start at 1.
    With a large vocabulary fewer than `batch_size` responses are read at once: the models' logits of a batch stay within `LOGITS`.
    How many passes that takes depends on lengths; `in_step` every process makes as many, for engines that gather weights in each.
    """
    numbers: list[tuple[Tensor, Tensor, Tensor, Tensor]] = [None] * len(responses)  # type: ignore[list-item]
    order = sorted(range(len(responses)), key=lambda i: len(responses[i].prompt_ids) + len(responses[i].ids))
    vocab_size = reference.config.get_text_config().vocab_size
    widths = [len(response.ids) + 1 for response in responses]  # padded rows have logits of one state more than there are tokens
    cut = list(groups(order, widths, batch_size, LOGITS // vocab_size))
    passes = max(gather([len(cut)])) if in_step else len(cut)
    for rows in cut + cut[-1:] * (passes - len(cut)):
        inputs = pad_sequences([responses[i].prompt_ids for i in rows], [responses[i].ids for i in rows], pad_id)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        stats = stats_of(**inputs)
        ref_logprobs, _, _ = policy_stats(reference, inputs, temperature)
        columns = [x.cpu() for x in (stats.logprobs, ref_logprobs, stats.entropy, stats.values)]
        for place, i in enumerate(rows):
            length = len(responses[i].ids)
            numbers[i] = tuple(column[place, -length:].clone() for column in columns)  # type: ignore[assignment]
    return numbers


def build_experience(scored: Sequence[Scored], *, kl_coef: float, gamma: float, lam: float, missing_eos_penalty: float | None,
                     score_clip: float | None = None, length_penalty: float = 0.0) -> Experience:
    """Rewards, advantages and returns of the whole rollout batch. Whitening sees all of it, never one process's share.

    Scores are shaped in this order: PAR where there are reference scores, else clipping; the length's price; and last what
    replaces the score of a response that did not end.
    """
    mask = align_right([torch.ones(len(s.response.ids), dtype=torch.bool) for s in scored])
    logprobs, ref_logprobs = align_right([s.logprobs for s in scored]), align_right([s.ref_logprobs for s in scored])
    entropy, values = align_right([s.entropy for s in scored]), align_right([s.values for s in scored])
    scores = torch.tensor([s.score for s in scored])
    finished = torch.tensor([s.response.finished for s in scored])
    lengths = mask.sum(dim=1).float()
    shaped = maths.clip_scores(scores, score_clip)
    if scored[0].reference_scores:
        shaped = maths.preference_as_reward(scores, torch.tensor([s.reference_scores for s in scored]))
    shaped = maths.penalise_length(shaped, lengths, length_penalty)
    shaped = maths.final_scores(shaped, finished, missing_eos_penalty)
    rewards = maths.token_rewards(logprobs, ref_logprobs, shaped, mask, kl_coef=kl_coef)
    advantages, returns = maths.advantages_and_returns(rewards, values, mask, gamma=gamma, lam=lam)
    metrics = {
        "objective/score": scores.mean(), "objective/shaped_score": shaped.mean(), "objective/rlhf_reward": rewards.sum(dim=1).mean(),
        "reward/zero_variance": shaped.max() == shaped.min(),
        "objective/kl": (logprobs - ref_logprobs).sum(dim=1).mean(), "objective/entropy": maths.masked_mean(entropy, mask),
        "response/length": lengths.mean(), "response/eos_rate": finished.float().mean(),
        "value/explained_variance": maths.explained_variance(values, returns, mask)}
    judged = [s.gold for s in scored if s.gold is not None]
    if judged:
        metrics |= {"objective/gold": torch.tensor([g.score for g in judged]).mean(),
                    "objective/accuracy": torch.tensor([float(g.correct) for g in judged]).mean()}
    engine_logprobs = None
    if given := [s.engine_logprobs for s in scored if s.engine_logprobs is not None]:
        engine_logprobs = align_right(given)
        mean, most, ratio = maths.mismatch(logprobs, engine_logprobs, mask)
        metrics |= {"rollout/logprob_diff": mean, "rollout/logprob_diff_max": most, "rollout/importance_ratio": ratio}
    return Experience([s.response for s in scored], mask, logprobs, ref_logprobs, values, maths.whiten(advantages, mask), returns,
                      {name: float(value) for name, value in metrics.items()} | {"objective/kl_coef": kl_coef}, engine_logprobs)
