"""The reward model: a sequence classifier with one output, read at the last real token of prompt and response.

It is a plain AutoModelForSequenceClassification, so anything that loads transformers can score with it; two constants in its
config, `score_mean` and `score_std`, bring its scores to mean 0 and variance 1 on samples of the SFT model.

An ensemble lies in one folder too, as such a plain model with `ensemble.json` beside it. Its members are heads on one trunk (the
plain model then has their mean as its head, and is the ensemble's mean) or models of their own (the plain model is the first of
them): who knows nothing of ensembles reads a sound reward model.

Letters: B prompts, K responses a prompt, T tokens a row, N sequences, M members of an ensemble.
"""
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from reward.folders import inside, read_object, trusted

Group = tuple[list[int], list[list[int]]]  # prompt ids, ids of each response
T = TypeVar("T")


ENSEMBLE, HEADS = "ensemble.json", "heads.safetensors"
COMBINATIONS = ("mean", "min", "mean_std")


def from_language_model(path: str | Path, *, pad_id: int, seed: int, heads: int = 1, random_head: bool = False) -> PreTrainedModel:
    """A reward model on a language model's trunk, in float32, dropout off, with the score head at zero: no opinion at first.

    With `random_head` it is drawn from N(0, 1 / (width + 1)) (Stiennon et al. 2020, appendix B.1): members of an ensemble have to
    begin differently. `heads` above one are rows of one head; the config goes on saying one, which a saved model has again.
    """
    config = AutoConfig.from_pretrained(trusted(path))
    text = config.get_text_config()
    for name in vars(text):
        if name.endswith(("dropout", "pdrop")):
            setattr(text, name, 0.0)
    text.pad_token_id = pad_id
    config.num_labels = 1
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the missing head and the unused one are meant
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(trusted(path), config=config, dtype=torch.float32)
    transformers.logging.set_verbosity(verbosity)
    if heads > 1:
        model.score = nn.Linear(model.score.in_features, heads, bias=False)
    nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5) if random_head else nn.init.zeros_(model.score.weight)
    return model


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (True: a token), each (N, T)."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    return ids, torch.arange(width)[None, :] < torch.tensor([len(row) for row in rows])[:, None]


@torch.no_grad()
def head_scores(model: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int = 64) -> list[list[float]]:
    """Raw scores of each token sequence (prompt and response), one a head, in the order given.

    Sequences of similar length share a batch; padding goes right. The last token that is not the padding token is
    scored, so a sequence should not end with one. The model is in eval mode meanwhile and then as it was.
    """
    pad_id = model.config.get_text_config().pad_token_id
    scores: list[list[float]] = [[]] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        ids, mask = (t.to(model.device) for t in pad_right([rows[i] for i in chosen], pad_id))
        for i, score in zip(chosen, model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.tolist(), strict=True):
            scores[i] = score
    model.train(training)
    return scores


def score_ids(model: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int = 64) -> list[float]:
    """Raw score of each token sequence, as `head_scores`; of several heads their mean. `normalize` brings them to SFT units."""
    return [sum(of) / len(of) for of in head_scores(model, rows, batch_size)]


def rows_of(groups: Sequence[Group]) -> list[list[int]]:
    return [prompt + response for prompt, responses in groups for response in responses]


def grouped(flat: Sequence[T], groups: Sequence[Group]) -> list[list[T]]:
    """What belongs to the rows of `rows_of`, one list a prompt again."""
    values = iter(flat)
    return [[next(values) for _ in responses] for _, responses in groups]


def score_groups(model: PreTrainedModel, groups: Sequence[Group], batch_size: int = 64) -> list[list[float]]:
    """`score_ids` of each prompt's responses, grouped as they came."""
    return grouped(score_ids(model, rows_of(groups), batch_size), groups)


def mean_and_std(scores: Sequence[float]) -> tuple[float, float]:
    """What brings these scores (of SFT samples) to mean 0 and variance 1.

    Raises ValueError when all scores are equal: such a model rewards nothing.
    """
    mean = math.fsum(scores) / len(scores)
    std = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / len(scores))
    if std < 1e-6:
        raise ValueError(f"the reward model gives all {len(scores)} samples the score {mean:g}: train it longer or at a higher rate")
    return mean, std


def set_normalization(model: PreTrainedModel, scores: Sequence[float]) -> None:
    """Save in the config the constants of `mean_and_std`, whose errors it raises."""
    model.config.score_mean, model.config.score_std = mean_and_std(scores)


def normalize(config: PretrainedConfig, scores: Sequence[float]) -> list[float]:
    """Raw scores in standard deviations of SFT samples from their mean; unchanged without constants in the config."""
    return [(s - getattr(config, "score_mean", 0.0)) / getattr(config, "score_std", 1.0) for s in scores]


def combine(scores: Sequence[Sequence[float]], combination: str, std_coef: float) -> list[float]:
    """One score of each row's M: (N,) from (N, M).

    `mean`; `min`, the worst case; `mean_std`, the mean less `std_coef` standard deviations: what the members are not agreed on is
    not worth much (Coste et al. 2023, sections 3.2 and 3.3, who subtract the variance; its root has the unit of a score, so that
    the coefficient means the same whatever the scale). Raises ValueError for another name.
    """
    if combination not in COMBINATIONS:
        raise ValueError(f"unknown combination {combination!r} of an ensemble: choose {', '.join(COMBINATIONS)}")
    if combination == "min":
        return [min(of) for of in scores]
    return [statistics.fmean(of) - (std_coef * statistics.pstdev(of) if combination == "mean_std" else 0.0) for of in scores]


@dataclass(frozen=True)
class Ensemble:
    """Reward models that differ by seed, and how their scores become one.

    `models`: one with a head a member, or a model a member. Every member's scores are brought to mean 0 and variance 1 on samples
    of the SFT model before they are compared, by `members` (mean, std); `combined` does the same for each combination of them.
    """

    models: list[Any]
    members: list[tuple[float, float]]
    combined: dict[str, tuple[float, float]]
    combination: str
    std_coef: float

    def raw(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """(N, M) scores of token sequences as the members give them."""
        return members_scores(self.models, rows)

    def unit(self, raw: Sequence[Sequence[float]]) -> list[float]:
        """(N,) combined scores in standard deviations of SFT samples from their mean, of raw ones (N, M)."""
        mean, std = self.combined[self.combination]
        return [(score - mean) / std for score in combine(_normalized(raw, self.members), self.combination, self.std_coef)]

    def disagreement(self, raw: Sequence[Sequence[float]]) -> float:
        """Standard deviation over the members, mean over rows: 0 where they are one, about 1 where they have nothing in common."""
        return statistics.fmean(map(statistics.pstdev, _normalized(raw, self.members)))


def members_scores(models: Sequence[PreTrainedModel], rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """(N, M) raw scores: those of every head of every model, in order."""
    parts = [head_scores(model, rows) for model in models]
    return [[score for of in row for score in of] for row in zip(*parts, strict=True)]


def members_groups(models: Sequence[PreTrainedModel], groups: Sequence[Group]) -> list[list[list[float]]]:
    """`members_scores` of each prompt's responses, grouped as they came."""
    return grouped(members_scores(models, rows_of(groups)), groups)


def combined_groups(ensemble: Ensemble, groups: Sequence[Group], raw: Sequence[Sequence[float]] | None = None) -> list[list[float]]:
    """Combined scores of each prompt's responses as logits of Bradley and Terry, not in SFT units: with the members' mean spread.

    `raw` (N, M) are the members' scores of the rows, where they are known already.
    """
    logit = ensemble.combined[ensemble.combination][1] * statistics.fmean(std for _, std in ensemble.members)
    return grouped([score * logit for score in ensemble.unit(raw or ensemble.raw(rows_of(groups)))], groups)


def build_ensemble(models: list[Any], raw: Sequence[Sequence[float]], *, combination: str, std_coef: float) -> Ensemble:
    """An ensemble with its constants from raw scores (N, M) of SFT samples. Raises ValueError as `mean_and_std` does."""
    members = [mean_and_std(column) for column in zip(*raw, strict=True)]
    unit = _normalized(raw, members)
    return Ensemble(models, members, {name: mean_and_std(combine(unit, name, std_coef)) for name in COMBINATIONS},
                    combination, std_coef)


def _normalized(raw: Sequence[Sequence[float]], members: Sequence[tuple[float, float]]) -> list[list[float]]:
    return [[(score - mean) / std for score, (mean, std) in zip(row, members, strict=True)] for row in raw]


@torch.no_grad()
def plain_model(ensemble: Ensemble, raw: Sequence[Sequence[float]]) -> PreTrainedModel:
    """The ensemble for those who know nothing of ensembles: the mean of its heads as one head, or the first of its models.

    `raw` (N, M) are scores of SFT samples, for its constants. Heads are left as they are: write them with `write_ensemble` first.
    """
    plain = ensemble.models[0]
    if len(ensemble.models) > 1:
        set_normalization(plain, [row[0] for row in raw])
        return plain
    scale = torch.tensor([1 / std for _, std in ensemble.members]) / len(ensemble.members)
    heads, plain.score = plain.score.weight, nn.Linear(plain.score.in_features, 1, bias=False).to(plain.device)
    plain.score.weight.copy_(scale.to(heads) @ heads)
    set_normalization(plain, [sum(score * float(share) for score, share in zip(row, scale, strict=True)) for row in raw])
    return plain


def write_ensemble(ensemble: Ensemble, path: Path) -> None:
    """`ensemble.json`, and the heads on one trunk beside it. Models of their own are for the caller to save, in `members/<number>`."""
    path.mkdir(parents=True, exist_ok=True)
    own = [f"members/{number}" for number in range(1, len(ensemble.models))]
    if not own:
        safetensors.torch.save_file({"heads": ensemble.models[0].score.weight.detach().cpu().contiguous()}, path / HEADS)
    facts = {key: value for key, value in asdict(replace(ensemble, models=[])).items() if key != "models"}
    (path / ENSEMBLE).write_text(json.dumps(facts | {"folders": own}, indent=1) + "\n", encoding="utf-8")


def member_folders(path: Path) -> list[Path]:
    """The folders whose models score together: that of the model itself, and those of an ensemble's further members."""
    file = path / ENSEMBLE
    return [path, *(inside(path, name) for name in read_object(file)["folders"])] if file.is_file() else [path]


def load_ensemble(path: Path, models: list[Any], combination: str | None) -> Ensemble:
    """An ensemble from its folder, with the models of `member_folders`; `combination` None is the one it was saved with.

    Raises ValueError for a folder without an ensemble and for an unknown combination.
    """
    if not (path / ENSEMBLE).is_file():
        raise ValueError(f"{path} holds one reward model, not an ensemble: leave out @{combination}, or train with ensemble above 1")
    facts = json.loads((path / ENSEMBLE).read_text(encoding="utf-8"))
    combination = combination or facts["combination"]
    if combination not in facts["combined"]:
        raise ValueError(f"unknown combination {combination!r} of an ensemble: choose {', '.join(COMBINATIONS)}")
    if not facts["folders"]:
        heads = safetensors.torch.load_file(path / HEADS)["heads"].to(models[0].device)
        models[0].score = nn.Linear(heads.size(1), heads.size(0), bias=False, device=heads.device)
        models[0].score.weight = nn.Parameter(heads)
    return Ensemble(models, facts["members"], facts["combined"], combination, facts["std_coef"])


@torch.no_grad()
def min_token_logprobs(model: PreTrainedModel, groups: Sequence[Group], batch_size: int = 64) -> list[list[float]]:
    """Log-probability of each response's least expected token under a language model at temperature 1, grouped as they came.

    What a reward model must beat: the SFT model's own surprise already marks many wrong steps.
    """
    flat = [(len(prompt), prompt + response) for prompt, responses in groups for response in responses]
    lowest = [0.0] * len(flat)
    order = sorted(range(len(flat)), key=lambda i: len(flat[i][1]))
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        ids, mask = (t.to(model.device) for t in pad_right([flat[i][1] for i in chosen], 0))
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, :-1].float()
        logprobs = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        first = torch.tensor([flat[i][0] for i in chosen], device=ids.device)
        of_response = (torch.arange(1, ids.size(1), device=ids.device)[None, :] >= first[:, None]) & mask[:, 1:]
        for i, value in zip(chosen, logprobs.masked_fill(~of_response, math.inf).min(dim=1).values.tolist(), strict=True):
            lowest[i] = value
    model.train(training)
    return grouped(lowest, groups)
