"""What a policy does on problems it did not learn from: one number a problem, so that two policies can be compared in pairs."""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prompts.intervals import mean_interval, share_interval
from reward.calibration import accuracy
from reward.calibration import judged as judged_pairs
from reward.verifiers import dense_ranks
from stages.models.sampling import prompt_key, sample
from stages.models.training import gather, rank, world_size
from stages.rl.models import policy_alone
from stages.rl.rewards import Response, Reward, Row, gold_scores
from stages.rl.rollouts import as_responses, token_numbers
from stages.run.manifest import metric, say

Prompts = Sequence[tuple[Row, list[int]]]
PAIRS = ("pairs_right", "pairs")


def answers(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, samples: int, *, seed: int, temperature: float,
            max_new_tokens: int, eos_ids: Sequence[int], pad_id: int, stop_strings: Sequence[str] = (),
            batch_size: int = 256) -> list[Response]:
    """`samples` keyed draws of each prompt, a prompt's side by side; greedy at temperature 0."""
    asked = [each for each in prompts for _ in range(samples)]
    keys = [(prompt_key(row["id"]), number) for row, _ in prompts for number in range(samples)]
    drawn = sample(policy, [ids for _, ids in asked], keys=keys, seed=seed, temperature=temperature, max_new_tokens=max_new_tokens,
                   eos_ids=eos_ids, pad_id=pad_id, batch_size=batch_size)
    return as_responses(asked, drawn, tokenizer, eos_ids=eos_ids, stop_strings=stop_strings)


@torch.no_grad()
def measure(policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, *,
            reward: Reward, samples: int, seed: int, temperature: float, max_new_tokens: int, eos_ids: Sequence[int], pad_id: int,
            stop_strings: Sequence[str] = (), batch_size: int = 256) -> dict[str, list[float]]:
    """One value a prompt, in the order of `prompts`, the same on every process: means over `samples` keyed draws at `temperature`,
    and a greedy answer.

    Names: `score` (of `reward`), `gold`, `sampled_accuracy`, `kl` (nats a response, to the reference), `entropy` (nats a token),
    `length` (tokens), `eos_rate`, `greedy_accuracy`. Greedy accuracy and entropy tell sharpening from learning. `pairs_right` and `pairs`
    count what `reward_drift` reads: pairs of a problem's samples of unlike gold, and those of them that the reward orders likewise.
    """
    sampling: dict[str, Any] = {"seed": seed, "max_new_tokens": max_new_tokens, "eos_ids": eos_ids, "pad_id": pad_id,
                                "stop_strings": stop_strings, "batch_size": batch_size}
    mine = list(range(rank(), len(prompts), world_size()))
    rows: list[tuple[int, dict[str, float]]] = []
    if mine:
        own = [prompts[i] for i in mine]
        drawn = answers(policy, tokenizer, own, samples, temperature=temperature, **sampling)
        greedy = gold_scores(answers(policy, tokenizer, own, 1, temperature=0.0, **sampling))
        numbers = token_numbers(policy_alone(policy, temperature), reference, drawn, temperature=temperature, pad_id=pad_id,
                                batch_size=64, device=policy.device)
        judged = gold_scores(drawn)
        columns = {"score": reward(drawn).tolist(), "gold": [g.score for g in judged],
                   "sampled_accuracy": [float(g.correct) for g in judged],
                   "kl": [float((logp - ref).sum()) for logp, ref, _, _ in numbers],
                   "entropy": [float(entropy.mean()) for _, _, entropy, _ in numbers],
                   "length": [float(len(r.ids)) for r in drawn], "eos_rate": [float(r.finished) for r in drawn]}
        for place, i in enumerate(mine):
            own_samples = slice(place * samples, (place + 1) * samples)
            means = {name: sum(values[own_samples]) / samples for name, values in columns.items()}
            (outcomes,) = judged_pairs([columns["score"][own_samples]], [dense_ranks(columns["gold"][own_samples])])
            rows.append((i, {**means, "greedy_accuracy": float(greedy[place].correct), "pairs_right": math.fsum(outcomes),
                             "pairs": float(len(outcomes))}))
    ordered = [values for _, values in sorted(gather(rows), key=lambda row: row[0])]
    return {name: [values[name] for values in ordered] for name in ordered[0]}


def summarise(values: Mapping[str, Sequence[float]], group: str) -> dict[str, dict]:
    """Manifest metrics `group/name`: mean over prompts, n prompts, and the 95 % interval of that mean over prompts (Student's t).

    Rates get Wilson's, which stays between 0 and 1. Any other column without spread says nothing about its error: no interval.
    """
    metrics = {}
    for name, column in values.items():
        if name in PAIRS:
            continue
        rate = name.endswith(("accuracy", "rate")) and group != "gain"
        mean, low, high = (share_interval if rate else mean_interval)(column)
        metrics[f"{group}/{name}"] = metric(mean, n=len(column), ci95=(low, high) if low < high else None)
    return metrics


def reward_drift(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """How good the reward is as a judge of the policy's own samples, at the start and at the end: `<when>/reward_accuracy`, the share of
    pairs of a problem's samples that it orders as the gold score does. Falling, it has been learned around. Left out where no problem
    has samples of unlike gold."""
    metrics = {}
    for when, values in (("before", before), ("after", after)):
        groups = list(zip(values["pairs_right"], values["pairs"], strict=True))
        if any(n for _, n in groups):
            found = accuracy([[right / n] * int(n) for right, n in groups if n])
            metrics[f"{when}/reward_accuracy"] = metric(found.value, n=found.n, ci95=(found.low, found.high))
    return metrics


def differences(before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """After minus before, prompt by prompt: prompts differ far more among themselves than a policy from its beginning."""
    return {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in before if name not in PAIRS}


def report(group: str, values: Mapping[str, Sequence[float]]) -> None:
    """Say what was measured, each figure with its interval."""
    def text(m: dict) -> str:
        return f"{m['value']:.3f}" + (f" [{m['ci95'][0]:.3f}, {m['ci95'][1]:.3f}]" if "ci95" in m else "")

    measured = {name.split("/")[1]: m for name, m in summarise(values, group).items()}
    say(f"{group} (n={len(values['gold'])}): " + "  ".join(f"{name} {text(m)}" for name, m in measured.items()))
