"""Where scores come from: a reward model, a Python function, or a weighted sum of them.

A source takes the responses and returns one score each. Named in a recipe as a mapping of sources to weights:

    reward: {model: 1.0}                                  # the reward model trained before
    reward: {verifier: 1.0}                               # 1 where the answer is right, else 0
    reward: {model: 0.5, "stages.rl.rewards:gold": 0.5}   # with a function `f(problems, texts, finished) -> list of floats`
    reward: {"my_rewards:concise": 1.0}                   # or with one of TRL's signature, `f(prompts, completions, **columns)`
    reward: {runs/other/reward_model/model: 1.0}          # a reward model by its folder
    reward: {model@min: 1.0}                              # an ensemble's worst case: @mean, @min or @mean_std in place of its own choice
    reward: {models/other@text: 1.0}                      # a reward model with another tokenizer: it reads the text anew, in its own form
"""
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from reward.folders import trusted
from reward.model import COMBINATIONS, ENSEMBLE, load_ensemble, member_folders, normalize, score_ids
from reward.verifiers import GoldScore, gold_score
from stages.data.tokenizer import chat_ids
from stages.models.attention import speed_up
from stages.rl.models import remove_dropout
from stages.run.manifest import say

Row = Mapping[str, Any]


class Response(NamedTuple):
    """One sampled response. `finished`: it ended itself; `text` is without special tokens, `ids` with the end token."""

    problem: Row
    prompt_ids: list[int]
    ids: list[int]
    text: str
    finished: bool


Reward = Callable[[Sequence[Response]], Tensor]
VERIFIER = "stages.rl.rewards:right"


def gold_scores(responses: Sequence[Response]) -> list[GoldScore]:
    """The programmatic judge of the embedded problems."""
    return [gold_score(r.problem, r.text, finished=r.finished) for r in responses]


def gold(problems: Sequence[Row], texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
    """The judge as a reward function, for control runs."""
    return [gold_score(p, t, finished=f).score for p, t, f in zip(problems, texts, finished, strict=True)]


def right(problems: Sequence[Row], texts: Sequence[str], finished: Sequence[bool]) -> list[float]:
    """1 where the answer is right, else 0: what can be verified without a worked solution."""
    return [float(gold_score(p, t, finished=f).correct) for p, t, f in zip(problems, texts, finished, strict=True)]


def model_reward(path: str | Path, *, vocab_size: int, device: torch.device | str = "cpu", combination: str | None = None,
                 tokenizer: PreTrainedTokenizerBase | None = None, text: bool = False) -> Reward:
    """A reward model's normalised scores of token ids as they were sampled: text tokenised anew can split differently.

    Of an ensemble, the score that `combination` makes of its members' (default: what it was saved with). Raises ValueError when its
    vocabulary is not the policy's, by size and, with the policy's `tokenizer`, token by token: the ids would mean something else.
    With `text` any vocabulary will do: the model reads `own_ids`.
    """
    path = Path(path)
    models = [AutoModelForSequenceClassification.from_pretrained(trusted(folder), num_labels=1).to(device).eval()
              for folder in member_folders(path)]
    for model in models:
        speed_up(remove_dropout(model).requires_grad_(False))
        if model.config.vocab_size != vocab_size and not text:
            raise ValueError(f"reward model {path} has {model.config.vocab_size} tokens, the policy {vocab_size}: train both from one "
                             f"tokenizer, or let it read texts with its own: {path}@text")
    reader: Any = AutoTokenizer.from_pretrained(trusted(path)) if text else None

    def ids_of(response: Response) -> list[int]:
        return own_ids(reader, response, tokenizer) if text else response.prompt_ids + response.ids

    padless = [own for own in (model.config.get_text_config() for model in models) if own.pad_token_id is None] if text else []

    def rows_of(responses: Sequence[Response]) -> list[list[int]]:
        rows = [ids_of(r) for r in responses]
        for own in padless:  # such a model scores the last token, so the padding is any id with which no row ends
            own.pad_token_id = min(set(range(len(rows) + 1)) - {row[-1] for row in rows})
        return rows

    if text:
        say(f"reward model {path} reads text anew with its own tokenizer{' and chat template' if reader.chat_template else ''}: tokens "
            "can split in other ways than they were sampled, and a response that was cut off looks as if it had ended"
            + ("" if hasattr(models[0].config, "score_std") else "; it has no score_mean and score_std: its scores keep their own scale"))
    elif tokenizer is not None and (path / "tokenizer_config.json").is_file():
        check_tokens(path, tokenizer)
    if combination is None and not (path / ENSEMBLE).is_file():
        return lambda responses: torch.tensor(normalize(models[0].config, score_ids(models[0], rows_of(responses))))
    ensemble = load_ensemble(path, models, combination)
    return lambda responses: torch.tensor(ensemble.unit(ensemble.raw(rows_of(responses))))


def unit_scores(model: Any, responses: Sequence[Response]) -> Tensor:
    """A reward model's normalised scores (B,) of token ids as they were sampled."""
    return torch.tensor(normalize(model.config, score_ids(model, [r.prompt_ids + r.ids for r in responses])))


def own_ids(reader: Any, response: Response, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Prompt and response as a model with the tokenizer `reader` was trained to read them: by its chat template if it has one.

    The prompt is the problem's `prompt` (messages or a text), or what the policy's `tokenizer` decodes. With a chat template a text
    is one user message; without one, messages are paragraphs and the response goes on where a text ends.
    """
    prompt = prompt_of(response, tokenizer)
    if reader.chat_template:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return chat_ids(reader, [*messages, {"role": "assistant", "content": response.text}])
    if not isinstance(prompt, str):
        return reader("\n\n".join([*(message["content"] for message in prompt), response.text]))["input_ids"]
    if "prompt" in response.problem or tokenizer is None:
        return reader(prompt + response.text)["input_ids"]
    return reader(tokenizer.decode(response.prompt_ids + response.ids, skip_special_tokens=True))["input_ids"]  # spaces as they were


def prompt_of(response: Response, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    """The problem's `prompt` (messages or a text), else the prompt's ids as text. Raises ValueError when there is neither."""
    if "prompt" in response.problem:
        return response.problem["prompt"]
    if tokenizer is None:
        raise ValueError(f"problem {response.problem.get('id')!r} has no prompt in words: give its row a `prompt`, or build the reward "
                         "with the policy's tokenizer")
    return tokenizer.decode(response.prompt_ids, skip_special_tokens=True)


def check_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError naming the first id that the reward model's tokenizer and the policy's read differently."""
    own, other = ({i: token for token, i in each.get_vocab().items()} for each in (AutoTokenizer.from_pretrained(trusted(path)), tokenizer))
    if different := sorted(i for i in own.keys() | other.keys() if own.get(i) != other.get(i)):
        i = different[0]
        raise ValueError(f"reward model {path} reads token {i} as {own.get(i)!r}, the policy as {other.get(i)!r} ({len(different):,} "
                         f"tokens differ): train both from one tokenizer, or let it read texts with its own: {path}@text")


def function_reward(path: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Reward:
    """A Python function named `module:function`, called as `f(problems, texts, finished)` or, if it takes `completions`, as TRL does.

    TRL's signature is `f(prompts, completions, completion_ids, **columns)`: prompts and completions are messages where the problems
    have them, else texts; the columns are those of the problems' rows. Raises ValueError when there is no such function, and, naming
    it and the response, when it raises or its score is no finite number.
    """
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {path!r}: {error}; expected module:function, for example stages.rl.rewards:gold") from None
    accepted = inspect.signature(function).parameters
    everything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())

    def call(responses: Sequence[Response]) -> Any:
        if "completions" not in accepted:
            return function([r.problem for r in responses], [r.text for r in responses], [r.finished for r in responses])
        prompts = [prompt_of(r, tokenizer) for r in responses]
        given: dict[str, list] = {column: [r.problem.get(column) for r in responses] for column in
                                  dict.fromkeys(key for r in responses for key in r.problem if key != "prompt")}
        given |= {"prompts": prompts, "completion_ids": [r.ids for r in responses], "completions": [
            r.text if isinstance(prompt, str) else [{"role": "assistant", "content": r.text}]
            for r, prompt in zip(responses, prompts, strict=True)]}
        return function(**{key: values for key, values in given.items() if everything or key in accepted})

    def reward(responses: Sequence[Response]) -> Tensor:
        try:
            given = call(responses)
        except Exception as error:
            for i, response in enumerate(responses):  # which of them it cannot judge
                try:
                    call([response])
                except Exception as alone:
                    raise ValueError(f"reward {path!r} raised {_line(alone)} at {_which(responses, i)}: mend the "
                                     "function, or let it return a score for such a response") from alone
            raise ValueError(f"reward {path!r} raised {_line(error)} for {len(responses)} responses, for none of them "
                             "alone: mend the function") from error
        return as_scores(path, given, responses)

    return reward


def as_scores(name: str, given: Any, responses: Sequence[Response]) -> Tensor:
    """What a source returned as (B,) float32. Raises ValueError naming the source and the first response without a finite number."""
    if not hasattr(given, "__len__") or len(given) != len(responses):
        got = f"{len(given)} scores" if hasattr(given, "__len__") else repr(given)
        raise ValueError(f"reward {name!r} returned {got} for {len(responses)} responses: return one each, in order")
    scores = []
    for i, score in enumerate(given):
        try:
            number = float(score)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"reward {name!r} returned {score} for {_which(responses, i)}: a score is a finite number; a "
                             "function returns 0 for a response that it does not judge")
        scores.append(number)
    return torch.tensor(scores)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _which(responses: Sequence[Response], i: int) -> str:
    return f"response {i} of {len(responses)} (problem {responses[i].problem.get('id')!r}, text {responses[i].text[:40]!r})"


def build_reward(spec: Mapping[str, float], *, model_path: Path | None, vocab_size: int, device: torch.device | str = "cpu",
                 tokenizer: PreTrainedTokenizerBase | None = None, shared: Any = None) -> Reward:
    """The weighted sum of the sources in `spec`: `model` is the reward model at `model_path`, the others are as described above.

    `shared` is that reward model already in memory, as an adapter on the policy's base.

    `tokenizer` is the policy's, for the check of `model_reward` and for prompts in words. Raises ValueError for a source that is none
    of these, and, when it is called, for a score that is no finite number.
    """
    if not spec:
        raise ValueError("reward has no source: set reward to {model: 1.0} or to {module:function: 1.0}")
    sources: dict[str, Reward] = {}
    for name in spec:
        if name == "model" and shared is not None:
            sources[name] = partial(unit_scores, shared)
        elif folder := _folder(name, model_path):
            _, combination, text = _parts(name)
            sources[name] = model_reward(folder, vocab_size=vocab_size, device=device, tokenizer=tokenizer, combination=combination,
                                         text=text)
        elif name == "verifier" or ":" in name:
            sources[name] = function_reward(VERIFIER if name == "verifier" else name, tokenizer)
        else:
            raise ValueError(f"reward {name!r} is neither `model`, `verifier`, a folder with a reward model, nor module:function")
    return lambda responses: torch.stack([spec[name] * as_scores(name, source(responses), responses)
                                          for name, source in sources.items()]).sum(dim=0)


def reward_models(spec: Mapping[str, float], model_path: Path | None) -> list[Path]:
    """Folders of the reward models among the sources, an ensemble's as one."""
    return [folder for name in spec if (folder := _folder(name, model_path))]


def scorers(spec: Mapping[str, float], model_path: Path | None) -> list[Path]:
    """Folders of all that read every response which is scored: the members of ensembles, too."""
    return [member for folder in reward_models(spec, model_path) for member in member_folders(folder)]


def needs_model(spec: Mapping[str, float]) -> bool:
    """Whether the run's own reward model is among the sources."""
    return any(_parts(name)[0] == "model" for name in spec)


def reads_text(name: str) -> bool:
    """Whether a source reads text with a tokenizer of its own, so that the policy's ids mean nothing to it."""
    return _parts(name)[2]


def load_critic(path: Path, *, vocab_size: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The reward model as the start of a critic, which reads the policy's ids. Raises ValueError where they mean something else to it."""
    critic = AutoModelForSequenceClassification.from_pretrained(trusted(path), num_labels=1, dtype=torch.float32)
    try:
        if critic.config.vocab_size != vocab_size:
            raise ValueError(f"it has {critic.config.vocab_size} tokens, the policy {vocab_size}")
        if (path / "tokenizer_config.json").is_file():
            check_tokens(path, tokenizer)
    except ValueError as error:
        raise ValueError(f"the reward model {path} cannot be the critic: {error}; set value_trunk to shared") from None
    return critic


def _parts(name: str) -> tuple[str, str | None, bool]:
    """A source, the combination of its ensemble, and whether it reads texts: (model, min, True) of model@min@text.

    A path may have an @ of its own.
    """
    text = name.endswith("@text")
    name = name.removesuffix("@text")
    source, _, combination = name.rpartition("@")
    return (source, combination, text) if source == "model" or (source and combination in COMBINATIONS) else (name, None, text)


def _folder(name: str, model_path: Path | None) -> Path | None:
    """The reward model's folder that a source names, if it names one."""
    name = _parts(name)[0]
    folder = model_path if name == "model" else Path(name)
    return folder if folder is not None and (folder / "config.json").is_file() else None
