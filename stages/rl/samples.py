"""A few fixed questions through a training: what the policy answers, what that scores, and how far it is from the start.

The questions and the sampler's noise stay the same, so what changes in the answers is the policy. `samples.jsonl` beside
metrics.jsonl has one object a look: {"step", "samples": [{"prompt", "response", "score", "gold", "kl"}]}, `gold` null without a judge.
"""
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward.verifiers import GoldScore
from stages.rl.measure import Prompts, answers
from stages.rl.models import policy_alone
from stages.rl.rewards import Response, Reward
from stages.rl.rollouts import token_numbers
from stages.run.checkpoint import MetricsLog
from stages.run.console import table
from stages.run.manifest import say

HEADER = ["prompt", "response", "score", "gold", "KL"]
WIDTH = 64  # characters of a text on the console


@torch.no_grad()
def look(policy: PreTrainedModel, reference: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, *, reward: Reward,
         judge: Callable[[Sequence[Response]], list[GoldScore]] | None, seed: int, temperature: float,
         **sampling: Any) -> list[dict[str, Any]]:
    """A record for each prompt's first draw; `kl` is log pi - log pi_ref of the response, in nats. `sampling` is that of `answers`."""
    drawn = answers(policy, tokenizer, prompts, 1, seed=seed, temperature=temperature, **sampling)
    numbers = token_numbers(policy_alone(policy, temperature), reference, drawn, temperature=temperature, pad_id=sampling["pad_id"],
                            batch_size=64, device=policy.device)
    gold = [g.score for g in judge(drawn)] if judge else [None] * len(drawn)
    return [{"prompt": row.get("question") or tokenizer.decode(ids), "response": response.text, "score": score, "gold": meant,
             "kl": float((logprobs - ref_logprobs).sum())}
            for (row, ids), response, score, meant, (logprobs, ref_logprobs, _, _) in
            zip(prompts, drawn, reward(drawn).tolist(), gold, numbers, strict=True)]


def record(directory: Path, step: int, samples: list[dict[str, Any]]) -> None:
    """Print the samples as a table and add them to `samples.jsonl`."""
    def cut(text: str, *, end: bool = False) -> str:
        text = " ".join(text.split())
        return text if len(text) <= WIDTH else "..." + text[3 - WIDTH:] if end else text[:WIDTH - 3] + "..."

    MetricsLog(directory / "samples.jsonl").append({"step": step, "samples": samples})
    say(f"samples at step {step}\n" + table(HEADER, [
        [cut(s["prompt"], end=True), cut(s["response"], end=True), f"{s['score']:.2f}", "-" if s["gold"] is None else f"{s['gold']:.2f}",
         f"{s['kl']:.2f}"] for s in samples]))
