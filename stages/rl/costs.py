"""What learning from samples costs, by one convention for preferences, reward model, PPO and rejection sampling, and what a gain comes to
for that price.

Counted is what a method does to learn; what is measured before and after is not. FLOPs are those of stages/models/counts.py: a
forward pass over a token is 2 a matmul parameter plus attention, and the language model's head counts where it is asked. Training
costs three forward passes; two where the matrices are frozen, because adapters need no gradient of these. Fine-tuning's are those
of stages/sft.py, which count the head at every token.
"""
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from stages.models.counts import forward_flops
from stages.run.console import table

TRAINING = 3  # forward passes that training on a token is worth: one forward, two backward


def ppo_flops(policy: PretrainedConfig, critic: PretrainedConfig | None, scorers: Sequence[PretrainedConfig], *, responses: int,
              prompt_tokens: int, tokens: int, epochs: int, par_samples: int = 0, ptx_tokens: int = 0, ptx_row: int = 1,
              adapters: bool = False, critic_adapter: bool = False) -> int:
    """FLOPs of PPO on `responses` with `tokens` tokens in all and prompts of `prompt_tokens`, repeats counted.

    Each is sampled, read by every scorer, by policy and reference (old log-probabilities) and by the critic (old values), and
    learned from in `epochs` passes. Without a critic of its own the value head's share is left out. PAR samples and scores
    `par_samples` more for each, counted as long as the policy's own; PPO-ptx learns from `ptx_tokens` in rows of `ptx_row`.
    With `adapters`, and for a `critic_adapter`, matrices are frozen; what the adapters themselves cost is left out.
    """
    training, critic_training = TRAINING - adapters, TRAINING - critic_adapter
    length = (prompt_tokens + tokens) // responses

    def passes(model: PretrainedConfig, predicted: int) -> int:
        return forward_flops(model, tokens=prompt_tokens + tokens, predicted=predicted, sequence_length=length)

    ptx = forward_flops(policy, tokens=ptx_tokens, predicted=ptx_tokens, sequence_length=ptx_row) if ptx_tokens else 0
    return (training * ptx + (1 + par_samples + 2 + training * epochs) * passes(policy, tokens)
            + (1 + par_samples) * sum(passes(scorer, 0) for scorer in scorers)
            + ((1 + critic_training * epochs) * passes(critic, 0) if critic is not None else 0))


def sampling_flops(policy: PretrainedConfig, *, prompts: int, prompt_tokens: int, responses: int, tokens: int) -> int:
    """FLOPs of drawing `responses` with `tokens` tokens in all: the sampler reads a prompt once for its K responses."""
    return forward_flops(policy, tokens=prompt_tokens + tokens, predicted=tokens,
                         sequence_length=prompt_tokens // prompts + tokens // responses)


def drawn_counts(policy: PretrainedConfig, rows: Sequence[Mapping[str, Any]], samples: int) -> dict[str, int]:
    """Counts of drawing `samples` responses to the prompt of each of `rows` (`prompt_tokens`, `sampled_tokens`); none where an earlier
    version left rows that do not say how many tokens they took."""
    if not rows or not all("sampled_tokens" in row for row in rows):
        return {}
    asked, tokens = (sum(row[key] for row in rows) for key in ("prompt_tokens", "sampled_tokens"))
    return {"sampled_tokens": tokens, "flops": sampling_flops(policy, prompts=len(rows), prompt_tokens=asked,
                                                              responses=len(rows) * samples, tokens=tokens)}


def ranking_flops(model: PretrainedConfig, records: Sequence[Mapping[str, Any]], *, passes: float, share_prompts: bool,
                  adapters: bool = False, members: int = 1) -> int:
    """FLOPs of training `members` reward models in `passes` over `records` (`prompt_ids`, `response_ids`): each response is read once,
    however many pairs it is in, and its prompt with it, or once for all of them where prompts are shared."""
    read = [(len(r["prompt_ids"]), len(r["response_ids"]), sum(map(len, r["response_ids"]))) for r in records]
    prompts, responses = (sum(p * k for p, k, _ in read), sum(k for _, k, _ in read))
    answers = sum(tokens for _, _, tokens in read)
    tokens = answers + (sum(p for p, _, _ in read) if share_prompts else prompts)
    once = forward_flops(model, tokens=tokens, predicted=0, sequence_length=(prompts + answers) // responses)
    return round((TRAINING - adapters) * members * passes * once)


def price(gain: float, counts: Mapping[str, float]) -> str:
    """The gain in gold score beside `responses`, sampled `tokens` and `flops`, and what it comes to for each."""
    return (f"gold score {gain:+.3f} for {counts['responses']:,} responses, {counts['tokens'] / 1e6:.3g}M sampled tokens and "
            f"{counts['flops']:.3g} FLOPs: {gain / counts['tokens'] * 1e6:+.3g} a million tokens, {gain / counts['flops'] * 1e12:+.3g} "
            "a teraFLOP")


def spent(sifted: Sequence[Mapping[str, Any]], trained: Mapping[str, float], policy: PretrainedConfig, scorers: Sequence[PretrainedConfig],
          ) -> dict[str, float]:
    """What a round of rejection sampling spent, and the mean scores of what it sampled and, if anything, of what it kept.

    `sifted` has the round's prompts (stages/rl/selection.py), `trained` what the tuning took. A scorer reads a prompt with each distinct
    response.
    """
    def total(name: str) -> Any:
        return sum(row[name] for row in sifted)

    kept = [each for row in sifted for each in row["kept"]]
    asked, tokens, responses = sum(len(row["prompt_ids"]) for row in sifted), total("tokens"), total("responses")
    flops = {
        "sampling_flops": sampling_flops(policy, prompts=len(sifted), prompt_tokens=asked, responses=responses, tokens=tokens),
        "scoring_flops": sum(forward_flops(scorer, tokens=total("scored_tokens"), predicted=0,
                                           sequence_length=total("scored_tokens") // total("scored")) for scorer in scorers),
        "training_flops": trained["training_flops"]}
    means = {name: total(name) / len(sifted) for name in ("score", "best_score", "gold")}
    means |= {f"kept_{name}": sum(each[name] for each in kept) / len(kept) for name in ("score", "gold") if kept}
    return {**means, **trained, **flops, "flops": sum(flops.values()), "prompts": len(sifted), "responses": responses, "tokens": tokens,
            "empty_prompts": sum(not row["kept"] for row in sifted), "unfinished": total("unfinished"), "scored": total("scored"),
            "sampling_s": sum(row["seconds"] for row in sifted)}


def totals(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums over the rounds of what was spent; scores are means and are left out."""
    return {key: sum(spent[key] for spent in rounds) for key in SPENT} | {
        "skipped_steps": sum(spent.get("skipped_steps", 0) for spent in rounds)}  # of rounds tuned before it was counted


SPENT = ("prompts", "empty_prompts", "responses", "unfinished", "tokens", "scored", "dialogues", "trained_tokens", "steps",
         "sampling_flops", "scoring_flops", "training_flops", "flops", "sampling_s", "training_s")
REACHED = {"score": "score", "best_score": "best of K", "kept_score": "kept", "gold": "gold score", "kept_gold": "kept"}


def cost_table(rounds: Sequence[Mapping[str, float]]) -> str:
    """What each round spent, and all together."""
    spent = [*((str(number), of) for number, of in enumerate(rounds, 1)), ("all", totals(rounds))]
    return table(
        ["round", "prompts", "nothing kept", "responses", "sampled tokens", "scored", "dialogues", "trained tokens", "FLOPs: sampling",
         "scoring", "training", "seconds"],
        [[number, f"{of['prompts']:,}", f"{of['empty_prompts'] / of['prompts']:.1%}", f"{of['responses']:,}", f"{of['tokens']:,}",
          f"{of['scored']:,}", f"{of['dialogues']:,}", f"{of['trained_tokens']:,}",
          *(f"{of[f'{part}_flops']:.2e}" for part in ("sampling", "scoring", "training")), f"{of['sampling_s'] + of['training_s']:.1f}"]
         for number, of in spent])


def score_table(rounds: Sequence[Mapping[str, float]]) -> str:
    """Mean scores of what each round sampled, of the best of each prompt's samples, and of what was kept."""
    return table(["round", *REACHED.values()], [[str(number), *(f"{of[key]:.3f}" if key in of else "-" for key in REACHED)]
                                                for number, of in enumerate(rounds, 1)])
