"""Loss and next-token accuracy on held-out rows, equal whatever the number of processes."""
import math
import tempfile

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
        tokens, rows = sum(count), len(count)

        def ratio(sums: list[float]) -> tuple[float, tuple[float, float]]:
            """Sum over tokens with its interval: the spread of row sums around what their length predicts (Cochran 1977, section 6.4)."""
            value = sum(sums) / tokens
            spread = sum((s - value * c) ** 2 for s, c in zip(sums, count, strict=True))
            error = math.sqrt(spread / max(1, rows - 1) * rows) / tokens
            return value, (value - 1.96 * error, value + 1.96 * error)

        (loss, around_loss), (accuracy, around_accuracy) = ratio(loss_sum), ratio(correct)
        return {"loss": loss, "ci95": around_loss, "accuracy": accuracy, "accuracy_ci95": around_accuracy, "n": tokens}


@torch.no_grad()
def row_sums(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss sum, correct predictions and predicted tokens of each row, (B,) each, float64 and int64."""
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1].float()
    keep = labels != -100
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    correct = (logits.argmax(-1) == labels) & keep
    return losses.double().sum(1), correct.sum(1), keep.sum(1)


def heldout(model: nn.Module, rows, collator, *, batch_size: int = 16) -> dict[str, dict]:
    """`heldout_loss` and `heldout_accuracy` of `model` over `rows`, as manifest metrics. Call on every process.

    Each process takes every W-th row; the metric is combined through exact row sums, so the result does not depend on W.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as cache:
        total = TokenLoss(cache_dir=cache)
        mine = range(rank(), len(rows), world_size())
        sums = []
        for start in range(0, len(mine), batch_size):
            chosen = [rows[i] for i in mine[start:start + batch_size]]
            batch = {key: value.to(device) for key, value in collator(chosen).items()}
            sums.append([t.tolist() for t in row_sums(model, batch)])
        parts = gather([[x for part in sums for x in part[i]] for i in range(3)]) if sums else gather([[], [], []])
        for i in range(0, len(parts), 3):
            if parts[i]:
                total.add_batch(loss_sum=parts[i], correct=parts[i + 1], count=parts[i + 2])
        result = total.compute()
    model.train(was_training)
    return {"heldout_loss": metric(result["loss"], n=result["n"], ci95=result["ci95"]),
            "heldout_accuracy": metric(result["accuracy"], n=result["n"], ci95=result["accuracy_ci95"])}
