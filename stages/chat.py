"""Talk with a product of the pipeline in the terminal: the base continues a text, tuned models answer in turns.

    python -m stages.chat --recipe tiny --stage ppo
    echo "What is 2 + 3?" | python -m stages.chat --recipe tiny --stage sft --temperature 0
"""
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

import torch

from prompts.records import Score
from reward.annotate import HIDDEN
from stages.evals.backends import LocalModel
from stages.evals.judge import reward_judge
from stages.models.sampling import prompt_key, sample
from stages.run.config import StageConfig, option
from stages.run.entry import launch
from stages.run.manifest import MANIFEST, Manifest

HELP = """/reset               begin a new conversation
/set NAME VALUE      temperature (0: greedy), max_new_tokens, seed, system
/help                this
/quit                leave (so does the end of the input, Ctrl-D)
Ctrl-C stops a reply; what has come of it stays. The same seed and words give the same reply."""
SETTINGS: dict[str, type] = {"temperature": float, "max_new_tokens": int, "seed": int, "system": str}
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of the first bytes of a character


@dataclass(frozen=True, kw_only=True)
class ChatConfig(StageConfig):
    STAGE = "chat"
    PARENTS = ("pretrain", "sft", "reward_model", "ppo", "rejection_sampling")

    stage: Literal["pretrain", "sft", "ppo", "rejection_sampling"] = option("ppo", "whose model; pretrain is the base")
    model: str = option("", "a model's folder instead, such as an export")
    temperature: float = option(1.0, "of the sampling (0: greedy)")
    max_new_tokens: int = option(256, "longest reply")
    system: str = option("", "system turn of the conversation")
    score: bool = option(True, "score replies by the recipe's reward model, if there is one")


@dataclass
class Talk:
    """What is loaded, how replies are drawn, and what was said. `judge` scores a reply; None: nobody does."""

    backend: LocalModel
    plain: bool
    judge: Any
    settings: dict[str, Any]
    turns: list[dict[str, str]] = field(default_factory=list)


def harmless(text: str) -> str:
    """The text with what a terminal would obey, or not show, written out: escapes, other controls, and marks that turn text around."""
    return HIDDEN.sub(lambda found: f"<U+{ord(found[1]):04X}>" * (len(found[0]) if len(found[0]) < 4 else 1), text)


def marks(backend: LocalModel, ends: Sequence[int]) -> list[int]:
    """Special tokens but `ends`: padding and marks of turns are no words of a reply."""
    return [id for id, token in backend.tokenizer.added_tokens_decoder.items() if token.special and id not in ends]


def main(config: ChatConfig) -> None:
    talk = load(config)
    chat(talk, sys.stdin, sys.stdout)


def load(config: ChatConfig) -> Talk:
    """Model and reward model. Raises ValueError where there is no finished run, and for settings that cannot be."""
    settings = {name: checked(name, getattr(config, name)) for name in SETTINGS}
    if config.model and not (Path(config.model) / "config.json").is_file():
        raise ValueError(f"{config.model} is no model's folder (it has no config.json): name one, or leave --model out for --stage")
    path = Path(config.model) if config.model else Manifest(config.parents[config.stage]).product("model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = LocalModel(path, seed=config.seed, batch_size=1, device=device)
    plain = backend.tokenizer.chat_template is None or (config.stage == "pretrain" and not config.model)
    judged = Path(config.parents["reward_model"])
    scores = config.score and not plain and (judged / MANIFEST).is_file()
    return Talk(backend, plain, reward_judge(Manifest(judged).product("model"), device=device) if scores else None, settings)


def checked(name: str, value: Any) -> Any:
    """A setting in its type. Raises ValueError naming what was expected."""
    least = {"temperature": 0, "max_new_tokens": 1, "seed": 0}
    if name not in SETTINGS:
        raise ValueError(f"unknown setting {name!r}: choose from {', '.join(SETTINGS)}")
    try:
        found = SETTINGS[name](value)
    except ValueError:
        raise ValueError(f"{name}: got {value!r}, expected {SETTINGS[name].__name__}") from None
    if name in least and not least[name] <= found < float("inf"):
        raise ValueError(f"{name} is {value}: set it to {least[name]} or more")
    return found


def chat(talk: Talk, source: TextIO, out: TextIO) -> None:
    """Read lines and answer them until /quit or the end. A line that cannot be answered is said to be so, and the next one is read."""
    tty = source.isatty()
    print("The base continues each line as text." if talk.plain else
          "Replies are scored in standard deviations of SFT samples." if talk.judge else "No reward model here: replies are not scored.",
          "/help shows the commands.", file=out, flush=True)
    while True:
        try:
            print("> ", end="", file=out, flush=True)
            line = source.readline()
            if not line:
                print(file=out)
                return
            line = line.strip()
            if not tty:
                print(harmless(line), file=out, flush=True)
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                print(command(talk, line), file=out, flush=True)
            elif line:
                answer(talk, line, out)
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D leaves", file=out, flush=True)
        except ValueError as error:
            print(f"error: {harmless(' '.join(str(error).split()))}", file=out, flush=True)


def command(talk: Talk, line: str) -> str:
    """Do what a line with a slash says, and tell. Raises ValueError for a setting that cannot be."""
    name, _, rest = line[1:].partition(" ")
    if name == "reset":
        talk.turns.clear()
        return "a new conversation"
    if name == "set":
        key, _, value = rest.strip().partition(" ")
        talk.settings[key] = checked(key, value.strip())
        return f"{key} is {talk.settings[key]!r}"
    return HELP if name == "help" else f"unknown command /{harmless(name)}: /help shows those there are"


def answer(talk: Talk, line: str, out: TextIO) -> None:
    """Draw a reply, show it as it comes, and below it tokens, speed, how it ended, the settings and the score."""
    backend, settings = talk.backend, talk.settings
    prompt: Any = line
    if not talk.plain:
        system = [{"role": "system", "content": settings["system"]}] if settings["system"] else []
        prompt = [*system, *talk.turns, {"role": "user", "content": line}]
        while len(backend.encode(prompt)) >= backend.context and len(prompt) > len(system) + 1:
            del prompt[len(system):len(system) + 2]  # the oldest question and its answer
            print("(the conversation fills the context: its oldest turn is forgotten)", file=out)
    ids, ends = backend.encode(prompt), backend.end_of_text if talk.plain else backend.end_of_turn
    room = min(settings["max_new_tokens"], backend.context - len(ids))
    if room < 1:
        raise ValueError(f"this has {len(ids)} tokens and the model's context {backend.context}: say it shorter")
    drawn: list[int] = []
    shown = ""

    def heard(token: int) -> None:
        nonlocal shown
        drawn.append(token)
        text = backend.read(drawn, ends, ()).text
        if not text.endswith(UNFINISHED) and len(text) > len(shown):
            print(harmless(text[len(shown):]), end="", file=out, flush=True)
            shown = text

    began, stopped = time.perf_counter(), False
    try:
        sample(backend.model, [ids], keys=[(prompt_key(repr(prompt)), 0)], seed=settings["seed"], temperature=settings["temperature"],
               max_new_tokens=room, eos_ids=ends, pad_id=backend.pad_id, heard=heard, never=marks(backend, ends))
    except KeyboardInterrupt:
        stopped = True
    seconds = time.perf_counter() - began
    result = backend.read(drawn, ends, ())
    print(harmless(result.text[len(shown):]), file=out)  # half a character, if the reply ends with one
    finish = "stopped" if stopped else "ended" if result.finish == "stop" else f"cut at {len(drawn)} tokens"
    parts = [f"{len(drawn)} tokens", f"{len(drawn) / max(seconds, 1e-9):.0f} tok/s", finish,
             ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                       for key, value in settings.items() if key != "system")]
    if not talk.plain:
        talk.turns[:] = [*(turn for turn in prompt if turn["role"] != "system"), {"role": "assistant", "content": result.text.strip()}]
        if talk.judge and drawn:
            (judged,) = talk.judge([Score(prompt=prompt, response=result.text, ended=result.finish == "stop", question=line)])
            parts.append("no score: too long" if judged.score is None else f"score {judged.score:+.2f}")
    print(f"[{' | '.join(parts)}]", file=out, flush=True)


if __name__ == "__main__":
    launch(main, ChatConfig, distributed=False)
