"""What is asked and what is wanted: the options, problems and prompts that PPO and rejection sampling share, so that one can be held
against the other."""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import TemplateError

from stages.data.problems import load_problems, read_problems, split_spec
from stages.data.tokenizer import chat_ids
from stages.run.config import StageConfig, option


@dataclass(frozen=True, kw_only=True)
class QuestionConfig(StageConfig):
    """What a policy is asked, what it is scored by, and on what it is measured before and after."""

    problems: str | None = option(None, "problems of your own: [name=]format:source such as gsm8k:data/train.jsonl or a hub id (its "
                                  "train split), or conversations (docs/real-input.md); the last eval_problems are held out (default: "
                                  "prepare's)", recorded_only=True)
    tasks: list[str] = option([], "tasks of prepare's problems (default: all)")
    difficulties: list[int] = option([], "difficulties of prepare's problems (default: all)")
    style: Literal["worked", "direct"] = option("worked", "which answers the prompts ask for")
    reward: dict[str, float] = option({"model": 1.0}, "sources of the score and weights: `model`, `verifier` (1 for a right answer, else "
                                      "0), module:function, or a model's folder")
    gate: Literal["refuse", "warn", "off"] = option("refuse", "when the reward model's own figures fail: refuse, warn and go on, or do "
                                                    "not look (docs/reward-model.md)", recorded_only=True)
    gate_limits: dict[str, float] = option({}, "thresholds of the gate other than its own, such as {min_fresh_accuracy: 0.7}",
                                           recorded_only=True)
    temperature: float = option(1.0, "of the sampling")
    max_new_tokens: int = option(96, "longest response")
    eval_problems: int = option(300, "problems measured before and after, of prepare's validation split or held out of your own")
    eval_samples: int = option(4, "draws for each of them")


def check_questions(config: QuestionConfig, **smallest: int) -> None:
    """Raises ValueError for a setting below its smallest value, and for questions that cannot be asked."""
    for name, least in (smallest | {"eval_problems": 2, "eval_samples": 1}).items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} is {getattr(config, name)}: set it to {least} or more")
    if config.problems is not None and (config.tasks or config.difficulties):
        raise ValueError(f"tasks and difficulties choose among prepare's problems: leave them out (tasks: [], difficulties: []) with "
                         f"problems {config.problems}")
    if config.temperature <= 0:
        raise ValueError(f"temperature is {config.temperature}: {config.STAGE} learns from samples, so set it above 0, usually to 1")


def own_problems(config: QuestionConfig) -> tuple[list[dict], list[dict]] | None:
    """The user's problems to learn from and, the last `eval_problems` of them, to measure on; None without any.

    A question that is held out is not learned from, however often it is there. Benchmarks are judged by answer and form: their
    worked lines are free text, which no response repeats word for word. Raises ValueError when too few are left to learn from.
    """
    if config.problems is None:
        return None
    steps = split_spec(config.problems)[1] == "problems"
    rows = [row if steps else {**row, "solutions": []} for row in load_problems(config.problems, hub_split="train")]
    measured = rows[-config.eval_problems:]
    held_out = {_wording(row) for row in measured}
    learned = [row for row in rows[:-config.eval_problems] if _wording(row) not in held_out]
    if not learned:
        raise ValueError(f"{config.problems} has {len(rows)} problems, of which eval_problems {config.eval_problems} leave none to learn "
                         f"from: set eval_problems lower")
    return learned, measured


def _wording(row: dict) -> str:
    return json.dumps(row.get("prompt", row["question"]))  # conversations may end alike


def embedded_problems(config: QuestionConfig, folder: Path) -> tuple[list[dict], list[dict]]:
    """prepare's problems to learn from, and those of its validation split to measure on."""
    learned, measured = (read_problems(folder / f"{split}.jsonl", config.tasks, config.difficulties) for split in ("ppo", "validation"))
    return learned, measured[:config.eval_problems]


def asked(rows: list[dict], cue: str, tokenizer) -> list[tuple[dict, list[int]]]:
    """The rows, with the messages they are asked by as `prompt`, and the token ids of these up to where the assistant is to speak.

    A row's own `prompt` stands as it is, without the cue. Raises ValueError for an empty question, and where the chat template refuses
    a conversation.
    """
    if empty := [r["id"] for r in rows if not r["question"].strip()]:
        raise ValueError(f"problem {empty[0]!r} has an empty question ({len(empty)} of {len(rows)} have one): leave them out")
    prompts = [r.get("prompt") or [{"role": "user", "content": f"{r['question']} {cue}"}] for r in rows]
    return [(r | {"prompt": prompt}, _ids(tokenizer, prompt, r["id"])) for r, prompt in zip(rows, prompts, strict=True)]


def _ids(tokenizer, prompt: list[dict[str, str]], id: str) -> list[int]:
    try:
        return chat_ids(tokenizer, prompt, ask=True)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in prompt)
        raise ValueError(f"problem {id!r}: the chat template of {tokenizer.name_or_path!r} refuses a prompt of the turns {roles}: {error}; "
                         "write it in the roles and the order that the template knows") from None


def fitting(prompts: list[tuple[dict, list[int]]], config: QuestionConfig, policy, max_length: int) -> list[tuple[dict, list[int]]]:
    """The prompts that leave room for a whole response in `max_length` and in the context. Raises ValueError when none does."""
    context = policy.config.max_position_embeddings
    kept = [(row, ids) for row, ids in prompts if len(ids) + config.max_new_tokens <= min(max_length, context)]
    if not kept:
        raise ValueError(f"the shortest of {len(prompts)} prompts has {min(len(ids) for _, ids in prompts)} tokens, to which "
                         f"max_new_tokens {config.max_new_tokens} come: more than max_length {max_length} or the model's context of "
                         f"{context}; set max_new_tokens lower")
    return kept


def check_lengths(prompts: list[tuple[dict, list[int]]], config: QuestionConfig, policy) -> None:
    """Raises ValueError when a prompt leaves less than `max_new_tokens` of the policy's context."""
    longest, context = max(len(ids) for _, ids in prompts), policy.config.max_position_embeddings
    if longest + config.max_new_tokens > context:
        remedy = f"set max_new_tokens to that or less, not {config.max_new_tokens}" if longest < context else "leave such problems out"
        raise ValueError(f"the longest prompt has {longest} tokens, which leaves {max(0, context - longest)} of the model's context of "
                         f"{context}: {remedy}")
