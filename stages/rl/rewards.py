"""Where scores come from: a reward model, a Python function, or a weighted sum of them.

A source takes the responses and returns one score each. Named in a recipe as a mapping of sources to weights:

    reward: {model: 1.0}                                  # the reward model trained before
    reward: {verifier: 1.0}                               # 1 where the answer is right, else 0
    reward: {model: 0.5, "stages.rl.rewards:gold": 0.5}   # with a function `f(problems, texts, finished) -> list of floats`
    reward: {runs/other/reward_model/model: 1.0}          # a reward model by its folder
    reward: {model@min: 1.0}                              # an ensemble's worst case: @mean, @min or @mean_std in place of its own choice
"""
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from reward.model import COMBINATIONS, ENSEMBLE, load_ensemble, member_folders, normalize, score_ids
from reward.verifiers import GoldScore, gold_score
from stages.rl.models import remove_dropout

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
                 tokenizer: PreTrainedTokenizerBase | None = None) -> Reward:
    """A reward model's normalised scores of token ids as they were sampled: text tokenised anew can split differently.

    Of an ensemble, the score that `combination` makes of its members' (default: what it was saved with). Raises ValueError when its
    vocabulary is not the policy's, by size and, with the policy's `tokenizer`, token by token: the ids would mean something else.
    """
    path = Path(path)
    models = [AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).to(device).eval() for folder in member_folders(path)]
    for model in models:
        remove_dropout(model).requires_grad_(False)
        if model.config.vocab_size != vocab_size:
            raise ValueError(f"reward model {path} has {model.config.vocab_size} tokens, the policy {vocab_size}: "
                             "train both from one tokenizer, or give the reward as a Python function of texts")
    if tokenizer is not None and (path / "tokenizer_config.json").is_file():
        check_tokens(path, tokenizer)
    if combination is None and not (path / ENSEMBLE).is_file():
        return lambda responses: torch.tensor(normalize(models[0].config, score_ids(models[0], [r.prompt_ids + r.ids for r in responses])))
    ensemble = load_ensemble(path, models, combination)
    return lambda responses: torch.tensor(ensemble.unit(ensemble.raw([r.prompt_ids + r.ids for r in responses])))


def check_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError naming the first id that the reward model's tokenizer and the policy's read differently."""
    own, other = ({i: token for token, i in each.get_vocab().items()} for each in (AutoTokenizer.from_pretrained(path), tokenizer))
    if different := sorted(i for i in own.keys() | other.keys() if own.get(i) != other.get(i)):
        i = different[0]
        raise ValueError(f"reward model {path} reads token {i} as {own.get(i)!r}, the policy as {other.get(i)!r} ({len(different):,} "
                         "tokens differ): train both from one tokenizer, or give the reward as a Python function of texts")


def function_reward(path: str) -> Reward:
    """A Python function named `module:function`. Raises ValueError when there is none, or when it returns the wrong number."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {path!r}: {error}; expected module:function, for example stages.rl.rewards:gold") from None

    def reward(responses: Sequence[Response]) -> Tensor:
        scores = function([r.problem for r in responses], [r.text for r in responses], [r.finished for r in responses])
        if len(scores) != len(responses):
            raise ValueError(f"reward {path!r} returned {len(scores)} scores for {len(responses)} responses: return one each, "
                             "in order")
        return torch.tensor([float(score) for score in scores])

    return reward


def build_reward(spec: Mapping[str, float], *, model_path: Path | None, vocab_size: int, device: torch.device | str = "cpu",
                 tokenizer: PreTrainedTokenizerBase | None = None) -> Reward:
    """The weighted sum of the sources in `spec`: `model` is the reward model at `model_path`, the others are as described above.

    `tokenizer` is the policy's, for the check of `model_reward`. Raises ValueError for a source that is none of these.
    """
    if not spec:
        raise ValueError("reward has no source: set reward to {model: 1.0} or to {module:function: 1.0}")
    sources: list[tuple[float, Reward]] = []
    for name, weight in spec.items():
        if folder := _folder(name, model_path):
            sources.append((weight, model_reward(folder, vocab_size=vocab_size, device=device, tokenizer=tokenizer,
                                                 combination=_parts(name)[1])))
        elif name == "verifier" or ":" in name:
            sources.append((weight, function_reward(VERIFIER if name == "verifier" else name)))
        else:
            raise ValueError(f"reward {name!r} is neither `model`, `verifier`, a folder with a reward model, nor module:function")
    return lambda responses: torch.stack([weight * source(responses) for weight, source in sources]).sum(dim=0)


def reward_models(spec: Mapping[str, float], model_path: Path | None) -> list[Path]:
    """Folders of the reward models among the sources, an ensemble's as one."""
    return [folder for name in spec if (folder := _folder(name, model_path))]


def scorers(spec: Mapping[str, float], model_path: Path | None) -> list[Path]:
    """Folders of all that read every response which is scored: the members of ensembles, too."""
    return [member for folder in reward_models(spec, model_path) for member in member_folders(folder)]


def needs_model(spec: Mapping[str, float]) -> bool:
    """Whether the run's own reward model is among the sources."""
    return any(_parts(name)[0] == "model" for name in spec)


def _parts(name: str) -> tuple[str, str | None]:
    """A source and the combination of its ensemble: (model, min) of model@min. A path may have an @ of its own."""
    source, _, combination = name.rpartition("@")
    return (source, combination) if source == "model" or (source and combination in COMBINATIONS) else (name, None)


def _folder(name: str, model_path: Path | None) -> Path | None:
    """The reward model's folder that a source names, if it names one."""
    name = _parts(name)[0]
    folder = model_path if name == "model" else Path(name)
    return folder if folder is not None and (folder / "config.json").is_file() else None
