"""The reward model: a sequence classifier with one output, read at the last real token of prompt and response.

It is a plain AutoModelForSequenceClassification, so anything that loads transformers can score with it; two constants in its
config, `score_mean` and `score_std`, bring its scores to mean 0 and variance 1 on samples of the SFT model.

Letters: B prompts, K responses a prompt, T tokens a row, N sequences.
"""
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

Group = tuple[list[int], list[list[int]]]  # prompt ids, ids of each response


def from_language_model(path: str | Path, *, pad_id: int, seed: int) -> PreTrainedModel:
    """A reward model on a language model's trunk, in float32, dropout off, with the score head at zero: no opinion at first."""
    config = AutoConfig.from_pretrained(path)
    text = config.get_text_config()
    for name in vars(text):
        if name.endswith(("dropout", "pdrop")):
            setattr(text, name, 0.0)
    text.pad_token_id = pad_id
    config.num_labels = 1
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the missing head and the unused one are meant
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(path, config=config, dtype=torch.float32)
    transformers.logging.set_verbosity(verbosity)
    nn.init.zeros_(model.score.weight)
    return model


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (True: a token), each (N, T)."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows])
    return ids, torch.arange(width)[None, :] < torch.tensor([len(row) for row in rows])[:, None]


@torch.no_grad()
def score_ids(model: PreTrainedModel, rows: Sequence[Sequence[int]], batch_size: int = 64) -> list[float]:
    """Raw score of each token sequence (prompt and response), in the order given. `normalize` brings them to SFT units.

    Sequences of similar length share a batch; padding goes right. The last token that is not the padding token is
    scored, so a sequence should not end with one. The model is in eval mode meanwhile and then as it was.
    """
    pad_id = model.config.get_text_config().pad_token_id
    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        ids, mask = (t.to(model.device) for t in pad_right([rows[i] for i in chosen], pad_id))
        for i, score in zip(chosen, model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits[:, 0].tolist(), strict=True):
            scores[i] = score
    model.train(training)
    return scores


def score_groups(model: PreTrainedModel, groups: Sequence[Group], batch_size: int = 64) -> list[list[float]]:
    """`score_ids` of each prompt's responses, grouped as they came."""
    flat = iter(score_ids(model, [prompt + response for prompt, responses in groups for response in responses], batch_size))
    return [[next(flat) for _ in responses] for _, responses in groups]


def set_normalization(model: PreTrainedModel, scores: Sequence[float]) -> None:
    """Save in the config the constants that bring these scores (of SFT samples) to mean 0 and variance 1.

    Raises ValueError when all scores are equal: such a model rewards nothing.
    """
    mean = math.fsum(scores) / len(scores)
    std = math.sqrt(math.fsum((s - mean) ** 2 for s in scores) / len(scores))
    if std < 1e-6:
        raise ValueError(f"the reward model gives all {len(scores)} samples the score {mean:g}: train it longer or at a higher rate")
    model.config.score_mean, model.config.score_std = mean, std


def normalize(config: PretrainedConfig, scores: Sequence[float]) -> list[float]:
    """Raw scores in standard deviations of SFT samples from their mean; unchanged without constants in the config."""
    return [(s - getattr(config, "score_mean", 0.0)) / getattr(config, "score_std", 1.0) for s in scores]


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
    values = iter(lowest)
    return [[next(values) for _ in responses] for _, responses in groups]
