"""Loss and next-token accuracy on held-out rows, equal whatever the number of processes."""
import math
import tempfile
from collections.abc import Callable, Sequence

import datasets
import evaluate
import torch
from torch import nn

from stages.models.training import gather, rank, world_size
from stages.run.manifest import metric


class TokenLoss(evaluate.Metric):
    """Mean negative log-likelihood (nats a token) and next-token accuracy from the sums of each row.

    Rows carry `loss_sum`, `correct` and `count`; the interval treats rows as the independent unit (tokens of one row are not).
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Token loss and accuracy from row sums.", citation="", inputs_description="",
            features=datasets.Features({"loss_sum": datasets.Value("float64"), "correct": datasets.Value("int64"),
                                        "count": datasets.Value("int64")}))

    def _compute(self, *, loss_sum, correct, count):
        (loss, around_loss), (accuracy, around_accuracy) = (
            (value, (value - 1.96 * error, value + 1.96 * error)) for value, error in (ratio(loss_sum, count), ratio(correct, count)))
        return {"loss": loss, "ci95": around_loss, "accuracy": accuracy, "accuracy_ci95": around_accuracy, "n": sum(count)}


def ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Mean over tokens of what was summed in each row, and its standard error: rows are independent, tokens of one row are not.

    The error is the spread of the row sums around what their lengths predict (Cochran 1977, section 6.4).
    """
    tokens, rows = sum(counts), len(counts)
    value = sum(sums) / tokens
    spread = sum((s - value * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return value, math.sqrt(spread / max(1, rows - 1) * rows) / tokens


@torch.no_grad()
def row_sums(model: nn.Module, batch: dict[str, torch.Tensor], look: Callable[[torch.Tensor], None] = lambda logits: None,
             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss sum, correct predictions and predicted tokens of each row, (B,) each, float64 and int64.

    `look` is shown the logits, (B, T - 1, V), of what follows each token but the last.
    """
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    look(logits)
    keep = labels != -100
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    correct = (logits.argmax(-1) == labels) & keep
    return losses.double().sum(1), correct.sum(1), keep.sum(1)


def heldout(model: nn.Module, rows, collator, *, batch_size: int = 16) -> dict[str, dict]:
    """`heldout_loss` and `heldout_accuracy` of `model` over `rows`, as manifest metrics. Call on every process."""
    return summarised(measured(model, rows, collator, batch_size=batch_size))


@torch.no_grad()
def measured(model: nn.Module, rows, collator, *, batch_size: int = 16,
             measure: Callable[..., tuple[torch.Tensor, ...]] = row_sums) -> list[list[float]]:
    """What `measure` says of each row (by default loss sum, correct predictions, predicted tokens), in the order of the rows.

    Each process takes every W-th row and all are told the whole, so the result does not depend on W. The model is in eval mode
    meanwhile and then as it was.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    mine = sorted(range(rank(), len(rows), world_size()), key=lambda i: len(rows[i]["input_ids"]))  # rows of a length need little padding
    own = len(mine)
    mine += [0] * (-(-len(rows) // world_size()) - own)  # engines that divide the weights want as many forward passes everywhere
    found: list[tuple[int, list[float]]] = []
    for start in range(0, len(mine), batch_size):
        chosen = mine[start:start + batch_size]
        batch = {key: value.to(device) for key, value in collator([rows[i] for i in chosen]).items()}
        columns = [column.tolist() for column in measure(model, batch)]
        found += list(zip(chosen, map(list, zip(*columns, strict=True)), strict=True))[:max(0, own - start)]
    model.train(was_training)
    return [values for _, values in sorted(gather(found), key=lambda pair: pair[0])]


def summarised(rows: list[list[float]]) -> dict[str, dict]:
    """`heldout_loss` and `heldout_accuracy` of what `measured` found, as manifest metrics."""
    with tempfile.TemporaryDirectory() as cache:
        total = TokenLoss(cache_dir=cache)
        loss_sum, correct, count = zip(*rows, strict=True)
        total.add_batch(loss_sum=list(loss_sum), correct=list(correct), count=list(count))
        result = total.compute()
    return {"heldout_loss": metric(result["loss"], n=result["n"], ci95=result["ci95"]),
            "heldout_accuracy": metric(result["accuracy"], n=result["n"], ci95=result["accuracy_ci95"])}
