"""What fine-tuning costs the model it starts from: loss and KL on text it used to know, and which checkpoint to keep for it.

Both are measured at intervals, on rows whose number is chosen beforehand from the tokens that training will see: a forward pass
is a half to a third of a training step, so the watch has a known share of the work (and the stage says what it took).
"""
import json
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stages.data.packing import PackedCollator
from stages.data.tokenizer import document_end
from stages.models.heldout import measured, ratio, row_sums
from stages.models.training import barrier
from stages.run.manifest import Manifest, is_main, write_json

POSITIONS = 32  # of a row, evenly spread, at which the base model's whole distribution is kept
SNAPSHOT_BYTES = 128 << 20
STEP_IN_FORWARDS = 2  # training on a token costs two forward passes at least (adapters), three with all weights
FEWEST_ROWS = 4


class Neutral:
    """Held-out rows of the base corpus, and what the base model says of them: the same rows tell loss and KL of any later model.

    `rows` hold `input_ids`; each process keeps the distributions of its own share of them (fp32, at most `SNAPSHOT_BYTES` in all).
    """

    def __init__(self, model: nn.Module, rows: Sequence[Mapping[str, Any]], collator):
        self.rows = [{"input_ids": row["input_ids"], "row": number} for number, row in enumerate(rows)]
        self.collator = collator
        vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
        self.positions = max(1, min(POSITIONS, SNAPSHOT_BYTES // (4 * vocabulary * max(1, len(rows)))))
        self.base: dict[int, tuple[Tensor, Tensor]] = {}
        self.before = measured(model, self.rows, self._collate, measure=self._measure)

    def look(self, model: nn.Module, count: int | None = None) -> list[list[float]]:
        """Loss sum, right predictions, predicted tokens, KL(base || model) summed, and positions of that sum, of each row."""
        return measured(model, self.rows[:count], self._collate, measure=self._measure)

    def _collate(self, rows: list[dict]) -> dict[str, Tensor]:
        return {**self.collator(rows), "row": torch.tensor([row["row"] for row in rows])}

    def _measure(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        numbers = batch.pop("row").tolist()
        keep = batch["labels"][:, 1:] != -100
        kl: list[tuple[float, int]] = []

        def distributions(logits: Tensor) -> None:
            for logit, number, kept in zip(logits, numbers, keep, strict=True):
                if number not in self.base:
                    places = kept.nonzero().flatten()
                    places = places[torch.linspace(0, len(places) - 1, min(self.positions, len(places))).round().long().to(places.device)]
                    self.base[number] = places, logit[places].float().log_softmax(-1)
                places, base = self.base[number]
                change = base - logit[places].float().log_softmax(-1)
                kl.append((float((base.exp() * change).sum()), len(places)))

        sums = row_sums(model, batch, look=distributions)
        return *sums, torch.tensor([k for k, _ in kl], dtype=torch.float64), torch.tensor([n for _, n in kl])


def base_text(prepared: Manifest, model: Any, tokenizer: PreTrainedTokenizerBase, *, rows: int, pad_id: int) -> Neutral | None:
    """The first held-out `rows` of prepare's corpus as `model` now reads them; None for 0 rows, or where prepare made no tokens."""
    if not rows or "tokens" not in prepared.data["products"]:
        return None
    held_out: Any = datasets.load_from_disk(str(prepared.product("tokens") / "heldout"))
    return Neutral(model, held_out.select(range(min(rows, len(held_out)))), PackedCollator(eos_id=document_end(tokenizer), pad_id=pad_id))


def rows_within(lengths: Sequence[int], tokens: float) -> int:
    """How many of the first rows have at most `tokens` together, at least `FEWEST_ROWS` of them where there are as many."""
    total, count = 0, 0
    for length in lengths:
        total += length
        if total > tokens and count >= FEWEST_ROWS:
            break
        count += 1
    return count


class Watch:
    """Looks at validation dialogues and neutral rows at intervals of the training and remembers what it saw, across restarts.

    `validation` are encoded dialogues, the sources taking turns, `sources` the source of each; `tokens` is what one look may read, half
    of it of each kind. Every look is a file `<folder>/<step>.json`.
    """

    def __init__(self, folder: Path, *, validation: Sequence[Mapping[str, Any]], sources: Sequence[str], collator, neutral: Neutral | None,
                 tokens: float):
        self.folder, self.collator, self.neutral = folder, collator, neutral
        self.count = max(len(set(sources)), rows_within([len(row["input_ids"]) for row in validation], tokens / 2))
        self.validation, self.sources = validation[:self.count], sources[:self.count]
        self.neutral_count = rows_within([len(row["input_ids"]) for row in neutral.rows], tokens / 2) if neutral else 0
        self.seconds = 0.0
        self.points: list[dict[str, Any]] = []

    def rewind(self, step: int) -> None:
        """Begin again after `step`: later looks are forgotten, earlier ones read back."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob("*.json")]
        self.points = sorted((point for point in found if point["step"] <= step), key=lambda point: point["step"])
        barrier()
        for path in self.folder.glob("*.json") if is_main() else []:
            if int(path.stem) > step:
                path.unlink()
        barrier()

    def look(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure at this step, once, and return what a log shows."""
        point = next((point for point in self.points if point["step"] == step), None)
        if point is None:
            began = time.time()
            point = {"step": step, "validation": measured(model, self.validation, self.collator),
                     "neutral": self.neutral.look(model, self.neutral_count) if self.neutral else []}
            self.seconds += time.time() - began
            self.points.append(point)
            if is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / f"{step}.json", point)
        return self.logs(point)

    def logs(self, point: Mapping[str, Any]) -> dict[str, float]:
        logs = {"eval_loss": mean(point["validation"]), "eval_mean_token_accuracy": mean(point["validation"], 1)}
        names = dict.fromkeys(self.sources)
        if len(names) > 1:
            logs |= {f"eval_loss_{name}": self.loss_of(point, name) for name in names}
        if point["neutral"]:
            logs |= {"forgetting/base_loss": mean(point["neutral"]), "forgetting/kl_to_base": mean(point["neutral"], 3, 4)}
        return logs

    def rows_of(self, point: Mapping[str, Any], source: str) -> list[list[float]]:
        """What the look found of one source's validation rows."""
        return [row for row, of in zip(point["validation"], self.sources, strict=True) if of == source]

    def loss_of(self, point: Mapping[str, Any], source: str) -> float:
        return mean(self.rows_of(point, source))

    def recommended(self, among: Container[int] | None = None) -> tuple[int, list[int]]:
        """Step of the checkpoint to keep, and steps of all that have learned as much, within noise; `among` those steps, or all."""
        trained = [point for point in self.points if point["step"] and (among is None or point["step"] in among)]
        best, equal = recommend([point["validation"] for point in trained],
                                [mean(point["neutral"]) if point["neutral"] else 0.0 for point in trained])
        return trained[best]["step"], [trained[i]["step"] for i in equal]

    def worse_in_a_row(self) -> int:
        """How many of the last looks lie above the lowest validation loss by more than twice the standard error."""
        rows = [point["validation"] for point in self.points if point["step"]]
        best = min(rows, key=mean)
        count = 0
        for other in reversed(rows):
            difference, error = above(best, other)
            if difference <= 2 * error:
                break
            count += 1
        return count


def mean(rows: Sequence[Sequence[float]], column: int = 0, count: int = 2) -> float:
    """Mean a token of what rows summed in `column`."""
    return ratio([row[column] for row in rows], [int(row[count]) for row in rows])[0]


def above(best: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Loss of `other` over that of `best` on the same rows (nats a token), and the standard error of this paired difference."""
    return ratio([b[0] - a[0] for a, b in zip(best, other, strict=True)], [int(row[2]) for row in best])


def recommend(learning: Sequence[Sequence[Sequence[float]]], forgetting: Sequence[float]) -> tuple[int, list[int]]:
    """Which checkpoint to keep: of those that learned as much as the best, the one that forgot least; and all of the former.

    `learning` holds for each checkpoint the loss sum, right predictions and tokens of the same validation rows, `forgetting` its
    loss on the base corpus. A checkpoint has learned as much if its validation loss is above the lowest by at most one standard
    error of the difference, rows paired: the one-standard-error rule (Breiman et al. 1984, section 3.4.3). Equal ones: the later.
    """
    best = min(learning, key=mean)
    equal = [i for i, rows in enumerate(learning) for difference, error in [above(best, rows)] if difference <= error]
    return min(equal, key=lambda i: (forgetting[i], -i)), equal


def backward_transfer(scores: Sequence[Sequence[float]]) -> float:
    """Mean change of earlier tasks' scores from the end of their own training to the end of it all (Lopez-Paz & Ranzato 2017, eq. 3).

    `scores[i][j]` is the score on task j after training on task i, higher being better; T x T. Below 0 is forgetting.
    Raises ValueError for fewer than two tasks, of which none is earlier than another.
    """
    if len(scores) < 2:
        raise ValueError(f"backward transfer needs two tasks or more, got {len(scores)}")
    return sum(scores[-1][i] - scores[i][i] for i in range(len(scores) - 1)) / (len(scores) - 1)
