"""Best of K: which of a prompt's sampled responses are kept to be learned from, and what there was to choose from.

Rejection sampling as Llama 2 has it (Touvron et al. 2023, section 3.2.3) and RAFT (Dong et al. 2023); with a verifier for a judge it
is STaR without rationales for the answer (Zelikman et al. 2022).
"""
from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.data.turns import IGNORED
from stages.models.training import gather, rank, world_size
from stages.rl.rewards import Response, Reward, Row, gold_scores

WATCHED = 20  # one prompt in so many is not learned from but watched, against learning by heart


def choose(scores: Sequence[float], whole: Sequence[bool], *, keep: int, min_score: float | None) -> list[int]:
    """Places of the `keep` best responses that are `whole` and score `min_score` or more, best first; of equal ones the first drawn."""
    fit = [i for i, score in enumerate(scores) if whole[i] and (min_score is None or score >= min_score)]
    return sorted(fit, key=lambda i: -scores[i])[:keep]


def sift(problems: Sequence[tuple[Row, list[int]]], drawn: Sequence[list[list[int]]], tokenizer: PreTrainedTokenizerBase,
         reward: Reward, *, eos_ids: Sequence[int], keep: int, min_score: float | None) -> list[dict[str, Any]]:
    """For each problem (with its prompt's ids) and its K draws: the responses kept, and the figures of all K.

    Equal responses are scored and kept once; the means count them as often as they were drawn. One that did not end itself is
    never kept: learned from, it would teach not to end. Each process scores its share.
    """
    groups = [Counter(map(tuple, responses)) for responses in drawn]  # in the order of first drawing
    texts = tokenizer.batch_decode([list(ids) for group in groups for ids in group], skip_special_tokens=True)
    flat = [(row, prompt, list(ids)) for (row, prompt), group in zip(problems, groups, strict=True) for ids in group]
    responses = [Response(*each, text, each[2][-1] in eos_ids) for each, text in zip(flat, texts, strict=True)]
    mine = range(rank(), len(responses), world_size())
    scored = dict(gather(list(zip(mine, reward([responses[i] for i in mine]).tolist(), strict=True))))
    judged = gold_scores(responses)
    rows, at = [], 0
    for (row, prompt), group in zip(problems, groups, strict=True):
        here, times = range(at, at + len(group)), list(group.values())
        at += len(group)
        scores = [scored[i] for i in here]
        kept = [here[i] for i in choose(scores, [responses[i].finished for i in here], keep=keep, min_score=min_score)]

        def mean(values: Sequence[float], times: Sequence[int] = times) -> float:
            return sum(v * t for v, t in zip(values, times, strict=True)) / sum(times)

        lengths = [len(responses[i].ids) for i in here]
        rows.append({
            "id": row["id"], "prompt_ids": prompt, "responses": sum(times), "scored": len(group),
            "tokens": sum(n * t for n, t in zip(lengths, times, strict=True)),
            "scored_tokens": sum(lengths) + len(group) * len(prompt), "score": mean(scores), "best_score": max(scores),
            "unfinished": sum(t for i, t in zip(here, times, strict=True) if not responses[i].finished),
            "gold": mean([judged[i].score for i in here]), "accuracy": mean([float(judged[i].correct) for i in here]),
            "kept": [{"ids": responses[i].ids, "text": responses[i].text, "score": scored[i], "gold": judged[i].score} for i in kept]})
    return rows


def dialogues(sifted: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was kept as encoded dialogues to learn from, and those of every `WATCHED`-th prompt to watch instead.

    The ids are those that were sampled, loss on the response's: a text tokenised anew can split differently. With fewer than two
    prompts the same are learned from and watched. Raises ValueError when nothing was kept.
    """
    prompts = [[{"input_ids": [*row["prompt_ids"], *kept["ids"]], "labels": [*[IGNORED] * len(row["prompt_ids"]), *kept["ids"]]}
                for kept in row["kept"]] for row in sifted if row["kept"]]
    if not prompts:
        raise ValueError(
            f"none of {len(sifted)} prompts has a response to keep: the best score is {max(row['best_score'] for row in sifted):.3g}, and "
            f"{sum(row['unfinished'] for row in sifted)} of {sum(row['responses'] for row in sifted)} responses did not end; lower "
            "min_score, or raise samples_per_prompt or max_new_tokens")
    learned = [each for number, group in enumerate(prompts) if number % WATCHED or len(prompts) < 2 for each in group]
    return learned, [each for group in prompts[::WATCHED] for each in group]
