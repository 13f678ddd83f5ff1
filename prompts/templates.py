"""How a question, its cue and its examples become a prompt.

Two renderings: plain text for base models, as the pretraining documents write it, and chat messages for tuned ones. The cue is
the phrase that asks for worked or for direct answers. The embedded curriculum trains on its own; for real benchmarks the
default is that of Kojima et al. 2022 (table 4).
"""
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKED, DIRECT = "worked", "direct"
BENCHMARK_CUES = {WORKED: "Let's think step by step. End with \"The answer is\" and the answer.",
                  DIRECT: "Answer with \"The answer is\" and the answer alone."}
EXTRACT = "Therefore, the answer is"  # Kojima et al. 2022, table 4, without what is said of each format
STOP_PLAIN = ("\n\n", "\nQuestion:")  # how the next example would begin

Prompt = str | tuple[dict[str, str], ...]  # plain text, or chat messages {"role", "content"}
Row = Mapping[str, Any]  # a problem: {"id", "task", "difficulty", "question", "answer", "solutions"}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a task is put to a model. `max_tokens` bounds an answer, by kind (worked or direct); `system` opens a chat."""

    chat: bool
    cues: Mapping[str, str]
    max_tokens: Mapping[str, int]
    system: str | None = None

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts at which a plain answer ends. A chat answer ends with the model's own end-of-turn token."""
        return () if self.chat else STOP_PLAIN


def example_answer(row: Row, kind: str) -> str:
    """What an example shows as its answer: the first solution's steps where worked ones are asked for, then the answer.

    Raises ValueError for a worked answer of a problem that has no solution.
    """
    if kind == DIRECT:
        return f"The answer is {row['answer']}."
    if not row["solutions"]:
        raise ValueError(f"problem {row['id']} has no worked solution to show as an example: take examples from another file")
    return f"{' '.join(row['solutions'][0])} The answer is {row['answer']}."


def render(question: str, style: Style, kind: str, examples: Sequence[Row] = ()) -> Prompt:
    """The prompt for one question after `examples`: blocks between blank lines, or earlier turns of a chat. A cue may be empty."""
    cue = f" {style.cues[kind]}" if style.cues[kind] else ""
    asked = [(f"{row['question']}{cue}", example_answer(row, kind)) for row in examples]
    last = f"{question}{cue}"
    if not style.chat:
        return "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in asked) + f"Question: {last}\nAnswer:"
    turns = [{"role": "system", "content": style.system}] if style.system else []
    for q, a in asked:
        turns += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
    return (*turns, {"role": "user", "content": last})


def ask_for_answer(prompt: Prompt, steps: str) -> Prompt:
    """The prompt that asks for the answer to steps which do not state it: the text so far and `EXTRACT`, or another turn of the chat."""
    if isinstance(prompt, str):
        return f"{prompt}{steps.rstrip()} {EXTRACT}"
    return (*prompt, {"role": "assistant", "content": steps}, {"role": "user", "content": f"{EXTRACT}"})


def begun(prompt: Prompt, text: str) -> Prompt:
    """The prompt with the beginning of its answer, which the model is to go on with. An assistant's turn at the end is an open one."""
    if not text:
        return prompt
    return f"{prompt} {text}" if isinstance(prompt, str) else (*prompt, {"role": "assistant", "content": text})


def exemplars(name: str) -> list[dict]:
    """Worked examples written for this project, from the data file `exemplars_<name>.jsonl` beside this module."""
    text = Path(__file__).with_name(f"exemplars_{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
